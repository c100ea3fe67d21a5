//! A file that goes into the guest, from the host's file system or from memory.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use crate::error::Reason;
use crate::placement::Placement;

/// A file that goes into the guest.
#[derive(Debug, Clone)]
pub enum Payload {
    /// A file of the host.
    File(PathBuf),
    /// Bytes that the monitor already has.
    Bytes {
        /// What messages and the guest call it.
        name: String,
        /// The contents.
        bytes: Arc<[u8]>,
    },
}

impl From<PathBuf> for Payload {
    fn from(path: PathBuf) -> Payload {
        Payload::File(path)
    }
}

impl Payload {
    /// What messages and the guest call it.
    pub fn name(&self) -> String {
        match self {
            Payload::File(path) => path.display().to_string(),
            Payload::Bytes { name, .. } => name.clone(),
        }
    }

    /// The contents, if they are at most `limit` bytes.
    pub(crate) fn read(&self, limit: u64) -> Result<Vec<u8>, Reason> {
        let bytes = match self {
            Payload::File(path) => {
                let mut file = File::open(path)?;
                // The size of a pipe or a device is 0: the length is bounded by what is read.
                let size = file.metadata()?.len();
                fits(size, limit)?;
                let mut bytes = Vec::with_capacity(size as usize);
                file.by_ref().take(limit + 1).read_to_end(&mut bytes)?;
                bytes
            }
            Payload::Bytes { bytes, .. } => {
                fits(bytes.len() as u64, limit)?;
                bytes.to_vec()
            }
        };
        fits(bytes.len() as u64, limit)?;
        Ok(bytes)
    }

    /// Copies the contents into guest memory, as high as possible below `limit`.
    pub(crate) fn load(&self, placement: &mut Placement, limit: u64) -> Result<Range<u64>, Reason> {
        const WHAT: &str = "the initial RAM disk";
        let regular = match self {
            Payload::File(path) => {
                let file = File::open(path)?;
                let metadata = file.metadata()?;
                metadata.is_file().then_some((file, metadata.len()))
            }
            Payload::Bytes { .. } => None,
        };
        let Some((mut file, len)) = regular else {
            let bytes = self.read(placement.low_memory())?;
            let range = placement.highest(not_empty(bytes.len() as u64)?, WHAT, limit)?;
            placement.memory.write(range.start, &bytes)?;
            return Ok(range);
        };
        // Straight from the file: no copy of what may be large.
        let range = placement.highest(not_empty(len)?, WHAT, limit)?;
        let start = GuestAddress(range.start);
        let ram = placement.memory.inner();
        ram.read_exact_volatile_from(start, &mut file, len as usize)
            .map_err(|error| Reason::Io(std::io::Error::other(error)))?;
        Ok(range)
    }
}

fn fits(len: u64, limit: u64) -> Result<(), Reason> {
    if len > limit {
        return Err(Reason::NoRoom {
            what: "the file",
            len,
        });
    }
    Ok(())
}

fn not_empty(len: u64) -> Result<u64, Reason> {
    if len == 0 {
        return Err(Reason::NotAKernel("an empty file"));
    }
    Ok(len)
}
