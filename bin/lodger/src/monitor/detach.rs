//! The way into the background: a process of its own with a session of its own, which says whether its machine has started
//! before the command that started it ends.
//!
//! The new process gets the VM's lock as its standard input, so that the name is never free in between, and a pipe for the
//! one line that it reports as its standard output. Its standard error is the VM's `monitor.log`.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lodger_store::{Claim, MONITOR_LOG};
use rustix::fs::{Mode, OFlags};
use rustix::stdio::{dup2_stdin, dup2_stdout, stdin, stdout};
use serde::{Deserialize, Serialize};

use crate::status::{Error, host_error};

/// A log of the monitor's that is larger than this begins anew at the next start.
const MONITOR_LOG_LIMIT: u64 = 1 << 20;

/// What a monitor says about its start.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Report {
    /// The machine runs.
    Started,
    /// It does not, and why.
    Failed { status: u8, message: String },
}

/// Starts the VM of this claim in the background, and gives the claim to its monitor. Returns when the machine runs, or has
/// failed to.
pub fn start(claim: &Claim, verbose: u8) -> Result<(), Error> {
    let cannot = host_error("cannot start a process");
    let log = monitor_log(claim)?;
    let mut command = Command::new(executable());
    let mut monitor = command
        .arg0("lodger")
        .args(std::iter::repeat_n("-v", verbose.into()))
        .arg("monitor")
        .arg(claim.dir())
        .current_dir(claim.dir())
        .stdin(claim.hand_down()?)
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(&cannot)?;
    let report = monitor.stdout.take().map(BufReader::new);
    let mut line = String::new();
    let read = report.map(|mut report| report.read_line(&mut line));
    read.transpose().map_err(&cannot)?;
    match serde_json::from_str(&line) {
        Ok(Report::Started) => Ok(()),
        failed => {
            // It has nothing else to do, and the directory is free afterwards.
            let ended = monitor.wait().map_err(&cannot)?;
            Err(match failed {
                Ok(Report::Failed { status, message }) => Error::Relayed { status, message },
                _ => Error::Named {
                    name: claim.name().to_string(),
                    what: format!("its monitor ended before the machine had started: {ended}"),
                },
            })
        }
    }
}

fn monitor_log(claim: &Claim) -> Result<File, Error> {
    let path = claim.dir().join(MONITOR_LOG);
    let large = path
        .metadata()
        .is_ok_and(|found| found.len() > MONITOR_LOG_LIMIT);
    let mut options = File::options();
    // A monitor's output goes to the end, whoever else writes.
    options.create(true).append(true).mode(0o600);
    let log = options.open(&path).and_then(|log| {
        if large {
            log.set_len(0)?;
        }
        Ok(log)
    });
    log.map_err(|error| Error::File {
        path,
        what: error.to_string(),
    })
}

/// This program, also when its file has been replaced since.
pub fn executable() -> PathBuf {
    let path = std::env::current_exe().ok().filter(|path| path.exists());
    path.unwrap_or_else(|| Path::new("/proc/self/exe").into())
}

/// The other side: the background process, before it has a machine.
pub struct Detached {
    report: File,
}

impl Detached {
    /// Leaves the session and the terminal of whoever started this process, and takes the claim to the VM.
    pub fn take(dir: &Path) -> Result<(Claim, Detached), Error> {
        let cannot = host_error("cannot go into the background");
        // Fails for the leader of a group, who has a terminal only if someone runs this by hand.
        let _ = rustix::process::setsid();
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let null: OwnedFd = null.map_err(|error| cannot(error.into()))?;
        let take = || -> rustix::io::Result<(OwnedFd, OwnedFd)> {
            let lock = rustix::io::fcntl_dupfd_cloexec(stdin(), 3)?;
            let report = rustix::io::fcntl_dupfd_cloexec(stdout(), 3)?;
            dup2_stdin(&null)?;
            dup2_stdout(&null)?;
            Ok((lock, report))
        };
        let (lock, report) = take().map_err(|error| cannot(error.into()))?;
        let report = File::from(report);
        Ok((Claim::inherited(dir, lock)?, Detached { report }))
    }

    /// The machine runs.
    pub fn started(&mut self) -> Result<(), Error> {
        let told = self.tell(&Report::Started);
        // Whoever started it has gone, and has not heard that it runs.
        told.map_err(host_error("the start was interrupted"))
    }

    /// It does not.
    pub fn failed(&mut self, error: &Error) {
        let report = Report::Failed {
            status: error.status(),
            message: error.to_string(),
        };
        // If nobody hears it, it is in the log.
        let _ = self.tell(&report);
    }

    fn tell(&mut self, report: &Report) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(report)?;
        line.push(b'\n');
        self.report.write_all(&line)
    }
}
