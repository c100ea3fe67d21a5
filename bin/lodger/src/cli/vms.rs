//! The arguments of the commands about VMs that have a name.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use lodger_store::Name;

use super::{EngineChoice, Memory};
use crate::spec::Restart;

/// Whether and how a VM is kept; of `lodger run`.
#[derive(Debug, Args)]
pub struct Keeping {
    /// Run in the background: return when the machine has started, and print its name
    #[arg(short, long)]
    pub detach: bool,
    /// Give the machine a name, under which it is kept with a root disk of its own until `lodger rm`
    #[arg(long)]
    pub name: Option<Name>,
    /// Write something on the machine, for `lodger ps --label` (repeatable)
    #[arg(short, long = "label", value_name = "KEY[=VALUE]")]
    pub labels: Vec<Label>,
    /// Remove the machine when it has ended
    #[arg(long = "rm", conflicts_with = "restart")]
    pub remove: bool,
    /// Remove a machine that has this name already, running or not
    #[arg(long, requires = "name")]
    pub replace: bool,
}

impl Keeping {
    /// Whether the VM gets a directory.
    pub fn is_kept(&self) -> bool {
        self.detach || self.name.is_some() || !self.labels.is_empty()
    }
}

/// A label, as on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// What is before the `=`.
    pub key: String,
    /// What is behind it.
    pub value: Option<String>,
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Label, String> {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (text, None),
        };
        match key {
            "" => Err("labels are KEY or KEY=VALUE".into()),
            key => Ok(Label {
                key: key.into(),
                value,
            }),
        }
    }
}

/// Some VMs.
#[derive(Debug, Args)]
pub struct Vms {
    /// Names, or beginnings of ids
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<String>,
}

/// `lodger ps`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lodger ps                  those that run
  lodger ps --all            all that there are
  lodger ps -q               their names, a line each
  lodger ps --label role=db --json")]
pub struct PsArgs {
    /// Also those that do not run
    #[arg(short, long)]
    pub all: bool,
    /// Print a JSON array
    #[arg(long)]
    pub json: bool,
    /// Only those with this label (repeatable: with all of them)
    #[arg(short, long = "label", value_name = "KEY[=VALUE]")]
    pub labels: Vec<Label>,
}

/// `lodger start`.
#[derive(Debug, Args)]
pub struct StartArgs {
    #[command(flatten)]
    pub vms: Vms,
    /// Connect this terminal to the console, as `lodger console` does; for one machine
    #[arg(short, long)]
    pub attach: bool,
}

/// `lodger stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    #[command(flatten)]
    pub vms: Vms,
    /// Seconds that a guest has to power off
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    pub time: u32,
}

/// `lodger set`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lodger stop web && lodger set web --memory 2G --cpus 4 && lodger start web
  lodger set web --memory 512M                 while it runs
  lodger set web --restart always --label role=front")]
pub struct SetArgs {
    /// Name, or beginning of an id
    #[arg(value_name = "VM")]
    pub vm: String,
    /// RAM, as of `lodger run`. Of a machine that runs: how much of it the guest is to do with until the machine ends
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<Memory>,
    /// Number of virtual CPUs
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpus: Option<u32>,
    /// What runs the virtual CPUs
    #[arg(long, value_enum)]
    pub engine: Option<EngineChoice>,
    /// When to start the machine again after it has ended
    #[arg(long, value_name = "POLICY")]
    pub restart: Option<Restart>,
    /// Write something on the machine (repeatable)
    #[arg(short, long = "label", value_name = "KEY[=VALUE]")]
    pub labels: Vec<Label>,
}

/// `lodger rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    #[command(flatten)]
    pub vms: Vms,
    /// End those that run, and do not complain about those that do not exist
    #[arg(short, long)]
    pub force: bool,
}

/// `lodger logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Name, or beginning of an id
    #[arg(value_name = "VM")]
    pub vm: String,
    /// Go on until the machine ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last N lines
    #[arg(short = 'n', long, value_name = "N")]
    pub tail: Option<usize>,
    /// What Lodger says about the machine, instead of what its guest prints
    #[arg(long)]
    pub monitor: bool,
}

/// `lodger console`.
#[derive(Debug, Args)]
#[command(after_help = "\
The escape key is Ctrl-A:
    Ctrl-A d         leave; the machine runs on
    Ctrl-A s         type this terminal's size into the guest's shell, as an stty command
    Ctrl-A Ctrl-A    send Ctrl-A to the guest
    Ctrl-A h         help
Several terminals may be connected at once: all show what the guest prints, the guest gets what is
typed at any of them. If standard input or output is not a terminal, bytes pass unchanged.")]
pub struct ConsoleArgs {
    /// Name, or beginning of an id
    #[arg(value_name = "VM")]
    pub vm: String,
}

/// A description and which of its VMs.
#[derive(Debug, Args)]
pub struct FileArgs {
    /// The description
    #[arg(short, long, value_name = "FILE", default_value = "lodger.toml")]
    pub file: PathBuf,
    /// Only these virtual machines of it
    #[arg(value_name = "VM")]
    pub vms: Vec<String>,
}

/// `lodger up`.
#[derive(Debug, Args)]
#[command(after_help = "\
The file has a table for each machine, with the long options of `lodger run` and the image:

    [vm.web]
    image = \"debian\"
    memory = \"1G\"
    cpus = 2
    publish = [\"8080:80\"]
    restart = \"on-failure\"
    label = { role = \"front\" }

    [vm.db]
    image = \"debian\"
    disk = [\"data.img\"]

Files are looked for beside it. Machines that exist are started again with their disks,
and with what has changed in the file; those that run are left alone.")]
pub struct UpArgs {
    #[command(flatten)]
    pub file: FileArgs,
}

/// `lodger down`.
#[derive(Debug, Args)]
pub struct DownArgs {
    #[command(flatten)]
    pub file: FileArgs,
    /// Seconds that a guest has to power off
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    pub time: u32,
    /// Remove the machines and their disks, too
    #[arg(long = "rm")]
    pub remove: bool,
}

/// `lodger man`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  lodger man run | man -l -
  lodger man --dir ~/.local/share/man/man1")]
pub struct ManArgs {
    /// The command whose page is printed, that of lodger itself if there is none
    pub command: Vec<String>,
    /// Write the pages of all commands there instead
    #[arg(long, conflicts_with = "command")]
    pub dir: Option<PathBuf>,
}
