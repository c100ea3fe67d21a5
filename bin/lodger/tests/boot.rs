//! The distribution's own kernel, booted by the `lodger` executable as a user would: what the guest prints, what is on its disk
//! afterwards, and the exit status. The image is built once, into a cache under the target folder.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A boot takes seconds; a bug that hangs one must fail the test instead of stopping it.
const WATCHDOG: Duration = Duration::from_secs(400);

fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn lodger(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lodger"));
    command.args(arguments);
    command.env("XDG_CACHE_HOME", scratch("cache"));
    command
}

/// A running `lodger` whose output is read while it runs.
struct Run {
    child: Child,
    output: Receiver<Vec<u8>>,
    seen: String,
    end: Instant,
}

impl Run {
    fn start(arguments: &[&str]) -> Run {
        let mut child = lodger(&["run", "--engine", "interp"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("lodger starts");
        let (send, output) = channel();
        let streams: [Box<dyn Read + Send>; 2] = [
            Box::new(child.stdout.take().expect("it is piped")),
            Box::new(child.stderr.take().expect("it is piped")),
        ];
        for mut stream in streams {
            let send = send.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    let _ = send.send(buffer[..n].to_vec());
                }
            });
        }
        Run {
            child,
            output,
            seen: String::new(),
            end: Instant::now() + WATCHDOG,
        }
    }

    /// Reads until `wanted` is seen, or all of the output.
    fn read_until(&mut self, wanted: Option<&str>) {
        while !wanted.is_some_and(|w| self.seen.contains(w)) {
            let left = self.end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.seen += &String::from_utf8_lossy(&bytes),
                Err(RecvTimeoutError::Disconnected) if wanted.is_none() => break,
                Err(why) => {
                    let _ = self.child.kill();
                    panic!("{wanted:?}: {why}; the output so far:\n{}", self.seen);
                }
            }
        }
    }

    fn type_in(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().expect("it is piped");
        stdin
            .write_all(text.as_bytes())
            .expect("lodger reads its input");
    }

    /// The exit status and everything that was printed.
    fn finish(mut self) -> (Option<i32>, String) {
        self.read_until(None);
        let status = self.child.wait().expect("lodger ends");
        (status.code(), self.seen)
    }
}

fn run(arguments: &[&str]) -> (Option<i32>, String) {
    Run::start(arguments).finish()
}

#[test]
fn a_stock_kernel_boots_and_powers_off() {
    for cpus in ["1", "4"] {
        let command = r#"lodger.run="echo cpus=$(nproc) sum=$(echo hello | md5sum)""#;
        let (status, output) = run(&["--cpus", cpus, "--append", command]);
        let wanted = format!("cpus={cpus} sum=b1946ac92492d2347c6235b4d2611184");
        assert!(output.contains(&wanted), "{cpus} vCPUs:\n{output}");
        assert!(
            output.contains("LODGER-EXIT rc=0"),
            "{cpus} vCPUs:\n{output}"
        );
        assert_eq!(status, Some(0), "{cpus} vCPUs:\n{output}");
    }
}

#[test]
fn a_shell_takes_what_is_typed_and_its_end_powers_off() {
    let mut run = Run::start(&[]);
    run.read_until(Some("mini:/# "));
    run.type_in("echo $((6 * 7))-is-it\n");
    run.read_until(Some("42-is-it"));
    run.type_in("exit\n");
    let (status, output) = run.finish();
    assert_eq!(status, Some(0), "{output}");
}

#[test]
fn the_end_of_the_guest_is_the_exit_status() {
    for (append, status, said) in [
        (r#"lodger.run="reboot -f""#, 4, ""),
        (
            r#"panic=-1 lodger.run="echo c >/proc/sysrq-trigger""#,
            4,
            "Kernel panic",
        ),
        // The kernel resets the machine by a triple fault.
        (r#"reboot=t lodger.run="reboot -f""#, 3, "triple fault"),
    ] {
        let (ended, output) = run(&["--no-reboot", "--append", append]);
        assert_eq!(ended, Some(status), "{append}:\n{output}");
        assert!(output.contains(said), "{append}:\n{output}");
    }
}

#[test]
fn disks_hold_what_the_guest_writes_and_read_only_ones_do_not() {
    let (disk, fixed) = (scratch("disk.img"), scratch("fixed.img"));
    fs::write(&disk, vec![0; 1 << 20]).expect("a file of ours");
    fs::write(&fixed, [b"kept as it is".as_slice(), &[0; 4083]].concat()).expect("a file of ours");
    let command = r#"lodger.run="head -c 13 /dev/vdb; echo; echo from the guest | dd of=/dev/vda bs=512 seek=3 conv=notrunc,fsync; echo x >/dev/vdb || echo refused; ls /dev/hwrng""#;
    let read_only = format!("{},ro", fixed.display());
    let writable = disk.display().to_string();
    let (status, output) = run(&[
        "--disk", &writable, "--disk", &read_only, "--append", command,
    ]);
    assert_eq!(status, Some(0), "{output}");
    for said in ["kept as it is", "refused"] {
        assert!(output.contains(said), "{said}:\n{output}");
    }
    let written = fs::read(&disk).expect("a file of ours");
    assert_eq!(&written[3 * 512..][..15], b"from the guest\n");
    assert!(
        fs::read(&fixed)
            .expect("a file of ours")
            .starts_with(b"kept as it is")
    );
}

#[test]
fn wrong_arguments_and_files_are_told_apart() {
    let missing = scratch("there-is-no-such-kernel");
    let text = scratch("text");
    fs::write(&text, "no kernel").expect("a file of ours");
    let (missing, text) = (missing.display().to_string(), text.display().to_string());
    for (arguments, status, said) in [
        (&["--kernel", &missing][..], 1, missing.as_str()),
        (&["--kernel", &text], 1, text.as_str()),
        (&["--memory", "12 apples"], 2, "12 apples"),
        (&["--cpus", "0"], 2, "--cpus"),
        (&["--engine", "dbt"], 2, "dbt"),
        (&["no-such-image"], 2, "no-such-image"),
        (&["--kernel", &text, "--disk", &missing], 1, ""),
    ] {
        let output = lodger(&["run"])
            .args(arguments)
            .output()
            .expect("lodger starts");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            output.status.code(),
            Some(status),
            "{arguments:?}: {errors}"
        );
        assert!(errors.contains(said), "{arguments:?}: {errors}");
        assert!(!errors.contains("panicked"), "{arguments:?}: {errors}");
    }
}
