//! Virtio: the queues, one transport core, and the PCI transport. Virtual I/O Device (VIRTIO) Version 1.2, modern
//! interface only.
//!
//! A device implements [`VirtioDevice`]; [`VirtioPci`] puts it on the PCI bus. The device gets its [`Queue`]s when the driver
//! is ready, takes [`Chain`]s of buffers from them on any thread, and completes each. Everything that the guest can get wrong
//! about rings and descriptors is dealt with before the device sees a chain: the transport then sets
//! DEVICE_NEEDS_RESET (section 2.1.2) and the queues stand still until the driver resets the device.
//!
//! Threads: a device must not hold a chain while it waits for something that may never come (input, for example), because
//! reset and pause wait until all chains are completed.
//!
//! Limits: split rings, no packed ones; no queue reset, no shared memory regions, no notification data.

mod device;
#[cfg(feature = "driver")]
pub mod driver;
mod pci;
mod queue;
mod transport;

pub use lodger_guest_memory::Wait;

pub use device::{Activation, ConfigChange, VirtioDevice, Wiring, read_config};
pub use pci::VirtioPci;
pub use queue::{Chain, Queue};

/// Feature: descriptors may refer to tables of descriptors.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Feature: either side says at which index it wants to be notified.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// Feature: the modern interface; always offered, always required.
pub const F_VERSION_1: u64 = 1 << 32;
