//! The transport core: feature negotiation, device status, queue set-up, notifications. Sections 2.1, 2.2, 3.1 and 4.
//!
//! A particular transport (PCI) gives these registers their addresses and delivers the interrupts.
//!
//! Locks, outermost first: `lifecycle` (whoever changes the status), then each of the others alone. Threads that complete
//! chains take none but the interrupt's, so a reset can wait for them.

use std::fmt::Arguments;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use lodger_device_model::{GuestMistakes, Payload, RestoreError};
use lodger_guest_memory::GuestMemory;
use serde::{Deserialize, Serialize};
use virtio_queue::{QueueState, QueueT};

use crate::device::{Activation, ConfigChange, VirtioDevice};
use crate::queue::{Host, Positions, Queue};
use crate::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};

/// Status: the driver is ready.
pub(crate) const DRIVER_OK: u8 = 4;
/// Status: the driver has accepted the features.
pub(crate) const FEATURES_OK: u8 = 8;
/// Status: the driver has made a mistake that only a reset cures.
pub(crate) const NEEDS_RESET: u8 = 64;

/// How a transport interrupts the driver.
pub(crate) trait Interrupts: Send + Sync {
    /// Queue `index` has used buffers.
    fn queue(&self, index: u16);
    /// The configuration, or the NEEDS_RESET status, has changed. Under the lock that a reset of the interrupts takes, `wanted`
    /// tells whether there still is a driver.
    fn config(&self, wanted: &dyn Fn() -> bool);
}

/// What the driver sets up of one queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QueueRegisters {
    /// In descriptors.
    pub size: u16,
    pub enabled: bool,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub driver: u64,
    /// Used ring.
    pub device: u64,
}

/// See the module documentation.
pub(crate) struct Transport {
    // Fixed configuration.
    device: Arc<dyn VirtioDevice>,
    memory: GuestMemory,
    offered: u64,
    // Runtime glue.
    link: Arc<Link>,
    lifecycle: Mutex<()>,
    // Volatile state; the status is in `link`.
    registers: Mutex<Registers>,
    /// The queues of the active device.
    active: Mutex<Option<Vec<Arc<Queue>>>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    driver_features: u64,
    queues: Vec<QueueRegisters>,
}

/// The volatile state of a [`Transport`] and of its device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedTransport {
    status: u8,
    registers: Registers,
    /// Of every queue, if the device is active.
    positions: Option<Vec<Positions>>,
    device: Payload,
}

/// What the queues need of the transport.
struct Link {
    name: String,
    interrupts: Arc<dyn Interrupts>,
    status: AtomicU8,
    /// Whether the bus lets the device access memory.
    dma: AtomicBool,
    mistakes: GuestMistakes,
}

impl Host for Link {
    fn running(&self) -> bool {
        self.dma.load(Ordering::Acquire) && self.status.load(Ordering::Acquire) & NEEDS_RESET == 0
    }

    fn used(&self, index: u16) {
        self.interrupts.queue(index);
    }

    fn config_changed(&self) {
        let ready = || self.status.load(Ordering::Acquire) & DRIVER_OK != 0;
        self.interrupts.config(&ready);
    }

    fn broken(&self, index: u16, why: Arguments) {
        if self.status.fetch_or(NEEDS_RESET, Ordering::AcqRel) & NEEDS_RESET == 0 {
            let what = format_args!("queue {index}: {why}");
            self.mistakes.note(&self.name, what);
            self.config_changed();
        }
    }
}

impl Transport {
    pub(crate) fn new(
        name: &str,
        device: Arc<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupts: Arc<dyn Interrupts>,
    ) -> Transport {
        let offered = device.features() | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
        let registers = Mutex::new(Registers::new(&*device));
        Transport {
            device,
            memory,
            offered,
            link: Arc::new(Link {
                name: name.into(),
                interrupts,
                status: AtomicU8::new(0),
                dma: AtomicBool::new(false),
                mistakes: GuestMistakes::default(),
            }),
            lifecycle: Mutex::new(()),
            registers,
            active: Mutex::new(None),
        }
    }

    pub(crate) fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().expect("register code panicked")
    }

    fn lifecycle(&self) -> MutexGuard<'_, ()> {
        self.lifecycle.lock().expect("the device panicked")
    }

    fn active(&self) -> MutexGuard<'_, Option<Vec<Arc<Queue>>>> {
        self.active.lock().expect("register code panicked")
    }

    fn mistake(&self, what: Arguments) {
        self.link.mistakes.note(&self.link.name, what);
    }

    /// The 32 offered feature bits of number `select`.
    pub(crate) fn device_features(&self, select: u32) -> u32 {
        word(self.offered, select)
    }

    /// The 32 accepted feature bits of number `select`.
    pub(crate) fn driver_features(&self, select: u32) -> u32 {
        word(self.registers().driver_features, select)
    }

    /// The driver accepts features; fixed once it has said FEATURES_OK.
    pub(crate) fn set_driver_features(&self, select: u32, bits: u32) {
        if select < 2 && self.status() & FEATURES_OK == 0 {
            let shift = select * 32;
            let mut r = self.registers();
            r.driver_features &= !(0xffff_ffff << shift);
            r.driver_features |= u64::from(bits) << shift;
        }
    }

    pub(crate) fn queue_count(&self) -> u16 {
        self.device.queue_sizes().len() as u16
    }

    /// The registers of queue `index`, if it exists.
    pub(crate) fn queue(&self, index: u16) -> Option<QueueRegisters> {
        self.registers().queues.get(usize::from(index)).cloned()
    }

    /// The driver sets up queue `index`, which it can until it has enabled it.
    pub(crate) fn set_queue(&self, index: u16, change: impl FnOnce(&mut QueueRegisters)) {
        if self.status() & DRIVER_OK != 0 {
            return self.mistake(format_args!("queue {index} is set up too late"));
        }
        let largest = self.device.queue_sizes().get(usize::from(index)).copied();
        let mut r = self.registers();
        let (Some(q), Some(largest)) = (r.queues.get_mut(usize::from(index)), largest) else {
            return;
        };
        let mut new = q.clone();
        change(&mut new);
        if !q.enabled && new.size.is_power_of_two() && new.size <= largest {
            *q = new;
        } else {
            drop(r);
            self.mistake(format_args!("queue {index} cannot be set up like this"));
        }
    }

    pub(crate) fn status(&self) -> u8 {
        self.link.status.load(Ordering::Acquire)
    }

    /// The driver writes the device status. 0 resets; it returns when the device has let go of all buffers.
    pub(crate) fn set_status(&self, value: u8) {
        let held = self.lifecycle();
        if value == 0 {
            return self.reset_device();
        }
        let old = self.status();
        let mut new = value & !old & !NEEDS_RESET;
        if new & FEATURES_OK != 0 {
            let accepted = self.registers().driver_features;
            if accepted & !self.offered != 0 || accepted & F_VERSION_1 == 0 {
                self.mistake(format_args!("features {accepted:#x} are not on offer"));
                new &= !FEATURES_OK;
            }
        }
        if (old | new) & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        self.link.status.fetch_or(new, Ordering::AcqRel);
        if new & DRIVER_OK != 0 {
            match self.activate(None) {
                Ok(queues) => queues.iter().for_each(|q| q.start()),
                Err(index) => {
                    let why = format_args!("its rings are not RAM, or not aligned");
                    self.link.broken(index, why);
                }
            }
        }
        drop(held);
        if new & DRIVER_OK != 0 {
            self.notify_all();
        }
    }

    /// Makes the queues, which stand still, and hands them to the device. The error is the number of a bad queue.
    fn activate(&self, positions: Option<&[Positions]>) -> Result<Vec<Arc<Queue>>, u16> {
        let registers = self.registers().clone();
        let features = registers.driver_features;
        let mut queues = Vec::new();
        for (i, q) in (0..).zip(&registers.queues) {
            let (next_avail, next_used) = positions.map_or((0, 0), |p| p[usize::from(i)]);
            let ring = virtio_queue::Queue::try_from(QueueState {
                max_size: self.device.queue_sizes()[usize::from(i)],
                next_avail,
                next_used,
                event_idx_enabled: features & F_EVENT_IDX != 0,
                size: q.size,
                ready: q.enabled,
                desc_table: q.desc,
                avail_ring: q.driver,
                used_ring: q.device,
            })
            .map_err(|_| i)?;
            if q.enabled && !ring.is_valid(self.memory.inner()) {
                return Err(i);
            }
            let host = Arc::clone(&self.link) as Arc<dyn Host>;
            queues.push(Queue::new(i, ring, self.memory.clone(), host));
        }
        *self.active() = Some(queues.clone());
        self.device.activate(Activation {
            features,
            queues: queues.clone(),
            config_change: ConfigChange(self.link.clone()),
        });
        Ok(queues)
    }

    /// The driver notifies of queue `index`.
    pub(crate) fn notify(&self, index: u16) {
        if index < self.queue_count() && self.link.running() && self.active().is_some() {
            self.device.notify(index);
        }
    }

    fn notify_all(&self) {
        (0..self.queue_count()).for_each(|i| self.notify(i));
    }

    /// Whether the bus lets the device access memory. What the driver has offered meanwhile is looked at then.
    pub(crate) fn set_dma(&self, allowed: bool) {
        if self.link.dma.swap(allowed, Ordering::AcqRel) != allowed && allowed {
            self.notify_all();
        }
    }

    /// Back to the state after power-on, as far as virtio goes.
    pub(crate) fn reset(&self) {
        let _held = self.lifecycle();
        self.reset_device();
    }

    /// Under the lifecycle lock.
    fn reset_device(&self) {
        let queues = self.active().take();
        queues.iter().flatten().for_each(|q| q.stop());
        self.device.reset();
        *self.registers() = Registers::new(&*self.device);
        self.link.status.store(0, Ordering::Release);
    }

    pub(crate) fn pause(&self) {
        let _held = self.lifecycle();
        let queues = self.active().clone();
        queues.iter().flatten().for_each(|q| q.stop());
        self.device.pause();
    }

    pub(crate) fn resume(&self) {
        let held = self.lifecycle();
        let queues = self.active().clone();
        queues.iter().flatten().for_each(|q| q.start());
        self.device.resume();
        drop(held);
        self.notify_all();
    }

    pub(crate) fn save(&self) -> SavedTransport {
        let active = self.active().clone();
        SavedTransport {
            status: self.status(),
            registers: self.registers().clone(),
            positions: active.map(|queues| queues.iter().map(|q| q.positions()).collect()),
            device: self.device.save(),
        }
    }

    /// Takes a saved state; the queues stand still until `resume`. After an error the device is reset.
    pub(crate) fn restore(&self, saved: &SavedTransport) -> Result<(), RestoreError> {
        let _held = self.lifecycle();
        self.reset_device();
        let SavedTransport {
            status,
            registers,
            positions,
            device,
        } = saved;
        let damaged = |why: &str| RestoreError::Damaged {
            kind: "virtio",
            why: why.into(),
        };
        let sizes = self.device.queue_sizes();
        // What the driver asks for is checked when it says FEATURES_OK.
        let agreed = match status & FEATURES_OK {
            0 => 0,
            _ => registers.driver_features,
        };
        let fits = registers.queues.len() == sizes.len()
            && positions.as_ref().is_none_or(|p| p.len() == sizes.len())
            && (registers.queues.iter().zip(sizes))
                .all(|(q, &largest)| q.size.is_power_of_two() && q.size <= largest)
            && agreed & !self.offered == 0;
        if !fits {
            return Err(damaged("it is of a device with other queues or features"));
        }
        self.device.restore(device)?;
        *self.registers() = registers.clone();
        if let Some(p) = positions
            && self.activate(Some(p)).is_err()
        {
            self.reset_device();
            return Err(damaged("the rings are not in RAM"));
        }
        self.link.status.store(*status, Ordering::Release);
        Ok(())
    }
}

impl Registers {
    fn new(device: &dyn VirtioDevice) -> Registers {
        let queue = |&size| QueueRegisters {
            size,
            enabled: false,
            desc: 0,
            driver: 0,
            device: 0,
        };
        Registers {
            driver_features: 0,
            queues: device.queue_sizes().iter().map(queue).collect(),
        }
    }
}

/// 32-bit word `select` of `bits`.
fn word(bits: u64, select: u32) -> u32 {
    match select {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}
