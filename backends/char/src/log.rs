//! What a guest prints, kept in files of limited size.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A log: `PATH` is the newest part; when it is full it becomes `PATH.1`, and that `PATH.2` and so on; the oldest is
/// removed. Bytes go to the file at once, so that nothing is lost with the process.
#[derive(Debug)]
pub struct RotatingLog {
    path: PathBuf,
    file: File,
    size: u64,
    limit: u64,
    older: u32,
    /// Writing failed last time, and it has been told.
    failing: bool,
}

impl RotatingLog {
    /// Goes on with the log at `path`: files of at most `limit` bytes, `older` of them beside the newest.
    pub fn open(path: &Path, limit: u64, older: u32) -> io::Result<RotatingLog> {
        let file = open(path)?;
        Ok(RotatingLog {
            path: path.into(),
            size: file.metadata()?.len(),
            file,
            limit,
            older,
            failing: false,
        })
    }

    /// The parts of the log at `path`, oldest first.
    pub fn parts(path: &Path) -> Vec<PathBuf> {
        let mut parts: Vec<_> = (1..)
            .map(|n| numbered(path, n))
            .take_while(|part| part.exists())
            .collect();
        parts.reverse();
        parts.push(path.into());
        parts
    }

    /// Appends. What cannot be written, because the disk is full for example, is missing in the log; the guest goes on.
    pub fn write(&mut self, data: &[u8]) {
        let result = self.try_write(data);
        if let Err(error) = &result
            && !self.failing
        {
            let path = self.path.display();
            tracing::warn!(
                "the guest's output is missing in its log from here on: {path}: {error}"
            );
        }
        self.failing = result.is_err();
    }

    fn try_write(&mut self, data: &[u8]) -> io::Result<()> {
        if self.size > 0 && self.size + data.len() as u64 > self.limit {
            self.rotate()?;
        }
        self.file.write_all(data)?;
        self.size += data.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        for n in (0..self.older).rev() {
            let from = match n {
                0 => self.path.clone(),
                n => numbered(&self.path, n),
            };
            match fs::rename(from, numbered(&self.path, n + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if self.older == 0 {
            fs::remove_file(&self.path)?;
        }
        self.file = open(&self.path)?;
        self.size = 0;
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.append(true).create(true).mode(0o600).open(path)
}

fn numbered(path: &Path, n: u32) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!(".{n}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_filled_in_turn_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for piece in ["aaaa", "bbb", "ccccc", "dddddddddddd", "e", "ff"] {
            // Opened anew each time, as by one monitor after the other.
            let mut log = RotatingLog::open(&path, 8, 2).unwrap();
            log.write(piece.as_bytes());
        }
        let parts = RotatingLog::parts(&path);
        let texts: Vec<_> = parts
            .iter()
            .map(|p| fs::read_to_string(p).unwrap())
            .collect();
        assert_eq!(texts, ["ccccc", "dddddddddddd", "eff"]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_full_disk_does_not_stop_the_guest() {
        let mut log = RotatingLog::open(Path::new("/dev/full"), 1 << 20, 1).unwrap();
        log.write(b"lost");
        log.write(b"lost, too");
    }
}
