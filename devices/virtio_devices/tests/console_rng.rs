//! The console and the entropy device as their drivers see them.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use lodger_clock::InputPort;
use lodger_device_model::{Device, assert_round_trip};
use lodger_virtio::driver::{Driver, DriverQueue, Machine};
use lodger_virtio::{F_VERSION_1, VirtioPci};
use lodger_virtio_devices::{Console, ConsoleSpec, RngSpec};

const RX: u64 = 0x1_0000;
const TX: u64 = 0x2_0000;
const DATA: u64 = 0x4_0000;
const F_SIZE: u64 = 1;

struct Rig {
    d: Driver,
    rx: DriverQueue,
    tx: DriverQueue,
    console: Arc<Console>,
    device: Arc<VirtioPci>,
    printed: Arc<Mutex<Vec<u8>>>,
}

impl Rig {
    fn new() -> Rig {
        let machine = Machine::new();
        let printed = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&printed);
        let spec = ConsoleSpec {
            columns: 80,
            rows: 25,
        };
        let output = Box::new(move |bytes: &[u8]| sink.lock().unwrap().extend(bytes));
        let (device, console) = spec.build("hvc0", &machine.wiring(), output).unwrap();
        let d = machine.plug(&device);
        d.enable_msix();
        Rig {
            rx: d.queue(0, 8, RX),
            tx: d.queue(1, 8, TX),
            d,
            console,
            device,
            printed,
        }
    }

    fn ready(mut self) -> Rig {
        assert_eq!(self.d.negotiate(F_VERSION_1 | F_SIZE), 11);
        self.rx = self.d.queue(0, 8, RX);
        self.tx = self.d.queue(1, 8, TX);
        self.d.write(self.d.common + 0x10, &[2, 0]);
        self.d.ready();
        self
    }

    /// Offers a buffer of `len` bytes for input; returns what comes.
    fn receive(&mut self, len: u32) -> Vec<u8> {
        self.rx.submit(&self.d, &[(DATA, len, true)]);
        self.received()
    }

    fn received(&mut self) -> Vec<u8> {
        let (_, len) = self.rx.wait(&self.d);
        let mut bytes = vec![0; len as usize];
        self.d.machine.memory.read(DATA, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn what_the_guest_prints_comes_out_in_order() {
    let mut rig = Rig::new().ready();
    let text: Vec<u8> = (0..10_000_u32).map(|n| (n % 251) as u8).collect();
    rig.d.machine.memory.write(DATA, &text).unwrap();
    rig.tx
        .submit(&rig.d, &[(DATA, 5, false), (DATA + 5, 9_000, false)]);
    rig.tx.submit(&rig.d, &[(DATA + 9_005, 995, false)]);
    assert_eq!((rig.tx.wait(&rig.d), rig.tx.wait(&rig.d)), ((0, 0), (2, 0)));
    assert_eq!(*rig.printed.lock().unwrap(), text);
    rig.d.machine.inbox.wait_for(0x41);
}

#[test]
fn input_waits_for_the_driver_and_its_buffers() {
    let rig = Rig::new();
    assert_eq!(rig.console.offer(b"typed ahead"), 11);
    let mut rig = rig.ready();
    assert_eq!(rig.receive(5), b"typed");
    assert_eq!(rig.receive(100), b" ahead");
    rig.rx.submit(&rig.d, &[(DATA, 64, true)]);
    assert_eq!(rig.console.offer(b"later"), 5);
    assert_eq!(rig.received(), b"later");
    rig.d.machine.inbox.wait_for(0x40);
}

#[test]
fn input_is_bounded_and_asked_for_again() {
    let mut rig = Rig::new().ready();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    rig.console.on_room(Box::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    }));
    let mut taken = 0;
    while taken < 1 << 20 {
        match rig.console.offer(&[b'x'; 1000]) {
            0 => break,
            n => taken += n,
        }
    }
    assert!((1000..1 << 16).contains(&taken), "{taken}");
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    assert_eq!(rig.receive(10), [b'x'; 10]);
    while asked.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    assert_eq!(rig.console.offer(&[b'y'; 1000]), 10);
}

#[test]
fn a_resize_is_told() {
    let rig = Rig::new().ready();
    let config = || rig.d.read32(rig.d.config);
    let generation = || rig.d.read::<1>(rig.d.common + 0x15)[0];
    assert_eq!(config(), 25 << 16 | 80);
    let before = generation();
    rig.console.resize(132, 50);
    rig.d.machine.inbox.wait_for(0x42);
    assert_eq!(config(), 50 << 16 | 132);
    assert_ne!(generation(), before);
    rig.console.resize(132, 50);
    assert!(rig.d.machine.inbox.take().is_empty(), "nothing has changed");
    rig.d.set_status(0);
    rig.console.resize(80, 25);
    assert!(rig.d.machine.inbox.take().is_empty(), "nobody listens");
    assert_eq!(rig.d.read::<1>(rig.d.isr), [0]);
}

#[test]
fn a_paused_console_takes_nothing_and_keeps_what_it_has() {
    let mut rig = Rig::new().ready();
    assert_eq!(rig.console.offer(b"kept"), 4);
    rig.console.resize(100, 40);
    rig.device.pause();
    assert_eq!(rig.console.offer(b"refused"), 0);
    assert_round_trip(&*rig.device);
    rig.device.resume();
    assert_eq!(rig.receive(100), b"kept");
    assert_eq!(rig.d.read32(rig.d.config), 40 << 16 | 100);
}

#[test]
fn odd_buffers_do_no_harm() {
    let mut rig = Rig::new().ready();
    assert_eq!(rig.console.offer(b"abc"), 3);
    rig.rx.submit(&rig.d, &[(DATA, 8, false)]);
    assert_eq!(rig.rx.wait(&rig.d).1, 0, "nothing to write into");
    rig.tx.submit(&rig.d, &[(DATA, 8, true)]);
    assert_eq!(rig.tx.wait(&rig.d).1, 0, "nothing to print");
    rig.d.write(rig.d.config, &[9; 8]);
    assert_eq!(rig.d.read32(rig.d.config), 25 << 16 | 80);
    assert_eq!(rig.receive(100), b"abc");
    rig.d.assert_working();
}

#[test]
fn entropy_fills_the_buffers() {
    let machine = Machine::new();
    let next = AtomicU8::new(1);
    let entropy = Arc::new(move |bytes: &mut [u8]| {
        for b in bytes {
            *b = next.fetch_add(1, Ordering::Relaxed);
        }
    });
    let device = (RngSpec {}).build("rng0", &machine.wiring(), entropy);
    let device = device.unwrap();
    let d = machine.plug(&device);
    assert_eq!(d.pci(0) >> 16, 0x1044);
    d.negotiate(F_VERSION_1);
    let mut q = d.queue(0, 8, RX);
    d.ready();
    q.submit(&d, &[(DATA, 10, true), (DATA + 0x100, 10_000, true)]);
    assert_eq!(q.wait(&d).1, 10_010);
    let mut bytes = vec![0; 10_000];
    d.machine.memory.read(DATA + 0x100, &mut bytes).unwrap();
    assert!((0..).zip(&bytes).all(|(n, &b)| b == (n + 11) as u8));
    q.submit(&d, &[(DATA, 1 << 20, true)]);
    assert_eq!(q.wait(&d).1, 64 << 10, "no more than that at once");
    q.submit(&d, &[(DATA, 8, false)]);
    assert_eq!(q.wait(&d).1, 0);
    device.pause();
    assert_round_trip(&*device);
    device.resume();
    q.submit(&d, &[(DATA, 3, true)]);
    assert_eq!(q.wait(&d).1, 3);
}
