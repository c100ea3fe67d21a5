//! The bytes of FUSE requests and replies, version 7.31 and later.
//!
//! Specification: Linux, include/uapi/linux/fuse.h (its names are used here); little-endian, as on every guest there is.

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

/// Bytes of a request's header.
pub const IN_HEADER: usize = 40;
/// Bytes of a reply's header.
pub const OUT_HEADER: usize = 16;
/// The most bytes in a READ or a WRITE.
pub const MOST_DATA: u32 = 1 << 20;
/// Bytes of `fuse_entry_out`.
pub const ENTRY: usize = 128;
/// Bytes of `fuse_dirent` without the name.
pub const DIRENT: usize = 24;
/// The longest name.
pub const MOST_NAME: usize = 255;
/// The node that is the shared folder itself.
pub const ROOT: u64 = 1;

/// Operations.
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
}

/// Flags of INIT.
pub mod init {
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
}

/// What SETATTR sets.
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// Flags of an OPEN, as Linux has them on x86.
pub mod open {
    pub const ACCMODE: u32 = 3;
    pub const WRONLY: u32 = 1;
    pub const RDWR: u32 = 2;
    pub const EXCL: u32 = 0o200;
    pub const TRUNC: u32 = 0o1000;
    pub const DSYNC: u32 = 0o10000;
    pub const SYNC: u32 = 0o4010000;
}

/// The write is by a process that must not keep set-user-id bits.
pub const WRITE_KILL_SUIDGID: u32 = 4;

/// The header of a request.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
}

impl Header {
    pub fn parse(bytes: &[u8; IN_HEADER]) -> Header {
        let mut args = Args(bytes);
        // All are there.
        let mut word = || args.u32().unwrap_or(0);
        let (len, opcode) = (word(), word());
        let mut long = || args.u64().unwrap_or(0);
        Header {
            len,
            opcode,
            unique: long(),
            node: long(),
        }
    }
}

/// What follows the header, as it is consumed. What is missing is an invalid argument.
pub struct Args<'a>(pub &'a [u8]);

impl<'a> Args<'a> {
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], Errno> {
        let (first, rest) = self.0.split_at_checked(n).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(first)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        self.bytes(N)?.try_into().map_err(|_| Errno::INVAL)
    }

    pub fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_le_bytes)
    }

    /// Text up to a NUL.
    pub fn text(&mut self) -> Result<&'a [u8], Errno> {
        let len = self.0.iter().position(|&b| b == 0).ok_or(Errno::INVAL)?;
        let text = self.bytes(len)?;
        self.bytes(1)?;
        Ok(text)
    }

    /// The name of an entry of a directory: never a path, never the directory itself or the one above it.
    pub fn name(&mut self) -> Result<&'a [u8], Errno> {
        match self.text()? {
            b"" | b"." | b".." => Err(Errno::INVAL),
            name if name.contains(&b'/') => Err(Errno::INVAL),
            name if name.len() > MOST_NAME => Err(Errno::NAMETOOLONG),
            name => Ok(name),
        }
    }
}

/// A reply as it is made.
pub trait Reply {
    fn u32(&mut self, value: u32);
    fn u64(&mut self, value: u64);
    fn zeroes(&mut self, n: usize);
}

impl Reply for Vec<u8> {
    fn u32(&mut self, value: u32) {
        self.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.extend(value.to_le_bytes());
    }

    fn zeroes(&mut self, n: usize) {
        self.resize(self.len() + n, 0);
    }
}

/// Attributes as the guest sees them.
#[derive(Debug, Clone, Copy)]
pub struct Attributes {
    pub stat: Statx,
    pub inode: u64,
    pub uid: u32,
    pub gid: u32,
}

impl Attributes {
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.stx_mode.into())
    }

    /// `fuse_attr`.
    fn write(&self, out: &mut Vec<u8>) {
        let s = &self.stat;
        for value in [self.inode, s.stx_size, s.stx_blocks] {
            out.u64(value);
        }
        let times = [s.stx_atime, s.stx_mtime, s.stx_ctime];
        for time in times {
            out.u64(time.tv_sec as u64);
        }
        for time in times {
            out.u32(time.tv_nsec);
        }
        // The number of a device means nothing in the guest.
        for value in [s.stx_mode.into(), s.stx_nlink, self.uid, self.gid, 0] {
            out.u32(value);
        }
        out.u32(s.stx_blksize);
        out.u32(0);
    }

    /// `fuse_attr_out`, valid for so many seconds.
    pub fn write_attr(&self, valid: u64, out: &mut Vec<u8>) {
        out.u64(valid);
        out.u64(0);
        self.write(out);
    }

    /// `fuse_entry_out`, valid for so many seconds.
    pub fn write_entry(&self, node: u64, valid: u64, out: &mut Vec<u8>) {
        // Numbers of nodes are not used again, so that they need no generations.
        for value in [node, 0, valid, valid, 0] {
            out.u64(value);
        }
        self.write(out);
    }
}

/// `fuse_dirent`.
pub fn write_dirent(inode: u64, next: u64, kind: FileType, name: &[u8], out: &mut Vec<u8>) {
    out.u64(inode);
    out.u64(next);
    out.u32(name.len() as u32);
    out.u32(kind.as_raw_mode() >> 12);
    out.extend(name);
    out.zeroes(name.len().next_multiple_of(8) - name.len());
}
