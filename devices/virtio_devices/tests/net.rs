//! The network device as a driver sees it.

use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

use lodger_clock::InputPort;
use lodger_device_model::{Device, assert_round_trip};
use lodger_net::{HEADER_LEN, NetBackend, Offloads};
use lodger_virtio::driver::{Driver, DriverQueue, Machine};
use lodger_virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioPci};
use lodger_virtio_devices::Net;

const RX_RINGS: u64 = 0x1_0000;
const TX_RINGS: u64 = 0x2_0000;
const DATA: u64 = 0x4_0000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_MRG_RXBUF: u64 = 1 << 15;

/// A network that notes what happens to it.
#[derive(Default)]
struct Fake {
    card: Mutex<Option<Weak<dyn InputPort>>>,
    log: Mutex<Vec<Event>>,
    noted: Condvar,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Event {
    Start(Offloads),
    Stop,
    Sent(Vec<u8>),
    Flush,
    Room,
}

impl Fake {
    fn note(&self, event: Event) {
        self.log.lock().unwrap().push(event);
        self.noted.notify_all();
    }

    /// Waits until this has happened, and forgets it and what was before.
    #[track_caller]
    fn wait(&self, event: &Event) -> Vec<Event> {
        let mut log = self.log.lock().unwrap();
        loop {
            if let Some(at) = log.iter().position(|e| e == event) {
                return log.drain(..=at).collect();
            }
            let (held, timeout) = (self.noted)
                .wait_timeout(log, Duration::from_secs(20))
                .unwrap();
            assert!(!timeout.timed_out(), "{event:?} does not come: {held:?}");
            log = held;
        }
    }

    fn offer(&self, packet: &[u8]) -> usize {
        let card = self.card.lock().unwrap().clone().unwrap();
        card.upgrade().unwrap().offer(packet)
    }
}

impl NetBackend for Fake {
    fn connect(&self, card: Weak<dyn InputPort>) {
        *self.card.lock().unwrap() = Some(card);
    }
    fn start(&self, offloads: Offloads) {
        self.note(Event::Start(offloads));
    }
    fn stop(&self) {
        self.note(Event::Stop);
    }
    fn send(&self, packet: &[u8]) {
        self.note(Event::Sent(packet.to_vec()));
    }
    fn flush(&self) {
        self.note(Event::Flush);
    }
    fn room(&self) {
        self.note(Event::Room);
    }
}

struct Rig {
    net: Arc<Fake>,
    device: Arc<VirtioPci>,
    d: Driver,
    rx: DriverQueue,
    tx: DriverQueue,
}

fn rig(features: u64) -> Rig {
    let net = Arc::new(Fake::default());
    let machine = Machine::new();
    let card = Net::new("eth0", MAC, net.clone()).unwrap();
    let device = VirtioPci::new("eth0", card, &machine.wiring());
    let d = machine.plug(&device);
    let (rx, tx) = start(&d, features);
    Rig {
        net,
        device,
        d,
        rx,
        tx,
    }
}

fn start(d: &Driver, features: u64) -> (DriverQueue, DriverQueue) {
    assert_eq!(d.negotiate(features | F_VERSION_1) & 8, 8);
    let queues = (d.queue(0, 8, RX_RINGS), d.queue(1, 8, TX_RINGS));
    d.ready();
    queues
}

/// A packet of `len` bytes, header and all.
fn packet(len: usize) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
    packet[..HEADER_LEN].fill(0);
    packet[10] = 1;
    packet
}

impl Rig {
    fn ram(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.d.machine.memory.read(at, &mut bytes).unwrap();
        bytes
    }

    fn set_ram(&self, at: u64, bytes: &[u8]) {
        self.d.machine.memory.write(at, bytes).unwrap();
    }
}

#[test]
fn the_configuration_has_address_and_link() {
    let rig = rig(0);
    let config: [u8; 12] = rig.d.read(rig.d.config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [1, 0, 0, 0, 0, 0]);
}

#[test]
fn the_network_learns_what_the_driver_takes() {
    for (features, checksum, tso4) in [
        (0, false, false),
        (F_CSUM | F_MRG_RXBUF, false, false),
        (F_GUEST_CSUM, true, false),
        (F_GUEST_CSUM | F_GUEST_TSO4, true, true),
        // Not without the checksum (section 5.1.3.1).
        (F_GUEST_TSO4, false, false),
    ] {
        let rig = rig(features);
        rig.net.wait(&Event::Start(Offloads { checksum, tso4 }));
    }
}

#[test]
fn packets_are_sent_whole_and_in_order() {
    let mut rig = rig(0);
    let (first, second) = (packet(1500), packet(60_000));
    rig.set_ram(DATA, &first);
    rig.set_ram(DATA + 0x1_0000, &second);
    let buffers = [
        (DATA, 12, false),
        (DATA + 12, 1, false),
        (DATA + 13, 1487, false),
    ];
    rig.tx.submit(&rig.d, &buffers);
    rig.tx.submit(&rig.d, &[(DATA + 0x1_0000, 60_000, false)]);
    assert_eq!(rig.tx.wait(&rig.d), (0, 0));
    assert_eq!(rig.tx.wait(&rig.d), (3, 0));
    let before = rig.net.wait(&Event::Sent(second));
    assert!(before.contains(&Event::Sent(first)), "{before:?}");
    rig.net.wait(&Event::Flush);
}

#[test]
fn a_received_packet_fills_one_buffer() {
    let mut rig = rig(0);
    let packet = packet(700);
    let buffers = [(DATA, 12, true), (DATA + 0x1000, 2000, true)];
    let head = rig.rx.submit(&rig.d, &buffers);
    assert_eq!(rig.net.offer(&packet), 700);
    assert_eq!(rig.rx.wait(&rig.d), (head, 700));
    assert_eq!(rig.ram(DATA, 12), packet[..12]);
    assert_eq!(rig.ram(DATA + 0x1000, 688), packet[12..]);
    rig.d.assert_working();
}

#[test]
fn a_received_packet_is_spread_over_buffers() {
    for features in [0, F_EVENT_IDX] {
        let mut rig = rig(F_MRG_RXBUF | features);
        let packet = packet(2500);
        let buffers = |n: u64| [(DATA + n * 0x1000, 1000, true)];
        let heads: Vec<u16> = (0..3).map(|n| rig.rx.submit(&rig.d, &buffers(n))).collect();
        assert_eq!(rig.net.offer(&packet), 2500);
        for (head, len) in heads.into_iter().zip([1000, 1000, 500]) {
            assert_eq!(rig.rx.wait(&rig.d), (head, len));
        }
        let mut got = rig.ram(DATA, 1000);
        assert_eq!(got[10..12], [3, 0]);
        got[10] = 1;
        got.extend(rig.ram(DATA + 0x1000, 1000));
        got.extend(rig.ram(DATA + 0x2000, 500));
        assert_eq!(got, packet);
    }
}

#[test]
fn without_room_nothing_is_taken() {
    let mut rig = rig(F_MRG_RXBUF | F_EVENT_IDX);
    let packet = packet(2500);
    assert_eq!(rig.net.offer(&packet), 0);
    let first = rig.rx.submit(&rig.d, &[(DATA, 1000, true)]);
    rig.net.wait(&Event::Room);
    assert_eq!(rig.net.offer(&packet), 0);
    assert_eq!(rig.net.offer(&packet), 0);
    assert_eq!(rig.rx.poll(&rig.d.machine.memory), None);
    let second = rig.rx.submit(&rig.d, &[(DATA + 0x1000, 2000, true)]);
    rig.net.wait(&Event::Room);
    assert_eq!(rig.net.offer(&packet), 2500);
    assert_eq!(rig.rx.wait(&rig.d), (first, 1000));
    assert_eq!(rig.rx.wait(&rig.d), (second, 1500));
    // The next one goes to the next buffer.
    let third = rig.rx.submit(&rig.d, &[(DATA + 0x2000, 2000, true)]);
    assert_eq!(rig.net.offer(&packet[..100]), 100);
    assert_eq!(rig.rx.wait(&rig.d), (third, 100));
}

#[test]
fn what_no_single_buffer_holds_is_lost() {
    let mut rig = rig(0);
    let head = rig.rx.submit(&rig.d, &[(DATA, 1000, true)]);
    assert_eq!(rig.net.offer(&packet(1001)), 1001);
    assert_eq!(rig.rx.poll(&rig.d.machine.memory), None);
    assert_eq!(rig.net.offer(&packet(1000)), 1000);
    assert_eq!(rig.rx.wait(&rig.d), (head, 1000));
}

#[test]
fn strange_chains_do_no_harm() {
    let mut rig = rig(F_MRG_RXBUF | F_INDIRECT_DESC);
    // To be sent: nothing, a bit of a header, more than a packet, writable bytes.
    let more = [(DATA, 0x8000, false); 3];
    for buffers in [
        &[(DATA, 0, false)][..],
        &[(DATA, 5, false)],
        &more,
        &[(DATA, 100, true)],
    ] {
        let head = rig.tx.submit(&rig.d, buffers);
        assert_eq!(rig.tx.wait(&rig.d), (head, 0));
    }
    let sent = rig.net.wait(&Event::Sent(Vec::new()));
    assert!(!sent.contains(&Event::Sent(vec![0; 3 * 0x8000])));
    // To be received into: nothing, readable bytes only, a byte.
    let heads = [
        rig.rx.submit(&rig.d, &[(DATA, 0, true)]),
        rig.rx.submit(&rig.d, &[(DATA, 100, false)]),
        rig.rx.submit(&rig.d, &[(DATA, 1, true)]),
        rig.rx.submit(&rig.d, &[(DATA + 0x1000, 1000, true)]),
    ];
    assert_eq!(rig.net.offer(&packet(500)), 500);
    for (head, len) in heads.into_iter().zip([0, 0, 1, 499]) {
        assert_eq!(rig.rx.wait(&rig.d), (head, len));
    }
    rig.d.assert_working();
    // A buffer outside RAM: the device needs a reset, and works after it.
    rig.rx.submit(&rig.d, &[(u64::MAX - 10, 100, true)]);
    assert_eq!(rig.net.offer(&packet(500)), 0);
    rig.d.wait_broken();
    let (mut rx, _) = start(&rig.d, 0);
    let head = rx.submit(&rig.d, &[(DATA, 1000, true)]);
    assert_eq!(rig.net.offer(&packet(500)), 500);
    assert_eq!(rx.wait(&rig.d), (head, 500));
}

#[test]
fn a_reset_ends_what_was_under_way() {
    let mut rig = rig(0);
    rig.rx.submit(&rig.d, &[(DATA, 2000, true)]);
    rig.d.set_status(0);
    rig.net.wait(&Event::Stop);
    assert_eq!(rig.net.offer(&packet(500)), 0);
}

#[test]
fn a_paused_card_takes_nothing_and_survives_being_saved() {
    let mut rig = rig(F_MRG_RXBUF | F_EVENT_IDX);
    let heads = [0, 1].map(|n| rig.rx.submit(&rig.d, &[(DATA + n * 0x1000, 1000, true)]));
    assert_eq!(rig.net.offer(&packet(2500)), 0);
    assert_eq!(rig.net.offer(&packet(500)), 500);
    assert_eq!(rig.rx.wait(&rig.d), (heads[0], 500));
    rig.device.pause();
    assert_eq!(rig.net.offer(&packet(500)), 0);
    assert_round_trip(&*rig.device);
    assert_eq!(rig.net.offer(&packet(500)), 0);
    rig.net.log.lock().unwrap().clear();
    rig.device.resume();
    rig.net.wait(&Event::Room);
    assert_eq!(rig.net.offer(&packet(600)), 600);
    assert_eq!(rig.rx.wait(&rig.d), (heads[1], 600));
}
