//! `lodger ps` and `lodger inspect`.

use std::process::ExitCode;

use lodger_board::MachineSpec;
use lodger_control::{Answer, Phase, Request, Status};
use lodger_store::{State, Store, Vm};
use lodger_virtio_devices::NetworkSpec;
use serde_json::{Value, json};

use super::{ask, dial, ended};
use crate::cli::{Label, PsArgs, Vms};
use crate::messages;
use crate::spec::VmSpec;
use crate::status::Error;

/// A VM, and what its monitor says.
struct Seen {
    vm: Vm,
    status: Option<Status>,
    spec: Option<VmSpec>,
}

impl Seen {
    fn look(vm: Vm) -> Seen {
        let running = Some(&vm).filter(|vm| vm.state == State::Running);
        let status = running.and_then(|vm| {
            let mut client = dial(vm).ok()?;
            match client.ask(&Request::Status).ok()? {
                Answer::Status(status) => Some(status),
                _ => None,
            }
        });
        Seen {
            spec: serde_json::from_value(vm.record.spec.clone()).ok(),
            status,
            vm,
        }
    }

    /// One word.
    fn state(&self) -> &'static str {
        match (
            self.vm.state,
            self.status.as_ref().map(|status| status.phase),
        ) {
            (State::Created, _) => "created",
            (State::Starting, _) | (_, Some(Phase::Starting)) => "starting",
            (State::Running, Some(Phase::Paused)) => "paused",
            (State::Running, Some(Phase::Stopping | Phase::Ended)) => "stopping",
            (State::Running, Some(Phase::Restarting)) => "restarting",
            (State::Running, _) => "running",
            (State::Exited, _) => "exited",
            (State::Dead, _) => "dead",
        }
    }

    fn machine(&self) -> Option<&MachineSpec> {
        Some(&self.spec.as_ref()?.machine)
    }

    fn ports(&self) -> Vec<String> {
        let nets = self.machine().map(|machine| &machine.virtio.nets[..]);
        let publish = nets
            .unwrap_or_default()
            .iter()
            .filter_map(|net| match &net.network {
                NetworkSpec::User(user) => Some(&user.publish),
                _ => None,
            });
        publish.flatten().map(ToString::to_string).collect()
    }

    fn json(&self) -> Value {
        let Vm {
            name,
            dir,
            record,
            life,
            ..
        } = &self.vm;
        let alive = life.as_ref().filter(|_| self.vm.is_alive());
        let ending = life.as_ref().and_then(|life| life.ending.as_ref());
        json!({
            "name": name.as_str(),
            "id": record.id,
            "image": record.image,
            "state": self.state(),
            "labels": record.labels,
            "created": record.created,
            "started": life.as_ref().map(|life| life.started),
            "ended": ending.map(|ending| ending.time),
            "status": ending.map(|ending| ending.status),
            "reason": ending.map(|ending| &ending.reason),
            "restarts": life.as_ref().map_or(0, |life| life.restarts),
            "engine": life.as_ref().map(|life| &life.engine),
            "pid": alive.map(|life| life.pid),
            "socket": alive.map(|life| &life.socket),
            "memory": self.machine().map(start_memory),
            "max_memory": self.machine().map(|machine| machine.memory),
            "cpus": self.machine().map(|machine| machine.vcpus),
            "ports": self.ports(),
            "directory": dir,
        })
    }
}

/// The RAM that a guest has at its start, in bytes.
fn start_memory(machine: &MachineSpec) -> u64 {
    let balloon = machine.virtio.balloon.as_ref();
    let start = balloon.and_then(|balloon| balloon.start);
    start.unwrap_or(machine.memory)
}

/// `lodger ps`.
pub fn ps(args: &PsArgs, names_only: bool) -> Result<ExitCode, Error> {
    let mut vms = Store::open()?.list()?;
    vms.retain(|vm| args.all || vm.is_alive());
    vms.retain(|vm| args.labels.iter().all(|label| has_label(vm, label)));
    if names_only {
        let names: String = vms.iter().map(|vm| format!("{}\n", vm.name)).collect();
        messages::answer(names)?;
        return Ok(ExitCode::SUCCESS);
    }
    let seen: Vec<_> = vms.into_iter().map(Seen::look).collect();
    messages::answer(match args.json {
        true => pretty(seen.iter().map(Seen::json).collect()),
        false => table(&seen),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// `lodger inspect`.
pub fn inspect(vms: &Vms) -> Result<ExitCode, Error> {
    let store = Store::open()?;
    let look = |text: &String| -> Result<Value, Error> {
        let seen = Seen::look(store.find(text)?);
        let mut json = seen.json();
        json["spec"] = seen.vm.record.spec.clone();
        // Of one that runs: what it has now.
        if seen.status.is_some()
            && let Ok((_, Answer::Memory(memory))) = ask(&store, text, &Request::Memory)
        {
            json["memory_now"] = json!(memory);
        }
        Ok(json)
    };
    let found: Result<Vec<_>, _> = vms.vms.iter().map(look).collect();
    messages::answer(pretty(found?))?;
    Ok(ExitCode::SUCCESS)
}

fn pretty(values: Vec<Value>) -> String {
    format!("{:#}\n", Value::Array(values))
}

fn has_label(vm: &Vm, label: &Label) -> bool {
    let value = vm.record.labels.get(&label.key);
    value.is_some_and(|value| label.value.as_ref().is_none_or(|wanted| wanted == value))
}

fn table(seen: &[Seen]) -> String {
    let now = std::time::UNIX_EPOCH
        .elapsed()
        .map_or(0, |time| time.as_secs());
    let ago = |then: u64| duration(now.saturating_sub(then));
    let head = ["NAME", "ID", "IMAGE", "STATUS", "CPUS", "MEMORY", "PORTS"];
    let mut rows = vec![head.map(String::from)];
    for one in seen {
        let life = one.vm.life.as_ref();
        let status = match (
            one.state(),
            life,
            life.and_then(|life| life.ending.as_ref()),
        ) {
            ("running", Some(life), _) => format!("running for {}", ago(life.started)),
            ("exited", _, Some(ending)) => {
                format!("{} {} ago", ended(ending.status), ago(ending.time))
            }
            (state, ..) => state.into(),
        };
        let machine = one.machine();
        rows.push([
            one.vm.name.to_string(),
            one.vm.record.id.clone(),
            one.vm.record.image.clone(),
            status,
            machine.map_or_else(String::new, |machine| machine.vcpus.to_string()),
            machine.map_or_else(String::new, |machine| {
                format!("{}M", start_memory(machine) >> 20)
            }),
            one.ports().join(", "),
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; 7] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let line = |row: &[String; 7]| {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        format!("{}\n", line.trim_end())
    };
    rows.iter().map(line).collect()
}

/// A length of time for people, rounded down.
fn duration(seconds: u64) -> String {
    let units = [
        (86400, "day"),
        (3600, "hour"),
        (60, "minute"),
        (1, "second"),
    ];
    let (unit, name) = units
        .into_iter()
        .find(|(unit, _)| seconds >= *unit)
        .unwrap_or((1, "second"));
    match seconds / unit {
        1 => format!("1 {name}"),
        n => format!("{n} {name}s"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn durations() {
        for (seconds, text) in [
            (0, "0 seconds"),
            (1, "1 second"),
            (119, "1 minute"),
            (7200, "2 hours"),
            (200_000, "2 days"),
        ] {
            assert_eq!(super::duration(seconds), text);
        }
    }
}
