//! What kind of file this is, by its first bytes.

use crate::bzimage::Bzimage;
use crate::elf::Elf;
use crate::error::Reason;
use crate::multiboot;
use crate::plan::Plan;

/// A kernel.
pub(crate) enum Image<'a> {
    /// May be booted in two ways.
    Bzimage(Bzimage<'a>),
    /// Has one way.
    Planned(Plan<'a>),
}

pub(crate) fn identify(bytes: &[u8]) -> Result<Image<'_>, Reason> {
    if Bzimage::is_bzimage(bytes) {
        return Ok(Image::Bzimage(Bzimage::parse(bytes)?));
    }
    if let Some(plan) = multiboot::plan(bytes)? {
        return Ok(Image::Planned(plan));
    }
    if Elf::is_elf(bytes) {
        return Ok(Image::Planned(Elf::parse(bytes)?.plan()?));
    }
    Err(Reason::NotAKernel(name(bytes)))
}

/// What else people may take for a kernel.
fn name(bytes: &[u8]) -> &'static str {
    let has = |offset: usize, magic: &[u8]| {
        let rest = bytes.get(offset..);
        rest.is_some_and(|rest| rest.starts_with(magic))
    };
    let known: &[(usize, &[u8], &str)] = &[
        (0x38, b"ARM\x64", "an arm64 kernel"),
        (0x38, b"RSC\x05", "a RISC-V kernel"),
        (0x24, &[0x18, 0x28, 0x6f, 0x01], "an ARM kernel"),
        (4, b"zimg", "a compressed EFI kernel (zboot)"),
        (0, &[0x27, 0x05, 0x19, 0x56], "a U-Boot image"),
        (0, &[0xd0, 0x0d, 0xfe, 0xed], "a device tree or FIT image"),
        (0, b"070701", "an initial RAM disk"),
        (0, b"MZ", "an EFI application, which needs firmware"),
        (0, b"#!", "a script"),
        (0, b"!<arch>", "a library or a Debian package"),
        (0, b"QFI\xfb", "a qcow2 disk image"),
        (0x8001, b"CD001", "a CD image"),
        (0x1fe, &[0x55, 0xaa], "a boot sector or a disk image"),
    ];
    let found = known.iter().find(|(at, magic, _)| has(*at, magic));
    match found {
        Some((_, _, name)) => name,
        None if bytes.is_empty() => "an empty file",
        None => "a file of an unknown kind",
    }
}
