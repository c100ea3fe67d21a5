//! Guest images, built from the host distribution's own packages.
//!
//! A [`Cache`] holds the images of one user, by default in `~/.cache/lodger`.
//! An [`Image`] is what a machine boots: a kernel, an initial RAM disk and a
//! command line. [`Cache::build`] makes one as an ordinary user: the host's own
//! apt finds, fetches and authenticates the packages, this crate unpacks them
//! and writes the initial RAM disk.
//!
//! | file           | what lives there                                          |
//! |----------------|-----------------------------------------------------------|
//! | `cache.rs`     | the directory: look up, verify, build atomically, remove  |
//! | `manifest.rs`  | `image.json`: what an image is made of, and its checksums |
//! | `mini.rs`      | the recipe of the one image there is so far               |
//! | `init.sh`      | what runs as PID 1 in it                                  |
//! | `apt.rs`       | package lists and downloads, through the host's apt       |
//! | `modules.rs`   | kernel modules: find them, and all that they depend on    |
//! | `cpio.rs`      | the archive format that the kernel unpacks at boot        |
//!
//! Limits: amd64 guests on Debian and its derivatives. Images by other means
//! (an OCI registry, a disk image) are not here yet.

mod apt;
mod archive;
mod cache;
mod cpio;
mod deb;
mod debian;
mod dpkg;
mod error;
mod ext4;
mod guest;
mod kernel;
mod manifest;
mod mini;
mod modules;
mod progress;
mod settings;
mod sources;
mod tool;
mod tree;

pub use apt::PackageTools;
pub use cache::{BuildOptions, Cache, DEFAULT_IMAGE, Image, ImageInfo, ImageState};
pub use error::{BUILD_SPACE, Error, Result};
pub use guest::{Guest, GuestJob};
pub use progress::Progress;
