//! What a VM has of its image in its own directory, so that a newer image takes neither disk nor kernel away.
//!
//! Names in a VM's spec that are not absolute are those of files in its directory, which may be renamed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use lodger_block::{CreateOptions, Format};
use lodger_board::MachineSpec;
use lodger_image::Image;
use lodger_virtio_devices::BlkSpec;
use rustix::fs::ioctl_ficlone;

use crate::images::Bar;
use crate::status::Error;

/// The root disk: a copy of the image's ...
const COPY: &str = "root.img";
/// ... or what has changed, over ...
const OVERLAY: &str = "root.qcow2";
/// ... the image's own, under a name of the VM's.
const BASE: &str = "base.img";

/// Leads to the sockets of the VM's guest.
pub const VSOCK: &str = "vsock.sock";

/// Whether the VM has a disk of its own, and so something to lose.
pub fn has_disk(dir: &Path) -> bool {
    dir.join(COPY).exists() || dir.join(OVERLAY).exists()
}

/// The root disk of the VM in `dir`, made the first time: a copy on write where the file system can do that, else a qcow2
/// image over the image's disk, else (the image is on another file system) a copy.
pub fn root_disk(image: &Image, dir: &Path, bar: &mut Bar) -> Result<Option<BlkSpec>, Error> {
    let Some(disk) = &image.disk else {
        return Ok(None);
    };
    if !has_disk(dir) && !clone(disk, &dir.join(COPY)) {
        if fs::hard_link(disk, dir.join(BASE)).is_ok() {
            let options = CreateOptions {
                format: Format::Qcow2,
                size: None,
                backing: Some(BASE.into()),
                backing_format: Some(Format::Raw),
            };
            lodger_block::create(&dir.join(OVERLAY), &options)?;
        } else {
            image.copy_disk(&dir.join(COPY), bar)?;
        }
    }
    let (name, format) = match dir.join(OVERLAY).exists() {
        true => (OVERLAY, Format::Qcow2),
        false => (COPY, Format::Raw),
    };
    Ok(Some(BlkSpec {
        format: Some(format),
        ..BlkSpec::new(name, false)
    }))
}

/// Makes `new` share the blocks of `file`; false: it cannot.
fn clone(file: &Path, new: &Path) -> bool {
    let cloned = || -> io::Result<()> {
        let from = File::open(file)?;
        ioctl_ficlone(File::create_new(new)?, from)?;
        Ok(())
    };
    let done = cloned().is_ok();
    if !done {
        // It may be there, empty.
        let _ = fs::remove_file(new);
    }
    done
}

/// Keeps a file of the image in `dir`, under a link or as a copy, unless there is one already; returns its name.
pub fn keep(file: &Path, dir: &Path) -> Result<PathBuf, Error> {
    let name = Path::new(file.file_name().unwrap_or(file.as_os_str()));
    let kept = dir.join(name);
    if !kept.exists() {
        let linked = fs::hard_link(file, &kept).or_else(|_| fs::copy(file, &kept).map(drop));
        linked.map_err(|error| Error::File {
            path: kept,
            what: error.to_string(),
        })?;
    }
    Ok(name.into())
}

/// Names the user's files so that they are found from anywhere.
pub fn make_absolute(spec: &mut MachineSpec) -> Result<(), Error> {
    for path in paths(spec) {
        *path = absolute(path)?;
    }
    Ok(())
}

/// The same for one name.
pub fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|error| Error::File {
        path: path.into(),
        what: error.to_string(),
    })
}

/// Finds the files of the VM in `dir`.
pub fn resolve(spec: &mut MachineSpec, dir: &Path) {
    for path in paths(spec) {
        *path = dir.join(&*path);
    }
}

/// All files of a spec.
fn paths(spec: &mut MachineSpec) -> impl Iterator<Item = &mut PathBuf> {
    let kernel = Some(&mut spec.boot.kernel).filter(|path| !path.as_os_str().is_empty());
    let disks = spec.virtio.disks.iter_mut().map(|disk| &mut disk.path);
    let vsock = spec.virtio.vsock.iter_mut().map(|vsock| &mut vsock.path);
    let folders = spec.virtio.shares.iter_mut().map(|share| &mut share.folder);
    (kernel.into_iter())
        .chain(&mut spec.boot.initrd)
        .chain(disks)
        .chain(vsock)
        .chain(folders)
}
