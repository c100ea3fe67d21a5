//! What the threads of a monitor share: what the VM is doing, and who wants it to end.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lodger_board::Machine;
use lodger_char::{Output, RawMode};
use lodger_control::{Ending, Phase, Status, Stopped};
use lodger_lifecycle::VmHandle;

use crate::{messages, status};

/// How long a VM may take to stop once it is told to. It takes longer only if the host does not answer, a
/// dead network disk for example.
const PATIENCE: Duration = Duration::from_secs(5);
/// The time between two presses of a power button to which the guest does not listen yet; and when its kernel does, but
/// perhaps nobody else.
const PRESS_AGAIN: Duration = Duration::from_millis(100);
const REMIND: Duration = Duration::from_secs(2);

/// See the module documentation.
pub struct Shared {
    name: String,
    id: String,
    /// The terminal, whose reader must not keep the VM from ending.
    output: Option<Arc<Output>>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    phase: Phase,
    vm: Option<Vm>,
    /// The end that was asked for.
    asked: Option<Asked>,
    restarts: u32,
    started: u64,
    engine: String,
    ending: Option<Ending>,
}

/// The machine that runs.
#[derive(Clone)]
pub struct Vm {
    /// To ask things of it.
    pub handle: VmHandle,
    /// The machine itself.
    pub machine: Arc<Machine>,
}

/// An end that the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// The power button; the guest's own end counts, and no restart follows.
    Gently,
    /// At once, with this status.
    Now(u8),
}

impl Shared {
    /// Of a VM that is about to be started.
    pub fn new(name: &str, id: &str, output: Option<Arc<Output>>) -> Arc<Shared> {
        Arc::new(Shared {
            name: name.into(),
            id: id.into(),
            output,
            state: Mutex::new(State {
                phase: Phase::Starting,
                vm: None,
                asked: None,
                restarts: 0,
                started: 0,
                engine: String::new(),
                ending: None,
            }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is a single one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    /// Waits until `seen` sees something, at most until `deadline`.
    fn wait<R>(
        &self,
        deadline: Option<Instant>,
        mut seen: impl FnMut(&State) -> Option<R>,
    ) -> Option<R> {
        let mut state = self.lock();
        loop {
            if let Some(found) = seen(&state) {
                return Some(found);
            }
            let left = match deadline {
                None => Duration::from_secs(3600),
                Some(deadline) => deadline.checked_duration_since(Instant::now())?,
            };
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How it is.
    pub fn status(&self) -> Status {
        let state = self.lock();
        Status {
            name: self.name.clone(),
            id: self.id.clone(),
            pid: std::process::id(),
            phase: state.phase,
            started: state.started,
            restarts: state.restarts,
            engine: state.engine.clone(),
        }
    }

    /// The machine runs from now on.
    pub fn running(&self, vm: Vm, engine: &str, started: u64) {
        let asked = self.change(|state| {
            state.phase = Phase::Running;
            state.vm = Some(vm.clone());
            state.engine = engine.into();
            state.started = started;
            state.asked
        });
        match asked {
            None => {}
            // It was asked while there was no machine: one that has just begun loses nothing.
            Some(_) => vm.handle.stop(),
        }
    }

    /// The machine has ended. Returns what was asked of it.
    pub fn stopped(&self) -> Option<Asked> {
        self.change(|state| {
            state.phase = Phase::Stopping;
            state.vm = None;
            state.asked
        })
    }

    /// Waits before a restart. False: there is none, because somebody has asked for the end.
    pub fn restart_after(&self, delay: Duration) -> bool {
        self.change(|state| {
            state.phase = Phase::Restarting;
            state.restarts += 1;
        });
        let deadline = Instant::now() + delay;
        self.wait(Some(deadline), |state| state.asked).is_none()
    }

    /// The VM has ended for good.
    pub fn ended(&self, ending: Ending) {
        self.change(|state| {
            state.phase = Phase::Ended;
            state.vm = None;
            state.ending = Some(ending);
        });
    }

    /// Waits for the end for good.
    pub fn wait_for_end(&self) -> Ending {
        let end = self.wait(None, |state| state.ending.clone());
        end.unwrap_or_else(|| unreachable!("without a deadline it waits for ever"))
    }

    /// Whether somebody sits before it, or reads what it prints.
    pub fn is_attended(&self) -> bool {
        self.output.is_some()
    }

    /// Whether somebody has asked for its end.
    pub fn is_asked(&self) -> bool {
        self.lock().asked.is_some()
    }

    /// The machine, if there is one now.
    pub fn vm(&self) -> Option<Vm> {
        self.lock().vm.clone()
    }

    /// Presses the power button. `None`: there is no machine now; false: the guest does not listen.
    pub fn press_power_button(&self) -> Option<bool> {
        self.vm().map(|vm| vm.machine.press_power_button())
    }

    /// Tells the guest the size of its terminal; false: it has no console that carries it.
    pub fn resize(&self, columns: u16, rows: u16) -> bool {
        let vm = self.vm();
        let console = vm.as_ref().and_then(|vm| vm.machine.console());
        console
            .iter()
            .for_each(|console| console.resize(columns, rows));
        console.is_some()
    }

    /// Stops or resumes the vCPUs; false: it is so already.
    pub fn pause(&self, pause: bool) -> bool {
        self.change(|state| {
            let (from, to) = match pause {
                true => (Phase::Running, Phase::Paused),
                false => (Phase::Paused, Phase::Running),
            };
            let Some(vm) = state.vm.as_ref().filter(|_| state.phase == from) else {
                return false;
            };
            let accepted = match pause {
                true => vm.handle.pause(),
                false => vm.handle.resume(),
            };
            if accepted {
                state.phase = to;
            }
            accepted
        })
    }

    /// Ends the VM at once, with this status.
    pub fn end_now(self: &Arc<Self>, status: u8) {
        let vm = self.change(|state| {
            if !matches!(state.asked, Some(Asked::Now(_))) {
                state.asked = Some(Asked::Now(status));
            }
            if state.phase != Phase::Ended {
                state.phase = Phase::Stopping;
            }
            state.vm.clone()
        });
        if let Some(output) = &self.output {
            output.close();
        }
        let Some(vm) = vm else {
            return;
        };
        vm.handle.stop();
        let shared = Arc::clone(self);
        // If no thread can be had, the host is in a state in which the rest does not matter.
        let _ = std::thread::Builder::new().spawn(move || {
            let deadline = Some(Instant::now() + PATIENCE);
            let gone = |state: &State| state.vm.is_none().then_some(());
            if shared.wait(deadline, gone).is_none() {
                RawMode::leave();
                messages::error("the machine does not stop: the host does not answer");
                std::process::exit(status.into());
            }
        });
    }

    /// Asks the guest to power off, and ends it if it has not done so after `time`. Returns when the VM has ended.
    pub fn stop(self: &Arc<Self>, time: Duration) -> (Stopped, Ending) {
        let deadline = Instant::now().checked_add(time);
        self.pause(false);
        self.change(|state| {
            state.asked.get_or_insert(Asked::Gently);
            if state.phase == Phase::Running {
                state.phase = Phase::Stopping;
            }
        });
        let mut heard = false;
        loop {
            // A guest that is still booting may listen later.
            heard = self.press_power_button() == Some(true) || heard;
            let again = Instant::now() + if heard { REMIND } else { PRESS_AGAIN };
            let next = Some(deadline.map_or(again, |deadline| deadline.min(again)));
            if let Some(ending) = self.wait(next, |state| state.ending.clone()) {
                let how = match self.lock().asked {
                    Some(Asked::Now(_)) => Stopped::Killed,
                    _ => Stopped::ByGuest,
                };
                return (how, ending);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                break;
            }
        }
        self.end_now(status::KILLED);
        let ending = self.wait_for_end();
        // It may have made it at the last moment.
        let how = match heard {
            _ if ending.status != status::KILLED => Stopped::ByGuest,
            true => Stopped::TimedOut,
            false => Stopped::Deaf,
        };
        (how, ending)
    }
}
