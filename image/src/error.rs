//! What can go wrong with images. Each message names the thing, the place and
//! the way out, so that a caller can print it as it is.

use std::io;
use std::path::{Path, PathBuf};

/// Bytes that a build takes in the cache for a while, about.
pub const BUILD_SPACE: u64 = 200_000_000;

/// The result of work on images.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No image of that name can be built.
    #[error(
        "there is no image '{name}'; known images: {known}. \
         `lodger image pull` fetches others from a registry. To boot files of your own, pass --kernel FILE and --initrd FILE"
    )]
    UnknownImage {
        /// The name that was asked for.
        name: String,
        /// All names that would do, comma separated.
        known: String,
    },

    /// A name that no registry could have.
    #[error(
        "'{name}' does not name an image of a registry: {problem}; names are like nginx, debian:12 or ghcr.io/user/name:tag"
    )]
    Reference {
        /// What was asked for.
        name: String,
        /// What is wrong with it.
        problem: String,
    },

    /// An image cannot be had from its registry.
    #[error("cannot pull {reference}: {problem}")]
    Pull {
        /// The full name of the image.
        reference: String,
        /// Why not.
        problem: String,
    },

    /// A disk image cannot be booted.
    #[error(
        "cannot import {}: {problem}. Pass --kernel FILE and --initrd FILE (and --append with root=...) to boot it with those",
        file.display()
    )]
    Import {
        /// The disk image.
        file: PathBuf,
        /// Why not.
        problem: String,
    },

    /// Neither environment variable says where the cache is.
    #[error("no place for the image cache: set HOME or XDG_CACHE_HOME to a directory")]
    NoCacheDir,

    /// The cache cannot be written to.
    #[error(
        "cannot write to the image cache {}: {source}. \
         Set XDG_CACHE_HOME to a directory that you may write to", dir.display()
    )]
    CacheDir {
        /// Where the cache was to be.
        dir: PathBuf,
        /// The host's answer.
        source: io::Error,
    },

    /// The host refused a file operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },

    /// An image in the cache is not what was built.
    #[error(
        "image '{name}' in {} is damaged: {reason}. {again}", dir.display()
    )]
    Damaged {
        /// The image.
        name: String,
        /// Its directory.
        dir: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do, as a sentence without its full stop.
        again: String,
    },

    /// The host has no apt.
    #[error(
        "building an image needs {program}, which this host does not have \
         (images are built from Debian packages). \
         On another distribution, pass --kernel FILE and --initrd FILE"
    )]
    NoApt {
        /// The program that is missing.
        program: &'static str,
    },

    /// Neither the host's package lists nor fresh ones have the package, and
    /// fetching fresh ones failed.
    #[error(
        "apt has no package '{package}' in its lists, and fresh lists could not be fetched \
         into {}: {detail}. Check the network and the proxy settings of apt, \
         or run 'sudo apt-get update', and try again", dir.display()
    )]
    NoLists {
        /// The package that was looked for.
        package: String,
        /// Where the fresh lists were to go.
        dir: PathBuf,
        /// What apt said.
        detail: String,
    },

    /// The package sources of the host do not offer the package.
    #[error(
        "the package sources of this host have no package '{package}' \
         (see 'apt-get indextargets' for what they are). \
         Add the main Debian archive to them, or pass --kernel FILE and --initrd FILE"
    )]
    NoPackage {
        /// The package that was looked for.
        package: String,
    },

    /// None of the host's package sources is Debian's archive.
    #[error(
        "this image is made from Debian's archive, which is not among the package sources of this host \
         ('apt-get indextargets' lists them){}. Add it to them, or check the network",
        but(detail)
    )]
    NoArchive {
        /// What apt said when it fetched package lists, if anything.
        detail: String,
    },

    /// Debian's archive, as the host's sources have it, has no such suite.
    #[error("there is no suite '{suite}' at the host's source of Debian's archive: {detail}")]
    UnknownSuite {
        /// The suite.
        suite: String,
        /// What apt said.
        detail: String,
    },

    /// An option of a build cannot be met.
    #[error("image '{image}': {problem}")]
    Option {
        /// The image.
        image: String,
        /// What is wrong, and what would be right.
        problem: String,
    },

    /// The files of the image are more than its disk can hold.
    #[error(
        "the files of image '{image}' do not fit on a disk of {} MB. Build it with a larger one: \
         lodger image {command} --size SIZE", size / 1_000_000
    )]
    DiskTooSmall {
        /// The image.
        image: String,
        /// Bytes of the disk.
        size: u64,
        /// What makes the image, behind `lodger image`.
        command: String,
    },

    /// The machine that installs the packages did not do it.
    #[error("the packages could not be set up in a virtual machine: {detail}")]
    Setup {
        /// What it said last.
        detail: String,
    },

    /// A package could not be fetched.
    #[error(
        "cannot download package '{package}' into {}: {detail}. \
         Check the network and the proxy settings of apt, and try again: \
         what has arrived is kept", dir.display()
    )]
    Download {
        /// The package.
        package: String,
        /// The directory it was to go to.
        dir: PathBuf,
        /// What apt said.
        detail: String,
    },

    /// The disk is full, or the user's share of it.
    #[error(
        "no space is left in {} for {what}. Free some, or set XDG_CACHE_HOME to a directory on another disk",
        dir.display()
    )]
    NoSpace {
        /// The cache.
        dir: PathBuf,
        /// What does not fit.
        what: String,
    },

    /// A tool failed, or answered what cannot be understood.
    #[error("'{command}' failed: {detail}")]
    Tool {
        /// The command, as one would type it.
        command: String,
        /// What it said.
        detail: String,
    },

    /// A package does not hold what an image needs.
    #[error(
        "package {package} is not as expected: {reason}. \
         Pass --kernel FILE and --initrd FILE to do without it"
    )]
    Package {
        /// The package and its version.
        package: String,
        /// What is missing or wrong.
        reason: String,
    },
}

impl Error {
    /// Says it plainly if this comes from a full disk, with `dir` as the cache's place, and what was to be there.
    pub(crate) fn or_no_space(self, dir: &Path, what: &str) -> Error {
        let full = match &self {
            Error::Io { source, .. } | Error::CacheDir { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ),
            Error::Tool { detail, .. } | Error::Download { detail, .. } => says_full(detail),
            _ => false,
        };
        match full {
            true => Error::NoSpace {
                dir: dir.to_owned(),
                what: what.to_owned(),
            },
            false => self,
        }
    }
}

/// The detail as a clause, if there is one.
fn but(detail: &str) -> String {
    match detail {
        "" => String::new(),
        detail => format!(": {detail}"),
    }
}

/// Whether a tool's message is that the disk is full (ENOSPC, EDQUOT).
pub(crate) fn says_full(text: &str) -> bool {
    ["No space left on device", "Disk quota exceeded"]
        .iter()
        .any(|phrase| text.contains(phrase))
}

/// Adds to an [`io::Error`] what was tried, and on which file.
pub(crate) trait IoContext<T> {
    fn while_trying(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn while_trying(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|error| Error::Io {
            action,
            path: path.to_owned(),
            source: error.into(),
        })
    }
}
