//! The block device as a driver sees it.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use lodger_block::BlockBackend;
use lodger_device_model::{Device, assert_round_trip};
use lodger_virtio::driver::{Driver, DriverQueue, INDIRECT, Machine, NEXT, RAM, WRITE};
use lodger_virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioPci};
use lodger_virtio_devices::{Blk, BlkSpec, Limits, Rate};

const RINGS: u64 = 0x1_0000;
const HEADER: u64 = 0x4_0000;
const STATUS: u64 = 0x4_1000;
const DATA: u64 = 0x5_0000;
const SECTORS: u64 = 64;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const ALL: u64 = F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES | F_VERSION_1;

/// A disk in memory that counts, fails on demand, and can hold accesses back.
struct Fake {
    bytes: Mutex<Vec<u8>>,
    read_only: bool,
    log: Mutex<Vec<String>>,
    /// How many accesses are inside, and how many must be there before they may go on.
    gate: Mutex<(usize, usize)>,
    begun: AtomicUsize,
    ended: AtomicUsize,
    moved: Condvar,
}

impl Fake {
    fn new(read_only: bool) -> Arc<Fake> {
        Arc::new(Fake {
            bytes: Mutex::new(vec![0; (SECTORS * 512) as usize]),
            read_only,
            log: Mutex::default(),
            gate: Mutex::new((0, 0)),
            begun: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
            moved: Condvar::new(),
        })
    }

    fn note(&self, what: String) {
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.log.lock().unwrap().push(what);
        let mut gate = self.gate.lock().unwrap();
        gate.0 += 1;
        self.moved.notify_all();
        while gate.0 < gate.1 {
            gate = self.moved.wait(gate).unwrap();
        }
        self.ended.fetch_add(1, Ordering::SeqCst);
    }

    /// Accesses wait until `count` of them have come in since now.
    fn hold_until(&self, count: usize) {
        *self.gate.lock().unwrap() = (0, count);
        self.moved.notify_all();
    }

    fn wait_inside(&self, count: usize) {
        let mut gate = self.gate.lock().unwrap();
        while gate.0 < count {
            gate = self.moved.wait(gate).unwrap();
        }
    }

    fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl BlockBackend for Fake {
    fn size_bytes(&self) -> u64 {
        SECTORS * 512
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.note(format!("read {offset}+{}", buf.len()));
        let at = offset as usize;
        buf.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buf.len()]);
        // Sector 63 is broken.
        match at + buf.len() > 63 * 512 {
            true => Err(io::ErrorKind::Other.into()),
            false => Ok(()),
        }
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.note(format!("write {offset}+{}", buf.len()));
        assert!(!self.read_only);
        let at = offset as usize;
        self.bytes.lock().unwrap()[at..at + buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.note("flush".into());
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.note(format!("discard {offset}+{len}"));
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.note(format!("zero {offset}+{len} {may_unmap}"));
        Ok(())
    }
}

struct Rig {
    d: Driver,
    q: DriverQueue,
    disk: Arc<Fake>,
    device: Arc<VirtioPci>,
}

impl Rig {
    fn new(read_only: bool, features: u64) -> Rig {
        let machine = Machine::new();
        let disk = Fake::new(read_only);
        let blk = Blk::new("vda", disk.clone(), "lodger-0001", 2, Limits::default()).unwrap();
        let device = VirtioPci::new("vda", blk, &machine.wiring());
        let d = machine.plug(&device);
        d.enable_msix();
        let mut rig = Rig {
            q: d.queue(0, 128, RINGS),
            d,
            disk,
            device,
        };
        rig.start(features);
        rig
    }

    fn start(&mut self, features: u64) {
        assert_eq!(self.d.negotiate(features), 11);
        self.q = self.d.queue(0, 128, RINGS);
        self.d.ready();
        self.d.assert_working();
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.d.machine.memory.write(address, bytes).unwrap();
    }

    fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.d.machine.memory.read(address, &mut bytes).unwrap();
        bytes
    }

    /// The header and status of request `n` at their places.
    fn header(&self, n: u64, kind: u32, sector: u64) -> (u64, u64) {
        let (header, status) = (HEADER + n * 16, STATUS + n);
        self.put(header, &kind.to_le_bytes());
        self.put(header + 4, &[0; 4]);
        self.put(header + 8, &sector.to_le_bytes());
        self.put(status, &[0xee]);
        (header, status)
    }

    /// Submits request `n` with `len` bytes of data.
    fn submit(&mut self, n: u64, kind: u32, sector: u64, len: u32) {
        let (header, status) = self.header(n, kind, sector);
        let to_guest = matches!(kind, IN | GET_ID);
        let data = (DATA + n * 0x1_0000, len, to_guest);
        let mut buffers = vec![(header, 16, false), data, (status, 1, true)];
        buffers.retain(|b| b.1 > 0);
        self.q.submit(&self.d, &buffers);
    }

    /// Does one request; returns its status.
    fn request(&mut self, kind: u32, sector: u64, len: u32) -> u8 {
        self.submit(0, kind, sector, len);
        let (_, written) = self.q.wait(&self.d);
        let to_guest = matches!(kind, IN | GET_ID);
        assert_eq!(written, if to_guest { len + 1 } else { 1 });
        self.d.machine.inbox.wait_for(0x40);
        self.d.assert_working();
        self.get(STATUS, 1)[0]
    }
}

#[test]
fn the_configuration_tells_the_disk() {
    let rig = Rig::new(false, ALL);
    let c = |at| rig.d.read32(rig.d.config + at);
    assert_eq!((c(0), c(4)), (SECTORS as u32, 0));
    assert_eq!((c(12), c(20)), (510, 512));
    assert_eq!(c(34) & 0xffff, 4);
    assert_eq!(rig.d.features() & ALL, ALL);
    assert_eq!(rig.d.features() & F_RO, 0);
    assert_eq!(rig.d.pci(0) >> 16, 0x1042);
    assert_eq!(rig.d.pci(8) >> 8, 0x01_00_00);
    let ro = Rig::new(true, F_VERSION_1 | F_RO);
    assert_eq!(ro.d.features() & (F_RO | ALL), F_RO | F_FLUSH | F_VERSION_1);
}

#[test]
fn what_is_written_is_read_back() {
    let mut rig = Rig::new(false, ALL | F_EVENT_IDX | F_INDIRECT_DESC);
    let text: Vec<u8> = (0..1536_u32).map(|n| (n * 7) as u8).collect();
    rig.put(DATA, &text);
    rig.q.set_used_event(&rig.d.machine.memory, 0);
    assert_eq!(rig.request(OUT, 3, 1536), OK);
    rig.put(DATA, &[0; 1536]);
    rig.q.set_used_event(&rig.d.machine.memory, 1);
    assert_eq!(rig.request(IN, 4, 1024), OK);
    assert_eq!(rig.get(DATA, 1024), text[512..]);
    assert_eq!(rig.disk.take_log(), ["write 1536+1536", "read 2048+1024"]);
}

/// One request a line: kind, sector, bytes of data, status, what the disk sees.
#[test]
fn requests_are_answered_or_refused() {
    let mut rig = Rig::new(false, ALL);
    rig.put(DATA, &[0; 512]);
    for (kind, sector, len, status, seen) in [
        (IN, 0, 512, OK, "read 0+512"),
        (IN, 62, 512, OK, "read 31744+512"),
        (IN, 63, 512, IOERR, "read 32256+512"),
        (IN, 64, 512, IOERR, ""),
        (IN, 63, 1024, IOERR, ""),
        (IN, u64::MAX, 512, IOERR, ""),
        (IN, 1 << 55, 512, IOERR, ""),
        (IN, (1 << 55) - 1, 512, IOERR, ""),
        (IN, 0, 511, IOERR, ""),
        (IN, 0, 513, IOERR, ""),
        (IN, 0, 0, OK, ""),
        (OUT, 0, 512, OK, "write 0+512"),
        (OUT, 64, 512, IOERR, ""),
        (OUT, 64, 0, OK, ""),
        (OUT, 65, 0, IOERR, ""),
        (OUT, 0, 100, IOERR, ""),
        (FLUSH, 0, 0, OK, "flush"),
        (FLUSH, 99, 512, OK, "flush"),
        (GET_ID, 0, 20, OK, ""),
        (GET_ID, 0, 5, OK, ""),
        (GET_ID, 0, 0, OK, ""),
        (DISCARD, 0, 0, IOERR, ""),
        (DISCARD, 0, 8, IOERR, ""),
        (DISCARD, 0, 17 * 16, IOERR, ""),
        (WRITE_ZEROES, 0, 31, IOERR, ""),
        (2, 0, 512, UNSUPP, ""),
        (10, 0, 0, UNSUPP, ""),
        (14, 0, 16, UNSUPP, ""),
        (u32::MAX, 0, 0, UNSUPP, ""),
    ] {
        let line = format!("{kind} {sector:#x} {len}");
        assert_eq!(rig.request(kind, sector, len), status, "{line}");
        assert_eq!(rig.disk.take_log().concat(), seen, "{line}");
    }
    assert_eq!(rig.request(GET_ID, 0, 20), OK);
    assert_eq!(rig.get(DATA, 20), b"lodger-0001\0\0\0\0\0\0\0\0\0");
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let mut rig = Rig::new(false, ALL);
    let range = |sector: u64, sectors: u32, flags: u32| {
        let mut r = sector.to_le_bytes().to_vec();
        r.extend(sectors.to_le_bytes());
        r.extend(flags.to_le_bytes());
        r
    };
    for (kind, ranges, status, seen) in [
        (DISCARD, vec![range(1, 2, 0)], OK, "discard 512+1024"),
        (
            DISCARD,
            vec![range(0, 64, 0), range(3, 1, 0)],
            OK,
            "discard 0+32768 discard 1536+512",
        ),
        (DISCARD, vec![range(0, 65, 0)], IOERR, ""),
        (
            DISCARD,
            vec![range(1, 1, 0), range(u64::MAX, 1, 0)],
            IOERR,
            "",
        ),
        (DISCARD, vec![range(0, u32::MAX, 0)], IOERR, ""),
        (DISCARD, vec![range(0, 1, 1)], UNSUPP, ""),
        (WRITE_ZEROES, vec![range(0, 1, 1)], OK, "zero 0+512 true"),
        (
            WRITE_ZEROES,
            vec![range(8, 8, 0)],
            OK,
            "zero 4096+4096 false",
        ),
        (WRITE_ZEROES, vec![range(8, 8, 2)], UNSUPP, ""),
        (WRITE_ZEROES, vec![range(64, 1, 0)], IOERR, ""),
    ] {
        let bytes = ranges.concat();
        rig.put(DATA, &bytes);
        assert_eq!(
            rig.request(kind, 0, bytes.len() as u32),
            status,
            "{ranges:?}"
        );
        assert_eq!(rig.disk.take_log().join(" "), seen, "{ranges:?}");
    }
    rig.start(F_VERSION_1);
    rig.put(DATA, &range(0, 1, 0));
    assert_eq!(rig.request(DISCARD, 0, 16), UNSUPP, "not negotiated");
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let mut rig = Rig::new(true, F_VERSION_1 | F_RO | F_FLUSH);
    rig.disk.bytes.lock().unwrap()[0] = 77;
    assert_eq!(rig.request(IN, 0, 512), OK);
    assert_eq!(rig.get(DATA, 1), [77]);
    rig.disk.take_log();
    assert_eq!(rig.request(WRITE_ZEROES, 0, 16), UNSUPP);
    assert_eq!(rig.disk.take_log(), [""; 0]);
}

#[test]
fn writes_are_durable_at_once_unless_the_driver_flushes() {
    for (features, writeback, flushed) in [
        (F_FLUSH, None, false),
        (0, None, true),
        (F_FLUSH | F_CONFIG_WCE, None, false),
        (F_FLUSH | F_CONFIG_WCE, Some(0), true),
        (F_FLUSH | F_CONFIG_WCE, Some(1), false),
        (F_FLUSH, Some(0), false),
    ] {
        let mut rig = Rig::new(false, F_VERSION_1 | features);
        if let Some(value) = writeback {
            rig.d.write(rig.d.config + 32, &[value]);
        }
        assert_eq!(rig.request(OUT, 0, 512), OK);
        let seen = rig.disk.take_log().contains(&"flush".to_string());
        assert_eq!(seen, flushed, "{features:#x} {writeback:?}");
    }
}

#[test]
fn several_requests_are_under_way_at_once() {
    let mut rig = Rig::new(false, ALL);
    // Neither read returns before the other one has begun.
    rig.disk.hold_until(2);
    rig.submit(0, IN, 0, 512);
    rig.submit(1, IN, 1, 512);
    let mut heads = [rig.q.wait(&rig.d).0, rig.q.wait(&rig.d).0];
    heads.sort();
    assert_eq!(heads, [0, 3]);
    assert_eq!(rig.get(STATUS, 2), [OK, OK]);
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    let mut rig = Rig::new(false, ALL);
    rig.disk.hold_until(3);
    rig.submit(0, IN, 0, 512);
    rig.submit(1, IN, 1, 512);
    rig.submit(2, IN, 2, 512);
    rig.disk.wait_inside(2);
    let d = &rig.d;
    std::thread::scope(|s| {
        let reset = s.spawn(|| {
            d.set_status(0);
            d.status()
        });
        rig.disk.hold_until(0);
        assert_eq!(reset.join().unwrap(), 0);
    });
    let count = |n: &AtomicUsize| n.load(Ordering::SeqCst);
    assert_eq!(count(&rig.disk.begun), count(&rig.disk.ended));
    let used = rig.get(rig.q.used, 0x100);
    rig.put(DATA, &[9; 0x1000]);
    rig.d.notify(0);
    assert_eq!(
        rig.get(rig.q.used, 0x100),
        used,
        "nothing comes after the reset"
    );
    rig.start(ALL);
    assert_eq!(rig.request(IN, 5, 512), OK);
}

#[test]
fn a_pause_drains_and_the_rest_waits_for_the_resume() {
    let mut rig = Rig::new(false, ALL);
    assert_eq!(rig.request(OUT, 0, 512), OK);
    rig.disk.take_log();
    rig.disk.hold_until(9);
    rig.submit(0, IN, 0, 512);
    rig.submit(1, IN, 1, 512);
    rig.submit(2, IN, 2, 512);
    rig.submit(3, IN, 3, 512);
    rig.disk.wait_inside(2);
    let device = &rig.device;
    std::thread::scope(|s| {
        let pause = s.spawn(|| device.pause());
        // Let go only of what is inside, as far as that can be told from here.
        rig.disk.hold_until(0);
        pause.join().unwrap();
    });
    let done = rig.disk.log.lock().unwrap().len();
    let m = rig.d.machine.memory.clone();
    let mut used = 0;
    while rig.q.poll(&m).is_some() {
        used += 1;
    }
    assert_eq!(used, done, "all that was begun is complete");
    rig.d.write(rig.d.config + 32, &[0]);
    assert_round_trip(&*rig.device);
    rig.submit(4, IN, 4, 512);
    assert_eq!(rig.q.poll(&m), None, "it stands still");
    rig.device.resume();
    for _ in used..5 {
        rig.q.wait(&rig.d);
    }
    assert_eq!(rig.get(STATUS, 5), [OK; 5]);
    rig.disk.take_log();
    assert_eq!(rig.request(OUT, 0, 512), OK);
    assert_eq!(
        rig.disk.take_log(),
        ["write 0+512", "flush"],
        "write-through is kept"
    );
}

#[test]
fn malformed_requests_do_no_harm() {
    let mut rig = Rig::new(false, ALL | F_INDIRECT_DESC);
    let (header, status) = rig.header(0, IN, 0);
    // A header in pieces and data in pieces of odd sizes are legal.
    let pieces = [
        (header, 1, false),
        (header + 1, 15, false),
        (DATA, 0, true),
        (DATA, 100, true),
        (DATA + 100, 412, true),
        (status, 1, true),
    ];
    rig.disk.bytes.lock().unwrap()[..512].fill(3);
    rig.q.submit(&rig.d, &pieces);
    assert_eq!(rig.q.wait(&rig.d).1, 513);
    assert_eq!(rig.get(DATA, 512), [3; 512]);
    // A header cut short is an error that can be told.
    rig.q
        .submit(&rig.d, &[(header, 15, false), (status, 1, true)]);
    rig.q.wait(&rig.d);
    assert_eq!(rig.get(status, 1), [IOERR]);
    rig.q.submit(&rig.d, &[(status, 1, true)]);
    rig.q.wait(&rig.d);
    assert_eq!(rig.get(status, 1), [IOERR]);
    // A read of all of RAM, by a table of descriptors that cover it again and again.
    let table = DATA + 0x8000;
    let m = rig.d.machine.memory.clone();
    for n in 0..1000 {
        let desc = (0x10_0000, 0x10_0000, WRITE | NEXT, n + 1);
        DriverQueue::put_desc(&m, table, n, desc);
    }
    DriverQueue::put_desc(&m, table, 1000, (status, 1, WRITE, 0));
    DriverQueue::put_desc(&m, rig.q.desc, 0, (header, 16, NEXT, 1));
    DriverQueue::put_desc(&m, rig.q.desc, 1, (table, 1001 * 16, INDIRECT, 0));
    rig.q.offer(&m, 0);
    rig.d.notify(0);
    rig.q.wait(&rig.d);
    assert_eq!(rig.get(status, 1), [IOERR]);
    rig.d.assert_working();
    // No place for the status at all, or data outside RAM: the device needs a reset.
    for buffers in [
        &[(header, 16, false)][..],
        &[
            (header, 16, false),
            (RAM - 256, 512, true),
            (status, 1, true),
        ],
    ] {
        rig.start(ALL);
        rig.q.submit(&rig.d, buffers);
        rig.d.wait_broken();
    }
    rig.start(ALL);
    assert_eq!(rig.request(IN, 0, 512), OK);
}

/// Bytes pass between the file and RAM, on a file system with a disk and on one without.
#[test]
fn files_are_read_and_written_directly() {
    for dir in ["/dev/shm", env!("CARGO_TARGET_TMPDIR")] {
        let Ok(file) = tempfile::NamedTempFile::new_in(dir) else {
            eprintln!("left out: {dir}");
            continue;
        };
        let bytes: Vec<u8> = (0..700 << 10).map(|n: u32| (n / 300) as u8).collect();
        // The last sector is not all there.
        std::fs::write(file.path(), &bytes[..bytes.len() - 100]).unwrap();
        let machine = Machine::new();
        let spec = BlkSpec::new(file.path(), false);
        let device = spec.build("vda", &machine.wiring()).unwrap();
        let d = machine.plug(&device);
        d.enable_msix();
        // Another queue than the first.
        let index = 2;
        assert_eq!(d.negotiate(ALL | F_MQ), 11);
        let mut q = d.queue(index, 64, RINGS);
        d.ready();
        let m = d.machine.memory.clone();
        let mut request = |kind: u32, sector: u64, data: &[(u64, u32, bool)]| {
            m.write(HEADER, &kind.to_le_bytes()).unwrap();
            m.write(HEADER + 8, &sector.to_le_bytes()).unwrap();
            let mut buffers = vec![(HEADER, 16, false)];
            buffers.extend(data);
            buffers.push((STATUS, 1, true));
            q.submit(&d, &buffers);
            q.wait(&d);
            let mut status = [9];
            m.read(STATUS, &mut status).unwrap();
            status[0]
        };
        let get = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            m.read(at, &mut bytes).unwrap();
            bytes
        };
        // Small and large, and in pieces.
        assert_eq!(request(IN, 3, &[(DATA, 4096, true)]), OK);
        assert_eq!(get(DATA, 4096), bytes[1536..5632]);
        assert_eq!(request(IN, 9, &[(DATA, 0x8_0000, true)]), OK);
        assert_eq!(get(DATA, 0x8_0000), bytes[4608..][..0x8_0000]);
        let pieces = [(DATA + 1, 100, true), (DATA + 5000, 412, true)];
        assert_eq!(request(IN, 1, &pieces), OK);
        assert_eq!(get(DATA + 5000, 412), bytes[612..1024]);
        let last = bytes.len() as u64 / 512 - 1;
        assert_eq!(request(IN, last, &[(DATA, 512, true)]), OK);
        assert_eq!(get(DATA, 412), bytes[bytes.len() - 512..][..412]);
        assert_eq!(get(DATA + 412, 100), [0; 100]);
        assert_eq!(request(IN, last, &[(DATA, 1024, true)]), IOERR);
        m.write(DATA, &[0x5a; 8192]).unwrap();
        for (sector, len) in [(0, 512), (100, 8192), (last, 512)] {
            assert_eq!(request(OUT, sector, &[(DATA, len, false)]), OK, "{sector}");
        }
        m.write(DATA, b"QFI\xfb").unwrap();
        assert_eq!(request(OUT, 0, &[(DATA, 512, false)]), IOERR);
        assert_eq!(request(OUT, 1, &[(DATA, 512, false)]), OK);
        assert_eq!(request(FLUSH, 0, &[]), OK);
        let mut expected = bytes.clone();
        expected[..512].fill(0x5a);
        expected[51200..][..8192].fill(0x5a);
        expected[last as usize * 512..].fill(0x5a);
        expected[512..516].copy_from_slice(b"QFI\xfb");
        expected[516..1024].fill(0x5a);
        assert!(std::fs::read(file.path()).unwrap() == expected);
        // A file that somebody cuts short.
        file.as_file().set_len(100_000).unwrap();
        assert_eq!(request(IN, 300, &[(DATA, 4096, true)]), IOERR);
        assert_eq!(request(IN, 300, &[(DATA, 0x4_0000, true)]), IOERR);
        assert_eq!(request(IN, 100, &[(DATA, 4096, true)]), OK);
    }
}

#[test]
fn limits_delay_and_do_not_keep_a_reset_waiting() {
    let machine = Machine::new();
    let disk = Fake::new(false);
    let limits = Limits {
        bytes: None,
        operations: Some(Rate {
            per_second: 1,
            burst: 2,
        }),
    };
    let blk = Blk::new("vda", disk.clone(), "", 2, limits).unwrap();
    let device = VirtioPci::new("vda", blk, &machine.wiring());
    let d = machine.plug(&device);
    d.enable_msix();
    let q = d.queue(0, 128, RINGS);
    let mut rig = Rig { d, q, disk, device };
    rig.start(ALL);
    // Two at once, then a debt: of 64 more, not all are done when the reset comes.
    for n in 0..66 {
        rig.submit(n % 2, IN, n % 60, 512);
    }
    rig.q.wait(&rig.d);
    rig.q.wait(&rig.d);
    rig.d.set_status(0);
    assert_eq!(rig.d.status(), 0);
    assert!(rig.disk.take_log().len() < 66);
}

#[test]
fn a_spec_builds_a_disk_on_a_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let machine = Machine::new();
    let spec = BlkSpec::new(file.path(), false);
    let device = spec.build("vda", &machine.wiring()).unwrap();
    let e = spec.build("vdb", &machine.wiring()).err().unwrap();
    assert!(e.to_string().contains("another process"), "{e}");
    let d = machine.plug(&device);
    assert_eq!(d.read32(d.config), 2048);
    let wrong = |spec: BlkSpec| spec.build("x", &d.machine.wiring()).err().unwrap();
    drop(device);
    let long = BlkSpec {
        serial: "x".repeat(21),
        ..BlkSpec::new("/nowhere", true)
    };
    assert!(wrong(long.clone()).to_string().contains("/nowhere"));
    let other = tempfile::NamedTempFile::new().unwrap();
    other.as_file().set_len(512).unwrap();
    let path = other.path().to_path_buf();
    let many = BlkSpec {
        workers: 17,
        ..BlkSpec::new(&path, true)
    };
    assert!(wrong(many).to_string().contains("workers"));
    let none = Some(Rate {
        per_second: 0,
        burst: 1,
    });
    let limits = Limits {
        bytes: none,
        operations: None,
    };
    let stopped = BlkSpec {
        limits,
        ..BlkSpec::new(&path, true)
    };
    assert!(wrong(stopped).to_string().contains("limit"));
    assert!(
        wrong(BlkSpec { path, ..long })
            .to_string()
            .contains("20 bytes")
    );
}
