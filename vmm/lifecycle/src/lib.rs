//! The life of a VM: starting it, running its vCPUs, resets, pauses, and how it ends.
//!
//! [`VmController::run`] is the one task that owns a VM's state. Everybody else (the guest through a device, the terminal, a
//! signal handler) asks through a [`VmHandle`]; a pure request queue decides what is allowed when:
//!
//! ```text
//!                  Pause
//!    +---------+ --------> +--------+
//!    | Running |           | Paused |
//!    +---------+ <-------- +--------+
//!      |  ^  |    Resume       |
//! Reset|  |  |                 |
//!      +--+  | End             | End        End: powered off, reset (without reboot), debug exit,
//!            v                 v                 crashed, stopped by the user, host failure
//!          +---------------------+
//!          |        Ended        |
//!          +---------------------+
//! ```
//!
//! A request that is let in sets a flag and kicks the vCPUs; each leaves its loop at the next
//! [`Exit::Kicked`](lodger_vcpu::Exit::Kicked), when no access is pending, and waits for the controller. So nothing that
//! a guest does can keep the VM from being stopped.
//!
//! | file | what |
//! |---|---|
//! | `queue.rs` | the state machine above, without threads |
//! | `handle.rs` | the queue with its lock, the flag and the kicks |
//! | `vcpu.rs` | a vCPU's thread and its loop |
//! | `controller.rs` | the task |
//! | `outcome.rs`, `report.rs` | how it ended; what is told about a crash |

mod controller;
mod handle;
mod history;
mod outcome;
mod queue;
mod report;
mod vcpu;

pub use controller::VmController;
pub use handle::{Policy, VmHandle};
pub use outcome::{Failure, Outcome};
pub use report::{CrashReport, CrashedVcpu};
