//! `lodger set` and `lodger rename`: changes of a VM that does not run; and of the memory of one that does.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use lodger_control::{Answer, Request};
use lodger_store::{Claim, Name, Store, StoreError};

use super::{ask, named};
use crate::cli::{Memory, SetArgs};
use crate::status::Error;
use crate::{messages, monitor, registry};

/// A guest that has moved no page for so long does not any more.
const PATIENCE: Duration = Duration::from_secs(5);

/// Changes what the VM is started from, or its memory.
pub fn set(args: &SetArgs) -> Result<ExitCode, Error> {
    let SetArgs {
        vm: _,
        memory,
        cpus,
        engine,
        restart,
        labels,
    } = args;
    let some = [
        memory.is_some(),
        cpus.is_some(),
        engine.is_some(),
        restart.is_some(),
    ];
    if labels.is_empty() && !some.contains(&true) {
        let text = "nothing is to be set; `lodger set --help` tells what can be";
        return Err(Error::Usage(text.into()));
    }
    let others = labels.is_empty() && some.iter().filter(|some| **some).count() == 1;
    let store = Store::open()?;
    if let (Some(memory), true, true) = (memory, others, store.find(&args.vm)?.is_alive()) {
        return set_memory(&store, &args.vm, memory);
    }
    let mut claim = claim(&args.vm)?;
    let mut spec = monitor::spec_of(&claim)?;
    spec.engine = engine.unwrap_or(spec.engine);
    spec.restart = restart.unwrap_or(spec.restart);
    if let Some(memory) = memory {
        // Within what it may have it stays able to have that.
        let max = Some(spec.machine.memory).filter(|max| {
            let had = spec.machine.virtio.balloon.as_ref();
            had.is_some_and(|balloon| balloon.start.is_some()) && memory.size <= *max
        });
        let memory = Memory {
            max: memory.max.or(max),
            ..*memory
        };
        spec.machine.memory = memory.ram();
        spec.machine.virtio.balloon = Some(memory.balloon());
    }
    spec.machine.vcpus = cpus.unwrap_or(spec.machine.vcpus);
    // What it has of files is what it had.
    let mut hardware = spec.machine.clone();
    hardware.virtio.disks.clear();
    hardware.check(&*registry::choose(spec.engine)?.engine)?;
    let Some(mut record) = claim.record().cloned() else {
        return Err(StoreError::Unknown(args.vm.clone()).into());
    };
    let wrong = |error| named(claim.name(), format!("cannot be written down: {error}"));
    record.spec = serde_json::to_value(spec).map_err(wrong)?;
    let labels = labels
        .iter()
        .cloned()
        .map(|label| (label.key, label.value.unwrap_or_default()));
    record.labels.extend(labels);
    claim.set_record(record)?;
    messages::answer(format_args!("{}\n", claim.name()))?;
    Ok(ExitCode::SUCCESS)
}

/// Lets the guest of a VM that runs do with more or less memory; returns when it does.
fn set_memory(store: &Store, text: &str, memory: &Memory) -> Result<ExitCode, Error> {
    if memory.max.is_some() {
        let what = "`max=` is for the next start: stop the machine first";
        return Err(Error::Usage(what.into()));
    }
    let bytes = memory.size;
    let (name, _) = ask(store, text, &Request::SetMemory { bytes })?;
    let (mut last, mut since) = (None, Instant::now());
    loop {
        let Answer::Memory(now) = ask(store, text, &Request::Memory)?.1 else {
            return Err(named(&name, "it does not tell how much memory it has"));
        };
        if now.actual == now.asked {
            messages::answer(format_args!("{name}\n"))?;
            return Ok(ExitCode::SUCCESS);
        }
        if last != Some(now.actual) {
            (last, since) = (Some(now.actual), Instant::now());
        }
        if since.elapsed() > PATIENCE {
            let what = format!(
                "the guest does with {} MiB now, and not with {} MiB: it needs what it has",
                now.actual >> 20,
                now.asked >> 20
            );
            return Err(named(&name, what));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Gives the VM another name.
pub fn rename(vm: &str, name: &Name) -> Result<ExitCode, Error> {
    claim(vm)?.rename(name)?;
    messages::answer(format_args!("{name}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// The right to change a VM that does not run.
fn claim(text: &str) -> Result<Claim, Error> {
    let store = Store::open()?;
    let vm = store.find(text)?;
    Ok(store.claim(&vm.name)?)
}
