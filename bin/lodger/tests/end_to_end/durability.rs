//! What a guest has flushed is there, whatever becomes of the monitor: it is killed while a guest writes, and every image is looked at.
//!
//! A few kills; for more: `LODGER_KILLS=200 cargo test -p lodger --test end_to_end durability`.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lodger_block::{BlockBackend, check, open};

use crate::process::{Lodger, lodger};

const BLOCK: u64 = 4096;
/// The most blocks of a change.
const MOST: u64 = 16;
/// The most changes of a run.
const RUN: u64 = 1 << 32;

/// As in `writer.c`.
fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d049bb133111eb);
    x ^ x >> 31
}

/// A change: its blocks, and whether they become zero.
fn change(n: u64, blocks: u64) -> (std::ops::Range<u64>, bool) {
    let r = mix(n);
    let many = (r >> 8) % MOST + 1;
    let first = (r >> 16) % (blocks - many);
    (first..first + many, r % 8 < 2)
}

/// The change that has written these bytes, 0 for zeroes. None: nobody has.
fn author(bytes: &[u8], block: u64) -> Option<u64> {
    let mut words = bytes
        .chunks(8)
        .map(|w| u64::from_le_bytes(w.try_into().expect("8 bytes")));
    let n = words.next()?;
    let whole = words.zip(1..).all(|(word, i)| match n {
        0 => word == 0,
        n => word == mix(n ^ block << 40 ^ i),
    });
    whole.then_some(n)
}

/// What is known of a disk: the author of each block.
struct Known(Vec<u64>);

impl Known {
    /// Compares with the disk after changes from `first` on, of which those up to `synced` are durable; takes what is found.
    fn compare(&mut self, disk: &dyn BlockBackend, first: u64, synced: u64, name: &str) {
        let blocks = self.0.len() as u64;
        // Later changes may have been made as well, some of them. There are few between two flushes.
        let mut allowed: Vec<Vec<u64>> = self.0.iter().map(|&n| vec![n]).collect();
        for n in first..=synced + 1000 {
            let (range, zero) = change(n, blocks);
            for block in range {
                let allowed = &mut allowed[block as usize];
                if n <= synced {
                    allowed.clear();
                }
                allowed.push(if zero { 0 } else { n });
            }
        }
        let mut bytes = vec![0; BLOCK as usize];
        for (block, known) in self.0.iter_mut().enumerate() {
            let at = block as u64;
            disk.read_at(at * BLOCK, &mut bytes)
                .expect("it can be read");
            let found = author(&bytes, at);
            let allowed = &allowed[block];
            assert!(
                found.is_some_and(|n| allowed.contains(&n)),
                "{name}: block {block} is of {found:?}, allowed are {allowed:?}; durable up to {synced}"
            );
            *known = found.unwrap_or(0);
        }
    }
}

#[test]
fn what_is_flushed_survives_a_kill() {
    let kills = std::env::var("LODGER_KILLS").map_or(3, |n| n.parse().expect("a number"));
    // A kill leaves the host's cache as it is, so a disk of the host's would only make it slower.
    let dir = match Path::new("/dev/shm") {
        shm if shm.is_dir() => tempfile::tempdir_in(shm),
        _ => tempfile::tempdir(),
    };
    let dir = dir.expect("a directory");
    let path = |name: &str| dir.path().join(name).to_str().expect("ASCII").to_owned();
    let (raw, qcow2, writer) = (path("raw.img"), path("disk.qcow2"), path("writer"));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/end_to_end/writer.c");
    let gcc = Command::new("gcc")
        .args(["-O2", "-static", "-o", &writer, source])
        .status();
    assert!(
        gcc.is_ok_and(|status| status.success()),
        "gcc makes the writer"
    );
    for disk in [&raw, &qcow2] {
        lodger(&["disk", "create", disk, "12M"]).expect(0);
    }
    let blocks = (12 << 20) / BLOCK as usize;
    let mut known = [&raw, &qcow2].map(|name| (name, Known(vec![0; blocks])));
    for kill in 1..=kills {
        let first = kill * RUN;
        let append = format!(
            "lodger.run=\"cat /dev/vda > /writer; chmod 700 /writer; /writer {first} /dev/vdb /dev/vdc\""
        );
        let mut run = Lodger::start(&[
            "run",
            "mini",
            "-q",
            "--net",
            "none",
            "--append",
            &append,
            "--disk",
            &format!("{writer},ro"),
            "--disk",
            &raw,
            "--disk",
            &qcow2,
        ]);
        run.wait_for("WRITING");
        run.wait_for("SYNCED");
        std::thread::sleep(Duration::from_millis(mix(kill) % 700));
        let output = run.kill();
        // A line that was cut short says nothing.
        let lines = output.split_inclusive('\n').filter(|l| l.ends_with('\n'));
        let synced = lines.filter_map(|l| l.trim().strip_prefix("SYNCED ")?.parse().ok());
        let synced = synced.max().unwrap_or(first - 1);
        for (name, known) in &mut known {
            let report = check(name.as_ref(), None, false).expect("it can be checked");
            assert_eq!(report.errors, 0, "{report:?}");
            for read_only in [true, false] {
                let disk = open(name.as_ref(), read_only, None).expect("it opens");
                known.compare(&*disk, first, synced, name);
            }
        }
        eprintln!("kill {kill}: {} changes were durable", synced + 1 - first);
    }
}
