//! Block storage on the host: what stands behind a guest's disk, without a word about guests.
//!
//! A [`BlockBackend`] is a fixed number of bytes that several threads read and write at once. Buffers are plain slices:
//! guest RAM has no slices, so whoever serves a guest copies through a bounded buffer of its own.
//!
//! | file | what |
//! |---|---|
//! | `file.rs` | opening, locking, telling formats apart |
//! | `raw.rs`, `qcow2/` | the formats |
//! | `overlay.rs` | a disk that is forgotten at the end |
//! | `manage.rs` | images as files: create, convert, resize |
//!
//! Limits: the size is fixed when it is opened; I/O is synchronous.

mod file;
mod manage;
mod overlay;
mod qcow2;
mod raw;

pub use file::OpenError;
pub use manage::{
    Convert, CreateOptions, ImageInfo, ManageError, Qcow2Info, convert, create, info, resize,
};
pub use overlay::Overlay;
pub use qcow2::{CheckReport, check};
pub use raw::RawFile;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use crate::qcow2::{Reader, Writer};
use file::{Content, ImageFile};
use serde::{Deserialize, Serialize};

/// The unit in which disks are addressed and sized.
pub const SECTOR_SIZE: u64 = 512;

/// A disk's contents. Ranges must lie within [`size_bytes`](BlockBackend::size_bytes); one that does not is answered
/// with [`io::ErrorKind::InvalidInput`]. Requests that overlap in time may take effect in any order.
pub trait BlockBackend: Send + Sync {
    /// The size in bytes, a multiple of [`SECTOR_SIZE`]; never changes.
    fn size_bytes(&self) -> u64;

    /// Whether everything that would change the contents is refused with [`io::ErrorKind::PermissionDenied`].
    fn read_only(&self) -> bool;

    /// Fills all of `buf` from byte `offset`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of `buf` at byte `offset`. It is durable after the next `flush` only.
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;

    /// Makes every write that has returned durable.
    fn flush(&self) -> io::Result<()>;

    /// The range is not needed any more. It may be given back to the host, or the hint ignored; what it reads as afterwards
    /// is either the old contents or zeroes.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// From now on the range reads as zeroes. With `may_unmap` its space may be given back to the host.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;

    /// Where these bytes are, if reading them from a file, or with `write` writing them to it, is all there is to do. Callers must
    /// have checked the range.
    fn direct(&self, _offset: u64, _len: u64, _write: bool) -> Option<Direct<'_>> {
        None
    }

    /// What is known of the bytes from `offset` on without reading them.
    fn extent(&self, offset: u64) -> io::Result<Extent> {
        Ok(Extent {
            len: self.size_bytes().saturating_sub(offset),
            zero: false,
        })
    }
}

/// A file that has bytes of a disk.
#[derive(Debug, Clone, Copy)]
pub struct Direct<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Where in it they begin.
    pub offset: u64,
    /// All of it is in memory: reading it never waits for a disk.
    pub in_memory: bool,
}

/// A part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes; 0 at the end of the disk only.
    pub len: u64,
    /// It reads as zeroes. If not, it may.
    pub zero: bool,
}

/// A disk image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk.
    Raw,
    /// QEMU's format: takes only the space that is used, may continue another image.
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Format, String> {
        match text {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(format!("unknown format '{text}'; raw and qcow2 are known")),
        }
    }
}

/// Opens the image at `path`.
///
/// Without a `format` the first bytes tell it. They may have been written by a guest, so such an image gets no power: a
/// qcow2 image may not name other files, and a raw one may not become something else.
pub fn open(
    path: &Path,
    read_only: bool,
    format: Option<Format>,
) -> Result<Arc<dyn BlockBackend>, OpenError> {
    let image = ImageFile::open(path, read_only)?;
    let found = match format {
        Some(format) => format,
        None => known_format(path, &image)?,
    };
    open_image(path, image, found, format.is_some())
}

/// `trusted`: the format does not come from the first bytes.
fn open_image(
    path: &Path,
    image: ImageFile,
    format: Format,
    trusted: bool,
) -> Result<Arc<dyn BlockBackend>, OpenError> {
    Ok(match (format, image.read_only) {
        (Format::Raw, _) => Arc::new(RawFile::new(image, !trusted)),
        (Format::Qcow2, true) => Arc::new(Reader::open(path, image, trusted)?),
        (Format::Qcow2, false) => Arc::new(Writer::open(path, image, trusted)?),
    })
}

/// What the image is by its first bytes.
fn known_format(path: &Path, image: &ImageFile) -> Result<Format, OpenError> {
    match image.content() {
        Content::Known(format) => Ok(format),
        Content::Other(format) => Err(OpenError::OtherFormat {
            path: path.into(),
            format,
        }),
    }
}

/// Whether a range lies on a disk of `size` bytes.
fn check_range(size: u64, offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "beyond the end of the disk",
        )),
    }
}
