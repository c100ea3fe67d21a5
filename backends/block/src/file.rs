//! Image files as the host has them: opening, locking, and telling formats apart.
//!
//! A file is locked with flock(2) as long as it is open: exclusively for writing, shared for reading, so two machines
//! never write the same image. The lock is advisory and ends with the process.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Deref;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock, fstatfs};
use rustix::io::Errno;

use crate::Format;

/// Why an image could not be opened. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("disk image {}: there is no such file (`lodger disk create FILE SIZE` makes an empty disk)", path.display())]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// The host denies access.
    #[error("disk image {}: not permitted to open it for {}", path.display(), if *read_only { "reading" } else { "writing; attach it read-only (FILE,ro), or change its permissions" })]
    NotPermitted {
        /// The image.
        path: PathBuf,
        /// What was tried.
        read_only: bool,
    },
    /// It is a directory, a pipe or another thing that is not storage.
    #[error("disk image {}: it is {what}, not a file or a block device", path.display())]
    NotStorage {
        /// The image.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// An image in a format that is not understood.
    #[error("disk image {}: it is a {format} image; raw and qcow2 are understood. Convert it (`qemu-img convert -O qcow2 {} NEW`), or say format=raw if its first bytes only look like that", path.display(), path.display())]
    OtherFormat {
        /// The image.
        path: PathBuf,
        /// Its format.
        format: &'static str,
    },
    /// It has no bytes.
    #[error("disk image {}: it is empty; give it a size (`lodger disk resize FILE SIZE`)", path.display())]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// Another process holds it.
    #[error("disk image {}: another process is using it; only those who all attach it read-only (FILE,ro) can share an image", path.display())]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// A qcow2 image that is recognised by its contents alone names another file.
    #[error("disk image {}: it is a qcow2 image that names a backing file ({backing}). A guest that had this file as a raw disk could have written that name to read a file of yours. If it is your image, say so: {},format=qcow2", path.display(), path.display())]
    BackingNotTrusted {
        /// The image.
        path: PathBuf,
        /// The file that it names.
        backing: String,
    },
    /// Its contents are not what its format demands.
    #[error("disk image {}: {what}", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// What is wrong, and what to do if something can be done.
        what: String,
    },
    /// Its backing file cannot be used.
    #[error("disk image {}: its backing file cannot be used: {source}", path.display())]
    Backing {
        /// The image.
        path: PathBuf,
        /// The reason.
        source: Box<OpenError>,
    },
    /// Anything else.
    #[error("disk image {}: {source}", path.display())]
    Host {
        /// The image.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
}

/// A file that may be locked. It is unlocked explicitly, because a child process can share the lock for a moment, between
/// fork and exec.
#[derive(Debug)]
pub(crate) struct LockedFile(File);

impl From<File> for LockedFile {
    fn from(file: File) -> LockedFile {
        LockedFile(file)
    }
}

impl Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        // Closing does it as well.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// An open and locked image file.
#[derive(Debug)]
pub(crate) struct ImageFile {
    pub(crate) file: LockedFile,
    pub(crate) read_only: bool,
    /// The length of the file when it was opened, in bytes; not 0.
    pub(crate) len: u64,
}

/// What a file is by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    Known(Format),
    Other(&'static str),
}

impl Content {
    /// What a disk that begins with `head` is.
    pub(crate) fn of(head: &[u8]) -> Content {
        let known: [(&[u8], _); 4] = [
            (b"QFI\xfb", Content::Known(Format::Qcow2)),
            (b"KDMV", Content::Other("VMDK")),
            (b"vhdxfile", Content::Other("VHDX")),
            (b"conectix", Content::Other("VHD")),
        ];
        let found = known.iter().find(|(magic, _)| head.starts_with(magic));
        found.map_or(Content::Known(Format::Raw), |&(_, content)| content)
    }
}

/// Bytes of the longest magic number of [`Content::of`].
pub(crate) const LONGEST_MAGIC: usize = 8;

impl ImageFile {
    /// Opens and locks the file at `path`.
    pub(crate) fn open(path: &Path, read_only: bool) -> Result<ImageFile, OpenError> {
        let image = ImageFile::open_even_empty(path, read_only)?;
        match image.len {
            0 => Err(OpenError::Empty { path: path.into() }),
            _ => Ok(image),
        }
    }

    /// Like `open`, but the file may have no bytes.
    pub(crate) fn open_even_empty(path: &Path, read_only: bool) -> Result<ImageFile, OpenError> {
        let image = ImageFile::peek(path, read_only)?;
        let lock = match read_only {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        match flock(&*image.file, lock) {
            Ok(()) => Ok(image),
            Err(Errno::WOULDBLOCK) => Err(OpenError::InUse { path: path.into() }),
            Err(Errno::OPNOTSUPP | Errno::NOLCK | Errno::NOSYS | Errno::INVAL) => {
                tracing::warn!(
                    "disk image {}: its file system has no locks; do not use it twice",
                    path.display()
                );
                Ok(image)
            }
            Err(error) => Err(OpenError::Host {
                path: path.into(),
                source: error.into(),
            }),
        }
    }

    /// Opens the file without a lock: somebody may be changing it.
    pub(crate) fn peek(path: &Path, read_only: bool) -> Result<ImageFile, OpenError> {
        let own = || path.to_path_buf();
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => OpenError::Missing { path: own() },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                OpenError::NotPermitted {
                    path: own(),
                    read_only,
                }
            }
            _ => OpenError::Host {
                path: own(),
                source,
            },
        };
        let storage = |meta: &Metadata| match not_storage(meta) {
            Some(what) => Err(OpenError::NotStorage { path: own(), what }),
            None => Ok(()),
        };
        // Looked at before it is opened, because opening a pipe may wait for ever.
        storage(&std::fs::metadata(path).map_err(failed)?)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(failed)?;
        storage(&file.metadata().map_err(failed)?)?;
        // The end of a block device is found by seeking; its metadata says 0.
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(ImageFile {
            file: file.into(),
            read_only,
            len,
        })
    }

    /// What the file is by its first bytes.
    pub(crate) fn content(&self) -> Content {
        let mut head = [0; LONGEST_MAGIC];
        match self.file.read_exact_at(&mut head, 0) {
            Ok(()) => Content::of(&head),
            Err(_) => Content::Known(Format::Raw),
        }
    }
}

fn not_storage(meta: &Metadata) -> Option<&'static str> {
    let t = meta.file_type();
    if t.is_file() || t.is_block_device() {
        None
    } else if t.is_dir() {
        Some("a directory")
    } else if t.is_fifo() {
        Some("a pipe")
    } else if t.is_char_device() {
        Some("a character device")
    } else {
        Some("a socket or the like")
    }
}

/// Fills `buf` from `offset` of a file; what is beyond the file's end is zero.
pub(crate) fn read_padded(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => {
                buf[done..].fill(0);
                return Ok(());
            }
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Whether the file is on a file system that has no disk.
pub(crate) fn is_in_memory(file: &File) -> bool {
    const TMPFS_MAGIC: u64 = 0x0102_1994; // statfs(2)
    fstatfs(file).is_ok_and(|fs| fs.f_type as u64 == TMPFS_MAGIC)
}
