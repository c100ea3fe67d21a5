//! Bus 0: the devices at 0:N.0, their places in the address space, and the first assignment of those.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, RwLock, Weak};

use lodger_address_space::{AddressSpace, BusTarget};
use lodger_device_model::IrqLine;

use crate::PciDevice;
use crate::config::{BAR0, BarKind, COMMAND, COMMAND_IO, COMMAND_MEMORY, INTERRUPT_LINE, Space};
use crate::decode::Decoder;
use crate::intx::{IntxRouter, intx_line};

/// Devices on a bus.
/// Slots of a bus, of which the host bridge has the first.
pub const SLOTS: u8 = 32;

/// The address of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FunctionAddress {
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

/// The root bus.
pub struct PciBus {
    router: Arc<IntxRouter>,
    decoder: Arc<Decoder>,
    slots: RwLock<BTreeMap<u8, Arc<dyn PciDevice>>>,
}

/// A device could not be put on the bus.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// The slot does not exist or has a device.
    #[error("PCI device {name}: slot {slot} is taken or above 31")]
    Slot {
        /// The device.
        name: String,
        /// The slot asked for.
        slot: u8,
    },
    /// All 32 slots have a device.
    #[error("PCI device {name}: the bus is full")]
    Full {
        /// The device.
        name: String,
    },
    /// It is on a bus already.
    #[error("PCI device {name} is on a bus already")]
    Twice {
        /// The device.
        name: String,
    },
}

/// What [`PciBus::assign_resources`] may give out.
#[derive(Debug, Clone)]
pub struct Resources {
    /// Guest-physical addresses for memory registers. 32-bit registers get addresses below 4 GiB only.
    pub memory: Range<u64>,
    /// I/O ports.
    pub ports: Range<u16>,
    /// What the interrupt line register of a device on line A, B, C or D says: the input of the legacy controller.
    pub interrupts: [u8; 4],
}

/// The window is too small.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no room for {len:#x} bytes of BAR {bar} of PCI device {name}")]
pub struct NoRoom {
    /// The device.
    pub name: String,
    /// Its base address register.
    pub bar: usize,
    /// Bytes that it wants.
    pub len: u64,
}

impl PciBus {
    /// An empty bus in front of `space`. `intx` are the four shared lines A to D, level-triggered; device N's pin A is
    /// wired to line N modulo 4, which is what the board's ACPI `_PRT` has to say.
    pub fn new(space: &Arc<AddressSpace>, intx: [IrqLine; 4]) -> Arc<PciBus> {
        Arc::new(PciBus {
            router: IntxRouter::new(intx),
            decoder: Decoder::new(space),
            slots: RwLock::default(),
        })
    }

    /// Puts `device` at 0:`slot`.0, or at the first free slot from 1 on. Returns the slot.
    pub fn add(&self, slot: Option<u8>, device: Arc<dyn PciDevice>) -> Result<u8, AddError> {
        let name = || device.name().to_string();
        let mut slots = self.slots.write().expect("a PCI device panicked");
        let slot = match slot {
            Some(s) if s >= SLOTS || slots.contains_key(&s) => {
                return Err(AddError::Slot {
                    name: name(),
                    slot: s,
                });
            }
            Some(s) => s,
            None => (1..SLOTS)
                .find(|s| !slots.contains_key(s))
                .ok_or_else(|| AddError::Full { name: name() })?,
        };
        let line = IrqLine::new(self.router.clone(), u32::from(slot));
        let endpoint = device.endpoint();
        if !endpoint.attach(slot, Arc::clone(&self.decoder), line) {
            return Err(AddError::Twice { name: name() });
        }
        for bar in (0..6).filter(|&b| endpoint.bar(b).is_some()) {
            let target = BarTarget {
                device: Arc::downgrade(&device),
                bar,
            };
            self.decoder.add(slot, bar, Arc::new(target));
        }
        slots.insert(slot, device);
        Ok(slot)
    }

    /// The devices by slot.
    pub fn devices(&self) -> Vec<(u8, Arc<dyn PciDevice>)> {
        let slots = self.slots.read().expect("a PCI device panicked");
        slots.iter().map(|(&s, d)| (s, Arc::clone(d))).collect()
    }

    /// The device at 0:`slot`.0.
    pub fn device(&self, slot: u8) -> Option<Arc<dyn PciDevice>> {
        let slots = self.slots.read().expect("a PCI device panicked");
        slots.get(&slot).cloned()
    }

    fn function(&self, address: FunctionAddress) -> Option<Arc<dyn PciDevice>> {
        let exists = address.bus == 0 && address.function == 0;
        exists.then(|| self.device(address.device)).flatten()
    }

    /// The guest reads configuration space of a function; ones where there is none.
    pub fn config_read(&self, function: FunctionAddress, offset: u16, data: &mut [u8]) {
        let Some(d) = self.function(function) else {
            return data.fill(0xff);
        };
        let mut at = offset;
        for part in split(offset, data.len()) {
            d.config_read(at, &mut data[part.clone()]);
            at = at.wrapping_add(part.len() as u16);
        }
    }

    /// The guest writes configuration space; see [`PciBus::config_read`].
    pub fn config_write(&self, function: FunctionAddress, offset: u16, data: &[u8]) {
        let Some(d) = self.function(function) else {
            return;
        };
        let mut at = offset;
        for part in split(offset, data.len()) {
            d.config_write(at, &data[part.clone()]);
            at = at.wrapping_add(part.len() as u16);
        }
    }

    /// Does what firmware would: gives every base address register a place in `resources`, enables decoding, and
    /// writes the interrupt line registers. For guests that are started without firmware; after every reset. Guests are free to
    /// assign anew.
    pub fn assign_resources(&self, resources: &Resources) -> Result<(), NoRoom> {
        let mut wanted = Vec::new();
        for (slot, device) in self.devices() {
            let bars = (0..6).filter_map(|b| device.endpoint().bar(b).map(|k| (b, k)));
            wanted.extend(bars.map(|(bar, (kind, len))| (len, slot, bar, kind, device.clone())));
            let line = resources.interrupts[intx_line(slot)];
            device.config_write(INTERRUPT_LINE, &[line]);
        }
        // Large ones first, so that alignment wastes nothing.
        wanted.sort_by_key(|&(len, slot, bar, ..)| (std::cmp::Reverse(len), slot, bar));
        let mut next_memory = resources.memory.start;
        let mut next_port = u64::from(resources.ports.start);
        for (len, _, bar, kind, device) in wanted {
            let (next, end, space) = match kind {
                BarKind::Io => (&mut next_port, resources.ports.end.into(), Space::Ports),
                BarKind::Memory32 => {
                    let end = resources.memory.end.min(1 << 32);
                    (&mut next_memory, end, Space::Memory)
                }
                BarKind::Memory64 => (&mut next_memory, resources.memory.end, Space::Memory),
            };
            let start = next.checked_next_multiple_of(len);
            let range = start.and_then(|s| Some((s, s.checked_add(len)?)));
            let Some((start, after)) = range.filter(|r| r.1 <= end) else {
                return Err(NoRoom {
                    name: device.name().to_string(),
                    bar,
                    len,
                });
            };
            *next = after;
            let register = BAR0 + bar as u16 * 4;
            device.config_write(register, &(start as u32).to_le_bytes());
            if kind == BarKind::Memory64 {
                device.config_write(register + 4, &((start >> 32) as u32).to_le_bytes());
            }
            let mut command = [0; 2];
            device.config_read(COMMAND, &mut command);
            let enable = match space {
                Space::Ports => COMMAND_IO,
                Space::Memory => COMMAND_MEMORY,
            };
            let command = u16::from_le_bytes(command) | enable;
            device.config_write(COMMAND, &command.to_le_bytes());
        }
        Ok(())
    }
}

/// Parts an access into those that each lie within one aligned double word.
fn split(offset: u16, len: usize) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let room = 4 - (usize::from(offset) + at) % 4;
        let part = at..len.min(at + room);
        at = part.end;
        (!part.is_empty()).then_some(part)
    })
}

/// A base address register on the machine's bus.
struct BarTarget {
    device: Weak<dyn PciDevice>,
    bar: usize,
}

impl BusTarget for BarTarget {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.device.upgrade() {
            Some(d) => bar_read(&*d, self.bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(d) = self.device.upgrade() {
            bar_write(&*d, self.bar, offset, data);
        }
    }
}

/// Reads at `offset` of base address register `bar`, be it MSI-X structure or the device's own register.
pub fn bar_read(device: &dyn PciDevice, bar: usize, offset: u64, data: &mut [u8]) {
    if !device.endpoint().msix_read(bar, offset, data) {
        device.bar_read(bar, offset, data);
    }
}

/// Writes; see [`bar_read`].
pub fn bar_write(device: &dyn PciDevice, bar: usize, offset: u64, data: &[u8]) {
    if !device.endpoint().msix_write(bar, offset, data) {
        device.bar_write(bar, offset, data);
    }
}
