//! `lodger logs`: what a guest has printed, from the files in which its monitor keeps it.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use lodger_char::RotatingLog;
use lodger_store::{CONSOLE_LOG, MONITOR_LOG, Store, StoreError};

use crate::cli::LogsArgs;
use crate::status::Error;

/// The time between two looks for more.
const AGAIN: Duration = Duration::from_millis(100);

/// Shows a log, and with `--follow` what comes.
pub fn logs(args: &LogsArgs) -> Result<ExitCode, Error> {
    let store = Store::open()?;
    let vm = store.find(&args.vm)?;
    let path = vm.dir.join(match args.monitor {
        true => MONITOR_LOG,
        false => CONSOLE_LOG,
    });
    let mut out = io::stdout().lock();
    let shown = (|| {
        let mut log = Log::open(&path)?;
        if let Some(lines) = args.tail {
            out.write_all(&log.last_lines(lines)?)?;
        }
        log.copy(&mut out)?;
        if !args.follow {
            return Ok(());
        }
        loop {
            // Looked at before the log, so that nothing is missed that was printed before the end.
            let alive = match store.find(&vm.record.id) {
                Ok(vm) => vm.is_alive(),
                Err(StoreError::Unknown(_)) => false,
                Err(error) => return Err(io::Error::other(error)),
            };
            log.copy(&mut out)?;
            if !alive {
                return Ok(());
            }
            std::thread::sleep(AGAIN);
        }
    })();
    match shown {
        // A reader that has seen enough is no failure.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::File {
            path,
            what: error.to_string(),
        }),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// A log that is read on while it is written and its parts are renamed.
struct Log {
    path: PathBuf,
    /// The part that is being read, and those that follow as far as they are there, the next one last.
    part: Option<File>,
    later: Vec<File>,
}

impl Log {
    fn open(path: &Path) -> io::Result<Log> {
        let mut parts = Vec::new();
        for part in RotatingLog::parts(path) {
            match File::open(&part) {
                Ok(file) => parts.push(file),
                // Renamed since, or not yet there.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        parts.reverse();
        Ok(Log {
            path: path.into(),
            part: parts.pop(),
            later: parts,
        })
    }

    /// The last so many lines of what there is by now; it is skipped. All parts together are of limited size.
    fn last_lines(&mut self, lines: usize) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        self.copy(&mut all)?;
        let start = start_of_last(&all, lines);
        Ok(all.split_off(start))
    }

    /// Copies what there is by now.
    fn copy(&mut self, out: &mut impl Write) -> io::Result<()> {
        loop {
            if let Some(part) = &mut self.part {
                io::copy(part, out)?;
            }
            out.flush()?;
            let Some(next) = self.next_part()? else {
                return Ok(());
            };
            if let Some(part) = &mut self.part {
                // What was printed before the next part was there.
                io::copy(part, out)?;
            }
            self.part = Some(next);
        }
    }

    /// The part after the present one, if that is complete.
    fn next_part(&mut self) -> io::Result<Option<File>> {
        if let Some(next) = self.later.pop() {
            return Ok(Some(next));
        }
        let now = match File::open(&self.path) {
            Ok(now) => now,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(part) = &self.part else {
            return Ok(Some(now));
        };
        let (old, new) = (part.metadata()?, now.metadata()?);
        Ok((old.ino() != new.ino()).then_some(now))
    }
}

/// Where the last so many lines begin. The guest may be in the middle of the last one.
fn start_of_last(text: &[u8], lines: usize) -> usize {
    let Some(before) = lines.checked_sub(1) else {
        return text.len();
    };
    let whole = text.strip_suffix(b"\n").unwrap_or(text);
    let ends = whole
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n');
    ends.map(|(at, _)| at + 1).nth(before).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_lines() {
        for (text, lines, expected) in [
            ("a\nb\nc\n", 0, ""),
            ("a\nb\nc\n", 1, "c\n"),
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc\n", 3, "a\nb\nc\n"),
            ("a\nb\nc\n", 9, "a\nb\nc\n"),
            ("a\nb\nc", 2, "b\nc"),
            ("\n\n", 1, "\n"),
            ("", 1, ""),
        ] {
            let start = start_of_last(text.as_bytes(), lines);
            assert_eq!(&text[start..], expected, "{text:?} {lines}");
        }
    }

    #[test]
    fn a_log_is_read_on_through_rotations() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut written = RotatingLog::open(&path, 8, 3).unwrap();
        written.write(b"one\ntwo\n");
        written.write(b"three\n");
        let mut log = Log::open(&path).unwrap();
        assert_eq!(log.last_lines(2).unwrap(), b"two\nthree\n");
        for piece in ["4\n", "five\n", "six\n"] {
            written.write(piece.as_bytes());
            let mut got = Vec::new();
            log.copy(&mut got).unwrap();
            assert_eq!(got, piece.as_bytes());
        }
    }
}
