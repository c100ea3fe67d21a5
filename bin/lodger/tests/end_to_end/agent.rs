//! Commands and copies in a guest: the image `mini` with its agent, in the background.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use lodger_guest_protocol::{Answer, FileKind, FromGuest, Request, ToGuest};
use tempfile::TempDir;

use crate::process::{Finished, Lodger};

/// A user's directories, and a machine that runs, which ends with them.
struct Vm {
    dir: TempDir,
}

impl Vm {
    #[track_caller]
    fn start(arguments: &[&str]) -> Vm {
        let vm = Vm {
            dir: tempfile::tempdir().expect("a folder"),
        };
        let first = ["run", "-d", "--name", "vm", "--net", "none"];
        vm.lodger(&[&first, arguments].concat()).expect(0);
        vm
    }

    fn command(&self, arguments: &[&str]) -> Lodger {
        let data = self.dir.path().join("data");
        let runtime = Path::new("not/absolute");
        let environment = [("XDG_DATA_HOME", &*data), ("XDG_RUNTIME_DIR", runtime)];
        Lodger::start_in(&environment, arguments)
    }

    #[track_caller]
    fn lodger(&self, arguments: &[&str]) -> Finished {
        self.command(arguments).finish()
    }

    #[track_caller]
    fn sh(&self, script: &str) -> Finished {
        self.lodger(&["exec", "vm", "sh", "-c", script])
    }

    fn path(&self, name: &str) -> (PathBuf, String) {
        let path = self.dir.path().join(name);
        let text = path.to_str().expect("ASCII").to_owned();
        (path, text)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.lodger(&["rm", "--force", "vm"]);
    }
}

/// Bytes that do not repeat soon.
fn data(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 32) as u32
    };
    (0..len.div_ceil(4))
        .flat_map(|_| next().to_le_bytes())
        .take(len)
        .collect()
}

#[test]
fn commands_in_a_guest() {
    let vm = Vm::start(&["mini"]);
    // The agent is waited for.
    let run = vm.sh("echo out; echo err >&2; exit 7").expect(7);
    assert_eq!((&run.text()[..], &run.stderr[..]), ("out\n", "err\n"));
    vm.sh("kill -TERM $$").expect(128 + 15);
    let missing = vm.lodger(&["exec", "vm", "no-such-program"]).expect(127);
    assert!(
        missing.stderr.contains("no-such-program"),
        "{}",
        missing.stderr
    );
    vm.lodger(&["exec", "vm", "/etc"]).expect(126);
    vm.lodger(&["exec", "--tty", "-i", "vm", "sh"]).expect(2);
    let options = ["exec", "-e", "A=1 2", "-w", "/proc", "-u", "65534:7", "vm"];
    let command = ["sh", "-c", "echo $A; pwd; id -u; id -g; cat"];
    let run = vm.lodger(&[&options[..], &command].concat()).expect(0);
    assert_eq!(run.text(), "1 2\n/proc\n65534\n7\n");

    let mut cat = vm.command(&["exec", "-i", "vm", "sh", "-c", "cat; echo end"]);
    cat.type_in("typed\n");
    cat.wait_for("typed");
    assert_eq!(cat.finish().expect(0).text(), "\nend\n");
    let terminal = vm.lodger(&["exec", "-t", "vm", "sh", "-c", "tty; test -t 2; echo $?"]);
    assert_eq!(terminal.expect(0).text(), "/dev/pts/0\n0\n");

    // A signal goes to the command.
    let script = "trap 'echo told; exit 9' TERM; echo up; while :; do sleep 0.1; done";
    let mut told = vm.command(&["exec", "vm", "sh", "-c", script]);
    told.wait_for("up");
    told.terminate();
    assert!(told.finish().expect(9).text().contains("told"));

    // Many at once.
    let many: Vec<_> = (0..20)
        .map(|n| vm.command(&["exec", "vm", "sh", "-c", &format!("sleep 0.3; exit {n}")]))
        .collect();
    for (n, run) in many.into_iter().enumerate() {
        run.finish().expect(n as i32);
    }
    // Nothing of all that is left.
    let left = vm.sh("ps | grep -c '[s]leep'").expect(1);
    assert_eq!(left.text(), "0\n");

    // A machine that stands still, or does not run.
    vm.lodger(&["pause", "vm"]).expect(0);
    let paused = vm.sh("true").expect(1);
    assert!(
        paused.stderr.contains("lodger unpause vm"),
        "{}",
        paused.stderr
    );
    vm.lodger(&["unpause", "vm"]).expect(0);
    vm.sh("true").expect(0);
    vm.lodger(&["kill", "vm"]).expect(0);
    let stopped = vm.sh("true").expect(1);
    assert!(
        stopped.stderr.contains("does not run"),
        "{}",
        stopped.stderr
    );
    vm.lodger(&["start", "vm"]).expect(0);
    vm.sh("true").expect(0);
}

#[test]
fn much_data_and_files_go_both_ways() {
    const SIZE: usize = 64 << 20;
    let vm = Vm::start(&["mini", "--memory", "1G"]);
    let (file, text) = vm.path("bytes");
    let bytes = data(SIZE);
    fs::write(&file, &bytes).expect("a file");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o754)).expect("a file");
    vm.lodger(&["cp", &text, "vm:/tmp"]).expect(0);
    let sum = vm
        .sh("md5sum </tmp/bytes; stat -c %a /tmp/bytes")
        .expect(0)
        .text();
    let own = std::process::Command::new("md5sum").arg(&file).output();
    let own = String::from_utf8(own.expect("it is there").stdout).expect("text");
    assert_eq!(sum.split_whitespace().next(), own.split_whitespace().next());
    assert!(sum.ends_with("754\n"), "{sum}");
    // Out again, as a file and as output.
    let (back, text) = vm.path("back");
    vm.lodger(&["cp", "vm:/tmp/bytes", &text]).expect(0);
    assert!(fs::read(&back).expect("it has come") == bytes);
    assert_eq!(
        back.metadata().expect("a file").permissions().mode() & 0o777,
        0o754
    );
    let output = vm.lodger(&["exec", "vm", "cat", "/tmp/bytes"]).expect(0);
    assert!(output.stdout == bytes);

    // Directories.
    let (dir, from) = vm.path("dir");
    fs::create_dir_all(dir.join("deep/er")).expect("a folder");
    fs::write(dir.join("deep/er/file"), "inside").expect("a file");
    std::os::unix::fs::symlink("deep/er/file", dir.join("link")).expect("a link");
    vm.lodger(&["cp", &from, "vm:/tmp/new"]).expect(0);
    vm.lodger(&["cp", &format!("{from}/."), "vm:/tmp/new"])
        .expect(0);
    vm.lodger(&["cp", &from, "vm:/tmp/new"]).expect(0);
    let found = vm
        .sh("cd /tmp/new; find | sort; cat link; readlink link")
        .expect(0);
    let tree = ["deep", "deep/er", "deep/er/file"];
    let mut expected = vec![".".to_owned()];
    for above in ["", "dir/"] {
        expected.extend(tree.map(|name| format!("./{above}{name}")));
        expected.push(format!("./{above}link"));
    }
    expected.push("./dir".into());
    expected.sort();
    let expected = format!("{}\ninsidedeep/er/file\n", expected.join("\n"));
    assert_eq!(found.text(), expected);
    let (out, to) = vm.path("out");
    vm.lodger(&["cp", "vm:/tmp/new/dir", &to]).expect(0);
    assert_eq!(
        fs::read_to_string(out.join("link")).expect("a file"),
        "inside"
    );
    let stream = vm.lodger(&["cp", "vm:/tmp/new", "-"]).expect(0);
    assert!(stream.stdout.starts_with(b"new"));

    // What cannot be is said, and leaves nothing.
    for (from, to, says) in [
        ("vm:/none", &to[..], "/none"),
        ("/none", "vm:/tmp", "/none"),
        (&text, "vm:/none/x", "/none"),
        (&text, "vm:/tmp/new", ""),
        (&from, "vm:/tmp/bytes", "is a file"),
        (&text, &to, "VM:PATH"),
        ("vm:/a", "vm:/b", "VM:PATH"),
        (&text, "other:/", "other"),
    ] {
        let run = vm.lodger(&["cp", from, to]);
        if says.is_empty() {
            run.expect(0);
            continue;
        }
        assert!(
            !run.status.success() && run.stderr.contains(says),
            "{}",
            run.stderr
        );
    }
}

/// An agent that says what no agent of ours would.
struct Liar {
    dir: PathBuf,
}

impl Liar {
    /// Takes the place of the agent; answers what asks for files with these bytes, after the acceptance.
    fn start(vm: &Vm, answer: Vec<u8>) -> Liar {
        let dir = vm.dir.path().join("data/lodger/vms/vm");
        let socket = dir.join("vsock.sock");
        fs::remove_file(&socket).expect("a socket");
        let listener = UnixListener::bind(&socket).expect("a socket");
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // Whoever hears nonsense goes away.
                let _ = Liar::lie(stream.expect("a connection"), &answer);
            }
        });
        Liar { dir }
    }

    fn lie(mut stream: UnixStream, answer: &[u8]) -> io::Result<()> {
        let mut line = [0; b"CONNECT 1024\n".len()];
        stream.read_exact(&mut line)?;
        stream.write_all(b"OK 1\n")?;
        let asked = lodger_guest_protocol::read(&mut stream).map_err(io::Error::other)?;
        let accept = |answer| FromGuest::Accepted(answer);
        match asked {
            Some(ToGuest::Request(_, Request::Stat { .. })) => {
                let found = accept(Answer::Found(Some(FileKind::Directory)));
                lodger_guest_protocol::write(&mut stream, &found)
            }
            _ => {
                lodger_guest_protocol::write(&mut stream, &accept(Answer::Done))?;
                stream.write_all(answer)
            }
        }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        // The next one takes its place.
        assert!(self.dir.join("vsock.sock").exists());
    }
}

/// A tar stream of files and of links, which have a target.
fn tar(entries: &[(&str, Option<&str>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, target) in entries {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_mode(0o6777);
        header.set_mtime(0);
        header.set_size(0);
        if let Some(target) = target {
            header.set_entry_type(tar::EntryType::Symlink);
            header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        }
        header.set_cksum();
        builder.append(&header, &b""[..]).expect("memory");
    }
    let bytes = builder.into_inner().expect("memory");
    let mut frames = Vec::new();
    lodger_guest_protocol::write_data::<FromGuest>(&mut frames, &bytes).expect("memory");
    lodger_guest_protocol::write(&mut frames, &FromGuest::End).expect("memory");
    frames
}

/// Nothing that a guest sends gets out of what the user has named, or makes a command hang.
#[test]
fn a_hostile_guest() {
    let vm = Vm::start(&["mini"]);
    let (outer, _) = vm.path("outer");
    fs::create_dir_all(outer.join("dir")).expect("a folder");
    fs::write(outer.join("secret"), "s").expect("a file");
    let target = outer.join("dir");
    let target = target.to_str().expect("ASCII");
    for (name, answer, succeeds) in [
        ("honest", tar(&[("x/", None)]), true),
        ("another name", tar(&[(".bashrc", None)]), false),
        ("above", tar(&[("x/../../evil", None)]), false),
        ("absolute", tar(&[("/tmp/lodger-evil", None)]), false),
        (
            "through a link",
            tar(&[("x", Some("..")), ("x/evil", None)]),
            false,
        ),
        (
            "over a link",
            tar(&[("x", Some("../secret")), ("x", None)]),
            true,
        ),
        ("a long message", b"\x82\xff\xff\xff\xff".to_vec(), false),
        ("no message", b"\x99\x01\0\0\0a".to_vec(), false),
        ("an early end", b"\x82\x10\0\0\0a".to_vec(), false),
        ("silence", Vec::new(), false),
    ] {
        let liar = Liar::start(&vm, answer);
        let run = vm.lodger(&["cp", "vm:/x", target]);
        assert_eq!(run.status.success(), succeeds, "{name}: {}", run.stderr);
        // A stream of files is nothing that a command says at its end.
        vm.lodger(&["exec", "vm", "true"]).expect(1);
        drop(liar);
        let mut left: Vec<_> = (outer.read_dir().expect("a folder"))
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["dir", "secret"], "{name}");
        assert_eq!(
            fs::read_to_string(outer.join("secret")).expect("a file"),
            "s"
        );
        let inside = outer.join("dir/x");
        if let Ok(found) = inside.symlink_metadata() {
            if found.is_file() {
                assert_eq!(found.permissions().mode() & 0o7000, 0, "{name}");
            }
            let removed = match found.is_dir() {
                true => fs::remove_dir_all(&inside),
                false => fs::remove_file(&inside),
            };
            removed.expect("it is ours");
        }
        assert_eq!(
            outer.join("dir").read_dir().expect("a folder").count(),
            0,
            "{name}"
        );
    }
    assert!(!Path::new("/tmp/lodger-evil").exists());
}

#[test]
fn guests_without_an_agent() {
    let vm = Vm::start(&["mini", "--vsock", "none"]);
    let run = vm.sh("true").expect(1);
    assert!(run.stderr.contains("--vsock none"), "{}", run.stderr);
    // The program for other guests.
    let (file, text) = vm.path("agent");
    vm.lodger(&["agent", &text]).expect(0);
    let version = std::process::Command::new(&file).arg("--version").output();
    let version = version.expect("it runs").stdout;
    assert!(version.starts_with(b"lodger-agent "));
}
