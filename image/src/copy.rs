//! Copies of an image's disk, for a machine that keeps what it writes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::cache::Image;
use crate::error::{IoContext, Result};
use crate::progress::Progress;

/// Bytes that are copied at a time.
const PIECE: u64 = 1 << 20;

impl Image {
    /// Copies the image's disk to `path`, unless there is a file already. The copy appears all at once, shares its
    /// blocks with the image where the file system can do that, and has its holes.
    pub fn copy_disk(&self, path: &Path, progress: &mut dyn Progress) -> Result<()> {
        let Some(disk) = self.disk.as_deref().filter(|_| !path.exists()) else {
            return Ok(());
        };
        progress.step(&format!("copying the disk to {}", path.display()), None);
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let new = tempfile::Builder::new()
            .prefix(".lodger-")
            .tempfile_in(dir)
            .while_trying("create a file in", dir)?;
        let from = File::open(disk).while_trying("open", disk)?;
        copy(&from, new.as_file())
            .and_then(|()| new.as_file().sync_all())
            .while_trying("write", path)?;
        match new.persist_noclobber(path) {
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error.error).while_trying("create", path),
            Ok(_) => Ok(()),
        }
    }
}

fn copy(from: &File, to: &File) -> io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let len = from.metadata()?.len();
    to.set_len(len)?;
    let mut buffer = vec![0; PIECE as usize];
    let mut at = 0;
    while at < len {
        let (start, end) = match data(from, at, len)? {
            Some(range) => range,
            None => break,
        };
        at = start;
        while at < end {
            let piece = &mut buffer[..(end - at).min(PIECE) as usize];
            from.read_exact_at(piece, at)?;
            to.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
    }
    Ok(())
}

/// The first bytes from `at` on that are not a hole.
fn data(file: &File, at: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(start) => Ok(Some((start, seek(file, SeekFrom::Hole(start))?.min(len)))),
        Err(Errno::NXIO) => Ok(None),
        // The file system does not know of holes.
        Err(Errno::INVAL) => Ok(Some((at, len))),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn image(disk: &Path) -> Image {
        Image {
            disk: Some(disk.to_owned()),
            ..Image::default()
        }
    }

    #[test]
    fn a_copy_is_made_once_and_has_the_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, kept) = (dir.path().join("disk"), dir.path().join("kept"));
        let file = File::create(&disk).unwrap();
        for (offset, byte) in [(0, 1), (5 << 20, 2), ((64 << 20) - 1, 3)] {
            file.write_all_at(&[byte; 3000][..1], offset).unwrap();
        }
        let image = image(&disk);
        image.copy_disk(&kept, &mut ()).unwrap();
        assert!(std::fs::read(&kept).unwrap() == std::fs::read(&disk).unwrap());
        assert!(kept.metadata().unwrap().blocks() * 512 < 1 << 20);
        std::fs::write(&kept, b"mine").unwrap();
        image.copy_disk(&kept, &mut ()).unwrap();
        assert_eq!(std::fs::read(&kept).unwrap(), b"mine");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn place_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::fs::write(&disk, b"disk").unwrap();
        let kept = dir.path().join("nowhere/kept");
        let error = image(&disk).copy_disk(&kept, &mut ()).unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
    }
}
