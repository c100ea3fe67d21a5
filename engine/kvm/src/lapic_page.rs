//! The local APIC's registers to and from KVM's image of the register page (KVM_GET_LAPIC, KVM_SET_LAPIC).
//!
//! KVM's timer counts at 1 GHz at divide-by-1, so counts are nanoseconds here as there.

use kvm_bindings::kvm_lapic_state;
use lodger_x86::LapicState;
use lodger_x86::lapic_state::{divide_shift, lvt};

const ID: usize = 0x20;
const VERSION: usize = 0x30;
const TPR: usize = 0x80;
const LDR: usize = 0xd0;
const DFR: usize = 0xe0;
const SVR: usize = 0xf0;
const ISR: usize = 0x100;
const TMR: usize = 0x180;
const IRR: usize = 0x200;
const ESR: usize = 0x280;
const ICR: usize = 0x300;
const ICR_HIGH: usize = 0x310;
const TIMER_INITIAL: usize = 0x380;
const TIMER_CURRENT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;

/// Offsets of the LVT entries, in the order of [`LapicState::lvt`].
const LVT: [usize; 7] = [0x2f0, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370];

/// Version 0x14 with LVT entries 0 to 5.
const VERSION_VALUE: u32 = 0x0005_0014;

fn get(page: &kvm_lapic_state, offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| page.regs[offset + i] as u8))
}

fn set(page: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in page.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *register = byte as _;
    }
}

/// Whether an LVT timer entry selects TSC-deadline mode.
fn deadline_mode(entry: u32) -> bool {
    entry >> 17 & 3 == 2
}

/// The page for this state at guest time `now`.
pub(crate) fn from_state(state: &LapicState, now: u64) -> kvm_lapic_state {
    let mut page = kvm_lapic_state::default();
    let p = &mut page;
    set(p, ID, state.id << 24);
    set(p, VERSION, VERSION_VALUE);
    set(p, TPR, u32::from(state.tpr));
    set(p, LDR, state.ldr);
    set(p, DFR, state.dfr);
    set(p, SVR, state.svr);
    for i in 0..8 {
        set(p, ISR + i * 16, state.isr[i]);
        set(p, TMR + i * 16, state.tmr[i]);
        set(p, IRR + i * 16, state.irr[i]);
    }
    // KVM has one error register: what was collected is what would be read next.
    set(p, ESR, state.esr | state.esr_pending);
    set(p, ICR, state.icr as u32);
    set(p, ICR_HIGH, (state.icr >> 32) as u32);
    for (offset, entry) in LVT.into_iter().zip(state.lvt) {
        set(p, offset, entry);
    }
    set(p, TIMER_DIVIDE, state.timer_divide);
    // With an initial count KVM starts the timer, so a timer that does not count gets none.
    if state.timer_expiry != 0 && !deadline_mode(state.lvt[lvt::TIMER]) {
        set(p, TIMER_INITIAL, state.timer_initial);
        // An overdue count fires at once: one is left.
        let left = state.timer_expiry.saturating_sub(now) >> divide_shift(state.timer_divide);
        let left = left.clamp(1, u64::from(state.timer_initial.max(1)));
        set(p, TIMER_CURRENT, left as u32);
    }
    page
}

/// The state in this page at guest time `now`. The base and the TSC deadline are MSRs, and come from there.
pub(crate) fn to_state(
    page: &kvm_lapic_state,
    id: u32,
    base: u64,
    tsc_deadline: u64,
    now: u64,
) -> LapicState {
    let words = |offset| std::array::from_fn(|i| get(page, offset + i * 16));
    let x2apic = base >> 10 & 3 == 3;
    let entries = LVT.map(|offset| get(page, offset));
    let left = u64::from(get(page, TIMER_CURRENT));
    let divide = get(page, TIMER_DIVIDE);
    let counting = left != 0 && !deadline_mode(entries[lvt::TIMER]);
    LapicState {
        base,
        id,
        tpr: get(page, TPR) as u8,
        // In x2APIC mode the page holds the logical ID that follows from the ID.
        ldr: if x2apic { 0 } else { get(page, LDR) },
        dfr: get(page, DFR),
        svr: get(page, SVR),
        isr: words(ISR),
        tmr: words(TMR),
        irr: words(IRR),
        esr: get(page, ESR),
        esr_pending: 0,
        icr: u64::from(get(page, ICR_HIGH)) << 32 | u64::from(get(page, ICR)),
        // KVM without CMCI leaves that entry zero; it is not there, and masked.
        lvt: std::array::from_fn(|i| match i {
            lvt::CMCI => entries[i] | lvt::MASKED,
            _ => entries[i],
        }),
        timer_divide: divide,
        timer_initial: get(page, TIMER_INITIAL),
        timer_expiry: match counting {
            true => now + (left << divide_shift(divide)),
            false => 0,
        },
        tsc_deadline,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_survives_the_page() {
        let mut state = LapicState::reset(3, false);
        state.base = 0xfee0_0800;
        (state.tpr, state.svr, state.ldr) = (0x35, 0x1ef, 0x0800_0000);
        state.isr[2] = 4;
        state.irr[7] = 0x8000_0000;
        state.tmr[7] = 0x8000_0000;
        state.icr = 0x0500_0000_0000_00fb;
        state.lvt[lvt::TIMER] = 0x2_0030;
        state.lvt[lvt::LINT1] = 0x400;
        (state.timer_divide, state.timer_initial) = (3, 1_000_000);
        state.timer_expiry = 5_000 + 16 * 400;
        let page = from_state(&state, 5_000);
        assert_eq!(to_state(&page, 3, state.base, 0, 5_000), state);
        let page = from_state(&state, 6_600);
        assert_eq!(to_state(&page, 3, state.base, 0, 6_600), state);
    }

    #[test]
    fn an_overdue_count_is_about_to_fire() {
        let mut state = LapicState::reset(0, true);
        (state.timer_divide, state.timer_initial) = (11, 500);
        state.timer_expiry = 1_000;
        let page = from_state(&state, 9_000);
        assert_eq!(get(&page, TIMER_CURRENT), 1);
    }
}
