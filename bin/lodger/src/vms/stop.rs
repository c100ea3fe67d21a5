//! The end of VMs: stop, kill, rm, wait; and pause.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use lodger_control::{Answer, Request, Stopped};
use lodger_store::{Name, Store, StoreError, Vm};
use rustix::process::{Pid, Signal, kill_process};

use super::{ask, each, named, start_one};
use crate::cli::{RmArgs, StopArgs, Vms};
use crate::messages;
use crate::status::Error;

/// How long a killed process may take to go.
const GOING: Duration = Duration::from_secs(10);

/// How long the lock of a monitor that has closed its socket may be seen.
const ENDING: Duration = Duration::from_secs(1);

/// `lodger stop`.
pub fn stop(args: &StopArgs, quiet: bool) -> Result<ExitCode, Error> {
    each(&args.vms, |store, text| {
        let vm = store.find(text)?;
        if vm.is_alive() {
            stop_one(store, text, args.time, quiet)?;
        }
        // What is stopped already is what was asked for.
        messages::answer(format_args!("{}\n", vm.name))
    })
}

/// `lodger restart`.
pub fn restart(args: &StopArgs, verbose: u8, quiet: bool) -> Result<ExitCode, Error> {
    each(&args.vms, |store, text| {
        let vm = store.find(text)?;
        if vm.is_alive() {
            stop_one(store, text, args.time, quiet)?;
        }
        start_one(store, &vm.name, verbose)
    })
}

/// Stops a running VM, and says what happened.
pub(super) fn stop_one(store: &Store, text: &str, seconds: u32, quiet: bool) -> Result<(), Error> {
    let begun = Instant::now();
    let vm = store.find(text)?;
    let name = &vm.name;
    let (how, ending) = match ask_to_the_end(store, &vm, &Request::Stop { seconds })? {
        Some(Answer::Stopped { how, ending }) => (how, ending),
        Some(_) => return Err(unexpected(name)),
        // It has ended meanwhile.
        None => return Ok(()),
    };
    if !quiet {
        let took = begun.elapsed().as_secs_f32();
        messages::say(match how {
            Stopped::ByGuest => format!("{name}: {}, after {took:.1} s", ending.reason),
            Stopped::TimedOut => format!(
                "{name}: the guest did not power off within {seconds} s of the power button; ended as if the power failed"
            ),
            Stopped::Deaf => format!(
                "{name}: the guest does not listen to the power button; ended after {seconds} s as if the power failed"
            ),
            Stopped::Killed => format!("{name}: ended by somebody else meanwhile"),
        });
    }
    Ok(())
}

/// `lodger kill`.
pub fn kill(vms: &Vms) -> Result<ExitCode, Error> {
    each(vms, |store, text| {
        let vm = store.find(text)?;
        if !vm.is_alive() {
            return Err(named(&vm.name, "it does not run"));
        }
        kill_one(store, &vm)?;
        messages::answer(format_args!("{}\n", vm.name))
    })
}

/// Ends a running VM: through its monitor, or if that does not answer together with it.
fn kill_one(store: &Store, vm: &Vm) -> Result<(), Error> {
    let Err(error) = ask_to_the_end(store, vm, &Request::Kill) else {
        return Ok(());
    };
    let now = store.find(&vm.record.id)?;
    let pid = now.life.as_ref().map(|life| life.pid.cast_signed());
    // Only who holds the lock has written this number.
    let pid = pid.and_then(Pid::from_raw).filter(|_| now.is_alive());
    let Some(pid) = pid else {
        return if now.is_alive() { Err(error) } else { Ok(()) };
    };
    tracing::warn!("{error}; killing its process");
    kill_process(pid, Signal::KILL).map_err(|error| named(&vm.name, error))?;
    let deadline = Instant::now() + GOING;
    while store.find(&vm.record.id)?.is_alive() {
        if Instant::now() >= deadline {
            return Err(named(&vm.name, "its process does not go"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// `lodger rm`.
pub fn remove(args: &RmArgs) -> Result<ExitCode, Error> {
    each(&args.vms, |store, text| {
        match remove_one(store, text, args.force) {
            Ok(name) => messages::answer(format_args!("{name}\n")),
            Err(Error::Store(StoreError::Unknown(_))) if args.force => Ok(()),
            Err(error) => Err(error),
        }
    })
}

/// Removes a VM, with `force` a running one, too.
pub(super) fn remove_one(store: &Store, text: &str, force: bool) -> Result<Name, Error> {
    let vm = store.find(text)?;
    if vm.is_alive() {
        if !force {
            let what =
                "it runs; `lodger stop` ends it, `lodger rm --force` removes it all the same";
            return Err(named(&vm.name, what));
        }
        kill_one(store, &vm)?;
    }
    let claim = store.claim(&vm.name)?;
    // One that is removed at its end may have gone already.
    claim.remove()?;
    Ok(vm.name)
}

/// `lodger wait`.
pub fn wait(vms: &Vms) -> Result<ExitCode, Error> {
    each(vms, |store, text| {
        let mut vm = store.find(text)?;
        let mut ended = None;
        if vm.is_alive() {
            match ask_to_the_end(store, &vm, &Request::Wait)? {
                Some(Answer::Ended(ending)) => ended = Some(ending),
                Some(_) => return Err(unexpected(&vm.name)),
                None => vm = store.find(&vm.record.id)?,
            }
        }
        let ending = match ended.or(vm.life.and_then(|life| life.ending)) {
            Some(ending) => ending,
            None => {
                return Err(named(
                    &vm.name,
                    "its monitor has died: its status is not known",
                ));
            }
        };
        messages::answer(format_args!("{}\n", ending.status))
    })
}

/// `lodger pause` and `lodger unpause`.
pub fn pause(vms: &Vms, pause: bool) -> Result<ExitCode, Error> {
    each(vms, |store, text| {
        let request = match pause {
            true => Request::Pause,
            false => Request::Resume,
        };
        let (name, _) = ask(store, text, &request)?;
        messages::answer(format_args!("{name}\n"))
    })
}

/// Asks for something that is answered at the end of the VM; `None`: the end came before the question.
fn ask_to_the_end(store: &Store, vm: &Vm, request: &Request) -> Result<Option<Answer>, Error> {
    let error = match ask(store, &vm.record.id, request) {
        Ok((_, answer)) => return Ok(Some(answer)),
        Err(error) => error,
    };
    let deadline = Instant::now() + ENDING;
    while store.find(&vm.record.id)?.is_alive() {
        if Instant::now() >= deadline {
            return Err(error);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(None)
}

fn unexpected(name: &Name) -> Error {
    named(name, "its monitor answered something else than was asked")
}
