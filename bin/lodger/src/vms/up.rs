//! `lodger up` and `lodger down`: the VMs that a file describes.
//!
//! A table `[vm.NAME]` of the file holds options of `lodger run` by their long names, and `image`; it is turned into a
//! command line and read as one, so the file knows exactly what `lodger run` knows. Two labels tell which VMs belong to which
//! file, and what they were made from.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use lodger_store::{Store, Vm};
use serde::Deserialize;

use super::{named, start_one, stop, write_down};
use crate::cli::{Cli, Command, DownArgs, FileArgs, Label, RunArgs, UpArgs};
use crate::status::Error;
use crate::{messages, monitor, run};

/// The label that names the file.
const FILE: &str = "lodger.file";
/// The label with the options.
const OPTIONS: &str = "lodger.options";
/// Options that a file cannot have, because `lodger up` decides about them.
const OURS: [&str; 6] = ["name", "detach", "rm", "replace", "verbose", "quiet"];

/// A description.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    /// VMs by name, in the order of the file.
    vm: toml::Table,
}

/// A VM of the file.
struct Described {
    name: String,
    /// The options, a command line's words.
    options: Vec<String>,
}

/// The file, and its VMs.
struct Plan {
    path: PathBuf,
    vms: Vec<Described>,
}

impl Plan {
    fn read(args: &FileArgs) -> Result<Plan, Error> {
        let wrong = |path: &Path, what: String| Error::File {
            path: path.into(),
            what,
        };
        let path = args.file.canonicalize().map_err(|error| {
            let what = format!("{error}; `lodger up --help` shows what it is like");
            wrong(&args.file, what)
        })?;
        let text = std::fs::read_to_string(&path);
        let text = text.map_err(|error| wrong(&path, error.to_string()))?;
        let description: Description =
            toml::from_str(&text).map_err(|error| wrong(&path, error.to_string()))?;
        let mut vms = Vec::new();
        for (name, value) in description.vm {
            let options =
                options(&value).map_err(|what| wrong(&path, format!("[vm.{name}]: {what}")))?;
            vms.push(Described { name, options });
        }
        let has = |name: &String| vms.iter().any(|vm| vm.name == *name);
        if let Some(stranger) = args.vms.iter().find(|name| !has(name)) {
            return Err(wrong(&path, format!("there is no [vm.{stranger}]")));
        }
        vms.retain(|vm| args.vms.is_empty() || args.vms.contains(&vm.name));
        Ok(Plan { path, vms })
    }

    fn file(&self) -> String {
        self.path.to_string_lossy().into_owned()
    }

    /// The options, read as `lodger run` does.
    fn run_args(&self, vm: &Described) -> Result<Box<RunArgs>, Error> {
        let words = ["lodger", "run", "--detach", "--name", &vm.name].map(String::from);
        let words = words.into_iter().chain(vm.options.iter().cloned());
        let wrong = |what: &str| Error::File {
            path: self.path.clone(),
            what: format!("[vm.{}]: {what}", vm.name),
        };
        let mut args = match Cli::try_parse_from(words) {
            Ok(Cli {
                command: Command::Run(args),
                ..
            }) => args,
            Ok(_) => return Err(wrong("not the options of a machine")),
            Err(error) => {
                let text = error.to_string();
                let text = text.split("\n\nUsage").next().unwrap_or(&text);
                return Err(wrong(text.trim_start_matches("error: ").trim_end()));
            }
        };
        let label = |key: &str, value: String| Label {
            key: key.into(),
            value: Some(value),
        };
        let labels = [
            label(FILE, self.file()),
            label(OPTIONS, vm.options.join(" ")),
        ];
        args.keeping.labels.extend(labels);
        Ok(args)
    }

    /// Whether the VM belongs to this file.
    fn owns(&self, vm: &Vm) -> bool {
        vm.record.labels.get(FILE) == Some(&self.file())
    }
}

/// A VM's table as a command line.
fn options(value: &toml::Value) -> Result<Vec<String>, String> {
    let toml::Value::Table(table) = value else {
        return Err("not a table of options".into());
    };
    let mut words = Vec::new();
    let (mut image, mut command) = (None, Vec::new());
    for (key, value) in table {
        match (key.as_str(), value) {
            (key, _) if OURS.contains(&key) => {
                return Err(format!("{key}: not an option here"));
            }
            ("image", toml::Value::String(name)) => image = Some(name.clone()),
            ("command", toml::Value::Array(values)) => {
                for value in values {
                    command.push(scalar(key, value)?);
                }
            }
            (_, toml::Value::Boolean(true)) => words.push(format!("--{key}")),
            (_, toml::Value::Boolean(false)) => {}
            (_, toml::Value::Array(values)) => {
                for value in values {
                    words.push(format!("--{key}={}", scalar(key, value)?));
                }
            }
            (_, toml::Value::Table(pairs)) => {
                for (name, value) in pairs {
                    words.push(format!("--{key}={name}={}", scalar(key, value)?));
                }
            }
            (_, value) => words.push(format!("--{key}={}", scalar(key, value)?)),
        }
    }
    // Behind all options, so that it cannot be one.
    words.extend(image.into_iter().flat_map(|image| ["--".into(), image]));
    words.append(&mut command);
    Ok(words)
}

fn scalar(key: &str, value: &toml::Value) -> Result<String, String> {
    match value {
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        _ => Err(format!("{key}: neither text nor a number")),
    }
}

/// `lodger up`.
pub fn up(args: &UpArgs, verbose: u8, quiet: bool) -> Result<ExitCode, Error> {
    let plan = Plan::read(&args.file)?;
    // All are read before the first is started.
    let vms = plan.vms.iter().map(|vm| plan.run_args(vm));
    let vms = vms.collect::<Result<Vec<_>, _>>()?;
    // Files that it names are beside it.
    if let Some(dir) = plan.path.parent() {
        std::env::set_current_dir(dir).map_err(|error| Error::File {
            path: dir.into(),
            what: error.to_string(),
        })?;
    }
    let store = Store::open()?;
    let mut status = 0;
    for args in &vms {
        if let Err(error) = up_one(&plan, &store, args, verbose, quiet) {
            messages::error(&error);
            status = error.status().max(status);
        }
    }
    Ok(ExitCode::from(status))
}

fn up_one(
    plan: &Plan,
    store: &Store,
    args: &RunArgs,
    verbose: u8,
    quiet: bool,
) -> Result<(), Error> {
    let name = args.keeping.name.as_ref();
    let Some(vm) = name
        .map(|name| store.find_name(name))
        .transpose()?
        .flatten()
    else {
        return run::run(args, verbose, quiet).map(drop);
    };
    if !plan.owns(&vm) {
        let what = format!("there is a VM of this name that is not of {}", plan.file());
        return Err(named(&vm.name, what));
    }
    let options = args
        .keeping
        .labels
        .iter()
        .find(|label| label.key == OPTIONS);
    let same = vm.record.labels.get(OPTIONS) == options.and_then(|label| label.value.as_ref());
    match (vm.is_alive(), same) {
        (true, true) if quiet => Ok(()),
        (true, true) => {
            messages::say(format_args!("{}: runs already", vm.name));
            Ok(())
        }
        (true, false) => {
            let what = "it runs with other options than the file's; `lodger down` and `lodger up` apply them";
            Err(named(&vm.name, what))
        }
        (false, true) => start_one(store, &vm.name, verbose),
        (false, false) => start_changed(store, &vm, args, verbose, quiet),
    }
}

/// Starts a stopped VM with other options than before. It keeps its disk.
fn start_changed(
    store: &Store,
    vm: &Vm,
    args: &RunArgs,
    verbose: u8,
    quiet: bool,
) -> Result<(), Error> {
    let mut spec = run::vm_spec(args)?;
    let mut claim = store.claim(&vm.name)?;
    if run::boots(args) != vm.record.image {
        let what = format!(
            "it was made from {}; `lodger rm {}` removes it with its disk, for a new one",
            vm.record.image, vm.name
        );
        return Err(named(&vm.name, what));
    }
    run::add_image(&mut spec, args, Some(claim.dir()), quiet)?;
    write_down(&mut claim, args, &spec)?;
    monitor::start_detached(&claim, verbose)?;
    messages::answer(format_args!("{}\n", vm.name))
}

/// `lodger down`.
pub fn down(args: &DownArgs, quiet: bool) -> Result<ExitCode, Error> {
    let plan = Plan::read(&args.file)?;
    let store = Store::open()?;
    let mut vms = store.list()?;
    let wanted = |vm: &Vm| {
        args.file.vms.is_empty() || plan.vms.iter().any(|one| one.name == vm.name.as_str())
    };
    vms.retain(|vm| plan.owns(vm) && wanted(vm));
    let stop = |vm: &Vm| {
        if vm.is_alive() {
            stop::stop_one(&store, &vm.record.id, args.time, quiet)?;
        }
        if args.remove {
            stop::remove_one(&store, &vm.record.id, false)?;
        }
        messages::answer(format_args!("{}\n", vm.name))
    };
    // All at once: each may take its time.
    let results: Vec<_> = std::thread::scope(|scope| {
        let stopping: Vec<_> = vms.iter().map(|vm| scope.spawn(|| stop(vm))).collect();
        let ends = stopping.into_iter().map(|one| one.join());
        ends.collect()
    });
    let mut status = 0;
    for result in results {
        match result {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                messages::error(&error);
                status = error.status().max(status);
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    Ok(ExitCode::from(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_become_command_lines() {
        let words = |text: &str| {
            let table: toml::Table = text.parse().unwrap();
            options(&toml::Value::Table(table)).map(|words| words.join(" "))
        };
        for (text, expected) in [
            ("image = 'debian'\ncpus = 2", "--cpus=2 -- debian"),
            (
                "publish = ['80:80', '81:81']\nlabel = { role = 'db' }",
                "--publish=80:80 --publish=81:81 --label=role=db",
            ),
            ("no-reboot = true\nstats = false", "--no-reboot"),
            ("append = '-x y'", "--append=-x y"),
            (
                "command = ['ls', '-l']\nimage = 'alpine'\nenv = { A = 'b' }",
                "--env=A=b -- alpine ls -l",
            ),
        ] {
            assert_eq!(words(text).as_deref(), Ok(expected));
        }
        for bad in [
            "name = 'x'",
            "detach = true",
            "cpus = 1979-05-27",
            "disk = [['x']]",
        ] {
            assert!(words(bad).is_err(), "{bad}");
        }
    }
}
