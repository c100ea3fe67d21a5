//! The live clock: guest time is the host's monotonic time since the start, less the time spent paused.
//!
//! One thread waits for the nearest deadline and runs the callbacks. It ends when the clock is dropped.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant, SystemTime};

use crate::{Clock, Nanos, Timer};

/// See the module documentation.
pub struct LiveClock {
    shared: Arc<Shared>,
}

struct Shared {
    epoch: Instant,
    /// Guest time = host ns since `epoch` - `offset` (wrapping), unless paused.
    offset: AtomicU64,
    /// The guest time at which the clock stands, or [`RUNNING`]. Written under the lock.
    stands_at: AtomicU64,
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    /// (deadline, sequence number at arming); an entry whose sequence is outdated is skipped.
    queue: BinaryHeap<Reverse<Entry>>,
    stopping: bool,
}

/// In `stands_at`: the clock is running.
const RUNNING: u64 = u64::MAX;

struct Entry {
    deadline: Nanos,
    sequence: u64,
    timer: Weak<TimerCell>,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.deadline == other.deadline
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.deadline.cmp(&other.deadline)
    }
}

struct TimerCell {
    /// Odd: armed. Every arming and disarming moves it on.
    sequence: AtomicU64,
    callback: Box<dyn Fn() + Send + Sync>,
}

struct LiveTimer {
    cell: Arc<TimerCell>,
    shared: Arc<Shared>,
}

impl LiveClock {
    /// Starts at guest time 0, running.
    pub fn start() -> Arc<LiveClock> {
        let shared = Arc::new(Shared {
            epoch: Instant::now(),
            offset: AtomicU64::new(0),
            stands_at: AtomicU64::new(RUNNING),
            state: Mutex::new(State {
                queue: BinaryHeap::new(),
                stopping: false,
            }),
            wake: Condvar::new(),
        });
        let worker = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("clock".into())
            .spawn(move || worker.serve())
            .expect("the host cannot start a thread");
        Arc::new(LiveClock { shared })
    }
}

impl Shared {
    fn host_now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    fn running_now(&self) -> Nanos {
        self.host_now()
            .wrapping_sub(self.offset.load(Ordering::Acquire))
    }

    fn paused(&self) -> bool {
        self.stands_at.load(Ordering::Acquire) != RUNNING
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a timer callback panicked")
    }

    fn serve(&self) {
        let mut state = self.lock();
        while !state.stopping {
            if self.paused() {
                state = self.wake.wait(state).expect("a timer callback panicked");
                continue;
            }
            let now = self.running_now();
            match state.queue.peek() {
                None => state = self.wake.wait(state).expect("a timer callback panicked"),
                Some(Reverse(entry)) if entry.deadline > now => {
                    let wait = Duration::from_nanos(entry.deadline - now);
                    state = self
                        .wake
                        .wait_timeout(state, wait)
                        .expect("a timer callback panicked")
                        .0;
                }
                Some(_) => {
                    let Some(Reverse(entry)) = state.queue.pop() else {
                        continue;
                    };
                    drop(state);
                    if let Some(cell) = entry.timer.upgrade() {
                        let due = cell.sequence.compare_exchange(
                            entry.sequence,
                            entry.sequence + 1,
                            Ordering::AcqRel,
                            Ordering::Relaxed,
                        );
                        if due.is_ok() {
                            (cell.callback)();
                        }
                    }
                    state = self.lock();
                }
            }
        }
    }
}

impl Clock for LiveClock {
    fn now(&self) -> Nanos {
        match self.shared.stands_at.load(Ordering::Acquire) {
            RUNNING => self.shared.running_now(),
            stands_at => stands_at,
        }
    }

    fn wall(&self) -> Nanos {
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos() as u64)
    }

    fn timer(&self, callback: Box<dyn Fn() + Send + Sync>) -> Box<dyn Timer> {
        Box::new(LiveTimer {
            cell: Arc::new(TimerCell {
                sequence: AtomicU64::new(0),
                callback,
            }),
            shared: Arc::clone(&self.shared),
        })
    }

    fn pause(&self) {
        let _state = self.shared.lock();
        if !self.shared.paused() {
            let now = self.shared.running_now();
            self.shared.stands_at.store(now, Ordering::Release);
        }
    }

    fn resume(&self) {
        let _state = self.shared.lock();
        if self.shared.paused() {
            let at = self.shared.stands_at.load(Ordering::Acquire);
            let offset = self.shared.host_now().wrapping_sub(at);
            // In this order: a reader that sees the clock running sees the new offset.
            self.shared.offset.store(offset, Ordering::Release);
            self.shared.stands_at.store(RUNNING, Ordering::Release);
        }
        self.shared.wake.notify_one();
    }

    fn set_now(&self, now: Nanos) {
        let _state = self.shared.lock();
        assert!(self.shared.paused(), "guest time is set on a running clock");
        self.shared.stands_at.store(now, Ordering::Release);
    }
}

impl Drop for LiveClock {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.wake.notify_one();
    }
}

impl Timer for LiveTimer {
    fn arm(&self, deadline: Nanos) {
        let mut state = self.shared.lock();
        // Under the lock, so that two concurrent armings leave one valid entry.
        let sequence = (self.cell.sequence.load(Ordering::Acquire) | 1) + 2;
        self.cell.sequence.store(sequence, Ordering::Release);
        state.queue.push(Reverse(Entry {
            deadline,
            sequence,
            timer: Arc::downgrade(&self.cell),
        }));
        // A guest may re-arm a timer endlessly: outdated entries must not pile up.
        if state.queue.len() > 256 {
            state.queue.retain(|Reverse(e)| {
                e.timer
                    .upgrade()
                    .is_some_and(|c| c.sequence.load(Ordering::Acquire) == e.sequence)
            });
        }
        self.shared.wake.notify_one();
    }

    fn cancel(&self) {
        let _state = self.shared.lock();
        let sequence = self.cell.sequence.load(Ordering::Acquire);
        self.cell
            .sequence
            .store((sequence | 1) + 1, Ordering::Release);
    }
}

impl Drop for LiveTimer {
    fn drop(&mut self) {
        self.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_timer_fires_once_at_or_after_its_deadline() {
        let clock = LiveClock::start();
        let (tx, rx) = mpsc::channel();
        let source = Arc::clone(&clock);
        let timer = clock.timer(Box::new(move || tx.send(source.now()).unwrap()));
        let deadline = clock.now() + 2_000_000;
        timer.arm(deadline);
        assert!(rx.recv().unwrap() >= deadline);
        assert!(rx.recv_timeout(Duration::from_millis(20)).is_err());
    }

    #[test]
    fn rearming_replaces_and_cancelling_disarms() {
        let clock = LiveClock::start();
        let (tx, rx) = mpsc::channel();
        let timer = clock.timer(Box::new(move || tx.send(()).unwrap()));
        for _ in 0..1000 {
            timer.arm(clock.now() + 3_600_000_000_000);
        }
        timer.arm(0);
        rx.recv().unwrap();
        timer.arm(clock.now() + 5_000_000);
        timer.cancel();
        assert!(rx.recv_timeout(Duration::from_millis(30)).is_err());
    }

    #[test]
    fn time_stands_still_while_paused_and_goes_on_from_there() {
        let clock = LiveClock::start();
        clock.pause();
        let (tx, rx) = mpsc::channel();
        let timer = clock.timer(Box::new(move || tx.send(()).unwrap()));
        clock.set_now(1_000_000_000);
        timer.arm(1_000_000_001);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(clock.now(), 1_000_000_000);
        assert!(rx.try_recv().is_err());
        clock.resume();
        rx.recv().unwrap();
        assert!(clock.now() > 1_000_000_000);
    }
}
