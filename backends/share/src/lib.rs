//! A folder of the host, shared with a guest: a FUSE server over the host's system calls.
//!
//! The device passes each [`Message`] of the guest's kernel to [`Share::answer`]. Specification: Linux,
//! include/uapi/linux/fuse.h, from version 7.31 on; Virtual I/O Device (VIRTIO) Version 1.2, section 5.11.
//!
//! The guest is confined to the folder. Its messages name files by the number of a node and one name in it, never by a path:
//! a name has no `/` and is neither `.` nor `..`, and each step is one openat2(2) below an open directory that follows no link
//! (RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_MAGICLINKS). Symbolic links are followed by the guest, in its own tree.
//! So there is nothing to check first and use afterwards, whatever is renamed meanwhile. A directory that somebody on the host moves
//! out of the folder stays within reach while the guest knows it, as for any process that has it open. File systems that are
//! mounted below the folder belong to it.
//!
//! Everything is done as the user who runs the server. What is theirs belongs to one user of the guest (root, if nothing else is
//! said), everything else to nobody; changes of owners are refused. Set-user-id and set-group-id bits of files are neither set
//! nor device files made. New files get the umask of the server.
//!
//! Nothing is kept back: a write is the host's as soon as it is answered, fsync is the host's fsync. What the guest's kernel knows
//! of names and attributes it believes for a second.
//!
//! Limits: locks are those of the guest alone. O_APPEND writes to where the guest believes the end to be. Extended attributes are
//! those of `user.`. No DAX, no O_TMPFILE, no ioctls; watches (inotify) do not see what happens on the host.

mod attributes;
mod files;
mod folders;
mod names;
mod nodes;
mod wire;

use std::ffi::CStr;
use std::fmt::{Debug, Formatter};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use files::Handles;
use nodes::{Identity, Nodes};
use wire::{Args, Attributes, Header, IN_HEADER, MOST_DATA, OUT_HEADER, ROOT, Reply, init, op};

/// For how many seconds the guest may believe what it was told of names and attributes.
const VALID: u64 = 1;
/// File descriptors that this process makes use of at most.
const MOST_FILES: u64 = 1 << 16;
/// The most bytes of a request but WRITE: the longest extended attribute and its name.
const MOST_ARGUMENTS: u64 = (64 << 10) + 1024;
/// The user and the group that files of others belong to.
const NOBODY: u32 = 65534;

/// A request of the guest: bytes that it has given, and room for the reply.
pub trait Message {
    /// How many bytes it has given.
    fn given(&self) -> u64;
    /// How many bytes there is room for.
    fn room(&self) -> u64;
    /// Copies from the given bytes at `offset`; returns how many there were.
    fn take(&self, offset: u64, bytes: &mut [u8]) -> usize;
    /// Copies to `offset` of the room; returns how many there was room for.
    fn put(&self, offset: u64, bytes: &[u8]) -> usize;
    /// Fills `offset..offset + len` of the room from byte `from` of a file; returns how many bytes there were.
    fn read_file(&self, offset: u64, len: usize, file: BorrowedFd, from: u64) -> io::Result<usize>;
    /// Writes the given bytes `offset..offset + len` to byte `to` of a file; returns how many were written.
    fn write_file(&self, offset: u64, len: usize, file: BorrowedFd, to: u64) -> io::Result<usize>;
}

/// What is shared, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The folder.
    pub folder: PathBuf,
    /// The guest can change nothing.
    pub read_only: bool,
    /// The user and the group of the guest to whom belongs what belongs to the server's.
    pub owner: (u32, u32),
    /// The most file descriptors that it takes, at least 16.
    pub files: usize,
}

/// Why a folder cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It is not there, or must not be read.
    #[error("cannot share {}: {source}", folder.display())]
    Open {
        /// What was asked for.
        folder: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// It is something else.
    #[error("cannot share {}: it is not a folder; share the folder that it is in", .0.display())]
    NotAFolder(PathBuf),
}

/// A message that cannot even be refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It has no header.
    #[error("a request without a header")]
    NoHeader,
    /// There is no room for the header of the reply.
    #[error("a request without room for the reply")]
    NoRoom,
}

/// See the module documentation. Messages may be answered by several threads at once.
pub struct Share {
    // Fixed configuration.
    options: Options,
    root: Arc<OwnedFd>,
    root_device: (u32, u32),
    /// `/proc/self/fd`: the way to a file that is open as a place only.
    descriptors: OwnedFd,
    has_openat2: bool,
    user: (u32, u32),
    // Volatile state.
    nodes: Mutex<Nodes>,
    handles: Mutex<Handles>,
}

impl Debug for Share {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        f.debug_tuple("Share").field(&self.options).finish()
    }
}

/// What is sent back.
enum Answer {
    /// What was added to the reply.
    Reply,
    /// So many bytes that are in the message already.
    Data(usize),
    /// Nothing at all.
    Silence,
}

type Answered = Result<Answer, Errno>;

/// Lets this process have as many files open as the host allows it at most; how many that are.
pub fn raise_file_limit() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(MOST_FILES).min(MOST_FILES);
    let has = current.unwrap_or(u64::MAX);
    let raised = Rlimit {
        current: Some(wanted),
        maximum,
    };
    let limit = match wanted > has && setrlimit(Resource::Nofile, raised).is_ok() {
        true => wanted,
        false => has.min(MOST_FILES),
    };
    limit as usize
}

/// Whether a folder can be shared.
pub fn check(folder: &Path) -> Result<(), ShareError> {
    open_folder(folder).map(drop)
}

/// Opens the folder as a place. It must be readable, which would otherwise be found out much later.
fn open_folder(folder: &Path) -> Result<OwnedFd, ShareError> {
    let failed = |e: Errno| ShareError::Open {
        folder: folder.into(),
        source: e.into(),
    };
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags | OFlags::PATH, Mode::empty()) {
        Err(Errno::NOTDIR) if folder.exists() => Err(ShareError::NotAFolder(folder.into())),
        Err(e) => Err(failed(e)),
        Ok(fd) => {
            rustix::fs::openat(&fd, c".", flags, Mode::empty()).map_err(failed)?;
            Ok(fd)
        }
    }
}

impl Share {
    /// Shares a folder.
    pub fn open(options: Options) -> Result<Share, ShareError> {
        let failed = |e: Errno| ShareError::Open {
            folder: options.folder.clone(),
            source: e.into(),
        };
        let root = open_folder(&options.folder)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptors = rustix::fs::open(c"/proc/self/fd", flags, Mode::empty());
        let descriptors = descriptors.map_err(failed)?;
        let stat = stat_at(&root, c"", AtFlags::EMPTY_PATH).map_err(failed)?;
        // Kernels before 5.6, and sandboxes that do not know it. One name that is not followed leads no further without it.
        let has_openat2 = rustix::fs::openat2(&root, c".", flags, Mode::empty(), beneath()).is_ok();
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        let half = options.files.max(16) / 2;
        Ok(Share {
            root: Arc::new(root),
            root_device: Identity::of(&stat).device(),
            descriptors,
            has_openat2,
            user: (uid.as_raw(), gid.as_raw()),
            nodes: Mutex::new(Nodes::new(half)),
            handles: Mutex::new(Handles::new(half)),
            options,
        })
    }

    /// Forgets all that the guest knows and has open.
    pub fn reset(&self) {
        self.nodes().clear();
        self.handles().clear();
    }

    /// Does what a message asks for; how many bytes of its room are the reply. `buffer` is a place for it.
    pub fn answer(&self, message: &dyn Message, buffer: &mut Vec<u8>) -> Result<u32, Malformed> {
        let mut header = [0; IN_HEADER];
        if message.take(0, &mut header) < IN_HEADER {
            return Err(Malformed::NoHeader);
        }
        let header = Header::parse(&header);
        let silent = matches!(header.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT);
        if !silent && message.room() < OUT_HEADER as u64 {
            return Err(Malformed::NoRoom);
        }
        let given = message.given().min(header.len.into());
        let len = match header.opcode {
            op::WRITE => given.min((IN_HEADER + files::WRITE_IN) as u64),
            _ => given,
        };
        let mut out = std::mem::take(buffer);
        let done = match len.checked_sub(IN_HEADER as u64) {
            Some(len) if len <= MOST_ARGUMENTS => {
                let mut arguments = vec![0; len as usize];
                message.take(IN_HEADER as u64, &mut arguments);
                out.clear();
                out.zeroes(OUT_HEADER);
                self.execute(&header, Args(&arguments), message, &mut out)
            }
            _ => Err(Errno::INVAL),
        };
        if silent {
            *buffer = out;
            return Ok(0);
        }
        let (done, data) = match done {
            Ok(Answer::Data(n)) => (Ok(()), Some(n)),
            Ok(Answer::Reply | Answer::Silence) if out.len() as u64 > message.room() => {
                (Err(Errno::INVAL), None)
            }
            Ok(Answer::Reply | Answer::Silence) => (Ok(()), None),
            Err(e) => (Err(e), None),
        };
        if done.is_err() || data.is_some() {
            out.truncate(OUT_HEADER);
        }
        out.resize(out.len().max(OUT_HEADER), 0);
        let len = (out.len() + data.unwrap_or(0)) as u32;
        let error = done.err().map_or(0, |e| -e.raw_os_error());
        out[0..4].copy_from_slice(&len.to_le_bytes());
        out[4..8].copy_from_slice(&error.to_le_bytes());
        out[8..16].copy_from_slice(&header.unique.to_le_bytes());
        message.put(0, &out);
        *buffer = out;
        Ok(len)
    }

    fn execute(
        &self,
        header: &Header,
        mut args: Args,
        message: &dyn Message,
        out: &mut Vec<u8>,
    ) -> Answered {
        let node = header.node;
        if self.options.read_only && changes(header.opcode) {
            return Err(Errno::ROFS);
        }
        match header.opcode {
            op::INIT => self.init(&mut args, out),
            op::DESTROY => {
                self.reset();
                Ok(Answer::Reply)
            }
            op::INTERRUPT => Ok(Answer::Silence),
            op::FORGET => {
                self.nodes().forget(node, args.u64()?);
                Ok(Answer::Silence)
            }
            op::BATCH_FORGET => {
                let count = args.u64()? as u32;
                let mut nodes = self.nodes();
                for _ in 0..count {
                    nodes.forget(args.u64()?, args.u64()?);
                }
                Ok(Answer::Silence)
            }
            op::LOOKUP => self.lookup(node, &mut args, out),
            op::READLINK => self.read_link(node, out),
            op::SYMLINK => self.make_link(node, &mut args, out),
            op::MKNOD => self.make_node(node, &mut args, out),
            op::MKDIR => self.make_folder(node, &mut args, out),
            op::UNLINK => self.remove(node, &mut args, AtFlags::empty()),
            op::RMDIR => self.remove(node, &mut args, AtFlags::REMOVEDIR),
            op::RENAME => self.rename(node, &mut args, false),
            op::RENAME2 => self.rename(node, &mut args, true),
            op::LINK => self.link(node, &mut args, out),
            op::GETATTR => self.get_attributes(node, out),
            op::SETATTR => self.set_attributes(node, &mut args, out),
            op::STATFS => self.file_system(out),
            op::GETXATTR => self.get_extended(node, &mut args, out),
            op::LISTXATTR => self.list_extended(node, &mut args, out),
            op::SETXATTR => self.set_extended(node, &mut args),
            op::REMOVEXATTR => self.remove_extended(node, &mut args),
            op::OPEN => self.open_file(node, &mut args, out),
            op::CREATE => self.create(node, &mut args, out),
            op::READ => self.read(&mut args, message),
            op::WRITE => self.write(&mut args, message, out),
            op::RELEASE | op::RELEASEDIR => self.release(&mut args),
            op::FSYNC | op::FSYNCDIR => self.sync(&mut args),
            op::SYNCFS => {
                // Of a read-only folder there is nothing to be written.
                if !self.options.read_only {
                    rustix::fs::syncfs(&self.readable_root()?)?;
                }
                Ok(Answer::Reply)
            }
            op::LSEEK => self.seek(&mut args, out),
            op::FALLOCATE => self.allocate(&mut args),
            op::COPY_FILE_RANGE => self.copy_range(&mut args, out),
            op::OPENDIR => self.open_folder(node, out),
            op::READDIR => self.read_folder(&mut args, message.room(), false, out),
            op::READDIRPLUS => self.read_folder(&mut args, message.room(), true, out),
            _ => Err(Errno::NOSYS),
        }
    }

    fn init(&self, args: &mut Args, out: &mut Vec<u8>) -> Answered {
        use init::*;
        let (major, minor) = (args.u32()?, args.u32()?);
        let (readahead, offered) = match major {
            7 => (args.u32()?, args.u32()?),
            _ => (0, 0),
        };
        if major < 7 || major == 7 && minor < 31 {
            tracing::warn!("the guest speaks FUSE {major}.{minor}; 7.31 is needed");
            return Err(Errno::PROTO);
        }
        // A mount begins.
        self.reset();
        let wanted = ASYNC_READ
            | ATOMIC_O_TRUNC
            | BIG_WRITES
            | AUTO_INVAL_DATA
            | DO_READDIRPLUS
            | READDIRPLUS_AUTO
            | ASYNC_DIO
            | PARALLEL_DIROPS
            | MAX_PAGES
            | HANDLE_KILLPRIV_V2;
        out.u32(7);
        out.u32(minor.min(38));
        out.u32(readahead);
        out.u32(wanted & offered);
        // Requests in the background, and how many of them are a jam.
        out.u32(64 | 48 << 16);
        out.u32(MOST_DATA);
        // Times are exact to the nanosecond.
        out.u32(1);
        out.u32(MOST_DATA / 4096);
        out.zeroes(32);
        Ok(Answer::Reply)
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().expect("nothing panics under this lock")
    }

    fn handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().expect("nothing panics under this lock")
    }

    fn readable_root(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(&self.root, c".", flags, Mode::empty())
    }

    /// Opens an entry of a directory as a place, whatever it is; a link is not followed.
    fn place_at(&self, folder: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match self.has_openat2 {
            true => rustix::fs::openat2(folder, name, flags, Mode::empty(), beneath()),
            false => rustix::fs::openat(folder, name, flags, Mode::empty()),
        }
    }

    /// The directory of a node, as a place.
    fn folder(&self, id: u64) -> Result<Arc<OwnedFd>, Errno> {
        let (start, steps) = self.nodes().way(id)?;
        let mut fd = start.unwrap_or_else(|| Arc::clone(&self.root));
        for (id, name, identity) in steps.into_iter().rev() {
            let next = self.place_at(&fd, &name).map_err(stale)?;
            if Identity::of(&stat_at(&next, c"", AtFlags::EMPTY_PATH)?) != identity {
                return Err(Errno::STALE);
            }
            fd = Arc::new(next);
            self.nodes().keep(id, &fd);
        }
        Ok(fd)
    }

    /// The file of a node, as a place, and what it is. It may have lost its name if it is open.
    fn place(&self, id: u64) -> Result<(Arc<OwnedFd>, FileType), Errno> {
        if id == ROOT {
            return Ok((Arc::clone(&self.root), FileType::Directory));
        }
        let node = self.nodes().get(id)?.clone();
        if node.kind == FileType::Directory {
            return Ok((self.folder(id)?, node.kind));
        }
        let named = self.folder(node.parent).and_then(|folder| {
            let fd = self.place_at(&folder, &node.name).map_err(stale)?;
            let stat = stat_at(&fd, c"", AtFlags::EMPTY_PATH)?;
            match Identity::of(&stat) == node.identity {
                true => Ok(Arc::new(fd)),
                false => Err(Errno::STALE),
            }
        });
        match named {
            Err(Errno::STALE) => match self.handles().of(id) {
                Some(handle) => Ok((handle, node.kind)),
                None => Err(Errno::STALE),
            },
            named => Ok((named?, node.kind)),
        }
    }

    /// What a node is like now.
    fn stat(&self, id: u64) -> Result<Statx, Errno> {
        if id == ROOT {
            return stat_at(&self.root, c"", AtFlags::EMPTY_PATH);
        }
        let node = self.nodes().get(id)?.clone();
        let named = self.folder(node.parent).and_then(|folder| {
            let stat = stat_at(&folder, &node.name, AtFlags::SYMLINK_NOFOLLOW).map_err(stale)?;
            match Identity::of(&stat) == node.identity {
                true => Ok(stat),
                false => Err(Errno::STALE),
            }
        });
        match named {
            Err(Errno::STALE) => {
                let (fd, _) = self.place(id)?;
                stat_at(&fd, c"", AtFlags::EMPTY_PATH)
            }
            named => named,
        }
    }

    /// What a file is like, as the guest sees it.
    fn attributes(&self, stat: Statx) -> Attributes {
        let ((uid, gid), (user, group)) = (self.options.owner, self.user);
        let identity = Identity::of(&stat);
        // Other file systems below the folder have numbers of their own.
        let (major, minor) = identity.device();
        let other = match identity.device() == self.root_device {
            true => 0,
            false => (u64::from(major) << 20 ^ u64::from(minor) ^ 1 << 15) << 40,
        };
        Attributes {
            inode: stat.stx_ino ^ other,
            uid: if stat.stx_uid == user { uid } else { NOBODY },
            gid: if stat.stx_gid == group { gid } else { NOBODY },
            stat,
        }
    }

    /// The file of a place, for system calls that take no places: a name in `descriptors`.
    fn descriptor(&self, fd: &OwnedFd) -> String {
        fd.as_raw_fd().to_string()
    }

    /// Opens the file of a place.
    fn reopen(&self, fd: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        rustix::fs::openat(
            self.descriptors.as_fd(),
            self.descriptor(fd),
            flags,
            Mode::empty(),
        )
    }
}

/// How names are looked up.
fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

/// What is not there under its name is not the file that it was.
fn stale(e: Errno) -> Errno {
    match e {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Errno::STALE,
        e => e,
    }
}

fn stat_at(fd: &OwnedFd, name: &CStr, flags: AtFlags) -> Result<Statx, Errno> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    rustix::fs::statx(fd, name, flags, wanted)
}

/// Whether an operation changes the folder. OPEN is looked at by itself.
fn changes(opcode: u32) -> bool {
    matches!(
        opcode,
        op::SETATTR
            | op::SYMLINK
            | op::MKNOD
            | op::MKDIR
            | op::UNLINK
            | op::RMDIR
            | op::RENAME
            | op::RENAME2
            | op::LINK
            | op::WRITE
            | op::SETXATTR
            | op::REMOVEXATTR
            | op::CREATE
            | op::FALLOCATE
            | op::COPY_FILE_RANGE
    )
}
