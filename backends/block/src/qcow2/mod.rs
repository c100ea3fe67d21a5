//! qcow2 images, versions 2 and 3. Specification: QEMU's docs/interop/qcow2.rst; section names below are from there.
//!
//! | file | what |
//! |---|---|
//! | `header.rs` | the header, and what of the format is refused |
//! | `reader.rs` | images that nobody changes: read-only disks, backing files, what is to be converted |
//! | `writer.rs` | images that are written, by the crate `imago` |
//! | `layer.rs` | files and backing images as that crate wants to have them |
//! | `check.rs` | whether the reference counts are those of the clusters in use, and putting them right |
//!
//! Why both a reader of our own and a crate: docs/decisions/qcow2.md.
//!
//! Limits: no encryption, no external data files, no subclusters; snapshots inside an image are kept and not shown; clusters
//! compressed with zstd are read, an image that has them is not written.

mod check;
mod header;
mod layer;
mod reader;
mod writer;

pub use check::{CheckReport, check};
pub(crate) use header::{Backing, Header};
pub(crate) use reader::Reader;
pub(crate) use writer::Writer;
pub(crate) use writer::{create, grow};

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::file::ImageFile;
use crate::{BlockBackend, Format, OpenError, RawFile};

/// The most images in a chain.
const LONGEST_CHAIN: usize = 16;

/// The most messages of a report.
const LONGEST_MESSAGES: usize = 20;

fn damaged(path: &Path, what: impl Into<String>) -> OpenError {
    OpenError::Damaged {
        path: path.into(),
        what: what.into(),
    }
}

/// Where a backing file is that the image at `path` names: relative to the image.
pub(crate) fn backing_path(path: &Path, name: &str) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).join(name)
}

/// Opens what the image at `path` continues, if `trusted`: with the format that it names, for reading only. `depth` images
/// have been opened before.
fn open_backing(
    path: &Path,
    header: &Header,
    trusted: bool,
    depth: usize,
) -> Result<Option<Arc<dyn BlockBackend>>, OpenError> {
    let Some(Backing { name, format }) = &header.backing else {
        return Ok(None);
    };
    if !trusted {
        return Err(OpenError::BackingNotTrusted {
            path: path.into(),
            backing: name.clone(),
        });
    }
    if depth >= LONGEST_CHAIN {
        let what = format!("more than {LONGEST_CHAIN} images, each the backing file of the next");
        return Err(damaged(path, what));
    }
    let format = format.as_deref().map(str::parse::<Format>);
    let format = match format {
        Some(Ok(format)) => format,
        Some(Err(error)) => return Err(damaged(path, format!("its backing file: {error}"))),
        None => {
            let what = format!(
                "it does not say which format its backing file {name} has; say it: qemu-img rebase -u -b {name} -F raw|qcow2 {}",
                path.display()
            );
            return Err(damaged(path, what));
        }
    };
    let there = backing_path(path, name);
    let failed = |source| OpenError::Backing {
        path: path.into(),
        source: Box::new(source),
    };
    let image = ImageFile::open(&there, true).map_err(failed)?;
    let backing: Arc<dyn BlockBackend> = match format {
        Format::Raw => Arc::new(RawFile::new(image, false)),
        Format::Qcow2 => Arc::new(Reader::open_at(&there, image, true, depth + 1).map_err(failed)?),
    };
    Ok(Some(backing))
}
