//! The door to a running VM: the request queue with its lock, and what brings the vCPUs to a halt.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, OnceLock, PoisonError};

use lodger_device_model::{MachineControl, MachineRequest};
use lodger_vcpu::Kick;

use crate::outcome::Failure;
use crate::queue::{End, Request, RequestQueue};

/// What is to happen when.
#[derive(Debug, Clone, Copy, Default)]
pub struct Policy {
    /// A reset by the guest ends the VM instead of rebooting it.
    pub no_reboot: bool,
}

/// Asks things of a VM, from any thread. All clones mean the same VM.
#[derive(Clone)]
pub struct VmHandle {
    shared: Arc<Shared>,
}

struct Shared {
    queue: Mutex<RequestQueue>,
    changed: Condvar,
    /// The vCPUs are to leave their loops.
    halt: AtomicBool,
    kickers: OnceLock<Vec<Arc<dyn Kick>>>,
}

impl VmHandle {
    /// The handle of a VM yet to be made. A machine takes it as its [`MachineControl`].
    pub fn new(policy: Policy) -> VmHandle {
        VmHandle {
            shared: Arc::new(Shared {
                queue: Mutex::new(RequestQueue::new(policy.no_reboot)),
                changed: Condvar::new(),
                halt: AtomicBool::new(false),
                kickers: OnceLock::new(),
            }),
        }
    }

    /// Ends the VM, whatever the guest does. Does not wait for it.
    pub fn stop(&self) {
        self.submit(Request::End(End::Stopped));
    }

    /// Stops vCPUs, devices and guest time. False: it is paused or about to end.
    pub fn pause(&self) -> bool {
        self.submit(Request::Pause)
    }

    /// Lets a paused VM go on. False: it is not paused.
    pub fn resume(&self) -> bool {
        self.submit(Request::Resume)
    }

    /// From now on a panic in any thread ends this VM, instead of the one for which this was called before, with a
    /// [`Failure::Panicked`]: without its clock's thread, for example, a guest would just stand still. The message is
    /// printed as before.
    pub fn fail_on_panic(&self) {
        static GUARDED: Mutex<Option<VmHandle>> = Mutex::new(None);
        static HOOK: Once = Once::new();
        *GUARDED.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.clone());
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                next(panic);
                let name = std::thread::current().name().map(str::to_owned);
                let thread = name.unwrap_or_else(|| "without a name".into());
                // On another thread, because this one may hold any lock.
                let end = move || {
                    let guarded = GUARDED.lock().unwrap_or_else(PoisonError::into_inner);
                    let failure = Failure::Panicked { thread };
                    if let Some(vm) = &*guarded {
                        vm.submit(Request::End(End::Failed(failure)));
                    }
                };
                if std::thread::Builder::new().spawn(end).is_err() {
                    std::process::abort();
                }
            }));
        });
    }

    fn queue(&self) -> MutexGuard<'_, RequestQueue> {
        // Every change leaves the queue whole, so a panic elsewhere does not matter.
        let queue = self.shared.queue.lock();
        queue.unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn submit(&self, request: Request) -> bool {
        let shared = &*self.shared;
        let mut queue = self.queue();
        let accepted = queue.submit(request);
        if accepted {
            shared.halt.store(true, Ordering::SeqCst);
            shared.changed.notify_one();
        }
        drop(queue);
        if accepted {
            for kicker in shared.kickers.get().into_iter().flatten() {
                kicker.kick();
            }
        }
        accepted
    }

    /// Whether the vCPUs are to leave their loops.
    pub(crate) fn is_halting(&self) -> bool {
        self.shared.halt.load(Ordering::SeqCst)
    }

    /// From now on requests kick these.
    pub(crate) fn set_kickers(&self, kickers: Vec<Arc<dyn Kick>>) {
        if self.shared.kickers.set(kickers).is_err() {
            panic!("a handle is for one VM");
        }
    }

    /// Waits for a request. The vCPUs are leaving their loops then.
    pub(crate) fn next(&self) -> Request {
        let mut queue = self.queue();
        loop {
            if let Some(request) = queue.take() {
                return request;
            }
            let waited = self.shared.changed.wait(queue);
            queue = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The vCPUs stand still after a reset, and their old requests do not count any more.
    pub(crate) fn reset_done(&self) {
        self.queue().reset_done();
    }

    /// The vCPUs may run; false: another request has come, which is to be taken first.
    pub(crate) fn clear_halt(&self) -> bool {
        let queue = self.queue();
        let clear = queue.is_empty();
        self.shared.halt.store(!clear, Ordering::SeqCst);
        clear
    }
}

impl MachineControl for VmHandle {
    fn request(&self, request: MachineRequest) {
        self.submit(request.into());
    }
}
