//! A machine whose engine only notes what reaches the vCPUs.

use std::io::Write;
use std::sync::{Arc, Mutex};

use lodger_board::{BootSpec, Host, Machine, MachineSpec, VirtioSpec};
use lodger_clock::manual::ManualClock;
use lodger_device_model::{MachineControl, MachineRequest};
use lodger_vcpu::{Capabilities, Engine, EngineError, EngineVm, Vcpu, VmConfig};
use lodger_virtio_devices::{
    BalloonSpec, BlkSpec, ConsoleSpec, FsSpec, NetSpec, NetworkSpec, VsockSpec,
};
use lodger_x86::HostFeatures;
use tempfile::NamedTempFile;

/// What reached the vCPUs, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Intr(bool),
    Msi(u64, u32),
}

#[derive(Default)]
pub struct Inputs {
    pub events: Mutex<Vec<Event>>,
    pub requests: Mutex<Vec<MachineRequest>>,
    pub printed: Mutex<Vec<u8>>,
}

impl Inputs {
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    fn note(&self, event: Event) {
        let mut events = self.events.lock().unwrap();
        // Enough for every test; the others cause millions.
        if events.len() < 1000 {
            events.push(event);
        }
    }
}

/// An engine that notes what its VM is told.
#[derive(Default)]
pub struct Recorder(Arc<Inputs>);

impl Engine for Recorder {
    fn name(&self) -> &'static str {
        "recorder"
    }

    fn probe(&self) -> Result<Capabilities, EngineError> {
        Ok(Capabilities {
            exact_ticks: false,
            dirty_log: false,
            max_vcpus: 8,
            stock_guests: false,
        })
    }

    fn create_vm(&self, _: VmConfig) -> Result<Arc<dyn EngineVm>, EngineError> {
        Ok(Arc::new(Recorder(Arc::clone(&self.0))))
    }
}

impl EngineVm for Recorder {
    fn create_vcpu(&self, _: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        Err(EngineError::Internal("it only records".into()))
    }

    fn send_msi(&self, address: u64, data: u32) {
        self.0.note(Event::Msi(address, data));
    }

    fn set_intr(&self, level: bool) {
        self.0.note(Event::Intr(level));
    }
}

impl MachineControl for Inputs {
    fn request(&self, request: MachineRequest) {
        let mut requests = self.requests.lock().unwrap();
        if requests.len() < 1000 {
            requests.push(request);
        }
    }
}

/// A machine and what it stands on.
pub struct Rig {
    pub machine: Machine,
    pub inputs: Arc<Inputs>,
    pub clock: Arc<ManualClock>,
    _files: Vec<NamedTempFile>,
}

/// A Multiboot kernel: just a header, at 1 MiB.
fn kernel() -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    const ADDRESSES: u32 = 1 << 16;
    const BASE: u32 = 0x10_0000;
    let checksum = 0u32.wrapping_sub(MAGIC + ADDRESSES);
    let fields = [
        MAGIC,
        ADDRESSES,
        checksum,
        BASE,
        BASE,
        BASE + 64,
        0,
        BASE + 32,
    ];
    let mut bytes: Vec<u8> = fields.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.resize(64, 0xf4);
    bytes
}

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// With every device that there is.
pub fn spec(files: &[NamedTempFile]) -> MachineSpec {
    let disk = |i: usize, read_only| BlkSpec::new(files[i].path(), read_only);
    MachineSpec {
        memory: 16 << 20,
        vcpus: 2,
        cpu: "v3".into(),
        boot: BootSpec {
            kernel: files[0].path().into(),
            initrd: None,
            append: "a=b".into(),
        },
        virtio: VirtioSpec {
            disks: vec![disk(1, false), disk(2, true)],
            console: Some(ConsoleSpec {
                columns: 80,
                rows: 25,
            }),
            nets: vec![NetSpec::new(NetworkSpec::User(Default::default()))],
            vsock: Some(VsockSpec::new(files[0].path().with_extension("vsock"))),
            balloon: Some(BalloonSpec {
                start: Some(8 << 20),
            }),
            shares: vec![FsSpec {
                folder: std::env::temp_dir(),
                tag: "share0".into(),
                read_only: true,
                owner: (0, 0),
            }],
        },
        debug_exit: true,
    }
}

pub fn files() -> Vec<NamedTempFile> {
    vec![file(&kernel()), file(&[1; 8192]), file(&[2; 4096])]
}

pub fn rig() -> Rig {
    let files = files();
    let inputs = Arc::new(Inputs::default());
    let clock = ManualClock::new(1_700_000_000_000_000_000);
    let printed = Arc::clone(&inputs);
    let host = Host {
        engine: &Recorder(Arc::clone(&inputs)),
        features: HostFeatures::default(),
        tsc_khz: 1_000_000,
        clock: clock.clone(),
        control: inputs.clone(),
        serial: Box::new(move |data| {
            let mut printed = printed.printed.lock().unwrap();
            if printed.len() < 1000 {
                printed.extend(data);
            }
        }),
        console: Box::new(|_| {}),
        entropy: Arc::new(|data| data.fill(4)),
    };
    let machine = Machine::build(&spec(&files), host).unwrap();
    Rig {
        machine,
        inputs,
        clock,
        _files: files,
    }
}

impl Rig {
    pub fn out(&self, port: u64, data: &[u8]) {
        self.machine.space().ports.write(port, data);
    }

    pub fn input<const N: usize>(&self, port: u64) -> [u8; N] {
        let mut data = [0; N];
        self.machine.space().ports.read(port, &mut data);
        data
    }

    pub fn store(&self, address: u64, value: u32) {
        let data = value.to_le_bytes();
        self.machine.space().mmio.write(address, &data);
    }

    pub fn load(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.machine.space().mmio.read(address, &mut data);
        u32::from_le_bytes(data)
    }
}
