//! Conversion between guest time and the ticks of a chip's oscillator, which starts with guest time.

use lodger_clock::Nanos;

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// The shortest time between two timer interrupts of a device, in ns. A guest that programs a faster timer gets
/// its interrupts coalesced rather than the host's time.
pub(crate) const MIN_INTERVAL: Nanos = 20_000;

/// A frequency in Hz.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate(pub(crate) u32);

impl Rate {
    /// Whole ticks by `now`.
    pub(crate) fn ticks(self, now: Nanos) -> u64 {
        (u128::from(now) * u128::from(self.0) / NANOS_PER_SECOND) as u64
    }

    /// The first moment at which [`Rate::ticks`] is `tick`; the end of time for what lies beyond.
    pub(crate) fn moment(self, tick: u64) -> Nanos {
        let nanos = (u128::from(tick) * NANOS_PER_SECOND).div_ceil(u128::from(self.0));
        u64::try_from(nanos).unwrap_or(Nanos::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_the_first_of_its_tick() {
        for hz in [1, 32_768, 1_193_182, 3_579_545, 100_000_000] {
            for tick in [0, 1, 2, 999, 1 << 20, 0x7fff_ffff] {
                let at = Rate(hz).moment(tick);
                assert_eq!(Rate(hz).ticks(at), tick);
                assert!(at == 0 || Rate(hz).ticks(at - 1) < tick);
            }
        }
        assert_eq!(Rate(32_768).moment(u64::MAX), u64::MAX);
    }
}
