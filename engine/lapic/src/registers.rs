//! The register file: memory-mapped (xAPIC) and by MSR (x2APIC) (SDM vol. 3, tables 10-1 and 10-6), and the APIC base MSR.
//!
//! Both faces share one table of registers, numbered by MSR - 0x800 = offset / 16.

use lodger_x86::bits::msr;
use lodger_x86::cpu_model::PHYSICAL_ADDRESS_BITS;
use lodger_x86::lapic_state::lvt;
use lodger_x86::{Exception, LapicState};

use crate::interrupts::esr;
use crate::{ApicMode, Effects, Ipi, Lapic, Now};

/// Version 0x14, LVT entries 0 to 5.
const VERSION_VALUE: u32 = 0x0005_0014;

/// Register numbers.
mod register {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const APR: u32 = 0x09;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const RRD: u32 = 0x0c;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_ERROR: u32 = 0x37;
    pub const TIMER_INITIAL: u32 = 0x38;
    pub const TIMER_CURRENT: u32 = 0x39;
    pub const TIMER_DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}
use register::*;

/// The bits of an LVT entry that can be written, and those that are read-only (delivery status, remote IRR), by index.
const LVT_WRITABLE: [u32; 7] = [
    0, 0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff,
];
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;

/// The index into [`LapicState::lvt`].
fn lvt_index(register: u32) -> usize {
    (register - LVT_TIMER) as usize + lvt::TIMER
}

impl Lapic {
    /// Reads the register page at byte `offset` (below 4096). Registers are 32 bits wide at multiples of 16; what lies
    /// between reads as zero.
    pub fn mmio_read(&mut self, offset: u32, now: Now) -> u32 {
        let lane = offset & 0xf;
        let value = match self.read_xapic(offset >> 4, now) {
            Some(value) => value,
            None => {
                self.error(esr::ILLEGAL_REGISTER);
                0
            }
        };
        if lane < 4 { value >> (lane * 8) } else { 0 }
    }

    /// Writes the register page at byte `offset` (below 4096). Only aligned registers can be written.
    pub fn mmio_write(&mut self, offset: u32, value: u32, now: Now) -> Effects {
        if offset & 0xf != 0 {
            return Effects::default();
        }
        let effects = match offset >> 4 {
            LDR => {
                self.state.ldr = value & 0xff00_0000;
                Some(readdressed())
            }
            DFR => {
                self.state.dfr = value | 0x0fff_ffff;
                Some(readdressed())
            }
            ICR => {
                let icr = self.state.icr & !0xffff_ffff | u64::from(value);
                Some(self.write_icr(icr, false))
            }
            ICR_HIGH => {
                let low = self.state.icr & 0xffff_ffff;
                self.state.icr = u64::from(value & 0xff00_0000) << 32 | low;
                Some(Effects::default())
            }
            // Read-only registers ignore writes.
            ID | VERSION | APR | PPR | RRD | ISR..ESR | TIMER_CURRENT => Some(Effects::default()),
            SELF_IPI => None,
            register => self.write_common(register, value, now),
        };
        effects.unwrap_or_else(|| {
            self.error(esr::ILLEGAL_REGISTER);
            Effects::default()
        })
    }

    /// Reads IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register; any other MSR is #GP.
    pub fn msr_read(&mut self, number: u32, now: Now) -> Result<u64, Exception> {
        match number {
            msr::APIC_BASE => Ok(self.state.base),
            msr::TSC_DEADLINE => Ok(self.tsc_deadline(now)),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST if self.mode() == ApicMode::X2Apic => {
                match number - msr::X2APIC_FIRST {
                    ID => Ok(u64::from(self.state.id)),
                    LDR => Ok(u64::from(self.state.x2apic_ldr())),
                    ICR => Ok(self.state.icr),
                    register => self
                        .read_common(register, now)
                        .map(u64::from)
                        .ok_or(Exception::GP0),
                }
            }
            _ => Err(Exception::GP0),
        }
    }

    /// Writes IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register; any other MSR, and any reserved bit, is #GP.
    pub fn msr_write(&mut self, number: u32, value: u64, now: Now) -> Result<Effects, Exception> {
        match number {
            msr::APIC_BASE => self.write_base(value),
            msr::TSC_DEADLINE => {
                self.write_tsc_deadline(value, now);
                Ok(rearmed())
            }
            msr::X2APIC_FIRST..=msr::X2APIC_LAST if self.mode() == ApicMode::X2Apic => {
                self.write_x2apic(number - msr::X2APIC_FIRST, value, now)
            }
            _ => Err(Exception::GP0),
        }
    }

    fn read_xapic(&self, register: u32, now: Now) -> Option<u32> {
        Some(match register {
            ID => self.state.id << 24,
            APR | RRD | EOI => 0,
            LDR => self.state.ldr,
            DFR => self.state.dfr,
            ICR => self.state.icr as u32,
            ICR_HIGH => (self.state.icr >> 32) as u32,
            register => return self.read_common(register, now),
        })
    }

    /// The registers that read alike in both modes; `None`: there is none.
    fn read_common(&self, register: u32, now: Now) -> Option<u32> {
        let s = &self.state;
        let word = (register & 7) as usize;
        Some(match register {
            VERSION => VERSION_VALUE,
            TPR => u32::from(s.tpr),
            PPR => u32::from(self.ppr()),
            SVR => s.svr,
            ISR..TMR => s.isr[word],
            TMR..IRR => s.tmr[word],
            IRR..ESR => s.irr[word],
            ESR => s.esr,
            LVT_TIMER..=LVT_ERROR => s.lvt[lvt_index(register)],
            TIMER_INITIAL => s.timer_initial,
            TIMER_CURRENT => self.timer_count(now),
            TIMER_DIVIDE => s.timer_divide,
            _ => return None,
        })
    }

    /// The registers that are written alike in both modes; reserved bits are dropped. `None`: there is none.
    fn write_common(&mut self, register: u32, value: u32, now: Now) -> Option<Effects> {
        match register {
            TPR => self.state.tpr = value as u8,
            EOI => {
                return Some(Effects {
                    eoi: self.eoi(),
                    ..Effects::default()
                });
            }
            SVR => {
                self.expire(now);
                self.state.svr = value & 0x3ff;
                if !self.is_enabled() {
                    self.state.lvt.iter_mut().for_each(|e| *e |= lvt::MASKED);
                }
                return Some(Effects {
                    timer: true,
                    readdressed: true,
                    ..Effects::default()
                });
            }
            ESR => self.state.esr = std::mem::take(&mut self.state.esr_pending),
            LVT_TIMER..=LVT_ERROR => {
                let index = lvt_index(register);
                let mut value = value & LVT_WRITABLE[index];
                if !self.is_enabled() {
                    value |= lvt::MASKED;
                }
                if index == lvt::TIMER {
                    self.write_timer_entry(value, now);
                    return Some(rearmed());
                }
                self.state.lvt[index] = value;
            }
            TIMER_INITIAL => {
                self.write_timer_initial(value, now);
                return Some(rearmed());
            }
            TIMER_DIVIDE => {
                self.write_timer_divide(value, now);
                return Some(rearmed());
            }
            _ => return None,
        }
        Some(Effects::default())
    }

    fn write_x2apic(&mut self, register: u32, value: u64, now: Now) -> Result<Effects, Exception> {
        let legal: u64 = match register {
            TPR | SELF_IPI => 0xff,
            SVR => 0x3ff,
            // Delivery status may be written back as it was read.
            ICR => 0xffff_ffff_000c_dfff,
            LVT_TIMER..=LVT_ERROR => u64::from(LVT_WRITABLE[lvt_index(register)] | LVT_READ_ONLY),
            TIMER_INITIAL => 0xffff_ffff,
            TIMER_DIVIDE => 0xb,
            EOI | ESR => 0,
            _ => return Err(Exception::GP0),
        };
        if value & !legal != 0 {
            return Err(Exception::GP0);
        }
        Ok(match register {
            ICR => self.write_icr(value, true),
            SELF_IPI => {
                self.self_ipi(value as u8);
                Effects::default()
            }
            register => self
                .write_common(register, value as u32, now)
                .ok_or(Exception::GP0)?,
        })
    }

    fn write_icr(&mut self, value: u64, x2apic: bool) -> Effects {
        // Delivery is immediate: the delivery status is always idle.
        self.state.icr = value & !(1 << 12);
        let Some(ipi) = Ipi::from_icr(value, x2apic) else {
            return Effects::default();
        };
        if ipi.requests_vector() && ipi.vector < 16 {
            self.error(esr::SEND_ILLEGAL_VECTOR);
            return Effects::default();
        }
        let to_self = value >> 18 & 3 == 1;
        if to_self {
            // Only a fixed interrupt can be sent to oneself.
            if ipi.requests_vector() {
                self.accept(ipi.vector, false);
            }
            return Effects::default();
        }
        Effects {
            ipi: Some(ipi),
            ..Effects::default()
        }
    }

    fn self_ipi(&mut self, vector: u8) {
        if vector < 16 {
            self.error(esr::SEND_ILLEGAL_VECTOR);
        } else {
            self.accept(vector, false);
        }
    }

    /// IA32_APIC_BASE: reserved bits and the transitions that SDM vol. 3, figure 10-27 does not have are #GP.
    fn write_base(&mut self, value: u64) -> Result<Effects, Exception> {
        const ENABLE: u64 = 1 << 11;
        const EXTENDED: u64 = 1 << 10;
        let reserved = 0x2ff | !((1 << PHYSICAL_ADDRESS_BITS) - 1);
        let new = value & (ENABLE | EXTENDED);
        let allowed = match self.mode() {
            ApicMode::Disabled => new == 0 || new == ENABLE,
            ApicMode::XApic => new != EXTENDED,
            ApicMode::X2Apic => new == 0 || new == ENABLE | EXTENDED,
        };
        if value & reserved != 0 || !allowed {
            return Err(Exception::GP0);
        }
        let old = self.mode();
        self.state.base = value;
        if new == 0 && old != ApicMode::Disabled {
            self.state = LapicState {
                base: value,
                ..LapicState::reset(self.state.id, false)
            };
        }
        if old == ApicMode::XApic && self.mode() == ApicMode::X2Apic {
            self.state.icr &= 0xffff_ffff;
        }
        Ok(Effects {
            timer: true,
            readdressed: true,
            ..Effects::default()
        })
    }
}

fn readdressed() -> Effects {
    Effects {
        readdressed: true,
        ..Effects::default()
    }
}

fn rearmed() -> Effects {
    Effects {
        timer: true,
        ..Effects::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::{Destination, IpiMode};

    const T0: Now = Now { ns: 0, tsc: 0 };

    fn xapic() -> Lapic {
        let mut state = LapicState::reset(5, false);
        state.svr = 0x1ff;
        Lapic::new(state)
    }

    fn x2apic() -> Lapic {
        let mut apic = xapic();
        apic.msr_write(msr::APIC_BASE, 0xfee0_0c00, T0).unwrap();
        apic
    }

    #[test]
    fn memory_mapped_registers_read_back() {
        // offset, written, read
        for (offset, written, read) in [
            (0x20, 0xffff_ffff, 0x0500_0000),
            (0x30, 0, 0x0005_0014),
            (0x80, 0x1_23, 0x23),
            (0xd0, 0xffff_ffff, 0xff00_0000),
            (0xe0, 0, 0x0fff_ffff),
            (0xf0, 0xffff_ffff, 0x3ff),
            (0x100, 0xffff_ffff, 0),
            (0x200, 0xffff_ffff, 0),
            (0x310, 0xffff_ffff, 0xff00_0000),
            (0x320, 0xffff_ffff, 0x7_00ff),
            (0x350, 0xffff_ffff, 0x1_a7ff),
            (0x370, 0xffff_ffff, 0x1_00ff),
            (0x380, 0x1234, 0x1234),
            (0x3e0, 0xffff_ffff, 0xb),
        ] {
            let mut apic = xapic();
            apic.mmio_write(offset, written, T0);
            assert_eq!(apic.mmio_read(offset, T0), read, "{offset:#x}");
            assert_eq!(apic.mmio_read(offset + 1, T0), read >> 8, "{offset:#x} + 1");
            assert_eq!(apic.mmio_read(offset + 4, T0), 0, "{offset:#x} + 4");
            assert_eq!(apic.state().esr_pending, 0, "{offset:#x} is a register");
        }
    }

    #[test]
    fn every_offset_and_value_is_survived() {
        for value in [0, 0xffff_ffff, 0x5555_5555, 0xfe] {
            for offset in 0..4096 {
                let (mut memory, mut by_msr) = (xapic(), x2apic());
                memory.mmio_write(offset, value, T0);
                memory.mmio_read(offset, T0);
                let _ = by_msr.msr_write(msr::X2APIC_FIRST + offset, value.into(), T0);
                let _ = by_msr.msr_read(msr::X2APIC_FIRST + offset, T0);
            }
        }
    }

    #[test]
    fn reserved_registers_set_the_error_status() {
        let mut apic = xapic();
        apic.mmio_write(0x370, 0xfe, T0);
        assert_eq!(apic.mmio_read(0x40, T0), 0);
        assert_eq!(apic.mmio_read(0x280, T0), 0, "latched by a write only");
        assert_eq!(apic.pending(), Some(0xfe));
        apic.mmio_write(0x280, 0, T0);
        assert_eq!(apic.mmio_read(0x280, T0), 0x80);
        apic.mmio_write(0x280, 0, T0);
        assert_eq!(apic.mmio_read(0x280, T0), 0);
    }

    #[test]
    fn x2apic_msrs_check_reserved_bits() {
        // MSR, value written or None for a read, whether it is accepted
        for (number, value, accepted) in [
            (0x802, None, true),
            (0x802, Some(5), false),
            (0x803, Some(0), false),
            (0x804, None, false),
            (0x808, Some(0xff), true),
            (0x808, Some(0x100), false),
            (0x80a, Some(0), false),
            (0x80b, Some(0), true),
            (0x80b, Some(1), false),
            (0x80b, None, false),
            (0x80d, Some(0), false),
            (0x80e, None, false),
            (0x80f, Some(0x1ff), true),
            (0x80f, Some(0x1000), false),
            (0x810, None, true),
            (0x810, Some(0), false),
            (0x828, Some(0), true),
            (0x828, Some(4), false),
            (0x82f, None, false),
            (0x830, Some(0x5_0000_0041), true),
            (0x830, Some(0x2041), false),
            (0x831, None, false),
            (0x832, Some(0x4_00ec), true),
            (0x832, Some(0x8_00ec), false),
            (0x835, Some(0x700), true),
            (0x837, Some(0x700), false),
            (0x838, Some(0xffff_ffff), true),
            (0x838, Some(0x1_0000_0000), false),
            (0x839, None, true),
            (0x839, Some(0), false),
            (0x83e, Some(0xb), true),
            (0x83e, Some(4), false),
            (0x83f, Some(0x41), true),
            (0x83f, Some(0x141), false),
            (0x83f, None, false),
            (0x840, None, false),
            (0x8ff, Some(0), false),
            (0x900, None, false),
        ] {
            let run = |mut apic: Lapic| match value {
                None => apic.msr_read(number, T0).is_ok(),
                Some(value) => apic.msr_write(number, value, T0).is_ok(),
            };
            assert_eq!(run(x2apic()), accepted, "{number:#x} {value:x?}");
            assert!(!run(xapic()), "{number:#x} in xAPIC mode");
        }
        let mut apic = x2apic();
        assert_eq!(apic.msr_read(0x802, T0), Ok(5));
        assert_eq!(apic.msr_read(0x80d, T0), Ok(0x20));
    }

    #[test]
    fn the_apic_base_allows_only_the_legal_transitions() {
        const OFF: u64 = 0xfee0_0000;
        const ON: u64 = 0xfee0_0800;
        const EXT: u64 = 0xfee0_0400;
        const X2: u64 = 0xfee0_0c00;
        for (from, to, legal) in [
            (OFF, OFF, true),
            (OFF, ON, true),
            (OFF, EXT, false),
            (OFF, X2, false),
            (ON, OFF, true),
            (ON, ON, true),
            (ON, EXT, false),
            (ON, X2, true),
            (X2, OFF, true),
            (X2, ON, false),
            (X2, EXT, false),
            (X2, X2, true),
            (ON, ON | 0x100, true),
            (ON, ON | 1, false),
            (ON, ON | 0x200, false),
            (ON, ON | 1 << 40, false),
            (ON, 0xff_ffff_f800, true),
        ] {
            let mut state = LapicState::reset(5, false);
            state.base = from;
            let mut apic = Lapic::new(state);
            let result = apic.msr_write(msr::APIC_BASE, to, T0);
            assert_eq!(result.is_ok(), legal, "{from:#x} -> {to:#x}");
            let expected = if legal { to } else { from };
            assert_eq!(apic.msr_read(msr::APIC_BASE, T0), Ok(expected));
        }
    }

    #[test]
    fn disabling_resets_and_moving_shows() {
        let mut apic = xapic();
        apic.accept(0x41, false);
        assert_eq!(apic.page(), Some(0xfee0_0000));
        assert!(
            apic.msr_write(msr::APIC_BASE, 0x1_0000_0800, T0)
                .unwrap()
                .readdressed
        );
        assert_eq!(apic.page(), Some(0x1_0000_0000));
        apic.msr_write(msr::APIC_BASE, 0xfee0_0000, T0).unwrap();
        assert_eq!((apic.page(), apic.pending()), (None, None));
        apic.msr_write(msr::APIC_BASE, 0xfee0_0800, T0).unwrap();
        assert_eq!((apic.state().svr, apic.state().id), (0xff, 5));
    }

    #[test]
    fn interrupt_commands_become_messages() {
        use Destination::*;
        use IpiMode::*;
        let ipi = |destination, mode, vector| {
            Some(Ipi {
                destination,
                mode,
                vector,
                level: false,
            })
        };
        // x2APIC?, command, message, vector requested here
        for (x2, icr, message, here) in [
            (
                false,
                0x0300_0000_0000_0041,
                ipi(Physical(3), Fixed, 0x41),
                None,
            ),
            (
                false,
                0x0300_0000_0000_0841,
                ipi(Logical(3), Fixed, 0x41),
                None,
            ),
            (
                false,
                0xff00_0000_0000_0041,
                ipi(Everyone, Fixed, 0x41),
                None,
            ),
            (false, 0x0000_0000_0004_0041, None, Some(0x41)),
            (
                false,
                0x0000_0000_0008_0041,
                ipi(Everyone, Fixed, 0x41),
                None,
            ),
            (
                false,
                0x0000_0000_000c_0400,
                ipi(EveryoneElse, Nmi, 0),
                None,
            ),
            (
                false,
                0x0100_0000_0000_c500,
                ipi(Physical(1), Init, 0),
                None,
            ),
            (false, 0x0100_0000_0000_8500, None, None),
            (
                false,
                0x0100_0000_0000_0500,
                ipi(Physical(1), Init, 0),
                None,
            ),
            (
                false,
                0x0100_0000_0000_069a,
                ipi(Physical(1), StartUp, 0x9a),
                None,
            ),
            (
                false,
                0x0100_0000_0000_0141,
                ipi(Physical(1), LowestPriority, 0x41),
                None,
            ),
            (false, 0x0100_0000_0000_0200, None, None),
            (false, 0x0000_0000_0004_0400, None, None),
            (
                true,
                0x0000_0103_0000_0041,
                ipi(Physical(0x103), Fixed, 0x41),
                None,
            ),
            (
                true,
                0x0001_0003_0000_0841,
                ipi(Logical(0x1_0003), Fixed, 0x41),
                None,
            ),
            (
                true,
                0x0000_00ff_0000_0041,
                ipi(Physical(0xff), Fixed, 0x41),
                None,
            ),
            (
                true,
                0xffff_ffff_0000_0041,
                ipi(Everyone, Fixed, 0x41),
                None,
            ),
            (true, 0x0000_0000_0004_0041, None, Some(0x41)),
        ] {
            let mut apic = if x2 { x2apic() } else { xapic() };
            let effects = if x2 {
                apic.msr_write(0x830, icr, T0).unwrap()
            } else {
                apic.mmio_write(0x310, (icr >> 32) as u32, T0);
                apic.mmio_write(0x300, icr as u32, T0)
            };
            assert_eq!((effects.ipi, apic.pending()), (message, here), "{icr:#x}");
        }
    }

    #[test]
    fn illegal_vectors_are_not_sent() {
        let mut apic = x2apic();
        for (number, value) in [(0x830, 0x1_0000_000f), (0x83f, 0x0f)] {
            assert_eq!(apic.msr_write(number, value, T0), Ok(Effects::default()));
            apic.msr_write(0x828, 0, T0).unwrap();
            assert_eq!(apic.msr_read(0x828, T0), Ok(0x20), "{number:#x}");
            apic.msr_write(0x828, 0, T0).unwrap();
        }
    }

    #[test]
    fn software_disabling_masks_the_local_entries() {
        let mut apic = xapic();
        apic.mmio_write(0x350, 0x700, T0);
        assert!(apic.takes_extint());
        apic.mmio_write(0xf0, 0xff, T0);
        assert!(!apic.takes_extint());
        apic.mmio_write(0x350, 0x700, T0);
        assert_eq!(apic.mmio_read(0x350, T0), 0x1_0700, "masked while disabled");
    }

    #[test]
    fn eoi_tells_of_level_triggered_interrupts() {
        let mut apic = xapic();
        apic.accept(0x41, true);
        apic.acknowledge();
        assert_eq!(apic.mmio_write(0xb0, 0, T0).eoi, Some(0x41));
        assert_eq!(apic.mmio_write(0xb0, 0, T0).eoi, None);
    }
}
