//! Why a kernel cannot be booted.

use lodger_guest_memory::Error as MemoryError;

use crate::payload::Payload;

/// A file and what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {reason}")]
pub struct LoadError {
    /// The kernel or the initial RAM disk, as the user named it.
    pub file: String,
    /// What is wrong.
    #[source]
    pub reason: Reason,
}

impl LoadError {
    pub(crate) fn new(payload: &Payload, reason: Reason) -> LoadError {
        let file = payload.name();
        LoadError { file, reason }
    }
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// The host cannot read it.
    #[error("cannot be read: {0}")]
    Io(#[from] std::io::Error),
    /// It is something else than a kernel for this machine.
    #[error(
        "this is {0}, not a kernel that can be booted (a bzImage, an ELF file or a Multiboot 1 kernel)"
    )]
    NotAKernel(&'static str),
    /// A kernel that only other boot methods can start.
    #[error("{0}")]
    Unsupported(String),
    /// It ends too early.
    #[error("truncated: {what} should end at byte {end}, the file has {len}")]
    Truncated {
        /// What is incomplete.
        what: &'static str,
        /// Where it should end.
        end: u64,
        /// Where the file ends.
        len: u64,
    },
    /// Its contents contradict themselves.
    #[error("damaged: {0}")]
    Damaged(String),
    /// It must be at addresses that are not RAM or not free.
    #[error(
        "does not fit: {what} needs memory at {start:#x}..{end:#x}, of which some is not free RAM (low memory ends at {ram:#x}); more memory may help"
    )]
    DoesNotFit {
        /// What needs to be there.
        what: &'static str,
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
        /// End of the RAM below 4 GiB.
        ram: u64,
    },
    /// There is not enough memory anywhere.
    #[error("too big: no room for {what} ({len} bytes) in guest memory; more memory may help")]
    NoRoom {
        /// What is to be placed.
        what: &'static str,
        /// Its size in bytes.
        len: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the command line has {len} characters, this kernel takes {limit}")]
    CommandLineTooLong {
        /// Its length.
        len: usize,
        /// The longest allowed.
        limit: usize,
    },
    /// The command line cannot be passed as a C string.
    #[error("the command line contains a NUL character")]
    CommandLineNul,
    /// Guest memory refused an access that was checked before.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}
