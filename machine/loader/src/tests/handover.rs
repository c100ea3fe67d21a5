//! What each kind of kernel is told.

use super::*;

fn u16_at(memory: &GuestMemory, at: u64) -> u16 {
    memory.read_u32(at).unwrap() as u16
}

/// Start, end, type.
type Map = Vec<(u64, u64, u32)>;

/// `count` entries of `size` bytes: start, length, type.
fn map_at(memory: &GuestMemory, at: u64, count: u64, size: u64) -> Map {
    let entry = |i| {
        let at = at + i * size;
        let start = memory.read_u64(at).unwrap();
        let end = start + memory.read_u64(at + 8).unwrap();
        (start, end, memory.read_u32(at + 16).unwrap())
    };
    (0..count).map(entry).collect()
}

pub fn pvh_memory_map(memory: &GuestMemory, boot: &Boot) -> Map {
    let info = boot.state.gpr[3];
    let count = memory.read_u32(info + 48).unwrap();
    map_at(
        memory,
        memory.read_u64(info + 40).unwrap(),
        count.into(),
        24,
    )
}

fn with_initrd(image: &[u8]) -> BootSource {
    BootSource {
        initrd: Some(payload("initrd.img", b"070701")),
        ..source(image)
    }
}

/// A memory layout, and the map that the kernel gets of it.
fn layouts() -> Vec<(Vec<(u64, u64)>, Map)> {
    let low = (0, 0x9_fc00, 1);
    let legacy = (0x9_fc00, MIB, 2);
    let ecam = (0xb000_0000, 0xc000_0000, 2);
    let high = 4096 * MIB;
    vec![
        (
            vec![(0, 8 * MIB)],
            vec![low, legacy, (MIB, 8 * MIB, 1), ecam],
        ),
        (
            vec![(0, 0xb000_0000), (high, MIB)],
            vec![
                low,
                legacy,
                (MIB, 0xb000_0000, 1),
                ecam,
                (high, high + MIB, 1),
            ],
        ),
    ]
}

#[test]
fn linux_finds_its_parameters_in_the_zero_page() {
    let images = [
        bzimage(b"?", Header::default()),
        bzimage(&gzip(&elf(true, 0, None)), Header::default()),
        elf(true, 0, None),
        elf(false, 0, None),
    ];
    for ((ranges, map), image) in layouts()
        .iter()
        .flat_map(|l| images.iter().map(move |i| (l, i)))
    {
        let memory = memory(ranges);
        let boot = load(&memory, &with_initrd(image), &acpi(1)).unwrap();
        let page = boot.state.gpr[6];
        assert_eq!(u16_at(&memory, page + 0x1fe), 0xaa55);
        assert_eq!(read(&memory, page + 0x202, 4), b"HdrS");
        assert_eq!(u16_at(&memory, page + 0x206), 0x20f);
        assert_eq!(read(&memory, page + 0x210, 1), [0xff], "type of loader");
        assert_eq!(read(&memory, page + 0x211, 1)[0] & 1, 1, "loaded high");
        let command_line = memory.read_u32(page + 0x228).unwrap();
        assert_eq!(string(&memory, command_line.into()), "console=ttyS0");
        let initrd = boot.initrd.unwrap();
        assert_eq!(memory.read_u32(page + 0x218).unwrap(), initrd.start as u32);
        assert_eq!(memory.read_u32(page + 0x21c).unwrap(), 6);
        assert_eq!(read(&memory, initrd.start, 6), b"070701");
        assert_eq!(memory.read_u64(page + 0x70).unwrap(), boot.rsdp_address);
        let count = read(&memory, page + 0x1e8, 1)[0];
        assert_eq!(map_at(&memory, page + 0x2d0, count.into(), 20), *map);
    }
}

#[test]
fn a_pvh_kernel_finds_its_start_information() {
    for (ranges, map) in layouts() {
        let memory = memory(&ranges);
        let image = elf(true, 0, Some(ADDRESS as u32));
        let boot = load(&memory, &with_initrd(&image), &acpi(1)).unwrap();
        let info = boot.state.gpr[3];
        let word = |at| memory.read_u32(info + at).unwrap();
        let long = |at| memory.read_u64(info + at).unwrap();
        assert_eq!((word(0), word(4)), (0x336e_c578, 1));
        assert_eq!(word(12), 1, "modules");
        let module = long(16);
        let initrd = boot.initrd.clone().unwrap();
        assert_eq!(memory.read_u64(module).unwrap(), initrd.start);
        assert_eq!(memory.read_u64(module + 8).unwrap(), 6);
        assert_eq!(read(&memory, initrd.start, 6), b"070701");
        assert_eq!(string(&memory, long(24)), "console=ttyS0");
        assert_eq!(long(32), boot.rsdp_address);
        assert_eq!(pvh_memory_map(&memory, &boot), map);
    }
}

#[test]
fn a_multiboot_kernel_finds_its_information() {
    for (ranges, map) in layouts() {
        for image in [multiboot_flat(), multiboot_elf()] {
            let memory = memory(&ranges);
            let boot = load(&memory, &with_initrd(&image), &acpi(1)).unwrap();
            let word = |at: u64| memory.read_u32(at).unwrap();
            assert_eq!(boot.state.gpr[0], 0x2bad_b002);
            let info = boot.state.gpr[3];
            assert_eq!(word(info), 0x24d);
            assert_eq!(word(info + 4), 639, "KiB of lower memory");
            let upper = map[2].1 - map[2].0;
            assert_eq!(u64::from(word(info + 8)) * 1024, upper);
            assert_eq!(
                string(&memory, word(info + 16).into()),
                "vmlinuz console=ttyS0"
            );
            assert_eq!(word(info + 20), 1, "modules");
            let module = u64::from(word(info + 24));
            let initrd = boot.initrd.clone().unwrap();
            assert_eq!(u64::from(word(module)), initrd.start);
            assert_eq!(u64::from(word(module + 4)), initrd.end);
            assert_eq!(string(&memory, word(module + 8).into()), "initrd.img");
            assert_eq!(string(&memory, word(info + 64).into()), "lodger");
            let (len, at) = (word(info + 44), word(info + 48));
            assert_eq!(word(at.into()), 20, "size of an entry");
            let entries = map_at(&memory, u64::from(at) + 4, u64::from(len) / 24, 24);
            assert_eq!(entries, map);
        }
    }
}

#[test]
fn nothing_overlaps() {
    for (name, image, kind, entry) in all_formats() {
        let memory = ram(8);
        let boot = load(&memory, &with_initrd(&image), &acpi(1)).unwrap();
        let s = &boot.state;
        let mut used = vec![
            ("image", entry..entry + CODE.len() as u64),
            (
                "GDT",
                s.gdtr.base..s.gdtr.base + u64::from(s.gdtr.limit) + 1,
            ),
            ("stack", s.gpr[4] - 4096..s.gpr[4]),
            ("initrd", boot.initrd.clone().unwrap()),
            ("tables", boot.rsdp_address..boot.rsdp_address + 36),
        ];
        match kind {
            BootKind::Pvh => used.push(("start info", s.gpr[3]..s.gpr[3] + 56)),
            BootKind::Multiboot1 => used.push(("information", s.gpr[3]..s.gpr[3] + 88)),
            _ => used.push(("zero page", s.gpr[6]..s.gpr[6] + 4096)),
        }
        if s.cr3 != 0 {
            used.push(("page tables", s.cr3..s.cr3 + 6 * 4096));
        }
        used.sort_by_key(|(_, range)| range.start);
        for pair in used.windows(2) {
            assert!(pair[0].1.end <= pair[1].1.start, "{name}: {pair:x?}");
        }
        let end = used.last().unwrap().1.end;
        assert!(used[0].1.start >= 0x1000 && end <= 8 * MIB, "{name}");
    }
}
