//! Operations on the names in a directory.

use std::ffi::CString;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, Mode, RenameFlags};
use rustix::io::Errno;

use crate::wire::{Args, Reply};
use crate::{Answer, Answered, Share, VALID, stat_at};

/// The bits of a file's mode that a guest can set. Those that lend a user's rights are not for the host's users.
pub const FILE_MODE: u32 = 0o1777;
/// Those of a directory's mode.
pub const FOLDER_MODE: u32 = 0o3777;

pub fn text(name: &[u8]) -> Result<CString, Errno> {
    CString::new(name).map_err(|_| Errno::INVAL)
}

impl Share {
    /// Tells the guest of an entry of a directory.
    pub(crate) fn tell(
        &self,
        parent: u64,
        folder: &OwnedFd,
        name: &[u8],
        out: &mut Vec<u8>,
    ) -> Answered {
        let stat = stat_at(folder, &text(name)?, AtFlags::SYMLINK_NOFOLLOW)?;
        let id = self.nodes().enter(parent, name, &stat)?;
        self.attributes(stat).write_entry(id, VALID, out);
        Ok(Answer::Reply)
    }

    pub(crate) fn lookup(&self, parent: u64, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        let name = args.name()?;
        let folder = self.folder(parent)?;
        self.tell(parent, &folder, name, out)
    }

    pub(crate) fn read_link(&self, id: u64, out: &mut Vec<u8>) -> Answered {
        let (fd, kind) = self.place(id)?;
        if kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(&fd, c"", Vec::new())?;
        out.extend(target.as_bytes());
        Ok(Answer::Reply)
    }

    pub(crate) fn make_link(&self, parent: u64, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        let (name, target) = (args.name()?, args.text()?);
        let folder = self.folder(parent)?;
        // Whatever the target is: it is followed in the guest.
        rustix::fs::symlinkat(target, &folder, name)?;
        self.tell(parent, &folder, name, out)
    }

    pub(crate) fn make_node(&self, parent: u64, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        let (mode, _device, _umask, _) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let name = args.name()?;
        let kind = match FileType::from_raw_mode(mode) {
            // What nothing is said of.
            _ if mode & 0o170_000 == 0 => FileType::RegularFile,
            kind @ (FileType::RegularFile | FileType::Fifo | FileType::Socket) => kind,
            _ => return Err(Errno::PERM),
        };
        let folder = self.folder(parent)?;
        rustix::fs::mknodat(&folder, name, kind, Mode::from(mode & FILE_MODE), 0)?;
        self.tell(parent, &folder, name, out)
    }

    pub(crate) fn make_folder(&self, parent: u64, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        let (mode, _umask) = (args.u32()?, args.u32()?);
        let name = args.name()?;
        let folder = self.folder(parent)?;
        rustix::fs::mkdirat(&folder, name, Mode::from(mode & FOLDER_MODE))?;
        self.tell(parent, &folder, name, out)
    }

    pub(crate) fn remove(&self, parent: u64, args: &mut Args, flags: AtFlags) -> Answered {
        let name = args.name()?;
        rustix::fs::unlinkat(&self.folder(parent)?, name, flags)?;
        Ok(Answer::Reply)
    }

    pub(crate) fn rename(&self, from: u64, args: &mut Args, with_flags: bool) -> Answered {
        let to = args.u64()?;
        let flags = match with_flags {
            true => args.u64()? as u32,
            false => 0,
        };
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL);
        }
        let (old, new) = (args.name()?, args.name()?);
        let (old_folder, new_folder) = (self.folder(from)?, self.folder(to)?);
        match flags.is_empty() {
            // Not every file system takes flags, not even none.
            true => rustix::fs::renameat(&old_folder, old, &new_folder, new)?,
            false => rustix::fs::renameat_with(&old_folder, old, &new_folder, new, flags)?,
        }
        self.moved(to, &new_folder, new)?;
        if flags.contains(RenameFlags::EXCHANGE) {
            self.moved(from, &old_folder, old)?;
        }
        Ok(Answer::Reply)
    }

    /// Remembers a new name. If somebody has taken it away already, the guest looks it up again.
    fn moved(&self, parent: u64, folder: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
        match stat_at(folder, &text(name)?, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => self.nodes().moved(parent, name, &stat),
            Err(_) => Ok(()),
        }
    }

    pub(crate) fn link(&self, parent: u64, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        let (id, name) = (args.u64()?, args.name()?);
        let folder = self.folder(parent)?;
        let (fd, kind) = self.place(id)?;
        if kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        let (file, flags) = (self.descriptor(&fd), AtFlags::SYMLINK_FOLLOW);
        rustix::fs::linkat(&self.descriptors, file, &folder, name, flags)?;
        let answer = self.tell(parent, &folder, name, out)?;
        Ok(answer)
    }
}

/// `fuse_open_out`.
pub fn write_open(handle: u64, out: &mut Vec<u8>) {
    out.u64(handle);
    out.u64(0);
}
