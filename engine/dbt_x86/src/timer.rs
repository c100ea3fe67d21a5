//! A timer that sets a vCPU's request bits: translated code does not look at the clock.
//!
//! timer_create(2) with SIGEV_THREAD_ID: the signal reaches the vCPU's thread only, and its handler sets the bits.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::traps::timer_signal;

/// A timer of the thread that made it.
pub struct Timer {
    id: libc::timer_t,
    thread: libc::pid_t,
}

// SAFETY: a timer's number may be used by every thread.
unsafe impl Send for Timer {}

/// Bits that are set: the vCPU is to look at its timers.
const BITS: u32 = lodger_interp::TIMER;

impl Timer {
    /// A stopped timer for the current thread; `requests` is low in memory and lives longer.
    pub fn new(requests: &AtomicU32) -> io::Result<Timer> {
        let thread = gettid();
        let mut id: libc::timer_t = std::ptr::null_mut();
        // SAFETY: zero is a valid `sigevent`; the arguments are valid.
        let failed = unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = timer_signal();
            event.sigev_notify_thread_id = thread;
            event.sigev_value.sival_ptr = std::ptr::from_ref(requests).cast_mut().cast();
            libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut id) < 0
        };
        match failed {
            true => Err(io::Error::last_os_error()),
            false => Ok(Timer { id, thread }),
        }
    }

    /// Whether it belongs to the current thread.
    pub fn is_here(&self) -> bool {
        self.thread == gettid()
    }

    /// Expires once after `time`; `None`: not at all.
    pub fn set(&self, time: Option<Duration>) {
        let time = time.map_or(Duration::ZERO, |t| t.max(Duration::from_nanos(1)));
        let spec = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: time.as_secs() as i64,
                tv_nsec: time.subsec_nanos().into(),
            },
        };
        // SAFETY: the timer exists, the arguments are valid; it cannot fail then.
        unsafe { libc::timer_settime(self.id, 0, &spec, std::ptr::null_mut()) };
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer exists.
        unsafe { libc::timer_delete(self.id) };
    }
}

fn gettid() -> libc::pid_t {
    // SAFETY: no arguments.
    unsafe { libc::gettid() }
}

/// A timer's signal has arrived.
pub fn expired(info: *mut libc::siginfo_t) {
    // SAFETY: the kernel gives valid information; its value is what `Timer::new` set, and the word lives longer than the timer.
    let requests = unsafe { &*(*info).si_value().sival_ptr.cast::<AtomicU32>() };
    requests.fetch_or(BITS, Ordering::SeqCst);
}
