//! How a VM ended.

use std::io;

use lodger_board::PowerOnError;
use lodger_vcpu::EngineError;

use crate::report::CrashReport;

/// How a VM ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest powered it off.
    PoweredOff,
    /// The guest reset it, and the policy is not to reboot.
    Reset,
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u32),
    /// Triple fault.
    Crashed(Box<CrashReport>),
    /// [`VmHandle::stop`](crate::VmHandle::stop).
    Stopped,
    /// The host failed, or this program did.
    HostFailure(Failure),
}

/// What failed, other than the guest.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The machine cannot be started.
    #[error(transparent)]
    PowerOn(#[from] PowerOnError),
    /// The engine.
    #[error("vCPU {vcpu}: {source}")]
    Engine {
        /// Which vCPU.
        vcpu: u32,
        /// The engine's reason.
        source: EngineError,
    },
    /// A vCPU's thread cannot be started.
    #[error("vCPU {vcpu}: the host cannot start a thread: {source}")]
    Thread {
        /// Which vCPU.
        vcpu: u32,
        /// The host's reason.
        source: io::Error,
    },
    /// A bug of this program, reported where it happened.
    #[error("thread {thread} panicked; this is a bug in Lodger")]
    Panicked {
        /// The thread's name.
        thread: String,
    },
}
