//! The memory balloon as its driver sees it.

use std::sync::Arc;
use std::time::Duration;

use lodger_device_model::assert_round_trip;
use lodger_virtio::driver::{Driver, DriverQueue, Machine, RAM};
use lodger_virtio::{F_VERSION_1, VirtioPci};
use lodger_virtio_devices::{Balloon, BalloonSpec, NoDriver};

const STATS: u64 = 1 << 1;
const REPORTING: u64 = 1 << 5;
const DATA: u64 = 0x4_0000;
/// Pages that are given up: RAM that nothing else uses.
const PAGES: u64 = 0x10_0000;
const PATIENCE: Duration = Duration::from_secs(20);

/// RAM of the machine, in bytes.
fn size() -> u64 {
    Machine::new().memory.size()
}

struct Rig {
    d: Driver,
    device: Arc<VirtioPci>,
    balloon: Arc<Balloon>,
    queues: Vec<DriverQueue>,
}

impl Rig {
    fn new(start: Option<u64>, features: u64) -> Rig {
        let machine = Machine::new();
        let (device, balloon) = (BalloonSpec { start })
            .build("balloon", &machine.wiring())
            .unwrap();
        let d = machine.plug(&device);
        d.enable_msix();
        assert_eq!(balloon.ask(RAM), Err(NoDriver));
        assert_eq!(d.negotiate(F_VERSION_1 | features), 11);
        let queues = (0..4).map(|n| d.queue(n, 8, 0x1_0000 * (1 + u64::from(n))));
        // Queue 3 ends where the data begins.
        let queues = queues
            .take(3 + usize::from(features & STATS != 0))
            .collect();
        d.ready();
        Rig {
            d,
            device,
            balloon,
            queues,
        }
    }

    fn memory(&self) -> &lodger_guest_memory::GuestMemory {
        &self.d.machine.memory
    }

    /// Fills a page and watches its code.
    fn use_page(&self, page: u64) -> u32 {
        self.memory().write(page, &[7; 4096]).unwrap();
        let host = self.memory().host_page(page).unwrap();
        host.tracker.watch_code(host.page).0
    }

    fn is_gone(&self, page: u64, version: u32) -> bool {
        let host = self.memory().host_page(page).unwrap();
        let gone = self.memory().read_u32(page).unwrap() == 0;
        assert_eq!(host.tracker.version(host.page) != version, gone);
        gone
    }

    fn inflate(&mut self, queue: usize, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.memory().write(DATA + 0x1_0000, &bytes).unwrap();
        let buffer = (DATA + 0x1_0000, bytes.len() as u32, false);
        self.queues[queue].submit(&self.d, &[buffer]);
        self.queues[queue].wait(&self.d);
    }
}

#[test]
fn pages_in_the_balloon_are_the_hosts() {
    let mut rig = Rig::new(None, STATS | REPORTING);
    let page = |n: u64| PAGES + n * 4096;
    let number = |n: u64| (page(n) / 4096) as u32;
    let versions: Vec<u32> = (0..6).map(|n| rig.use_page(page(n))).collect();
    // In any order, twice, and some that are not RAM.
    let wild = [u32::MAX, (RAM / 4096) as u32, 1 << 30];
    rig.inflate(
        0,
        &[&[number(4), number(1), number(2), number(1)][..], &wild].concat(),
    );
    let gone: Vec<bool> = (0..6)
        .map(|n| rig.is_gone(page(n), versions[n as usize]))
        .collect();
    assert_eq!(gone, [false, true, true, false, true, false]);
    // Half a number, and none.
    rig.queues[0].submit(&rig.d, &[(DATA, 3, false)]);
    rig.queues[0].wait(&rig.d);
    rig.queues[0].submit(&rig.d, &[(DATA, 0, false)]);
    rig.queues[0].wait(&rig.d);
    // Out of it again: the page is there when it is touched.
    rig.inflate(1, &[number(1)]);
    rig.use_page(page(1));
    rig.d.assert_working();
}

#[test]
fn what_is_reported_as_free_is_the_hosts() {
    // The number of the queue depends on which others there are.
    for (features, queue) in [(STATS | REPORTING, 3), (REPORTING, 2)] {
        let mut rig = Rig::new(None, features);
        let versions: Vec<u32> = (0..4).map(|n| rig.use_page(PAGES + n * 4096)).collect();
        let buffers = [
            (PAGES, 4096, true),
            (PAGES + 2 * 4096 + 1, 8191, true),
            // Nothing else is touched, not even beside it.
            (PAGES + 4096, 4095, true),
        ];
        rig.queues[queue].submit(&rig.d, &buffers);
        rig.queues[queue].wait(&rig.d);
        let gone = [0, 1, 2, 3].map(|n| rig.is_gone(PAGES + n * 4096, versions[n as usize]));
        assert_eq!(gone, [true, false, false, true]);
        assert!(rig.balloon.status(Duration::ZERO).reported >= 4096);
    }
}

#[test]
fn the_guest_is_asked_and_answers() {
    let mut rig = Rig::new(Some(size() - (3 << 20)), STATS);
    let asked = |rig: &Rig| rig.d.read32(rig.d.config) * 4096;
    assert_eq!(asked(&rig), 3 << 20, "from the start");
    rig.balloon.ask(size() - (1 << 20)).unwrap();
    assert_eq!(asked(&rig), 1 << 20);
    rig.balloon.ask(u64::MAX).unwrap();
    assert_eq!(asked(&rig), 0);
    rig.balloon.ask(0).unwrap();
    assert_eq!(u64::from(asked(&rig)), size());
    rig.d.write(rig.d.config + 4, &5_u32.to_le_bytes());
    let status = rig.balloon.status(Duration::ZERO);
    assert_eq!((status.asked, status.actual), (0, size() - 5 * 4096));
    assert_eq!(status.guest, None, "nothing is known yet");
    // More than there is.
    rig.d.write(rig.d.config + 4, &u32::MAX.to_le_bytes());
    assert_eq!(rig.balloon.status(Duration::ZERO).actual, 0);
    // Statistics: a buffer waits for the question, its successor is the answer.
    let offer = |rig: &mut Rig, stats: &[(u16, u64)]| {
        let bytes: Vec<u8> = stats
            .iter()
            .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
            .collect();
        rig.memory().write(DATA, &bytes).unwrap();
        let buffer = (DATA, bytes.len() as u32, false);
        rig.queues[2].submit(&rig.d, &[buffer]);
    };
    offer(&mut rig, &[(5, 1000), (4, 500), (99, 1)]);
    let balloon = Arc::clone(&rig.balloon);
    let question = std::thread::spawn(move || {
        loop {
            let guest = balloon.status(PATIENCE).guest;
            if guest.is_some_and(|guest| guest.total == Some(2000)) {
                return guest.unwrap();
            }
        }
    });
    rig.queues[2].wait(&rig.d);
    offer(&mut rig, &[(5, 2000), (6, 300)]);
    // It may ask more than once.
    while !question.is_finished() {
        if rig.queues[2].poll(&rig.d.machine.memory).is_some() {
            offer(&mut rig, &[(5, 2000), (6, 300)]);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let guest = question.join().unwrap();
    assert_eq!(
        (guest.available, guest.free, guest.caches),
        (Some(300), None, None)
    );
    assert_round_trip(&*rig.device);
    // A reset does not wait for the buffer that waits for a question.
    rig.d.set_status(0);
    assert_eq!(rig.balloon.ask(RAM), Err(NoDriver));
    let status = rig.balloon.status(Duration::ZERO);
    assert_eq!((status.asked, status.actual), (size() - (3 << 20), size()));
}
