//! Damaged files: an error or a kernel that may crash, but never a panic and never memory beyond the guest's.

use super::*;

/// A small generator of pseudo-random numbers (xorshift), the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn try_boot(memory: &GuestMemory, image: &[u8], name: &str) {
    let mut source = source(image);
    source.initrd = Some(payload("initrd", b"070701"));
    if let Ok(boot) = load(memory, &source, &acpi(1)) {
        let initrd = boot.initrd.unwrap();
        assert!(memory.contains(initrd.start, 6), "{name}");
        assert!(memory.contains(boot.state.gdtr.base, 40), "{name}");
    }
}

#[test]
fn every_byte_of_every_format_may_be_wrong() {
    let memory = ram(8);
    for (name, image, _, _) in all_formats() {
        for at in 0..image.len() {
            for flip in [0x01, 0xff] {
                let mut bad = image.clone();
                bad[at] ^= flip;
                try_boot(&memory, &bad, name);
            }
        }
    }
}

#[test]
fn every_format_may_end_anywhere() {
    let memory = ram(8);
    for (name, image, _, _) in all_formats() {
        for end in 0..image.len() {
            try_boot(&memory, &image[..end], name);
        }
    }
}

#[test]
fn fields_may_hold_extremes() {
    let memory = ram(8);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for (name, image, _, _) in all_formats() {
        for _ in 0..500 {
            let mut bad = image.clone();
            for _ in 0..1 + random.next() % 3 {
                let size = [1, 2, 4, 8][random.next() as usize % 4];
                let at = random.next() as usize % (bad.len() - size);
                let value = match random.next() % 5 {
                    0 => 0,
                    1 => u64::MAX,
                    2 => 1 << (random.next() % 64),
                    3 => (1 << (random.next() % 64)) - 1,
                    _ => random.next(),
                };
                bad[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
            }
            try_boot(&memory, &bad, name);
        }
    }
}
