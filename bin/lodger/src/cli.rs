//! The arguments and their help.

mod guest;
mod memory;
mod share;
mod vms;

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use lodger_net::Forward;
use lodger_virtio_devices::{BlkSpec, Rate};
use lodger_x86::CpuModel;
use serde::{Deserialize, Serialize};

use crate::spec::Restart;
pub use guest::{CopyArgs, ExecArgs, SshArgs};
pub use memory::Memory;
pub use share::Share;
pub use vms::{
    ConsoleArgs, DownArgs, FileArgs, Keeping, Label, LogsArgs, ManArgs, PsArgs, RmArgs, SetArgs,
    StartArgs, StopArgs, UpArgs, Vms,
};

use crate::disk::DiskCommand;

const RUN_AFTER: &str = "\
Terminal:
  The guest's first serial port is this terminal; every key goes to the guest, Ctrl-C too. The
  escape key is Ctrl-A:
    Ctrl-A x         end the machine at once and leave
    Ctrl-A s         type this terminal's size into the guest's shell, as an stty command
    Ctrl-A Ctrl-A    send Ctrl-A to the guest
    Ctrl-A h         help
  If standard input or output is not a terminal, bytes pass unchanged and there is no escape key;
  the end of input does not end the guest.

Exit status:
  0      the guest powered off, or Ctrl-A x
  1      the host failed: a file, the network, no memory ...
  2      wrong arguments
  3      the guest crashed (triple fault); a report is on standard error
  4      the guest reset the machine, under --no-reboot
  0-255  of images from a registry: the status with which the image's program has ended; 126 and 127
         if it could not be started
  2v+1   the guest wrote v to the debug-exit port (modulo 256)
  128+n  ended by signal n

Examples:
  lodger run
      boots the mini image to a shell, and builds it first if need be
  lodger run --cpus 4 --memory 1.5G --disk disk.img
  lodger run -d --name web -p 8080:80 debian
      in the background, with a disk of its own; see lodger ps, logs, console, stop, start, rm
  lodger run --kernel vmlinuz --initrd initrd.img --append 'console=ttyS0'";

const COMPLETIONS_AFTER: &str = "\
Examples:
  source <(lodger completions bash)
  lodger completions bash > ~/.local/share/bash-completion/completions/lodger
  lodger completions zsh > ~/.zfunc/_lodger
  lodger completions fish > ~/.config/fish/completions/lodger.fish";

const PULL_AFTER: &str = "\
Names are those of Docker: without a registry it is docker.io, without a tag `latest`. A login comes
from where `docker login` and `podman login` store it. Registries on 127.0.0.1 are spoken to without TLS.

Examples:
  lodger image pull nginx
  lodger run -p 8080:80 nginx
  lodger run -d --name web -p 8080:80 nginx
  lodger run alpine ls -l /";

const IMPORT_AFTER: &str = "\
The file is copied; it may be changed or removed afterwards.

Examples:
  lodger image import debian-12-genericcloud-amd64.qcow2 --name cloud --size 20G
  lodger run --user alice --ssh-key ~/.ssh/id_ed25519.pub --hostname web -p 2222:22 cloud";

/// RAM of a machine for which nothing else is said, in bytes.
pub const DEFAULT_MEMORY: u64 = 512 << 20;

/// Lodger runs virtual machines: whole computers for unmodified operating systems, with and without the
/// processor's virtualization.
#[derive(Debug, Parser)]
#[command(name = "lodger", version, propagate_version = true)]
pub struct Cli {
    /// Say what happens; twice: in detail
    #[arg(short, long, global = true, action = ArgAction::Count, display_order = 900)]
    pub verbose: u8,
    /// Say nothing but errors
    #[arg(short, long, global = true, display_order = 900)]
    pub quiet: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine
    Run(Box<RunArgs>),
    /// Build, pull, list and remove guest images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Make, describe, convert, check and grow disk images
    #[command(subcommand)]
    Disk(DiskCommand),
    /// List virtual machines
    Ps(PsArgs),
    /// Start stopped virtual machines again, in the background
    Start(StartArgs),
    /// Stop virtual machines: press the power button, and end them if they take too long
    Stop(StopArgs),
    /// Stop virtual machines and start them again
    Restart(StopArgs),
    /// End virtual machines at once, as if the power failed
    Kill(Vms),
    /// Let virtual machines stand still
    Pause(Vms),
    /// Let paused virtual machines go on
    #[command(alias = "resume")]
    Unpause(Vms),
    /// Give a stopped virtual machine another name
    Rename {
        /// Name, or beginning of an id
        #[arg(value_name = "VM")]
        vm: String,
        /// The new name
        #[arg(value_name = "NAME")]
        name: lodger_store::Name,
    },
    /// Change what a stopped virtual machine will have at its next start
    Set(SetArgs),
    /// Remove stopped virtual machines and their disks
    Rm(RmArgs),
    /// Wait for virtual machines to end, and print their exit statuses
    Wait(Vms),
    /// Show what a virtual machine has printed on its console
    Logs(LogsArgs),
    /// Connect this terminal to the console of a running virtual machine
    #[command(alias = "attach")]
    Console(ConsoleArgs),
    /// Run a command in a running virtual machine's guest
    Exec(ExecArgs),
    /// Copy files into a running virtual machine's guest, or out of it
    Cp(CopyArgs),
    /// Log in to a running virtual machine's guest by SSH
    Ssh(SshArgs),
    /// Standard input and output as a connection to a guest's SSH server; `lodger ssh` uses it
    #[command(hide = true)]
    SshProxy {
        /// Name, or beginning of an id
        vm: String,
    },
    /// Write the agent that serves `lodger exec`, `cp` and `ssh`: a static program for guests that have none
    Agent {
        /// The file; otherwise it is written to standard output
        file: Option<PathBuf>,
    },
    /// Tell everything about virtual machines, as JSON
    Inspect(Vms),
    /// Start the virtual machines that a file describes
    Up(UpArgs),
    /// Stop the virtual machines that a file describes
    Down(DownArgs),
    /// Print what makes a shell complete lodger's commands and options
    #[command(after_help = COMPLETIONS_AFTER)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print a manual page, or write all of them
    Man(ManArgs),
    /// Run the virtual machine of a directory in the background; `lodger run --detach` does
    #[command(hide = true)]
    Monitor {
        /// The virtual machine's directory, locked by standard input
        dir: PathBuf,
    },
    /// Check what this host can do, and how to get what it cannot
    Doctor,
}

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// List the images that are known, built or not
    #[command(alias = "ls")]
    List,
    /// Build an image from the host distribution's packages, anew if it is there
    Build {
        /// The image: mini, debian, or debian:SUITE
        #[arg(default_value = lodger_image::DEFAULT_IMAGE)]
        image: String,
        #[command(flatten)]
        options: ImageOptions,
    },
    /// Fetch an image from a registry, anew if it has changed there
    #[command(after_help = PULL_AFTER)]
    Pull {
        /// The image: nginx, debian:12, ghcr.io/user/name:tag, 127.0.0.1:5000/name@sha256:...
        #[arg(value_name = "REFERENCE")]
        reference: String,
        /// The size of the root disk, which takes of the host what is on it [default: 10G]
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        size: Option<u64>,
    },
    /// Make an image of a disk image, such as a distribution's cloud image, with the kernel that is on it
    #[command(after_help = IMPORT_AFTER)]
    Import(ImportArgs),
    /// Tell everything about images, as JSON
    Inspect {
        /// The images
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    /// Remove images from the cache
    #[command(alias = "rm")]
    Remove {
        /// The images
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    /// Remove what was fetched for images that are not there any more, or never became complete
    Prune,
}

/// `lodger image import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The disk image: raw or qcow2
    pub file: PathBuf,
    /// What to call it
    #[arg(long)]
    pub name: String,
    /// The format of the file [default: what its first bytes tell]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<lodger_block::Format>,
    /// The size of the disk, if it is to be larger
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,
    /// The kernel, if it is not to be that of the disk
    #[arg(long, value_name = "FILE", requires = "initrd")]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk of that kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// The kernel command line, if it is not to be that of the disk
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub append: Option<String>,
}

/// What a guest with cloud-init is told.
#[derive(Debug, Args)]
pub struct CloudArgs {
    /// Attach a disk with these files for cloud-init (NoCloud)
    #[arg(long, value_name = "USER-DATA[,META-DATA[,NETWORK-CONFIG]]", conflicts_with_all = ["user", "ssh_keys"])]
    pub cloud_init: Option<String>,
    /// Have cloud-init make this user, who may use sudo
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// Have cloud-init let the SSH public keys of this file log in as that user, else as the
    /// distribution's own (repeatable)
    #[arg(long = "ssh-key", value_name = "FILE")]
    pub ssh_keys: Vec<PathBuf>,
}

/// What a Debian image is to be like.
#[derive(Debug, Args)]
pub struct ImageOptions {
    /// debian: the size of the root disk, which takes of the host what is on it [default: 10G]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,
    /// debian: a further package (repeatable)
    #[arg(long = "package", value_name = "NAME")]
    pub packages: Vec<String>,
    /// debian: a user who is logged in at the console instead of root, and may use sudo
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// debian: a file of SSH public keys that may log in as that user, else as root (repeatable)
    #[arg(long = "ssh-key", value_name = "FILE")]
    pub ssh_keys: Vec<PathBuf>,
    /// What runs the virtual machine that sets up the packages
    #[arg(long, value_enum, default_value_t = EngineChoice::Auto)]
    pub engine: EngineChoice,
}

#[derive(Debug, Args)]
#[command(after_help = RUN_AFTER)]
pub struct RunArgs {
    /// The image to boot [default: mini]; see `lodger image list`
    #[arg(conflicts_with_all = ["kernel", "initrd"])]
    pub image: Option<String>,
    /// What an image from a registry is to run, in place of its own command
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    pub command: Vec<String>,
    #[command(flatten)]
    pub container: ContainerArgs,
    #[command(flatten)]
    pub cloud: CloudArgs,
    /// Boot this kernel instead of an image: bzImage, ELF (PVH or 64-bit entry) or multiboot 1
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk, or the multiboot module
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// The kernel command line; with an image it is added to the image's own
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// RAM: 512M, 1.5G, 2048K ...; a plain number is in MiB. `1G,max=4G`: 1G at the start, and up to 4G by `lodger set`
    /// while it runs
    #[arg(
        short,
        long,
        value_name = "SIZE",
        default_value = "512M",
        allow_negative_numbers = true
    )]
    pub memory: Memory,
    /// Number of virtual CPUs
    #[arg(short, long, value_name = "N", default_value_t = 1, allow_negative_numbers = true,
        value_parser = clap::value_parser!(u32).range(1..))]
    pub cpus: u32,
    /// What runs the virtual CPUs
    #[arg(long, value_enum, default_value_t = EngineChoice::Auto)]
    pub engine: EngineChoice,
    /// Keep the root disk of an image in this file, which is made the first time; without it, what
    /// the guest changes is forgotten at the end
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd"])]
    pub root: Option<PathBuf>,
    /// A disk image, raw or qcow2, after the root disk if there is one: /dev/vda, then /dev/vdb ...
    /// (repeatable). `,ro` makes it read-only; with `,temp` what is written to it is forgotten at the
    /// end; `,format=raw` or `,format=qcow2` says what it is, whatever its first bytes are; `,bps=20M`
    /// and `,iops=500` limit what the guest may do a second, `,bps=20M:100M` allows bursts of 100M
    #[arg(long = "disk", value_name = "FILE[,OPTION...]")]
    pub disks: Vec<Disk>,
    /// The network: `user`: the guest reaches what the host reaches, and the host at 10.0.2.2, without
    /// root; `isolated`: the guest reaches nobody, but its published ports can be reached; `switch=NAME`: as
    /// `user`, and machines on the same switch reach each other, also by name; `tap=NAME`: a TAP
    /// interface of the host's; or `none`
    #[arg(long, value_name = "NETWORK", default_value = "user")]
    pub net: NetChoice,
    /// Open a port of the host that leads to one of the guest; without ADDRESS on all of the
    /// host's (repeatable)
    #[arg(short, long, value_name = "[ADDRESS:]HOST:GUEST[/udp]")]
    pub publish: Vec<Forward>,
    /// The Unix socket that leads to the guest's sockets (vsock, CID 3), or `none`. A machine with a name has one in
    /// its directory, which `lodger exec`, `cp` and `ssh` use
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<VsockChoice>,
    /// A folder of the host that the guest has, too (repeatable). Images that Lodger builds mount it at GUEST; other
    /// guests with `mount -t virtiofs share0 DIR`, share1 for the second and so on. `:ro`: the guest can change nothing
    /// in it; `:uid=N,gid=N`: to whom in the guest your files belong, root if nothing is said
    #[arg(long = "share", value_name = "HOST:GUEST[:OPTION]")]
    pub shares: Vec<Share>,
    /// A further device (repeatable)
    #[arg(long = "device", value_name = "DEVICE", value_enum)]
    pub devices: Vec<DeviceChoice>,
    /// The processor that the guest sees
    #[arg(long, value_name = "MODEL", default_value = CpuModel::NAMES[0], value_parser = CpuModel::NAMES)]
    pub cpu: String,
    /// End when the guest resets the machine, with status 4, instead of rebooting it
    #[arg(long)]
    pub no_reboot: bool,
    #[command(flatten)]
    pub keeping: Keeping,
    /// When to start the machine again after it has ended: no, on-failure, on-failure:N (at most N times in
    /// a row) or always. One that is stopped by `lodger stop` stays so
    #[arg(long, value_name = "POLICY", default_value = "no")]
    pub restart: Restart,
    /// At the end, tell what the engine did: translations, exits by cause, instructions left to the interpreter
    #[arg(long)]
    pub stats: bool,
}

/// How the program of an image from a registry is run.
#[derive(Debug, Args)]
pub struct ContainerArgs {
    /// Set a variable in its environment; without VALUE as it is here (repeatable)
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Its working directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// The program, in place of the image's entry point; empty: only the command counts
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// What the machine calls itself, also with cloud-init [default: the name of the machine]
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<lodger_store::Name>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineChoice {
    /// kvm if this host has it and it can run stock systems, otherwise dbt
    Auto,
    /// The host processor's virtualization, through /dev/kvm
    Kvm,
    /// The interpreter: works everywhere, slowly
    Interp,
    /// The binary translator: fast without the processor's virtualization; needs AVX2 and BMI2
    Dbt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// Port 0xf4: writing v ends the run with status 2v+1
    DebugExit,
    /// A virtio console (hvc0), which then gets what is typed
    VirtioConsole,
}

/// A network, as on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetChoice {
    /// The host's sockets, and the host itself at 10.0.2.2.
    User,
    /// Published ports only.
    Isolated,
    /// No network.
    None,
    /// A TAP interface.
    Tap(String),
    /// A switch.
    Switch(lodger_store::Name),
}

impl FromStr for NetChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<NetChoice, String> {
        match text.split_once('=') {
            None if text == "user" => Ok(NetChoice::User),
            None if text == "isolated" => Ok(NetChoice::Isolated),
            None if text == "none" => Ok(NetChoice::None),
            Some(("tap", name)) if !name.is_empty() => Ok(NetChoice::Tap(name.into())),
            Some(("switch", name)) => Ok(NetChoice::Switch(
                name.parse().map_err(|error| format!("{error}"))?,
            )),
            _ => Err("networks are user, isolated, none, switch=NAME and tap=NAME".into()),
        }
    }
}

/// Sockets between guest and host, as on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VsockChoice {
    /// No such device.
    None,
    /// Reached through this Unix socket.
    At(PathBuf),
}

impl FromStr for VsockChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<VsockChoice, String> {
        match text {
            "" => Err("the path is missing".into()),
            "none" => Ok(VsockChoice::None),
            path => Ok(VsockChoice::At(path.into())),
        }
    }
}

/// A disk, as on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk(pub BlkSpec);

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Disk, String> {
        let mut disk = BlkSpec::new("", false);
        let mut path = text;
        // From the end, because a file's name may have commas.
        while let Some((rest, option)) = path.rsplit_once(',') {
            match option.split_once('=') {
                None if option == "ro" => disk.read_only = true,
                None if option == "temp" => disk.temporary = true,
                Some(("format", format)) => disk.format = Some(format.parse()?),
                Some(("bps", rate)) => disk.limits.bytes = Some(parse_rate(rate)?),
                Some(("iops", rate)) => disk.limits.operations = Some(parse_rate(rate)?),
                _ => break,
            }
            path = rest;
        }
        if path.is_empty() {
            return Err("the file is missing".into());
        }
        if disk.read_only && disk.temporary {
            return Err("a disk is either read-only (ro) or forgotten at the end (temp)".into());
        }
        disk.path = path.into();
        Ok(Disk(disk))
    }
}

/// How much a second, and perhaps how much at once; otherwise as much as in a second.
fn parse_rate(text: &str) -> Result<Rate, String> {
    let number = |text: &str| {
        let digits = text.trim_end_matches(['K', 'M', 'G']);
        let unit = match &text[digits.len()..] {
            "" => 1_u64,
            "K" => 1 << 10,
            "M" => 1 << 20,
            "G" => 1 << 30,
            _ => 0,
        };
        let number = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
        (number.filter(|&n| n > 0 && digits.bytes().all(|b| b.is_ascii_digit())))
            .ok_or_else(|| format!("'{text}' is not a rate; rates are like 500, 20M or 20M:100M"))
    };
    let (rate, burst) = text.split_once(':').unwrap_or((text, text));
    Ok(Rate {
        per_second: number(rate)?,
        burst: number(burst)?,
    })
}

/// Bytes, rounded down to whole pages.
pub fn parse_size(text: &str) -> Result<u64, String> {
    const PAGE: f64 = 4096.0;
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number = digits.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let number: f64 = match digits.parse() {
        Ok(parsed) if number => parsed,
        _ => return Err("not a size; sizes are like 512M or 1.5G".into()),
    };
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "K" | "KB" | "KIB" => 10,
        "" | "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        other => return Err(format!("unknown unit '{other}'; K, M, G and T are known")),
    };
    let pages = number * (1u64 << unit) as f64 / PAGE;
    match pages < (1u64 << 50) as f64 {
        true => Ok(pages as u64 * PAGE as u64),
        false => Err("more than any machine has".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes() {
        let cases = [
            ("512M", Some(DEFAULT_MEMORY)),
            ("512", Some(512 << 20)),
            ("1.5G", Some(1536 << 20)),
            ("1.5g", Some(1536 << 20)),
            ("2048K", Some(2 << 20)),
            ("1GiB", Some(1 << 30)),
            ("0.3M", Some(311_296)),
            ("0", Some(0)),
            ("", None),
            ("M", None),
            ("-1G", None),
            ("1e3M", None),
            ("1X", None),
            ("infG", None),
            ("1.2.3G", None),
            ("99999999999T", None),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text).ok(), bytes, "{text:?}");
        }
    }

    #[test]
    fn disks() {
        let disk = |text: &str| {
            let disk = text.parse::<Disk>().ok()?.0;
            let format = disk.format.map(|f| f.to_string()).unwrap_or_default();
            let path = disk.path.display();
            Some(format!(
                "{path} {} {} {format}",
                disk.read_only, disk.temporary
            ))
        };
        for (text, expected) in [
            ("a.img", Some("a.img false false ")),
            ("a,b.img,ro", Some("a,b.img true false ")),
            ("a.img,temp", Some("a.img false true ")),
            ("a,format=raw", Some("a false false raw")),
            ("a,ro,format=qcow2", Some("a true false qcow2")),
            ("a,format=qcow2,temp", Some("a false true qcow2")),
            ("a,format=vmdk", None),
            ("a,ro,temp", None),
            ("", None),
            (",ro", None),
        ] {
            assert_eq!(disk(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn disk_limits() {
        let limits = |text: &str| {
            let limits = text.parse::<Disk>().ok()?.0.limits;
            let pair = |rate: Option<Rate>| rate.map_or((0, 0), |r| (r.per_second, r.burst));
            Some((pair(limits.bytes), pair(limits.operations)))
        };
        for (text, expected) in [
            ("a", Some(((0, 0), (0, 0)))),
            ("a,bps=20M", Some(((20 << 20, 20 << 20), (0, 0)))),
            ("a,iops=500:2K,ro", Some(((0, 0), (500, 2048)))),
            ("a,bps=1G:4G,iops=7", Some(((1 << 30, 4 << 30), (7, 7)))),
            ("a,bps=0", None),
            ("a,bps=1:0", None),
            ("a,iops=", None),
            ("a,iops=-5", None),
            ("a,bps=5MM", None),
            ("a,bps=99999999999999999999", None),
        ] {
            assert_eq!(limits(text), expected, "{text}");
        }
    }

    #[test]
    fn usage_errors() {
        let parses = |args: &str| {
            let args = ["lodger"].into_iter().chain(args.split_whitespace());
            Cli::try_parse_from(args).is_ok()
        };
        for good in [
            "run",
            "run mini -m 1G -c 4",
            "run -m 1G,max=4G",
            "set web --memory 1G,max=2G",
            "run --kernel k --initrd i --append -x --disk a --disk b,ro --device debug-exit",
            "run --append quiet -v -q --no-reboot --engine interp --cpu v3",
            "run --net none",
            "run --vsock none",
            "run --vsock /run/vm.sock",
            "run --net tap=tap0",
            "run --net switch=lan",
            "run --net isolated -p 80:80",
            "run -p 8080:80 --publish 127.0.0.1:5353:53/udp --net user",
            "run --share .:/srv --share /data:/data:ro",
            "run alpine sh -c ls -m 5",
            "run -m 1G alpine -- -x",
            "run alpine -m 1G -e A=B --env C -w /srv --entrypoint x --hostname h y -z",
            "image list",
            "image ls",
            "image pull nginx --size 2G",
            "image rm nginx mini",
            "image prune",
            "image inspect mini nginx",
            "image import a.qcow2 --name a --size 20G --append x --kernel k --initrd i",
            "run --cloud-init a,b,c --hostname h x",
            "run --user me --ssh-key a --ssh-key b x",
            "image build",
            "image build debian:trixie --size 4G --package git --package gcc --user me --ssh-key k",
            "image remove mini",
            "exec web sh",
            "exec -it web sh -c -x --help -v",
            "exec -i -t -e A=1 -e B -w / -u me:us web -- ls -l",
            "cp a web:/b",
            "cp -L web:/a -",
            "ssh web",
            "ssh me@web -L 1:a:2 -v uptime -p",
            "agent",
            "agent file",
            "disk create a 10G",
            "disk create a --backing b --backing-format raw",
            "disk info a --json",
            "disk convert a b --to raw --format qcow2",
            "disk check a --repair",
            "disk resize a +1G",
            "doctor",
        ] {
            assert!(parses(good), "{good}");
        }
        for bad in [
            "",
            "run mini --kernel k",
            "run --hostname a/b alpine",
            "image pull",
            "run --initrd i",
            "run --engine qemu",
            "run --device toaster",
            "run --cpus x",
            "run --cpus 0",
            "run --cpus -1",
            "run --net tap",
            "run --net tap=",
            "run --net switch",
            "run --net switch=",
            "run --net switch=../x",
            "run --vsock=",
            "run --net bridge=br0",
            "run -p 80",
            "run --share .",
            "image remove",
            "exec",
            "exec web",
            "exec --fly web sh",
            "cp a",
            "ssh",
            "disk create a",
            "disk create a 10X",
            "disk convert a",
            "disk resize a",
            "fly",
        ] {
            assert!(!parses(bad), "{bad}");
        }
    }
}
