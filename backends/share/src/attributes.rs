//! Attributes of files, extended ones, and those of the whole file system.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags,
};
use rustix::io::Errno;

use crate::names::{FILE_MODE, FOLDER_MODE};
use crate::wire::{Args, MOST_NAME, Reply, fattr};
use crate::{Answer, Answered, Share, VALID};

/// The most bytes of an extended attribute, and of a list of their names.
const MOST_EXTENDED: usize = 64 << 10;
/// How the names begin of those that a guest has to do with.
const USER: &[u8] = b"user.";

impl Share {
    pub(crate) fn get_attributes(&self, id: u64, out: &mut Vec<u8>) -> Answered {
        let stat = self.stat(id)?;
        self.attributes(stat).write_attr(VALID, out);
        Ok(Answer::Reply)
    }

    pub(crate) fn set_attributes(&self, id: u64, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        let (valid, _) = (args.u32()?, args.u32()?);
        let (handle, size, _lock_owner) = (args.u64()?, args.u64()?, args.u64()?);
        let (atime, mtime, _ctime) = (args.u64()?, args.u64()?, args.u64()?);
        let (atime_ns, mtime_ns, _ctime_ns) = (args.u32()?, args.u32()?, args.u32()?);
        let (mode, _, uid, gid) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let has = |bit| valid & bit != 0;
        if has(fattr::UID | fattr::GID) {
            let now = self.attributes(self.stat(id)?);
            if has(fattr::UID) && uid != now.uid || has(fattr::GID) && gid != now.gid {
                return Err(Errno::PERM);
            }
        }
        let (fd, kind) = self.place(id)?;
        let file = self.descriptor(&fd);
        if has(fattr::MODE) {
            let bits = match kind {
                FileType::Directory => FOLDER_MODE,
                FileType::Symlink => return Err(Errno::OPNOTSUPP),
                _ => FILE_MODE,
            };
            let mode = Mode::from(mode & bits);
            rustix::fs::chmodat(&self.descriptors, file.as_str(), mode, AtFlags::empty())?;
        }
        if has(fattr::SIZE) {
            if kind != FileType::RegularFile || i64::try_from(size).is_err() {
                return Err(Errno::INVAL);
            }
            match self.given_handle(valid, handle)? {
                Some(handle) => rustix::fs::ftruncate(&handle.fd, size)?,
                None => rustix::fs::ftruncate(self.reopen(&fd, OFlags::WRONLY)?, size)?,
            }
        }
        if has(fattr::ATIME | fattr::MTIME) {
            let times = Timestamps {
                last_access: time(has(fattr::ATIME), has(fattr::ATIME_NOW), atime, atime_ns)?,
                last_modification: time(has(fattr::MTIME), has(fattr::MTIME_NOW), mtime, mtime_ns)?,
            };
            // The descriptor of a link leads to the link itself.
            rustix::fs::utimensat(&self.descriptors, file.as_str(), &times, AtFlags::empty())?;
        }
        self.get_attributes(id, out)
    }

    pub(crate) fn file_system(&self, out: &mut Vec<u8>) -> Answered {
        let s = rustix::fs::fstatvfs(&self.root)?;
        for value in [s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree] {
            out.u64(value);
        }
        for value in [s.f_bsize, s.f_namemax, s.f_frsize] {
            out.u32(value as u32);
        }
        out.zeroes(28);
        Ok(Answer::Reply)
    }

    /// A path to the file of a node, if it can have extended attributes; it is valid as long as the descriptor is open.
    fn extended(&self, id: u64) -> Result<(Arc<OwnedFd>, String), Errno> {
        let (fd, kind) = self.place(id)?;
        if !matches!(kind, FileType::RegularFile | FileType::Directory) {
            return Err(Errno::OPNOTSUPP);
        }
        let path = format!("/proc/self/fd/{}", self.descriptor(&fd));
        Ok((fd, path))
    }

    pub(crate) fn get_extended(&self, id: u64, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        let (size, _) = (args.u32()?, args.u32()?);
        let name = user_name(args)?;
        let (_fd, path) = self.extended(id)?;
        let mut value = vec![0; MOST_EXTENDED];
        let len = rustix::fs::getxattr(path, name, &mut value[..])?;
        sized(size, &value[..len], out)
    }

    pub(crate) fn list_extended(&self, id: u64, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        let (size, _) = (args.u32()?, args.u32()?);
        let (_fd, path) = self.extended(id)?;
        let mut list = vec![0; MOST_EXTENDED];
        let len = rustix::fs::listxattr(path, &mut list[..])?;
        let names = list[..len].split_inclusive(|&b| b == 0);
        let names: Vec<u8> = (names.filter(|name| name.starts_with(USER)))
            .flatten()
            .copied()
            .collect();
        sized(size, &names, out)
    }

    pub(crate) fn set_extended(&self, id: u64, args: &mut Args) -> Answered {
        let (size, flags) = (args.u32()?, args.u32()?);
        let name = user_name(args)?;
        let value = args.bytes(size as usize)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let (_fd, path) = self.extended(id)?;
        rustix::fs::setxattr(path, name, value, flags)?;
        Ok(Answer::Reply)
    }

    pub(crate) fn remove_extended(&self, id: u64, args: &mut Args) -> Answered {
        let name = user_name(args)?;
        let (_fd, path) = self.extended(id)?;
        rustix::fs::removexattr(path, name)?;
        Ok(Answer::Reply)
    }
}

/// The name of an extended attribute. The other kinds mean something to the host.
fn user_name<'a>(args: &mut Args<'a>) -> Result<&'a [u8], Errno> {
    match args.text()? {
        name if name.len() > MOST_NAME => Err(Errno::RANGE),
        name if name.starts_with(USER) => Ok(name),
        _ => Err(Errno::OPNOTSUPP),
    }
}

/// The answer to a request for so many bytes; 0: how many there are.
fn sized(size: u32, value: &[u8], out: &mut Vec<u8>) -> Answered {
    match size as usize {
        0 => {
            out.u32(value.len() as u32);
            out.u32(0);
        }
        size if size < value.len() => return Err(Errno::RANGE),
        _ => out.extend(value),
    }
    Ok(Answer::Reply)
}

fn time(set: bool, now: bool, seconds: u64, nanoseconds: u32) -> Result<Timespec, Errno> {
    let tv_nsec = match (set, now) {
        (false, _) => UTIME_OMIT,
        (true, true) => UTIME_NOW,
        (true, false) if nanoseconds < 1_000_000_000 => nanoseconds.into(),
        _ => return Err(Errno::INVAL),
    };
    Ok(Timespec {
        tv_sec: seconds as i64,
        tv_nsec,
    })
}
