//! RAM handed back to the host: fallocate(2) with FALLOC_FL_PUNCH_HOLE on the memory file.

use rustix::fs::FallocateFlags;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::{GuestMemory, PAGE_SIZE};

impl GuestMemory {
    /// Gives the whole pages in `address..address + len` back to the host, as far as they are RAM; the guest finds zeroes there
    /// when it touches them again. They are tracked as written. Returns how many bytes these are.
    ///
    /// Mappings stay valid, so nobody has to forget where a page is.
    pub fn discard(&self, address: u64, len: u64) -> std::io::Result<u64> {
        let end = address.saturating_add(len) & !(PAGE_SIZE - 1);
        let mut at = match address.checked_next_multiple_of(PAGE_SIZE) {
            Some(start) => start,
            None => return Ok(0),
        };
        let mut given = 0;
        while at < end {
            let Some(region) = self.inner.find_region(GuestAddress(at)) else {
                // To the next range of RAM, if there is one.
                let starts = self.ranges.iter().map(|r| r.start);
                match starts.filter(|&start| start > at).min() {
                    Some(start) => at = start,
                    None => break,
                }
                continue;
            };
            let from = at - region.start_addr().0;
            let len = (region.len() - from).min(end - at);
            let file = region.file_offset().map_or(0, |file| file.start());
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, flags, file + from, len)?;
            // After it: whoever decodes code from now on sees the zeroes.
            region.bitmap().mark_dirty(from as usize, len as usize);
            given += len;
            at += len;
        }
        Ok(given)
    }

    /// How many bytes of the host's memory RAM takes.
    pub fn resident(&self) -> std::io::Result<u64> {
        /// As st_blocks counts.
        const BLOCK: u64 = 512;
        let stat = rustix::fs::fstat(&self.file)?;
        Ok(stat.st_blocks as u64 * BLOCK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RamRange;

    #[test]
    fn pages_are_given_back_and_lose_their_code() {
        let ranges = [(0, 0x4000), (0x8000, 0x4000)];
        let m = GuestMemory::new(&ranges.map(|(start, len)| RamRange { start, len })).unwrap();
        // What is discarded, and the pages that go.
        let cases: [(u64, u64, &[u64]); 8] = [
            (0x1000, 0x2000, &[0x1000, 0x2000]),
            (0x0fff, 0x2000, &[0x1000]),
            (0x1001, 0xfff, &[]),
            (0x3000, 0x6000, &[0x3000, 0x8000]),
            (0x9000, u64::MAX, &[0x9000, 0xa000, 0xb000]),
            (0x4000, 0x4000, &[]),
            (u64::MAX - 5, 100, &[]),
            (0, 0, &[]),
        ];
        for (address, len, gone) in cases {
            let pages = [0, 0x1000, 0x2000, 0x3000, 0x8000, 0x9000, 0xa000, 0xb000];
            let mut versions = Vec::new();
            for page in pages {
                m.write(page, &[7; 4096]).unwrap();
                let host = m.host_page(page).unwrap();
                versions.push(host.tracker.watch_code(host.page).0);
            }
            assert_eq!(m.resident().unwrap(), 8 * 4096);
            let given = m.discard(address, len).unwrap();
            assert_eq!(given, gone.len() as u64 * 4096, "{address:#x}+{len:#x}");
            assert_eq!(m.resident().unwrap(), 8 * 4096 - given);
            for (page, version) in pages.into_iter().zip(versions) {
                let is_gone = gone.contains(&page);
                let host = m.host_page(page).unwrap();
                assert_eq!(host.tracker.version(host.page) != version, is_gone);
                assert_eq!(host.tracker.has_code(host.page), !is_gone);
                let mut byte = [0];
                m.read(page + 5, &mut byte).unwrap();
                assert_eq!(byte == [0], is_gone, "{page:#x}");
            }
        }
    }
}
