//! The PCI transport (section 4.1), modern interface: the register structures lie in one 64-bit memory BAR.
//!
//! | offset in BAR 0 | structure |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | interrupt status |
//! | 0x2000 | device configuration |
//! | 0x3000 | notifications, 4 bytes a queue |
//! | 0x4000 | MSI-X table, one vector a queue and one for configuration changes |
//! | 0x5000 | MSI-X pending bits |
//!
//! The same BAR can be accessed through configuration space (VIRTIO_PCI_CAP_PCI_CFG), for firmware that cannot reach it.
//! As on a real bus, the device accesses memory only while it is a bus master.

use std::sync::{Arc, Mutex, MutexGuard};

use lodger_device_model::{Device, Payload, RestoreError};
use lodger_pci::{
    BarKind, CAPABILITY_VENDOR, ConfigSpace, Endpoint, Identity, MsixPlace, PciDevice, bar_read,
    bar_write,
};

use crate::device::{VirtioDevice, Wiring};
use crate::transport::{Interrupts, QueueRegisters, Transport};

const VENDOR: u16 = 0x1af4;
/// Device ID of device type 0.
const DEVICE_BASE: u16 = 0x1040;
/// Subsystem IDs from 0x40 on say that the device is not a transitional one.
const SUBSYSTEM: u16 = 0x1100;

const KIND: &str = "virtio-pci";
const BAR: usize = 0;
const BAR_SIZE: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const COMMON_LEN: usize = 0x38;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DEVICE_LEN: u64 = 0x1000;
const NOTIFY: u64 = 0x3000;
const NOTIFY_LEN: u64 = 0x1000;
/// Bytes from one queue's notification register to the next one's.
const NOTIFY_MULTIPLIER: u32 = 4;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x5000;

/// Types of the capabilities that tell where the structures are (section 4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

/// The vector number that means none.
const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    // Fixed configuration.
    name: String,
    /// Offset of the capability that gives access to the BAR.
    window: u16,
    // Runtime glue; they hold most of the volatile state.
    lines: Arc<Lines>,
    transport: Transport,
    // Volatile state.
    selected: Mutex<Selected>,
}

/// The select registers of the common configuration structure.
#[derive(Debug, Clone, Copy, Default)]
struct Selected {
    device_features: u32,
    driver_features: u32,
    queue: u16,
}

/// The ways to interrupt the driver: MSI-X if it is enabled, else the pin and the interrupt status register.
struct Lines {
    endpoint: Endpoint,
    state: Mutex<LinesState>,
}

#[derive(Debug, Clone)]
struct LinesState {
    isr: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

impl LinesState {
    fn new(queues: u16) -> LinesState {
        LinesState {
            isr: 0,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues.into()],
        }
    }
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, LinesState> {
        self.state.lock().expect("an interrupt sink panicked")
    }

    /// Reads the interrupt status register, which clears it and the pin.
    fn take_isr(&self) -> u8 {
        let mut state = self.lock();
        self.endpoint.set_interrupt(false);
        std::mem::take(&mut state.isr)
    }

    fn reset(&self) {
        let mut state = self.lock();
        *state = LinesState::new(state.queue_vectors.len() as u16);
        self.endpoint.set_interrupt(false);
    }
}

impl Interrupts for Lines {
    fn queue(&self, index: u16) {
        let mut state = self.lock();
        if self.endpoint.msix_enabled() {
            self.endpoint.raise(state.queue_vectors[usize::from(index)]);
        } else {
            state.isr |= ISR_QUEUE;
            self.endpoint.set_interrupt(true);
        }
    }

    fn config(&self, wanted: &dyn Fn() -> bool) {
        let mut state = self.lock();
        if !wanted() {
            return;
        }
        state.isr |= ISR_CONFIG;
        self.endpoint.set_interrupt(true);
        self.endpoint.raise(state.config_vector);
    }
}

impl VirtioPci {
    /// Makes a PCI device of `device`. The board puts it on its bus with [`PciBus::add`](lodger_pci::PciBus::add).
    pub fn new(name: &str, device: Arc<dyn VirtioDevice>, wiring: &Wiring) -> Arc<VirtioPci> {
        let queues = device.queue_sizes().len() as u16;
        assert!(u64::from(queues) * u64::from(NOTIFY_MULTIPLIER) <= NOTIFY_LEN);
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + device.device_type(),
            revision: 1,
            class: device.pci_class(),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        })
        .with_bar(BAR, BarKind::Memory64, BAR_SIZE)
        .with_interrupt_pin();
        let structure = |kind, offset: u64, len: u64, more: &[u8]| {
            let mut body = vec![16 + more.len() as u8, kind, BAR as u8, 0, 0, 0];
            body.extend((offset as u32).to_le_bytes());
            body.extend((len as u32).to_le_bytes());
            body.extend(more);
            body
        };
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        for body in [
            structure(CAP_COMMON, COMMON, COMMON_LEN as u64, &[]),
            structure(CAP_ISR, ISR, 1, &[]),
            structure(CAP_DEVICE, DEVICE, DEVICE_LEN, &[]),
            structure(CAP_NOTIFY, NOTIFY, NOTIFY_LEN, &multiplier),
        ] {
            config.add_capability(CAPABILITY_VENDOR, &body, &[]);
        }
        // BAR, offset and length are the driver's to choose; the data bytes are answered by the BAR.
        let mut writable = [0; 14];
        writable[2] = 0xff;
        writable[6..].fill(0xff);
        let window = config.add_capability(
            CAPABILITY_VENDOR,
            &structure(CAP_PCI, 0, 0, &[0; 4]),
            &writable,
        );
        let place = MsixPlace {
            vectors: queues + 1,
            bar: BAR,
            table: MSIX_TABLE,
            pending: MSIX_PENDING,
        };
        let lines = Arc::new(Lines {
            endpoint: Endpoint::with_msix(config, place, Arc::clone(&wiring.msi)),
            state: Mutex::new(LinesState::new(queues)),
        });
        let transport = Transport::new(name, device, wiring.memory.clone(), lines.clone());
        Arc::new(VirtioPci {
            name: name.into(),
            window,
            lines,
            transport,
            selected: Mutex::default(),
        })
    }

    fn selected(&self) -> MutexGuard<'_, Selected> {
        self.selected.lock().expect("register code panicked")
    }

    /// The common configuration structure as the driver reads it (section 4.1.4.3).
    fn common(&self) -> [u8; COMMON_LEN] {
        let selected = *self.selected();
        let t = &self.transport;
        let lines = self.lines.lock();
        let q = t.queue(selected.queue);
        let vector = lines.queue_vectors.get(usize::from(selected.queue));
        let mut c = [0; COMMON_LEN];
        let mut put = |at: usize, value: &[u8]| c[at..at + value.len()].copy_from_slice(value);
        put(0x00, &selected.device_features.to_le_bytes());
        let offered = t.device_features(selected.device_features);
        put(0x04, &offered.to_le_bytes());
        put(0x08, &selected.driver_features.to_le_bytes());
        let accepted = t.driver_features(selected.driver_features);
        put(0x0c, &accepted.to_le_bytes());
        put(0x10, &lines.config_vector.to_le_bytes());
        put(0x12, &t.queue_count().to_le_bytes());
        put(0x14, &[t.status()]);
        put(0x15, &[t.device().config_generation()]);
        put(0x16, &selected.queue.to_le_bytes());
        put(0x1a, &vector.copied().unwrap_or(NO_VECTOR).to_le_bytes());
        if let Some(q) = q {
            put(0x18, &q.size.to_le_bytes());
            put(0x1c, &u16::from(q.enabled).to_le_bytes());
            put(0x1e, &selected.queue.to_le_bytes());
            put(0x20, &q.desc.to_le_bytes());
            put(0x28, &q.driver.to_le_bytes());
            put(0x30, &q.device.to_le_bytes());
        }
        c
    }

    /// The driver writes to the common configuration structure: each field as a whole, 64-bit ones also by halves.
    fn common_write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let (word, double) = (value as u16, value as u32);
        let t = &self.transport;
        let queue = || self.selected().queue;
        let set = |change: &dyn Fn(&mut QueueRegisters)| t.set_queue(queue(), change);
        match (offset, data.len()) {
            (0x00, 4) => self.selected().device_features = double,
            (0x08, 4) => self.selected().driver_features = double,
            (0x0c, 4) => {
                let select = self.selected().driver_features;
                t.set_driver_features(select, double);
            }
            (0x10, 2) => {
                let vector = self.vector(word);
                self.lines.lock().config_vector = vector;
            }
            (0x14, 1) => self.set_status(value as u8),
            (0x16, 2) => self.selected().queue = word,
            (0x18, 2) => set(&|q| q.size = word),
            (0x1a, 2) => {
                let (queue, vector) = (usize::from(queue()), self.vector(word));
                if let Some(v) = self.lines.lock().queue_vectors.get_mut(queue) {
                    *v = vector;
                }
            }
            (0x1c, 2) if word == 1 => set(&|q| q.enabled = true),
            (0x20 | 0x28 | 0x30, 8) => {
                self.common_write(offset, &data[..4]);
                self.common_write(offset + 4, &data[4..]);
            }
            (0x20 | 0x24 | 0x28 | 0x2c | 0x30 | 0x34, 4) => set(&|q| {
                let address = match offset & !7 {
                    0x20 => &mut q.desc,
                    0x28 => &mut q.driver,
                    _ => &mut q.device,
                };
                let shift = (offset & 4) * 8;
                *address &= !(0xffff_ffff << shift);
                *address |= u64::from(double) << shift;
            }),
            _ => {}
        }
    }

    /// A vector that does not exist reads back as none, which is how the driver learns of it.
    fn vector(&self, vector: u16) -> u16 {
        match vector <= self.transport.queue_count() {
            true => vector,
            false => NO_VECTOR,
        }
    }

    fn set_status(&self, value: u8) {
        self.transport.set_status(value);
        if value == 0 {
            self.lines.reset();
            *self.selected() = Selected::default();
        }
    }

    /// Which access the window in configuration space stands for: offset in the BAR and length.
    fn window_access(&self) -> Option<(u64, usize)> {
        let mut cap = [0; 16];
        self.lines.endpoint.config_read(self.window, &mut cap);
        let double =
            |at: usize| u32::from_le_bytes([cap[at], cap[at + 1], cap[at + 2], cap[at + 3]]);
        let (bar, offset, len) = (cap[4], u64::from(double(8)), double(12));
        let legal = usize::from(bar) == BAR
            && matches!(len, 1 | 2 | 4)
            && offset % u64::from(len) == 0
            && offset + u64::from(len) <= BAR_SIZE;
        legal.then_some((offset, len as usize))
    }
}

impl PciDevice for VirtioPci {
    fn endpoint(&self) -> &Endpoint {
        &self.lines.endpoint
    }

    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        match offset {
            COMMON..ISR => crate::read_config(&self.common(), offset - COMMON, data),
            ISR..DEVICE => {
                data.fill(0);
                if offset == ISR {
                    data[0] = self.lines.take_isr();
                }
            }
            DEVICE..NOTIFY => self.transport.device().config_read(offset - DEVICE, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        const NOTIFY_END: u64 = NOTIFY + NOTIFY_LEN;
        match offset {
            COMMON..ISR => self.common_write(offset - COMMON, data),
            DEVICE..NOTIFY => self.transport.device().config_write(offset - DEVICE, data),
            NOTIFY..NOTIFY_END => {
                let queue = (offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
                self.transport.notify(queue as u16);
            }
            _ => {}
        }
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lines.endpoint.config_read(offset, data);
        if offset == self.window + 16
            && let Some((at, len)) = self.window_access()
        {
            let mut value = [0; 4];
            bar_read(self, BAR, at, &mut value[..len]);
            let n = data.len().min(len);
            data[..n].copy_from_slice(&value[..n]);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.lines.endpoint.config_write(offset, data);
        if offset == self.window + 16
            && let Some((at, len)) = self.window_access()
            && let Some(data) = data.get(..len)
        {
            bar_write(self, BAR, at, data);
        }
        self.transport.set_dma(self.lines.endpoint.bus_master());
    }
}

impl Device for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }

    fn reset(&self) {
        self.transport.reset();
        self.transport.set_dma(false);
        self.lines.reset();
        self.lines.endpoint.reset();
        *self.selected() = Selected::default();
    }

    fn pause(&self) {
        self.transport.pause();
    }

    fn resume(&self) {
        self.transport.resume();
    }

    fn save(&self) -> Payload {
        let Selected {
            device_features,
            driver_features,
            queue,
        } = *self.selected();
        let LinesState {
            isr,
            config_vector,
            queue_vectors,
        } = self.lines.lock().clone();
        let state = saved::V1 {
            endpoint: self.lines.endpoint.save(),
            device_features,
            driver_features,
            queue,
            isr,
            config_vector,
            queue_vectors,
            transport: self.transport.save(),
        };
        Payload::encode(KIND, 1, &state)
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved::V1 {
            endpoint,
            device_features,
            driver_features,
            queue,
            isr,
            config_vector,
            queue_vectors,
            transport,
        } = payload.decode(KIND, 1)?;
        let damaged = |why: &str| RestoreError::Damaged {
            kind: KIND,
            why: why.into(),
        };
        let vectors = queue_vectors.iter().chain([&config_vector]);
        if queue_vectors.len() != usize::from(self.transport.queue_count())
            || !vectors.into_iter().all(|&v| self.vector(v) == v)
        {
            return Err(damaged("the vectors are of another device"));
        }
        self.transport.restore(&transport)?;
        self.lines.endpoint.restore(&endpoint).map_err(damaged)?;
        *self.lines.lock() = LinesState {
            isr,
            config_vector,
            queue_vectors,
        };
        *self.selected() = Selected {
            device_features,
            driver_features,
            queue,
        };
        self.transport.set_dma(self.lines.endpoint.bus_master());
        Ok(())
    }
}

mod saved {
    use lodger_pci::SavedEndpoint;
    use serde::{Deserialize, Serialize};

    use crate::transport::SavedTransport;

    #[derive(Serialize, Deserialize)]
    pub struct V1 {
        pub endpoint: SavedEndpoint,
        pub device_features: u32,
        pub driver_features: u32,
        pub queue: u16,
        pub isr: u8,
        pub config_vector: u16,
        pub queue_vectors: Vec<u16>,
        pub transport: SavedTransport,
    }
}
