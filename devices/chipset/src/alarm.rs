//! The timer of a device: armed for the next moment at which its registers change by themselves.
//!
//! A device computes that moment after every access; the alarm passes on changes only, so that the clock is not
//! bothered by each register access.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use lodger_clock::{Clock, Nanos, Timer};

const OFF: Nanos = Nanos::MAX;

/// See the module documentation. Call its methods under the device's lock.
pub(crate) struct Alarm {
    timer: Box<dyn Timer>,
    armed: AtomicU64,
}

impl Alarm {
    /// Calls `ring` on the device `weak` points to, as long as there is one.
    pub(crate) fn new<D: Send + Sync + 'static>(
        clock: &Arc<dyn Clock>,
        weak: &Weak<D>,
        ring: fn(&D),
    ) -> Alarm {
        let weak = Weak::clone(weak);
        let callback = move || {
            if let Some(device) = weak.upgrade() {
                ring(&device);
            }
        };
        Alarm {
            timer: clock.timer(Box::new(callback)),
            armed: AtomicU64::new(OFF),
        }
    }

    /// Arms for `deadline`, or disarms.
    pub(crate) fn set(&self, deadline: Option<Nanos>) {
        let new = deadline.unwrap_or(OFF);
        if self.armed.swap(new, Ordering::AcqRel) != new {
            match deadline {
                Some(at) => self.timer.arm(at),
                None => self.timer.cancel(),
            }
        }
    }

    /// The alarm has rung: it is not armed any more. The first thing that a callback says.
    pub(crate) fn rung(&self) {
        self.armed.store(OFF, Ordering::Release);
    }
}
