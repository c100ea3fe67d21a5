//! What a device is and what it may see: the traits between devices and the rest of the machine.
//!
//! A device sees guest time only through its [`Clock`](lodger_clock::Clock), the host only through its backend, RAM only through its
//! [`GuestMemory`](lodger_guest_memory::GuestMemory) handle (DMA), the interrupt controllers only through [`IrqLine`] and [`MsiTarget`]. It is shared
//! between vCPU threads, the clock's thread and backend threads, so its methods take `&self`.
//!
//! Order rules, kept by the machine: all devices are built (and wired) before the first `restore` or `reset`; `pause` comes before
//! `save`; after `restore` comes `resume`. `restore` never raises an interrupt: lines are set with [`IrqLine::import`].

mod irq;
mod mistakes;
mod saved;

use lodger_address_space::BusTarget;

pub use irq::{IrqLine, IrqSink, Msi, MsiTarget};
pub use mistakes::GuestMistakes;
pub use saved::{Payload, RestoreError};

/// A device of a machine.
pub trait Device: Send + Sync {
    /// Its name within the machine, unique, such as `uart0` or `virtio-blk0`: the path of its saved state.
    fn name(&self) -> &str;

    /// Goes to the state after power-on. Configuration that the machine gave at construction stays.
    fn reset(&self);

    /// The volatile state. Only called while paused.
    fn save(&self) -> Payload;

    /// Takes a state that `save` made; on an error the device is left as it was or reset.
    fn restore(&self, payload: &Payload) -> Result<(), RestoreError>;

    /// No more host input is taken and no more DMA done once this returns; guest accesses do not come while paused.
    fn pause(&self) {}

    /// Undoes `pause`.
    fn resume(&self) {}

    /// Its registers on the memory bus, if it has any there. The board decides at which address.
    fn as_mmio(&self) -> Option<&dyn BusTarget> {
        None
    }

    /// Its registers on the port bus, if it has any there.
    fn as_pio(&self) -> Option<&dyn BusTarget> {
        None
    }
}

/// The machine-wide requests that a device register can make; the board passes them on to whoever runs the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineRequest {
    /// The guest powered the machine off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset (keyboard controller, reset register, port 0xcf9).
    Reset,
    /// The guest ended the run with a status (debug-exit port): the value that was written.
    DebugExit(u32),
}

/// Takes [`MachineRequest`]s. Must not block: the vCPU that caused the request is still inside the device.
pub trait MachineControl: Send + Sync {
    /// Notes the request; it takes effect at the vCPU's next exit.
    fn request(&self, request: MachineRequest);
}

/// Saves, restores, saves again and compares: every device's own test calls this with a device in a state worth saving.
///
/// # Panics
/// If the device refuses its own state or does not reproduce it.
pub fn assert_round_trip(device: &dyn Device) {
    let first = device.save();
    device.reset();
    device
        .restore(&first)
        .unwrap_or_else(|e| panic!("{}: {e}", device.name()));
    assert_eq!(
        first,
        device.save(),
        "{}: save(restore(save)) differs",
        device.name()
    );
    let mut cut = first.clone();
    cut.bytes.pop();
    if !first.bytes.is_empty() {
        assert!(
            device.restore(&cut).is_err(),
            "{}: takes a truncated state",
            device.name()
        );
    }
    let mut long = first.clone();
    long.bytes.push(0);
    assert!(
        device.restore(&long).is_err(),
        "{}: takes a state with a leftover",
        device.name()
    );
    device.restore(&first).expect("it took this state before");
}
