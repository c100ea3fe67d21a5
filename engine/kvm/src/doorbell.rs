//! Getting a vCPU out of the guest from any thread, without losing a call.
//!
//! A caller notes its wish, sets `immediate_exit` in the page that is shared with KVM, and then signals the thread if it is in
//! [`Doorbell::listen`]. The vCPU's thread clears `immediate_exit` *before* it looks at the wishes. So a wish is either seen by that
//! look, or makes KVM_RUN return at once, or interrupts it with the signal.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};
use std::sync::{Mutex, Once};
use std::thread;
use std::time::Duration;

use lodger_vcpu::Kick;

/// The line to one vCPU. It may outlive the vCPU.
#[derive(Default)]
pub(crate) struct Doorbell {
    kicked: AtomicBool,
    intr: AtomicBool,
    /// The thread that is about to enter, or in, KVM_RUN; 0: none.
    thread: AtomicI32,
    page: Mutex<Option<ImmediateExit>>,
}

/// Points to `kvm_run.immediate_exit`.
#[derive(Clone, Copy)]
struct ImmediateExit(NonNull<u8>);

// SAFETY: the byte is only accessed atomically, and only while the vCPU whose page it is in is connected.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn set(self, value: bool) {
        // SAFETY: the page is mapped until `disconnect`, which waits for the lock that callers hold, or the caller is the
        // vCPU itself; one byte is always aligned.
        let byte = unsafe { AtomicU8::from_ptr(self.0.as_ptr()) };
        byte.store(u8::from(value), Ordering::SeqCst);
    }
}

impl Doorbell {
    /// Connects the vCPU whose shared page has its `immediate_exit` at `byte`.
    ///
    /// # Safety
    /// `byte` must stay valid until [`Doorbell::disconnect`].
    pub unsafe fn connect(&self, byte: NonNull<u8>) {
        prepare_signal();
        *self.lock() = Some(ImmediateExit(byte));
    }

    /// The vCPU is about to be dropped.
    pub fn disconnect(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<ImmediateExit>> {
        self.page
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes KVM_RUN return, now or the next time; for a reason that was noted before.
    fn ring(&self) {
        let page = self.lock();
        if let Some(page) = *page {
            page.set(true);
        }
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: a system call without pointers. A stale thread number is harmless: the handler does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGNAL) };
        }
    }

    /// Rings after `delay`, from another thread.
    pub fn ring_later(self: &std::sync::Arc<Self>, delay: Duration) {
        let bell = std::sync::Arc::clone(self);
        thread::spawn(move || {
            thread::sleep(delay);
            bell.ring();
        });
    }

    /// Sets the 8259's level.
    pub fn set_intr(&self, level: bool) {
        if !self.intr.swap(level, Ordering::SeqCst) && level {
            self.ring();
        }
    }

    /// The 8259's level.
    pub fn intr(&self) -> bool {
        self.intr.load(Ordering::SeqCst)
    }

    /// Whether somebody kicked since [`Doorbell::answer`].
    pub fn kicked(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    /// Takes the kick.
    pub fn answer(&self) {
        self.kicked.store(false, Ordering::SeqCst);
    }

    /// This thread runs the vCPU from now until [`Doorbell::leave`]: signals can reach it.
    pub fn listen(&self) {
        self.thread.store(thread_number(), Ordering::SeqCst);
    }

    /// The end of [`Doorbell::listen`].
    pub fn leave(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }

    /// Sets whether the next KVM_RUN returns at once. To be called by the vCPU, before it looks at the wishes.
    pub fn set_immediate_exit(&self, value: bool) {
        if let Some(page) = *self.lock() {
            page.set(value);
        }
    }
}

impl Kick for Doorbell {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.ring();
    }
}

/// The signal that interrupts KVM_RUN: one that nothing else here uses and that is ignored by default. Not a real-time signal: those
/// are queued, and cannot be sent when the queue is full.
const SIGNAL: i32 = libc::SIGURG;

extern "C" fn interrupted(_: i32) {}

/// Gives the signal a handler that does nothing: it is to interrupt KVM_RUN, and to restart other system calls.
fn prepare_signal() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: `action` is fully initialized (zero is valid for all its fields), and the handler is async-signal-safe.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = interrupted as extern "C" fn(i32) as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(SIGNAL, &action, std::ptr::null_mut());
        }
    });
}

/// The kernel's number of this thread, in which the signal is unblocked on the way.
fn thread_number() -> i32 {
    thread_local! {
        static NUMBER: i32 = {
            // SAFETY: `set` is initialized by sigemptyset; gettid has no preconditions.
            unsafe {
                let mut set: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&mut set);
                libc::sigaddset(&mut set, SIGNAL);
                libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
                libc::gettid()
            }
        };
    }
    NUMBER.with(|n| *n)
}
