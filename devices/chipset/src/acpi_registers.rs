//! The fixed registers of ACPI power management (ACPI 6.5, section 4.8), without lines.
//!
//! ACPI mode is always on (SCI_EN reads 1), so there is no SMI command port. There is one sleeping state, soft-off.

use lodger_clock::Nanos;

use crate::rate::Rate;

/// The power management timer's frequency in Hz.
pub(crate) const TIMER_HZ: u32 = 3_579_545;

/// Offsets within the block, each of one byte.
const STATUS: u64 = 0;
const ENABLE: u64 = 2;
const CONTROL: u64 = 4;
const TIMER: u64 = 8;
const GPE_STATUS: u64 = 0x20;
const GPE_ENABLE: u64 = 0x22;

const TIMER_EVENT: u16 = 1;
/// Power button.
pub(crate) const POWER_BUTTON: u16 = 1 << 8;
/// Timer, global lock, power button, sleep button, clock: what can be enabled.
const EVENTS: u16 = 1 | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;

const SCI_ENABLED: u16 = 1;
const SLEEP_TYPE: u16 = 7 << 10;
const SLEEP_ENABLE: u16 = 1 << 13;
/// Bus-master reload is stored for nobody; global-lock release and sleep enable read as 0.
const CONTROL_STORED: u16 = 2 | SLEEP_TYPE;

/// See the module documentation.
pub(crate) struct AcpiRegisters {
    /// The timer has 32 bits instead of 24. Configuration.
    wide_timer: bool,
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    /// How often the timer's top bit had changed when that was last turned into status.
    seen_half_turns: u64,
}

/// Saved forms.
pub(crate) mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub(crate) struct V1 {
        pub(super) status: u16,
        pub(super) enable: u16,
        pub(super) control: u16,
        pub(super) gpe_status: u16,
        pub(super) gpe_enable: u16,
        pub(super) seen_half_turns: u64,
    }
}

impl AcpiRegisters {
    /// After power-on at time `now`.
    pub(crate) fn new(wide_timer: bool, now: Nanos) -> AcpiRegisters {
        let mut registers = AcpiRegisters {
            wide_timer,
            status: 0,
            enable: 0,
            control: 0,
            gpe_status: 0,
            gpe_enable: 0,
            seen_half_turns: 0,
        };
        registers.seen_half_turns = registers.half_turns(now);
        registers
    }

    pub(crate) fn save(&self) -> saved::V1 {
        let AcpiRegisters {
            wide_timer: _,
            status,
            enable,
            control,
            gpe_status,
            gpe_enable,
            seen_half_turns,
        } = self;
        saved::V1 {
            status: *status,
            enable: *enable,
            control: *control,
            gpe_status: *gpe_status,
            gpe_enable: *gpe_enable,
            seen_half_turns: *seen_half_turns,
        }
    }

    pub(crate) fn restore(wide_timer: bool, state: saved::V1) -> AcpiRegisters {
        AcpiRegisters {
            wide_timer,
            status: state.status,
            enable: state.enable & EVENTS,
            control: state.control & CONTROL_STORED,
            gpe_status: state.gpe_status,
            gpe_enable: state.gpe_enable,
            seen_half_turns: state.seen_half_turns,
        }
    }

    /// Lets the time go on to `now`; precedes every other call.
    pub(crate) fn catch_up(&mut self, now: Nanos) {
        let half_turns = self.half_turns(now);
        if half_turns != self.seen_half_turns {
            self.seen_half_turns = half_turns;
            self.status |= TIMER_EVENT;
        }
    }

    /// When the timer interrupts next, if it may.
    pub(crate) fn deadline(&self) -> Option<Nanos> {
        let awaited = self.enable & !self.status & TIMER_EVENT != 0;
        let half = 1_u64 << (self.timer_bits() - 1);
        awaited.then(|| {
            let next = self.seen_half_turns.saturating_add(1);
            Rate(TIMER_HZ).moment(next.saturating_mul(half))
        })
    }

    /// The level of the system control interrupt.
    pub(crate) fn sci(&self) -> bool {
        self.status & self.enable != 0 || self.gpe_status & self.gpe_enable != 0
    }

    /// Fills `data` from the bytes at `offset`, all as of `now`.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8], now: Nanos) {
        let timer = (Rate(TIMER_HZ).ticks(now) & self.timer_mask()) as u32;
        for (at, byte) in (offset..).zip(data) {
            let word = |register: u16, start: u64| register.to_le_bytes()[(at - start) as usize];
            *byte = match at {
                STATUS..ENABLE => word(self.status, STATUS),
                ENABLE..CONTROL => word(self.enable, ENABLE),
                CONTROL..6 => word(self.control | SCI_ENABLED, CONTROL),
                TIMER..12 => timer.to_le_bytes()[(at - TIMER) as usize],
                GPE_STATUS..GPE_ENABLE => word(self.gpe_status, GPE_STATUS),
                GPE_ENABLE..0x24 => word(self.gpe_enable, GPE_ENABLE),
                _ => 0,
            };
        }
    }

    /// Writes the byte at `offset`; returns the sleep type if the guest goes to sleep by this.
    pub(crate) fn write(&mut self, offset: u64, value: u8) -> Option<u8> {
        let shifted = |start: u64| u16::from(value) << (8 * (offset - start));
        let replaced = |register: u16, start: u64| {
            register & !(0xff << (8 * (offset - start))) | shifted(start)
        };
        match offset {
            STATUS..ENABLE => self.status &= !shifted(STATUS),
            ENABLE..CONTROL => self.enable = replaced(self.enable, ENABLE) & EVENTS,
            CONTROL..6 => {
                let control = replaced(self.control, CONTROL);
                self.control = control & CONTROL_STORED;
                if control & SLEEP_ENABLE != 0 {
                    return Some((control >> 10 & 7) as u8);
                }
            }
            GPE_STATUS..GPE_ENABLE => self.gpe_status &= !shifted(GPE_STATUS),
            GPE_ENABLE..0x24 => self.gpe_enable = replaced(self.gpe_enable, GPE_ENABLE),
            _ => {}
        }
        None
    }

    /// A fixed event happens.
    pub(crate) fn raise(&mut self, event: u16) {
        self.status |= event;
    }

    /// Whether the guest is interrupted by this event.
    pub(crate) fn listens(&self, event: u16) -> bool {
        self.enable & event != 0
    }

    /// General-purpose event `number` (0..16) happens.
    pub(crate) fn raise_gpe(&mut self, number: u32) {
        self.gpe_status |= 1_u16.checked_shl(number).unwrap_or(0);
    }

    fn timer_bits(&self) -> u32 {
        if self.wide_timer { 32 } else { 24 }
    }

    fn timer_mask(&self) -> u64 {
        (1 << self.timer_bits()) - 1
    }

    fn half_turns(&self, now: Nanos) -> u64 {
        Rate(TIMER_HZ).ticks(now) >> (self.timer_bits() - 1)
    }
}
