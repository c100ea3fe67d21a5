//! Interrupts on their way through IRR and ISR, priorities, EOI, errors (SDM vol. 3, 10.5.3 and 10.8).

use lodger_x86::lapic_state::lvt;

use crate::{ApicMode, Lapic};

/// Bits of the error status register.
pub(crate) mod esr {
    /// A command asked to send a vector below 16.
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    /// A vector below 16 arrived, or was in an LVT entry that fired.
    pub const RECEIVED_ILLEGAL_VECTOR: u32 = 1 << 6;
    /// A reserved register was accessed.
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Delivery modes of an LVT entry.
const NMI: u32 = 4;
const EXT_INT: u32 = 7;

fn set(bits: &mut [u32; 8], vector: u8) {
    bits[usize::from(vector >> 5)] |= 1 << (vector & 31);
}

fn clear(bits: &mut [u32; 8], vector: u8) {
    bits[usize::from(vector >> 5)] &= !(1 << (vector & 31));
}

fn is_set(bits: &[u32; 8], vector: u8) -> bool {
    bits[usize::from(vector >> 5)] >> (vector & 31) & 1 != 0
}

fn highest(bits: &[u32; 8]) -> Option<u8> {
    let word = bits.iter().rposition(|&w| w != 0)?;
    Some((word * 32) as u8 + bits[word].ilog2() as u8)
}

impl Lapic {
    /// Whether it is software-enabled and not globally disabled.
    pub(crate) fn is_enabled(&self) -> bool {
        self.state.svr & 0x100 != 0 && self.mode() != ApicMode::Disabled
    }

    /// A fixed interrupt arrives; `level`: its EOI is to be reported. A disabled APIC ignores it.
    pub fn accept(&mut self, vector: u8, level: bool) {
        if !self.is_enabled() {
            return;
        }
        if vector < 16 {
            return self.error(esr::RECEIVED_ILLEGAL_VECTOR);
        }
        match level {
            true => set(&mut self.state.tmr, vector),
            false => clear(&mut self.state.tmr, vector),
        }
        set(&mut self.state.irr, vector);
    }

    /// The processor priority: interrupts of its class (bits 4-7) and below wait.
    pub fn ppr(&self) -> u8 {
        let in_service = highest(&self.state.isr).unwrap_or(0);
        if self.state.tpr >> 4 >= in_service >> 4 {
            self.state.tpr
        } else {
            in_service & 0xf0
        }
    }

    /// The interrupt that the vCPU takes next if it takes interrupts.
    pub fn pending(&self) -> Option<u8> {
        let vector = highest(&self.state.irr)?;
        (vector >> 4 > self.ppr() >> 4 && self.mode() != ApicMode::Disabled).then_some(vector)
    }

    /// The vCPU takes the pending interrupt: it moves from IRR to ISR.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending()?;
        clear(&mut self.state.irr, vector);
        set(&mut self.state.isr, vector);
        Some(vector)
    }

    /// Finishes the highest interrupt in service; its vector if it was level-triggered, for the IOAPICs.
    pub fn eoi(&mut self) -> Option<u8> {
        let vector = highest(&self.state.isr)?;
        clear(&mut self.state.isr, vector);
        is_set(&self.state.tmr, vector).then_some(vector)
    }

    /// CR8.
    pub fn cr8(&self) -> u64 {
        u64::from(self.state.tpr >> 4)
    }

    /// Sets CR8; only bits 0-3 exist, the rest is the caller's #GP.
    pub fn set_cr8(&mut self, value: u64) {
        self.state.tpr = (value as u8) << 4;
    }

    /// Whether the 8259's INTR, wired to LINT0, interrupts the vCPU: LINT0 is in ExtINT mode, or the APIC is globally disabled.
    pub fn takes_extint(&self) -> bool {
        let entry = self.state.lvt[lvt::LINT0];
        self.mode() == ApicMode::Disabled || entry & lvt::MASKED == 0 && entry >> 8 & 7 == EXT_INT
    }

    /// A rising edge at LINT0 (the 8259's INTR); `true`: it is an NMI. In ExtINT mode see [`Lapic::takes_extint`].
    pub fn lint0_edge(&mut self) -> bool {
        self.local_interrupt(lvt::LINT0)
    }

    /// A rising edge at LINT1; `true`: it is an NMI, also when the APIC is globally disabled.
    pub fn lint1_edge(&mut self) -> bool {
        self.mode() == ApicMode::Disabled || self.local_interrupt(lvt::LINT1)
    }

    /// The source of an LVT entry fires; `true`: it is an NMI.
    pub(crate) fn local_interrupt(&mut self, index: usize) -> bool {
        let entry = self.state.lvt[index];
        if entry & lvt::MASKED != 0 || self.mode() == ApicMode::Disabled {
            return false;
        }
        // The timer and the error entry have no delivery mode: those bits are zero, which is "fixed".
        match entry >> 8 & 7 {
            0 => self.accept(entry as u8, false),
            NMI => return true,
            _ => {}
        }
        false
    }

    /// Notes errors, and requests the error interrupt for new ones.
    pub(crate) fn error(&mut self, bits: u32) {
        let new = bits & !self.state.esr_pending;
        self.state.esr_pending |= bits;
        if new == 0 {
            return;
        }
        // An illegal vector in this very entry is noted, and comes back here with nothing new at most once.
        self.local_interrupt(lvt::ERROR);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodger_x86::LapicState;

    fn enabled() -> Lapic {
        let mut state = LapicState::reset(0, true);
        state.svr = 0x1ff;
        Lapic::new(state)
    }

    #[test]
    fn priorities_order_delivery() {
        // (TPR, vectors in service, vectors requested) -> (PPR, pending)
        for (tpr, service, requested, ppr, pending) in [
            (0x00, &[][..], &[][..], 0x00, None),
            (0x00, &[], &[0x31, 0x52, 0xe0], 0x00, Some(0xe0)),
            (0x00, &[0x31], &[0x3f], 0x30, None),
            (0x00, &[0x31], &[0x40], 0x30, Some(0x40)),
            (0x4f, &[], &[0x4f], 0x4f, None),
            (0x4f, &[], &[0x50], 0x4f, Some(0x50)),
            (0x35, &[0x31], &[0x3f], 0x35, None),
            (0x35, &[0x61], &[0x6f], 0x60, None),
            (0xf0, &[], &[0xff], 0xf0, None),
            (0x00, &[], &[0x10], 0x00, Some(0x10)),
        ] {
            let mut apic = enabled();
            service.iter().for_each(|&v| set(&mut apic.state.isr, v));
            requested.iter().for_each(|&v| apic.accept(v, false));
            apic.state.tpr = tpr;
            assert_eq!(
                (apic.ppr(), apic.pending()),
                (ppr, pending),
                "{tpr:#x} {service:x?} {requested:x?}"
            );
        }
    }

    #[test]
    fn interrupts_nest_and_end_in_order() {
        let mut apic = enabled();
        apic.accept(0x41, true);
        assert_eq!(apic.acknowledge(), Some(0x41));
        apic.accept(0x42, false);
        assert_eq!(apic.acknowledge(), None, "same class waits");
        apic.accept(0x71, false);
        assert_eq!(apic.acknowledge(), Some(0x71));
        assert_eq!(apic.eoi(), None, "0x71 is edge-triggered");
        assert_eq!(apic.eoi(), Some(0x41));
        assert_eq!(apic.acknowledge(), Some(0x42));
        assert_eq!((apic.eoi(), apic.eoi()), (None, None));
    }

    #[test]
    fn cr8_is_the_upper_half_of_the_task_priority() {
        let mut apic = enabled();
        apic.set_cr8(0xa);
        assert_eq!((apic.state.tpr, apic.cr8()), (0xa0, 0xa));
    }

    #[test]
    fn a_disabled_apic_takes_no_fixed_interrupts() {
        for (svr, base) in [(0xff, 0x800), (0x1ff, 0)] {
            let mut apic = enabled();
            (apic.state.svr, apic.state.base) = (svr, base);
            apic.accept(0x41, false);
            assert_eq!(apic.state.irr, [0; 8], "{svr:#x} {base:#x}");
        }
    }

    #[test]
    fn illegal_vectors_are_errors_and_never_recurse() {
        for (error_entry, irr1) in [(0x33, 1 << 19), (0x0f, 0), (0x1_0033, 0)] {
            let mut apic = enabled();
            apic.state.lvt[lvt::ERROR] = error_entry;
            apic.accept(0x0f, false);
            assert_eq!(apic.state.esr_pending, esr::RECEIVED_ILLEGAL_VECTOR);
            assert_eq!(apic.state.irr, [0, irr1, 0, 0, 0, 0, 0, 0]);
        }
    }

    #[test]
    fn lint_pins_follow_their_entries() {
        // LINT entry -> (takes_extint for LINT0, edge is NMI, vector requested)
        for (entry, extint, nmi, requested) in [
            (0x0_0700, true, false, None),
            (0x1_0700, false, false, None),
            (0x0_0400, false, true, None),
            (0x1_0400, false, false, None),
            (0x0_0055, false, false, Some(0x55)),
        ] {
            let mut apic = enabled();
            apic.state.lvt[lvt::LINT0] = entry;
            apic.state.lvt[lvt::LINT1] = entry;
            assert_eq!(apic.takes_extint(), extint, "{entry:#x}");
            assert_eq!(apic.clone().lint1_edge(), nmi, "{entry:#x}");
            assert_eq!(apic.lint0_edge(), nmi, "{entry:#x}");
            assert_eq!(apic.pending(), requested, "{entry:#x}");
        }
        let mut apic = enabled();
        apic.state.base = 0;
        assert!(apic.takes_extint() && apic.lint1_edge());
    }
}
