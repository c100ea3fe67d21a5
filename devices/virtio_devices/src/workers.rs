//! The threads of a device: each sleeps until there is something to do.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Instant;

/// Bytes of a worker's stack.
const STACK: usize = 256 << 10;

/// A pool of threads that do the same job. Dropping it ends them after the job at hand.
pub(crate) struct Workers {
    kick: Kick,
    threads: Vec<JoinHandle<()>>,
}

/// Wakes a pool.
#[derive(Clone)]
pub(crate) struct Kick(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    /// Jobs that no thread has begun yet; more than there are threads would be of no use.
    due: usize,
    threads: usize,
    stopping: bool,
}

impl Workers {
    /// Starts `count` threads. `job` is called once a kick, or once for several, with a buffer that the thread keeps.
    pub(crate) fn start(
        name: &str,
        count: usize,
        job: impl Fn(&Kick, &mut Vec<u8>) + Send + Sync + 'static,
    ) -> std::io::Result<Workers> {
        let kick = Kick(Arc::new(Shared {
            state: Mutex::new(State {
                due: 0,
                threads: count,
                stopping: false,
            }),
            wake: Condvar::new(),
        }));
        let job = Arc::new(job);
        let mut workers = Workers {
            kick: kick.clone(),
            threads: Vec::new(),
        };
        for _ in 0..count {
            let (kick, job) = (kick.clone(), Arc::clone(&job));
            let thread = std::thread::Builder::new()
                .name(name.into())
                .stack_size(STACK);
            let thread = thread.spawn(move || {
                let mut buffer = Vec::new();
                while kick.wait() {
                    job(&kick, &mut buffer);
                }
            })?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// Has the job done by a thread, after this call at the earliest.
    pub(crate) fn kick(&self) {
        self.kick.kick();
    }
}

impl Kick {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("nothing panics under this lock")
    }

    pub(crate) fn kick(&self) {
        let mut state = self.lock();
        if state.due < state.threads {
            state.due += 1;
            self.0.wake.notify_one();
        }
    }

    /// Waits until then; false when the pool ends.
    pub(crate) fn sleep_until(&self, then: Instant) -> bool {
        let mut state = self.lock();
        loop {
            let left = then.saturating_duration_since(Instant::now());
            if state.stopping || left.is_zero() {
                return !state.stopping;
            }
            let woken = self.0.wake.wait_timeout(state, left);
            state = woken.expect("nothing panics under this lock").0;
        }
    }

    /// Waits for a kick; false when the pool ends.
    fn wait(&self) -> bool {
        let mut state = self.lock();
        while state.due == 0 && !state.stopping {
            let woken = self.0.wake.wait(state);
            state = woken.expect("nothing panics under this lock");
        }
        state.due = state.due.saturating_sub(1);
        !state.stopping
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.kick.lock().stopping = true;
        self.kick.0.wake.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a device's thread has panicked");
            }
        }
    }
}
