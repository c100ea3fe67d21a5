//! The host's time-stamp counter.

use std::arch::x86_64::_rdtsc;
use std::time::{Duration, Instant};

/// Its frequency in kHz, measured against the host's clock for 10 ms; good to about a thousandth.
pub fn frequency_khz() -> u32 {
    let sample = || {
        // SAFETY: every x86-64 processor has RDTSC; a host that forbids it to user space kills the process, which no
        // supported one does.
        (Instant::now(), unsafe { _rdtsc() })
    };
    let (from, first) = sample();
    std::thread::sleep(Duration::from_millis(10));
    let (to, last) = sample();
    let nanos = (to - from).as_nanos().max(1);
    let cycles = u128::from(last.wrapping_sub(first));
    u32::try_from(cycles * 1_000_000 / nanos).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_frequency_is_one_that_processors_have() {
        let khz = super::frequency_khz();
        assert!((100_000..20_000_000).contains(&khz), "{khz} kHz");
    }
}
