//! `lodger set` and `lodger rename`: changes of a VM that does not run.

use std::process::ExitCode;

use lodger_store::{Claim, Name, Store, StoreError};

use super::named;
use crate::cli::SetArgs;
use crate::status::Error;
use crate::{messages, monitor, registry};

/// Changes what the VM is started from.
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
    let mut claim = claim(&args.vm)?;
    let mut spec = monitor::spec_of(&claim)?;
    spec.engine = engine.unwrap_or(spec.engine);
    spec.restart = restart.unwrap_or(spec.restart);
    spec.machine.memory = memory.unwrap_or(spec.machine.memory);
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
