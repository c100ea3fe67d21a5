//! What images are made of, as the crate `imago` wants to have it: the file of the image that is written, and the images
//! behind it.
//!
//! A file of our own, because imago's excludes all other accesses while it waits for an fsync.

// UNSAFETY: imago's trait for storage has methods that are unsafe to call (alignment is the caller's affair). These here rely on
// nothing, and contain no unsafe block.
#![allow(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use rustix::fs::{FallocateFlags, fallocate, fdatasync};

use crate::BlockBackend;
use crate::file::{LockedFile, read_padded};
use crate::qcow2::reader::read_backing;

/// See the module documentation.
pub(super) struct Layer {
    inner: Inner,
    helper: CommonStorageHelper,
}

enum Inner {
    /// The image's file. The lock is held while it grows.
    File(LockedFile, Mutex<()>),
    /// A backing image, and the size that it is to have: what is behind its own end is zero.
    Image(Arc<dyn BlockBackend>, u64),
}

impl Layer {
    pub(super) fn file(file: LockedFile) -> Layer {
        Layer::new(Inner::File(file, Mutex::new(())))
    }

    pub(super) fn image(image: Arc<dyn BlockBackend>, size: u64) -> Layer {
        Layer::new(Inner::Image(image, size))
    }

    fn new(inner: Inner) -> Layer {
        Layer {
            inner,
            helper: CommonStorageHelper::default(),
        }
    }

    /// The file, if it is one that is written.
    pub(super) fn as_file(&self) -> io::Result<&File> {
        match &self.inner {
            Inner::File(file, _) => Ok(file),
            Inner::Image(..) => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }

    /// Makes the file at least `size` bytes long.
    fn grow(&self, size: u64) -> io::Result<()> {
        let Inner::File(file, growing) = &self.inner else {
            return Err(io::ErrorKind::PermissionDenied.into());
        };
        let _growing = growing.lock().unwrap_or_else(PoisonError::into_inner);
        match file.metadata()?.len() < size {
            true => file.set_len(size),
            false => Ok(()),
        }
    }
}

impl Storage for Layer {
    fn size(&self) -> io::Result<u64> {
        match &self.inner {
            Inner::File(file, _) => Ok(file.metadata()?.len()),
            Inner::Image(_, size) => Ok(*size),
        }
    }

    unsafe fn pure_readv(&self, parts: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut part in parts.into_inner() {
            match &self.inner {
                Inner::File(file, _) => read_padded(file, offset, &mut part)?,
                Inner::Image(image, _) => read_backing(Some(image), offset, &mut part)?,
            }
            offset += part.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, parts: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        let file = self.as_file()?;
        for part in parts.into_inner() {
            file.write_all_at(&part, offset)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        self.grow(end)?;
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if len == 0 || fallocate(self.as_file()?, how, offset, len).is_ok() {
            return Ok(());
        }
        let zeroes = vec![0; len.min(64 << 10) as usize];
        let mut at = offset;
        while at < end {
            let n = (end - at).min(zeroes.len() as u64);
            self.as_file()?.write_all_at(&zeroes[..n as usize], at)?;
            at += n;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        match &self.inner {
            Inner::File(file, _) => Ok(fdatasync(&**file)?),
            Inner::Image(..) => Ok(()),
        }
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, size: u64, _how: PreallocateMode) -> io::Result<()> {
        self.grow(size)
    }
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.inner {
            Inner::File(..) => "the image's file",
            Inner::Image(..) => "the backing image",
        })
    }
}
