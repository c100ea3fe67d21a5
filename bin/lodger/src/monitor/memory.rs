//! The memory of a running machine: what it has and takes, and how it gets more or less.

use std::time::Duration;

use lodger_board::Machine;
use lodger_control::{GuestFigures, Memory};

/// How long a guest may take to tell its figures. One with a driver does so at once.
const PATIENCE: Duration = Duration::from_millis(300);

/// How it is.
pub fn memory(machine: &Machine) -> Memory {
    let max = machine.memory().size();
    let balloon = machine.balloon().map(|balloon| balloon.status(PATIENCE));
    let guest = balloon.as_ref().and_then(|balloon| balloon.guest);
    Memory {
        max,
        asked: balloon.as_ref().map_or(max, |balloon| balloon.asked),
        actual: balloon.as_ref().map_or(max, |balloon| balloon.actual),
        // A figure that cannot be had is no reason to tell none.
        host: machine.memory().resident().unwrap_or(0),
        reported: balloon.as_ref().map_or(0, |balloon| balloon.reported),
        guest: guest.map(|guest| GuestFigures {
            total: guest.total,
            free: guest.free,
            available: guest.available,
            caches: guest.caches,
        }),
    }
}

/// Lets the guest do with so many bytes. The error is for people.
pub fn set_memory(machine: &Machine, bytes: u64) -> Result<(), String> {
    let max = machine.memory().size();
    if bytes > max {
        return Err(format!(
            "it was started with at most {} MiB of memory; more takes a stop, and a start with `max=` (--memory 1G,max=4G)",
            max >> 20
        ));
    }
    let Some(balloon) = machine.balloon() else {
        return Err("it was started without a memory balloon; stop it and start it again".into());
    };
    balloon.ask(bytes).map_err(|error| error.to_string())
}
