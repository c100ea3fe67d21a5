//! A clock that moves only when it is told to: for tests of devices, and for deterministic replay.
//!
//! Due timers run on the thread that calls [`ManualClock::advance`], in the order of their deadlines (equal
//! deadlines: in the order of arming), and each sees its own deadline as the time. Nothing runs while it is paused.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::{Clock, Nanos, Timer};

type Callback = Arc<dyn Fn() + Send + Sync>;

/// See the module documentation.
pub struct ManualClock {
    state: Arc<Mutex<State>>,
}

struct State {
    now: Nanos,
    /// Wall-clock time when guest time was 0.
    wall_epoch: Nanos,
    paused: bool,
    /// Number of armings and timers so far, from which both are named.
    names: u64,
    /// By deadline, then by arming; with the timer's name.
    queue: BTreeMap<(Nanos, u64), (u64, Callback)>,
}

impl State {
    fn name(&mut self) -> u64 {
        self.names += 1;
        self.names
    }

    fn disarm(&mut self, timer: u64) {
        self.queue.retain(|_, (t, _)| *t != timer);
    }
}

impl ManualClock {
    /// Starts at guest time 0 and wall time `wall`, running.
    pub fn new(wall: Nanos) -> Arc<ManualClock> {
        Arc::new(ManualClock {
            state: Arc::new(Mutex::new(State {
                now: 0,
                wall_epoch: wall,
                paused: false,
                names: 0,
                queue: BTreeMap::new(),
            })),
        })
    }

    /// Moves guest and wall time on by `by` ns and runs every timer that becomes due, also those that the callbacks
    /// arm within that time. `advance(0)` runs what is due already.
    pub fn advance(&self, by: Nanos) {
        let target = self.lock().now.saturating_add(by);
        loop {
            let mut state = self.lock();
            if state.paused {
                return;
            }
            let Some(entry) = state.queue.first_entry() else {
                break;
            };
            let (deadline, _) = *entry.key();
            if deadline > target {
                break;
            }
            let (_, callback) = entry.remove();
            state.now = state.now.max(deadline);
            drop(state);
            callback();
        }
        let mut state = self.lock();
        state.now = state.now.max(target);
    }

    /// The nearest deadline, if any timer is armed.
    pub fn next_deadline(&self) -> Option<Nanos> {
        self.lock().queue.keys().next().map(|&(at, _)| at)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a clock user panicked")
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Nanos {
        self.lock().now
    }

    fn wall(&self) -> Nanos {
        let state = self.lock();
        state.wall_epoch.wrapping_add(state.now)
    }

    fn timer(&self, callback: Box<dyn Fn() + Send + Sync>) -> Box<dyn Timer> {
        Box::new(ManualTimer {
            name: self.lock().name(),
            callback: callback.into(),
            state: Arc::clone(&self.state),
        })
    }

    fn pause(&self) {
        self.lock().paused = true;
    }

    fn resume(&self) {
        self.lock().paused = false;
    }

    fn set_now(&self, now: Nanos) {
        let mut state = self.lock();
        assert!(state.paused, "guest time is set on a running clock");
        state.now = now;
    }
}

struct ManualTimer {
    name: u64,
    callback: Callback,
    state: Arc<Mutex<State>>,
}

impl ManualTimer {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a clock user panicked")
    }
}

impl Timer for ManualTimer {
    fn arm(&self, deadline: Nanos) {
        let mut state = self.lock();
        state.disarm(self.name);
        let arming = state.name();
        let entry = (self.name, Arc::clone(&self.callback));
        state.queue.insert((deadline, arming), entry);
    }

    fn cancel(&self) {
        self.lock().disarm(self.name);
    }
}

impl Drop for ManualTimer {
    fn drop(&mut self) {
        // Not the `lock` above: a test that fails inside a callback drops its timers while it unwinds.
        if let Ok(mut state) = self.state.lock() {
            state.disarm(self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::OnceLock;

    #[test]
    fn timers_run_in_order_and_see_their_deadline() {
        let clock = ManualClock::new(1_000);
        let log = Arc::new(Mutex::new(Vec::new()));
        let make = |name: char| {
            let (log, source) = (Arc::clone(&log), Arc::clone(&clock));
            clock.timer(Box::new(move || {
                log.lock().unwrap().push((name, source.now()))
            }))
        };
        let (a, b, c, d) = (make('a'), make('b'), make('c'), make('d'));
        a.arm(30);
        b.arm(10);
        c.arm(10);
        d.arm(20);
        a.arm(20);
        d.cancel();
        clock.advance(9);
        assert_eq!(*log.lock().unwrap(), []);
        clock.advance(100);
        assert_eq!(*log.lock().unwrap(), [('b', 10), ('c', 10), ('a', 20)]);
        assert_eq!((clock.now(), clock.wall()), (109, 1_109));
        b.arm(5);
        drop(b);
        c.arm(5);
        clock.pause();
        clock.advance(10);
        assert_eq!(log.lock().unwrap().len(), 3);
        clock.resume();
        clock.advance(0);
        assert_eq!(*log.lock().unwrap().last().unwrap(), ('c', 109));
    }

    #[test]
    fn a_callback_may_arm_its_own_timer() {
        let clock = ManualClock::new(0);
        let timer = Arc::new(OnceLock::<Box<dyn Timer>>::new());
        let count = Arc::new(Mutex::new(0));
        let (t, c, source) = (Arc::clone(&timer), Arc::clone(&count), Arc::clone(&clock));
        let made = clock.timer(Box::new(move || {
            *c.lock().unwrap() += 1;
            t.get().unwrap().arm(source.now() + 10);
        }));
        assert!(timer.set(made).is_ok());
        timer.get().unwrap().arm(10);
        clock.advance(100);
        assert_eq!(*count.lock().unwrap(), 10);
        assert_eq!(clock.next_deadline(), Some(110));
    }
}
