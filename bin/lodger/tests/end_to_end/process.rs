//! The `lodger` executable as a child process, with a limit on its time.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A run that takes longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Images are built once, in a cache beside the tests.
fn cache() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// How a run ended.
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Finished {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).replace('\r', "")
    }

    /// Fails with everything that was printed if the status is another one.
    #[track_caller]
    pub fn expect(self, status: i32) -> Finished {
        let Finished { stderr, .. } = &self;
        let text = self.text();
        assert_eq!(
            self.status.code(),
            Some(status),
            "stdout:\n{text}\nstderr:\n{stderr}"
        );
        self
    }
}

/// A running `lodger`.
pub struct Lodger {
    child: Child,
    output: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    stderr: JoinHandle<String>,
    start: Instant,
}

impl Lodger {
    /// Starts it with these arguments.
    pub fn start(arguments: &[&str]) -> Lodger {
        Lodger::start_in(&[], arguments)
    }

    /// Starts it with these variables in its environment.
    pub fn start_in(environment: &[(&str, &Path)], arguments: &[&str]) -> Lodger {
        let mut child = Command::new(env!("CARGO_BIN_EXE_lodger"))
            .args(arguments)
            .env("XDG_CACHE_HOME", cache())
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("lodger starts");
        let mut stdout = child.stdout.take().expect("piped");
        let mut stderr = child.stderr.take().expect("piped");
        let (send, output) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = stdout.read(&mut bytes) {
                if send.send(bytes[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        let stderr = std::thread::spawn(move || {
            let mut text = Vec::new();
            // What was read so far is told in any case.
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Lodger {
            child,
            output,
            seen: Vec::new(),
            stderr,
            start: Instant::now(),
        }
    }

    /// Waits until standard output has this text behind what `wait_for` found before.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        loop {
            let seen = String::from_utf8_lossy(&self.seen);
            if let Some(at) = seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let left = PATIENCE.saturating_sub(self.start.elapsed());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(_) => {
                    let seen = seen.into_owned();
                    // It may have ended already.
                    let _ = self.child.kill();
                    panic!("{text:?} did not come after\n{seen}");
                }
            }
        }
    }

    /// Writes to its standard input.
    pub fn type_in(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().expect("piped");
        stdin.write_all(text.as_bytes()).expect("it reads");
    }

    /// Tells it to end, by SIGTERM.
    pub fn terminate(&self) {
        use rustix::process::{Pid, Signal, kill_process};
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("it runs");
    }

    /// Kills it with SIGKILL; what it wrote to standard output behind what `wait_for` found.
    pub fn kill(mut self) -> String {
        self.child.kill().expect("it runs");
        self.child.wait().expect("a child");
        self.seen.extend(self.output.iter().flatten());
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn finish(mut self) -> Finished {
        drop(self.child.stdin.take());
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            if self.start.elapsed() > PATIENCE {
                // It may have ended at last.
                let _ = self.child.kill();
                self.seen.extend(self.output.iter().flatten());
                let seen = String::from_utf8_lossy(&self.seen);
                panic!("it does not end; standard output so far:\n{seen}");
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        self.seen.extend(self.output.iter().flatten());
        Finished {
            status,
            stdout: self.seen,
            stderr: self.stderr.join().expect("it reads"),
        }
    }
}

/// Runs it to its end.
#[track_caller]
pub fn lodger(arguments: &[&str]) -> Finished {
    Lodger::start(arguments).finish()
}
