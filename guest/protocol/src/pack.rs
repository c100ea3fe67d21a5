//! Files as a tar stream (POSIX ustar with GNU's long names): regular files, directories and symbolic links with their permissions
//! and times.
//!
//! Limits: sockets, devices and named pipes are left out; a file with several names becomes several files; owners are not
//! kept, nor are extended attributes and holes.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use tar::{Builder, EntryType, Header};

/// What files of no size may have in them: those of /proc tell no size.
const UNTOLD: u64 = 16 << 20;

/// Writes the file or directory `path` to `to`, under the name `name`. With `follow` a symbolic link at `path` itself stands for
/// what it leads to. Returns how many bytes of files there were.
pub fn pack(path: &Path, name: &Path, follow: bool, to: impl Write) -> io::Result<u64> {
    let mut packer = Packer {
        builder: Builder::new(to),
        bytes: 0,
    };
    let found = match follow {
        true => fs::metadata(path),
        false => fs::symlink_metadata(path),
    };
    packer.add(path, name, &found.map_err(at(path))?, follow)?;
    packer.builder.into_inner()?.flush()?;
    Ok(packer.bytes)
}

/// Says at which file it happened.
fn at(path: &Path) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

struct Packer<W: Write> {
    builder: Builder<W>,
    bytes: u64,
}

impl<W: Write> Packer<W> {
    fn add(&mut self, path: &Path, name: &Path, found: &Metadata, follow: bool) -> io::Result<()> {
        let kind = found.file_type();
        let mut header = Header::new_gnu();
        header.set_mode(found.mode() & 0o7777);
        header.set_mtime(found.mtime().max(0) as u64);
        header.set_size(0);
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            self.builder.append_data(&mut header, name, io::empty())?;
            let entries = fs::read_dir(path).map_err(at(path))?;
            let entries: io::Result<Vec<_>> = entries.collect();
            let mut entries = entries.map_err(at(path))?;
            entries.sort_by_key(|entry| entry.file_name());
            for entry in entries {
                let inner = entry.path();
                match fs::symlink_metadata(&inner) {
                    Ok(found) => self.add(&inner, &name.join(entry.file_name()), &found, false)?,
                    // It has gone meanwhile.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(at(&inner)(error)),
                }
            }
        } else if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            let target = fs::read_link(path).map_err(at(path))?;
            self.builder.append_link(&mut header, name, target)?;
        } else if kind.is_file() {
            header.set_entry_type(EntryType::Regular);
            self.add_file(path, name, &mut header, follow)?;
        }
        Ok(())
    }

    /// As many bytes as the file has at the beginning, however it changes meanwhile.
    fn add_file(
        &mut self,
        path: &Path,
        name: &Path,
        header: &mut Header,
        follow: bool,
    ) -> io::Result<()> {
        let mut options = File::options();
        let no_follow = match follow {
            true => OFlags::empty(),
            false => OFlags::NOFOLLOW,
        };
        // Never waits, should a pipe be there by now.
        let flags = (no_follow | OFlags::NONBLOCK).bits() as i32;
        let mut file = (options.read(true).custom_flags(flags).open(path)).map_err(at(path))?;
        let size = file.metadata().map_err(at(path))?.len();
        if size == 0 {
            let mut contents = Vec::new();
            (&mut file)
                .take(UNTOLD)
                .read_to_end(&mut contents)
                .map_err(at(path))?;
            header.set_size(contents.len() as u64);
            self.bytes += contents.len() as u64;
            return self.builder.append_data(header, name, &contents[..]);
        }
        header.set_size(size);
        self.bytes += size;
        let contents = file.chain(io::repeat(0)).take(size);
        self.builder.append_data(header, name, contents)
    }
}
