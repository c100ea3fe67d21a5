//! The PC that Lodger builds: which devices it has, at which addresses and on which interrupt lines, and how they hang together.
//!
//! A [`MachineSpec`] is plain data; [`Machine::build`] makes the wired machine from it, once. Its devices then stay the same:
//! a reset ([`Machine::power_on`]) and a restore give them another state.
//!
//! | file | what |
//! |---|---|
//! | `spec.rs` | what can be chosen |
//! | `map.rs` | every address, port and interrupt, and the ACPI description of them |
//! | `routing.rs` | interrupt lines to the 8259s and the I/O APIC, messages to the local APICs |
//! | `build.rs` | the devices and their wires |
//! | `machine.rs` | the machine: power-on, exits, pause, save and restore |
//!
//! Limits: one board; no hotplug; no firmware: a kernel is loaded directly, and what firmware would set up is set up by
//! `power_on`.

mod build;
mod machine;
pub mod map;
mod routing;
mod spec;

pub use build::{BuildError, Host};
pub use lodger_loader::{Boot, BootKind};
pub use machine::{Machine, PowerOn, PowerOnError, RestoreMachineError, SavedDevices};
pub use spec::{BootSpec, MachineSpec, SpecError, VirtioSpec};
