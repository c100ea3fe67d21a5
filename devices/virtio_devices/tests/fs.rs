//! A shared folder as the guest's driver sees it. What requests do is tested with `backends/share`.

use std::fs;
use std::sync::Arc;

use lodger_device_model::{Device, assert_round_trip};
use lodger_virtio::driver::{Driver, DriverQueue, Machine};
use lodger_virtio::{F_VERSION_1, VirtioPci};
use lodger_virtio_devices::FsSpec;
use tempfile::{TempDir, tempdir};

const REQUEST: u64 = 0x4_0000;
const REPLY: u64 = 0x5_0000;

struct Rig {
    dir: TempDir,
    d: Driver,
    device: Arc<VirtioPci>,
    urgent: DriverQueue,
    requests: DriverQueue,
}

fn spec(dir: &TempDir, tag: &str) -> FsSpec {
    FsSpec {
        folder: dir.path().into(),
        tag: tag.into(),
        read_only: false,
        owner: (0, 0),
    }
}

impl Rig {
    fn new() -> Rig {
        let dir = tempdir().unwrap();
        fs::write(dir.path().join("file"), b"contents").unwrap();
        let machine = Machine::new();
        let device = spec(&dir, "a tag")
            .build("fs", &machine.wiring(), 64)
            .unwrap();
        let d = machine.plug(&device);
        d.enable_msix();
        assert_eq!(d.negotiate(F_VERSION_1), 11);
        let (urgent, requests) = (d.queue(0, 8, 0x1_0000), d.queue(1, 8, 0x2_0000));
        d.ready();
        let mut rig = Rig {
            dir,
            d,
            device,
            urgent,
            requests,
        };
        let hello: Vec<u8> = [7_u32, 38, 0, u32::MAX]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect();
        assert_eq!(rig.ask(26, 0, &hello, 80).len(), 80);
        rig
    }

    fn write_request(&self, opcode: u32, node: u64, body: &[u8]) -> u32 {
        let len = 40 + body.len() as u32;
        let words = [len, opcode].map(u32::to_le_bytes).concat();
        let longs = [1, node, 0, 0].map(u64::to_le_bytes).concat();
        let bytes = [&words, &longs, body].concat();
        self.d.machine.memory.write(REQUEST, &bytes).unwrap();
        len
    }

    /// The whole reply.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) -> Vec<u8> {
        let len = self.write_request(opcode, node, body);
        // Header and body, and the parts of the reply, in buffers of their own.
        let buffers = [
            (REQUEST, 40, false),
            (REQUEST + 40, len - 40, false),
            (REPLY, 16, true),
            (REPLY + 16, room - 16, true),
        ];
        self.requests.submit(&self.d, &buffers);
        let (_, written) = self.requests.wait(&self.d);
        let mut reply = vec![0; written as usize];
        self.d.machine.memory.read(REPLY, &mut reply).unwrap();
        reply
    }
}

#[test]
fn requests_are_answered_and_data_is_whole() {
    let mut rig = Rig::new();
    let mut config = [0; 40];
    for (n, word) in config.chunks_mut(4).enumerate() {
        word.copy_from_slice(&rig.d.read::<4>(rig.d.config + 4 * n as u64));
    }
    assert_eq!(&config[..6], b"a tag\0");
    assert_eq!(config[36..], [1, 0, 0, 0], "one request queue");
    let found = rig.ask(1, 1, b"file\0", 4096);
    assert_eq!(found.len(), 144);
    let node = u64::from_le_bytes(found[16..24].try_into().unwrap());
    let opened = rig.ask(14, node, &[2, 0, 0, 0, 0, 0, 0, 0], 32);
    let handle = opened[16..24].to_vec();
    // Handle, offset, size, the rest.
    let at = |offset: u64, size: u32| {
        let mut body = [&handle[..], &offset.to_le_bytes(), &size.to_le_bytes()].concat();
        body.resize(40, 0);
        body
    };
    assert_eq!(rig.ask(15, node, &at(3, 4096), 4096)[16..], b"tents"[..]);
    let written = rig.ask(16, node, &[&at(8, 5)[..], b" more"].concat(), 24);
    assert_eq!(written[16..20], [5, 0, 0, 0]);
    assert_eq!(
        fs::read(rig.dir.path().join("file")).unwrap(),
        b"contents more"
    );
    // Forgotten by the other queue; there is no reply.
    let len = rig.write_request(2, node, &1_u64.to_le_bytes());
    rig.urgent.submit(&rig.d, &[(REQUEST, len, false)]);
    assert_eq!(rig.urgent.wait(&rig.d).1, 0);
    assert_ne!(
        rig.ask(3, node, &[0; 16], 200)[4..8],
        [0; 4],
        "nobody knows it"
    );
    rig.d.assert_working();
    assert_round_trip(&*rig.device);
}

#[test]
fn a_request_that_cannot_be_answered_breaks_the_device_until_a_reset() {
    let bad: [&[(u64, u32, bool)]; 3] = [
        &[(REQUEST, 39, false), (REPLY, 4096, true)],
        &[(REQUEST, 45, false), (REPLY, 15, true)],
        &[(REQUEST, 45, false)],
    ];
    for buffers in bad {
        let mut rig = Rig::new();
        rig.write_request(1, 1, b"file\0");
        rig.requests.submit(&rig.d, buffers);
        rig.d.wait_broken();
        rig.d.set_status(0);
        assert_eq!(rig.d.negotiate(F_VERSION_1), 11);
        rig.requests = rig.d.queue(1, 8, 0x2_0000);
        rig.d.ready();
        assert_eq!(rig.ask(1, 1, b"file\0", 4096).len(), 144);
    }
}

#[test]
fn a_reset_forgets_what_the_guest_has_open() {
    let mut rig = Rig::new();
    let open_below = |rig: &Rig| {
        let root = rig.dir.path().canonicalize().unwrap();
        let all = fs::read_dir("/proc/self/fd").unwrap();
        all.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
            .filter(|path| path.starts_with(&root))
            .count()
    };
    let found = rig.ask(1, 1, b"file\0", 4096);
    let node = u64::from_le_bytes(found[16..24].try_into().unwrap());
    rig.ask(14, node, &[0; 8], 32);
    assert_eq!(open_below(&rig), 2);
    rig.device.reset();
    assert_eq!(open_below(&rig), 1);
}

#[test]
fn wrong_tags_are_refused() {
    let dir = tempdir().unwrap();
    for tag in ["", &"x".repeat(37)] {
        assert!(
            spec(&dir, tag)
                .check()
                .unwrap_err()
                .to_string()
                .contains("tag")
        );
    }
    spec(&dir, &"x".repeat(36)).check().unwrap();
}
