//! The monitor: what a process does that runs a VM, in the foreground or in the background.
//!
//! | file | what |
//! |---|---|
//! | `mod.rs` | from the spec to the running machine, restarts, and the end |
//! | `state.rs` | what the VM is doing, and who wants it to end |
//! | `terminal.rs` | the terminal and the signals |
//! | `server.rs` | the control socket |
//! | `detach.rs` | the way into the background |
//!
//! A VM with a name has a claim to its directory (`control/store`), which its monitor holds as long as it lives; there it
//! keeps the console's log and writes down how it ends. A VM without a name has neither directory nor socket.

mod detach;
mod memory;
mod server;
mod state;
pub mod terminal;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use lodger_board::{Boot, BootKind, Host, Machine};
use lodger_char::{Output, RotatingLog, SharedConsole};
use lodger_clock::{InputPort, LiveClock};
use lodger_control::Ending;
use lodger_lifecycle::{Outcome, Policy, VmController, VmHandle};
use lodger_store::{CONSOLE_LOG, Claim, Life};
use lodger_virtio_devices::NetworkSpec;

pub use detach::{executable, start as start_detached};

use crate::registry::{self, Chosen};
use crate::spec::VmSpec;
use crate::status::{self, Error, host_error};
use crate::{messages, vms};
use detach::Detached;
use server::Server;
use state::{Asked, Shared, Vm};
use terminal::Terminal;

/// Bytes of the console's log in one file, and how many older ones are kept.
const LOG_SIZE: u64 = 4 << 20;
const LOGS: u32 = 3;

/// What a monitor runs.
pub struct Job {
    /// The VM.
    pub spec: VmSpec,
    /// Its directory, if it has a name.
    pub claim: Option<Claim>,
    /// Its messages are few.
    pub quiet: bool,
}

/// Runs a VM in the foreground, to its end. The status is that of its last run.
pub fn run(job: Job) -> Result<u8, Error> {
    let interactive = lodger_char::is_interactive();
    let output = Output::stdout().map_err(host_error("cannot use standard output"))?;
    let front = Front {
        interactive,
        output: Some(Arc::new(output)),
        report: None,
    };
    supervise(job, front)
}

/// `lodger monitor`: what [`start_detached`] has started.
pub fn serve(dir: &Path) -> Result<ExitCode, Error> {
    let (claim, mut report) = Detached::take(dir)?;
    let result = spec_of(&claim).map(|spec| Job {
        spec,
        claim: Some(claim),
        quiet: false,
    });
    let job = match result {
        Ok(job) => job,
        Err(error) => {
            report.failed(&error);
            return Err(error);
        }
    };
    let front = Front {
        interactive: false,
        output: None,
        report: Some(report),
    };
    supervise(job, front).map(ExitCode::from)
}

/// What a VM that has been written down is started from.
pub fn spec_of(claim: &Claim) -> Result<VmSpec, Error> {
    let name = claim.name().to_string();
    let Some(record) = claim.record() else {
        return Err(lodger_store::StoreError::Unknown(name).into());
    };
    serde_json::from_value(record.spec.clone()).map_err(|error| Error::Named {
        name,
        what: format!("what it is to be started from is damaged: {error}"),
    })
}

/// What stands before the VM.
struct Front {
    /// A terminal, which is put into raw mode.
    interactive: bool,
    /// Standard output; none in the background.
    output: Option<Arc<Output>>,
    /// Who waits for the start in the background.
    report: Option<Detached>,
}

fn supervise(job: Job, mut front: Front) -> Result<u8, Error> {
    let mut report = front.report.take();
    let new = job.claim.as_ref().is_some_and(|claim| !claim.has_run());
    let mut monitor = match Monitor::new(job, front) {
        Ok(monitor) => monitor,
        Err(error) => {
            report.iter_mut().for_each(|report| report.failed(&error));
            return Err(error);
        }
    };
    let result = monitor.run(&mut report);
    let ran = monitor.terminal.is_some() && report.is_none();
    match &result {
        Err(error) if !ran => {
            monitor.give_up(new);
            report.iter_mut().for_each(|report| report.failed(error));
        }
        Err(error) => {
            let ending = Run::ending(error.status(), error.to_string());
            monitor.end(ending);
        }
        Ok(ending) => monitor.end(ending.clone()),
    }
    result.map(|ending| ending.status)
}

/// How a run of the machine ended.
struct Run {
    ending: Ending,
    /// The host's fault.
    failure: Option<Error>,
    asked: Option<Asked>,
}

struct Monitor {
    spec: VmSpec,
    quiet: bool,
    front: Front,
    claim: Option<Claim>,
    life: Option<Life>,
    shared: Arc<Shared>,
    console: Arc<SharedConsole>,
    server: Option<Server>,
    terminal: Option<Terminal>,
}

impl Monitor {
    fn new(job: Job, front: Front) -> Result<Monitor, Error> {
        let Job {
            mut spec,
            claim,
            quiet,
        } = job;
        let mut log = None;
        if let Some(claim) = &claim {
            vms::resolve(&mut spec.machine, claim.dir());
            for net in &mut spec.machine.virtio.nets {
                if let NetworkSpec::Switch(switch) = &mut net.network {
                    switch.name = Some(claim.name().to_string());
                }
            }
            let path = claim.dir().join(CONSOLE_LOG);
            let opened = RotatingLog::open(&path, LOG_SIZE, LOGS);
            log = Some(opened.map_err(|error| Error::File {
                path,
                what: error.to_string(),
            })?);
        }
        let console = SharedConsole::start(log).map_err(host_error("cannot start a thread"))?;
        let (name, id) = match &claim {
            Some(claim) => (
                claim.name().as_str(),
                claim.record().map_or("", |record| &record.id),
            ),
            None => ("", ""),
        };
        let shared = Shared::new(name, id, front.output.clone());
        let mut server = None;
        let mut life = None;
        if let Some(claim) = &claim {
            let places = lodger_store::sockets(id, claim.dir());
            let started = Server::start(places, &shared, &console)?;
            life = Some(Life::begin(started.path(), ""));
            server = Some(started);
        }
        Ok(Monitor {
            spec,
            quiet,
            front,
            claim,
            life,
            shared,
            console,
            server,
            terminal: None,
        })
    }

    /// Runs the machine, and again as the policy says. An error is one of the first start, or of the host at the end.
    fn run(&mut self, report: &mut Option<Detached>) -> Result<Ending, Error> {
        let mut tries = 0;
        loop {
            let begun = Instant::now();
            let run = match self.run_once(report) {
                Ok(run) => run,
                Err(error) if self.terminal.is_none() || report.is_some() => return Err(error),
                Err(error) => Run::failed(error, self.shared.stopped()),
            };
            let again = match run.asked {
                Some(_) => None,
                None => {
                    let policy = self.spec.restart;
                    policy.delay(run.ending.status, begun.elapsed(), &mut tries)
                }
            };
            if let Some(delay) = again {
                tracing::warn!(
                    "{}; the machine is started again in {delay:?}",
                    run.ending.reason
                );
                if self.shared.restart_after(delay) {
                    continue;
                }
            }
            return match run.failure {
                Some(failure) => Err(failure),
                None => Ok(run.ending),
            };
        }
    }

    fn run_once(&mut self, report: &mut Option<Detached>) -> Result<Run, Error> {
        let chosen = registry::choose(self.spec.engine)?;
        let handle = VmHandle::new(Policy {
            no_reboot: self.spec.no_reboot,
        });
        let machine = Arc::new(self.build(&chosen, &handle)?);
        let controller = VmController::start(Arc::clone(&machine), handle.clone())?;
        refuse_stock_guest(&chosen, controller.boot())?;
        self.connect(&machine);
        if self.terminal.is_none() {
            self.begin(&chosen)?;
        }
        // After raw mode, whose own hook puts the terminal back before the message is printed.
        handle.fail_on_panic();
        self.write_start(chosen.engine.name());
        if let Some(waiting) = report {
            waiting.started()?;
            *report = None;
        }
        let started = self.life.as_ref().map_or(0, |life| life.started);
        let vm = Vm {
            handle,
            machine: Arc::clone(&machine),
        };
        self.shared.running(vm, chosen.engine.name(), started);
        let outcome = controller.run();
        let asked = self.shared.stopped();
        if self.spec.stats {
            let stats = machine.vm().stats();
            messages::end_line();
            messages::print_stats(&stats);
        }
        Ok(Run::conclude(outcome, asked, self.spec.container))
    }

    /// Before the first machine runs: the last messages, then the terminal is the guest's.
    fn begin(&mut self, chosen: &Chosen) -> Result<(), Error> {
        if !self.quiet {
            let name = chosen.engine.name();
            messages::say(format_args!("engine {name}: {}", chosen.reason));
            if self.front.interactive {
                messages::say("starting; Ctrl-A x leaves, Ctrl-A h helps");
            }
        }
        let terminal = Terminal::start(self.front.interactive, &self.shared, &self.console)?;
        self.terminal = Some(terminal);
        Ok(())
    }

    fn build(&self, chosen: &Chosen, handle: &VmHandle) -> Result<Machine, Error> {
        let show = || {
            let console = Arc::clone(&self.console);
            let output = self.front.output.clone();
            let interactive = self.front.interactive;
            Box::new(move |data: &[u8]| {
                console.print(data);
                if let Some(output) = &output {
                    output.write(data);
                }
                if interactive {
                    messages::guest_wrote(data);
                }
            })
        };
        let host = Host {
            engine: &*chosen.engine,
            features: registry::host_features(),
            tsc_khz: chosen.tsc_khz,
            clock: LiveClock::start(),
            control: Arc::new(handle.clone()),
            serial: show(),
            console: show(),
            entropy: Arc::new(random),
        };
        Ok(Machine::build(&self.spec.machine, host)?)
    }

    /// What is typed goes to this machine: to its virtio console if it has one.
    fn connect(&self, machine: &Machine) {
        let console = Arc::clone(&self.console);
        let has_room = Box::new(move || console.has_room());
        let port: Arc<dyn InputPort> = match machine.console() {
            Some(console) => {
                console.on_room(has_room);
                console.clone()
            }
            None => {
                machine.serial().on_room(has_room);
                machine.serial().clone()
            }
        };
        self.console.connect(port);
    }

    fn write_start(&mut self, engine: &str) {
        if let Some(old) = self.life.take() {
            let mut life = Life::begin(old.socket, engine);
            life.restarts = self.shared.status().restarts;
            self.life = Some(life);
        }
        self.write_life();
    }

    fn write_end(&mut self, ending: &Ending) {
        if let Some(life) = &mut self.life {
            life.ending = Some(ending.clone());
        }
        self.write_life();
    }

    /// A full disk is no reason to end a VM.
    fn write_life(&self) {
        if let (Some(claim), Some(life)) = (&self.claim, &self.life)
            && let Err(error) = claim.set_life(life)
        {
            tracing::warn!("{error}");
        }
    }

    /// It has never run. Nothing is left behind of a VM that is new.
    fn give_up(mut self, new: bool) {
        if let Some(server) = &self.server {
            server.unlink();
        }
        if let Some(claim) = self.claim.take().filter(|_| new) {
            claim
                .remove()
                .unwrap_or_else(|error| tracing::warn!("{error}"));
        }
        self.close();
    }

    /// The VM has ended: tells everybody who wants to know, and puts everything back.
    fn end(mut self, ending: Ending) {
        self.write_end(&ending);
        // Whoever hears of the end finds the name free, so the socket must have gone before the claim.
        if let Some(server) = &self.server {
            server.unlink();
        }
        let removed = |claim: &Claim| claim.record().is_some_and(|record| record.remove);
        if let Some(claim) = self.claim.take().filter(removed) {
            claim
                .remove()
                .unwrap_or_else(|error| tracing::warn!("{error}"));
        }
        self.shared.ended(ending);
        self.close();
    }

    fn close(self) {
        self.console.close();
        if let Some(server) = self.server {
            server.finish();
        }
        drop(self.terminal);
        if let Some(output) = self.front.output {
            output.close();
        }
        messages::end_line();
    }
}

impl Run {
    fn ending(status: u8, reason: String) -> Ending {
        let time = std::time::UNIX_EPOCH.elapsed();
        Ending {
            status,
            reason,
            time: time.map_or(0, |time| time.as_secs()),
        }
    }

    fn failed(failure: Error, asked: Option<Asked>) -> Run {
        let status = failure.status();
        Run {
            ending: Run::ending(status, failure.to_string()),
            failure: Some(failure),
            asked,
        }
    }

    /// The status, and the last words.
    fn conclude(outcome: Outcome, asked: Option<Asked>, container: bool) -> Run {
        let (status, reason) = match outcome {
            Outcome::PoweredOff => (status::POWERED_OFF, "the guest powered off".into()),
            Outcome::Reset => (status::RESET, "the guest reset the machine".into()),
            Outcome::DebugExit(value) if container => {
                let status = value as u8;
                (status, format!("its program ended with status {status}"))
            }
            Outcome::DebugExit(value) => (
                status::debug_exit(value),
                format!("the guest wrote {value:#x} to the debug-exit port"),
            ),
            Outcome::Stopped => {
                let status = match asked {
                    Some(Asked::Now(status)) => status,
                    Some(Asked::Gently) | None => status::POWERED_OFF,
                };
                let reason = match status::signal_of(status) {
                    Some(_) if status == status::KILLED => "killed".into(),
                    Some(number) => {
                        tracing::warn!("ended by signal {number}");
                        format!("ended by signal {number}")
                    }
                    None => "ended by the user".into(),
                };
                (status, reason)
            }
            Outcome::Crashed(report) => {
                messages::print(report);
                (status::CRASHED, "the guest crashed (triple fault)".into())
            }
            Outcome::HostFailure(failure) => return Run::failed(failure.into(), asked),
        };
        Run {
            ending: Run::ending(status, reason),
            failure: None,
            asked,
        }
    }
}

/// Fills `data` with random bytes from the host.
fn random(mut data: &mut [u8]) {
    use rustix::rand::{GetRandomFlags, getrandom};
    while !data.is_empty() {
        match getrandom(&mut *data, GetRandomFlags::empty()) {
            Ok(n) => data = &mut data[n..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("the host has no random numbers: {error}"),
        }
    }
}

/// An engine that can only run simple guests would let a stock system hang or crash. Simple guests are those that are
/// neither said to be Linux nor need an initial RAM disk.
fn refuse_stock_guest(chosen: &Chosen, boot: &Boot) -> Result<(), Error> {
    let simple = boot.kind == BootKind::Multiboot1
        || !boot.description.starts_with("Linux") && boot.initrd.is_none();
    match &chosen.only_simple_guests {
        Some(problem) if !simple => {
            let name = chosen.engine.name();
            Err(Error::Engine(format!(
                "the {name} engine cannot run this kernel on this host: {problem}; use --engine interp, or auto"
            )))
        }
        _ => Ok(()),
    }
}
