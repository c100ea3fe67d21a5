//! PCI: configuration space, MSI-X, interrupt lines and one root bus.
//!
//! A device is a [`PciDevice`]: it owns an [`Endpoint`] (configuration space, MSI-X, interrupt line; the part that
//! all devices share) and answers accesses to its base address registers. The [`PciBus`] holds the devices at 0:N.0, and lets the
//! registers appear in the machine's address space wherever the guest programs them. The [`HostBridge`] at
//! 0:0.0 is the guest's way to configuration space: ports 0xcf8/0xcfc and a memory-mapped (ECAM) window.
//!
//! Limits: one bus, function 0 only, no expansion ROM, no message-signalled interrupts other than MSI-X, no PCI Express
//! capability. Specifications: PCI Local Bus 3.0; PCI Express Base 3.0, section 7.2.2, for the window.

mod bus;
mod config;
mod decode;
mod endpoint;
mod host;
mod intx;
mod msix;

use lodger_device_model::Device;

pub use bus::{AddError, FunctionAddress, NoRoom, PciBus, Resources, SLOTS, bar_read, bar_write};
pub use config::{
    BAR0, BarKind, CAPABILITY_MSIX, CAPABILITY_VENDOR, COMMAND, COMMAND_BUS_MASTER,
    COMMAND_INTX_DISABLE, COMMAND_IO, COMMAND_MEMORY, CONFIG_SIZE, ConfigSpace, INTERRUPT_LINE,
    Identity, Region, SavedConfig, Space,
};
pub use endpoint::{Endpoint, MsixPlace, SavedEndpoint};
pub use host::{CONFIG_PORTS, CONFIG_PORTS_LEN, ECAM_BUS_SIZE, HostBridge};
pub use intx::intx_line;
pub use msix::{CONTROL_ENABLE, CONTROL_MASK_ALL, Msix, SavedMsix};

/// A device on the PCI bus.
pub trait PciDevice: Device {
    /// Its configuration space and interrupts.
    fn endpoint(&self) -> &Endpoint;

    /// Fills `data` with what the guest reads at `offset` of base address register `bar`. Accesses to the MSI-X structures do not
    /// come here.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// Takes what the guest writes at `offset` of base address register `bar`; as `bar_read`.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);

    /// The guest reads its configuration space: 1, 2 or 4 bytes within an aligned double word.
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.endpoint().config_read(offset, data);
    }

    /// The guest writes to its configuration space; as `config_read`.
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.endpoint().config_write(offset, data);
    }
}
