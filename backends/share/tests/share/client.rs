//! A guest's kernel: makes requests, reads replies. The layouts are those of include/uapi/linux/fuse.h.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use lodger_share::{Malformed, Message, Options, Share};

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
    pub const CREATE: u32 = 35;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
}

/// A request in memory.
pub struct Buffer {
    pub given: Vec<u8>,
    pub room: RefCell<Vec<u8>>,
}

impl Message for Buffer {
    fn given(&self) -> u64 {
        self.given.len() as u64
    }

    fn room(&self) -> u64 {
        self.room.borrow().len() as u64
    }

    fn take(&self, offset: u64, bytes: &mut [u8]) -> usize {
        let given = self.given.get(offset as usize..).unwrap_or_default();
        let n = given.len().min(bytes.len());
        bytes[..n].copy_from_slice(&given[..n]);
        n
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> usize {
        let mut room = self.room.borrow_mut();
        let room = room.get_mut(offset as usize..).unwrap_or_default();
        let n = room.len().min(bytes.len());
        room[..n].copy_from_slice(&bytes[..n]);
        n
    }

    fn read_file(&self, offset: u64, len: usize, file: BorrowedFd, from: u64) -> io::Result<usize> {
        let mut bytes = vec![0; len];
        let file = file.try_clone_to_owned()?;
        let n = File::from(file).read_at(&mut bytes, from)?;
        Ok(self.put(offset, &bytes[..n]))
    }

    fn write_file(&self, offset: u64, len: usize, file: BorrowedFd, to: u64) -> io::Result<usize> {
        let mut bytes = vec![0; len];
        let n = self.take(offset, &mut bytes);
        let file = file.try_clone_to_owned()?;
        File::from(file).write_at(&bytes[..n], to)
    }
}

/// An error number as the guest gets it.
pub type Errno = i32;

pub struct Client(pub Share);

/// What is known of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    pub size: u64,
    pub mode: u32,
    pub links: u32,
    pub owner: (u32, u32),
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Words of 32 bits, then bytes.
pub fn words(words: &[u32], rest: &[&[u8]]) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    rest.iter().for_each(|r| bytes.extend(*r));
    bytes
}

/// Words of 64 bits.
pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|l| l.to_le_bytes()).collect()
}

/// A name and its NUL.
pub fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

pub fn attributes(bytes: &[u8]) -> Entry {
    Entry {
        node: 0,
        size: u64_at(bytes, 8),
        mode: u32_at(bytes, 60),
        links: u32_at(bytes, 64),
        owner: (u32_at(bytes, 68), u32_at(bytes, 72)),
    }
}

impl Client {
    pub fn new(folder: &Path) -> Client {
        Client::with(folder, false, 64)
    }

    pub fn with(folder: &Path, read_only: bool, files: usize) -> Client {
        let options = Options {
            folder: folder.into(),
            read_only,
            owner: (0, 0),
            files,
        };
        let client = Client(Share::open(options).unwrap());
        let hello = words(&[7, 38, 128 << 10, u32::MAX], &[&[0; 48]]);
        let answer = client.call(op::INIT, 0, &hello).unwrap();
        assert_eq!((u32_at(&answer, 0), answer.len()), (7, 64));
        client
    }

    /// Sends bytes as they are.
    pub fn raw(&self, given: Vec<u8>, room: usize) -> Result<Vec<u8>, Malformed> {
        let buffer = Buffer {
            given,
            room: RefCell::new(vec![0; room]),
        };
        let len = self.0.answer(&buffer, &mut Vec::new())?;
        let mut room = buffer.room.into_inner();
        assert!(len as usize <= room.len());
        room.truncate(len as usize);
        Ok(room)
    }

    /// Sends a request; what follows the header of the reply.
    pub fn call_with_room(
        &self,
        opcode: u32,
        node: u64,
        body: &[u8],
        room: usize,
    ) -> Result<Vec<u8>, Errno> {
        let mut given = words(&[40 + body.len() as u32, opcode], &[]);
        given.extend(longs(&[4711, node, 0, 0]));
        given.extend(body);
        let reply = self.raw(given, 16 + room).unwrap();
        assert_eq!(u32_at(&reply, 0) as usize, reply.len());
        assert_eq!(u64_at(&reply, 8), 4711);
        match u32_at(&reply, 4) as i32 {
            0 => Ok(reply[16..].to_vec()),
            error => {
                assert_eq!(reply.len(), 16, "nothing follows an error");
                Err(-error)
            }
        }
    }

    pub fn call(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        self.call_with_room(opcode, node, body, 70_000)
    }

    /// A request that has an entry as its answer.
    pub fn entry(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Entry, Errno> {
        let reply = self.call(opcode, node, body)?;
        Ok(Entry {
            node: u64_at(&reply, 0),
            ..attributes(&reply[40..])
        })
    }

    pub fn lookup(&self, node: u64, text: &str) -> Result<Entry, Errno> {
        self.entry(op::LOOKUP, node, &name(text))
    }

    /// The node at a path, step by step.
    pub fn walk(&self, path: &str) -> Result<Entry, Errno> {
        let mut entry = Err(0);
        let mut node = ROOT;
        for part in path.split('/') {
            entry = self.lookup(node, part);
            node = entry?.node;
        }
        entry
    }

    pub fn getattr(&self, node: u64) -> Result<Entry, Errno> {
        let reply = self.call(op::GETATTR, node, &[0; 16])?;
        Ok(attributes(&reply[16..]))
    }

    pub fn open(&self, node: u64, flags: u32) -> Result<u64, Errno> {
        let reply = self.call(op::OPEN, node, &words(&[flags, 0], &[]))?;
        Ok(u64_at(&reply, 0))
    }

    pub fn create(&self, node: u64, text: &str, flags: u32) -> Result<(Entry, u64), Errno> {
        let body = words(&[flags, 0o644, 0, 0], &[&name(text)]);
        let reply = self.call(op::CREATE, node, &body)?;
        let entry = Entry {
            node: u64_at(&reply, 0),
            ..attributes(&reply[40..])
        };
        Ok((entry, u64_at(&reply, 128)))
    }

    pub fn read(&self, handle: u64, from: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let body = [longs(&[handle, from]), words(&[size, 0, 0, 0, 0, 0], &[])].concat();
        self.call_with_room(op::READ, 0, &body, size as usize)
    }

    pub fn write(&self, handle: u64, to: u64, bytes: &[u8]) -> Result<u32, Errno> {
        let size = bytes.len() as u32;
        let body = [
            longs(&[handle, to]),
            words(&[size, 0, 0, 0, 0, 0], &[bytes]),
        ]
        .concat();
        Ok(u32_at(&self.call(op::WRITE, 0, &body)?, 0))
    }

    pub fn release(&self, opcode: u32, handle: u64) -> Result<(), Errno> {
        let body = longs(&[handle, 0, 0]);
        self.call(opcode, 0, &body).map(drop)
    }

    /// All names in a directory, by replies of `room` bytes.
    pub fn list(&self, node: u64, opcode: u32, room: usize) -> Result<Vec<String>, Errno> {
        let handle = u64_at(&self.call(op::OPENDIR, node, &[0; 8])?, 0);
        let mut names = Vec::new();
        let mut at = 0;
        loop {
            let body = [
                longs(&[handle, at]),
                words(&[room as u32, 0, 0, 0, 0, 0], &[]),
            ];
            let reply = self.call_with_room(opcode, node, &body.concat(), room)?;
            let mut rest = &reply[..];
            if rest.is_empty() {
                break;
            }
            while !rest.is_empty() {
                if opcode == op::READDIRPLUS {
                    rest = &rest[128..];
                }
                at = u64_at(rest, 8);
                let len = u32_at(rest, 16) as usize;
                names.push(String::from_utf8_lossy(&rest[24..24 + len]).into_owned());
                rest = &rest[24 + len.next_multiple_of(8)..];
            }
        }
        self.release(op::RELEASEDIR, handle)?;
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(names)
    }
}
