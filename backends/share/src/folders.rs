//! The entries of directories: OPENDIR, READDIR, READDIRPLUS.

use std::mem::MaybeUninit;

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use crate::names::write_open;
use crate::wire::{Args, DIRENT, ENTRY, OUT_HEADER, Reply, write_dirent};
use crate::{Answer, Answered, Share, VALID, stat_at};

/// The most bytes of a reply.
const MOST: usize = 128 << 10;
/// Bytes of entries that the host is asked for at a time.
const CHUNK: usize = 16 << 10;

impl Share {
    pub(crate) fn open_folder(&self, id: u64, out: &mut Vec<u8>) -> Answered {
        let number = self.hold(true, || {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let folder = self.folder(id)?;
            let fd = rustix::fs::openat(&folder, c".", flags, Mode::empty())?;
            Ok((id, fd))
        })?;
        write_open(number, out);
        Ok(Answer::Reply)
    }

    /// READDIR and, with the attributes of each entry, READDIRPLUS.
    pub(crate) fn read_folder(
        &self,
        args: &mut Args,
        room: u64,
        plus: bool,
        out: &mut Vec<u8>,
    ) -> Answered {
        let (handle, from, size) = (args.u64()?, args.u64()?, args.u32()?);
        let handle = self.handle(handle, true)?;
        let most = u64::from(size).min(room.saturating_sub(OUT_HEADER as u64));
        let end = OUT_HEADER + most.min(MOST as u64) as usize;
        let _reading = handle.reading.lock().expect("nothing panics under it");
        let from = i64::try_from(from).map_err(|_| Errno::INVAL)?;
        rustix::fs::seek(&handle.fd, SeekFrom::Start(from as u64))?;
        let mut place = [MaybeUninit::uninit(); CHUNK];
        let mut entries = RawDir::new(&handle.fd, &mut place);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let itself = name == b"." || name == b"..";
            let len = DIRENT + name.len().next_multiple_of(8) + if plus { ENTRY } else { 0 };
            if out.len() + len > end {
                break;
            }
            let mut kind = entry.file_type();
            let mut inode = entry.ino();
            if plus && itself {
                out.zeroes(ENTRY);
            } else if plus {
                let named = entry.file_name();
                let Ok(stat) = stat_at(&handle.fd, named, AtFlags::SYMLINK_NOFOLLOW) else {
                    // It has just been removed.
                    continue;
                };
                let attributes = self.attributes(stat);
                (kind, inode) = (attributes.kind(), attributes.inode);
                match self.nodes().enter(handle.node, name, &stat) {
                    Ok(id) => attributes.write_entry(id, VALID, out),
                    // The guest has to look it up.
                    Err(_) => out.zeroes(ENTRY),
                }
            }
            write_dirent(inode, entry.next_entry_cookie(), kind, name, out);
        }
        Ok(Answer::Reply)
    }
}
