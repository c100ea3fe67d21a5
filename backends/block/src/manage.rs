//! Images as files: making, converting, growing and describing them.
//!
//! A new image appears under its name when it is complete and on the disk, by one link(2) of a file without a name. Where the
//! host has no such files it has a hidden name until then, which is removed on every way out but a SIGKILL.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, OFlags, linkat};
use serde::Serialize;
use tempfile::NamedTempFile;

use crate::file::ImageFile;
use crate::qcow2::{Backing, Header, Writer, backing_path, grow};
use crate::{BlockBackend, Format, OpenError, RawFile, SECTOR_SIZE, known_format, qcow2};

/// Bytes that are copied at a time, and the unit in which zeroes are looked for.
const CHUNK: usize = 1 << 20;
const UNIT: usize = 64 << 10;
/// The largest disk, in bytes: what the formats and file systems allow.
const LARGEST: u64 = 1 << 50;
/// The cluster of a new qcow2 image, in bytes.
const CLUSTER: u64 = 64 << 10;

/// Why an image could not be made or changed. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum ManageError {
    /// An image cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// There is something already.
    #[error("{}: it exists already; remove it first, or choose another name", .0.display())]
    Exists(PathBuf),
    /// It cannot be made.
    #[error("{}: cannot make it: {source}", path.display())]
    Create {
        /// The image.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// It cannot be written. Nothing is left of it.
    #[error("{}: cannot write it, nothing is left behind: {source}", path.display())]
    Write {
        /// The image.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// It cannot be read.
    #[error("disk image {}: cannot read it at byte {at}: {source}", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// Where.
        at: u64,
        /// The reason.
        source: io::Error,
    },
    /// A size that no disk has.
    #[error("{}: {what}", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The caller did not want to go on. Nothing is left.
    #[error("interrupted; nothing is left behind")]
    Interrupted,
}

/// A file that has no name yet.
struct NewFile {
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    Unnamed(File),
    Hidden(NamedTempFile),
}

impl NewFile {
    fn create(path: &Path) -> Result<NewFile, ManageError> {
        if path.symlink_metadata().is_ok() {
            return Err(ManageError::Exists(path.into()));
        }
        let dir = directory(path);
        let failed = |source| ManageError::Create {
            path: path.into(),
            source,
        };
        let unnamed = OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o666)
            .custom_flags(OFlags::TMPFILE.bits() as i32)
            .open(dir);
        let kind = match unnamed {
            Ok(file) => Kind::Unnamed(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(failed(error)),
            Err(_) => {
                let hidden = tempfile::Builder::new()
                    .prefix(".lodger-")
                    .suffix(".part")
                    .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
                    .tempfile_in(dir);
                Kind::Hidden(hidden.map_err(failed)?)
            }
        };
        Ok(NewFile {
            path: path.into(),
            kind,
        })
    }

    fn file(&self) -> Result<File, ManageError> {
        let file = match &self.kind {
            Kind::Unnamed(file) => file,
            Kind::Hidden(file) => file.as_file(),
        };
        file.try_clone().map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> ManageError {
        ManageError::Write {
            path: self.path.clone(),
            source,
        }
    }

    /// Gives it its name once everything is on the disk.
    fn commit(self) -> Result<(), ManageError> {
        let file = self.file()?;
        file.sync_all().map_err(|source| self.failed(source))?;
        let path = self.path.clone();
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => ManageError::Exists(path.clone()),
            _ => ManageError::Write {
                path: path.clone(),
                source,
            },
        };
        match self.kind {
            Kind::Unnamed(file) => {
                let there = format!("/proc/self/fd/{}", file.as_raw_fd());
                linkat(CWD, there, CWD, &self.path, AtFlags::SYMLINK_FOLLOW)
                    .map_err(|e| failed(e.into()))?;
            }
            Kind::Hidden(file) => {
                file.persist_noclobber(&self.path)
                    .map_err(|e| failed(e.error))?;
            }
        }
        // Not every file system can.
        let _ = File::open(directory(&path)).and_then(|dir| dir.sync_all());
        Ok(())
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    }
}

fn check_size(path: &Path, size: u64) -> Result<(), ManageError> {
    let what = match size {
        0 => "a disk has at least 512 bytes".into(),
        _ if !size.is_multiple_of(SECTOR_SIZE) => {
            format!("a disk is some sectors of 512 bytes; {size} bytes are not")
        }
        _ if size > LARGEST => format!("a disk of {size} bytes is larger than any file"),
        _ => return Ok(()),
    };
    Err(ManageError::Size {
        path: path.into(),
        what,
    })
}

/// What a new image is to be.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Its format.
    pub format: Format,
    /// The size of the disk in bytes; that of the backing file if it is not said.
    pub size: Option<u64>,
    /// qcow2: the image that it continues, relative to its own place. Only what is written is in the new image.
    pub backing: Option<PathBuf>,
    /// The format of the backing file; its first bytes tell it otherwise.
    pub backing_format: Option<Format>,
}

/// Makes an empty disk, or one that continues another image; returns its size.
pub fn create(path: &Path, options: &CreateOptions) -> Result<u64, ManageError> {
    let wrong = |what: &str| ManageError::Size {
        path: path.into(),
        what: what.into(),
    };
    let mut backing = None;
    let mut size = options.size;
    if let Some(name) = &options.backing {
        if options.format != Format::Qcow2 {
            return Err(wrong("only a qcow2 image can have a backing file"));
        }
        let text =
            (name.to_str()).ok_or_else(|| wrong("the name of its backing file is not UTF-8"))?;
        let there = backing_path(path, text);
        let image = ImageFile::open(&there, true)?;
        let format = match options.backing_format {
            Some(format) => format,
            None => known_format(&there, &image)?,
        };
        // Its own backing files are there as well.
        let below = crate::open_image(&there, image, format, true)?;
        size = size.or(Some(below.size_bytes()));
        backing = Some(Backing {
            name: text.into(),
            format: Some(format.to_string()),
        });
    }
    let size = size.ok_or_else(|| wrong("say how large the disk is to be"))?;
    check_size(path, size)?;
    let new = NewFile::create(path)?;
    let file = new.file()?;
    let done = match options.format {
        Format::Raw => file.set_len(size),
        Format::Qcow2 => qcow2::create(file, size, CLUSTER, backing.as_ref()),
    };
    done.map_err(|source| new.failed(source))?;
    new.commit()?;
    Ok(size)
}

/// A conversion.
#[derive(Debug, Clone)]
pub struct Convert<'a> {
    /// The image to read.
    pub from: &'a Path,
    /// Its format; its first bytes tell it otherwise, and it may have no backing file then.
    pub from_format: Option<Format>,
    /// The image to make.
    pub to: &'a Path,
    /// Its format.
    pub format: Format,
}

/// Makes a new image with the contents of another one and of its backing files. Zeroes take no space in it. `progress` is
/// told the bytes done and their total, and ends the conversion by a break.
pub fn convert(
    job: &Convert,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<(), ManageError> {
    let from = crate::open(job.from, true, job.from_format)?;
    let size = from.size_bytes();
    let new = NewFile::create(job.to)?;
    let file = new.file()?;
    let to: Box<dyn BlockBackend> = match job.format {
        Format::Raw => {
            let raw = RawFile::unnamed(file, size).map_err(|source| new.failed(source))?;
            Box::new(raw)
        }
        Format::Qcow2 => {
            let own = file.try_clone().map_err(|source| new.failed(source))?;
            qcow2::create(own, size, CLUSTER, None).map_err(|source| new.failed(source))?;
            let len = file.metadata().map_err(|source| new.failed(source))?.len();
            let image = ImageFile {
                file: file.into(),
                read_only: false,
                len,
            };
            Box::new(Writer::open(job.to, image, true)?)
        }
    };
    copy(job.from, &*from, &*to, &new, progress)?;
    to.flush().map_err(|source| new.failed(source))?;
    drop(to);
    new.commit()
}

fn copy(
    path: &Path,
    from: &dyn BlockBackend,
    to: &dyn BlockBackend,
    new: &NewFile,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<(), ManageError> {
    let size = from.size_bytes();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < size {
        if progress(at, size).is_break() {
            return Err(ManageError::Interrupted);
        }
        let read = |at| {
            move |source| ManageError::Read {
                path: path.into(),
                at,
                source,
            }
        };
        let extent = from.extent(at).map_err(read(at))?;
        if extent.zero {
            at += extent.len.max(1).min(size - at);
            continue;
        }
        // From the start of a unit, so that a cluster is written once.
        at -= at % UNIT as u64;
        let n = (CHUNK as u64 - at % CHUNK as u64).min(size - at) as usize;
        let chunk = &mut buffer[..n];
        from.read_at(at, chunk).map_err(read(at))?;
        let mut start = 0;
        while start < n {
            let unit = |from: usize| (from + UNIT - from % UNIT).min(n);
            let is_zero = |range: &[u8]| range.iter().all(|&b| b == 0);
            let zero = is_zero(&chunk[start..unit(start)]);
            let mut end = unit(start);
            while end < n && is_zero(&chunk[end..unit(end)]) == zero {
                end = unit(end);
            }
            if !zero {
                to.write_at(at + start as u64, &chunk[start..end])
                    .map_err(|source| new.failed(source))?;
            }
            start = end;
        }
        at += n as u64;
    }
    Ok(())
}

/// Gives a disk a larger size; returns the old one. What is new reads as zeroes.
pub fn resize(
    path: &Path,
    format: Option<Format>,
    size: impl FnOnce(u64) -> u64,
) -> Result<(u64, u64), ManageError> {
    let image = ImageFile::open_even_empty(path, false)?;
    let format = match (format, image.len) {
        (Some(format), _) => format,
        (None, 0) => Format::Raw,
        (None, _) => known_format(path, &image)?,
    };
    let old = match format {
        Format::Raw => image.len,
        Format::Qcow2 => {
            Header::read(&image.file, image.len)
                .map_err(|what| OpenError::Damaged {
                    path: path.into(),
                    what,
                })?
                .size
        }
    };
    let size = size(old);
    check_size(path, size)?;
    if size < old {
        return Err(ManageError::Size {
            path: path.into(),
            what: format!(
                "it has {old} bytes, and a disk only grows: what is behind byte {size} would be lost"
            ),
        });
    }
    let is_device = image
        .file
        .metadata()
        .is_ok_and(|m| m.file_type().is_block_device());
    if is_device && format == Format::Raw {
        return Err(ManageError::Size {
            path: path.into(),
            what: "a block device has the size that it has".into(),
        });
    }
    if size > old {
        match format {
            Format::Raw => {
                let done = image
                    .file
                    .set_len(size)
                    .and_then(|()| image.file.sync_all());
                done.map_err(|source| OpenError::Host {
                    path: path.into(),
                    source,
                })?;
            }
            Format::Qcow2 => grow(path, image, size)?,
        }
    }
    Ok((old, size))
}

/// What an image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageInfo {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The size of the disk in bytes.
    pub size: u64,
    /// What it takes of the host's disk, in bytes.
    pub allocated: u64,
    /// What only qcow2 images have.
    pub qcow2: Option<Qcow2Info>,
}

/// See [`ImageInfo`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Qcow2Info {
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// How clusters are compressed, if some are.
    pub compression: &'static str,
    /// Snapshots in the image.
    pub snapshots: u32,
    /// It was not closed properly, or somebody found it damaged.
    pub needs_check: bool,
    /// The file that it continues, as it names it.
    pub backing: Option<String>,
    /// The format of that file, if it is named.
    pub backing_format: Option<String>,
    /// Where that file is.
    pub backing_path: Option<PathBuf>,
}

/// Describes the image at `path`, which may be in use; no other file is opened.
pub fn info(path: &Path, format: Option<Format>) -> Result<ImageInfo, OpenError> {
    let image = ImageFile::peek(path, true)?;
    let format = match (format, image.len) {
        (Some(format), _) => format,
        (None, 0) => Format::Raw,
        (None, _) => known_format(path, &image)?,
    };
    let allocated = image.file.metadata().map(|m| m.blocks() * 512);
    let allocated = allocated.map_err(|source| OpenError::Host {
        path: path.into(),
        source,
    })?;
    let mut info = ImageInfo {
        path: path.into(),
        format,
        size: image.len.next_multiple_of(SECTOR_SIZE),
        allocated,
        qcow2: None,
    };
    if format == Format::Qcow2 {
        let header = Header::read(&image.file, image.len).map_err(|what| OpenError::Damaged {
            path: path.into(),
            what,
        })?;
        info.size = header.size;
        let backing = header.backing.as_ref();
        info.qcow2 = Some(Qcow2Info {
            version: header.version,
            cluster_size: header.cluster(),
            compression: header.compression.name(),
            snapshots: header.snapshots,
            needs_check: header.state != 0,
            backing: backing.map(|b| b.name.clone()),
            backing_format: backing.and_then(|b| b.format.clone()),
            backing_path: backing.map(|b| backing_path(path, &b.name)),
        });
    }
    Ok(info)
}
