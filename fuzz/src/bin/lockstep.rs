//! Boots a machine on two engines in lock-step and stops at the first difference: see [`lodger_fuzz::lockstep`].

use std::collections::BTreeMap;
use std::error::Error;
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use lodger_board::{BootSpec, Host, Machine, MachineSpec, VirtioSpec};
use lodger_clock::manual::ManualClock;
use lodger_dbt_x86::DbtEngine;
use lodger_device_model::{MachineControl, MachineRequest};
use lodger_fuzz::lockstep::{HoldDevices, Lockstep, Options};
use lodger_interp::{InterpEngine, host_features};
use lodger_vcpu::{Engine, Entry, Exit};
use lodger_virtio_devices::BlkSpec;
use lodger_x86::HostFeatures;
use lodger_x86::bits::{RFlags, STATUS_FLAGS};

const USAGE: &str = "usage: lockstep --kernel FILE [--initrd FILE] [--disk FILE] [--append TEXT] [--memory MiB]
                [--leader dbt] [--follower interp] [--exact-flags yes] [--chunk N] [--checkpoint N] [--ns N] [--ticks N]

Boots a machine with one vCPU on both engines side by side and stops at the first difference. They are compared every
--chunk instructions (default 1000) and with their RAM every --checkpoint instructions (default 20000000). An
instruction takes --ns nanoseconds of guest time (default 2). --exact-flags: the translator keeps also the status flags that the
guest does not use any more, and they are compared, but OF. --ticks: the end, if the guest does not end before.";

/// A rotation by more than one bit leaves it undefined, and processors do not agree with themselves.
const OF: u64 = RFlags::OF.bits();
/// 2026-01-01T00:00:00Z: every run sees the same time.
const WALL: u64 = 1_767_225_600_000_000_000;
const TSC_KHZ: u32 = 2_000_000;

struct Arguments {
    values: BTreeMap<String, String>,
}

impl Arguments {
    fn parse() -> Option<Arguments> {
        let mut values = BTreeMap::new();
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            values.insert(name, arguments.next()?);
        }
        Some(Arguments { values })
    }

    fn text(&mut self, name: &str, default: &str) -> String {
        self.values.remove(name).unwrap_or_else(|| default.into())
    }

    fn number(&mut self, name: &str, default: u64) -> Option<u64> {
        match self.values.remove(name) {
            Some(value) => value.parse().ok(),
            None => Some(default),
        }
    }
}

struct Plan {
    spec: MachineSpec,
    leader: Arc<dyn Engine>,
    follower: Arc<dyn Engine>,
    options: Options,
    ticks: u64,
}

fn plan() -> Option<Plan> {
    let mut arguments = Arguments::parse()?;
    let exact_flags = arguments.text("--exact-flags", "no") == "yes";
    let engine = |name: &str| -> Option<Arc<dyn Engine>> {
        match name {
            "dbt" => Some(Arc::new(DbtEngine { exact_flags })),
            "interp" => Some(Arc::new(InterpEngine)),
            _ => None,
        }
    };
    let plan = Plan {
        leader: engine(&arguments.text("--leader", "dbt"))?,
        follower: engine(&arguments.text("--follower", "interp"))?,
        options: Options {
            chunk: arguments.number("--chunk", 1000)?.max(1),
            checkpoint: arguments.number("--checkpoint", 20_000_000)?,
            ns_per_instruction: arguments.number("--ns", 2)?,
            free_flags: if exact_flags { OF } else { STATUS_FLAGS },
        },
        ticks: arguments.number("--ticks", u64::MAX)?,
        spec: MachineSpec {
            memory: arguments.number("--memory", 128)? << 20,
            vcpus: 1,
            cpu: "v3".into(),
            boot: BootSpec {
                kernel: arguments.values.remove("--kernel")?.into(),
                initrd: arguments.values.remove("--initrd").map(Into::into),
                append: arguments.text(
                    "--append",
                    "console=ttyS0 panic=-1 cryptomgr.notests lodger.run=true",
                ),
            },
            virtio: VirtioSpec {
                disks: (arguments.values.remove("--disk").into_iter())
                    .map(|path| BlkSpec::new(path, false))
                    .collect(),
                ..VirtioSpec::default()
            },
            debug_exit: true,
        },
    };
    arguments.values.is_empty().then_some(plan)
}

/// The request with which the guest ends.
#[derive(Default)]
struct Ending(Mutex<Option<MachineRequest>>);

impl MachineControl for Ending {
    fn request(&self, request: MachineRequest) {
        *self.0.lock().expect("nobody panics here") = Some(request);
    }
}

/// Stops the devices that have threads of their own: those on virtio.
fn hold_devices(machine: Arc<OnceLock<Machine>>) -> HoldDevices {
    Arc::new(move |hold| {
        let devices = machine.get().map_or(&[][..], Machine::devices);
        for device in devices.iter().filter(|d| d.name().starts_with("virtio")) {
            match hold {
                true => device.pause(),
                false => device.resume(),
            }
        }
    })
}

fn run(plan: Plan) -> Result<(), Box<dyn Error>> {
    let clock = ManualClock::new(WALL);
    let machine = Arc::new(OnceLock::<Machine>::new());
    let engine = Lockstep::new(
        plan.leader,
        plan.follower,
        Arc::clone(&clock),
        hold_devices(Arc::clone(&machine)),
        plan.options,
    );
    let ending = Arc::new(Ending::default());
    let built = Machine::build(
        &plan.spec,
        Host {
            engine: &engine,
            // Random numbers would not be the same on both.
            features: HostFeatures {
                rdrand: false,
                rdseed: false,
                ..host_features()
            },
            tsc_khz: TSC_KHZ,
            clock,
            control: ending.clone(),
            serial: Box::new(|bytes| {
                let mut output = std::io::stdout().lock();
                // A console that nobody reads is no reason to stop.
                let _ = output.write_all(bytes).and_then(|()| output.flush());
            }),
            console: Box::new(|_| {}),
            entropy: Arc::new(|bytes: &mut [u8]| bytes.fill(0x5a)),
        },
    )?;
    let machine = machine.get_or_init(|| built);
    let on = machine.power_on()?;
    let mut vcpu = machine.vm().create_vcpu(0)?;
    vcpu.load(&on.vcpus[0])?;
    vcpu.set_tick_limit(Some(plan.ticks));
    let started = Instant::now();
    let mut exits = 0_u64;
    let mut entry = Entry::Resume;
    let end = loop {
        let exit = vcpu.run(entry)?;
        exits += 1;
        if matches!(exit, Exit::Shutdown | Exit::TickLimit) {
            break format!("{exit:?}");
        }
        entry = machine.answer(exit);
        if let Some(request) = *ending.0.lock().expect("nobody panics here") {
            break format!("{request:?}");
        }
    };
    eprintln!(
        "no difference in {} instructions, {exits} exits, {:.1} s of guest time; the end: {end}; {:.0} s",
        vcpu.ticks(),
        machine.clock().now() as f64 / 1e9,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

fn main() -> ExitCode {
    let Some(plan) = plan() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match run(plan) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
