//! Bytes between files and RAM without a copy in between: preadv2(2) and pwritev2(2) on the mapping.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::{GuestMemory, Tracker};

/// The most pieces of one call (UIO_MAXIOV).
const MOST_PIECES: usize = 1024;

/// Whether an access may wait for the host's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// It may.
    Allowed,
    /// It answers with [`io::ErrorKind::WouldBlock`] instead, or with fewer bytes. Not every file system can: those that cannot
    /// answer with [`io::ErrorKind::Unsupported`].
    Never,
}

impl Wait {
    /// As preadv2(2) takes it.
    fn flags(self) -> libc::c_int {
        match self {
            Wait::Allowed => 0,
            Wait::Never => libc::RWF_NOWAIT,
        }
    }
}

impl GuestMemory {
    /// Reads from byte `offset` of a file into RAM, into ranges (guest-physical address, length) one after the other; the
    /// pages are tracked. Returns how many bytes were there. Whether all ranges are RAM is checked first.
    pub fn read_file(
        &self,
        file: BorrowedFd,
        offset: u64,
        ranges: &[(u64, usize)],
        wait: Wait,
    ) -> io::Result<usize> {
        let flags = wait.flags();
        let pieces = self.pieces(ranges)?;
        let done = call(&pieces, |pieces, count| {
            // SAFETY: `pieces` are `count` ranges of the mapping, which `self` keeps. Nobody has a reference into it: for Rust the
            // kernel is one more of those who write it at any time.
            unsafe { libc::preadv2(file.as_raw_fd(), pieces, count, offset as i64, flags) }
        });
        // What was not filled may have been touched as well.
        self.each_piece(ranges, |region, at, len| {
            region.bitmap().mark_dirty(at, len)
        })?;
        done
    }

    /// Writes ranges of RAM to byte `offset` of a file; returns how many bytes were written.
    pub fn write_file(
        &self,
        file: BorrowedFd,
        offset: u64,
        ranges: &[(u64, usize)],
        wait: Wait,
    ) -> io::Result<usize> {
        let flags = wait.flags();
        let pieces = self.pieces(ranges)?;
        call(&pieces, |pieces, count| {
            // SAFETY: as above; the kernel only reads.
            unsafe { libc::pwritev2(file.as_raw_fd(), pieces, count, offset as i64, flags) }
        })
    }

    /// Where the ranges are in this process.
    fn pieces(&self, ranges: &[(u64, usize)]) -> io::Result<Vec<libc::iovec>> {
        let mut pieces = Vec::with_capacity(ranges.len());
        self.each_piece(ranges, |region, at, len| {
            // SAFETY: `at` is less than the region's length.
            let host = unsafe { region.as_ptr().add(at) };
            pieces.push(libc::iovec {
                iov_base: host.cast(),
                iov_len: len,
            });
        })?;
        Ok(pieces)
    }

    /// Calls `f(region, offset, length)` for the pieces of the ranges, each in one region.
    fn each_piece(
        &self,
        ranges: &[(u64, usize)],
        mut f: impl FnMut(&GuestRegionMmap<Tracker>, usize, usize),
    ) -> io::Result<()> {
        for &(mut address, mut left) in ranges {
            while left > 0 {
                let region = self.inner.find_region(GuestAddress(address));
                let region = region.ok_or(io::ErrorKind::InvalidInput)?;
                let at = address - region.start_addr().0;
                let len = (region.len() - at).min(left as u64) as usize;
                f(region, at as usize, len);
                address = address.wrapping_add(len as u64);
                left -= len;
            }
        }
        Ok(())
    }
}

/// Does a system call with at most as many pieces as it takes, again if a signal came in between.
fn call(
    pieces: &[libc::iovec],
    f: impl Fn(*const libc::iovec, libc::c_int) -> isize,
) -> io::Result<usize> {
    let count = pieces.len().min(MOST_PIECES) as libc::c_int;
    loop {
        match usize::try_from(f(pieces.as_ptr(), count)) {
            Ok(done) => return Ok(done),
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RamRange;
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn bytes_pass_both_ways_and_are_tracked() {
        let ranges = [(0, 0x2000), (0x2000, 0x2000), (0x8000, 0x2000)];
        let m = GuestMemory::new(&ranges.map(|(start, len)| RamRange { start, len })).unwrap();
        let mut file: File = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC)
            .unwrap()
            .into();
        let bytes: Vec<u8> = (0..0x3000_u32).map(|i| (i / 7) as u8).collect();
        file.write_all(&bytes).unwrap();
        let page = m.host_page(0x2000).unwrap();
        let (version, _) = page.tracker.watch_code(page.page);
        // Over the border of two ranges of RAM, and in two pieces.
        let parts = [(0x1f00, 0x300), (0x8001, 0x100)];
        let read = m.read_file(file.as_fd(), 5, &parts, Wait::Allowed).unwrap();
        assert_eq!(read, 0x400);
        let mut found = [0; 0x300];
        m.read(0x1f00, &mut found).unwrap();
        assert_eq!(found, bytes[5..0x305]);
        assert_ne!(page.tracker.version(page.page), version);
        // At the end of the file.
        let read = m.read_file(file.as_fd(), 0x2fff, &parts, Wait::Allowed);
        assert_eq!(read.unwrap(), 1);
        m.write(0x8001, b"abc").unwrap();
        let written = m.write_file(
            file.as_fd(),
            0x3000,
            &[(0x8001, 2), (0x8003, 1)],
            Wait::Allowed,
        );
        assert_eq!(written.unwrap(), 3);
        file.seek(std::io::SeekFrom::Start(0x3000)).unwrap();
        let mut end = Vec::new();
        file.read_to_end(&mut end).unwrap();
        assert_eq!(end, b"abc");
        for bad in [(0x3ff0, 0x20), (0x9fff, 2), (u64::MAX, 1)] {
            let parts = [(0, 1), bad];
            assert!(m.read_file(file.as_fd(), 0, &parts, Wait::Allowed).is_err());
            assert!(
                m.write_file(file.as_fd(), 0, &parts, Wait::Allowed)
                    .is_err()
            );
        }
    }
}
