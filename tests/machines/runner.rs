//! Runs a guest on every engine and compares how it ends.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lodger_board::{BootSpec, Host, Machine, MachineSpec, VirtioSpec};
use lodger_clock::LiveClock;
use lodger_interp::host_features;
use lodger_lifecycle::{Outcome, Policy, VmController, VmHandle};
use lodger_virtio_devices::BlkSpec;

use crate::engines::{self, Candidate};

/// A run that takes longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(100);
const TSC_KHZ: u32 = 2_000_000;

/// How a guest is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By the debug-exit port, with all checks right.
    Passed,
    PoweredOff,
    Reset,
    Crashed,
}

/// A guest, and the machine that it runs on.
pub struct Guest {
    name: &'static str,
    cpus: u32,
    append: &'static str,
    disk: Option<PathBuf>,
    end: End,
    reboots: bool,
}

impl Guest {
    pub fn new(name: &'static str) -> Guest {
        Guest {
            name,
            cpus: 1,
            append: "",
            disk: None,
            end: End::Passed,
            reboots: false,
        }
    }

    pub fn cpus(self, cpus: u32) -> Guest {
        Guest { cpus, ..self }
    }

    pub fn append(self, append: &'static str) -> Guest {
        Guest { append, ..self }
    }

    pub fn disk(self, path: &Path) -> Guest {
        let disk = Some(path.to_owned());
        Guest { disk, ..self }
    }

    pub fn ends(self, end: End) -> Guest {
        Guest { end, ..self }
    }

    /// A reset starts it again.
    pub fn reboots(self) -> Guest {
        Guest {
            reboots: true,
            ..self
        }
    }

    /// Runs it on every engine; fails if it ends otherwise than it is to.
    pub fn runs(self) {
        let mut failures = String::new();
        for candidate in engines::all() {
            let name = candidate.engine.name();
            let start = Instant::now();
            let (end, output) = self.run(&candidate);
            let took = start.elapsed();
            let Guest {
                name: guest, cpus, ..
            } = self;
            eprintln!("{guest} on {name}, {cpus} vCPUs: {took:?}");
            if end != Ok(self.end) {
                let end = end.map_or_else(|problem| problem, |end| format!("{end:?}"));
                failures += &format!("{guest} on {name}:\n{output}\n{end}\n");
            }
        }
        assert!(failures.is_empty(), "{failures}");
    }

    fn spec(&self, limited: bool) -> MachineSpec {
        let kernel = Path::new(env!("OUT_DIR")).join(self.name);
        let disk = |path: &PathBuf| BlkSpec {
            serial: "guest-test".into(),
            ..BlkSpec::new(path, false)
        };
        MachineSpec {
            memory: 256 << 20,
            vcpus: self.cpus,
            cpu: "v3".into(),
            boot: BootSpec {
                kernel,
                initrd: None,
                append: match limited {
                    true => format!("{} limited", self.append),
                    false => self.append.into(),
                },
            },
            virtio: VirtioSpec {
                disks: self.disk.iter().map(disk).collect(),
                ..VirtioSpec::default()
            },
            debug_exit: true,
        }
    }

    /// How it ended, and what it printed.
    fn run(&self, candidate: &Candidate) -> (Result<End, String>, String) {
        let printed = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&printed);
        let handle = VmHandle::new(Policy {
            no_reboot: !self.reboots,
        });
        let host = Host {
            engine: &*candidate.engine,
            features: host_features(),
            tsc_khz: TSC_KHZ,
            clock: LiveClock::start(),
            control: Arc::new(handle.clone()),
            serial: Box::new(move |data| sink.lock().unwrap().extend_from_slice(data)),
            console: Box::new(|_| ()),
            entropy: Arc::new(|data| data.fill(0xa5)),
        };
        let machine = Machine::build(&self.spec(candidate.limited), host).expect("a machine");
        let (ended, alive) = channel::<()>();
        let stopper = handle.clone();
        let watchdog = std::thread::spawn(move || {
            if alive.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                stopper.stop();
            }
        });
        let controller = VmController::start(Arc::new(machine), handle);
        let outcome = controller.map(VmController::run);
        drop(ended);
        watchdog.join().expect("the watchdog");
        let end = match outcome {
            Ok(Outcome::DebugExit(0)) => Ok(End::Passed),
            Ok(Outcome::DebugExit(_)) => Err("checks failed".into()),
            Ok(Outcome::PoweredOff) => Ok(End::PoweredOff),
            Ok(Outcome::Reset) => Ok(End::Reset),
            Ok(Outcome::Crashed(report)) if self.end != End::Crashed => Err(report.to_string()),
            Ok(Outcome::Crashed(_)) => Ok(End::Crashed),
            Ok(Outcome::Stopped) => Err(format!("it hangs: no end after {PATIENCE:?}")),
            Ok(Outcome::HostFailure(failure)) | Err(failure) => Err(failure.to_string()),
        };
        let output = String::from_utf8_lossy(&printed.lock().unwrap()).into_owned();
        (end, output)
    }
}
