//! Puts an operating system kernel into guest memory and says in what state the first vCPU starts it.
//!
//! The format is found from the file itself:
//!
//! | file | entered by | specification |
//! |---|---|---|
//! | bzImage, boot protocol 2.06 and later | 64-bit or 32-bit entry with `boot_params` | Linux `Documentation/arch/x86/boot.rst` |
//! | ELF with a `XEN_ELFNOTE_PHYS32_ENTRY` note | PVH: 32-bit, `hvm_start_info` | Xen `docs/misc/pvh.pandoc`, `xen/include/public/arch-x86/hvm/start_info.h` |
//! | any other ELF | its entry, in the mode of its class, with `boot_params` | as for `vmlinux` after decompression |
//! | Multiboot 1, ELF or flat | 32-bit, multiboot information | Multiboot specification 0.6.96 |
//!
//! All of them may be compressed as a whole. A bzImage's kernel is by default decompressed here and entered
//! directly, because the guest would do that far more slowly; where that does not work out, the bzImage is booted
//! as it is (see [`BootProtocol`]). Without decompression by the guest there is no KASLR.
//!
//! Every file is hostile: sizes and addresses are checked against guest memory before anything is allocated,
//! and decompression stops at the size of guest memory.
//!
//! The `linux-loader` crate gives the structures of the boot protocols, and no more: its ELF loader reads neither
//! the class nor the machine, knows no ELF32, sees only the last note segment and leaves what follows a segment's
//! file bytes as it was; its bzImage loader takes the protected-mode code without looking whether it is complete.
//! ELF files are therefore read with the `object` crate.
//!
//! Limits: no EFI, no Multiboot 2, no 16-bit entry.

mod bzimage;
mod compression;
mod elf;
mod entry;
mod error;
mod identify;
mod linux;
mod multiboot;
mod payload;
mod placement;
mod plan;
mod pvh;

use std::ops::Range;

use lodger_guest_memory::GuestMemory;
use lodger_tables::AcpiConfig;
use lodger_x86::CpuState;

pub use error::{LoadError, Reason};
pub use payload::Payload;

use bzimage::Bzimage;
use compression::Compression;
use elf::Elf;
use identify::Image;
use placement::Placement;
use plan::{Handover, Plan};

/// What to boot.
#[derive(Debug, Clone)]
pub struct BootSource {
    /// The kernel.
    pub kernel: Payload,
    /// The initial RAM disk; for Multiboot the only module.
    pub initrd: Option<Payload>,
    /// The kernel command line.
    pub append: String,
    /// How to boot a bzImage.
    pub protocol: BootProtocol,
}

/// How to boot a bzImage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BootProtocol {
    /// Decompress the kernel on the host and enter it directly, by PVH if it can. If the payload is not
    /// understood, as [`BootProtocol::Bzimage`].
    #[default]
    Auto,
    /// As it is: the guest decompresses the kernel (and may randomise its address).
    Bzimage,
}

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootKind {
    /// The 64-bit entry of a bzImage.
    Bzimage64,
    /// The 32-bit entry of a bzImage.
    Bzimage32,
    /// The PVH entry of an ELF file.
    Pvh,
    /// The entry of a 64-bit ELF file, with `boot_params`.
    Elf64,
    /// The entry of a 32-bit ELF file, with `boot_params`.
    Elf32,
    /// Multiboot 1.
    Multiboot1,
}

/// A kernel in guest memory, ready to run.
#[derive(Debug, Clone)]
pub struct Boot {
    /// The state of vCPU 0. The other vCPUs wait for their start-up IPI, as after reset.
    pub state: CpuState,
    /// How the kernel is entered.
    pub kind: BootKind,
    /// Guest-physical address of the first instruction.
    pub entry: u64,
    /// Guest-physical address of the ACPI root pointer.
    pub rsdp_address: u64,
    /// Where the initial RAM disk is.
    pub initrd: Option<Range<u64>>,
    /// One line for people: what it is and how it is booted.
    pub description: String,
}

/// Loads `source` into `memory`, together with the ACPI tables for `acpi`. Memory need not be zero: a machine that
/// was reset is loaded in the same way.
///
/// The memory map that the kernel gets has the RAM of `memory` but for 0x9fc00-0xfffff, which is reserved as on
/// every PC and has the ACPI tables at 0xe0000, and the reserved configuration space of PCI.
pub fn load(
    memory: &GuestMemory,
    source: &BootSource,
    acpi: &AcpiConfig,
) -> Result<Boot, LoadError> {
    let in_kernel = |reason| LoadError::new(&source.kernel, reason);
    let limit = placement::low_memory(memory);
    let file = source.kernel.read(limit).map_err(in_kernel)?;
    let image = compression::decompress_file(file, limit).map_err(in_kernel)?;
    let fresh = Placement::new(memory, acpi);
    let bzimage = match identify::identify(&image).map_err(in_kernel)? {
        Image::Planned(plan) => {
            let placement = fresh.place(&plan).map_err(in_kernel)?;
            return finish(memory, source, acpi, plan, placement);
        }
        Image::Bzimage(bzimage) => bzimage,
    };
    let kernel = match source.protocol {
        BootProtocol::Auto => Some(bzimage.decompress(limit)),
        BootProtocol::Bzimage => None,
    };
    let direct = kernel.as_ref().map(|kernel| {
        let (elf, compression) = kernel.as_ref().map_err(Reason::to_string)?;
        let plan = plan_direct(&bzimage, elf, *compression).map_err(|r| r.to_string())?;
        let placement = fresh.place(&plan).map_err(|r| r.to_string())?;
        Ok::<_, String>((plan, placement))
    });
    let why_not = match direct {
        Some(Ok((plan, placement))) => return finish(memory, source, acpi, plan, placement),
        Some(Err(reason)) => format!(", as it is ({reason})"),
        None => String::new(),
    };
    let mut plan = bzimage.plan().map_err(in_kernel)?;
    plan.description += &why_not;
    let placement = fresh.place(&plan).map_err(in_kernel)?;
    finish(memory, source, acpi, plan, placement)
}

/// Boots `elf`, the kernel from inside of `bzimage`.
fn plan_direct<'a>(
    bzimage: &Bzimage,
    elf: &'a [u8],
    compression: Compression,
) -> Result<Plan<'a>, Reason> {
    let mut plan = Elf::parse(elf)?.plan()?;
    plan.header = bzimage.header;
    plan.append_limit = bzimage.append_limit();
    plan.initrd_limit = bzimage.initrd_limit();
    plan.description = format!(
        "{}, {compression} undone by the host",
        bzimage.description()
    );
    Ok(plan)
}

/// Fills memory according to `plan`, of which the addresses are already taken in `placement`.
fn finish(
    memory: &GuestMemory,
    source: &BootSource,
    acpi: &AcpiConfig,
    plan: Plan,
    mut placement: Placement,
) -> Result<Boot, LoadError> {
    let in_kernel = |reason| LoadError::new(&source.kernel, reason);
    let append = command_line(&source.append, plan.append_limit).map_err(in_kernel)?;
    plan.write(memory).map_err(in_kernel)?;
    placement.write_bios_data().map_err(in_kernel)?;
    let rsdp = placement.place_tables(acpi).map_err(in_kernel)?;
    let initrd = match &source.initrd {
        Some(initrd) => Some(
            initrd
                .load(&mut placement, plan.initrd_limit)
                .map_err(|reason| LoadError::new(initrd, reason))?,
        ),
        None => None,
    };
    let handover = Handover {
        append: &append,
        kernel_name: source.kernel.name(),
        initrd_name: source.initrd.as_ref().map(Payload::name),
        initrd: initrd.clone(),
        rsdp,
    };
    let state = match plan.kind {
        BootKind::Pvh => pvh::enter(&plan, &handover, &mut placement),
        BootKind::Multiboot1 => multiboot::enter(&plan, &handover, &mut placement),
        _ => linux::enter(&plan, &handover, &mut placement),
    };
    Ok(Boot {
        state: state.map_err(in_kernel)?,
        kind: plan.kind,
        entry: plan.entry,
        rsdp_address: rsdp,
        initrd,
        description: format!(
            "{}, {} entry at {:#x}",
            plan.description, plan.kind, plan.entry
        ),
    })
}

/// The command line as a C string of at most `limit` characters.
fn command_line(append: &str, limit: usize) -> Result<Vec<u8>, Reason> {
    if append.contains('\0') {
        return Err(Reason::CommandLineNul);
    }
    if append.len() > limit {
        let len = append.len();
        return Err(Reason::CommandLineTooLong { len, limit });
    }
    let mut bytes = append.as_bytes().to_vec();
    bytes.push(0);
    Ok(bytes)
}

impl std::fmt::Display for BootKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            BootKind::Bzimage64 | BootKind::Elf64 => "64-bit",
            BootKind::Bzimage32 | BootKind::Elf32 => "32-bit",
            BootKind::Pvh => "PVH",
            BootKind::Multiboot1 => "Multiboot",
        })
    }
}

#[cfg(test)]
mod tests;
