//! Enters Linux with `boot_params`, the "zero page" (Linux `Documentation/arch/x86/boot.rst`, `zero-page.rst`).

use linux_loader::loader::bootparam::{
    E820_MAX_ENTRIES_ZEROPAGE, LOADED_HIGH, boot_e820_entry, boot_params, setup_header,
};
use lodger_x86::CpuState;
use vm_memory::ByteValued;

use crate::BootKind;
use crate::entry::{self, RSI};
use crate::error::Reason;
use crate::placement::Placement;
use crate::plan::{Handover, Plan};

/// The longest command line that Linux takes on x86.
pub(crate) const COMMAND_LINE_LIMIT: usize = 2047;

/// What a `vmlinux`, which has no header of its own, is told.
pub(crate) fn header_of_vmlinux() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        ..setup_header::default()
    }
}

pub(crate) fn enter(
    plan: &Plan,
    handover: &Handover,
    placement: &mut Placement,
) -> Result<CpuState, Reason> {
    const OTHER_LOADER: u8 = 0xff;
    const NORMAL_VIDEO_MODE: u16 = 0xffff;

    let mut params = boot_params {
        hdr: plan.header,
        acpi_rsdp_addr: handover.rsdp,
        ..boot_params::default()
    };
    params.hdr.type_of_loader = OTHER_LOADER;
    params.hdr.loadflags |= LOADED_HIGH;
    params.hdr.vid_mode = NORMAL_VIDEO_MODE;
    params.hdr.cmd_line_ptr = placement.put(handover.append, 16)? as u32;
    if let Some(initrd) = &handover.initrd {
        params.hdr.ramdisk_image = initrd.start as u32;
        params.hdr.ramdisk_size = (initrd.end - initrd.start) as u32;
    }
    let page = placement.lowest(size_of::<boot_params>() as u64, 4096)?;
    let map = placement.memory_map();
    let mut table = [boot_e820_entry::default(); E820_MAX_ENTRIES_ZEROPAGE];
    for (slot, entry) in table.iter_mut().zip(&map) {
        slot.addr = entry.range.start;
        slot.size = entry.len();
        slot.r#type = entry.kind();
    }
    params.e820_table = table;
    params.e820_entries = map.len().min(E820_MAX_ENTRIES_ZEROPAGE) as u8;
    placement.memory.write(page, params.as_slice())?;

    let mut state = match plan.kind {
        BootKind::Bzimage64 | BootKind::Elf64 => entry::long_mode(placement, plan.entry)?,
        _ => entry::protected_mode(placement, plan.entry)?,
    };
    state.gpr[RSI] = page;
    Ok(state)
}
