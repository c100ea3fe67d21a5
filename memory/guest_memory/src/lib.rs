//! Guest RAM by guest-physical address.
//!
//! RAM is one memfd, mapped shared, so that it can be handed to helper processes; it is touched lazily. All access is volatile: there is
//! no `&mut [u8]` into RAM, because vCPUs write it at any time. Writes through this type are tracked page by
//! page (see [`Tracker`]); engines that write through raw pointers follow the tracker's rules.
//!
//! The `vm-memory` crate does the mapping and the bounds checks; [`GuestMemory::inner`] is that crate's view, which
//! the `virtio-queue` and `linux-loader` crates understand.

// UNSAFETY: hands out raw pointers into guest RAM for the engines, and lets the kernel read and write it; no unsafe code but
// the one pointer computation and these calls.
#![allow(unsafe_code)]

mod discard;
mod file_io;
mod tracker;

use std::fs::File;
use std::sync::Arc;

use rustix::fs::MemfdFlags;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

pub use file_io::Wait;
pub use tracker::{PAGE_SIZE, Tracker};

/// The `vm-memory` type behind [`GuestMemory`].
pub type Inner = GuestMemoryMmap<Tracker>;

/// Why guest RAM could not be made or accessed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused the memory.
    #[error("cannot allocate {bytes} bytes of guest memory: {source}")]
    Allocate {
        /// Bytes asked for in all.
        bytes: u64,
        /// The host's reason.
        source: std::io::Error,
    },
    /// The layout is empty, unaligned or overlapping.
    #[error("bad guest memory layout: {0}")]
    Layout(String),
    /// The access touches addresses that are not RAM.
    #[error("no guest RAM at {address:#x}..{:#x}", address + *len as u64)]
    OutOfRange {
        /// Guest-physical address of the access.
        address: u64,
        /// Its length in bytes.
        len: usize,
    },
}

/// One range of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// Guest-physical start, page aligned.
    pub start: u64,
    /// Length in bytes, a multiple of the page size.
    pub len: u64,
}

/// Guest RAM; cheap to clone, all clones are the same memory.
#[derive(Debug, Clone)]
pub struct GuestMemory {
    inner: Arc<Inner>,
    ranges: Arc<[RamRange]>,
    file: Arc<File>,
}

/// Where a guest page lives in this process.
#[derive(Debug, Clone)]
pub struct HostPage {
    /// The first byte of the page; valid for [`PAGE_SIZE`] bytes as long as the [`GuestMemory`] lives.
    pub host: *mut u8,
    /// The tracker of the page's region.
    pub tracker: Tracker,
    /// The page's number within that tracker.
    pub page: usize,
}

impl GuestMemory {
    /// Maps zeroed RAM for `ranges`, which must be page aligned, ascending and disjoint.
    pub fn new(ranges: &[RamRange]) -> Result<GuestMemory, Error> {
        let mut end = 0;
        for r in ranges {
            if r.start % PAGE_SIZE != 0 || r.len % PAGE_SIZE != 0 || r.len == 0 || r.start < end {
                return Err(Error::Layout(format!("{ranges:x?}")));
            }
            let next = r.start.checked_add(r.len);
            end = next.ok_or_else(|| Error::Layout(format!("{ranges:x?}")))?;
        }
        let bytes = ranges.iter().map(|r| r.len).sum();
        let failed = |source| Error::Allocate { bytes, source };
        let fd = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC)
            .map_err(|e| failed(e.into()))?;
        let file = Arc::new(File::from(fd));
        file.set_len(bytes).map_err(failed)?;
        let mut offset = 0;
        let mut regions = Vec::new();
        for r in ranges {
            let backing = FileOffset::from_arc(Arc::clone(&file), offset);
            let region = MmapRegion::<Tracker>::from_file(backing, r.len as usize)
                .map_err(|e| failed(std::io::Error::other(e)))?;
            let region = GuestRegionMmap::new(region, GuestAddress(r.start));
            regions.push(region.ok_or_else(|| Error::Layout(format!("{r:x?}")))?);
            offset += r.len;
        }
        let inner =
            Inner::from_regions(regions).map_err(|e| Error::Layout(format!("{ranges:x?}: {e}")))?;
        Ok(GuestMemory {
            inner: Arc::new(inner),
            ranges: ranges.into(),
            file,
        })
    }

    /// The `vm-memory` view.
    pub fn inner(&self) -> &Inner {
        &self.inner
    }

    /// The `vm-memory` view, shared.
    pub fn shared(&self) -> Arc<Inner> {
        Arc::clone(&self.inner)
    }

    /// The ranges of RAM, ascending.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// RAM in all, in bytes.
    pub fn size(&self) -> u64 {
        self.ranges.iter().map(|r| r.len).sum()
    }

    /// The memfd behind RAM; the ranges lie in it one after the other.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether all of `address..address + len` is RAM.
    pub fn contains(&self, address: u64, len: usize) -> bool {
        let start = GuestAddress(address);
        match self.inner.find_region(start) {
            Some(region) if len as u64 <= region.len() - (address - region.start_addr().0) => true,
            _ => GuestMemoryBackend::check_range(&*self.inner, start, len),
        }
    }

    /// Fills `data` from guest-physical `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Error> {
        let len = data.len();
        self.inner
            .read_slice(data, GuestAddress(address))
            .map_err(|_| Error::OutOfRange { address, len })
    }

    /// Writes `data` at guest-physical `address`; the pages are tracked.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), Error> {
        let len = data.len();
        if !self.contains(address, len) {
            return Err(Error::OutOfRange { address, len });
        }
        self.inner
            .write_slice(data, GuestAddress(address))
            .map_err(|_| Error::OutOfRange { address, len })
    }

    /// Reads a little-endian `u32`.
    pub fn read_u32(&self, address: u64) -> Result<u32, Error> {
        let mut b = [0; 4];
        self.read(address, &mut b).map(|()| u32::from_le_bytes(b))
    }

    /// Reads a little-endian `u64`.
    pub fn read_u64(&self, address: u64) -> Result<u64, Error> {
        let mut b = [0; 8];
        self.read(address, &mut b).map(|()| u64::from_le_bytes(b))
    }

    /// Where the page that holds guest-physical `address` lives in this process; `None` if it is not RAM.
    pub fn host_page(&self, address: u64) -> Option<HostPage> {
        let page_start = GuestAddress(address & !(PAGE_SIZE - 1));
        let region = self.inner.find_region(page_start)?;
        let offset = page_start.0 - region.start_addr().0;
        // SAFETY: `offset` is less than the region's length, because find_region found the address in it.
        let host = unsafe { region.as_ptr().add(offset as usize) };
        Some(HostPage {
            host,
            tracker: region.bitmap().clone(),
            page: (offset / PAGE_SIZE) as usize,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_ranges() -> GuestMemory {
        let ranges = [(0, 0xa0000), (0x10_0000, 0x20_0000)];
        GuestMemory::new(&ranges.map(|(start, len)| RamRange { start, len })).unwrap()
    }

    #[test]
    fn reads_what_was_written_and_refuses_holes() {
        let m = two_ranges();
        m.write(0x10_0ffc, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        assert_eq!(m.read_u64(0x10_0ffc).unwrap(), 0x0807_0605_0403_0201);
        assert_eq!(m.size(), 0xa0000 + 0x20_0000);
        for (address, len) in [
            (0x9_fffc, 8),
            (0xa_0000, 1),
            (u64::MAX, 2),
            (0x2f_ffff + 1, 1),
        ] {
            assert!(
                m.read(address, &mut vec![0; len]).is_err(),
                "read {address:#x}"
            );
            assert!(
                m.write(address, &vec![0; len]).is_err(),
                "write {address:#x}"
            );
        }
        assert_eq!(
            m.read_u32(0x9_fffc).unwrap(),
            0,
            "a refused write leaves no trace"
        );
    }

    #[test]
    fn a_write_is_seen_by_the_tracker_of_its_page() {
        let m = two_ranges();
        let p = m.host_page(0x10_1234).unwrap();
        let (version, _) = p.tracker.watch_code(p.page);
        m.write(0x10_1fff, &[0x90]).unwrap();
        assert_ne!(p.tracker.version(p.page), version);
        assert!(m.host_page(0xa_0000).is_none());
    }

    #[test]
    fn bad_layouts_are_refused() {
        for ranges in [
            &[(1, 4096)][..],
            &[(0, 0)],
            &[(0, 8192), (4096, 4096)],
            &[(u64::MAX - 4095, 8192)],
        ] {
            let ranges: Vec<_> = ranges
                .iter()
                .map(|&(start, len)| RamRange { start, len })
                .collect();
            assert!(GuestMemory::new(&ranges).is_err(), "{ranges:?}");
        }
    }
}
