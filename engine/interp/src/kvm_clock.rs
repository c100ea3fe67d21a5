//! The paravirtual clock that Linux guests find by KVM's CPUID leaves (Linux, Documentation/virt/kvm/x86/msr.rst and
//! cpuid.rst).
//!
//! Guest time is the time-stamp counter, scaled; so the parameters never change, are the same for all vCPUs, and one
//! description written when the guest asks for it serves forever.

use crate::cpu::Cpu;

/// KVM's feature leaf, and the bit of the clock's MSRs in it.
const FEATURES: u32 = 0x4000_0001;
const CLOCK_SOURCE2: u32 = 1 << 3;

/// PVCLOCK_TSC_STABLE_BIT: the description is the same on all vCPUs.
const TSC_STABLE: u32 = 1;

/// Multiplier and shift that make ns out of cycles: `(cycles << shift) * multiplier >> 32`, a negative shift being to the right.
fn scale(tsc_khz: u32) -> (u32, i8) {
    let mut numerator = 1_000_000_u64;
    let mut denominator = u64::from(tsc_khz.max(1));
    let mut shift = 0;
    while numerator >= denominator {
        denominator *= 2;
        shift += 1;
    }
    while numerator * 2 < denominator {
        numerator *= 2;
        shift -= 1;
    }
    (((numerator << 32) / denominator) as u32, shift)
}

impl Cpu {
    /// Whether the CPU model has the clock.
    pub(crate) fn has_kvm_clock(&self) -> bool {
        self.cpuid(FEATURES, 0)[0] & CLOCK_SOURCE2 != 0
    }

    /// Writes the system time structure, if the guest has enabled it.
    pub(crate) fn write_system_time(&mut self) {
        let request = self.msrs.kvm_system_time;
        if request & 1 == 0 {
            return;
        }
        let (multiplier, shift) = scale(self.vm.model.tsc_khz);
        // At guest time 0 the counter was `tsc_base`.
        let words = [
            0,
            self.tsc_base as u32,
            (self.tsc_base >> 32) as u32,
            0,
            0,
            multiplier,
            u32::from(shift as u8) | TSC_STABLE << 8,
        ];
        self.write_versioned(request & !3, &words);
    }

    /// Writes the wall clock structure: the wall-clock time at guest time 0.
    pub(crate) fn write_wall_clock(&mut self) {
        let clock = &self.vm.clock;
        let start = clock.wall().saturating_sub(clock.now());
        let (seconds, ns) = (start / 1_000_000_000, start % 1_000_000_000);
        let words = [seconds as u32, ns as u32];
        self.write_versioned(self.msrs.kvm_wall_clock & !3, &words);
    }

    /// Writes a structure that begins with a version, which is odd while the rest changes.
    fn write_versioned(&mut self, address: u64, rest: &[u32]) {
        let old = self.vm.ram.atomic_u32(address);
        let old = old.map_or(0, |v| v.load(std::sync::atomic::Ordering::Acquire));
        let version = (old | 1).wrapping_add(1);
        self.write_ram(address, &[version.wrapping_sub(1)]);
        self.write_ram(address.wrapping_add(4), rest);
        self.write_ram(address, &[version]);
    }

    /// Writes words at a guest-physical address that is a multiple of 4; what is not RAM takes nothing.
    fn write_ram(&mut self, address: u64, words: &[u32]) {
        for (i, word) in words.iter().enumerate() {
            let at = address.wrapping_add(4 * i as u64);
            if let Some(memory) = self.vm.ram.atomic_u32(at) {
                memory.store(*word, std::sync::atomic::Ordering::Release);
                self.wrote(at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::scale;

    #[test]
    fn a_second_of_cycles_is_a_second() {
        for khz in [1, 999, 1_000_000, 2_000_000, 2_595_123, 5_000_000, u32::MAX] {
            let (multiplier, shift) = scale(khz);
            let cycles = u128::from(khz) * 1000;
            let shifted = match shift {
                0.. => cycles << shift,
                _ => cycles >> -shift,
            };
            let ns = (shifted * u128::from(multiplier)) >> 32;
            assert!((999_999_990..=1_000_000_000).contains(&ns), "{khz}: {ns}");
        }
    }
}
