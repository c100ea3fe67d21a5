//! The local APIC's registers (SDM vol. 3, chapter 10). What they do is in `engine/lapic`.

use serde::{Deserialize, Serialize};

/// How the local APIC is reached, from the APIC base MSR's EN and EXTD bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApicMode {
    /// Globally disabled.
    Disabled,
    /// Memory-mapped.
    XApic,
    /// By MSRs.
    X2Apic,
}

/// The registers of one local APIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// IA32_APIC_BASE: base address, BSP bit 8, EXTD bit 10, EN bit 11.
    pub base: u64,
    /// The initial APIC ID; also the x2APIC ID.
    pub id: u32,
    /// Task priority (CR8 is its bits 4-7).
    pub tpr: u8,
    /// Logical destination (xAPIC form, bits 24-31).
    pub ldr: u32,
    /// Destination format (xAPIC).
    pub dfr: u32,
    /// Spurious interrupt vector; bit 8 is the software enable.
    pub svr: u32,
    /// In-service, 256 bits.
    pub isr: [u32; 8],
    /// Trigger mode (1 = level), 256 bits.
    pub tmr: [u32; 8],
    /// Interrupt request, 256 bits.
    pub irr: [u32; 8],
    /// Error status as read; `esr_pending` collects until the next write of ESR.
    pub esr: u32,
    /// Errors since ESR was last written.
    pub esr_pending: u32,
    /// Interrupt command.
    pub icr: u64,
    /// CMCI, timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; 7],
    /// Divide configuration.
    pub timer_divide: u32,
    /// Initial count.
    pub timer_initial: u32,
    /// Guest time in ns at which the running one-shot or periodic count reaches zero; 0: the timer is not counting.
    pub timer_expiry: u64,
    /// IA32_TSC_DEADLINE; 0: disarmed.
    pub tsc_deadline: u64,
}

/// Indices into [`LapicState::lvt`].
#[allow(missing_docs)]
pub mod lvt {
    pub const CMCI: usize = 0;
    pub const TIMER: usize = 1;
    pub const THERMAL: usize = 2;
    pub const PERFORMANCE: usize = 3;
    pub const LINT0: usize = 4;
    pub const LINT1: usize = 5;
    pub const ERROR: usize = 6;
    pub const MASKED: u32 = 1 << 16;
}

/// log2 of the divisor that a divide configuration selects (SDM vol. 3, figure 10-10).
pub fn divide_shift(configuration: u32) -> u32 {
    (1 + (configuration & 3 | configuration >> 1 & 4)) & 7
}

impl LapicState {
    /// After power-on (SDM vol. 3, 10.4.7.1), for the vCPU with this APIC ID; `bsp`: the bootstrap processor.
    pub fn reset(id: u32, bsp: bool) -> LapicState {
        LapicState {
            base: 0xfee0_0800 | u64::from(bsp) << 8,
            id,
            tpr: 0,
            ldr: 0,
            dfr: 0xffff_ffff,
            svr: 0xff,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            esr_pending: 0,
            icr: 0,
            lvt: [lvt::MASKED; 7],
            timer_divide: 0,
            timer_initial: 0,
            timer_expiry: 0,
            tsc_deadline: 0,
        }
    }

    /// How the APIC is reached.
    pub fn mode(&self) -> ApicMode {
        match self.base >> 10 & 3 {
            2 => ApicMode::XApic,
            3 => ApicMode::X2Apic,
            _ => ApicMode::Disabled,
        }
    }

    /// Guest-physical address of the xAPIC page.
    pub fn page(&self) -> u64 {
        self.base & 0x000f_ffff_ffff_f000
    }

    /// The x2APIC logical ID, derived from the ID (SDM vol. 3, 10.12.10.2).
    pub fn x2apic_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }
}
