//! The guest's side of virtio over PCI: a machine with RAM, a bus and one device, and a driver for it.
//!
//! For tests and fuzzing only (feature `driver`). Everything goes through the registers and rings that a guest sees; the methods
//! panic where a correct device cannot fail.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use lodger_address_space::AddressSpace;
use lodger_device_model::{IrqLine, IrqSink, Msi, MsiTarget};
use lodger_guest_memory::{GuestMemory, RamRange};
use lodger_pci::{COMMAND, FunctionAddress, PciBus, Resources};

use crate::{VirtioPci, Wiring};

/// RAM of the machine in bytes, from address 0.
pub const RAM: u64 = 4 << 20;
/// A descriptor's flag: another one follows.
pub const NEXT: u16 = 1;
/// A descriptor's flag: the device writes.
pub const WRITE: u16 = 2;
/// A descriptor's flag: it refers to a table of descriptors.
pub const INDIRECT: u16 = 4;
/// How long a device may take before it counts as hung.
const HUNG: Duration = Duration::from_secs(20);

const FUNCTION: FunctionAddress = FunctionAddress {
    bus: 0,
    device: 1,
    function: 0,
};

/// Interrupts that have arrived.
#[derive(Default)]
pub struct Inbox {
    messages: Mutex<Vec<u32>>,
    pin: Mutex<bool>,
    arrived: Condvar,
}

impl MsiTarget for Inbox {
    fn send(&self, msi: Msi) {
        self.messages.lock().unwrap().push(msi.data);
        self.arrived.notify_all();
    }
}

impl IrqSink for Inbox {
    fn set(&self, _line: u32, level: bool) {
        *self.pin.lock().unwrap() = level;
    }
    fn import(&self, line: u32, level: bool) {
        self.set(line, level);
    }
}

impl Inbox {
    /// Takes the data of the messages that have arrived.
    pub fn take(&self) -> Vec<u32> {
        std::mem::take(&mut *self.messages.lock().unwrap())
    }

    /// Waits for a message with this data, and takes it and those before it.
    pub fn wait_for(&self, data: u32) {
        let mut messages = self.messages.lock().unwrap();
        loop {
            if let Some(at) = messages.iter().position(|&d| d == data) {
                messages.drain(..=at);
                return;
            }
            let (held, timeout) = self.arrived.wait_timeout(messages, HUNG).unwrap();
            assert!(!timeout.timed_out(), "message {data:#x} does not come");
            messages = held;
        }
    }

    /// The level of the interrupt line.
    pub fn pin(&self) -> bool {
        *self.pin.lock().unwrap()
    }
}

/// A machine with one virtio device at 0:1.0, its BAR assigned.
pub struct Machine {
    /// The buses of the machine.
    pub space: Arc<AddressSpace>,
    /// The PCI bus.
    pub bus: Arc<PciBus>,
    /// RAM.
    pub memory: GuestMemory,
    /// Where interrupts arrive.
    pub inbox: Arc<Inbox>,
}

impl Machine {
    /// RAM of [`RAM`] bytes with a hole of 64 KiB in the middle, and an empty bus.
    pub fn new() -> Machine {
        let space = Arc::new(AddressSpace::default());
        let inbox = Arc::new(Inbox::default());
        let lines = [0, 1, 2, 3].map(|l| IrqLine::new(inbox.clone(), l));
        let ranges = [(0, RAM / 2), (RAM / 2 + 0x1_0000, RAM / 2 - 0x1_0000)];
        let ranges = ranges.map(|(start, len)| RamRange { start, len });
        Machine {
            bus: PciBus::new(&space, lines),
            space,
            memory: GuestMemory::new(&ranges).unwrap(),
            inbox,
        }
    }

    /// What a device's spec is built with.
    pub fn wiring(&self) -> Wiring {
        Wiring {
            memory: self.memory.clone(),
            msi: self.inbox.clone(),
        }
    }

    /// Puts the device on the bus and returns its driver. Bus mastering is on, MSI-X is off.
    pub fn plug(self, device: &Arc<VirtioPci>) -> Driver {
        self.bus.add(Some(1), device.clone()).unwrap();
        self.assign();
        let mut driver = Driver {
            machine: self,
            common: 0,
            isr: 0,
            config: 0,
            notify: 0,
            multiplier: 0,
        };
        driver.find();
        driver
    }

    /// Gives the device its addresses, as firmware does.
    pub fn assign(&self) {
        let resources = Resources {
            memory: 0xc000_0000..0xc100_0000,
            ports: 0xc000..0xd000,
            interrupts: [10, 10, 11, 11],
        };
        self.bus.assign_resources(&resources).unwrap();
        self.bus.config_write(FUNCTION, COMMAND, &[6, 0]);
    }
}

impl Default for Machine {
    fn default() -> Self {
        Machine::new()
    }
}

/// A driver of the device of a [`Machine`].
pub struct Driver {
    /// The machine.
    pub machine: Machine,
    /// Address of the common configuration structure.
    pub common: u64,
    /// Address of the interrupt status register.
    pub isr: u64,
    /// Address of the device configuration structure.
    pub config: u64,
    /// Address of the notification registers.
    pub notify: u64,
    multiplier: u64,
}

impl Driver {
    /// Walks the capabilities for the addresses of the structures.
    fn find(&mut self) {
        let mut at = self.pci(0x34) as u8;
        while at != 0 {
            let head = self.pci(at.into());
            if head as u8 == 9 {
                let bar = self.pci(u16::from(at) + 4) as u8;
                let low = self.pci(0x10 + u16::from(bar) * 4) & !15;
                let address = u64::from(low) + u64::from(self.pci(u16::from(at) + 8));
                match head >> 24 {
                    1 => self.common = address,
                    2 => {
                        self.notify = address;
                        self.multiplier = self.pci(u16::from(at) + 16).into();
                    }
                    3 => self.isr = address,
                    4 => self.config = address,
                    _ => {}
                }
            }
            at = (head >> 8) as u8;
        }
    }

    /// A double word of the device's PCI configuration space.
    pub fn pci(&self, offset: u16) -> u32 {
        let mut d = [0; 4];
        self.machine.bus.config_read(FUNCTION, offset, &mut d);
        u32::from_le_bytes(d)
    }

    /// Writes to the device's PCI configuration space.
    pub fn set_pci(&self, offset: u16, data: &[u8]) {
        self.machine.bus.config_write(FUNCTION, offset, data);
    }

    /// Reads `N` bytes of a register.
    pub fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut d = [0; N];
        self.machine.space.mmio.read(address, &mut d);
        d
    }

    /// Reads a 16-bit register.
    pub fn read16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.read(address))
    }

    /// Reads a 32-bit register.
    pub fn read32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.read(address))
    }

    /// Writes a register of the size of `data`.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.machine.space.mmio.write(address, data);
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.read::<1>(self.common + 0x14)[0]
    }

    /// Writes the device status.
    pub fn set_status(&self, status: u8) {
        self.write(self.common + 0x14, &[status]);
    }

    /// The features on offer.
    pub fn features(&self) -> u64 {
        let word = |n: u32| {
            self.write(self.common, &n.to_le_bytes());
            u64::from(self.read32(self.common + 4))
        };
        word(0) | word(1) << 32
    }

    /// Resets, acknowledges and accepts `features`. Returns the status: FEATURES_OK (8) is in it if the device agrees.
    pub fn negotiate(&self, features: u64) -> u8 {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(1 | 2);
        for n in [0_u32, 1] {
            self.write(self.common + 8, &n.to_le_bytes());
            let bits = (features >> (32 * n)) as u32;
            self.write(self.common + 12, &bits.to_le_bytes());
        }
        self.set_status(1 | 2 | 8);
        self.status()
    }

    /// The driver is ready.
    pub fn ready(&self) {
        self.set_status(1 | 2 | 4 | 8);
    }

    /// Enables MSI-X; vector n sends a message with data `0x40 + n`.
    pub fn enable_msix(&self) {
        let mut at = self.pci(0x34) as u8;
        while self.pci(at.into()) as u8 != 0x11 {
            at = (self.pci(at.into()) >> 8) as u8;
            assert_ne!(at, 0, "there is no MSI-X");
        }
        let at = u16::from(at);
        let vectors = (self.pci(at) >> 16 & 0x7ff) + 1;
        let table = u64::from(self.pci(0x10) & !15) + u64::from(self.pci(at + 4) & !7);
        for v in 0..vectors {
            for (word, value) in [0xfee0_0000, 0, 0x40 + v, 0].into_iter().enumerate() {
                let entry = table + u64::from(v) * 16 + word as u64 * 4;
                self.write(entry, &u32::to_le_bytes(value));
            }
        }
        self.set_pci(at + 2, &0x8000_u16.to_le_bytes());
    }

    /// Sets up queue `index` with `size` descriptors; its rings take 32 KiB of RAM from `at`, and its buffers what follows.
    /// Its MSI-X vector is `index`.
    pub fn queue(&self, index: u16, size: u16, at: u64) -> DriverQueue {
        let (desc, avail, used) = (at, at + 0x4000, at + 0x5000);
        self.machine.memory.write(at, &[0; 0x8000]).unwrap();
        self.set_queue(index, size, desc, avail, used);
        DriverQueue {
            index,
            size,
            desc,
            avail,
            used,
            next_desc: 0,
            next_avail: 0,
            last_used: 0,
        }
    }

    /// Writes the registers of queue `index` and enables it.
    pub fn set_queue(&self, index: u16, size: u16, desc: u64, avail: u64, used: u64) {
        self.write(self.common + 0x16, &index.to_le_bytes());
        self.write(self.common + 0x18, &size.to_le_bytes());
        self.write(self.common + 0x1a, &index.to_le_bytes());
        self.write(self.common + 0x20, &desc.to_le_bytes());
        self.write(self.common + 0x28, &avail.to_le_bytes());
        self.write(self.common + 0x30, &used.to_le_bytes());
        self.write(self.common + 0x1c, &[1, 0]);
    }

    /// Notifies of queue `index`.
    pub fn notify(&self, index: u16) {
        self.write(self.common + 0x16, &index.to_le_bytes());
        let register = u64::from(self.read16(self.common + 0x1e));
        self.write(
            self.notify + register * self.multiplier,
            &index.to_le_bytes(),
        );
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_broken(&self) {
        let start = Instant::now();
        while self.status() & 64 == 0 {
            assert!(
                start.elapsed() < HUNG,
                "the device goes on as if nothing were wrong"
            );
            std::thread::yield_now();
        }
    }

    /// The device's status is that of a working one.
    pub fn assert_working(&self) {
        assert_eq!(self.status() & (4 | 64), 4);
    }
}

/// One buffer of a chain: address, length, and whether the device writes it.
pub type Buffer = (u64, u32, bool);

/// The driver's side of a queue.
#[derive(Debug, Clone)]
pub struct DriverQueue {
    /// Its number.
    pub index: u16,
    /// In descriptors.
    pub size: u16,
    /// Address of the descriptor table.
    pub desc: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
    /// The descriptor that is used next.
    pub next_desc: u16,
    /// The available index.
    pub next_avail: u16,
    /// How much of the used ring has been looked at.
    pub last_used: u16,
}

impl DriverQueue {
    /// Writes descriptor `n` of the table at `table`.
    pub fn put_desc(
        m: &GuestMemory,
        table: u64,
        n: u16,
        (address, len, flags, next): (u64, u32, u16, u16),
    ) {
        let mut d = [0; 16];
        d[..8].copy_from_slice(&address.to_le_bytes());
        d[8..12].copy_from_slice(&len.to_le_bytes());
        d[12..14].copy_from_slice(&flags.to_le_bytes());
        d[14..].copy_from_slice(&next.to_le_bytes());
        m.write(table + u64::from(n) * 16, &d).unwrap();
    }

    /// Writes a chain into the descriptor table; returns its head.
    pub fn chain(&mut self, m: &GuestMemory, buffers: &[Buffer]) -> u16 {
        let head = self.next_desc;
        for (i, &(address, len, write)) in buffers.iter().enumerate() {
            let n = self.next_desc;
            self.next_desc = (n + 1) % self.size;
            let more = if i + 1 < buffers.len() { NEXT } else { 0 };
            let flags = if write { WRITE } else { 0 } | more;
            Self::put_desc(m, self.desc, n, (address, len, flags, self.next_desc));
        }
        head
    }

    /// Puts a head into the available ring, without notifying.
    pub fn offer(&mut self, m: &GuestMemory, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        m.write(self.avail + 4 + slot * 2, &head.to_le_bytes())
            .unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        m.write(self.avail + 2, &self.next_avail.to_le_bytes())
            .unwrap();
    }

    /// Offers a chain and notifies; returns its head.
    pub fn submit(&mut self, d: &Driver, buffers: &[Buffer]) -> u16 {
        let head = self.chain(&d.machine.memory, buffers);
        self.offer(&d.machine.memory, head);
        d.notify(self.index);
        head
    }

    /// The next used element, if there is one: head and bytes written.
    pub fn poll(&mut self, m: &GuestMemory) -> Option<(u16, u32)> {
        let mut index = [0; 2];
        m.read(self.used + 2, &mut index).unwrap();
        if u16::from_le_bytes(index) == self.last_used {
            return None;
        }
        let slot = self.used + 4 + u64::from(self.last_used % self.size) * 8;
        self.last_used = self.last_used.wrapping_add(1);
        Some((
            m.read_u32(slot).unwrap() as u16,
            m.read_u32(slot + 4).unwrap(),
        ))
    }

    /// Waits for the next used element.
    pub fn wait(&mut self, d: &Driver) -> (u16, u32) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.poll(&d.machine.memory) {
                return used;
            }
            assert!(start.elapsed() < HUNG, "the chain does not come back");
            std::thread::yield_now();
        }
    }

    /// Says from which used index on the driver wants interrupts (EVENT_IDX).
    pub fn set_used_event(&self, m: &GuestMemory, index: u16) {
        let at = self.avail + 4 + u64::from(self.size) * 2;
        m.write(at, &index.to_le_bytes()).unwrap();
    }
}
