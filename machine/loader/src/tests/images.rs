//! The smallest files of each format.

use std::io::Write;

/// The code of every image: `hlt; jmp $`.
pub const CODE: &[u8] = &[0xf4, 0xeb, 0xfd];
/// Where images go.
pub const ADDRESS: u64 = 0x20_0000;

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// An ELF executable with one segment at [`ADDRESS`], linked at `ADDRESS + linked`, and a note segment if
/// `pvh_entry` is given. The segment is followed by zeros up to 0x2000 bytes.
pub fn elf(wide: bool, linked: u64, pvh_entry: Option<u32>) -> Vec<u8> {
    let (header, program_header) = if wide { (64, 56) } else { (52, 32) };
    let count = 1 + u64::from(pvh_entry.is_some());
    let segment = header + 2 * program_header;
    let note = segment + 64;
    let mut bytes = vec![0; note as usize];
    put(&mut bytes, 0, b"\x7fELF");
    put(&mut bytes, 4, &[1 + u8::from(wide), 1, 1]);
    let mut at = 16;
    let mut field = |bytes: &mut Vec<u8>, value: u64, size: usize| {
        put(bytes, at, &value.to_le_bytes()[..size]);
        at += size;
    };
    let word = if wide { 8 } else { 4 };
    let machine = if wide { 62 } else { 3 };
    for (value, size) in [(2, 2), (machine, 2), (1, 4), (ADDRESS + linked, word)] {
        field(&mut bytes, value, size);
    }
    for (value, size) in [(header, word), (0, word), (0, 4), (header, 2)] {
        field(&mut bytes, value, size);
    }
    for (value, size) in [(program_header, 2), (count, 2), (0, 6)] {
        field(&mut bytes, value, size);
    }
    let mut headers = vec![[1, segment, ADDRESS, ADDRESS + linked, 64, 0x2000]];
    if pvh_entry.is_some() {
        headers.push([4, note, 0, 0, 20, 20]);
    }
    for [kind, offset, physical, linear, in_file, in_memory] in headers {
        field(&mut bytes, kind, 4);
        if wide {
            field(&mut bytes, 5, 4);
        }
        for value in [offset, linear, physical, in_file, in_memory] {
            field(&mut bytes, value, word);
        }
        if !wide {
            field(&mut bytes, 5, 4);
        }
        field(&mut bytes, 4, word);
    }
    put(&mut bytes, segment as usize, CODE);
    if let Some(entry) = pvh_entry {
        for value in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry] {
            bytes.extend(value.to_le_bytes());
        }
    }
    bytes
}

/// What of a bzImage's header differs from test to test.
#[derive(Clone, Copy)]
pub struct Header {
    pub version: u16,
    pub xloadflags: u16,
    pub loadflags: u8,
    pub code32_start: u32,
    pub init_size: u32,
    pub initrd_addr_max: u32,
}

impl Default for Header {
    fn default() -> Header {
        Header {
            version: 0x20f,
            xloadflags: 1,
            loadflags: 1,
            code32_start: 0x10_0000,
            init_size: 0x1_0000,
            initrd_addr_max: 0x7f_ffff,
        }
    }
}

/// A bzImage around `payload`.
pub fn bzimage(payload: &[u8], header: Header) -> Vec<u8> {
    const PAYLOAD: usize = 0x300;
    let mut code = vec![0; PAYLOAD];
    put(&mut code, 0, CODE);
    put(&mut code, 0x200, CODE);
    code.extend_from_slice(payload);
    code.resize(code.len().next_multiple_of(16), 0);
    let mut bytes = vec![0; 1024];
    let fields: [(usize, &[u8]); 20] = [
        (0x1f1, &[1]),
        (0x1f4, &(code.len() as u32 / 16).to_le_bytes()),
        (0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]),
        (0x202, b"HdrS"),
        (0x206, &header.version.to_le_bytes()),
        (0x20e, &0x180u16.to_le_bytes()),
        (0x211, &[header.loadflags]),
        (0x214, &header.code32_start.to_le_bytes()),
        (0x22c, &header.initrd_addr_max.to_le_bytes()),
        (0x230, &0x1000u32.to_le_bytes()),
        (0x234, &[1]),
        (0x236, &header.xloadflags.to_le_bytes()),
        (0x238, &255u32.to_le_bytes()),
        (0x248, &(PAYLOAD as u32).to_le_bytes()),
        (0x24c, &(payload.len() as u32).to_le_bytes()),
        (0x258, &0x20_0000u64.to_le_bytes()),
        (0x260, &header.init_size.to_le_bytes()),
        (0x264, &[0; 4]),
        (0x268, &[0; 4]),
        (0x380, b"6.1.0-test (builder) #1\0"),
    ];
    for (at, value) in fields {
        put(&mut bytes, at, value);
    }
    bytes.extend(code);
    bytes
}

/// A Multiboot header, with load addresses if they are given.
fn multiboot_header(addresses: &[u32]) -> Vec<u8> {
    let flags: u32 = if addresses.is_empty() { 3 } else { 3 | 1 << 16 };
    let magic = 0x1bad_b002_u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let words = [&[magic, flags, checksum], addresses].concat();
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// A flat Multiboot image: 16 bytes that are not loaded, the header at [`ADDRESS`], code 32 bytes further.
pub fn multiboot_flat() -> Vec<u8> {
    let load = ADDRESS as u32;
    let mut bytes = vec![0; 16];
    bytes.extend(multiboot_header(&[
        load,
        load,
        load + 48,
        load + 0x2000,
        load + 32,
    ]));
    bytes.resize(16 + 32, 0);
    bytes.extend_from_slice(CODE);
    bytes.resize(16 + 48, 0);
    bytes
}

/// An ELF image with a Multiboot header behind its segment.
pub fn multiboot_elf() -> Vec<u8> {
    let mut bytes = elf(false, 0, None);
    bytes.extend(multiboot_header(&[]));
    bytes
}

pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}
