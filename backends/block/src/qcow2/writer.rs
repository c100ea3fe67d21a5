//! An image that is written, by the crate `imago`: it finds and allocates clusters, several requests at once. A discard,
//! which takes clusters away, has the image to itself.
//!
//! What is allocated is written before the tables that refer to it, the reference counts before both; the tables themselves
//! are written at a flush, or when there is no room for them any more. So an image whose writer was killed has everything up
//! to the last flush, and at worst clusters that nobody uses (`check.rs` finds them).
//!
//! Limit: the order is that of the writes to the file. If the host itself loses power between two of them, reference
//! counts can be lost. They are checked when an image is opened, and it is refused until `lodger disk check --repair` has put
//! them right.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping,
    format::PreallocateMode,
};
use rustix::fs::{FallocateFlags, fallocate};

use crate::file::ImageFile;
use crate::qcow2::check::is_safe;
use crate::qcow2::header::{Backing, CORRUPT, Compression, DIRTY, Header};
use crate::qcow2::layer::Layer;
use crate::qcow2::{damaged, open_backing};
use crate::{BlockBackend, OpenError, check_range};

/// See the module documentation.
pub(crate) struct Writer {
    image: RwLock<FormatAccess<Layer>>,
    size: u64,
    /// There is a way to say that a cluster is zero.
    has_zeroes: bool,
    cluster: u64,
}

impl Writer {
    /// `trusted`: other files that the image names may be opened.
    pub(crate) fn open(path: &Path, image: ImageFile, trusted: bool) -> Result<Writer, OpenError> {
        let header = Header::read(&image.file, image.len).map_err(|what| damaged(path, what))?;
        let name = path.display();
        if header.state & (DIRTY | CORRUPT) != 0 {
            let what = format!(
                "it was not closed properly, or is damaged; `lodger disk check --repair {name}` puts its reference counts right"
            );
            return Err(damaged(path, what));
        }
        if header.compression == Compression::Zstd {
            let what = format!(
                "its clusters are compressed with zstd, such images are only read: attach it with {name},temp or {name},ro, or convert it (`lodger disk convert {name} NEW`)"
            );
            return Err(damaged(path, what));
        }
        let host = |source| OpenError::Host {
            path: path.into(),
            source,
        };
        // imago trusts the tables; it can recurse without end where they contradict each other.
        if !is_safe(&image, &header).map_err(host)? {
            let what = format!(
                "its reference counts are wrong, writing to it could destroy it: `lodger disk check {name}` tells more, with --repair it puts them right"
            );
            return Err(damaged(path, what));
        }
        let backing = open_backing(path, &header, trusted, 0)?;
        let mut qcow2 = Qcow2::<Layer>::open_image(Layer::file(image.file), true).map_err(host)?;
        let backing = backing.map(|image| {
            let raw = Raw::builder(Layer::image(image, header.size));
            raw.open(DenyImplicitOpenGate::default())
        });
        let backing = backing.transpose().map_err(host)?;
        qcow2.set_backing(backing.map(FormatAccess::new));
        qcow2.set_data_file(None);
        Ok(Writer {
            image: RwLock::new(FormatAccess::new(qcow2)),
            size: header.size,
            has_zeroes: header.version >= 3,
            cluster: header.cluster(),
        })
    }

    fn shared(&self) -> io::Result<RwLockReadGuard<'_, FormatAccess<Layer>>> {
        self.image.read().map_err(|_| broken())
    }

    fn alone(&self) -> io::Result<RwLockWriteGuard<'_, FormatAccess<Layer>>> {
        self.image.write().map_err(|_| broken())
    }

    /// Gives the space of a range's clusters back to the host: of those that are in it as a whole and that no snapshot uses.
    fn punch(&self, image: &FormatAccess<Layer>, offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        let end = match end == self.size {
            true => end,
            false => end / self.cluster * self.cluster,
        };
        let mut at = offset.next_multiple_of(self.cluster);
        while at < end {
            let (mapping, len) = image.get_mapping(at, end - at)?;
            if let Mapping::Raw {
                storage,
                offset,
                writable: true,
                ..
            } = mapping
            {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                // A hint; the host may not be able to.
                let _ = fallocate(storage.as_file()?, how, offset, len);
            }
            match len {
                0 => break,
                len => at += len,
            }
        }
        Ok(())
    }
}

fn broken() -> io::Error {
    io::Error::other("the image's state is not known after an internal error")
}

impl BlockBackend for Writer {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        self.shared()?.read(buf, offset)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        check_range(self.size, offset, buf.len() as u64)?;
        self.shared()?.write(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        let image = self.shared()?;
        image.flush()?;
        image.sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(self.size, offset, len)?;
        // Without zeroes a cluster could only become that of the backing file.
        if !self.has_zeroes || len == 0 {
            return Ok(());
        }
        let mut image = self.alone()?;
        self.punch(&image, offset, len)?;
        image.discard_to_any(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        check_range(self.size, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        if self.has_zeroes && may_unmap {
            let mut image = self.alone()?;
            self.punch(&image, offset, len)?;
            return image.discard_to_zero(offset, len);
        }
        if self.has_zeroes {
            return self.shared()?.write_zeroes(offset, len);
        }
        let zeroes = vec![0; len.min(64 << 10) as usize];
        let mut at = offset;
        while at < offset + len {
            let n = (offset + len - at).min(zeroes.len() as u64);
            self.write_at(at, &zeroes[..n as usize])?;
            at += n;
        }
        Ok(())
    }
}

/// Makes `file`, which is empty, an image of `size` bytes, which continues `backing`.
pub(crate) fn create(
    file: File,
    size: u64,
    cluster: u64,
    backing: Option<&Backing>,
) -> io::Result<()> {
    let mut builder = Qcow2::<Layer>::create_builder(Layer::file(file.into()))
        .size(size)
        .cluster_size(cluster as usize);
    if let Some(Backing { name, format }) = backing {
        builder = builder.backing(name.clone(), format.clone().unwrap_or_default());
    }
    builder.create()
}

/// Gives the image at `path` a larger size. What is new is zero.
pub(crate) fn grow(path: &Path, image: ImageFile, size: u64) -> Result<(), OpenError> {
    let has_backing = Header::read(&image.file, image.len)
        .map_err(|what| damaged(path, what))?
        .backing
        .is_some();
    let writer = Writer::open(path, image, true)?;
    let how = match has_backing {
        true => PreallocateMode::Zero,
        false => PreallocateMode::None,
    };
    let done = writer
        .shared()
        .and_then(|image| image.resize_grow(size, how));
    done.and_then(|()| writer.flush())
        .map_err(|source| OpenError::Host {
            path: path.into(),
            source,
        })
}
