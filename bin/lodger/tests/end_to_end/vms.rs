//! VMs with names: in the background, through crashes, and everything that is asked of them.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::{NamedTempFile, TempDir};

use crate::guest::{debug_exit, guest, path};
use crate::process::{Finished, Lodger};

/// mov edx, 0x3f8; mov al, '!'; out dx, al; mov al, '\n'; out dx, al; 1: hlt; jmp 1b
const SILENT: &[u8] = &[
    0xba, 0xf8, 3, 0, 0, 0xb0, b'!', 0xee, 0xb0, b'\n', 0xee, 0xf4, 0xeb, 0xfd,
];

/// Enables the power button (port 0x602), prints '!', waits for it in the status (0x600), powers off (0x604).
const POLITE: &[u8] = &[
    0xba, 2, 6, 0, 0, 0x66, 0xb8, 0, 1, 0x66,
    0xef, // mov edx, 0x602; mov ax, 0x100; out dx, ax
    0xba, 0xf8, 3, 0, 0, 0xb0, b'!', 0xee, // mov edx, 0x3f8; mov al, '!'; out dx, al
    0xba, 0, 6, 0, 0, 0x66, 0xed, 0xf6, 0xc4, 1, 0x74,
    0xf9, // mov edx, 0x600; 1: in ax, dx; test ah, 1; jz 1b
    0xba, 4, 6, 0, 0, 0x66, 0xb8, 0, 0x34, 0x66,
    0xef, // mov edx, 0x604; mov ax, 0x3400; out dx, ax
    0xeb, 0xfe, // jmp .
];

/// Prints each byte it gets plus one; at '!' it ends with status 1.
fn echo() -> Vec<u8> {
    let mut code = vec![
        0xba, 0xfd, 3, 0, 0, 0xec, 0xa8, 1, 0x74, 0xf6, 0xb2, 0xf8, 0xec, 0x3c, b'!', 0x74, 5,
        0xfe, 0xc0, 0xee, 0xeb, 0xea,
    ];
    code.extend(debug_exit(0));
    code
}

/// A user's directories. All VMs in it end with it.
struct Home {
    dir: TempDir,
    runtime: PathBuf,
}

impl Home {
    fn new() -> Home {
        let dir = tempfile::tempdir().expect("a folder");
        let runtime = dir.path().join("run");
        std::fs::create_dir(&runtime).expect("a folder");
        Home { dir, runtime }
    }

    /// Without a runtime directory, and with a data directory whose name has no room in a socket's address.
    fn without_runtime() -> Home {
        let dir = tempfile::tempdir().expect("a folder");
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).expect("a folder");
        Home {
            runtime: PathBuf::from("not/absolute"),
            dir,
        }
    }

    fn data(&self) -> PathBuf {
        match self.runtime.is_absolute() {
            true => self.dir.path().join("data"),
            false => self.dir.path().join("d".repeat(120)),
        }
    }

    fn start(&self, arguments: &[&str]) -> Lodger {
        let (data, cache) = (self.data(), self.dir.path().join("cache"));
        let environment: [(&str, &Path); 3] = [
            ("XDG_DATA_HOME", &data),
            ("XDG_RUNTIME_DIR", &self.runtime),
            ("XDG_CACHE_HOME", &cache),
        ];
        Lodger::start_in(&environment, arguments)
    }

    /// Makes an image with a disk, which boots this guest.
    fn make_image(&self, name: &str, kernel: &NamedTempFile) -> PathBuf {
        let dir = self.dir.path().join("cache/lodger/images").join(name);
        std::fs::create_dir_all(&dir).expect("a folder");
        std::fs::copy(kernel.path(), dir.join("vmlinuz")).expect("a kernel");
        std::fs::write(dir.join("initrd.cpio"), "nothing").expect("an initrd");
        std::fs::write(dir.join("root.img"), [7; 1 << 20]).expect("a disk");
        let part = |file: &str| {
            let size = dir.join(file).metadata().expect("a file").len();
            json!({"file": file, "size": size, "sha256": ""})
        };
        let manifest = json!({
            "format": 4, "append": "", "kernel_release": "", "packages": {},
            "kernel": part("vmlinuz"), "initrd": part("initrd.cpio"), "disk": part("root.img"),
        });
        std::fs::write(dir.join("image.json"), manifest.to_string()).expect("a manifest");
        dir
    }

    #[track_caller]
    fn lodger(&self, arguments: &[&str]) -> Finished {
        self.start(arguments).finish()
    }

    /// Runs a guest in the background.
    #[track_caller]
    fn run(&self, kernel: &NamedTempFile, arguments: &[&str]) -> Finished {
        let first = ["run", "-d", "--engine", "interp", "--net", "none"];
        let kernel = ["--device", "debug-exit", "--kernel", path(kernel)];
        self.lodger(&[&first, &kernel[..], arguments].concat())
    }

    #[track_caller]
    fn inspect(&self, vm: &str) -> Value {
        let text = self.lodger(&["inspect", vm]).expect(0).text();
        let found: Value = serde_json::from_str(&text).expect("JSON");
        found[0].clone()
    }

    #[track_caller]
    fn pid(&self, vm: &str) -> Pid {
        let pid = self.inspect(vm)["pid"].as_i64().expect("it runs");
        Pid::from_raw(pid as i32).expect("a process")
    }

    /// Waits until the guest has printed this.
    #[track_caller]
    fn wait_for(&self, vm: &str, text: &str) {
        let mut logs = self.start(&["logs", "-f", vm]);
        logs.wait_for(text);
        logs.terminate();
    }

    fn vms_left(&self) -> usize {
        let vms = self.data().join("lodger/vms");
        vms.read_dir().map_or(0, |entries| entries.count())
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let names = self.lodger(&["ps", "--all", "-q"]).text();
        for name in names.lines() {
            self.lodger(&["rm", "--force", name]);
        }
    }
}

#[test]
fn from_run_to_rm() {
    let home = Home::new();
    let kernel = guest(SILENT);
    let run = home.run(&kernel, &["--name", "web", "--label", "role=front"]);
    assert_eq!(run.expect(0).text(), "web\n");
    home.wait_for("web", "!");

    let ps = home.lodger(&["ps"]).expect(0).text();
    assert!(ps.contains("web") && ps.contains("running for"), "{ps}");
    let seen = home.inspect("web");
    assert_eq!(seen["state"], "running");
    assert_eq!(seen["engine"], "interp");
    assert_eq!(seen["labels"]["role"], "front");
    let id = seen["id"].as_str().expect("text").to_owned();
    let socket = PathBuf::from(seen["socket"].as_str().expect("text"));
    assert!(socket.starts_with(&home.runtime), "{}", socket.display());
    let mode = socket.metadata().expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    // Names are taken, running VMs are not removed.
    let again = home.run(&kernel, &["--name", "web"]).expect(1);
    assert!(again.stderr.contains("web"), "{}", again.stderr);
    home.lodger(&["rm", "web"]).expect(1);
    home.lodger(&["start", "web"]).expect(1);

    let stop = home.lodger(&["stop", "--time", "0", &id[..6]]).expect(0);
    assert_eq!(stop.text(), "web\n");
    assert!(stop.stderr.contains("does not listen"), "{}", stop.stderr);
    assert_eq!(home.lodger(&["ps", "-q"]).expect(0).text(), "");
    let all = home.lodger(&["ps", "--all", "--json", "--label", "role"]);
    let all: Value = serde_json::from_str(&all.expect(0).text()).expect("JSON");
    assert_eq!(all[0]["name"], "web");
    assert_eq!(all[0]["state"], "exited");
    assert_eq!(all[0]["status"], 137);
    assert_eq!(home.lodger(&["wait", "web"]).expect(0).text(), "137\n");
    let other = home.lodger(&["ps", "-aq", "--label", "role=back"]);
    assert_eq!(other.expect(0).text(), "");
    // A stopped VM keeps its name, too.
    let again = home.run(&kernel, &["--name", "web"]).expect(1);
    assert!(
        again.stderr.contains("lodger start web"),
        "{}",
        again.stderr
    );

    home.lodger(&["start", "web"]).expect(0);
    home.wait_for("web", "!\n!\n");
    home.lodger(&["kill", "web"]).expect(0);
    home.lodger(&["kill", "web"]).expect(1);
    // Both runs are in the log.
    assert_eq!(home.lodger(&["logs", "web"]).expect(0).stdout, b"!\n!\n");
    let tail = home.lodger(&["logs", "--tail", "1", "web"]).expect(0);
    assert_eq!(tail.stdout, b"!\n");
    assert_eq!(home.lodger(&["rm", "web"]).expect(0).text(), "web\n");
    assert_eq!(home.vms_left(), 0);
    assert!(!socket.exists());
    for command in ["inspect", "logs", "stop", "rm", "console", "wait"] {
        let unknown = home.lodger(&[command, "web"]).expect(1);
        assert!(unknown.stderr.contains("no VM web"), "{}", unknown.stderr);
    }
    home.lodger(&["rm", "--force", "web"]).expect(0);
}

#[test]
fn a_killed_monitor_blocks_nothing() {
    let home = Home::without_runtime();
    let kernel = guest(SILENT);
    for _ in 0..3 {
        home.run(&kernel, &["--name", "web"]).expect(0);
        let pid = home.pid("web");
        kill_process(pid, Signal::KILL).expect("it runs");
        // Its lock goes with it.
        while home.lodger(&["ps", "-q"]).expect(0).text() != "" {}
        assert_eq!(home.inspect("web")["state"], "dead");
    }
    // Started again, or removed: both work as ever.
    home.lodger(&["start", "web"]).expect(0);
    let seen = home.inspect("web");
    let socket = seen["socket"].as_str().expect("text");
    assert!(socket.len() > 107, "{socket}");
    home.lodger(&["rm", "--force", "web"]).expect(0);
    assert_eq!(home.vms_left(), 0);
}

#[test]
fn of_several_that_start_at_once_one_gets_the_name() {
    let home = Home::new();
    let kernel = guest(SILENT);
    let arguments = [
        "run", "-d", "--name", "web", "--engine", "interp", "--kernel",
    ];
    let arguments = [&arguments[..], &[path(&kernel)]].concat();
    let starters: Vec<_> = (0..4).map(|_| home.start(&arguments)).collect();
    let ends: Vec<_> = starters.into_iter().map(Lodger::finish).collect();
    let mut statuses: Vec<_> = ends.iter().map(|end| end.status.code()).collect();
    statuses.sort();
    assert_eq!(statuses, [Some(0), Some(1), Some(1), Some(1)]);
    assert_eq!(home.lodger(&["ps", "-aq"]).expect(0).text(), "web\n");
}

#[test]
fn a_start_that_fails_says_why_and_leaves_nothing() {
    let home = Home::new();
    let kernel = guest(SILENT);
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("it is bound").port();
    let publish = format!("127.0.0.1:{port}:80");
    let kernel = path(&kernel);
    let cases: [(&[&str], i32, &str); 5] = [
        (&["--kernel", "/no/such/kernel"], 1, "/no/such/kernel"),
        (&["--kernel", "/dev/null"], 1, "/dev/null"),
        (&["--kernel", kernel, "-p", &publish], 1, &publish),
        (&["--kernel", kernel, "--cpus", "5000"], 2, "vCPUs"),
        (&["no-such-image"], 2, "known images"),
    ];
    for detach in ["--detach", "--label=foreground"] {
        for (arguments, status, says) in cases {
            let first = ["run", detach, "--name", "web", "--engine", "interp"];
            let refused = home.lodger(&[&first, arguments].concat()).expect(status);
            assert!(refused.stderr.contains(says), "{says}: {}", refused.stderr);
            assert_eq!(refused.stdout, b"");
            assert_eq!(home.vms_left(), 0, "{arguments:?}");
        }
    }
    for bad in ["", "a/b", "-x"] {
        home.lodger(&["run", "--name", bad]).expect(2);
    }
}

#[test]
fn the_power_button() {
    let home = Home::new();
    let kernel = guest(POLITE);
    home.run(&kernel, &["--name", "polite"]).expect(0);
    home.wait_for("polite", "!");
    let waiting = home.start(&["wait", "polite"]);
    let stop = home.lodger(&["stop", "--time", "60", "polite"]).expect(0);
    assert!(stop.stderr.contains("powered off"), "{}", stop.stderr);
    assert_eq!(waiting.finish().expect(0).text(), "0\n");
    // A signal to the monitor means the same.
    home.lodger(&["start", "polite"]).expect(0);
    home.wait_for("polite", "!!");
    kill_process(home.pid("polite"), Signal::TERM).expect("it runs");
    assert_eq!(home.lodger(&["wait", "polite"]).expect(0).text(), "0\n");
    let log = home
        .lodger(&["logs", "--monitor", "polite"])
        .expect(0)
        .text();
    assert!(log.contains("signal 15"), "{log}");
}

#[test]
fn consoles_come_and_go() {
    let home = Home::new();
    let kernel = guest(&echo());
    home.run(&kernel, &["--name", "echo"]).expect(0);
    let mut first = home.start(&["console", "echo"]);
    first.type_in("HAL");
    first.wait_for("IBM");
    // Shown what the guest's line is so far.
    let mut second = home.start(&["attach", "echo"]);
    second.wait_for("IBM");
    second.type_in("1");
    first.wait_for("2");
    first.terminate();
    first.finish().expect(128 + 15);
    assert_eq!(home.inspect("echo")["state"], "running");
    second.type_in("!");
    second.finish().expect(0);
    let wait = home.lodger(&["wait", "echo"]).expect(0);
    assert_eq!(wait.text(), "1\n");
    home.lodger(&["console", "echo"]).expect(1);
    let mut third = home.start(&["start", "--attach", "echo"]);
    third.type_in("HAL");
    third.wait_for("IBM");
    third.type_in("!");
    third.finish().expect(0);
}

#[test]
fn restarts_follow_the_policy() {
    let home = Home::new();
    // Prints '!' and ends with status 3.
    let mut code = vec![0xba, 0xf8, 3, 0, 0, 0xb0, b'!', 0xee];
    code.extend(debug_exit(1));
    let kernel = guest(&code);
    let arguments = ["--name", "fails", "--restart", "on-failure:2"];
    home.run(&kernel, &arguments).expect(0);
    assert_eq!(home.lodger(&["wait", "fails"]).expect(0).text(), "3\n");
    assert_eq!(home.lodger(&["logs", "fails"]).expect(0).text(), "!!!");
    assert_eq!(home.inspect("fails")["restarts"], 2);
    // One that would go on for ever is stopped for good, whatever it is doing.
    let arguments = ["--name", "always", "--restart", "always"];
    home.run(&kernel, &arguments).expect(0);
    home.wait_for("always", "!!!");
    home.lodger(&["stop", "always"]).expect(0);
    assert_eq!(home.lodger(&["ps", "-q"]).expect(0).text(), "");
}

#[test]
fn a_vm_in_the_foreground() {
    let home = Home::new();
    let kernel = guest(SILENT);
    let arguments = ["run", "--name", "front", "--engine", "interp", "--kernel"];
    let mut run = home.start(&[&arguments[..], &[path(&kernel)]].concat());
    run.wait_for("!");
    assert_eq!(home.lodger(&["ps", "-q"]).expect(0).text(), "front\n");
    home.lodger(&["pause", "front"]).expect(0);
    home.lodger(&["pause", "front"]).expect(1);
    assert_eq!(home.inspect("front")["state"], "paused");
    home.lodger(&["unpause", "front"]).expect(0);
    home.lodger(&["stop", "--time=0", "front"]).expect(0);
    run.finish().expect(137);
    assert_eq!(home.inspect("front")["status"], 137);
    // The same again in its place, which is gone at its end.
    let again = ["--replace", "--rm", "--name", "front"];
    assert_eq!(home.run(&kernel, &again).expect(0).text(), "front\n");
    home.lodger(&["kill", "front"]).expect(0);
    assert_eq!(home.vms_left(), 0);
    // A name by chance.
    let name = home.run(&kernel, &[]).expect(0).text();
    assert_eq!(home.lodger(&["ps", "-q"]).expect(0).text(), name);
}

#[test]
fn the_control_socket() {
    let home = Home::new();
    let kernel = guest(SILENT);
    home.run(&kernel, &["--name", "web"]).expect(0);
    let socket = home.inspect("web")["socket"]
        .as_str()
        .expect("text")
        .to_owned();
    let talk = |lines: &str| -> Vec<Value> {
        let mut stream = UnixStream::connect(&socket).expect("it listens");
        stream.write_all(lines.as_bytes()).expect("it reads");
        stream
            .shutdown(std::net::Shutdown::Write)
            .expect("connected");
        let lines = BufReader::new(stream).lines();
        let value = |line: String| serde_json::from_str(&line).expect("JSON");
        lines.map(|line| value(line.expect("text"))).collect()
    };
    let status = r#"{"version":1,"request":"status"}"#;
    let twice = talk(&format!("{status}\n{status}\n"));
    assert_eq!(twice.len(), 2);
    assert_eq!(twice[1]["answer"], "status");
    assert_eq!(twice[1]["name"], "web");
    assert_eq!(twice[1]["phase"], "running");
    for (line, kind) in [
        ("{\"version\":1,\"request\":\"fly\"}\n", "malformed"),
        ("{\"version\":7,\"request\":\"status\"}\n", "version"),
        ("GET / HTTP/1.1\n", "malformed"),
        ("{\"version\":1,\"request\":\"resume\"}\n", "state"),
        ("{\"version\":1,\"request\":\"power-button\"}\n", "state"),
    ] {
        let answers = talk(line);
        assert_eq!(answers.len(), 1, "{line}");
        assert_eq!(answers[0]["answer"], "error", "{line}");
        assert_eq!(answers[0]["kind"], kind, "{line}");
    }
    assert_eq!(home.inspect("web")["state"], "running");
}

#[test]
fn a_vm_keeps_its_disk_and_its_kernel() {
    let home = Home::new();
    let image = home.make_image("debian", &guest(SILENT));
    let run = ["run", "-d", "--engine", "interp", "--name", "web", "debian"];
    home.lodger(&run).expect(0);
    // The disk is a clone, or the image's and what has changed.
    let dir = PathBuf::from(home.inspect("web")["directory"].as_str().expect("text"));
    assert!(dir.join("root.img").exists() || dir.join("root.qcow2").exists());
    home.lodger(&["kill", "web"]).expect(0);
    // One with a disk gives its name to nobody.
    let refused = home.lodger(&run).expect(1);
    assert!(
        refused.stderr.contains("lodger start web"),
        "{}",
        refused.stderr
    );

    // The image goes, the VM does not need it.
    std::fs::remove_dir_all(image).expect("a folder");
    home.lodger(&["start", "web"]).expect(0);
    kill_process(home.pid("web"), Signal::KILL).expect("it runs");
    while home.lodger(&["ps", "-q"]).expect(0).text() != "" {}

    // After a crash the name is free, and nothing is lost.
    home.make_image("debian", &guest(SILENT));
    let again = home.lodger(&run).expect(0);
    assert!(again.stderr.contains("web-1"), "{}", again.stderr);
    home.lodger(&["start", "web-1"]).expect(0);
    let running = home.lodger(&["ps", "-q"]).expect(0).text();
    assert_eq!(running, "web\nweb-1\n");
    let spec = &home.inspect("web-1")["spec"]["machine"];
    let disk = &spec["virtio"]["disks"][0]["path"];
    assert!(disk.as_str().expect("text").starts_with("root."), "{spec}");
}

#[test]
fn a_file_describes_several() {
    let home = Home::new();
    let dir = home.dir.path();
    std::fs::copy(guest(SILENT).path(), dir.join("guest.elf")).expect("a guest");
    let file = dir.join("lodger.toml");
    let describe = |more: &str| {
        let text = format!(
            "[vm.web]\nkernel = 'guest.elf'\nengine = 'interp'\nlabel = {{ role = 'front' }}\n{more}\n\
            [vm.db]\nkernel = 'guest.elf'\nengine = 'interp'\nnet = 'none'\ndevice = ['debug-exit']\n"
        );
        std::fs::write(&file, text).expect("a file");
    };
    let file = file.to_str().expect("ASCII");
    let up = ["up", "--file", file];
    let down = ["down", "--time", "0", "--file", file];
    for (wrong, says) in [
        ("memroy = '1G'", "--memory"),
        ("name = 'x'", "[vm.web]: name"),
        ("cpus = 0", "[vm.web]"),
        ("cpus = ", "lodger.toml"),
    ] {
        describe(wrong);
        let refused = home.lodger(&up).expect(1);
        assert!(refused.stderr.contains(says), "{}", refused.stderr);
        assert_eq!(home.vms_left(), 0);
    }
    describe("");
    assert_eq!(home.lodger(&up).expect(0).text(), "web\ndb\n");
    let again = home.lodger(&up).expect(0);
    assert!(
        again.stderr.contains("web: runs already"),
        "{}",
        again.stderr
    );
    describe("memory = '64M'");
    home.lodger(&up).expect(1);
    home.lodger(&[&down[..], &["web"]].concat()).expect(0);
    assert_eq!(home.lodger(&["ps", "-q"]).expect(0).text(), "db\n");
    assert_eq!(home.lodger(&up).expect(0).text(), "web\n");
    assert_eq!(home.inspect("web")["memory"], 64 << 20);
    assert_eq!(home.inspect("web")["labels"]["role"], "front");
    home.lodger(&[&down[..], &["--rm"]].concat()).expect(0);
    assert_eq!(home.vms_left(), 0);
    // Others' VMs are left alone.
    home.run(&guest(SILENT), &["--name", "db"]).expect(0);
    let refused = home.lodger(&up).expect(1);
    assert!(refused.stderr.contains("db"), "{}", refused.stderr);
    home.lodger(&down).expect(0);
    assert_eq!(home.lodger(&["ps", "-q"]).expect(0).text(), "db\n");
}

#[test]
fn a_stopped_vm_is_changed_and_a_lost_socket_is_no_loss() {
    let home = Home::new();
    let kernel = guest(SILENT);
    home.run(&kernel, &["--name", "web"]).expect(0);
    home.lodger(&["set", "web", "--memory", "64M"]).expect(1);
    home.lodger(&["rename", "web", "www"]).expect(1);
    // The runtime directory goes with the user's last session.
    std::fs::remove_dir_all(&home.runtime).expect("a folder");
    assert_eq!(home.inspect("web")["state"], "running");
    let stop = home.lodger(&["stop", "--time", "0", "web"]).expect(0);
    assert!(stop.stderr.contains("does not listen"), "{}", stop.stderr);

    home.lodger(&["set", "web"]).expect(2);
    home.lodger(&["set", "web", "--cpus", "5000"]).expect(2);
    let set = [
        "set",
        "web",
        "--memory=64M",
        "--cpus=2",
        "--label=a=b",
        "--restart=always",
    ];
    home.lodger(&set).expect(0);
    home.run(&kernel, &["--name", "other"]).expect(0);
    let taken = home.lodger(&["rename", "web", "other"]).expect(1);
    assert!(taken.stderr.contains("other already"), "{}", taken.stderr);
    home.lodger(&["rename", "web", "www"]).expect(0);
    home.lodger(&["start", "www"]).expect(0);
    let seen = home.inspect("www");
    assert_eq!(seen["memory"], 64 << 20);
    assert_eq!(seen["cpus"], 2);
    assert_eq!(seen["labels"]["a"], "b");
    assert_eq!(seen["spec"]["restart"], "always");
}
