//! Exit statuses. The help of `lodger run` lists them, and harnesses rely on them.

use std::path::PathBuf;

use lodger_board::BuildError;
use lodger_lifecycle::Failure;
use lodger_store::StoreError;

/// The guest powered off, or the user left by the escape key.
pub const POWERED_OFF: u8 = 0;
/// The host or Lodger failed.
pub const HOST_FAILURE: u8 = 1;
/// The arguments are wrong (also clap's status).
pub const USAGE: u8 = 2;
/// The guest crashed.
pub const CRASHED: u8 = 3;
/// The guest reset the machine, under `--no-reboot`.
pub const RESET: u8 = 4;

/// Ended by `lodger kill`, or by `lodger stop` because the guest did not end by itself: as of SIGKILL.
pub const KILLED: u8 = 128 + 9;

/// Ended by this signal, as a shell reports it.
pub fn signal(number: u8) -> u8 {
    128 + (number & 0x7f)
}

/// Says what was being done when the host refused something.
pub fn host_error(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Host { what, source }
}

/// The signal that a status stands for.
pub fn signal_of(status: u8) -> Option<u8> {
    status.checked_sub(128).filter(|&number| number > 0)
}

/// The guest wrote `value` to the debug-exit port.
pub fn debug_exit(value: u32) -> u8 {
    (value << 1 | 1) as u8
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The engine cannot be used; the text says why and what to do.
    #[error("{0}")]
    Engine(String),
    /// No image.
    #[error(transparent)]
    Image(#[from] lodger_image::Error),
    /// No memory for the machine.
    #[error("{0}; a smaller --memory may do, or raise the limit if there is one (ulimit -v)")]
    Memory(lodger_guest_memory::Error),
    /// No disk image.
    #[error(transparent)]
    Disk(#[from] lodger_block::ManageError),
    /// No machine.
    #[error(transparent)]
    Build(BuildError),
    /// The VM failed.
    #[error(transparent)]
    Vm(#[from] Failure),
    /// A signal has ended the command.
    #[error("interrupted; nothing is left behind")]
    Ended(u8),
    /// The VMs' directories.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A VM, which is named.
    #[error("{name}: {what}")]
    Named {
        /// The VM.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// A file of the user's.
    #[error("{}: {what}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// What another process of ours has found wrong, with its status.
    #[error("{message}")]
    Relayed {
        /// The status.
        status: u8,
        /// The message.
        message: String,
    },
    /// The terminal, or a thread.
    #[error("{what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The host's reason.
        source: std::io::Error,
    },
}

impl From<BuildError> for Error {
    fn from(error: BuildError) -> Error {
        match error {
            BuildError::Memory(error) => Error::Memory(error),
            other => Error::Build(other),
        }
    }
}

impl Error {
    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            Error::Usage(_)
            | Error::Build(BuildError::Spec(_) | BuildError::Cpu(_))
            | Error::Image(
                lodger_image::Error::UnknownImage { .. }
                | lodger_image::Error::Reference { .. }
                | lodger_image::Error::Option { .. },
            )
            | Error::Disk(lodger_block::ManageError::Size { .. }) => USAGE,
            Error::Ended(status) | Error::Relayed { status, .. } => *status,
            _ => HOST_FAILURE,
        }
    }
}
