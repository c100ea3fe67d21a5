//! The state of the first vCPU when it enters a kernel.
//!
//! All boot protocols ask for flat segments in a GDT that stays valid, interrupts off and the A20 gate open. What a
//! BIOS would have set up besides is set up here: memory is write-back, the local APIC of the boot processor lets
//! the 8259s' interrupts and NMIs through (virtual wire mode, SDM vol. 3, 11.5).

use lodger_x86::bits::{cr0, cr4, efer};
use lodger_x86::lapic_state::lvt;
use lodger_x86::{CpuState, DescriptorTable, Segment};

use crate::error::Reason;
use crate::placement::Placement;

const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
/// A busy 32-bit TSS; in long mode a 64-bit one, of which the descriptor's upper half is 0.
const TSS: u64 = 0x0000_8b00_0000_0067;
/// `__BOOT_CS` and `__BOOT_DS` of the Linux protocol.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

const STACK: u64 = 4096;
const PAGE: u64 = 4096;

/// Register numbers in [`CpuState::gpr`].
pub(crate) const RAX: usize = 0;
pub(crate) const RBX: usize = 3;
const RSP: usize = 4;
pub(crate) const RSI: usize = 6;

/// 32-bit protected mode without paging, about to execute `entry`.
pub(crate) fn protected_mode(placement: &mut Placement, entry: u64) -> Result<CpuState, Reason> {
    start(placement, entry, CODE_32)
}

/// 64-bit mode with the first 4 GiB mapped to themselves, about to execute `entry`.
pub(crate) fn long_mode(placement: &mut Placement, entry: u64) -> Result<CpuState, Reason> {
    let mut state = start(placement, entry, CODE_64)?;
    state.cr3 = page_tables(placement)?;
    state.cr4 = cr4::PAE;
    state.efer = efer::LME | efer::LMA;
    state.cr0 |= cr0::PG;
    Ok(state)
}

fn start(placement: &mut Placement, entry: u64, code: u64) -> Result<CpuState, Reason> {
    let gdt: Vec<u8> = [0, 0, code, DATA, TSS, 0]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect();
    let mut state = CpuState::reset(0, 0);
    state.gdtr = DescriptorTable {
        base: placement.put(&gdt, 8)?,
        limit: gdt.len() as u16 - 1,
    };
    state.idtr = DescriptorTable::default();
    state.segments = [Segment::from_descriptor(DATA_SELECTOR, DATA); 6];
    state.segments[1] = Segment::from_descriptor(CODE_SELECTOR, code);
    state.tr = Segment::from_descriptor(TSS_SELECTOR, TSS);
    state.cr0 = cr0::PE | cr0::ET;
    state.rip = entry;
    state.gpr[RSP] = placement.lowest(STACK, 16)? + STACK;

    const MTRR_ENABLE: u64 = 1 << 11;
    const WRITE_BACK: u64 = 6;
    state.msrs.mtrr_def_type = MTRR_ENABLE | WRITE_BACK;
    const SOFTWARE_ENABLE: u32 = 1 << 8;
    const EXT_INT: u32 = 7 << 8;
    const NMI: u32 = 4 << 8;
    state.lapic.svr |= SOFTWARE_ENABLE;
    state.lapic.lvt[lvt::LINT0] = EXT_INT;
    state.lapic.lvt[lvt::LINT1] = NMI;
    Ok(state)
}

/// Maps the first 4 GiB to themselves with 2 MiB pages; returns the address of the PML4.
fn page_tables(placement: &mut Placement) -> Result<u64, Reason> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const LARGE_PAGE: u64 = 2 << 20;
    const ENTRIES: u64 = 512;

    let pml4 = placement.lowest(6 * PAGE, PAGE)?;
    let pointers = pml4 + PAGE;
    let directories = pml4 + 2 * PAGE;
    let mut tables = vec![0u64; (6 * PAGE / 8) as usize];
    tables[0] = pointers | PRESENT_WRITABLE;
    for i in 0..4 {
        tables[(ENTRIES + i) as usize] = (directories + i * PAGE) | PRESENT_WRITABLE;
    }
    for i in 0..4 * ENTRIES {
        tables[(2 * ENTRIES + i) as usize] = (i * LARGE_PAGE) | PRESENT_WRITABLE | LARGE;
    }
    let bytes: Vec<u8> = tables.into_iter().flat_map(u64::to_le_bytes).collect();
    placement.memory.write(pml4, &bytes)?;
    Ok(pml4)
}
