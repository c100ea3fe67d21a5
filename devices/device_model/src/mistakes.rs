//! Guests' mistakes: counted, and logged ever more rarely, so that a guest cannot flood the log.

use std::sync::atomic::{AtomicU64, Ordering};

/// How often the guest misused one device.
#[derive(Debug, Default)]
pub struct GuestMistakes(AtomicU64);

impl GuestMistakes {
    /// Counts one more. The 1st, 2nd, 4th, 8th ... of them is logged, as `device: what`.
    pub fn note(&self, device: &str, what: std::fmt::Arguments) {
        let count = self.0.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if count.is_power_of_two() {
            tracing::debug!("{device}: guest mistake {count}: {what}");
        }
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
