//! Which base address registers appear where on the machine's buses.
//!
//! One table for all devices of the bus, because they can be in each other's way: of two ranges that overlap, the first
//! one programmed is there, and the other one as soon as the first has moved.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use lodger_address_space::{AddressSpace, Bus, BusTarget};
use lodger_device_model::GuestMistakes;

use crate::config::{Region, Space};

pub(crate) struct Decoder {
    space: Weak<AddressSpace>,
    /// By slot and register.
    windows: Mutex<BTreeMap<(u8, usize), Window>>,
    mistakes: GuestMistakes,
}

struct Window {
    target: Arc<dyn BusTarget>,
    wanted: Option<Region>,
    mapped: bool,
}

fn bus(space: &AddressSpace, region: Region) -> &Bus {
    match region.space {
        Space::Memory => &space.mmio,
        Space::Ports => &space.ports,
    }
}

impl Decoder {
    pub(crate) fn new(space: &Arc<AddressSpace>) -> Arc<Decoder> {
        Arc::new(Decoder {
            space: Arc::downgrade(space),
            windows: Mutex::default(),
            mistakes: GuestMistakes::default(),
        })
    }

    /// Makes a register known, decoded nowhere yet.
    pub(crate) fn add(&self, slot: u8, bar: usize, target: Arc<dyn BusTarget>) {
        let window = Window {
            target,
            wanted: None,
            mapped: false,
        };
        let mut windows = self.windows.lock().expect("a layout listener panicked");
        windows.insert((slot, bar), window);
    }

    /// The register is decoded at `region` from now on.
    pub(crate) fn set(&self, slot: u8, bar: usize, region: Option<Region>) {
        let mut windows = self.windows.lock().expect("a layout listener panicked");
        let Some(space) = self.space.upgrade() else {
            return; // the machine is being taken down
        };
        match windows.get_mut(&(slot, bar)) {
            Some(w) if w.wanted != region => {
                if let (Some(old), true) = (w.wanted, w.mapped) {
                    bus(&space, old).unmap(old.start);
                }
                w.wanted = region;
                w.mapped = false;
            }
            _ => return,
        }
        for (&(s, b), w) in windows.iter_mut().filter(|(_, w)| !w.mapped) {
            let Some(r) = w.wanted else { continue };
            match bus(&space, r).map(r.start, r.len, Arc::clone(&w.target)) {
                Ok(()) => w.mapped = true,
                Err(e) if (s, b) == (slot, bar) => {
                    let name = format_args!("0:{slot:x}.0 BAR {bar}: {e}");
                    self.mistakes.note("pci", name);
                }
                Err(_) => {}
            }
        }
    }
}
