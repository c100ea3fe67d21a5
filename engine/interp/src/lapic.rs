//! The local APIC within the vCPU: its page, its MSRs, its timer, and the interrupts it sends.

use lodger_lapic::{Deadline, Effects, Lapic, Now};
use lodger_x86::{Exception, LapicState};

use crate::cpu::{Cpu, Exec};

impl Cpu {
    /// What RDTSC returns now.
    pub fn tsc(&self) -> u64 {
        self.tsc_at(self.vm.clock.now())
    }

    fn tsc_at(&self, ns: u64) -> u64 {
        let cycles = u128::from(ns) * u128::from(self.vm.model.tsc_khz) / 1_000_000;
        self.tsc_base.wrapping_add(cycles as u64)
    }

    fn now(&self) -> Now {
        let ns = self.vm.clock.now();
        Now {
            ns,
            tsc: self.tsc_at(ns),
        }
    }

    /// Replaces the local APIC's state.
    pub fn set_lapic(&mut self, state: LapicState) {
        self.lapic = Lapic::new(state);
        self.readdressed();
    }

    fn readdressed(&mut self) {
        let bits = self.lapic.address().to_bits();
        let address = &self.vm.vcpus[self.index as usize].address;
        address.store(bits, std::sync::atomic::Ordering::SeqCst);
        // The register page may have moved.
        self.tlb.flush();
        self.blocks.all_mappings_changed();
        self.changes.everything();
    }

    fn carry_out(&mut self, effects: Effects) {
        if let Some(ipi) = effects.ipi {
            self.vm.send(ipi, Some(self.index));
        }
        if effects.eoi.is_some() {
            self.eoi = effects.eoi;
        }
        if effects.readdressed {
            self.readdressed();
        }
        self.check_events = true;
    }

    /// Reads the register page.
    pub(crate) fn lapic_read(&mut self, address: u64, size: u8) -> u64 {
        let now = self.now();
        let value = self.lapic.mmio_read((address & 0xfff) as u32, now);
        u64::from(value) & (u64::MAX >> (64 - 8 * u32::from(size)))
    }

    /// Writes the register page.
    pub(crate) fn lapic_write(&mut self, address: u64, _size: u8, value: u64) {
        let now = self.now();
        let effects = self
            .lapic
            .mmio_write((address & 0xfff) as u32, value as u32, now);
        self.carry_out(effects);
    }

    /// Reads an x2APIC register, IA32_APIC_BASE or IA32_TSC_DEADLINE.
    pub fn lapic_msr_read(&mut self, number: u32) -> Exec<u64> {
        let now = self.now();
        self.lapic
            .msr_read(number, now)
            .or_else(|e: Exception| self.raise(e))
    }

    /// Writes an x2APIC register, IA32_APIC_BASE or IA32_TSC_DEADLINE.
    pub fn lapic_msr_write(&mut self, number: u32, value: u64) -> Exec {
        let now = self.now();
        let effects = self
            .lapic
            .msr_write(number, value, now)
            .or_else(|e: Exception| self.raise(e))?;
        self.carry_out(effects);
        Ok(())
    }

    /// Lets the timer do what is due.
    pub fn lapic_timer(&mut self) {
        if self.lapic.next_deadline().is_some() {
            let now = self.now();
            self.lapic.expire(now);
        }
    }

    /// Guest time in ns at which the timer next does something.
    pub fn timer_deadline(&self) -> Option<u64> {
        match self.lapic.next_deadline()? {
            Deadline::Ns(ns) => Some(ns),
            Deadline::Tsc(tsc) => {
                let cycles = u128::from(tsc.saturating_sub(self.tsc_base));
                let ns = (cycles * 1_000_000).div_ceil(u128::from(self.vm.model.tsc_khz.max(1)));
                Some(u64::try_from(ns).unwrap_or(u64::MAX))
            }
        }
    }
}
