//! `lodger run`: from the arguments to a running VM, and from its end to the exit status.

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use lodger_board::{Boot, BootKind, BootSpec, Host, Machine, MachineSpec, VirtioSpec};
use lodger_char::{Escape, Input, Notice, Output, RawMode, Room};
use lodger_clock::{InputPort, LiveClock};
use lodger_host_sys::signals::{self, Signals};
use lodger_image::{Cache, Image};
use lodger_lifecycle::{Outcome, Policy, VmController, VmHandle};
use lodger_net::UserNetSpec;
use lodger_vcpu::Engine;
use lodger_virtio_devices::{BlkSpec, ConsoleSpec, NetSpec, NetworkSpec};

use crate::cli::{DeviceChoice, NetChoice, RunArgs};
use crate::images::{self, Bar};
use crate::registry::{self, Chosen};
use crate::status::{self, Error};
use crate::{host, messages};

/// How long a VM may take to stop once it is told to. It takes longer only if the host does not answer, a
/// dead network disk for example.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs a VM to its end.
pub fn run(args: &RunArgs, quiet: bool) -> Result<ExitCode, Error> {
    let own_network = matches!(args.net, NetChoice::User | NetChoice::Isolated);
    if !own_network && !args.publish.is_empty() {
        let text = "ports are published on networks that Lodger makes: --net user or isolated";
        return Err(Error::Usage(text.into()));
    }
    let chosen = registry::choose(args.engine)?;
    let interactive = lodger_char::is_interactive();
    let spec = machine_spec(args, &*chosen.engine, interactive, quiet)?;
    if let Some(available) = host::memory_available()
        && available < args.memory
    {
        tracing::warn!(
            "the machine has {} MiB of memory, the host {} MiB to give; it may end the machine when that is used up",
            args.memory >> 20,
            available >> 20
        );
    }
    let handle = VmHandle::new(Policy {
        no_reboot: args.no_reboot,
    });
    let output = Arc::new(Output::stdout().map_err(host("cannot use standard output"))?);
    let machine = Arc::new(build(&spec, &chosen, &handle, &output, interactive)?);
    let controller = VmController::start(Arc::clone(&machine), handle.clone())?;
    refuse_stock_guest(&chosen, controller.boot())?;

    if !quiet {
        let name = chosen.engine.name();
        messages::say(format_args!("engine {name}: {}", chosen.reason));
        if interactive {
            messages::say("starting; Ctrl-A x leaves, Ctrl-A h helps");
        }
    }
    let ending = Arc::new(AtomicU8::new(status::POWERED_OFF));
    let terminal = Terminal::start(interactive, &machine, &handle, &output, &ending)?;
    let outcome = controller.run();
    drop(terminal);
    if args.stats {
        let stats = machine.vm().stats();
        output.close();
        messages::end_line();
        messages::print_stats(&stats);
    }
    output.close();
    messages::end_line();
    Ok(ExitCode::from(conclude(outcome, &ending)?))
}

/// The status, and the last words.
fn conclude(outcome: Outcome, ending: &AtomicU8) -> Result<u8, Error> {
    Ok(match outcome {
        Outcome::PoweredOff => status::POWERED_OFF,
        Outcome::Reset => status::RESET,
        Outcome::DebugExit(value) => status::debug_exit(value),
        Outcome::Stopped => {
            let status = ending.load(Ordering::SeqCst);
            if let Some(number) = status::signal_of(status) {
                tracing::warn!("ended by signal {number}");
            }
            status
        }
        Outcome::Crashed(report) => {
            messages::print(report);
            status::CRASHED
        }
        Outcome::HostFailure(failure) => return Err(failure.into()),
    })
}

fn host(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Host { what, source }
}

fn machine_spec(
    args: &RunArgs,
    engine: &dyn Engine,
    interactive: bool,
    quiet: bool,
) -> Result<MachineSpec, Error> {
    let has = |device| args.devices.contains(&device);
    let console = has(DeviceChoice::VirtioConsole).then(|| {
        let (columns, rows) = lodger_char::window_size().unwrap_or_default();
        ConsoleSpec { columns, rows }
    });
    let mut spec = MachineSpec {
        memory: args.memory,
        vcpus: args.cpus,
        cpu: args.cpu.clone(),
        boot: BootSpec::default(),
        virtio: VirtioSpec {
            disks: args.disks.iter().map(|disk| disk.0.clone()).collect(),
            console,
            nets: nets(args),
        },
        debug_exit: has(DeviceChoice::DebugExit),
    };
    // Before an image is built for it.
    spec.check(engine)?;
    let (boot, root) = boot_spec(args, interactive, quiet)?;
    spec.boot = boot;
    spec.virtio.disks.splice(0..0, root);
    Ok(spec)
}

fn nets(args: &RunArgs) -> Vec<NetSpec> {
    let network = match &args.net {
        NetChoice::None => return Vec::new(),
        NetChoice::Tap(name) => NetworkSpec::Tap { name: name.clone() },
        choice @ (NetChoice::User | NetChoice::Isolated) => NetworkSpec::User(UserNetSpec {
            publish: args.publish.clone(),
            isolated: *choice == NetChoice::Isolated,
            ..UserNetSpec::default()
        }),
    };
    vec![NetSpec::new(network)]
}

/// What to boot, and the root disk of an image that has one.
fn boot_spec(
    args: &RunArgs,
    interactive: bool,
    quiet: bool,
) -> Result<(BootSpec, Option<BlkSpec>), Error> {
    let mut append = args.append.clone().unwrap_or_default();
    if let Some(kernel) = &args.kernel {
        let boot = BootSpec {
            kernel: kernel.clone(),
            initrd: args.initrd.clone(),
            append,
        };
        return Ok((boot, None));
    }
    let name = args.image.as_deref().unwrap_or(lodger_image::DEFAULT_IMAGE);
    let mut bar = Bar::new(quiet);
    let mut machine = images::Machine(args.engine);
    let image = Cache::open(None)?.get_or_build(name, &mut bar, &mut machine)?;
    let root = root_disk(&image, args.root.as_deref(), name, &mut bar)?;
    bar.finish();
    if args.devices.contains(&DeviceChoice::VirtioConsole) {
        append = format!("console=hvc0 {append}");
    } else if interactive && let Some((columns, rows)) = lodger_char::window_size() {
        append = format!("lodger.size={rows}x{columns} {append}");
    }
    let boot = BootSpec {
        kernel: image.kernel,
        initrd: Some(image.initrd),
        append: format!("{} {append}", image.append).trim().to_owned(),
    };
    Ok((boot, root))
}

/// The root disk of a machine that runs an image: one that is forgotten at the end, or the one in the file `kept`, which
/// is made the first time.
fn root_disk(
    image: &Image,
    kept: Option<&Path>,
    name: &str,
    bar: &mut Bar,
) -> Result<Option<BlkSpec>, Error> {
    match (&image.disk, kept) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(Error::Usage(format!(
            "--root: the image {name} has no root disk"
        ))),
        (Some(disk), None) => Ok(Some(BlkSpec {
            temporary: true,
            ..BlkSpec::new(disk, false)
        })),
        (Some(_), Some(kept)) => {
            image.copy_disk(kept, bar)?;
            Ok(Some(BlkSpec::new(kept, false)))
        }
    }
}

fn build(
    spec: &MachineSpec,
    chosen: &Chosen,
    handle: &VmHandle,
    output: &Arc<Output>,
    interactive: bool,
) -> Result<Machine, Error> {
    let to_stdout = || {
        let output = Arc::clone(output);
        Box::new(move |data: &[u8]| {
            output.write(data);
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
        serial: to_stdout(),
        console: to_stdout(),
        entropy: Arc::new(random),
    };
    Ok(Machine::build(spec, host)?)
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

/// The terminal, while the guest has it.
struct Terminal {
    // The input thread ends before the terminal is put back.
    _input: Input,
    _raw: Option<RawMode>,
}

impl Terminal {
    fn start(
        interactive: bool,
        machine: &Arc<Machine>,
        handle: &VmHandle,
        output: &Arc<Output>,
        ending: &Arc<AtomicU8>,
    ) -> Result<Terminal, Error> {
        let caught = Signals::catch(&[
            signals::HANGUP,
            signals::INTERRUPT,
            signals::QUIT,
            signals::TERMINATE,
            signals::WINDOW_CHANGED,
        ])
        .map_err(host("cannot catch signals"))?;
        let raw = interactive.then(RawMode::enter).transpose();
        let raw = raw.map_err(host("cannot put the terminal into raw mode"))?;
        // After raw mode, whose own hook puts the terminal back before the message is printed.
        handle.fail_on_panic();
        let stop = Stop {
            handle: handle.clone(),
            output: Arc::clone(output),
            ending: Arc::clone(ending),
        };
        let console = machine.console().cloned();
        let resized = console.clone();
        let notice = move |notice| match notice {
            Notice::Help => messages::say(Escape::HELP),
            Notice::Quit => stop.now(status::POWERED_OFF),
            Notice::Signal(number) => stop.now(status::signal(number)),
            Notice::Resized { columns, rows } => {
                if let Some(console) = &resized {
                    console.resize(columns, rows);
                }
            }
        };
        let port: Arc<dyn InputPort> = match &console {
            Some(console) => console.clone(),
            None => machine.serial().clone(),
        };
        let input = Input::start(port, caught, interactive, notice);
        let input = input.map_err(host("cannot read standard input"))?;
        let tell = |room: Room| Box::new(move || room.tell());
        match &console {
            Some(console) => console.on_room(tell(input.room())),
            None => machine.serial().on_room(tell(input.room())),
        }
        // What was refused before the guest's device knew whom to tell.
        input.room().tell();
        Ok(Terminal {
            _input: input,
            _raw: raw,
        })
    }
}

/// How the user's wish to end is carried out, whatever the guest does.
struct Stop {
    handle: VmHandle,
    output: Arc<Output>,
    ending: Arc<AtomicU8>,
}

impl Stop {
    fn now(&self, status: u8) {
        self.ending.store(status, Ordering::SeqCst);
        self.output.close();
        self.handle.stop();
        // If no thread can be had, the host is in a state in which the rest does not matter.
        let _ = std::thread::Builder::new().spawn(move || {
            std::thread::sleep(PATIENCE);
            RawMode::leave();
            messages::error("the machine does not stop: the host does not answer");
            std::process::exit(status.into());
        });
    }
}
