//! The seam between a machine and the engine that runs its vCPUs.
//!
//! [`Engine`] makes an [`EngineVm`], that makes [`Vcpu`]s; [`Vcpu::run`] takes an [`Entry`] and gives an [`Exit`]. All are object-safe: the
//! engine is chosen at run time. What an engine can do is a value, [`Capabilities`].
//!
//! Rules:
//! * At every exit the state is precise at an instruction boundary, or one I/O is pending that only the matching entry
//!   completes; until then the vCPU must not be stored, loaded or run with any other entry.
//! * A vCPU lives on one thread; [`EngineVm`] and [`Kick`] are for every thread.
//! * A halted vCPU waits inside `run`.
//! * The local APICs are the engine's; 8259, IOAPIC and the rest are the machine's.

mod exit;

use std::sync::Arc;

use lodger_clock::{Entropy, SharedClock};
use lodger_guest_memory::GuestMemory;
use lodger_x86::{CpuModel, CpuState};

pub use exit::{Entry, Exit};

/// A failure of the host or of the engine; never the guest's mistake.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The engine cannot be used on this host, or not for this machine; the text says why and what to do.
    #[error("the {engine} engine cannot be used: {why}")]
    Unusable {
        /// The engine's name.
        engine: &'static str,
        /// The reason.
        why: String,
    },
    /// The host failed while the VM was running.
    #[error("{what}: {source}")]
    Host {
        /// What was being done.
        what: String,
        /// The host's reason.
        source: std::io::Error,
    },
    /// A state that this engine cannot take.
    #[error("this vCPU state cannot be loaded: {0}")]
    State(String),
    /// The engine met something that it cannot run and that is not the guest's mistake.
    #[error("the engine stopped: {0}")]
    Internal(String),
}

/// What an engine can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// `ticks` and `set_tick_limit` count retired guest instructions exactly.
    pub exact_ticks: bool,
    /// The tracker of guest memory sees every write.
    pub dirty_log: bool,
    /// vCPUs of one VM, at most.
    pub max_vcpus: u32,
    /// Runs stock operating systems, not just simple bare-metal guests.
    pub stock_guests: bool,
}

/// What a VM is made from.
#[derive(Clone)]
pub struct VmConfig {
    /// Guest RAM.
    pub memory: GuestMemory,
    /// Guest time.
    pub clock: SharedClock,
    /// What RDRAND and RDSEED give, where the engine executes them itself.
    pub entropy: Entropy,
    /// CPUID and TSC frequency.
    pub model: Arc<CpuModel>,
    /// Number of vCPUs, from 1.
    pub vcpus: u32,
}

/// A way to run vCPUs.
pub trait Engine: Send + Sync {
    /// The name by which a user chooses it.
    fn name(&self) -> &'static str;

    /// Whether it can run on this host at all; the error tells why not.
    fn probe(&self) -> Result<Capabilities, EngineError>;

    /// Why [`Capabilities::stock_guests`] is false, for a person to read; `None` if it is true, or the engine does not know.
    fn stock_guest_problem(&self) -> Option<String> {
        None
    }

    /// Makes a VM. Its vCPUs are in the reset state until a state is loaded.
    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn EngineVm>, EngineError>;
}

/// The vCPUs of one machine, and what connects them.
pub trait EngineVm: Send + Sync {
    /// Makes vCPU `index` (its APIC ID), each one once.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError>;

    /// Delivers a message-signalled interrupt. A malformed one is dropped.
    fn send_msi(&self, address: u64, data: u32);

    /// The level of the 8259's INTR output, wired to LINT0 of vCPU 0. When that vCPU can take the interrupt it exits
    /// with [`Exit::InterruptAcknowledge`].
    fn set_intr(&self, level: bool);

    /// Facts and counters for a person to read: name and value.
    fn stats(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}

/// One virtual CPU.
pub trait Vcpu: Send {
    /// Runs until something must be done outside.
    fn run(&mut self, entry: Entry) -> Result<Exit, EngineError>;

    /// Sets the whole state.
    fn load(&mut self, state: &CpuState) -> Result<(), EngineError>;

    /// Reads the whole state.
    fn store(&mut self) -> Result<CpuState, EngineError>;

    /// Guest instructions retired since creation. A repeated string instruction counts once, when it completes; an
    /// instruction that faults does not count. Exact only of the time during which a tick limit is set, as counting may
    /// cost speed; approximate (possibly 0) otherwise and without `exact_ticks`.
    fn ticks(&self) -> u64;

    /// `run` exits with [`Exit::TickLimit`] when `ticks()` reaches `limit` exactly; `u64::MAX`: counts without a limit; `None`: neither.
    /// Ignored without `exact_ticks`.
    fn set_tick_limit(&mut self, limit: Option<u64>);

    /// The handle by which other threads stop this vCPU.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// Where the vCPU was executing recently, oldest first, as far as the engine keeps it: the linear address and the
    /// text of an instruction. For crash reports.
    fn recent_instructions(&self) -> Vec<(u64, String)> {
        Vec::new()
    }
}

/// Stops a vCPU from any thread.
pub trait Kick: Send + Sync {
    /// Makes the running, or else the next, `run` return [`Exit::Kicked`] soon. Never lost; several kicks may become one exit.
    fn kick(&self);
}
