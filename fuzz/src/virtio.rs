//! A virtio device whose driver does what the input says.

use std::io;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use lodger_block::BlockBackend;
use lodger_clock::InputPort;
use lodger_device_model::{Device, Payload, RestoreError, assert_round_trip};
use lodger_net::{NetBackend, Offloads};
use lodger_virtio::driver::{Driver, DriverQueue, INDIRECT, Machine, NEXT, RAM, WRITE};
use lodger_virtio::{
    Activation, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Queue, VirtioDevice, VirtioPci,
    read_config,
};
use lodger_virtio_devices::{BalloonSpec, Blk, Limits, Net, RngSpec};

pub(crate) const RINGS: u64 = 0x1_0000;
pub(crate) const BUFFERS: u64 = 0x2_0000;
pub(crate) const QUEUE_SIZE: u16 = 8;
/// Flush, cache mode, discard, write zeroes.
const BLK_FEATURES: u64 = 1 << 9 | 1 << 11 | 1 << 13 | 1 << 14;
/// Statistics, deflation when memory is short, reporting.
const BALLOON_FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 5;
/// Received packets over several buffers.
const NET_F_MRG_RXBUF: u64 = 1 << 15;

/// Bytes as they are consumed; zeroes after the end.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl Input<'_> {
    pub(crate) fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&byte, rest)) => {
                self.0 = rest;
                byte
            }
            None => 0,
        }
    }

    pub(crate) fn number(&mut self) -> u64 {
        u64::from_le_bytes([(); 8].map(|()| self.byte()))
    }

    /// A guest-physical address, most likely near something.
    fn address(&mut self) -> u64 {
        let near = u64::from(self.byte());
        match self.byte() % 8 {
            0 => RINGS + near,
            1 => RINGS + 0x4000 + near,
            2 => RAM - near,
            3 => RAM / 2 - near,
            4 => u64::MAX - near,
            5 => self.number(),
            _ => BUFFERS + near * 64,
        }
    }

    pub(crate) fn len(&mut self) -> u32 {
        match self.byte() {
            n @ 0..=32 => n.into(),
            n @ 33..=200 => u32::from(n - 32) * 512,
            n @ 201..=250 => (u32::from(n) - 200) * 16,
            _ => self.number() as u32,
        }
    }
}

/// Does what the input says with one queue of a device, until the input is used up.
pub(crate) fn misuse(d: &Driver, device: &VirtioPci, queue: u16, features: u64, input: &mut Input) {
    let m = &d.machine.memory;
    let start = || {
        d.set_pci(4, &[6, 0]);
        d.negotiate(features | F_VERSION_1);
        let rings = d.queue(queue, QUEUE_SIZE, RINGS);
        d.ready();
        rings
    };
    let mut q = start();
    while !input.0.is_empty() {
        match input.byte() % 16 {
            0..5 => {
                let table = match input.byte() % 4 {
                    0 => BUFFERS,
                    _ => q.desc,
                };
                let n = u16::from(input.byte() % 9);
                let flags = match input.byte() {
                    f @ 0..=200 => u16::from(f) & (NEXT | WRITE | INDIRECT),
                    f => u16::from(f) * 257,
                };
                let desc = (
                    input.address(),
                    input.len(),
                    flags,
                    u16::from(input.byte() % 10),
                );
                DriverQueue::put_desc(m, table, n, desc);
            }
            5..8 => {
                q.offer(m, u16::from(input.byte() % 9));
                d.notify(queue);
            }
            8 => {
                let index = u16::from(input.byte()) * 3;
                let ring = q.avail + 2;
                m.write(ring, &index.to_le_bytes()).expect("it is RAM");
            }
            9 => d.notify(input.byte().into()),
            10 => {
                let (register, value) = (u64::from(input.byte() % 0x40), input.number());
                let len = 1 << (input.byte() % 4);
                d.write(d.common + register, &value.to_le_bytes()[..len]);
            }
            11 => {
                let (register, value) = (u64::from(input.byte() % 64), input.number());
                let len = 1 << (input.byte() % 4);
                d.write(d.config + register, &value.to_le_bytes()[..len]);
            }
            12 => {
                // A request: some bytes at the start of a buffer.
                let at = BUFFERS + u64::from(input.byte()) * 64;
                let kind = [input.byte(), 0, 0, 0, 0, 0, 0, 0];
                let sector = match input.byte() {
                    255 => input.number(),
                    n => u64::from(n % 70),
                };
                m.write(at, &kind).expect("it is RAM");
                m.write(at + 8, &sector.to_le_bytes()).expect("it is RAM");
            }
            13 => {
                device.pause();
                assert_round_trip(device);
                device.resume();
            }
            14 => q = start(),
            _ => {
                d.set_pci(4, &[input.byte(), 0]);
                d.set_pci(4, &[6, 0]);
            }
        }
    }
}

/// After a reset the device must work as if nothing had happened: it answers `buffers` in this queue.
fn works(d: &Driver, queue: u16, features: u64, buffers: &[(u64, u32, bool)]) {
    d.set_pci(4, &[6, 0]);
    assert_eq!(d.negotiate(features | F_VERSION_1), 11);
    let mut q = d.queue(queue, QUEUE_SIZE, RINGS);
    d.ready();
    q.submit(d, buffers);
    q.wait(d);
    d.assert_working();
}

/// Copies the readable bytes of each chain to its writable ones, at once.
#[derive(Default)]
struct Echo(Mutex<Vec<Arc<Queue>>>);

impl VirtioDevice for Echo {
    fn device_type(&self) -> u16 {
        42
    }
    fn pci_class(&self) -> u32 {
        0xff_00_00
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_config(&[1, 2, 3], offset, data);
    }
    fn activate(&self, activation: Activation) {
        *self.0.lock().expect("no panic") = activation.queues;
    }
    fn notify(&self, queue: u16) {
        let queue = self
            .0
            .lock()
            .expect("no panic")
            .get(usize::from(queue))
            .cloned();
        while let Some(chain) = queue.as_ref().and_then(Queue::pop) {
            let mut data = vec![0; chain.readable_len().min(1 << 16) as usize];
            assert_eq!(chain.read_at(0, &mut data), data.len());
            let written = chain.write_at(0, &data);
            assert_eq!(written as u64, chain.writable_len().min(data.len() as u64));
            assert_eq!(chain.write_at(chain.writable_len(), &[1]), 0);
            chain.complete(written as u32);
        }
    }
    fn reset(&self) {
        self.0.lock().expect("no panic").clear();
    }
    fn save(&self) -> Payload {
        Payload::encode("echo", 1, &())
    }
    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        payload.decode("echo", 1)
    }
}

/// Rings and descriptors, with a device that answers at once.
pub fn virtio_queue(data: &[u8]) {
    let mut input = Input(data);
    let features = match input.byte() % 4 {
        0 => 0,
        1 => F_EVENT_IDX,
        2 => F_INDIRECT_DESC,
        _ => F_EVENT_IDX | F_INDIRECT_DESC,
    };
    let machine = Machine::new();
    let device = VirtioPci::new("echo", Arc::new(Echo::default()), &machine.wiring());
    let d = machine.plug(&device);
    misuse(&d, &device, 0, features, &mut input);
    works(
        &d,
        0,
        features,
        &[(BUFFERS, 8, false), (BUFFERS + 64, 8, true)],
    );
}

/// A disk in memory.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn with(&self, offset: u64, len: u64, f: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut bytes = self.0.lock().expect("no panic");
        f(&mut bytes[offset as usize..][..len as usize]);
        Ok(())
    }
}

impl BlockBackend for Memory {
    fn size_bytes(&self) -> u64 {
        64 * 512
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.with(offset, buf.len() as u64, |b| buf.copy_from_slice(b))
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.with(offset, buf.len() as u64, |b| b.copy_from_slice(buf))
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.with(offset, len, |b| b.fill(0xdd))
    }
    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        self.with(offset, len, |b| b.fill(0))
    }
}

/// Requests to a disk, answered by its threads.
pub fn virtio_blk(data: &[u8]) {
    let mut input = Input(data);
    let features = F_INDIRECT_DESC | BLK_FEATURES;
    let machine = Machine::new();
    let backend = Arc::new(Memory(Mutex::new(vec![0; 64 * 512])));
    let blk = Blk::new("vda", backend, "fuzz", 2, Limits::default()).expect("the host has threads");
    let device = VirtioPci::new("vda", blk, &machine.wiring());
    let d = machine.plug(&device);
    misuse(&d, &device, 0, features, &mut input);
    d.set_status(0);
    (d.machine.memory.write(BUFFERS, &[0; 16])).expect("it is RAM");
    let buffers = [
        (BUFFERS, 16, false),
        (BUFFERS + 0x1000, 512, true),
        (BUFFERS + 64, 1, true),
    ];
    works(&d, 0, features, &buffers);
    let mut status = [9];
    (d.machine.memory.read(BUFFERS + 64, &mut status)).expect("it is RAM");
    assert_eq!(status, [0]);
}

/// The memory balloon, misused: its queue to inflate, or that for free pages.
pub fn virtio_balloon(data: &[u8]) {
    let mut input = Input(data);
    let features = F_INDIRECT_DESC | BALLOON_FEATURES;
    let queue = u16::from(input.byte() % 4);
    let machine = Machine::new();
    let spec = BalloonSpec {
        start: Some(RAM / 2),
    };
    let (device, balloon) =
        (spec.build("balloon", &machine.wiring())).expect("the host has threads");
    let d = machine.plug(&device);
    misuse(&d, &device, queue, features, &mut input);
    assert!(balloon.status(Duration::ZERO).actual <= RAM);
    d.set_status(0);
    // Pages that it can do without: not those of its rings.
    (d.machine.memory.write(BUFFERS, &[0; 16])).expect("it is RAM");
    works(&d, 0, features, &[(BUFFERS, 16, false)]);
}

/// A network that gives back what it gets, and a packet whenever there is room.
#[derive(Default)]
struct Mirror(Mutex<Option<Weak<dyn InputPort>>>);

impl Mirror {
    fn offer(&self, packet: &[u8]) {
        let card = self.0.lock().expect("no panic").clone();
        if let Some(card) = card.and_then(|card| card.upgrade()) {
            assert!([0, packet.len()].contains(&card.offer(packet)));
        }
    }
}

impl NetBackend for Mirror {
    fn connect(&self, card: Weak<dyn InputPort>) {
        *self.0.lock().expect("no panic") = Some(card);
    }
    fn start(&self, _offloads: Offloads) {}
    fn stop(&self) {}
    fn send(&self, packet: &[u8]) {
        self.offer(packet);
    }
    fn flush(&self) {}
    fn room(&self) {
        self.offer(&[1; 700]);
    }
}

/// A network card: one of its queues at a time.
pub fn virtio_net(data: &[u8]) {
    let mut input = Input(data);
    let (queue, features) = match input.byte() {
        b if b & 2 == 0 => (u16::from(b & 1), F_INDIRECT_DESC),
        b => (
            u16::from(b & 1),
            F_INDIRECT_DESC | F_EVENT_IDX | NET_F_MRG_RXBUF,
        ),
    };
    let machine = Machine::new();
    let net = Net::new("eth0", [2; 6], Arc::new(Mirror::default()));
    let net = net.expect("the host has threads");
    let device = VirtioPci::new("eth0", net, &machine.wiring());
    let d = machine.plug(&device);
    misuse(&d, &device, queue, features, &mut input);
    let buffers = [(BUFFERS, 12, queue == 0), (BUFFERS + 64, 1000, queue == 0)];
    works(&d, queue, features, &buffers);
}

/// Configuration space and the registers behind the BAR.
pub fn pci(data: &[u8]) {
    let mut input = Input(data);
    let machine = Machine::new();
    let entropy = Arc::new(|bytes: &mut [u8]| bytes.fill(7));
    let device = (RngSpec {}).build("rng", &machine.wiring(), entropy);
    let device = device.expect("the host has threads");
    let d = machine.plug(&device);
    while !input.0.is_empty() {
        let (what, offset) = (input.byte(), input.byte());
        let mut value = input.number().to_le_bytes();
        let len = 1 << (what >> 4 & 3);
        let register = d.common + u64::from(offset) + (u64::from(what >> 6) << 12);
        match what % 8 {
            0..2 => d.set_pci(offset.into(), &value[..len]),
            2 => drop(d.pci(offset.into())),
            3..5 => d.write(register, &value[..len]),
            5 => d.machine.space.mmio.read(register, &mut value[..len]),
            6 => d.write(d.common + 0x4000 + u64::from(offset), &value[..len]),
            _ => {
                let (address, buses) = (u64::from_le_bytes(value), &d.machine.space);
                buses.mmio.read(address, &mut value[..len]);
                buses.ports.write(address & 0xffff, &value[..len.min(4)]);
            }
        }
    }
    device.pause();
    assert_round_trip(&*device);
    device.resume();
    device.reset();
    d.machine.assign();
    works(&d, 0, 0, &[(BUFFERS, 8, true)]);
}
