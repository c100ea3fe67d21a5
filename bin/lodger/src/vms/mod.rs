//! The commands about VMs that have a name. What they know they read from the VMs' directories (`control/store`); what they
//! want they ask of the monitors (`control/api`).

mod console;
mod files;
mod list;
mod logs;
mod set;
mod stop;
mod up;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use lodger_control::{Answer, Client, ClientError, Request};
use lodger_store::{Claim, Name, Record, State, Store, StoreError, Vm};

pub use console::console;
pub use files::{VSOCK, absolute, keep, make_absolute, resolve, root_disk};
pub use list::{inspect, ps};
pub use logs::logs;
pub use set::{rename, set};
pub use stop::{kill, pause, remove, restart, stop, wait};
pub use up::{down, up};

use crate::cli::{ConsoleArgs, Keeping, RunArgs, StartArgs, Vms};
use crate::messages;
use crate::monitor;
use crate::run;
use crate::spec::VmSpec;
use crate::status::{self, Error};

/// How long a monitor may take to listen once it owns its VM.
const SOON: Duration = Duration::from_secs(10);

/// Takes the name for a new VM. One whose monitor has died does not stand in the way: it goes, or gets another name if it
/// has something to lose.
pub fn claim_new(keeping: &Keeping) -> Result<Claim, Error> {
    let store = Store::open()?;
    let Some(name) = &keeping.name else {
        return Ok(store.claim_any()?);
    };
    if keeping.replace && store.find_name(name)?.is_some() {
        stop::remove_one(&store, name.as_str(), true)?;
    }
    let claim = store.claim(name)?;
    if claim.record().is_none() {
        return Ok(claim);
    }
    let exists = || Error::Named {
        name: name.to_string(),
        what: format!(
            "there is a VM of this name, which does not run; `lodger start {name}` starts it again, \
            `lodger rm {name}` removes it, `lodger run --replace` does that, too"
        ),
    };
    if !claim.is_dead() {
        return Err(exists());
    }
    if files::has_disk(claim.dir()) {
        let aside = claim.set_aside()?;
        tracing::warn!(
            "the earlier {name} died with its monitor; it is kept as {aside} (lodger start {aside}, lodger rm {aside})"
        );
    } else {
        claim.remove()?;
    }
    let claim = store.claim(name)?;
    match claim.record() {
        None => Ok(claim),
        // Another one has been faster, and has ended since.
        Some(_) => Err(exists()),
    }
}

/// Makes the claim a VM.
pub fn write_down(claim: &mut Claim, args: &RunArgs, spec: &VmSpec) -> Result<(), Error> {
    let cannot = |source: std::io::Error| Error::Host {
        what: "cannot write down what the VM is",
        source,
    };
    let value = serde_json::to_value(spec).map_err(|error| cannot(error.into()))?;
    let mut record = match claim.record() {
        // The VM is the same, with other options.
        Some(before) => Record {
            spec: value,
            ..before.clone()
        },
        None => Record::new(run::boots(args), value).map_err(cannot)?,
    };
    let labels = args.keeping.labels.iter().cloned();
    record.labels = labels
        .map(|label| (label.key, label.value.unwrap_or_default()))
        .collect();
    record.remove = args.keeping.remove;
    Ok(claim.set_record(record)?)
}

/// `lodger start`.
pub fn start(args: &StartArgs, verbose: u8, quiet: bool) -> Result<ExitCode, Error> {
    let Vms { vms } = &args.vms;
    if args.attach && vms.len() > 1 {
        let text = "--attach: a terminal shows one machine at a time";
        return Err(Error::Usage(text.into()));
    }
    let started = each(&args.vms, |store, text| {
        let vm = store.find(text)?;
        start_one(store, &vm.name, verbose)
    })?;
    match vms.first() {
        Some(vm) if args.attach && started == ExitCode::SUCCESS => {
            console(&ConsoleArgs { vm: vm.clone() }, quiet)
        }
        _ => Ok(started),
    }
}

fn start_one(store: &Store, name: &Name, verbose: u8) -> Result<(), Error> {
    let claim = store.claim(name)?;
    if claim.record().is_none() {
        let name = claim.name().to_string();
        // What claiming it has made.
        claim.remove()?;
        return Err(StoreError::Unknown(name).into());
    }
    monitor::start_detached(&claim, verbose)?;
    messages::answer(format_args!("{name}\n"))
}

/// Does it for one VM after the other. Failures are told, and the others done nevertheless.
fn each(
    vms: &Vms,
    mut act: impl FnMut(&Store, &str) -> Result<(), Error>,
) -> Result<ExitCode, Error> {
    let store = Store::open()?;
    let mut status = 0;
    for text in &vms.vms {
        if let Err(error) = act(&store, text) {
            messages::error(&error);
            status = error.status().max(status);
        }
    }
    Ok(ExitCode::from(status))
}

/// A connection to the VM's monitor.
fn connect(store: &Store, text: &str) -> Result<(Vm, Client), Error> {
    let deadline = Instant::now() + SOON;
    loop {
        let vm = store.find(text)?;
        let not_now = match vm.state {
            State::Running => match dial(&vm) {
                Ok(client) => return Ok((vm, client)),
                Err(error) => named(&vm.name, error),
            },
            // It will say in a moment where it listens.
            State::Starting => named(&vm.name, "it is about to start"),
            _ => return Err(named(&vm.name, "it does not run")),
        };
        if Instant::now() >= deadline || vm.state == State::Running && !store.find(text)?.is_alive()
        {
            return Err(not_now);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Connects to the VM's monitor, at whichever of its sockets is there.
fn dial(vm: &Vm) -> Result<Client, ClientError> {
    let mut result = Err(ClientError::Gone);
    for socket in vm.sockets() {
        result = Client::connect(&socket);
        if result.is_ok() {
            break;
        }
    }
    result
}

/// Asks the VM's monitor.
pub fn ask(store: &Store, text: &str, request: &Request) -> Result<(Name, Answer), Error> {
    let (vm, mut client) = connect(store, text)?;
    match client.ask(request) {
        Ok(answer) => Ok((vm.name, answer)),
        Err(error) => Err(refused(&vm.name, error)),
    }
}

fn refused(name: &Name, error: ClientError) -> Error {
    named(name, error)
}

fn named(name: &Name, what: impl ToString) -> Error {
    Error::Named {
        name: name.to_string(),
        what: what.to_string(),
    }
}

/// An exit status in words.
fn ended(status: u8) -> String {
    match status::signal_of(status) {
        Some(_) if status == status::KILLED => "killed".into(),
        _ => format!("exited ({status})"),
    }
}
