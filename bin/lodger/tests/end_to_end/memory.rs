//! Memory that goes back to the host, and machines that get more or less of it while they run.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::guest::{guest, path};
use crate::process::{Finished, Lodger};

const MIB: u64 = 1 << 20;

/// A user's directories, with the images of all.
struct Home(TempDir);

impl Home {
    fn new() -> Home {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(dir.path().join("run")).expect("a folder");
        Home(dir)
    }

    fn start(&self, arguments: &[&str]) -> Lodger {
        let (data, run) = (self.0.path().join("data"), self.0.path().join("run"));
        let environment: [(&str, &Path); 2] = [("XDG_DATA_HOME", &data), ("XDG_RUNTIME_DIR", &run)];
        Lodger::start_in(&environment, arguments)
    }

    #[track_caller]
    fn lodger(&self, arguments: &[&str]) -> Finished {
        self.start(arguments).finish()
    }

    fn wait_for(&self, text: &str) {
        let mut logs = self.start(&["logs", "-f", "vm"]);
        logs.wait_for(text);
        logs.terminate();
    }

    fn inspect(&self) -> Value {
        let text = self.lodger(&["inspect", "vm"]).expect(0).text();
        let found: Value = serde_json::from_str(&text).expect("JSON");
        found[0].clone()
    }

    /// A figure of the memory that it has now, in MiB.
    fn now(&self, key: &str) -> u64 {
        let found = self.inspect();
        let figure = found["memory_now"].pointer(&format!("/{key}"));
        let number = figure.and_then(Value::as_u64);
        number.unwrap_or_else(|| panic!("no {key}: {found:#}")) / MIB
    }

    /// Waits until it is so.
    #[track_caller]
    fn until(&self, key: &str, right: impl Fn(u64) -> bool) -> u64 {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let now = self.now(key);
            if right(now) {
                return now;
            }
            assert!(Instant::now() < deadline, "{key} stays at {now} MiB");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// What the monitor takes of the host, RAM included.
    fn resident(&self) -> u64 {
        let pid = &self.inspect()["pid"];
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let figure = line.and_then(|line| line.split_whitespace().nth(1));
        figure
            .and_then(|kib| kib.parse::<u64>().ok())
            .expect("a figure")
            / 1024
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.start(&["rm", "-f", "vm"]).finish();
    }
}

#[test]
fn memory_goes_back_to_the_host_and_comes_again() {
    let home = Home::new();
    // Its shell waits for lines on the console; a file in memory is memory that is used.
    let script = "mount -t tmpfs -o size=90% t /mnt; read x; dd if=/dev/zero of=/mnt/x bs=1M count=300; echo FULL; read x; rm /mnt/x; echo EMPTY; \
        while read x; do grep MemFree /proc/meminfo; dd if=/dev/zero of=/mnt/x bs=1M count=$x && rm /mnt/x && echo GOT $x; done";
    let append = format!("lodger.run=\"{script}\"");
    let run = [
        "run",
        "-d",
        "--name",
        "vm",
        "--net",
        "none",
        "-m",
        "512M,max=1G",
    ];
    home.lodger(&[&run[..], &["--append", &append, "mini"]].concat())
        .expect(0);
    home.wait_for("Lodger mini");
    // It starts with as much as it was told.
    home.until("actual", |mib| mib == 512);
    let before = home.now("host");
    let mut console = home.start(&["console", "vm"]);
    let mut type_in = |text: &str| console.type_in(text);

    // What is free is reported by the guest of itself.
    type_in("\n");
    home.wait_for("FULL");
    assert!(home.now("host") >= before + 290, "{before} MiB before");
    let full = home.resident();
    type_in("\n");
    home.wait_for("EMPTY");
    home.until("host", |mib| mib < before + 100);
    assert!(home.resident() + 200 <= full, "{full} MiB when full");
    assert!(home.now("reported") >= 200);
    home.until("guest/free", |mib| mib > 200);
    assert!(home.now("guest/total") > 900);

    // Less and more, and it can be used.
    home.lodger(&["set", "vm", "--memory", "256M"]).expect(0);
    assert_eq!((home.now("asked"), home.now("actual")), (256, 256));
    home.lodger(&["set", "vm", "--memory", "1G"]).expect(0);
    assert_eq!((home.now("asked"), home.now("actual")), (1024, 1024));
    type_in("600\n");
    home.wait_for("GOT 600");
    let more = home.lodger(&["set", "vm", "--memory", "2G"]).expect(1);
    assert!(more.stderr.contains("at most 1024 MiB"), "{}", more.stderr);
    // A machine that has been told is as it was, and can be told of its next start.
    home.lodger(&["set", "vm", "--memory", "1G,max=2G"])
        .expect(2);
    home.lodger(&["kill", "vm"]).expect(0);
    home.lodger(&["set", "vm", "--memory", "768M"]).expect(0);
    let stopped = home.inspect();
    assert_eq!(stopped["memory"].as_u64(), Some(768 * MIB));
    assert_eq!(stopped["max_memory"].as_u64(), Some(1024 * MIB));
}

#[test]
fn a_guest_without_a_driver_keeps_its_memory() {
    let home = Home::new();
    // hlt; jmp
    let kernel = guest(&[0xf4, 0xeb, 0xfd]);
    let run = ["run", "-d", "--name", "vm", "--net", "none", "-m", "64M"];
    home.lodger(&[&run[..], &["--kernel", path(&kernel)]].concat())
        .expect(0);
    let refused = home.lodger(&["set", "vm", "--memory", "32M"]).expect(1);
    assert!(
        refused.stderr.contains("virtio_balloon"),
        "{}",
        refused.stderr
    );
    assert_eq!((home.now("actual"), home.now("max")), (64, 64));
    assert_eq!(home.inspect()["memory_now"]["guest"], Value::Null);
}
