//! Enters a kernel by the PVH protocol (Xen `docs/misc/pvh.pandoc`).

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use lodger_x86::CpuState;
use vm_memory::ByteValued;

use crate::entry::{self, RBX};
use crate::error::Reason;
use crate::placement::Placement;
use crate::plan::{Handover, Plan};

pub(crate) fn enter(
    plan: &Plan,
    handover: &Handover,
    placement: &mut Placement,
) -> Result<CpuState, Reason> {
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: placement.put(handover.append, 16)?,
        rsdp_paddr: handover.rsdp,
        ..hvm_start_info::default()
    };
    if let Some(initrd) = &handover.initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.end - initrd.start,
            ..hvm_modlist_entry::default()
        };
        info.nr_modules = 1;
        info.modlist_paddr = placement.put(module.as_slice(), 8)?;
    }
    let mut map = Vec::new();
    for entry in placement.memory_map() {
        let entry = hvm_memmap_table_entry {
            addr: entry.range.start,
            size: entry.len(),
            type_: entry.kind(),
            reserved: 0,
        };
        map.extend_from_slice(entry.as_slice());
        info.memmap_entries += 1;
    }
    info.memmap_paddr = placement.put(&map, 8)?;
    let info = placement.put(info.as_slice(), 8)?;
    let mut state = entry::protected_mode(placement, plan.entry)?;
    state.gpr[RBX] = info;
    Ok(state)
}
