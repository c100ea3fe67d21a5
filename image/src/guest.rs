//! What a build asks of a virtual machine: it finishes an image's installation,
//! because there everybody is root.

use std::path::PathBuf;

/// Runs machines for a build.
pub trait Guest {
    /// Runs one to its end, and passes each line that it writes to its first serial port to
    /// `line`. `Err` says why it did not power off by itself.
    fn run(&mut self, job: &GuestJob, line: &mut dyn FnMut(&str)) -> Result<(), String>;
}

/// A machine that is to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestJob {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// The kernel command line.
    pub append: String,
    /// Raw disks that the guest may write to, in order.
    pub disks: Vec<PathBuf>,
    /// Bytes of RAM.
    pub memory: u64,
}

/// For images that need none.
impl Guest for () {
    fn run(&mut self, _job: &GuestJob, _line: &mut dyn FnMut(&str)) -> Result<(), String> {
        Err("no machine can be run here".into())
    }
}
