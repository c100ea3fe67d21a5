//! A vCPU's thread: it does what the controller says, and runs the vCPU's loop.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use lodger_board::Machine;
use lodger_vcpu::{EngineError, Entry, Exit, Kick, Vcpu};
use lodger_x86::CpuState;

use crate::handle::VmHandle;
use crate::history::History;
use crate::outcome::Failure;
use crate::queue::{End, Request};
use crate::report::CrashedVcpu;

/// What a vCPU's thread is told to do. It answers each in the end, in order.
enum Command {
    Load(Box<CpuState>),
    Run,
    Report,
}

enum Answer {
    Created(Arc<dyn Kick>),
    Loaded,
    /// The vCPU has left its loop, with no access pending.
    Parked,
    Report(Box<CrashedVcpu>),
    Failed(EngineError),
}

/// The controller's side of the thread. Dropping it ends the thread, whose vCPU must have been told to halt.
pub(crate) struct VcpuThread {
    index: u32,
    commands: Option<Sender<Command>>,
    answers: Receiver<Answer>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    pub(crate) fn start(
        index: u32,
        machine: Arc<Machine>,
        handle: VmHandle,
    ) -> Result<VcpuThread, Failure> {
        let (commands, orders) = channel();
        let (answer, answers) = channel();
        let body = move || serve(index, &machine, &handle, &orders, &answer);
        let thread = std::thread::Builder::new()
            .name(thread_name(index))
            .spawn(body)
            .map_err(|source| Failure::Thread {
                vcpu: index,
                source,
            })?;
        Ok(VcpuThread {
            index,
            commands: Some(commands),
            answers,
            thread: Some(thread),
        })
    }

    /// Waits until the vCPU is made.
    pub(crate) fn created(&self) -> Result<Arc<dyn Kick>, Failure> {
        match self.answer()? {
            Answer::Created(kick) => Ok(kick),
            _ => Err(self.panicked()),
        }
    }

    /// Loads a state; the vCPU must be parked.
    pub(crate) fn load(&self, state: CpuState) -> Result<(), Failure> {
        self.tell(Command::Load(Box::new(state)));
        self.answer().map(|_| ())
    }

    /// Lets the vCPU run until the handle says halt.
    pub(crate) fn run(&self) {
        self.tell(Command::Run);
    }

    /// Waits until a running vCPU is parked.
    pub(crate) fn parked(&self) -> Result<(), Failure> {
        self.answer().map(|_| ())
    }

    /// What a crash report says about the vCPU, which must be parked.
    pub(crate) fn report(&self) -> Result<CrashedVcpu, Failure> {
        self.tell(Command::Report);
        match self.answer()? {
            Answer::Report(report) => Ok(*report),
            _ => Err(self.panicked()),
        }
    }

    fn tell(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // If the thread is gone, so is the answer, and that is noticed.
            let _ = commands.send(command);
        }
    }

    fn answer(&self) -> Result<Answer, Failure> {
        match self.answers.recv() {
            Ok(Answer::Failed(source)) => Err(Failure::Engine {
                vcpu: self.index,
                source,
            }),
            Ok(answer) => Ok(answer),
            Err(_) => Err(self.panicked()),
        }
    }

    fn panicked(&self) -> Failure {
        let thread = thread_name(self.index);
        Failure::Panicked { thread }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // A panic has been reported where it happened.
            let _ = thread.join();
        }
    }
}

fn thread_name(index: u32) -> String {
    format!("vcpu{index}")
}

/// Tells the controller if the thread panics, which may be waiting for other vCPUs or for requests.
struct Alarm<'a>(u32, &'a VmHandle);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let thread = thread_name(self.0);
            let failure = Failure::Panicked { thread };
            self.1.submit(Request::End(End::Failed(failure)));
        }
    }
}

fn serve(
    index: u32,
    machine: &Machine,
    handle: &VmHandle,
    orders: &Receiver<Command>,
    answer: &Sender<Answer>,
) {
    let _alarm = Alarm(index, handle);
    // The controller may have gone, after a failure elsewhere; then the orders have ended as well.
    let answer = |a| drop(answer.send(a));
    let mut vcpu = match machine.vm().create_vcpu(index) {
        Ok(vcpu) => vcpu,
        Err(error) => return answer(Answer::Failed(error)),
    };
    answer(Answer::Created(vcpu.kicker()));
    let mut history = History::new();
    for command in orders {
        answer(match command {
            Command::Load(state) => match vcpu.load(&state) {
                Ok(()) => Answer::Loaded,
                Err(error) => Answer::Failed(error),
            },
            Command::Run => {
                let end = match run(&mut *vcpu, machine, handle, &mut history) {
                    Ok(Exit::Shutdown) => Some(End::Crashed(index)),
                    Ok(_) => None,
                    Err(source) => Some(End::Failed(Failure::Engine {
                        vcpu: index,
                        source,
                    })),
                };
                if let Some(end) = end {
                    handle.submit(Request::End(end));
                }
                Answer::Parked
            }
            Command::Report => match vcpu.store() {
                Ok(state) => Answer::Report(Box::new(CrashedVcpu {
                    index,
                    ticks: vcpu.ticks(),
                    state,
                    instructions: vcpu.recent_instructions(),
                    exits: history.exits(),
                })),
                Err(error) => Answer::Failed(error),
            },
        });
    }
}

/// The vCPU's loop. It ends when the handle says halt and no access is pending, or when there is nothing to go on with.
fn run(
    vcpu: &mut dyn Vcpu,
    machine: &Machine,
    handle: &VmHandle,
    history: &mut History,
) -> Result<Exit, EngineError> {
    let mut entry = Entry::Resume;
    if handle.is_halting() {
        return Ok(Exit::Kicked);
    }
    loop {
        let exit = vcpu.run(entry)?;
        history.note(exit);
        match exit {
            Exit::Kicked if handle.is_halting() => return Ok(exit),
            Exit::Shutdown => return Ok(exit),
            _ => entry = machine.answer(exit),
        }
    }
}
