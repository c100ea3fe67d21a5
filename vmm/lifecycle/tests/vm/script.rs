//! An engine whose vCPUs follow a script instead of executing instructions.

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex};

use lodger_board::{BootSpec, Host, Machine, MachineSpec, VirtioSpec};
use lodger_clock::LiveClock;
use lodger_lifecycle::{Failure, Outcome, Policy, VmController, VmHandle};
use lodger_vcpu::{Capabilities, Engine, EngineError, EngineVm, Entry, Exit, Kick, Vcpu, VmConfig};
use lodger_x86::{CpuState, HostFeatures};
use tempfile::NamedTempFile;

/// What a vCPU does.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// Leaves `run`.
    Exit(Exit),
    /// Leaves `run` like this for ever, until somebody kicks.
    Endless(Exit),
    /// Executes until somebody kicks. The last step of every script goes on like this.
    Spin,
    /// The engine fails.
    Fail,
    /// The engine has a bug.
    Panic,
}

/// By boot and vCPU: what it does.
pub type Scripts = &'static [&'static [&'static [Step]]];

pub struct ScriptEngine {
    pub scripts: Scripts,
    /// What vCPU 0 was let run with.
    pub entries: Arc<Mutex<Vec<Entry>>>,
    /// Creating this vCPU fails.
    pub refuses: Option<u32>,
}

impl Engine for ScriptEngine {
    fn name(&self) -> &'static str {
        "script"
    }

    fn probe(&self) -> Result<Capabilities, EngineError> {
        Ok(Capabilities {
            exact_ticks: false,
            dirty_log: false,
            max_vcpus: 4,
            stock_guests: false,
        })
    }

    fn create_vm(&self, _: VmConfig) -> Result<Arc<dyn EngineVm>, EngineError> {
        Ok(Arc::new(ScriptEngine {
            scripts: self.scripts,
            entries: Arc::clone(&self.entries),
            refuses: self.refuses,
        }))
    }
}

impl EngineVm for ScriptEngine {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        if self.refuses == Some(index) {
            return Err(EngineError::Internal("no such vCPU".into()));
        }
        Ok(Box::new(ScriptVcpu {
            index,
            scripts: self.scripts,
            boots: 0,
            next: 0,
            pending: false,
            kicks: Arc::default(),
            entries: Arc::clone(&self.entries),
        }))
    }

    fn send_msi(&self, _: u64, _: u32) {}

    fn set_intr(&self, _: bool) {}
}

#[derive(Default)]
struct Kicks {
    kicked: Mutex<bool>,
    changed: Condvar,
}

impl Kick for Kicks {
    fn kick(&self) {
        *self.kicked.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

struct ScriptVcpu {
    index: u32,
    scripts: Scripts,
    boots: usize,
    next: usize,
    /// An access waits for its entry.
    pending: bool,
    kicks: Arc<Kicks>,
    entries: Arc<Mutex<Vec<Entry>>>,
}

impl Vcpu for ScriptVcpu {
    fn run(&mut self, entry: Entry) -> Result<Exit, EngineError> {
        if self.index == 0 {
            self.entries.lock().unwrap().push(entry);
        }
        assert_eq!(self.pending, entry != Entry::Resume);
        self.pending = false;
        let mut kicked = self.kicks.kicked.lock().unwrap();
        let boots = self.scripts;
        let script = boots[(self.boots - 1).min(boots.len() - 1)][self.index as usize];
        let step = script.get(self.next).copied().unwrap_or(Step::Spin);
        // A kick may be late: here it always is, as long as the script goes on.
        let exit = match step {
            Step::Exit(exit) => exit,
            Step::Endless(exit) if !*kicked => exit,
            Step::Endless(_) => Exit::Kicked,
            Step::Spin => {
                while !*kicked {
                    kicked = self.kicks.changed.wait(kicked).unwrap();
                }
                Exit::Kicked
            }
            Step::Fail => return Err(EngineError::Internal("out of order".into())),
            Step::Panic => {
                drop(kicked);
                panic!("a bug of the engine, made for this test");
            }
        };
        if !matches!(step, Step::Endless(_)) {
            self.next += 1;
        }
        match exit {
            Exit::Kicked => *kicked = false,
            Exit::Eoi(_) | Exit::TickLimit | Exit::Shutdown => {}
            _ => self.pending = true,
        }
        Ok(exit)
    }

    fn load(&mut self, _: &CpuState) -> Result<(), EngineError> {
        assert!(
            !self.pending,
            "a state is loaded in the middle of an access"
        );
        self.boots += 1;
        self.next = 0;
        Ok(())
    }

    fn store(&mut self) -> Result<CpuState, EngineError> {
        assert!(
            !self.pending,
            "the state is read in the middle of an access"
        );
        Ok(CpuState::reset(self.index, 0))
    }

    fn ticks(&self) -> u64 {
        self.next as u64
    }

    fn set_tick_limit(&mut self, _: Option<u64>) {}

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kicks.clone()
    }

    fn recent_instructions(&self) -> Vec<(u64, String)> {
        vec![(0xfff0, "ud2".into())]
    }
}

/// A VM with this many vCPUs as its scripts have.
pub struct Rig {
    pub machine: Arc<Machine>,
    pub handle: VmHandle,
    pub entries: Arc<Mutex<Vec<Entry>>>,
    _kernel: NamedTempFile,
}

/// A Multiboot kernel: just a header, at 1 MiB.
fn kernel() -> NamedTempFile {
    const MAGIC: u32 = 0x1bad_b002;
    const ADDRESSES: u32 = 1 << 16;
    const BASE: u32 = 0x10_0000;
    let checksum = 0u32.wrapping_sub(MAGIC + ADDRESSES);
    let fields = [MAGIC, ADDRESSES, checksum, BASE, BASE, 0, 0, BASE];
    let bytes: Vec<u8> = fields.into_iter().flat_map(u32::to_le_bytes).collect();
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

pub fn rig(scripts: Scripts, policy: Policy, refuses: Option<u32>) -> Rig {
    let kernel = kernel();
    let engine = ScriptEngine {
        scripts,
        entries: Arc::default(),
        refuses,
    };
    let entries = Arc::clone(&engine.entries);
    let handle = VmHandle::new(policy);
    let spec = MachineSpec {
        memory: 4 << 20,
        vcpus: scripts[0].len() as u32,
        cpu: "v3".into(),
        boot: BootSpec {
            kernel: kernel.path().into(),
            initrd: None,
            append: String::new(),
        },
        virtio: VirtioSpec::default(),
        debug_exit: true,
    };
    let host = Host {
        engine: &engine,
        features: HostFeatures::default(),
        tsc_khz: 1_000_000,
        clock: LiveClock::start(),
        control: Arc::new(handle.clone()),
        serial: Box::new(|_| {}),
        console: Box::new(|_| {}),
        entropy: Arc::new(|data| data.fill(4)),
    };
    Rig {
        machine: Arc::new(Machine::build(&spec, host).unwrap()),
        handle,
        entries,
        _kernel: kernel,
    }
}

impl Rig {
    pub fn start(&self) -> Result<VmController, Failure> {
        VmController::start(Arc::clone(&self.machine), self.handle.clone())
    }

    pub fn run(&self) -> Outcome {
        self.start().unwrap().run()
    }
}
