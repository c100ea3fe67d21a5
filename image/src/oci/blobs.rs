//! Blobs by what they hold: each is a file named by its SHA-256, whichever images it
//! is part of. One that is on its way has the ending `.part`, and the next try goes on
//! from there.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use oci_spec::image::{Descriptor, DigestAlgorithm};
use sha2::{Digest, Sha256};

use super::registry::Registry;
use crate::error::{Error, IoContext, Result};
use crate::manifest::hexadecimal;
use crate::progress::Progress;

/// How often a transfer that breaks off is taken up again without a byte in between.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);
const PIECE: usize = 128 << 10;

/// The ending of a blob that is not complete.
const PART: &str = "part";

/// A directory of blobs.
pub(crate) struct Blobs {
    dir: PathBuf,
}

/// A blob that is being written.
struct Part {
    path: PathBuf,
    file: File,
    len: u64,
    hash: Sha256,
}

impl Blobs {
    /// The blobs below this directory of a cache.
    pub(crate) fn new(cache: &Path) -> Blobs {
        Blobs {
            dir: cache.join("blobs/sha256"),
        }
    }

    /// Fetches a blob that is not there yet. `failed` makes an error of what the registry did.
    pub(crate) fn fetch(
        &self,
        blob: &Descriptor,
        registry: &mut Registry,
        progress: &mut dyn Progress,
        failed: &dyn Fn(String) -> Error,
    ) -> Result<PathBuf> {
        let digest = sha256(blob).map_err(failed)?;
        let path = self.dir.join(digest);
        if fs::metadata(&path).is_ok_and(|file| file.len() == blob.size()) {
            return Ok(path);
        }
        fs::create_dir_all(&self.dir).while_trying("create", &self.dir)?;
        let mut part = Part::open(path.with_extension(PART), blob.size())?;
        // What is left of an earlier try may be damaged: then it is fetched from the beginning.
        let mut resumed = part.len > 0;
        loop {
            part.fill(blob, registry, progress, failed)?;
            let found = hexadecimal(part.hash.clone());
            if found == digest {
                break;
            }
            part.restart()?;
            if !std::mem::take(&mut resumed) {
                fs::remove_file(&part.path).while_trying("remove", &part.path)?;
                return Err(failed(format!(
                    "the registry has sent something else: sha256:{found} instead of sha256:{digest}"
                )));
            }
        }
        part.file.sync_all().while_trying("write", &part.path)?;
        fs::rename(&part.path, &path).while_trying("create", &path)?;
        Ok(path)
    }

    /// Removes a blob.
    pub(crate) fn remove(&self, path: &Path) -> Result<()> {
        fs::remove_file(path).while_trying("remove", path)
    }

    /// Removes all blobs, complete or not, that are not `needed`; the bytes that were theirs.
    pub(crate) fn prune(&self, needed: impl Fn(&str) -> bool) -> Result<u64> {
        let mut freed = 0;
        for entry in fs::read_dir(&self.dir).into_iter().flatten() {
            let entry = entry.while_trying("read", &self.dir)?;
            if needed(&entry.file_name().to_string_lossy()) {
                continue;
            }
            let path = entry.path();
            freed += entry.metadata().while_trying("read", &path)?.len();
            fs::remove_file(&path).while_trying("remove", &path)?;
        }
        Ok(freed)
    }
}

impl Part {
    fn open(path: PathBuf, most: u64) -> Result<Part> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .while_trying("create", &path)?;
        let mut part = Part {
            path,
            file,
            len: 0,
            hash: Sha256::new(),
        };
        let mut buffer = vec![0; PIECE];
        loop {
            match part
                .file
                .read(&mut buffer)
                .while_trying("read", &part.path)?
            {
                0 => break,
                n => {
                    part.hash.update(&buffer[..n]);
                    part.len += n as u64;
                }
            }
        }
        if part.len > most {
            part.restart()?;
        }
        Ok(part)
    }

    fn restart(&mut self) -> Result<()> {
        self.len = 0;
        self.hash = Sha256::new();
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .map(drop)
            .while_trying("write", &self.path)
    }

    /// Fetches what is missing, in several goes if the connection breaks.
    fn fill(
        &mut self,
        blob: &Descriptor,
        registry: &mut Registry,
        progress: &mut dyn Progress,
        failed: &dyn Fn(String) -> Error,
    ) -> Result<()> {
        let mut tries = 0;
        while self.len < blob.size() {
            let before = self.len;
            let problem = match registry.blob(blob, self.len) {
                Ok((start, mut input)) => {
                    if start != self.len {
                        self.restart()?;
                    }
                    self.take(&mut input, blob.size(), progress)?
                }
                Err(problem) => return Err(failed(problem)),
            };
            if self.len > before {
                tries = 0;
            }
            if let Some(problem) = problem {
                tries += 1;
                if tries == TRIES {
                    return Err(failed(format!(
                        "the transfer broke off: {problem}. Try again: what has arrived is kept"
                    )));
                }
                thread::sleep(PAUSE);
            }
        }
        progress.advance(blob.size());
        Ok(())
    }

    /// Takes what comes, up to `size` bytes in all. The answer says why not all came.
    fn take(
        &mut self,
        input: &mut impl Read,
        size: u64,
        progress: &mut dyn Progress,
    ) -> Result<Option<io::Error>> {
        let mut buffer = vec![0; PIECE];
        while self.len < size {
            let most = (size - self.len).min(PIECE as u64) as usize;
            let n = match input.read(&mut buffer[..most]) {
                Ok(0) => return Ok(Some(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Ok(Some(error)),
            };
            self.file
                .write_all(&buffer[..n])
                .while_trying("write", &self.path)?;
            self.hash.update(&buffer[..n]);
            self.len += n as u64;
            progress.advance(self.len);
        }
        Ok(None)
    }
}

/// The digest in hexadecimal, which is the name of a file.
pub(crate) fn sha256(blob: &Descriptor) -> Result<&str, String> {
    let digest = blob.digest();
    let hexadecimal = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    match digest.algorithm() {
        DigestAlgorithm::Sha256
            if digest.digest().len() == 64 && digest.digest().bytes().all(hexadecimal) =>
        {
            Ok(digest.digest())
        }
        _ => Err(format!(
            "it is made of {digest}; only sha256 digests are known"
        )),
    }
}
