//! The socket device as a driver sees it, and as the host's programs do.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lodger_device_model::{Device, assert_round_trip};
use lodger_virtio::driver::{Driver, DriverQueue, Machine};
use lodger_virtio::{F_EVENT_IDX, F_VERSION_1, VirtioPci};
use lodger_virtio_devices::VsockSpec;
use tempfile::TempDir;

const RX_RINGS: u64 = 0x1_0000;
const TX_RINGS: u64 = 0x2_0000;
const EVENT_RINGS: u64 = 0x3_0000;
const RX_BUFFERS: u64 = 0x4_0000;
const TX_BUFFER: u64 = 0x10_0000;
const EVENT_BUFFER: u64 = 0x3_a000;

const HEADER: usize = 44;
/// Bytes of a receive buffer.
const BUFFER: u64 = 0x1000;
const BUFFERS: u16 = 8;
/// What the guest says that it has room for.
const ROOM: u32 = 64 << 10;
const GUEST: u64 = 3;
const HOST: u64 = 2;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// A packet, as far as it differs from one to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Packet {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    /// What the header says; otherwise the length of the data.
    len: Option<u32>,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    data: Vec<u8>,
}

impl Packet {
    /// One of the guest's.
    fn new(op: u16, src_port: u32, dst_port: u32) -> Packet {
        Packet {
            src_cid: GUEST,
            dst_cid: HOST,
            src_port,
            dst_port,
            len: None,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: ROOM,
            fwd_cnt: 0,
            data: Vec::new(),
        }
    }

    fn with(self, data: &[u8]) -> Packet {
        Packet {
            data: data.into(),
            ..self
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.unwrap_or(self.data.len() as u32).to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes.extend(&self.data);
        bytes
    }

    fn parse(bytes: &[u8]) -> Packet {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        assert_eq!(word(24) as usize, bytes.len() - HEADER);
        Packet {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: None,
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            data: bytes[HEADER..].to_vec(),
        }
    }
}

struct Rig {
    dir: TempDir,
    device: Arc<VirtioPci>,
    d: Driver,
    rx: DriverQueue,
    tx: DriverQueue,
    event: DriverQueue,
}

impl Rig {
    fn new() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine::new();
        let spec = VsockSpec::new(dir.path().join("v"));
        let device = spec.build("vsock0", &machine.wiring()).unwrap();
        let d = machine.plug(&device);
        let (rx, tx, event) = start(&d);
        let mut rig = Rig {
            dir,
            device,
            d,
            rx,
            tx,
            event,
        };
        rig.offer_all();
        rig
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    fn offer_all(&mut self) {
        for n in 0..BUFFERS {
            self.offer(n);
        }
    }

    /// Gives the device receive buffer `n`.
    fn offer(&mut self, n: u16) {
        self.rx.next_desc = n;
        let at = RX_BUFFERS + u64::from(n) * BUFFER;
        self.rx.submit(&self.d, &[(at, BUFFER as u32, true)]);
    }

    fn send(&mut self, packet: &Packet) {
        self.send_bytes(&packet.bytes());
    }

    fn send_bytes(&mut self, bytes: &[u8]) {
        self.d.machine.memory.write(TX_BUFFER, bytes).unwrap();
        let buffer = (TX_BUFFER, bytes.len() as u32, false);
        self.tx.submit(&self.d, &[buffer]);
        self.tx.wait(&self.d);
    }

    /// The next packet for the guest.
    fn next(&mut self) -> Packet {
        let (head, len) = self.rx.wait(&self.d);
        let mut bytes = vec![0; len as usize];
        let at = RX_BUFFERS + u64::from(head) * BUFFER;
        self.d.machine.memory.read(at, &mut bytes).unwrap();
        self.offer(head);
        let packet = Packet::parse(&bytes);
        assert_eq!(packet.dst_cid, GUEST);
        packet
    }

    /// The next one but for news of the host's room.
    #[track_caller]
    fn expect(&mut self, op: u16) -> Packet {
        let mut packet = self.next();
        while packet.op == CREDIT_UPDATE && op != CREDIT_UPDATE {
            packet = self.next();
        }
        assert_eq!(packet.op, op, "{packet:?}");
        packet
    }

    /// A program of the host's that is connected to port 1234 of the guest, and the port it has.
    fn connect(&mut self) -> (UnixStream, u32) {
        let mut program = UnixStream::connect(self.path()).unwrap();
        program
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        program.write_all(b"CONNECT 1234\n").unwrap();
        let request = self.expect(REQUEST);
        assert_eq!((request.src_cid, request.dst_port), (HOST, 1234));
        assert!(request.buf_alloc > 0);
        let port = request.src_port;
        self.send(&Packet::new(RESPONSE, 1234, port));
        let mut line = vec![0; format!("OK {port}\n").len()];
        program.read_exact(&mut line).unwrap();
        assert_eq!(String::from_utf8(line).unwrap(), format!("OK {port}\n"));
        (program, port)
    }

    /// The device still does what it is for.
    fn works(&mut self) {
        let (mut program, port) = self.connect();
        self.send(&Packet::new(RW, 1234, port).with(b"still there"));
        let mut bytes = [0; 11];
        program.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"still there");
        self.send(&Packet::new(RST, 1234, port));
        assert_eq!(program.read(&mut bytes).unwrap(), 0);
    }

    /// Nothing comes.
    fn quiet(&mut self) {
        // What was there to be said has been said before the answer to this.
        self.send(&Packet::new(CREDIT_UPDATE, 99, 99));
        let packet = self.expect(RST);
        assert_eq!((packet.src_port, packet.dst_port), (99, 99));
    }
}

fn start(d: &Driver) -> (DriverQueue, DriverQueue, DriverQueue) {
    assert_eq!(d.negotiate(F_VERSION_1 | F_EVENT_IDX) & 8, 8);
    let queues = (
        d.queue(0, BUFFERS, RX_RINGS),
        d.queue(1, 8, TX_RINGS),
        d.queue(2, 8, EVENT_RINGS),
    );
    d.ready();
    queues
}

#[test]
fn the_guest_has_its_address() {
    let rig = Rig::new();
    assert_eq!(rig.d.read::<8>(rig.d.config), GUEST.to_le_bytes());
    assert_eq!(rig.d.features() & 0xff, 1);
    let machine = Machine::new();
    for cid in [0, 1, 2, u32::MAX] {
        let path = rig.dir.path().join("w");
        let spec = VsockSpec { cid, path };
        let error = spec.build("v", &machine.wiring()).err().unwrap();
        assert!(error.to_string().contains("CID"), "{error}");
    }
    // One that is in use.
    let error = VsockSpec::new(rig.path()).build("v", &machine.wiring());
    assert!(error.err().unwrap().to_string().contains("in use"));
}

#[test]
fn the_host_connects() {
    let mut rig = Rig::new();
    let (mut program, port) = rig.connect();
    program.write_all(b"to the guest").unwrap();
    let packet = rig.expect(RW);
    assert_eq!(packet.data, b"to the guest");
    assert_eq!((packet.src_port, packet.dst_port), (port, 1234));
    // The program sends no more, but receives.
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.expect(SHUTDOWN).flags, 2);
    rig.send(&Packet::new(RW, 1234, port).with(b"to the host"));
    let shutdown = Packet {
        flags: 3,
        ..Packet::new(SHUTDOWN, 1234, port)
    };
    rig.send(&shutdown);
    rig.expect(RST);
    let mut got = String::new();
    program.read_to_string(&mut got).unwrap();
    assert_eq!(got, "to the host");
    rig.works();
}

#[test]
fn nobody_listens_in_the_guest() {
    let mut rig = Rig::new();
    let mut program = UnixStream::connect(rig.path()).unwrap();
    program.write_all(b"CONNECT 5\n").unwrap();
    let port = rig.expect(REQUEST).src_port;
    rig.send(&Packet::new(RST, 5, port));
    assert_eq!(program.read(&mut [0; 9]).unwrap(), 0);
    // A program that does not wait for the answer.
    let mut program = UnixStream::connect(rig.path()).unwrap();
    program.write_all(b"CONNECT 5\n").unwrap();
    rig.expect(REQUEST);
    drop(program);
    rig.expect(RST);
    // Without a driver it is told at once.
    rig.d.set_status(0);
    let mut program = UnixStream::connect(rig.path()).unwrap();
    program.write_all(b"CONNECT 5\n").unwrap();
    assert_eq!(program.read(&mut [0; 9]).unwrap(), 0);
}

#[test]
fn the_guest_connects() {
    let mut rig = Rig::new();
    rig.send(&Packet::new(REQUEST, 700, 80));
    let refused = rig.expect(RST);
    assert_eq!((refused.src_port, refused.dst_port), (80, 700));
    let listener = UnixListener::bind(rig.dir.path().join("v_80")).unwrap();
    rig.send(&Packet::new(REQUEST, 700, 80));
    rig.expect(RESPONSE);
    let (mut program, _) = listener.accept().unwrap();
    rig.send(&Packet::new(RW, 700, 80).with(b"GET"));
    let mut bytes = [0; 3];
    program.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"GET");
    // The program goes: what it has written arrives before that.
    program.write_all(b"answer").unwrap();
    drop(program);
    assert_eq!(rig.expect(RW).data, b"answer");
    let mut flags = 0;
    while flags != 3 {
        flags |= rig.expect(SHUTDOWN).flags;
    }
    rig.send(&Packet::new(RST, 700, 80));
    rig.quiet();
    rig.works();
}

#[test]
fn no_more_than_the_guest_has_room_for() {
    let mut rig = Rig::new();
    let (mut program, port) = rig.connect();
    let data: Vec<u8> = (0..200_000_u32).map(|n| (n / 7) as u8).collect();
    let sent = data.clone();
    let writer = std::thread::spawn(move || {
        program.write_all(&sent).unwrap();
        program
    });
    let mut got = Vec::new();
    while got.len() < ROOM as usize {
        got.extend(rig.expect(RW).data);
    }
    assert_eq!(got.len(), ROOM as usize);
    rig.expect(CREDIT_REQUEST);
    rig.quiet();
    while got.len() < data.len() {
        let packet = Packet {
            fwd_cnt: got.len() as u32,
            ..Packet::new(CREDIT_UPDATE, 1234, port)
        };
        rig.send(&packet);
        let until = data.len().min(got.len() + ROOM as usize);
        while got.len() < until {
            let packet = rig.next();
            assert!([RW, CREDIT_REQUEST].contains(&packet.op));
            got.extend(packet.data);
        }
    }
    assert!(got == data);
    drop(writer.join().unwrap());
}

#[test]
fn the_guest_is_told_how_much_room_there_is() {
    let mut rig = Rig::new();
    let (mut program, port) = rig.connect();
    rig.send(&Packet::new(CREDIT_REQUEST, 1234, port));
    let credit = rig.expect(CREDIT_UPDATE);
    let (room, before) = (credit.buf_alloc, credit.fwd_cnt);
    assert_eq!(before, 0);
    // As much as the host's socket takes, and then as much as was promised.
    let block = vec![0x5a; 32 << 10];
    let (mut sent, mut forwarded) = (0_u32, 0);
    loop {
        while sent - forwarded < room {
            rig.send(&Packet::new(RW, 1234, port).with(&block));
            sent += block.len() as u32;
        }
        rig.send(&Packet::new(CREDIT_REQUEST, 1234, port));
        let now = rig.expect(CREDIT_UPDATE).fwd_cnt;
        if now == forwarded {
            break;
        }
        forwarded = now;
    }
    // What the program takes makes room.
    let mut got = vec![0; forwarded as usize];
    program.read_exact(&mut got).unwrap();
    assert!(got.iter().all(|&b| b == 0x5a));
    while rig.expect(CREDIT_UPDATE).fwd_cnt <= forwarded {}
}

#[test]
fn too_much_data_ends_the_connection() {
    let mut rig = Rig::new();
    let (program, port) = rig.connect();
    let block = vec![1; 64 << 10];
    let mut ops = Vec::new();
    for _ in 0..64 {
        rig.send(&Packet::new(RW, 1234, port).with(&block));
        while let Some((head, len)) = rig.rx.poll(&rig.d.machine.memory) {
            let at = RX_BUFFERS + u64::from(head) * BUFFER;
            let mut bytes = vec![0; len as usize];
            rig.d.machine.memory.read(at, &mut bytes).unwrap();
            ops.push(Packet::parse(&bytes).op);
            rig.offer(head);
        }
        if ops.contains(&RST) {
            break;
        }
    }
    assert!(ops.contains(&RST), "{ops:?}");
    drop(program);
    rig.works();
}

#[test]
fn what_was_sent_arrives_though_the_guest_forgets() {
    let mut rig = Rig::new();
    let (mut program, port) = rig.connect();
    // More than the host's socket takes at once.
    let data: Vec<u8> = (0..400_u32 << 10).map(|n| (n / 3) as u8).collect();
    for block in data.chunks(50 << 10) {
        rig.send(&Packet::new(RW, 1234, port).with(block));
    }
    rig.send(&Packet {
        flags: 3,
        ..Packet::new(SHUTDOWN, 1234, port)
    });
    rig.send(&Packet::new(RST, 1234, port));
    let mut got = Vec::new();
    program.read_to_end(&mut got).unwrap();
    assert!(got == data, "{} of {}", got.len(), data.len());
    rig.works();
}

/// Every packet that breaks a rule: what comes back, if anything.
#[test]
fn hostile_packets() {
    let plain = |op| Packet::new(op, 1234, 0);
    let table: Vec<(&str, Packet, Option<u16>, bool)> = vec![
        // Name, packet (port 0: the connection's), the answer, whether the connection is still there.
        ("unknown operation", plain(0), Some(RST), false),
        ("a large operation", plain(0xffff), Some(RST), false),
        (
            "unknown type",
            Packet {
                kind: 2,
                ..plain(RW)
            },
            Some(RST),
            true,
        ),
        (
            "type 0",
            Packet {
                kind: 0,
                ..plain(REQUEST)
            },
            Some(RST),
            true,
        ),
        (
            "a reset of an unknown type",
            Packet {
                kind: 9,
                ..plain(RST)
            },
            None,
            true,
        ),
        (
            "to another guest",
            Packet {
                dst_cid: 4,
                ..plain(RW)
            },
            Some(RST),
            true,
        ),
        (
            "to nobody",
            Packet {
                dst_cid: u64::MAX,
                ..plain(REQUEST)
            },
            Some(RST),
            true,
        ),
        (
            "of another guest",
            Packet {
                src_cid: 4,
                ..plain(RW)
            },
            None,
            true,
        ),
        ("a second request", plain(REQUEST), Some(RST), false),
        ("a second response", plain(RESPONSE), Some(RST), false),
        (
            "more data than there is",
            Packet {
                len: Some(50),
                ..plain(RW).with(b"short")
            },
            Some(RST),
            false,
        ),
        (
            "4 GiB of data",
            Packet {
                len: Some(u32::MAX),
                ..plain(RW).with(b"short")
            },
            Some(RST),
            false,
        ),
        (
            "more dealt with than was sent",
            Packet {
                fwd_cnt: 12345,
                ..plain(CREDIT_UPDATE)
            },
            None,
            true,
        ),
        (
            "no room",
            Packet {
                buf_alloc: 0,
                ..plain(CREDIT_UPDATE)
            },
            None,
            true,
        ),
        (
            "unknown flags",
            Packet {
                flags: 0xffff_fff0,
                ..plain(SHUTDOWN)
            },
            None,
            true,
        ),
        (
            "data of no connection",
            Packet::new(RW, 77, 78).with(b"lost"),
            Some(RST),
            true,
        ),
        (
            "a reset of no connection",
            Packet::new(RST, 77, 78),
            None,
            true,
        ),
        (
            "a response to nothing",
            Packet::new(RESPONSE, 77, 78),
            Some(RST),
            true,
        ),
        (
            "the port that is none",
            Packet::new(REQUEST, 77, u32::MAX),
            Some(RST),
            true,
        ),
        (
            "from the port that is none, to it",
            Packet::new(REQUEST, u32::MAX, u32::MAX),
            Some(RST),
            true,
        ),
    ];
    for (name, packet, answer, stays) in table {
        let mut rig = Rig::new();
        let (mut program, port) = rig.connect();
        let packet = Packet {
            dst_port: match packet.dst_port {
                0 => port,
                other => other,
            },
            ..packet
        };
        rig.send(&packet);
        if let Some(op) = answer {
            let got = rig.next();
            assert_eq!(got.op, op, "{name}: {got:?}");
            let ports = (got.src_port, got.dst_port);
            assert_eq!(ports, (packet.dst_port, packet.src_port), "{name}");
        }
        rig.quiet();
        program.set_nonblocking(true).unwrap();
        match program.read(&mut [0; 1]) {
            Ok(0) => assert!(!stays, "{name}"),
            Err(error) if error.kind() == ErrorKind::WouldBlock => assert!(stays, "{name}"),
            other => panic!("{name}: {other:?}"),
        }
        rig.works();
        rig.d.assert_working();
    }
}

#[test]
fn packets_that_are_none() {
    let mut rig = Rig::new();
    for len in [1, 7, HEADER - 1] {
        rig.send_bytes(&vec![0xff; len]);
    }
    rig.quiet();
    rig.works();
    // A receive buffer that holds no packet: only a reset of the device helps.
    let mut rig = Rig::new();
    rig.rx.next_desc = 0;
    let (rx, tx, event) = start(&rig.d);
    (rig.rx, rig.tx, rig.event) = (rx, tx, event);
    (rig.rx).submit(&rig.d, &[(RX_BUFFERS, HEADER as u32, true)]);
    rig.d
        .machine
        .memory
        .write(TX_BUFFER, &Packet::new(RW, 1, 2).bytes())
        .unwrap();
    rig.tx.submit(&rig.d, &[(TX_BUFFER, HEADER as u32, false)]);
    rig.d.wait_broken();
    let (rx, tx, event) = start(&rig.d);
    (rig.rx, rig.tx, rig.event) = (rx, tx, event);
    rig.offer_all();
    rig.works();
}

/// A guest that takes no answers cannot make the device keep them all, and is answered once it does.
#[test]
fn a_flood_without_receive_buffers() {
    let mut rig = Rig::new();
    let listener = UnixListener::bind(rig.dir.path().join("v_80")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let (rx, tx, event) = start(&rig.d);
    (rig.rx, rig.tx, rig.event) = (rx, tx, event);
    let memory = rig.d.machine.memory.clone();
    // Each connection is asked for and given up again, or is to nobody.
    let mut stalled = false;
    'flood: for n in 0..2000 {
        for packet in [
            Packet::new(REQUEST, 500, 80),
            Packet::new(RST, 500, 80),
            Packet::new(RW, n, 81),
        ] {
            memory.write(TX_BUFFER, &packet.bytes()).unwrap();
            rig.tx.submit(&rig.d, &[(TX_BUFFER, HEADER as u32, false)]);
            let start = std::time::Instant::now();
            while rig.tx.poll(&memory).is_none() {
                if start.elapsed() > Duration::from_millis(500) {
                    stalled = true;
                    break 'flood;
                }
                std::thread::yield_now();
            }
            while listener.accept().is_ok() {}
        }
    }
    assert!(stalled, "the device takes packets without end");
    rig.offer_all();
    rig.tx.wait(&rig.d);
    while let Some((head, _)) = rig.rx.poll(&memory) {
        rig.offer(head);
    }
    rig.d.assert_working();
}

#[test]
fn connections_are_bounded() {
    let mut rig = Rig::new();
    let listener = UnixListener::bind(rig.dir.path().join("v_80")).unwrap();
    let mut programs = Vec::new();
    let mut refused = false;
    for port in 1000..3000 {
        rig.send(&Packet::new(REQUEST, port, 80));
        match rig.next().op {
            RESPONSE => programs.push(listener.accept().unwrap().0),
            RST => {
                refused = true;
                break;
            }
            op => panic!("{op}"),
        }
    }
    assert!(refused && programs.len() >= 100, "{}", programs.len());
    // Those that the host has closed make room.
    drop(programs.pop());
    while rig.expect(SHUTDOWN).flags & 1 == 0 {}
    rig.send(&Packet::new(REQUEST, 4000, 80));
    let mut ops = [rig.next().op, rig.next().op];
    ops.sort();
    assert_eq!(ops, [RESPONSE, RST]);
}

#[test]
fn a_reset_ends_connections() {
    let mut rig = Rig::new();
    let (mut program, _) = rig.connect();
    rig.d.set_status(0);
    assert_eq!(program.read(&mut [0; 9]).unwrap(), 0);
    let (rx, tx, event) = start(&rig.d);
    (rig.rx, rig.tx, rig.event) = (rx, tx, event);
    rig.offer_all();
    rig.works();
}

#[test]
fn pause_keeps_and_restore_ends_connections() {
    let mut rig = Rig::new();
    rig.event.submit(&rig.d, &[(EVENT_BUFFER, 4, true)]);
    let (mut program, port) = rig.connect();
    rig.device.pause();
    program.write_all(b"held").unwrap();
    let mut early = UnixStream::connect(rig.path()).unwrap();
    early.write_all(b"CONNECT 1234\n").unwrap();
    let saved = rig.device.save();
    assert_eq!(rig.rx.poll(&rig.d.machine.memory), None);
    rig.device.resume();
    let mut ops = [rig.next(), rig.next()];
    ops.sort_by_key(|packet| packet.op);
    assert_eq!(ops[0].op, REQUEST);
    assert_eq!(ops[1].data, b"held");
    rig.send(&Packet::new(RST, 1234, ops[0].src_port));
    assert_eq!(early.read(&mut [0; 9]).unwrap(), 0);

    rig.device.pause();
    assert_eq!(rig.event.poll(&rig.d.machine.memory), None);
    rig.device.restore(&saved).unwrap();
    rig.device.resume();
    assert_eq!(program.read(&mut [0; 9]).unwrap(), 0);
    let (_, len) = rig.event.wait(&rig.d);
    assert_eq!(len, 4);
    let event = rig.d.machine.memory.read_u32(EVENT_BUFFER).unwrap();
    assert_eq!(event, 0);
    rig.send(&Packet::new(RW, 1234, port).with(b"late"));
    // The receive ring is where it was when the state was saved, so its buffers are given again.
    rig.device.pause();
    assert_round_trip(&*rig.device);
    rig.device.resume();
}
