//! The socket device: a guest that sends the packets that the input says, and programs of the host that do what it says.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use lodger_device_model::{Device, assert_round_trip};
use lodger_virtio::driver::{Driver, DriverQueue, Machine};
use lodger_virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioPci};
use lodger_virtio_devices::VsockSpec;

use crate::virtio::{BUFFERS, Input, QUEUE_SIZE, RINGS, misuse};

const HEADER: u32 = 44;
/// Bytes of a receive buffer.
const ROOM: u32 = 4096;
const TX: u64 = BUFFERS + 0x1_0000;
const FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;

/// Rings of nonsense, or packets of nonsense in good rings.
pub fn virtio_vsock(data: &[u8]) {
    let mut input = Input(data);
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("v");
    let machine = Machine::new();
    let device = VsockSpec::new(&path).build("vsock", &machine.wiring());
    let device = device.expect("the host has threads");
    let d = machine.plug(&device);
    match input.byte() % 4 {
        queue @ 0..3 => misuse(&d, &device, queue.into(), FEATURES, &mut input),
        _ => {
            let listener = UnixListener::bind(dir.path().join("v_2")).expect("a socket");
            listener.set_nonblocking(true).expect("a socket");
            let connect = || UnixStream::connect(&path).expect("the device listens");
            packets(&d, &device, &mut input, &listener, connect);
        }
    }
    // After a reset it works as if nothing had happened.
    d.set_pci(4, &[6, 0]);
    let (mut rx, _) = start(&d);
    let mut program = UnixStream::connect(&path).expect("the device listens");
    program.write_all(b"CONNECT 9\n").expect("it listens");
    let (_, len) = rx.wait(&d);
    assert_eq!(len, HEADER);
    let mut op = [0; 2];
    (d.machine.memory.read(BUFFERS + 30, &mut op)).expect("it is RAM");
    assert_eq!(op, [1, 0]);
    d.assert_working();
}

/// Good rings, with a receive buffer.
fn start(d: &Driver) -> (DriverQueue, DriverQueue) {
    d.negotiate(FEATURES);
    let mut rx = d.queue(0, QUEUE_SIZE, RINGS);
    let tx = d.queue(1, QUEUE_SIZE, RINGS + 0x8000);
    d.ready();
    rx.submit(d, &[(BUFFERS, ROOM, true)]);
    (rx, tx)
}

fn packets(
    d: &Driver,
    device: &VirtioPci,
    input: &mut Input,
    listener: &UnixListener,
    connect: impl Fn() -> UnixStream,
) {
    let m = &d.machine.memory;
    let (mut rx, mut tx) = start(d);
    let mut programs: Vec<UnixStream> = Vec::new();
    // The ports of the latest packet from the host.
    let mut heard = [0; 8];
    while !input.0.is_empty() {
        let choice = usize::from(input.byte());
        match choice % 16 {
            0..7 => {
                let len = match input.byte() {
                    255 => input.len(),
                    n => u32::from(n) * 16,
                };
                let packet = header(input, &heard, len);
                m.write(TX, &packet).expect("it is RAM");
                let there = HEADER + len.min(60 << 10);
                tx.submit(d, &[(TX, there, false)]);
            }
            7..10 if rx.poll(m).is_some() => {
                m.read(BUFFERS + 16, &mut heard).expect("it is RAM");
                rx.submit(d, &[(BUFFERS, ROOM, true)]);
            }
            10 => {
                let mut program = connect();
                program.set_nonblocking(true).expect("a socket");
                let request = format!("CONNECT {}\n", input.byte() % 4);
                // The device may be too slow for all that want something.
                let _ = program.write_all(request.as_bytes());
                programs.push(program);
            }
            11 => {
                while let Ok((program, _)) = listener.accept() {
                    program.set_nonblocking(true).expect("a socket");
                    programs.push(program);
                }
            }
            12 if !programs.is_empty() => {
                let at = usize::from(input.byte()) % programs.len();
                match input.byte() % 4 {
                    0 => drop(programs.swap_remove(at)),
                    // Those fail where the device has closed its end.
                    1 => drop(programs[at].shutdown(Shutdown::Write)),
                    2 => drop(programs[at].write(&vec![7; input.len() as usize % 100_000])),
                    _ => {
                        let mut bytes = vec![0; input.len() as usize % 100_000 + 1];
                        match programs[at].read(&mut bytes) {
                            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                            Ok(1..) => {}
                            _ => drop(programs.swap_remove(at)),
                        }
                    }
                }
            }
            13 => {
                device.pause();
                assert_round_trip(device);
                device.resume();
            }
            14 => (rx, tx) = start(d),
            _ => {}
        }
    }
}

/// A packet's header, most likely one that makes some sense; `len` bytes follow.
fn header(input: &mut Input, heard: &[u8; 8], len: u32) -> Vec<u8> {
    let cid = |input: &mut Input, usual: u64| match input.byte() {
        255 => input.number(),
        n @ 250..=254 => u64::from(n) - 250,
        _ => usual,
    };
    let mut bytes = Vec::new();
    bytes.extend(cid(input, 3).to_le_bytes());
    bytes.extend(cid(input, 2).to_le_bytes());
    match input.byte() {
        0..=150 => {
            bytes.extend(&heard[4..]);
            bytes.extend(&heard[..4]);
        }
        n => {
            bytes.extend(u32::from(n % 4).to_le_bytes());
            bytes.extend(u32::from(n / 4 % 4).to_le_bytes());
        }
    }
    let claimed = match input.byte() {
        n @ 0..=9 => len.wrapping_sub(5).wrapping_add(n.into()),
        _ => len,
    };
    bytes.extend(claimed.to_le_bytes());
    let kind = match input.byte() {
        n @ 0..=3 => u16::from(n),
        _ => 1,
    };
    bytes.extend(kind.to_le_bytes());
    bytes.extend(u16::from(input.byte() % 9).to_le_bytes());
    bytes.extend(u32::from(input.byte() % 5).to_le_bytes());
    let room = match input.byte() {
        n @ 0..=9 => u32::from(n),
        _ => input.number() as u32,
    };
    bytes.extend(room.to_le_bytes());
    let forwarded = match input.byte() {
        n @ 0..=200 => u32::from(n),
        _ => input.number() as u32,
    };
    bytes.extend(forwarded.to_le_bytes());
    bytes
}
