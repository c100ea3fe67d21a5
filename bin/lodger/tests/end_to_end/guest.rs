//! Guests that are a few bytes of machine code behind a Multiboot header.

use tempfile::NamedTempFile;

/// A guest that runs this 32-bit code.
pub fn guest(code: &[u8]) -> NamedTempFile {
    const LOAD: u32 = 0x10_0000;
    let (magic, flags) = (0x1bad_b002_u32, 1 << 16);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    // Header, load addresses (to the end of the file, no BSS), entry behind the header.
    let words = [magic, flags, checksum, LOAD, LOAD, 0, 0, LOAD + 32];
    let mut image: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    image.extend(code);
    let file = NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), image).expect("a guest");
    file
}

pub fn path(file: &NamedTempFile) -> &str {
    file.path().to_str().expect("ASCII")
}

/// `out 0xf4, al` with this value, and a halt.
pub fn debug_exit(value: u8) -> [u8; 7] {
    [0xb0, value, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd]
}
