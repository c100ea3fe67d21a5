//! What a virtio device is, whatever the transport.

use std::sync::Arc;

use lodger_device_model::{MsiTarget, Payload, RestoreError};
use lodger_guest_memory::GuestMemory;

use crate::queue::{Host, Queue};

/// A virtio device behind a transport.
///
/// Configuration accesses and notifications come on vCPU threads, several at once. A notification may be spurious, and may come
/// when the device is not active.
pub trait VirtioDevice: Send + Sync {
    /// The device type (section 5).
    fn device_type(&self) -> u16;

    /// Its PCI class code, 0xBBSSPP.
    fn pci_class(&self) -> u32;

    /// The device-specific feature bits that it offers (bits 0 to 23).
    fn features(&self) -> u64;

    /// The largest size of each of its queues, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` with what the driver reads at `offset` of the configuration structure; zeroes beyond its end.
    fn config_read(&self, offset: u64, data: &mut [u8]);

    /// Takes what the driver writes to the configuration structure.
    fn config_write(&self, _offset: u64, _data: &[u8]) {}

    /// Changes whenever several fields of the configuration structure may have changed together (section 2.5).
    fn config_generation(&self) -> u8 {
        0
    }

    /// The driver is ready. The device takes the queues but nothing from them yet: notifications follow.
    fn activate(&self, activation: Activation);

    /// Queue `queue` may have new buffers. Must not take long.
    fn notify(&self, queue: u16);

    /// Forgets the queues and all that the driver has set. The queues stand still and no chain of them is held any more.
    fn reset(&self);

    /// The queues stand still; from now on no host input is taken.
    fn pause(&self) {}

    /// The queues run again; notifications follow.
    fn resume(&self) {}

    /// The device's own volatile state.
    fn save(&self) -> Payload;

    /// Takes a state that `save` made. `activate` follows if the driver was ready.
    fn restore(&self, payload: &Payload) -> Result<(), RestoreError>;
}

/// What a device gets when the driver is ready.
pub struct Activation {
    /// The negotiated features.
    pub features: u64,
    /// All its queues; those that the driver does not use never have a chain.
    pub queues: Vec<Arc<Queue>>,
    /// To tell the driver of changes of the configuration structure.
    pub config_change: ConfigChange,
}

/// Tells the driver that the configuration structure has changed.
#[derive(Clone)]
pub struct ConfigChange(pub(crate) Arc<dyn Host>);

impl ConfigChange {
    /// Sends the configuration change notification.
    pub fn notify(&self) {
        self.0.config_changed();
    }
}

/// What a board gives to the devices that it builds.
#[derive(Clone)]
pub struct Wiring {
    /// RAM, for DMA.
    pub memory: GuestMemory,
    /// Takes message-signalled interrupts.
    pub msi: Arc<dyn MsiTarget>,
}

/// Answers a configuration read from the structure's bytes; zeroes beyond its end.
pub fn read_config(structure: &[u8], offset: u64, data: &mut [u8]) {
    for (i, d) in data.iter_mut().enumerate() {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let byte = at.checked_add(i).and_then(|at| structure.get(at));
        *d = byte.copied().unwrap_or(0);
    }
}
