//! Where VMs with a name live: a directory each, which survives the VM's process and the host's reboots.
//!
//! ```text
//! $XDG_DATA_HOME/lodger/vms/NAME/     else ~/.local/share/lodger/vms/NAME/
//!     lock           locked (flock) by whoever owns the VM: its monitor as long as that lives
//!     vm.json        what it is: id, image, labels, and the spec to start it from
//!     state.json     its life: the monitor's process, its socket, how the last run ended
//!     console.log    what the guest printed; console.log.1 and so on are older
//!     monitor.log    what the monitor said
//!     control.sock   where its monitor listens, too
//!     ...            what belongs to it: a root disk, a kernel
//! ```
//!
//! A name is a directory, so two VMs cannot have one. Who may touch the directory is decided by the lock alone, which the
//! kernel takes back from a process that dies in whatever way: nothing that a crash leaves behind can block a name. A
//! directory without a `vm.json` is what is left of a start that was interrupted, and counts as none. Files appear by a
//! rename; a VM is removed by a rename, too.
//!
//! Limits: one user's VMs on one host; the directory is on a file system that has flock(2).

mod claim;
mod name;
mod place;
mod record;

pub use claim::Claim;
pub use name::{Name, NameError, new_id};
pub use place::{Store, data_dir, sockets, switch_dir};
pub use record::{Life, Record, State, Vm};

use std::io;
use std::path::{Path, PathBuf};

/// The console's log in a VM's directory.
pub const CONSOLE_LOG: &str = "console.log";
/// The monitor's socket in a VM's directory.
pub(crate) const SOCKET: &str = "control.sock";
/// The monitor's messages in a VM's directory.
pub const MONITOR_LOG: &str = "monitor.log";

/// Why VMs cannot be looked at or changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nobody says where the user's files are.
    #[error("neither XDG_DATA_HOME nor HOME is set to an absolute path; VMs are kept there")]
    NoHome,
    /// The host refused something.
    #[error("{}: {source}", path.display())]
    Io {
        /// At which file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// A file of ours that is not as we write it.
    #[error("{}: not a file of Lodger's: {source}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A file that a newer Lodger has written.
    #[error("{}: written by a newer Lodger (version {version} of the format)", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// Somebody owns the VM: it is running, or about to.
    #[error("a VM named {0} is running; `lodger stop {0}` ends it")]
    InUse(Name),
    /// Another VM has the name.
    #[error("there is a VM named {0} already")]
    Taken(Name),
    /// There is no such VM.
    #[error("there is no VM {0}; `lodger ps --all` lists them")]
    Unknown(String),
    /// The beginning of more than one id.
    #[error("{text} is the beginning of more than one id: {names}")]
    Ambiguous {
        /// What was given.
        text: String,
        /// Whose ids begin with it.
        names: String,
    },
}

/// Says at which file it happened.
fn at(path: &Path) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError::Io {
        path: path.into(),
        source,
    }
}
