//! `lodger run`: from the arguments to what the monitor runs.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lodger_block::Format;
use lodger_board::{BootSpec, MachineSpec, VirtioSpec};
use lodger_image::{Cache, Container, Image, Process, Seed};
use lodger_net::{SwitchSpec, UserNetSpec};
use lodger_store::Claim;
use lodger_vcpu::Engine;
use lodger_virtio_devices::{BlkSpec, ConsoleSpec, NetSpec, NetworkSpec, VsockSpec};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::cli::{DeviceChoice, NetChoice, RunArgs, VsockChoice};
use crate::images::{self, Bar};
use crate::monitor::{self, Job};
use crate::spec::VmSpec;
use crate::status::Error;
use crate::{host, messages, registry, vms};

/// Runs a VM: in the foreground to its end, or in the background.
pub fn run(args: &RunArgs, verbose: u8, quiet: bool) -> Result<ExitCode, Error> {
    let mut spec = vm_spec(args)?;
    // Before the image is built, and for as long as the VM lives.
    let mut claim = match args.keeping.is_kept() {
        true => Some(vms::claim_new(&args.keeping)?),
        false => None,
    };
    let dir = claim.as_ref().map(|claim| claim.dir());
    let mut made = add_image(&mut spec, args, dir, quiet);
    if let (Ok(_), Some(claim)) = (&made, &mut claim)
        && let Err(error) = vms::write_down(claim, args, &spec)
    {
        made = Err(error);
    }
    // As long as the machine runs.
    let _files = match made {
        Ok(files) => files,
        Err(error) => {
            // Nothing is left behind of what has never been.
            if let Some(Err(error)) = claim.map(Claim::remove) {
                tracing::warn!("{error}");
            }
            return Err(error);
        }
    };
    match claim {
        Some(claim) if args.keeping.detach => {
            monitor::start_detached(&claim, verbose)?;
            messages::answer(format_args!("{}\n", claim.name()))?;
            Ok(ExitCode::SUCCESS)
        }
        claim => {
            tell_size(&mut spec);
            monitor::run(Job { spec, claim, quiet }).map(ExitCode::from)
        }
    }
}

/// What is run, without what comes from its image: that is made for arguments that are right only.
pub fn vm_spec(args: &RunArgs) -> Result<VmSpec, Error> {
    let own_network = !matches!(args.net, NetChoice::None | NetChoice::Tap(_));
    if !own_network && !args.publish.is_empty() {
        let text = "ports are published on networks that Lodger makes: --net user, isolated or switch=NAME";
        return Err(Error::Usage(text.into()));
    }
    let chosen = registry::choose(args.engine)?;
    let machine = machine_spec(args, &*chosen.engine)?;
    if let Some(available) = host::memory_available()
        && available < args.memory.size
    {
        tracing::warn!(
            "the machine has {} MiB of memory, the host {} MiB to give; it may end the machine when that is used up",
            args.memory.size >> 20,
            available >> 20
        );
    }
    Ok(VmSpec {
        engine: args.engine,
        no_reboot: args.no_reboot,
        restart: args.restart,
        stats: args.stats,
        image: args.kernel.is_none(),
        container: false,
        machine,
    })
}

/// What the machine boots, for people.
pub fn boots(args: &RunArgs) -> String {
    match (&args.kernel, &args.image) {
        (Some(kernel), _) => kernel.display().to_string(),
        (None, Some(image)) => image.clone(),
        (None, None) => lodger_image::DEFAULT_IMAGE.into(),
    }
}

/// The machine without what comes from its image.
fn machine_spec(args: &RunArgs, engine: &dyn Engine) -> Result<MachineSpec, Error> {
    let has = |device| args.devices.contains(&device);
    let spec = MachineSpec {
        memory: args.memory.ram(),
        vcpus: args.cpus,
        cpu: args.cpu.clone(),
        boot: BootSpec {
            kernel: args.kernel.clone().unwrap_or_default(),
            initrd: args.initrd.clone(),
            append: append(args),
        },
        virtio: VirtioSpec {
            disks: args.disks.iter().map(|disk| disk.0.clone()).collect(),
            console: has(DeviceChoice::VirtioConsole).then_some(ConsoleSpec {
                columns: 0,
                rows: 0,
            }),
            nets: nets(args)?,
            vsock: match &args.vsock {
                Some(VsockChoice::At(path)) => Some(VsockSpec::new(path)),
                Some(VsockChoice::None) | None => None,
            },
            balloon: Some(args.memory.balloon()),
            shares: (args.shares.iter().enumerate())
                .map(|(index, share)| share.spec(index))
                .collect(),
        },
        debug_exit: has(DeviceChoice::DebugExit),
    };
    // Before an image is built for it.
    spec.check(engine)?;
    Ok(spec)
}

/// What the user adds to the kernel command line.
fn append(args: &RunArgs) -> String {
    let shares = args.shares.iter().enumerate();
    let shares = shares.map(|(index, share)| share.append(index));
    shares
        .chain(args.append.clone())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Adds what to boot, and the root disk of an image that has one. `dir` is the directory of a VM that is kept. The answer is
/// files without a name that the machine needs.
pub fn add_image(
    spec: &mut VmSpec,
    args: &RunArgs,
    dir: Option<&Path>,
    quiet: bool,
) -> Result<Vec<File>, Error> {
    let hostname = args
        .container
        .hostname
        .as_ref()
        .or(args.keeping.name.as_ref());
    let hostname = hostname.map(ToString::to_string);
    let seed = images::seed(&args.cloud, hostname.as_deref())?;
    let mut files: Vec<File> = boot_image(spec, args, dir, quiet)?.into_iter().collect();
    if let Some(seed) = seed {
        files.push(add_seed(&seed, spec, dir)?);
    }
    Ok(files)
}

/// Adds a disk for cloud-init behind all others.
fn add_seed(seed: &Seed, spec: &mut VmSpec, dir: Option<&Path>) -> Result<File, Error> {
    const NAME: &str = "seed.img";
    let (mut file, path) = new_file(NAME, dir)?;
    seed.write(&mut file).map_err(|error| Error::File {
        path: path.clone(),
        what: error.to_string(),
    })?;
    spec.machine.virtio.disks.push(BlkSpec {
        format: Some(Format::Raw),
        ..BlkSpec::new(&path, true)
    });
    Ok(file)
}

/// A new file in the directory of a VM that is kept, or one in memory, and its name in a spec.
fn new_file(name: &str, dir: Option<&Path>) -> Result<(File, PathBuf), Error> {
    let made = match dir {
        Some(dir) => File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(dir.join(name))
            .map(|file| (file, PathBuf::from(name))),
        None => memfd_create(name, MemfdFlags::CLOEXEC)
            .map(|file| {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                (file.into(), path.into())
            })
            .map_err(Into::into),
    };
    made.map_err(|error| Error::File {
        path: dir.map_or(name.into(), |dir| dir.join(name)),
        what: error.to_string(),
    })
}

/// Adds what to boot; see [`add_image`].
fn boot_image(
    spec: &mut VmSpec,
    args: &RunArgs,
    dir: Option<&Path>,
    quiet: bool,
) -> Result<Option<File>, Error> {
    let machine = &mut spec.machine;
    if dir.is_some() {
        vms::make_absolute(machine)?;
        if args.vsock.is_none() {
            machine.virtio.vsock = Some(VsockSpec::new(vms::VSOCK));
        }
    }
    if args.kernel.is_some() {
        return Ok(None);
    }
    let (boot, root, container) = boot_spec(args, dir, quiet)?;
    machine.boot = boot;
    machine.virtio.disks.splice(0..0, root);
    let mut process = process(args)?;
    match container {
        Some(container) => {
            spec.container = true;
            let name = args.keeping.name.as_ref().map(ToString::to_string);
            process.hostname = process.hostname.or(name);
            machine.debug_exit = true;
            container_initrd(&container, &process, machine, dir)
        }
        None => {
            let told = args.cloud.cloud_init.is_some()
                || args.cloud.user.is_some()
                || !args.cloud.ssh_keys.is_empty();
            process.hostname = process.hostname.filter(|_| !told);
            match process == Process::default() {
                true => Ok(None),
                false => Err(Error::Usage(format!(
                    "a command, --env, --workdir, --entrypoint and --hostname are for images from a registry, which {} is not; \
                     --hostname also goes with --cloud-init, --user and --ssh-key",
                    boots(args)
                ))),
            }
        }
    }
}

/// What an image from a registry is to run.
fn process(args: &RunArgs) -> Result<Process, Error> {
    let own = &args.container;
    let variable = |text: &String| match text.split_once('=') {
        Some(("", _)) => Some(Err(Error::Usage(format!("--env {text}: NAME=VALUE")))),
        Some(_) => Some(Ok(text.clone())),
        // One that is not set here is not set there.
        None => Some(Ok(format!("{text}={}", std::env::var(text).ok()?))),
    };
    Ok(Process {
        command: args.command.clone(),
        entrypoint: own.entrypoint.clone(),
        environment: own
            .env
            .iter()
            .filter_map(variable)
            .collect::<Result<_, _>>()?,
        directory: own.workdir.clone(),
        hostname: own.hostname.as_ref().map(ToString::to_string),
    })
}

/// Tells the guest what to run, by its RAM disk: a file in the directory of a VM that is kept, otherwise one in memory.
fn container_initrd(
    container: &Container,
    process: &Process,
    machine: &mut MachineSpec,
    dir: Option<&Path>,
) -> Result<Option<File>, Error> {
    if container.command_line(process).is_empty() {
        let text = "the image has no command of its own: say what it is to run, behind its name";
        return Err(Error::Usage(text.into()));
    }
    let base = machine.boot.initrd.take().unwrap_or_default();
    let base = dir.map_or(base.clone(), |dir| dir.join(base));
    let (mut file, path) = new_file("container.cpio", dir)?;
    container.write_initrd(process, &base, &mut file)?;
    machine.boot.initrd = Some(path);
    Ok(Some(file))
}

/// What of this terminal's size the guest can be told at its start.
fn tell_size(spec: &mut VmSpec) {
    let Some((columns, rows)) = lodger_char::window_size() else {
        return;
    };
    let machine = &mut spec.machine;
    if let Some(console) = &mut machine.virtio.console {
        *console = ConsoleSpec { columns, rows };
    } else if spec.image && lodger_char::is_interactive() {
        let append = &mut machine.boot.append;
        *append = format!("lodger.size={rows}x{columns} {append}");
    }
}

fn nets(args: &RunArgs) -> Result<Vec<NetSpec>, Error> {
    let user = UserNetSpec {
        publish: args.publish.clone(),
        isolated: args.net == NetChoice::Isolated,
        ..UserNetSpec::default()
    };
    let network = match &args.net {
        NetChoice::None => return Ok(Vec::new()),
        NetChoice::Tap(name) => NetworkSpec::Tap { name: name.clone() },
        NetChoice::User | NetChoice::Isolated => NetworkSpec::User(user),
        NetChoice::Switch(name) => NetworkSpec::Switch(SwitchSpec {
            directory: lodger_store::switch_dir(name)?,
            // Its monitor knows it.
            name: None,
            user,
        }),
    };
    Ok(vec![NetSpec::new(network)])
}

/// What to boot of an image, its root disk if it has one, and what it runs if it is from a registry.
fn boot_spec(
    args: &RunArgs,
    dir: Option<&Path>,
    quiet: bool,
) -> Result<(BootSpec, Option<BlkSpec>, Option<Container>), Error> {
    let mut append = append(args);
    let name = args.image.as_deref().unwrap_or(lodger_image::DEFAULT_IMAGE);
    let mut bar = Bar::new(quiet);
    let mut machine = images::Machine(args.engine);
    let image = Cache::open(None)?.get_or_build(name, &mut bar, &mut machine)?;
    let root = match (dir, &args.root) {
        (Some(dir), None) => vms::root_disk(&image, dir, &mut bar)?,
        (None, kept) => root_disk(&image, kept.as_deref(), name, &mut bar)?,
        (Some(_), Some(kept)) => root_disk(&image, Some(&vms::absolute(kept)?), name, &mut bar)?,
    };
    bar.finish();
    if args.devices.contains(&DeviceChoice::VirtioConsole) {
        append = format!("console=hvc0 {append}");
    }
    let (kernel, initrd) = match dir {
        None => (image.kernel, image.initrd),
        // A newer image must not take away the kernel that belongs to the disk.
        Some(dir) => (
            vms::keep(&image.kernel, dir)?,
            vms::keep(&image.initrd, dir)?,
        ),
    };
    let boot = BootSpec {
        kernel,
        initrd: Some(initrd),
        append: format!("{} {append}", image.append).trim().to_owned(),
    };
    Ok((boot, root, image.container))
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
