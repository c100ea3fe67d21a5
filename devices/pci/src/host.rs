//! The host bridge at 0:0.0 and the two ways to configuration space.
//!
//! * Configuration mechanism 1: an address register at port 0xcf8, which takes aligned double words only, and the data
//!   at ports 0xcfc to 0xcff (PCI Local Bus 3.0, section 3.2.2.3.2).
//! * The memory-mapped window (ECAM): 4 KiB a function, of which conventional functions have the first 256 bytes. The board chooses
//!   base and size (1 MiB a bus) and tells of them in ACPI's MCFG table.
//!
//! The bridge is 1b36:0008, a generic host bridge that has no registers of its own: the ID of a real chipset would
//! promise registers (memory control, interrupt routing) that firmware and drivers then program.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use lodger_address_space::BusTarget;
use lodger_device_model::{Device, Payload, RestoreError};

use crate::PciDevice;
use crate::bus::{AddError, FunctionAddress, PciBus};
use crate::config::{ConfigSpace, Identity};
use crate::endpoint::Endpoint;

/// The first port of configuration mechanism 1.
pub const CONFIG_PORTS: u64 = 0xcf8;
/// How many ports it takes.
pub const CONFIG_PORTS_LEN: u64 = 8;
/// Bytes of the memory-mapped window for each bus; only bus 0 has devices.
pub const ECAM_BUS_SIZE: u64 = 1 << 20;

const KIND: &str = "pci-host";
const ADDRESS_ENABLE: u32 = 1 << 31;
/// The bits of the address register that exist.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// See the module documentation. As a [`Device`] it answers at ports 0xcf8 to 0xcff (`as_pio`) and in the window
/// (`as_mmio`).
pub struct HostBridge {
    // Fixed configuration.
    name: String,
    // Runtime glue; the endpoint and the address register hold the volatile state.
    endpoint: Endpoint,
    ports: ConfigPorts,
    window: EcamWindow,
}

impl HostBridge {
    /// Puts a host bridge at 0:0.0 of `bus`. A PC has its reset control register at port 0xcf9, amid the address register:
    /// byte accesses to it go to `port_cf9`, at offset 0.
    pub fn add_to(
        bus: &Arc<PciBus>,
        name: &str,
        port_cf9: Option<Arc<dyn BusTarget>>,
    ) -> Result<Arc<HostBridge>, AddError> {
        let config = ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        let bridge = Arc::new(HostBridge {
            name: name.into(),
            endpoint: Endpoint::new(config),
            ports: ConfigPorts {
                bus: Arc::downgrade(bus),
                port_cf9,
                address: AtomicU32::new(0),
            },
            window: EcamWindow {
                bus: Arc::downgrade(bus),
            },
        });
        bus.add(Some(0), bridge.clone())?;
        Ok(bridge)
    }
}

impl Device for HostBridge {
    fn name(&self) -> &str {
        &self.name
    }

    fn reset(&self) {
        self.endpoint.reset();
        self.ports.address.store(0, Ordering::Relaxed);
    }

    fn save(&self) -> Payload {
        let state = saved::V1 {
            endpoint: self.endpoint.save(),
            address: self.ports.address.load(Ordering::Relaxed),
        };
        Payload::encode(KIND, 1, &state)
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved::V1 { endpoint, address } = payload.decode(KIND, 1)?;
        self.endpoint
            .restore(&endpoint)
            .map_err(|why| RestoreError::Damaged {
                kind: KIND,
                why: why.into(),
            })?;
        self.ports.address.store(address, Ordering::Relaxed);
        Ok(())
    }

    fn as_mmio(&self) -> Option<&dyn BusTarget> {
        Some(&self.window)
    }

    fn as_pio(&self) -> Option<&dyn BusTarget> {
        Some(&self.ports)
    }
}

impl PciDevice for HostBridge {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

/// Ports 0xcf8 to 0xcff.
struct ConfigPorts {
    bus: Weak<PciBus>,
    port_cf9: Option<Arc<dyn BusTarget>>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// The function and register that an access at `offset` 4 to 7 means.
    fn target(&self, offset: u64) -> Option<(Arc<PciBus>, FunctionAddress, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        if offset < 4 || address & ADDRESS_ENABLE == 0 {
            return None;
        }
        let function = FunctionAddress {
            bus: (address >> 16) as u8,
            device: (address >> 11) as u8 & 31,
            function: (address >> 8) as u8 & 7,
        };
        let register = (address & 0xfc) as u16 + (offset - 4) as u16;
        Some((self.bus.upgrade()?, function, register))
    }
}

impl BusTarget for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len(), &self.port_cf9) {
            (0, 4, _) => {
                let address = self.address.load(Ordering::Relaxed);
                data.copy_from_slice(&address.to_le_bytes());
            }
            (1, 1, Some(cf9)) => cf9.read(0, data),
            _ => match self.target(offset) {
                Some((bus, function, register)) => bus.config_read(function, register, data),
                None => data.fill(0xff),
            },
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data, &self.port_cf9) {
            (0, &[a, b, c, d], _) => {
                let address = u32::from_le_bytes([a, b, c, d]) & ADDRESS_BITS;
                self.address.store(address, Ordering::Relaxed);
            }
            (1, &[_], Some(cf9)) => cf9.write(0, data),
            _ => {
                if let Some((bus, function, register)) = self.target(offset) {
                    bus.config_write(function, register, data);
                }
            }
        }
    }
}

/// The memory-mapped window, from bus 0 on.
struct EcamWindow {
    bus: Weak<PciBus>,
}

/// Function and register of an offset in the window.
fn ecam(offset: u64) -> (FunctionAddress, u16) {
    let function = FunctionAddress {
        bus: u8::try_from(offset >> 20).unwrap_or(0xff),
        device: (offset >> 15) as u8 & 31,
        function: (offset >> 12) as u8 & 7,
    };
    (function, offset as u16 & 0xfff)
}

impl BusTarget for EcamWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (function, register) = ecam(offset);
        match self.bus.upgrade() {
            Some(bus) => bus.config_read(function, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (function, register) = ecam(offset);
        if let Some(bus) = self.bus.upgrade() {
            bus.config_write(function, register, data);
        }
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    use crate::endpoint::SavedEndpoint;

    #[derive(Serialize, Deserialize)]
    pub struct V1 {
        pub endpoint: SavedEndpoint,
        pub address: u32,
    }
}
