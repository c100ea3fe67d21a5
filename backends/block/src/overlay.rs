//! A disk that begins as a copy of an image and is forgotten at the end: copy on write, in clusters of 4 KiB.
//!
//! The image is opened read-only and shared, so many disks can begin with it. What is written goes to a file without a
//! name, which is gone with the process however that ends. A flush has nothing to make durable.
//!
//! Limit: the file without a name grows to what was written, at most to the size of the disk.

use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::{BlockBackend, Direct, Format, OpenError, RawFile};

/// Bytes that are copied from the image when a part of them is written: what most file systems write at least.
const CLUSTER: u64 = 4096;

/// See the module documentation.
pub struct Overlay {
    base: Arc<dyn BlockBackend>,
    top: RawFile,
    /// Which clusters are in `top`, one bit each. A writer that adds one holds it alone.
    present: RwLock<Bits>,
}

#[derive(Debug)]
struct Bits(Vec<u64>);

impl Bits {
    fn get(&self, n: u64) -> bool {
        self.0[(n / 64) as usize] >> (n % 64) & 1 != 0
    }

    fn set(&mut self, n: u64) {
        self.0[(n / 64) as usize] |= 1 << (n % 64);
    }
}

impl Overlay {
    /// A disk with the contents of the image at `path`, opened as [`open`](crate::open) does it. What is written is kept in `dir`.
    pub fn open(path: &Path, format: Option<Format>, dir: &Path) -> Result<Overlay, OpenError> {
        let base = crate::open(path, true, format)?;
        let size = base.size_bytes();
        let top = tempfile::tempfile_in(dir).and_then(|file| RawFile::unnamed(file, size));
        let top = top.map_err(|source| OpenError::Host {
            path: dir.to_path_buf(),
            source,
        })?;
        let words = size.div_ceil(CLUSTER).div_ceil(64);
        Ok(Overlay {
            base,
            top,
            present: RwLock::new(Bits(vec![0; words as usize])),
        })
    }

    // A panic elsewhere leaves the bits as they were or one further: never wrong.
    fn shared(&self) -> RwLockReadGuard<'_, Bits> {
        self.present.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Bits> {
        self.present.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size_bytes() => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the end of the disk",
            )),
        }
    }

    /// Lets `change` change a range of `top`, whose clusters are all there afterwards. Parts of clusters that it does not
    /// change come from the image.
    fn change(
        &self,
        offset: u64,
        len: u64,
        change: impl FnOnce(&RawFile) -> io::Result<()>,
    ) -> io::Result<()> {
        self.check(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let (first, last) = (offset / CLUSTER, (offset + len - 1) / CLUSTER);
        {
            let present = self.shared();
            if (first..=last).all(|cluster| present.get(cluster)) {
                return change(&self.top);
            }
        }
        let mut present = self.alone();
        for cluster in [first, last] {
            let start = cluster * CLUSTER;
            let end = (start + CLUSTER).min(self.size_bytes());
            let whole = offset <= start && end <= offset + len;
            if !whole && !present.get(cluster) {
                let mut buf = vec![0; (end - start) as usize];
                self.base.read_at(start, &mut buf)?;
                self.top.write_at(start, &buf)?;
                present.set(cluster);
            }
        }
        change(&self.top)?;
        (first..=last).for_each(|cluster| present.set(cluster));
        Ok(())
    }

    /// Passes the parts of a range, each wholly in `top` or not, to `each`: offset, length, whether it is.
    fn parts(
        present: &Bits,
        offset: u64,
        len: u64,
        mut each: impl FnMut(u64, u64, bool) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let there = present.get(at / CLUSTER);
            let mut next = (at / CLUSTER + 1) * CLUSTER;
            while next < end && present.get(next / CLUSTER) == there {
                next += CLUSTER;
            }
            let next = next.min(end);
            each(at, next - at, there)?;
            at = next;
        }
        Ok(())
    }
}

impl BlockBackend for Overlay {
    fn size_bytes(&self) -> u64 {
        self.base.size_bytes()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        let present = self.shared();
        Self::parts(&present, offset, buf.len() as u64, |at, len, there| {
            let start = (at - offset) as usize;
            let part = &mut buf[start..start + len as usize];
            match there {
                true => self.top.read_at(at, part),
                false => self.base.read_at(at, part),
            }
        })
    }

    // A cluster never leaves `top`, so an answer stays right.
    fn direct(&self, offset: u64, len: u64, write: bool) -> Option<Direct<'_>> {
        let last = (offset + len).checked_sub(1)? / CLUSTER;
        let present = self.shared();
        let there = present.get(offset / CLUSTER);
        if !(offset / CLUSTER..=last).all(|cluster| present.get(cluster) == there) {
            return None;
        }
        match there {
            true => self.top.direct(offset, len, write),
            false if write => None,
            false => self.base.direct(offset, len, false),
        }
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.change(offset, buf.len() as u64, |top| top.write_at(offset, buf))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        let present = self.shared();
        Self::parts(&present, offset, len, |at, len, there| match there {
            true => self.top.discard(at, len),
            false => Ok(()),
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        self.change(offset, len, |top| top.write_zeroes(offset, len, true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 5 * CLUSTER as usize + 512;

    fn base() -> (tempfile::TempDir, std::path::PathBuf, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        let bytes: Vec<u8> = (0..SIZE).map(|i| (i / 512) as u8 + 1).collect();
        std::fs::write(&path, &bytes).unwrap();
        (dir, path, bytes)
    }

    #[test]
    fn behaves_like_a_copy_and_leaves_the_image_alone() {
        let (dir, path, image) = base();
        let disk = Overlay::open(&path, None, dir.path()).unwrap();
        let mut copy = image.clone();
        // A small generator of numbers, so that a failure can be repeated.
        let mut state = 1u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        for round in 0..2000 {
            let offset = random(SIZE + 1);
            let len = random(SIZE - offset + 1).min(random(10_000));
            let part = &mut copy[offset..offset + len];
            match random(4) {
                0 => {
                    part.fill(round as u8);
                    disk.write_at(offset as u64, part).unwrap();
                }
                1 => {
                    part.fill(0);
                    disk.write_zeroes(offset as u64, len as u64, round % 2 == 0)
                        .unwrap();
                }
                2 if round % 100 == 2 => {
                    disk.discard(offset as u64, len as u64).unwrap();
                    let mut now = vec![0; len];
                    disk.read_at(offset as u64, &mut now).unwrap();
                    let old_or_zero = |(new, old): (&u8, &u8)| *new == *old || *new == 0;
                    assert!(now.iter().zip(&*part).all(old_or_zero), "{round}");
                    part.copy_from_slice(&now);
                }
                _ => {
                    let mut found = vec![0xee; len];
                    disk.read_at(offset as u64, &mut found).unwrap();
                    assert!(found == part, "{round}: {offset} {len}");
                }
            }
        }
        disk.flush().unwrap();
        drop(disk);
        assert!(std::fs::read(&path).unwrap() == image);
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
    }

    #[test]
    fn many_share_an_image_and_see_only_their_own() {
        let (dir, path, image) = base();
        let disks = [0, 1, 2].map(|_| Overlay::open(&path, None, dir.path()).unwrap());
        for (i, disk) in disks.iter().enumerate() {
            disk.write_at(700, &[i as u8 + 100]).unwrap();
        }
        for (i, disk) in disks.iter().enumerate() {
            let mut found = [0; 3];
            disk.read_at(699, &mut found).unwrap();
            assert_eq!(found, [image[699], i as u8 + 100, image[701]]);
        }
        assert!(matches!(
            RawFile::open(&path, false),
            Err(OpenError::InUse { .. })
        ));
    }

    #[test]
    fn what_is_beyond_is_refused() {
        let (dir, path, _) = base();
        let disk = Overlay::open(&path, None, dir.path()).unwrap();
        for (offset, len) in [(SIZE as u64, 1), (SIZE as u64 - 5, 6), (u64::MAX, 2)] {
            let mut buf = vec![0; len as usize];
            assert!(disk.read_at(offset, &mut buf).is_err());
            assert!(disk.write_at(offset, &buf).is_err());
            assert!(disk.discard(offset, len).is_err());
            assert!(disk.write_zeroes(offset, len, true).is_err());
        }
        let nowhere = Overlay::open(&path, None, &dir.path().join("nowhere"));
        let nowhere = nowhere.err().unwrap();
        assert!(nowhere.to_string().contains("nowhere"), "{nowhere}");
    }
}
