//! A raw image: byte n of the disk is byte n of a regular file or of a block device.
//!
//! * A file whose length is not a multiple of 512 is padded: the disk's size is rounded up, the missing bytes
//!   read as zeroes, and the first write to them lets the file grow.
//! * Holes are made with fallocate(2); where the host cannot, a discard does nothing and zeroes are written.
//! * A disk that is taken for raw because of its first bytes stays one: a write that would make it look like another
//!   format is refused.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fdatasync, seek};
use rustix::io::Errno;

use crate::file::{Content, ImageFile, LONGEST_MAGIC, LockedFile, is_in_memory};
use crate::{BlockBackend, Direct, Extent, Format, OpenError, SECTOR_SIZE};

/// The most zeroes that are written with one call where holes are not supported, in bytes.
const ZEROES: usize = 64 << 10;

/// See the module documentation.
#[derive(Debug)]
pub struct RawFile {
    file: LockedFile,
    read_only: bool,
    /// The length of the file when it was opened, in bytes.
    file_len: u64,
    /// `file_len` rounded up to sectors.
    size: u64,
    /// Writes that would make it look like another format are refused.
    guarded: bool,
    /// It is on a tmpfs.
    in_memory: bool,
}

impl RawFile {
    /// Opens and locks the image at `path`, whatever its first bytes are.
    pub fn open(path: &Path, read_only: bool) -> Result<RawFile, OpenError> {
        Ok(RawFile::new(ImageFile::open(path, read_only)?, false))
    }

    /// `guarded`: it must not become an image of another format.
    pub(crate) fn new(image: ImageFile, guarded: bool) -> RawFile {
        RawFile {
            in_memory: is_in_memory(&image.file),
            file: image.file,
            read_only: image.read_only,
            file_len: image.len,
            size: image.len.next_multiple_of(SECTOR_SIZE),
            guarded,
        }
    }

    /// A disk of `size` bytes, all zero, in a file that nobody else can open.
    pub(crate) fn unnamed(file: File, size: u64) -> io::Result<RawFile> {
        file.set_len(size)?;
        Ok(RawFile {
            in_memory: is_in_memory(&file),
            file: file.into(),
            read_only: false,
            file_len: size,
            size,
            guarded: false,
        })
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the end of the disk",
            )),
        }
    }

    fn check_write(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.check(offset, len)
    }

    /// Whether a write keeps the format that was found at the start.
    fn check_format(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let at = offset as usize;
        if !self.guarded || offset >= LONGEST_MAGIC as u64 || buf.is_empty() {
            return Ok(());
        }
        let mut head = [0; LONGEST_MAGIC];
        crate::file::read_padded(&self.file, 0, &mut head)?;
        let before = Content::of(&head);
        let len = buf.len().min(LONGEST_MAGIC - at);
        head[at..at + len].copy_from_slice(&buf[..len]);
        match Content::of(&head) {
            after if after == before || after == Content::Known(Format::Raw) => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the guest writes the header of another image format to a disk that is raw only as far as its contents tell; \
                 attach it with format=raw if that is meant to be",
            )),
        }
    }

    /// fallocate; false if the host cannot do this here.
    fn allocate(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        match fallocate(&*self.file, how | FallocateFlags::KEEP_SIZE, offset, len) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

impl BlockBackend for RawFile {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) if offset + done as u64 >= self.file_len => {
                    buf[done..].fill(0);
                    return Ok(());
                }
                // Somebody else has cut the file short.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.check_write(offset, buf.len() as u64)?;
        self.check_format(offset, buf)?;
        self.file.write_all_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        match self.read_only {
            true => Ok(()),
            false => Ok(fdatasync(&*self.file)?),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_write(offset, len)?;
        if len > 0 {
            self.allocate(FallocateFlags::PUNCH_HOLE, offset, len)?;
        }
        Ok(())
    }

    fn direct(&self, offset: u64, len: u64, write: bool) -> Option<Direct<'_>> {
        let padded = offset + len > self.file_len;
        let refused = write && (self.read_only || self.guarded && offset < LONGEST_MAGIC as u64);
        (!padded && !refused).then(|| Direct {
            file: self.file.as_fd(),
            offset,
            in_memory: self.in_memory,
        })
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        let rest = Extent {
            len: self.size.saturating_sub(offset),
            zero: false,
        };
        let data = match seek(&*self.file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            // There is no data any more.
            Err(Errno::NXIO) => return Ok(Extent { zero: true, ..rest }),
            Err(_) => return Ok(rest),
        };
        if data > offset {
            let len = data - offset;
            return Ok(Extent { len, zero: true });
        }
        Ok(match seek(&*self.file, SeekFrom::Hole(offset)) {
            Ok(hole) if hole > offset && hole < self.file_len => Extent {
                len: hole - offset,
                zero: false,
            },
            _ => rest,
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.check_write(offset, len)?;
        if len == 0
            || may_unmap && self.allocate(FallocateFlags::PUNCH_HOLE, offset, len)?
            || self.allocate(FallocateFlags::ZERO_RANGE, offset, len)?
        {
            return Ok(());
        }
        let zeroes = vec![0; ZEROES.min(len as usize)];
        let mut at = offset;
        while at < offset + len {
            let n = (offset + len - at).min(ZEROES as u64);
            self.file.write_all_at(&zeroes[..n as usize], at)?;
            at += n;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn image(bytes: &[u8]) -> tempfile::NamedTempFile {
        let f = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(f.path(), bytes).unwrap();
        f
    }

    #[test]
    fn reads_what_was_written_and_refuses_what_is_beyond() {
        let f = image(&[0; 4096]);
        let disk = RawFile::open(f.path(), false).unwrap();
        assert_eq!((disk.size_bytes(), disk.read_only()), (4096, false));
        disk.write_at(510, &[1, 2, 3, 4]).unwrap();
        disk.flush().unwrap();
        let mut b = [9; 6];
        disk.read_at(509, &mut b).unwrap();
        assert_eq!(b, [0, 1, 2, 3, 4, 0]);
        for (offset, len) in [(4096, 1), (4000, 97), (u64::MAX, 1), (u64::MAX - 1, 8)] {
            let mut buf = vec![0; len as usize];
            assert!(disk.read_at(offset, &mut buf).is_err(), "{offset} {len}");
            assert!(disk.write_at(offset, &buf).is_err(), "{offset} {len}");
            assert!(disk.discard(offset, len).is_err(), "{offset} {len}");
            assert!(disk.write_zeroes(offset, len, true).is_err());
        }
        assert_eq!(f.path().metadata().unwrap().len(), 4096, "it did not grow");
    }

    #[test]
    fn zeroes_and_holes() {
        for may_unmap in [false, true] {
            let f = image(&[7; 256 << 10]);
            let disk = RawFile::open(f.path(), false).unwrap();
            disk.write_zeroes(4096, 128 << 10, may_unmap).unwrap();
            let mut all = vec![1; 256 << 10];
            disk.read_at(0, &mut all).unwrap();
            let (head, rest) = all.split_at(4096);
            let (zeroed, tail) = rest.split_at(128 << 10);
            assert!(head.iter().chain(tail).all(|&b| b == 7));
            assert!(zeroed.iter().all(|&b| b == 0));
            let before = f.path().metadata().unwrap().blocks();
            disk.discard(0, 256 << 10).unwrap();
            assert!(f.path().metadata().unwrap().blocks() <= before);
            assert_eq!(f.path().metadata().unwrap().len(), 256 << 10);
        }
    }

    #[test]
    fn an_odd_length_is_padded_with_zeroes() {
        let f = image(&[5; 700]);
        let disk = RawFile::open(f.path(), false).unwrap();
        assert_eq!(disk.size_bytes(), 1024);
        let mut b = [1; 512];
        disk.read_at(512, &mut b).unwrap();
        assert_eq!((b[187], b[188], b[511]), (5, 0, 0));
        disk.write_at(1020, &[1, 2, 3, 4]).unwrap();
        disk.read_at(512, &mut b).unwrap();
        assert_eq!((b[187], b[188], b[511]), (5, 0, 4));
        assert!(disk.read_at(1024, &mut [0]).is_err());
    }

    #[test]
    fn a_file_cut_short_is_an_error_not_zeroes() {
        let f = image(&[5; 2048]);
        let disk = RawFile::open(f.path(), true).unwrap();
        f.as_file().set_len(1000).unwrap();
        assert!(disk.read_at(512, &mut [0; 512]).is_err());
    }

    #[test]
    fn read_only_refuses_every_change() {
        let f = image(&[5; 512]);
        let disk = RawFile::open(f.path(), true).unwrap();
        assert!(disk.read_only());
        disk.flush().unwrap();
        for refused in [
            disk.write_at(0, &[0]),
            disk.discard(0, 512),
            disk.write_zeroes(0, 512, true),
        ] {
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
    }

    #[test]
    fn writers_exclude_everybody_and_readers_share() {
        let f = image(&[0; 512]);
        for (first, second, shared) in [
            (false, false, false),
            (false, true, false),
            (true, false, false),
            (true, true, true),
        ] {
            let _held = RawFile::open(f.path(), first).unwrap();
            let other = RawFile::open(f.path(), second);
            match shared {
                true => assert!(other.is_ok()),
                false => assert!(matches!(other, Err(OpenError::InUse { .. }))),
            }
        }
    }

    #[test]
    fn what_cannot_be_opened_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("nowhere.img");
        let e = RawFile::open(&missing, true).unwrap_err();
        assert!(matches!(e, OpenError::Missing { .. }));
        assert!(e.to_string().contains("nowhere.img"), "{e}");
        let e = RawFile::open(dir.path(), true).unwrap_err();
        assert!(e.to_string().contains("a directory"), "{e}");
        let e = RawFile::open(Path::new("/dev/null"), false).unwrap_err();
        assert!(matches!(e, OpenError::NotStorage { .. }), "{e}");
        let f = image(&[]);
        let e = RawFile::open(f.path(), false).unwrap_err();
        assert!(matches!(e, OpenError::Empty { .. }), "{e}");
    }
}
