//! The one door by which time and host input enter a virtual machine.
//!
//! Devices and engines never ask the host for the time: they hold a [`Clock`]. A live clock passes the
//! host's monotonic time on; a recording clock logs what it passed; a replaying clock answers from the log.
//! Host input (bytes typed, packets received) comes in the same way through [`InputPort`]s, random bytes through an [`Entropy`].
//!
//! All times are nanoseconds. *Guest time* starts at 0 when the machine is first started and stands still
//! while the clock is paused.

mod live;
pub mod manual;

pub use live::LiveClock;

use std::sync::Arc;

/// Nanoseconds.
pub type Nanos = u64;

/// The source of guest time and of one-shot timers.
pub trait Clock: Send + Sync {
    /// Guest time in ns: monotonic, 0 at the machine's start, still while paused.
    fn now(&self) -> Nanos;

    /// Wall-clock time in ns since 1970-01-01T00:00:00Z, for the real-time clock.
    fn wall(&self) -> Nanos;

    /// Creates a disarmed one-shot timer. `callback` runs on the clock's thread, never under a lock that the
    /// clock holds, so it may arm timers itself.
    fn timer(&self, callback: Box<dyn Fn() + Send + Sync>) -> Box<dyn Timer>;

    /// Stops guest time and holds back timers.
    fn pause(&self);

    /// Lets guest time go on from where it stood.
    fn resume(&self);

    /// Sets guest time, when a saved machine is restored; the clock must be paused.
    fn set_now(&self, now: Nanos);
}

/// A one-shot timer of a [`Clock`]. Dropping it disarms it.
pub trait Timer: Send + Sync {
    /// Fires once as soon as guest time reaches `deadline` (ns); replaces an earlier deadline.
    fn arm(&self, deadline: Nanos);

    /// Disarms. A callback that has already begun is not waited for.
    fn cancel(&self);
}

/// Takes what the host has for a guest device (bytes typed at the terminal, for example).
///
/// The backend calls it from a host thread; the port hands the data to the device in the order of arrival,
/// and is where a recording logs it.
pub trait InputPort: Send + Sync {
    /// Offers `data`; returns how many bytes the device took. The backend offers the rest again after the
    /// device asked for more (see `on_room`).
    fn offer(&self, data: &[u8]) -> usize;
}

/// Fills a slice with random bytes of the host's: for the entropy device, and for the instructions that give random numbers.
pub type Entropy = Arc<dyn Fn(&mut [u8]) + Send + Sync>;

/// A shared clock.
pub type SharedClock = Arc<dyn Clock>;
