//! A tar stream as files, whoever made the stream: nothing is written outside of the directory that is named, and no symbolic
//! link below it is followed, those that were there before included.
//!
//! Limits: regular files, directories, symbolic and hard links; everything else in a stream is an error. Owners are those of who
//! unpacks.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{
    AtFlags, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, fchmod, futimens, linkat, mkdirat,
    open, openat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

/// How a stream is unpacked.
#[derive(Debug, Clone, Default)]
pub struct UnpackOptions {
    /// Only what has this name, or is below it, may be in the stream.
    pub only: Option<OsString>,
    /// Set-user-ID and the like are kept.
    pub keep_special: bool,
}

/// Puts what is in the stream into `dir`, over what is there. Returns how many bytes of files there were.
pub fn unpack(dir: &Path, from: impl Read, options: &UnpackOptions) -> io::Result<u64> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root =
        open(dir, flags, Mode::empty()).map_err(|error| named(dir, io::Error::from(error)))?;
    let mut unpacker = Unpacker {
        root,
        options,
        dirs: Vec::new(),
        bytes: 0,
    };
    let mut archive = Archive::new(from);
    for entry in archive.entries()? {
        unpacker.add(entry?)?;
    }
    // What is behind the end of the archive, so that the sender can finish.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    unpacker.finish()
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

struct Unpacker<'a> {
    root: OwnedFd,
    options: &'a UnpackOptions,
    /// Directories whose permissions and times are set at the end.
    dirs: Vec<(Vec<OsString>, Mode, Timestamps)>,
    bytes: u64,
}

fn times(mtime: u64) -> Timestamps {
    let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    Timestamps {
        last_access: time(0, UTIME_OMIT),
        last_modification: time(mtime.min(i64::MAX as u64) as i64, 0),
    }
}

/// The path as names below the root; an error if it leads out of it.
fn names(path: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(name) => names.push(name.into()),
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                let text = format!("{} leads out of the directory", path.display());
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
    }
    Ok(names)
}

const OPEN_DIR: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

impl Unpacker<'_> {
    fn add(&mut self, mut entry: Entry<impl Read>) -> io::Result<()> {
        let path = entry.path()?.into_owned();
        let names = names(&path)?;
        if let Some(only) = &self.options.only
            && names.first() != Some(only)
        {
            let text = format!("{} was not asked for", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        self.place(&mut entry, &names)
            .map_err(|error| named(&path, error))
    }

    fn place(&mut self, entry: &mut Entry<impl Read>, names: &[OsString]) -> io::Result<()> {
        let kept = match self.options.keep_special {
            true => 0o7777,
            false => 0o777,
        };
        let mode = Mode::from_raw_mode(entry.header().mode()? & kept);
        let times = times(entry.header().mtime()?);
        let Some((name, above)) = names.split_last() else {
            return match entry.header().entry_type() {
                // The root stays as it is.
                EntryType::Directory => Ok(()),
                _ => Err(unsupported("has no name")),
            };
        };
        let parent = self.enter(above)?;
        match entry.header().entry_type() {
            EntryType::Directory => {
                match mkdirat(&parent, name, Mode::RWXU) {
                    Ok(()) => {}
                    Err(Errno::EXIST) => drop(self.enter(names)?),
                    Err(error) => return Err(error.into()),
                }
                self.dirs.push((names.to_vec(), mode, times));
            }
            EntryType::Regular | EntryType::Continuous => {
                remove(&parent, name)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let file = openat(&parent, name, flags, Mode::RUSR | Mode::WUSR)?;
                let mut file = File::from(file);
                let size = entry.header().entry_size()?;
                let written = io::copy(entry, &mut file)?;
                if written < size {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.bytes += written;
                fchmod(&file, mode)?;
                futimens(&file, &times)?;
            }
            EntryType::Symlink => {
                let target = link_name(entry)?;
                remove(&parent, name)?;
                symlinkat(OsStr::from_bytes(&target), &parent, name)?;
                utimensat(&parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            EntryType::Link => {
                let target = link_name(entry)?;
                let target = self::names(Path::new(OsStr::from_bytes(&target)))?;
                let Some((other, above)) = target.split_last() else {
                    return Err(unsupported("is a link to nothing"));
                };
                let from = self.enter(above)?;
                remove(&parent, name)?;
                linkat(&from, other, &parent, name, AtFlags::empty())?;
            }
            _ => return Err(unsupported("is neither a file nor a directory nor a link")),
        }
        Ok(())
    }

    /// Opens a directory below the root; those that are missing are made.
    fn enter(&self, names: &[OsString]) -> io::Result<OwnedFd> {
        let mut dir = rustix::io::fcntl_dupfd_cloexec(&self.root, 0)?;
        for name in names {
            dir = match openat(&dir, name, OPEN_DIR, Mode::empty()) {
                Err(Errno::NOENT) => {
                    mkdirat(
                        &dir,
                        name,
                        Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH,
                    )?;
                    openat(&dir, name, OPEN_DIR, Mode::empty())?
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let text = format!("{} is there and is not a directory", name.display());
                    return Err(io::Error::new(io::ErrorKind::NotADirectory, text));
                }
                result => result?,
            };
        }
        Ok(dir)
    }

    /// Directories get their permissions when nothing is to be put into them any more.
    fn finish(self) -> io::Result<u64> {
        for (names, mode, times) in self.dirs.iter().rev() {
            let dir = self.enter(names)?;
            fchmod(&dir, *mode)?;
            futimens(&dir, times)?;
        }
        Ok(self.bytes)
    }
}

fn unsupported(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, what)
}

fn link_name(entry: &Entry<impl Read>) -> io::Result<Vec<u8>> {
    let name = entry.link_name_bytes();
    let name = name.ok_or_else(|| unsupported("is a link to nothing"))?;
    Ok(name.into_owned())
}

/// Makes place for a file; a directory stays.
fn remove(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
