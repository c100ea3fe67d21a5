//! Block storage on the host: what stands behind a guest's disk, without a word about guests.
//!
//! A [`BlockBackend`] is a fixed number of bytes that several threads read and write at once. Buffers are plain slices:
//! guest RAM has no slices, so whoever serves a guest copies through a bounded buffer of its own, and no unsafe code
//! is needed here.
//!
//! Limits: [`RawFile`] is the only format, and [`Overlay`] the only copy on write; the size is fixed when it is opened; I/O is synchronous.

mod overlay;
mod raw;

pub use overlay::Overlay;
pub use raw::{OpenError, RawFile};

use std::io;

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
}
