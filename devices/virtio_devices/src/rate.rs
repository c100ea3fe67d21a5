//! How much a device may do in a time: operations and bytes a second, with bursts.
//!
//! Two buckets that fill at the rate, up to the burst. Work is begun as long as both have something, and paid for in full, so a
//! request may be larger than a bucket; the next one waits until the debt is paid.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// A limit of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// A second; not 0.
    pub per_second: u64,
    /// How much at once after a time of rest; not 0.
    pub burst: u64,
}

/// Limits of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes read or written.
    #[serde(default)]
    pub bytes: Option<Rate>,
    /// Requests.
    #[serde(default)]
    pub operations: Option<Rate>,
}

impl Limits {
    /// Whether there is no limit.
    pub fn is_none(&self) -> bool {
        *self == Limits::default()
    }

    /// Whether the limits can be kept.
    pub fn are_sensible(&self) -> bool {
        let sensible = |rate: &Rate| rate.per_second > 0 && rate.burst > 0;
        self.bytes.iter().chain(&self.operations).all(sensible)
    }
}

/// Keeps limits.
pub(crate) struct Limiter(Mutex<[Option<Bucket>; 2]>);

struct Bucket {
    rate: Rate,
    /// What is in it; negative: a debt.
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Bucket {
        Bucket {
            rate,
            level: rate.burst as f64,
            at: now,
        }
    }

    /// When there is something in it; None: now.
    fn ready(&mut self, now: Instant) -> Option<Instant> {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        let filled = self.level + passed * self.rate.per_second as f64;
        self.level = filled.min(self.rate.burst as f64);
        self.at = now;
        // Exactly nothing is not enough: it would allow one more each time.
        (self.level <= 0.0).then(|| {
            let wait = (1.0 - self.level) / self.rate.per_second as f64;
            now + Duration::from_secs_f64(wait.min(3600.0))
        })
    }
}

impl Limiter {
    /// None if there is no limit. The limits must be sensible.
    pub(crate) fn new(limits: Limits, now: Instant) -> Option<Limiter> {
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        let buckets = [bucket(limits.bytes), bucket(limits.operations)];
        (!limits.is_none()).then_some(Limiter(Mutex::new(buckets)))
    }

    /// When the next piece of work may be begun; None: now.
    pub(crate) fn ready(&self, now: Instant) -> Option<Instant> {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ready = buckets.iter_mut().flatten().map(|b| b.ready(now));
        ready.max().flatten()
    }

    /// One operation with this many bytes has been begun.
    pub(crate) fn pay(&self, bytes: u64) {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (bucket, paid) in buckets.iter_mut().zip([bytes, 1]) {
            if let Some(bucket) = bucket {
                bucket.level -= paid as f64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many operations of `bytes` are begun in `seconds`, by a caller that always has one.
    fn begun(limits: Limits, bytes: u64, seconds: u64) -> u64 {
        let start = Instant::now();
        let limiter = Limiter::new(limits, start).unwrap();
        let (mut now, mut count) = (start, 0);
        while now < start + Duration::from_secs(seconds) {
            match limiter.ready(now) {
                Some(later) => now = later,
                None => {
                    limiter.pay(bytes);
                    count += 1;
                }
            }
        }
        count
    }

    #[test]
    fn rates_are_kept_and_bursts_allowed() {
        let rate = |per_second, burst| Some(Rate { per_second, burst });
        let line = |bytes, operations| Limits { bytes, operations };
        for (limits, bytes, seconds, expected) in [
            (line(None, rate(100, 1)), 4096, 10, 1000),
            (line(None, rate(100, 500)), 4096, 10, 1500),
            (line(rate(1 << 20, 1 << 20), None), 4096, 10, 2816),
            (line(rate(1 << 20, 1), None), 1 << 20, 10, 10),
            (line(rate(1 << 20, 1 << 20), rate(10, 1)), 4096, 10, 100),
            (line(rate(1000, 1), None), 1 << 20, 100, 1),
        ] {
            let found = begun(limits, bytes, seconds);
            assert!(
                found.abs_diff(expected) <= 1 + expected / 50,
                "{limits:?}: {found}"
            );
        }
        assert!(Limiter::new(Limits::default(), Instant::now()).is_none());
        assert!(!line(rate(0, 1), None).are_sensible() && !line(None, rate(1, 0)).are_sensible());
    }
}
