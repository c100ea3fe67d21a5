//! What the registers of a local APIC do (SDM vol. 3, chapter 10 "Advanced Programmable Interrupt Controller").
//!
//! Pure: no host calls and no threads. An engine without a local APIC of its own gives each vCPU one [`Lapic`], passes the
//! guest's accesses on, and carries out the [`Effects`] that only it can: interrupts to other vCPUs, EOI messages, timers.
//! Time comes in as [`Now`].
//!
//! Between vCPUs: every vCPU publishes its [`Address`] (one word) whenever [`Effects::readdressed`] says so, and
//! [`Ipi::targets`] tells from those which vCPUs an interrupt goes to. How it gets there is the engine's.
//!
//! Choices where the architecture leaves them: version 0x14 with six LVT entries (no CMCI), no EOI-broadcast suppression, the APIC
//! ID cannot be changed, no SMI, no focus processor, lowest-priority interrupts are spread by vector, and the timer's
//! input clock is [`TIMER_HZ`].

mod address;
mod interrupts;
mod ipi;
mod registers;
mod timer;

use lodger_x86::{ApicMode, LapicState};

pub use address::Address;
pub use ipi::{Destination, Ipi, IpiMode};
pub use timer::{Deadline, MIN_PERIOD, TIMER_HZ};

/// The time of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// Guest time in ns.
    pub ns: u64,
    /// What RDTSC would return.
    pub tsc: u64,
}

/// What the engine must do after a register was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Effects {
    /// Deliver this to the vCPUs that [`Ipi::targets`] names. (An interrupt to just the vCPU itself is already in its IRR.)
    pub ipi: Option<Ipi>,
    /// A level-triggered interrupt with this vector is finished: tell the IOAPICs.
    pub eoi: Option<u8>,
    /// [`Lapic::next_deadline`] may have changed.
    pub timer: bool,
    /// [`Lapic::address`], the mode or the page may have changed.
    pub readdressed: bool,
}

/// One local APIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lapic {
    state: LapicState,
}

impl Lapic {
    /// An APIC in this state.
    pub fn new(state: LapicState) -> Lapic {
        Lapic { state }
    }

    /// The registers.
    pub fn state(&self) -> &LapicState {
        &self.state
    }

    /// How it is reached.
    pub fn mode(&self) -> ApicMode {
        self.state.mode()
    }

    /// Guest-physical address of the register page; `None` if the registers are not in memory.
    pub fn page(&self) -> Option<u64> {
        (self.mode() == ApicMode::XApic).then(|| self.state.page())
    }

    /// What decides which interrupts reach it.
    pub fn address(&self) -> Address {
        Address::of(&self.state)
    }
}
