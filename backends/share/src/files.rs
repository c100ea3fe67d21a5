//! Open files: OPEN, CREATE, READ, WRITE and what else takes a handle.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::names::{FILE_MODE, text, write_open};
use crate::wire::{Args, IN_HEADER, MOST_DATA, OUT_HEADER, Reply, WRITE_KILL_SUIDGID, fattr, open};
use crate::{Answer, Answered, Message, Share, VALID, stat_at};

/// Bytes of `fuse_write_in`.
pub const WRITE_IN: usize = 40;
/// The most bytes that one request copies from file to file.
const MOST_COPIED: u64 = 16 << 20;

/// What the guest has open.
pub struct Handle {
    pub node: u64,
    pub fd: Arc<OwnedFd>,
    pub folder: bool,
    /// Held while the entries of a folder are read.
    pub reading: Mutex<()>,
}

/// All that it has open, by number.
pub struct Handles {
    map: HashMap<u64, Arc<Handle>>,
    next: u64,
    most: usize,
}

impl Handles {
    pub fn new(most: usize) -> Handles {
        Handles {
            map: HashMap::new(),
            next: 1,
            most,
        }
    }

    fn is_full(&self) -> bool {
        self.map.len() >= self.most
    }

    fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.map.get(&number).cloned().ok_or(Errno::BADF)
    }

    /// A file that a node has open.
    pub fn of(&self, node: u64) -> Option<Arc<OwnedFd>> {
        let mut handles = self.map.values();
        handles
            .find(|handle| handle.node == node)
            .map(|handle| Arc::clone(&handle.fd))
    }

    pub fn clear(&mut self) {
        self.map.clear();
    }
}

impl Share {
    pub(crate) fn handle(&self, number: u64, folder: bool) -> Result<Arc<Handle>, Errno> {
        let handle = self.handles().get(number)?;
        match handle.folder == folder {
            true => Ok(handle),
            false => Err(Errno::BADF),
        }
    }

    /// Opens with `open`, if the guest may have one more file open; the handle's number.
    pub(crate) fn hold(
        &self,
        folder: bool,
        open: impl FnOnce() -> Result<(u64, OwnedFd), Errno>,
    ) -> Result<u64, Errno> {
        if self.handles().is_full() {
            return Err(Errno::NFILE);
        }
        let (node, fd) = open()?;
        let mut handles = self.handles();
        if handles.is_full() {
            return Err(Errno::NFILE);
        }
        let number = handles.next;
        handles.next += 1;
        let handle = Handle {
            node,
            fd: Arc::new(fd),
            folder,
            reading: Mutex::new(()),
        };
        handles.map.insert(number, Arc::new(handle));
        Ok(number)
    }

    /// What of a guest's flags is for the host. The guest's kernel says itself where an append goes.
    fn flags(&self, flags: u32) -> Result<OFlags, Errno> {
        let mut host = match flags & open::ACCMODE {
            0 => OFlags::RDONLY,
            open::WRONLY => OFlags::WRONLY,
            open::RDWR => OFlags::RDWR,
            _ => return Err(Errno::INVAL),
        };
        for (bits, flag) in [
            (open::TRUNC, OFlags::TRUNC),
            (open::SYNC, OFlags::SYNC),
            (open::DSYNC, OFlags::DSYNC),
        ] {
            if flags & bits == bits {
                host |= flag;
            }
        }
        if self.options.read_only && host != OFlags::RDONLY {
            return Err(Errno::ROFS);
        }
        Ok(host)
    }

    pub(crate) fn open_file(&self, id: u64, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        let flags = self.flags(args.u32()?)?;
        let number = self.hold(false, || {
            let (fd, kind) = self.place(id)?;
            match kind {
                FileType::RegularFile => Ok((id, self.reopen(&fd, flags)?)),
                FileType::Directory => Err(Errno::ISDIR),
                FileType::Symlink => Err(Errno::LOOP),
                // The guest's kernel opens what these are in the guest.
                _ => Err(Errno::NXIO),
            }
        })?;
        write_open(number, out);
        Ok(Answer::Reply)
    }

    pub(crate) fn create(&self, parent: u64, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        let (raw, mode, _umask, _) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let name = args.name()?;
        let flags = self.flags(raw)?;
        let folder = self.folder(parent)?;
        let mut entry = Vec::new();
        let number = self.hold(false, || {
            let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mode = Mode::from(mode & FILE_MODE);
            let fd = match rustix::fs::openat(&folder, name, flags | new, mode) {
                Err(Errno::EXIST) if raw & open::EXCL == 0 => {
                    let place = self.place_at(&folder, &text(name)?)?;
                    let stat = stat_at(&place, c"", AtFlags::EMPTY_PATH)?;
                    match FileType::from_raw_mode(stat.stx_mode.into()) {
                        FileType::RegularFile => self.reopen(&place, flags)?,
                        _ => return Err(Errno::EXIST),
                    }
                }
                opened => opened?,
            };
            let stat = stat_at(&fd, c"", AtFlags::EMPTY_PATH)?;
            let id = self.nodes().enter(parent, name, &stat)?;
            self.attributes(stat).write_entry(id, VALID, &mut entry);
            Ok((id, fd))
        })?;
        out.extend(entry);
        write_open(number, out);
        Ok(Answer::Reply)
    }

    pub(crate) fn read(&self, args: &mut Args, message: &dyn Message) -> Answered {
        let (handle, from, size) = (args.u64()?, args.u64()?, args.u32()?);
        let handle = self.handle(handle, false)?;
        let from = offset(from)?;
        let room = message.room().saturating_sub(OUT_HEADER as u64);
        let len = u64::from(size.min(MOST_DATA)).min(room) as usize;
        let fd = handle.fd.as_fd();
        let done = message.read_file(OUT_HEADER as u64, len, fd, from);
        done.map(Answer::Data).map_err(errno)
    }

    pub(crate) fn write(
        &self,
        args: &mut Args,
        message: &dyn Message,
        out: &mut Vec<u8>,
    ) -> Answered {
        let (handle, to, size) = (args.u64()?, args.u64()?, args.u32()?);
        let flags = args.u32()?;
        let handle = self.handle(handle, false)?;
        let to = offset(to)?;
        let behind = (IN_HEADER + WRITE_IN) as u64;
        let given = message.given().checked_sub(behind).ok_or(Errno::INVAL)?;
        if u64::from(size) > given || size > MOST_DATA {
            return Err(Errno::INVAL);
        }
        if flags & WRITE_KILL_SUIDGID != 0 {
            kill_bits(&handle.fd)?;
        }
        let fd = handle.fd.as_fd();
        let done = message.write_file(behind, size as usize, fd, to);
        out.u32(done.map_err(errno)? as u32);
        out.u32(0);
        Ok(Answer::Reply)
    }

    pub(crate) fn release(&self, args: &mut Args) -> Answered {
        let handle = args.u64()?;
        // Closed after the lock is given back.
        let closed = self.handles().map.remove(&handle);
        closed.map(|_| Answer::Reply).ok_or(Errno::BADF)
    }

    /// FSYNC and FSYNCDIR.
    pub(crate) fn sync(&self, args: &mut Args) -> Answered {
        let (handle, flags) = (args.u64()?, args.u32()?);
        let handle = self.handles().get(handle)?;
        match flags & 1 {
            0 => rustix::fs::fsync(&handle.fd)?,
            _ => rustix::fs::fdatasync(&handle.fd)?,
        }
        Ok(Answer::Reply)
    }

    pub(crate) fn seek(&self, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        const DATA: u32 = 3;
        const HOLE: u32 = 4;
        let (handle, from, whence) = (args.u64()?, args.u64()?, args.u32()?);
        let handle = self.handle(handle, false)?;
        let from = offset(from)?;
        let to = match whence {
            DATA => SeekFrom::Data(from),
            HOLE => SeekFrom::Hole(from),
            // The guest's kernel does the others.
            _ => return Err(Errno::INVAL),
        };
        // Where the descriptor itself stands does not matter: reads and writes say where.
        out.u64(rustix::fs::seek(&handle.fd, to)?);
        Ok(Answer::Reply)
    }

    pub(crate) fn allocate(&self, args: &mut Args) -> Answered {
        let (handle, from, len, mode) = (args.u64()?, args.u64()?, args.u64()?, args.u32()?);
        let handle = self.handle(handle, false)?;
        let known = FallocateFlags::KEEP_SIZE
            | FallocateFlags::PUNCH_HOLE
            | FallocateFlags::ZERO_RANGE
            | FallocateFlags::COLLAPSE_RANGE
            | FallocateFlags::INSERT_RANGE;
        let mode = FallocateFlags::from_bits(mode).filter(|mode| known.contains(*mode));
        let mode = mode.ok_or(Errno::OPNOTSUPP)?;
        rustix::fs::fallocate(&handle.fd, mode, offset(from)?, offset(len)?)?;
        Ok(Answer::Reply)
    }

    pub(crate) fn copy_range(&self, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        let (source, from, _node) = (args.u64()?, args.u64()?, args.u64()?);
        let (target, to) = (args.u64()?, args.u64()?);
        let (len, flags) = (args.u64()?, args.u64()?);
        if flags != 0 {
            return Err(Errno::INVAL);
        }
        let (source, target) = (self.handle(source, false)?, self.handle(target, false)?);
        let (mut from, mut to) = (offset(from)?, offset(to)?);
        let len = len.min(MOST_COPIED) as usize;
        let (source, target) = (&source.fd, &target.fd);
        let done =
            rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), len)?;
        out.u32(done as u32);
        out.u32(0);
        Ok(Answer::Reply)
    }

    /// The open file by which SETATTR changes the size, if it names one.
    pub(crate) fn given_handle(
        &self,
        valid: u32,
        handle: u64,
    ) -> Result<Option<Arc<Handle>>, Errno> {
        match valid & fattr::FH {
            0 => Ok(None),
            _ => self.handle(handle, false).map(Some),
        }
    }
}

/// Takes the set-user-id and the set-group-id bit from a file that is about to be written.
fn kill_bits(fd: &OwnedFd) -> Result<(), Errno> {
    let mode = u32::from(stat_at(fd, c"", AtFlags::EMPTY_PATH)?.stx_mode);
    match mode & 0o6000 {
        0 => Ok(()),
        _ => rustix::fs::fchmod(fd, Mode::from(mode & FILE_MODE)),
    }
}

/// A place in a file, as the host takes it.
fn offset(offset: u64) -> Result<u64, Errno> {
    i64::try_from(offset)
        .map(|_| offset)
        .map_err(|_| Errno::INVAL)
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
