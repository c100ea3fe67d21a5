//! Guest images: built from the host distribution's own packages, from a registry, or from disk images of others.
//!
//! A [`Cache`] holds the images of one user, by default in `~/.cache/lodger`.
//! An [`Image`] is what a machine boots: a kernel, an initial RAM disk, a
//! command line, and perhaps a root disk. [`Cache::build`] makes one as an ordinary
//! user: the host's own apt finds, fetches and authenticates the packages, this crate
//! unpacks them and writes the disks, and a [`Guest`] of the caller's does what only root can.
//!
//! | file           | what lives there                                          |
//! |----------------|-----------------------------------------------------------|
//! | `cache.rs`     | the directory: look up, verify, build atomically, remove  |
//! | `manifest.rs`  | `image.json`: what an image is made of, and its checksums |
//! | `copy.rs`      | copies of an image's disk                                 |
//! | `mini.rs`      | the recipe of the image `mini`; `init.sh` is its PID 1    |
//! | `debian.rs`    | the recipe of `debian`                                    |
//! | `boot.sh`, `setup.sh` | PID 1 of its RAM disk, and of the machine that sets it up |
//! | `settings.rs`  | how it is set up beyond what its packages do              |
//! | `agent.rs`     | Lodger's agent in images                                  |
//! | `guest.rs`     | what a build asks of a virtual machine                    |
//! | `apt.rs`, `sources.rs` | package lists and downloads, through the host's apt |
//! | `deb.rs`, `dpkg.rs` | packages unpacked, and dpkg's database of them       |
//! | `tool.rs`      | programs of the host                                      |
//! | `kernel.rs`, `modules.rs` | the kernel, and its modules with what they need |
//! | `tree.rs`      | files with owners and permissions, as data                |
//! | `oci/`          | images from registries                                    |
//! | `import.rs`    | disk images of other makers                               |
//! | `seed.rs`      | what cloud-init in them is told                           |
//! | `archive.rs`, `cpio.rs`, `ext4.rs` | a tree from a tar archive, as an initial RAM disk, as a disk |
//!
//! Limits: amd64 guests; kernels come from Debian's packages, so the host is Debian or
//! one of its derivatives.

mod agent;
mod apt;
mod archive;
mod cache;
mod copy;
mod cpio;
mod deb;
mod debian;
mod dpkg;
mod error;
mod ext4;
mod guest;
mod import;
mod kernel;
mod manifest;
mod mini;
mod modules;
mod oci;
mod progress;
mod seed;
mod settings;
mod sources;
mod tool;
mod tree;

pub use agent::PROGRAM as AGENT;
pub use apt::PackageTools;
pub use cache::{BuildOptions, Cache, DEFAULT_IMAGE, Image, ImageInfo, ImageState};
pub use error::{BUILD_SPACE, Error, Result};
pub use guest::{Guest, GuestJob};
pub use import::ImportOptions;
pub use oci::{Container, Process, PullOutcome};
pub use progress::Progress;
pub use seed::{MOST_SEED, Seed};
