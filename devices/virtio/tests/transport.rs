//! The PCI transport as a driver sees it, with a device that copies what it reads to what it writes.

use std::sync::{Arc, Mutex};

use lodger_device_model::{Device, Payload, RestoreError, assert_round_trip};
use lodger_virtio::driver::{Driver, DriverQueue, INDIRECT, Machine, NEXT, RAM, WRITE};
use lodger_virtio::{
    Activation, ConfigChange, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Queue, VirtioDevice,
    VirtioPci, read_config,
};

/// Feature bit of the test device.
const F_TEST: u64 = 1 << 5;
/// Where the tests have their queue and their buffers.
const RINGS: u64 = 0x1_0000;
const BUFFERS: u64 = 0x4_0000;

/// Two queues. On queue 0 every chain's readable bytes are copied to its writable ones; on queue 1 chains are rejected.
#[derive(Default)]
struct Echo {
    active: Mutex<Option<Active>>,
    config: Mutex<[u8; 8]>,
}

struct Active {
    queues: Vec<Arc<Queue>>,
    change: ConfigChange,
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u16 {
        42
    }
    fn pci_class(&self) -> u32 {
        0xff_00_00
    }
    fn features(&self) -> u64 {
        F_TEST
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 4]
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_config(&*self.config.lock().unwrap(), offset, data);
    }
    fn config_write(&self, offset: u64, data: &[u8]) {
        for (c, d) in self
            .config
            .lock()
            .unwrap()
            .iter_mut()
            .skip(offset as usize)
            .zip(data)
        {
            *c = *d;
        }
        if let Some(active) = &*self.active.lock().unwrap() {
            active.change.notify();
        }
    }
    fn activate(&self, a: Activation) {
        *self.active.lock().unwrap() = Some(Active {
            queues: a.queues,
            change: a.config_change,
        });
    }
    fn notify(&self, queue: u16) {
        let queues = self
            .active
            .lock()
            .unwrap()
            .as_ref()
            .map(|a| a.queues.clone());
        let Some(queues) = queues else { return };
        while let Some(chain) = queues[usize::from(queue)].pop() {
            if queue == 1 {
                chain.reject("as always");
                continue;
            }
            let len = chain.readable_len().min(chain.writable_len()).min(1 << 20);
            let mut data = vec![0; len as usize];
            assert_eq!(chain.read_at(0, &mut data), data.len());
            let (first, second) = data.split_at(data.len() / 3);
            chain.write_at(0, first);
            assert_eq!(chain.write_at(first.len() as u64, second), second.len());
            chain.complete(len as u32);
        }
    }
    fn reset(&self) {
        *self.active.lock().unwrap() = None;
        *self.config.lock().unwrap() = [0; 8];
    }
    fn save(&self) -> Payload {
        Payload::encode("echo", 1, &*self.config.lock().unwrap())
    }
    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        *self.config.lock().unwrap() = payload.decode("echo", 1)?;
        Ok(())
    }
}

fn plugged() -> (Driver, Arc<VirtioPci>) {
    let machine = Machine::new();
    let device = VirtioPci::new("echo0", Arc::new(Echo::default()), &machine.wiring());
    (machine.plug(&device), device)
}

/// A ready device with MSI-X and queue 0 of 8 descriptors.
fn ready(features: u64) -> (Driver, Arc<VirtioPci>, DriverQueue) {
    let (d, device) = plugged();
    d.enable_msix();
    assert_eq!(d.negotiate(F_VERSION_1 | features), 1 | 2 | 8);
    let q = d.queue(0, 8, RINGS);
    d.write(d.common + 0x10, &[2, 0]);
    d.ready();
    d.assert_working();
    (d, device, q)
}

/// Sends `text` through the device, and checks that it comes back.
fn echo(d: &Driver, q: &mut DriverQueue, text: &[u8]) {
    let m = &d.machine.memory;
    m.write(BUFFERS, text).unwrap();
    let half = text.len() as u32 / 2;
    let head = q.submit(
        d,
        &[
            (BUFFERS, half, false),
            (BUFFERS + u64::from(half), text.len() as u32 - half, false),
            (BUFFERS + 0x1000, 3, true),
            (BUFFERS + 0x2000, 0x1000, true),
        ],
    );
    assert_eq!(q.wait(d), (head, text.len() as u32));
    let mut back = vec![0; text.len()];
    m.read(BUFFERS + 0x1000, &mut back[..3]).unwrap();
    m.read(BUFFERS + 0x2000, &mut back[3..]).unwrap();
    assert_eq!(back, text);
}

#[test]
fn registers_at_power_on_and_after_writes() {
    let (d, _) = plugged();
    assert_eq!(d.pci(0), (0x1040 + 42) << 16 | 0x1af4);
    // offset, length, what is written, what is read before and after
    for (offset, written, before, after) in [
        (
            0x00,
            &[1, 0, 0, 0][..],
            &[0, 0, 0, 0][..],
            &[1, 0, 0, 0][..],
        ),
        (0x04, &[9, 9, 9, 9], &[1, 0, 0, 0], &[1, 0, 0, 0]), // word 1 by now
        (0x08, &[1, 0, 0, 0], &[0, 0, 0, 0], &[1, 0, 0, 0]),
        (0x0c, &[7, 0, 0, 0], &[0, 0, 0, 0], &[7, 0, 0, 0]),
        (0x10, &[1, 0], &[0xff, 0xff], &[1, 0]),
        (0x10, &[3, 0], &[1, 0], &[0xff, 0xff]), // there are 3 vectors
        (0x12, &[9, 9], &[2, 0], &[2, 0]),
        (0x14, &[1], &[0], &[1]),
        (0x14, &[0x40], &[1], &[1]),
        (0x15, &[9], &[0], &[0]),
        (0x16, &[1, 0], &[0, 0], &[1, 0]),
        (0x18, &[2, 0], &[4, 0], &[2, 0]),
        (0x18, &[3, 0], &[2, 0], &[2, 0]),
        (0x18, &[0, 0], &[2, 0], &[2, 0]),
        (0x18, &[8, 0], &[2, 0], &[2, 0]),
        (0x1a, &[2, 0], &[0xff, 0xff], &[2, 0]),
        (0x1c, &[2, 0], &[0, 0], &[0, 0]),
        (0x1e, &[9, 9], &[1, 0], &[1, 0]),
        (0x20, &[0x10, 0, 0, 0], &[0; 4], &[0x10, 0, 0, 0]),
        (0x24, &[1, 0, 0, 0], &[0; 4], &[1, 0, 0, 0]),
        (
            0x20,
            &[2, 0, 0, 0, 3, 0, 0, 0],
            &[0x10, 0, 0, 0, 1, 0, 0, 0],
            &[2, 0, 0, 0, 3, 0, 0, 0],
        ),
        (
            0x28,
            &[1, 2, 3, 4, 5, 6, 7, 8],
            &[0; 8],
            &[1, 2, 3, 4, 5, 6, 7, 8],
        ),
        (
            0x30,
            &[1, 2, 3, 4, 5, 6, 7, 8],
            &[0; 8],
            &[1, 2, 3, 4, 5, 6, 7, 8],
        ),
        (0x31, &[9], &[2], &[2]),
        (0x1c, &[1, 0], &[0, 0], &[1, 0]),
        (0x18, &[4, 0], &[2, 0], &[2, 0]), // enabled: fixed
        (0x1c, &[0, 0], &[1, 0], &[1, 0]),
        (0x16, &[2, 0], &[1, 0], &[2, 0]),
        (0x18, &[2, 0], &[0, 0], &[0, 0]), // there is no queue 2
        (0x1a, &[1, 0], &[0xff, 0xff], &[0xff, 0xff]),
        (0x38, &[1, 2, 3, 4], &[0; 4], &[0; 4]),
    ] {
        let look = || {
            let mut data = vec![0xee; written.len()];
            d.machine.space.mmio.read(d.common + offset, &mut data);
            data
        };
        assert_eq!(look(), before, "{offset:#x} before");
        d.write(d.common + offset, written);
        assert_eq!(look(), after, "{offset:#x} after {written:?}");
    }
    d.set_status(0);
    assert_eq!(d.read::<2>(d.common + 0x16), [0, 0]);
    assert_eq!(d.read::<2>(d.common + 0x18), [16, 0]);
}

#[test]
fn features_are_agreed_on_or_not() {
    let (d, device) = plugged();
    let offered = F_TEST | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
    assert_eq!(d.features(), offered);
    for (features, status) in [
        (offered, 11),
        (F_VERSION_1, 11),
        (F_TEST, 3),
        (F_VERSION_1 | 1 << 6, 3),
        (F_VERSION_1 | 1 << 34, 3),
        (0, 3),
    ] {
        assert_eq!(d.negotiate(features), status, "{features:#x}");
        if status == 3 {
            d.ready();
            assert_eq!(d.status(), 3, "not ready without features");
            assert_round_trip(&*device);
        }
    }
    d.negotiate(F_VERSION_1);
    d.write(d.common + 0x0c, &[0xff; 4]);
    assert_eq!(d.read32(d.common + 0x0c), 1, "fixed by FEATURES_OK");
}

#[test]
fn chains_come_back_with_an_interrupt() {
    let (d, _, mut q) = ready(0);
    for n in 0..40 {
        echo(&d, &mut q, format!("hello {n}").as_bytes());
        d.machine.inbox.wait_for(0x40);
    }
    assert_eq!(
        d.read::<1>(d.isr),
        [0],
        "MSI-X leaves the status register alone"
    );
    d.machine.memory.write(q.avail, &[1, 0]).unwrap();
    echo(&d, &mut q, b"quiet");
    assert_eq!(
        d.machine.inbox.take(),
        [0; 0],
        "the driver did not want to know"
    );
    d.assert_working();
}

#[test]
fn the_pin_is_asserted_until_the_status_register_is_read() {
    let (d, _) = plugged();
    d.negotiate(F_VERSION_1);
    let mut q = d.queue(0, 8, RINGS);
    d.ready();
    echo(&d, &mut q, b"pin please");
    assert!(d.machine.inbox.pin());
    assert_eq!(d.read::<1>(d.isr), [1]);
    assert!(!d.machine.inbox.pin());
    d.write(d.config, &[1]);
    assert!(d.machine.inbox.pin());
    assert_eq!(d.read::<1>(d.isr), [2]);
    assert_eq!(d.read::<1>(d.isr), [0]);
    echo(&d, &mut q, b"once more");
    d.set_status(0);
    assert!(!d.machine.inbox.pin());
    assert_eq!(d.machine.inbox.take(), [0; 0]);
}

#[test]
fn with_event_idx_only_the_wanted_index_interrupts() {
    let (d, _, mut q) = ready(F_EVENT_IDX);
    let m = d.machine.memory.clone();
    q.set_used_event(&m, 2);
    for expected in [0, 0, 1, 0, 0] {
        echo(&d, &mut q, b"tick");
        assert_eq!(d.machine.inbox.take().len(), expected);
    }
    let mut event = [0; 2];
    m.read(q.used + 4 + 8 * 8, &mut event).unwrap();
    assert_eq!(event, [5, 0], "the device wants to hear of the next chain");
}

#[test]
fn indirect_tables_are_followed() {
    let (d, _, mut q) = ready(F_INDIRECT_DESC);
    let m = d.machine.memory.clone();
    let table = BUFFERS + 0x8000;
    m.write(BUFFERS, b"round about").unwrap();
    DriverQueue::put_desc(&m, table, 0, (BUFFERS, 11, NEXT, 2));
    DriverQueue::put_desc(&m, table, 2, (BUFFERS + 0x100, 11, WRITE, 0));
    DriverQueue::put_desc(&m, q.desc, 0, (table, 48, INDIRECT, 0));
    q.offer(&m, 0);
    d.notify(0);
    assert_eq!(q.wait(&d), (0, 11));
    let mut back = [0; 11];
    m.read(BUFFERS + 0x100, &mut back).unwrap();
    assert_eq!(&back, b"round about");
}

#[test]
fn what_was_offered_before_ready_is_taken_then() {
    let (d, _) = plugged();
    d.negotiate(F_VERSION_1);
    let mut q = d.queue(0, 8, RINGS);
    let m = d.machine.memory.clone();
    q.submit(&d, &[(BUFFERS, 4, false), (BUFFERS + 8, 4, true)]);
    assert_eq!(q.poll(&m), None, "not ready");
    d.ready();
    assert_eq!(q.wait(&d), (0, 4));
}

#[test]
fn without_bus_mastering_there_is_no_dma() {
    let (d, _, mut q) = ready(0);
    let m = d.machine.memory.clone();
    d.set_pci(4, &[2, 0]);
    q.submit(&d, &[(BUFFERS, 4, false), (BUFFERS + 8, 4, true)]);
    assert_eq!(q.poll(&m), None);
    d.set_pci(4, &[6, 0]);
    assert_eq!(q.wait(&d), (0, 4), "it is made up for");
}

/// Descriptors and a head that no driver may offer. Each breaks the device; a reset cures it.
#[test]
fn broken_chains_stop_the_device_until_it_is_reset() {
    const TABLE: u64 = BUFFERS + 0x8000;
    type Desc = (u64, u32, u16, u16);
    let indirect = |len| (TABLE, len, INDIRECT, 0);
    let good: Desc = (BUFFERS, 4, 0, 0);
    // what, head, descriptors of the ring, descriptors of the indirect table
    let cases: &[(&str, u16, &[Desc], &[Desc])] = &[
        ("loop of one", 0, &[(BUFFERS, 1, NEXT, 0)], &[]),
        (
            "loop of two",
            0,
            &[(BUFFERS, 1, NEXT, 1), (BUFFERS, 1, NEXT, 0)],
            &[],
        ),
        ("next out of range", 0, &[(BUFFERS, 1, NEXT, 8)], &[]),
        ("head out of range", 8, &[good], &[]),
        ("head far out of range", 0xffff, &[good], &[]),
        ("beyond RAM", 0, &[(RAM, 1, 0, 0)], &[]),
        ("over the end of RAM", 0, &[(RAM - 4, 8, WRITE, 0)], &[]),
        ("over the hole", 0, &[(RAM / 2 - 4, 0x2_0000, 0, 0)], &[]),
        ("wrapping around", 0, &[(u64::MAX - 3, 8, 0, 0)], &[]),
        ("huge", 0, &[(0, u32::MAX, WRITE, 0)], &[]),
        (
            "readable after writable",
            0,
            &[(BUFFERS, 4, NEXT | WRITE, 1), (BUFFERS, 4, 0, 0)],
            &[],
        ),
        ("large loop", 0, &[(0, 0x10_0000, NEXT, 0)], &[]),
        ("empty table", 0, &[indirect(0)], &[]),
        ("odd table", 0, &[indirect(17)], &[good]),
        ("table beyond RAM", 0, &[(RAM, 16, INDIRECT, 0)], &[]),
        ("huge table", 0, &[(0, 0xffff_fff0, INDIRECT, 0)], &[]),
        (
            "nested table",
            0,
            &[indirect(32)],
            &[(BUFFERS, 4, NEXT, 1), (TABLE, 16, INDIRECT, 0)],
        ),
        ("table into itself", 0, &[indirect(16)], &[indirect(16)]),
        (
            "loop in a table",
            0,
            &[indirect(16)],
            &[(BUFFERS, 1, NEXT, 0)],
        ),
        (
            "long loop in a table",
            0,
            &[(0, 65535 * 16, INDIRECT, 0)],
            &[],
        ),
        (
            "out of the table",
            0,
            &[indirect(16)],
            &[(BUFFERS, 1, NEXT, 1)],
        ),
        (
            "table at the end of a chain that goes on",
            0,
            &[(BUFFERS, 4, NEXT, 1), indirect(16)],
            &[(BUFFERS, 1, NEXT, 0)],
        ),
    ];
    let (d, _, _) = ready(F_INDIRECT_DESC);
    let m = d.machine.memory.clone();
    for &(what, head, descs, table) in cases {
        d.negotiate(F_VERSION_1 | F_INDIRECT_DESC);
        let mut q = d.queue(0, 8, RINGS);
        d.write(d.common + 0x10, &[2, 0]);
        d.ready();
        // A table at address 0 leads from its first descriptor to itself.
        DriverQueue::put_desc(&m, 0, 0, (BUFFERS, 0, NEXT, 0));
        for (n, &desc) in (0..).zip(descs) {
            DriverQueue::put_desc(&m, q.desc, n, desc);
        }
        for (n, &desc) in (0..).zip(table) {
            DriverQueue::put_desc(&m, TABLE, n, desc);
        }
        q.offer(&m, head);
        d.notify(0);
        assert_eq!(d.status(), 1 | 2 | 4 | 8 | 64, "{what}");
        assert_eq!(d.machine.inbox.take(), [0x42], "{what}");
        assert_eq!(q.poll(&m), None, "{what}");
        d.notify(0);
        assert_eq!(d.machine.inbox.take(), [0; 0], "{what}: told once");
    }
    d.negotiate(F_VERSION_1);
    let mut q = d.queue(0, 8, RINGS);
    d.ready();
    echo(&d, &mut q, b"as new");
}

#[test]
fn an_available_index_beyond_the_queue_breaks_it() {
    for jump in [9_u16, 100, 0x8000, 0xffff] {
        let (d, _, q) = ready(0);
        let index = jump.to_le_bytes();
        d.machine.memory.write(q.avail + 2, &index).unwrap();
        d.notify(0);
        assert_eq!(d.status() & 64, 64, "{jump}");
    }
    let (d, _, _) = ready(0);
    d.set_status(0);
    d.negotiate(F_VERSION_1);
    let mut q = d.queue(1, 4, RINGS);
    d.ready();
    q.submit(&d, &[(BUFFERS, 1, false)]);
    assert_eq!(d.status() & 64, 64, "rejected by the device");
}

#[test]
fn rings_outside_ram_break_the_device_when_it_gets_ready() {
    let good = (RINGS, RINGS + 0x4000, RINGS + 0x5000);
    for (desc, avail, used) in [
        (RAM, good.1, good.2),
        (good.0, RAM - 4, good.2),
        (good.0, good.1, RAM / 2 - 8),
        (good.0, good.1, !3),
        (good.0 + 8, good.1, good.2),
        (good.0, good.1 + 1, good.2),
        (good.0, good.1, good.2 + 2),
    ] {
        let (d, device) = plugged();
        d.negotiate(F_VERSION_1);
        d.set_queue(0, 16, desc, avail, used);
        d.ready();
        assert_eq!(d.status() & 64, 64, "{desc:#x} {avail:#x} {used:#x}");
        d.notify(0);
        assert_round_trip(&*device);
        d.negotiate(F_VERSION_1);
        let mut q = d.queue(0, 8, RINGS);
        d.ready();
        echo(&d, &mut q, b"as new");
    }
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let (d, _) = plugged();
    let mut at = d.pci(0x34) as u16 & 0xff;
    while d.pci(at) >> 24 != 5 || d.pci(at) as u8 != 9 {
        at = (d.pci(at) >> 8 & 0xff) as u16;
    }
    let aim = |bar: u8, offset: u32, len: u32| {
        d.set_pci(at + 4, &[bar]);
        d.set_pci(at + 8, &offset.to_le_bytes());
        d.set_pci(at + 12, &len.to_le_bytes());
    };
    aim(0, 0x2000, 4);
    d.set_pci(at + 16, &[1, 2, 3, 4]);
    assert_eq!(d.pci(at + 16), 0x0403_0201);
    assert_eq!(d.read32(d.config), 0x0403_0201);
    aim(0, 0x2001, 1);
    assert_eq!(d.pci(at + 16), 2);
    for (bar, offset, len) in [
        (1, 0x2000, 4),
        (0, 0x2001, 4),
        (0, 0x2000, 3),
        (0, 0x2000, 0),
        (0, 0x8000, 4),
        (0, 0xffff_fffc, 4),
        (0, 0x2000, 0x8000_0000),
    ] {
        aim(bar, offset, len);
        d.set_pci(at + 16, &[9; 4]);
        assert_eq!(d.pci(at + 16), 0, "{bar} {offset:#x} {len}");
    }
    assert_eq!(d.read32(d.config), 0x0403_0201);
    aim(0, 0x4008, 4);
    d.set_pci(at + 16, &[0x55, 0, 0, 0]);
    assert_eq!(d.pci(at + 16), 0x55, "the MSI-X table too");
}

#[test]
fn state_is_reproduced_and_the_device_goes_on() {
    let (d, device, mut q) = ready(F_EVENT_IDX);
    for _ in 0..11 {
        echo(&d, &mut q, b"before");
        q.set_used_event(&d.machine.memory, q.last_used);
    }
    d.write(d.config + 4, &[1, 2, 3, 4]);
    device.pause();
    assert_round_trip(&*device);
    let saved = device.save();
    device.reset();
    device.restore(&saved).unwrap();
    d.machine.inbox.take();
    // Offered while it stands still: taken when it goes on.
    let m = d.machine.memory.clone();
    q.submit(&d, &[(BUFFERS, 4, false), (BUFFERS + 8, 4, true)]);
    assert_eq!(q.poll(&m), None);
    device.resume();
    assert_eq!(q.wait(&d).1, 4);
    d.machine.inbox.wait_for(0x40);
    echo(&d, &mut q, b"after");
    assert_eq!(d.read32(d.config + 4), 0x0403_0201);
    d.assert_working();
}

#[test]
fn random_register_and_ring_contents_do_no_harm() {
    let (d, device, _) = ready(F_INDIRECT_DESC | F_EVENT_IDX);
    let m = d.machine.memory.clone();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..60_000 {
        let r = random();
        let mut data = random().to_le_bytes();
        let len = 1 << (r >> 60 & 3);
        match r % 8 {
            0 => d.write(d.common + (r >> 8) % 0x40, &data[..len]),
            1 => d.write(d.common + (r >> 8) % 0x8000, &data[..len]),
            2 => d
                .machine
                .space
                .mmio
                .read(d.common + (r >> 8) % 0x8000, &mut data[..len]),
            // small numbers are likelier to be legal
            3 => m.write(RINGS + (r >> 8) % 0x80, &[data[0] & 15]).unwrap(),
            4 => m
                .write(RINGS + 0x4000 + (r >> 8) % 0x20, &[data[0] & 7])
                .unwrap(),
            5 => d.notify((r >> 8) as u16 & 3),
            6 => {
                if r >> 8 & 15 == 0 {
                    let (offset, byte) = ((r >> 12) as u16 & 0xff, data[0]);
                    // not the BAR, or the device is gone for good
                    if !(0x10..0x28).contains(&offset) {
                        d.set_pci(offset, &[byte]);
                    }
                }
            }
            _ => {
                if r >> 8 & 31 == 0 {
                    d.set_pci(4, &[6, 0]);
                    d.negotiate(F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX);
                    d.queue(0, 8, RINGS);
                    d.ready();
                }
            }
        }
        if round % 5_000 == 0 {
            device.pause();
            assert_round_trip(&*device);
            device.resume();
        }
    }
    device.reset();
    d.machine.assign();
    d.negotiate(F_VERSION_1);
    let mut q = d.queue(0, 8, RINGS);
    d.ready();
    echo(&d, &mut q, b"as new");
}
