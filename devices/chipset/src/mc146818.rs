//! The registers of the MC146818 real-time clock with 128 bytes of CMOS memory (Motorola MC146818A data
//! sheet, 1984), without lines. Register 0x32 is the century, as ACPI's FADT and firmware expect.
//!
//! The clock is the machine's wall clock plus an offset that setting the time changes. Its registers are
//! computed when they are read; only while it stands (SET, or divider in reset) do they hold what was
//! written. The day of the week follows from the date. Daylight saving (DSE) is stored and ignored.

use lodger_clock::Nanos;

use crate::calendar::{Civil, DAY};
use crate::rate::Rate;

const SECOND: i128 = 1_000_000_000;
/// UIP is seen for this long before the registers change.
const UIP_TIME: i128 = 244_000;
/// The time base of the periodic interrupt.
const OSCILLATOR: Rate = Rate(32_768);
/// The clock's offset stays within this, about 30,000 years.
const OFFSET_LIMIT: i128 = 1_000_000_000_000 * SECOND;

const SECONDS: u8 = 0;
const SECONDS_ALARM: u8 = 1;
const MINUTES: u8 = 2;
const MINUTES_ALARM: u8 = 3;
const HOURS: u8 = 4;
const HOURS_ALARM: u8 = 5;
const WEEKDAY: u8 = 6;
const DAY_OF_MONTH: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const REG_A: u8 = 0xa;
const REG_B: u8 = 0xb;
const REG_C: u8 = 0xc;
const REG_D: u8 = 0xd;
const CENTURY: u8 = 0x32;

const A_UIP: u8 = 0x80;
const A_DIVIDER_RESET: u8 = 0x60;
const B_SET: u8 = 0x80;
const B_PERIODIC: u8 = 0x40;
const B_ALARM: u8 = 0x20;
const B_UPDATE: u8 = 0x10;
const B_BINARY: u8 = 4;
const B_24_HOURS: u8 = 2;
/// Flags in C and enables in B alike.
const INTERRUPTS: u8 = B_PERIODIC | B_ALARM | B_UPDATE;
const C_REQUEST: u8 = 0x80;
const D_VALID: u8 = 0x80;
const HOUR_PM: u8 = 0x80;
/// An alarm byte with both bits matches anything.
const ALARM_ANY: u8 = 0xc0;

/// Guest time and wall-clock time of an access.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) now: Nanos,
    pub(crate) wall: Nanos,
}

/// See the module documentation.
pub(crate) struct Mc146818 {
    index: u8,
    /// Registers and memory; the time registers are valid only while the clock stands.
    cmos: [u8; 128],
    /// The flags of register C.
    flags: u8,
    /// The clock's time less the wall-clock time, in ns.
    offset: i128,
    /// The clock's second up to which updates and alarms have become flags.
    seen_second: i64,
    /// The oscillator's tick up to which periods have become flags.
    seen_tick: u64,
}

/// Saved forms.
pub(crate) mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub(crate) struct V1 {
        pub(super) index: u8,
        pub(super) cmos: Vec<u8>,
        pub(super) flags: u8,
        pub(super) offset: i128,
        pub(super) seen_second: i64,
        pub(super) seen_tick: u64,
    }
}

impl Mc146818 {
    /// After a change of battery: the clock shows the wall-clock time, and of the memory the bytes in `memory`
    /// (index, value) are not 0.
    pub(crate) fn new(memory: &[(u8, u8)], at: Moment) -> Mc146818 {
        let mut cmos = [0; 128];
        for &(index, value) in memory {
            cmos[usize::from(index & 0x7f)] = value;
        }
        cmos[usize::from(REG_A)] = 0x26;
        cmos[usize::from(REG_B)] = B_24_HOURS;
        let mut chip = Mc146818 {
            index: 0,
            cmos,
            flags: 0,
            offset: 0,
            seen_second: 0,
            seen_tick: OSCILLATOR.ticks(at.now),
        };
        chip.seen_second = chip.second(at);
        chip
    }

    /// The RESET pin: interrupts are off; time and memory live on a battery.
    pub(crate) fn reset(&mut self) {
        self.index = 0;
        self.flags = 0;
        self.cmos[usize::from(REG_B)] &= !INTERRUPTS;
    }

    pub(crate) fn save(&self) -> saved::V1 {
        let Mc146818 {
            index,
            cmos,
            flags,
            offset,
            seen_second,
            seen_tick,
        } = self;
        saved::V1 {
            index: *index,
            cmos: cmos.to_vec(),
            flags: *flags,
            offset: *offset,
            seen_second: *seen_second,
            seen_tick: *seen_tick,
        }
    }

    /// Returns `None` for a state that cannot be.
    pub(crate) fn restore(state: saved::V1) -> Option<Mc146818> {
        Some(Mc146818 {
            index: state.index & 0x7f,
            cmos: state.cmos.try_into().ok()?,
            flags: state.flags & INTERRUPTS,
            offset: state.offset.clamp(-OFFSET_LIMIT, OFFSET_LIMIT),
            seen_second: state.seen_second,
            seen_tick: state.seen_tick,
        })
    }

    /// Lets the time go on to `at`; precedes every other call.
    pub(crate) fn catch_up(&mut self, at: Moment) {
        let tick = OSCILLATOR.ticks(at.now);
        if let Some(period) = self.period()
            && tick / period != self.seen_tick / period
        {
            self.flags |= B_PERIODIC;
        }
        self.seen_tick = tick;
        if !self.runs() {
            return;
        }
        let second = self.second(at);
        if second != self.seen_second {
            self.flags |= B_UPDATE;
            if second > self.seen_second
                && self
                    .next_alarm(self.seen_second)
                    .is_some_and(|alarm| alarm <= second)
            {
                self.flags |= B_ALARM;
            }
            self.seen_second = second;
        }
    }

    /// When (in guest time) the next enabled interrupt is due, if it is not pending already.
    pub(crate) fn deadline(&self, at: Moment) -> Option<Nanos> {
        let awaited = self.register(REG_B) & !self.flags;
        let mut deadlines = [None; 3];
        if awaited & B_PERIODIC != 0 {
            deadlines[0] = self
                .period()
                .map(|p| OSCILLATOR.moment((self.seen_tick / p + 1).saturating_mul(p)));
        }
        if self.runs() {
            let until = |second: i64| {
                let wait = (i128::from(second) * SECOND - self.time(at)).max(0);
                at.now.saturating_add(wait.try_into().unwrap_or(Nanos::MAX))
            };
            if awaited & B_UPDATE != 0 {
                deadlines[1] = Some(until(self.seen_second.saturating_add(1)));
            }
            if awaited & B_ALARM != 0 {
                deadlines[2] = self.next_alarm(self.seen_second).map(until);
            }
        }
        deadlines.into_iter().flatten().min()
    }

    /// The level of the interrupt line.
    pub(crate) fn irq(&self) -> bool {
        self.flags & self.register(REG_B) & INTERRUPTS != 0
    }

    /// Selects the register that the data port is (the top bit, which masks NMI on a PC, is ignored).
    pub(crate) fn write_index(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// Reads the data port.
    pub(crate) fn read_data(&mut self, at: Moment) -> u8 {
        match self.index {
            REG_A => {
                let left = SECOND - self.time(at).rem_euclid(SECOND);
                let updating = self.runs() && left <= UIP_TIME;
                self.register(REG_A) | if updating { A_UIP } else { 0 }
            }
            REG_C => {
                let request = if self.irq() { C_REQUEST } else { 0 };
                request | std::mem::take(&mut self.flags)
            }
            REG_D => D_VALID,
            index => {
                if is_time(index) && self.runs() {
                    self.store_time(at);
                }
                self.register(index)
            }
        }
    }

    /// Writes the data port.
    pub(crate) fn write_data(&mut self, value: u8, at: Moment) {
        match self.index {
            REG_A => self.control(value & !A_UIP, self.register(REG_B), at),
            REG_B => {
                let enables = if value & B_SET != 0 {
                    value & !B_UPDATE
                } else {
                    value
                };
                self.control(self.register(REG_A), enables, at);
            }
            REG_C | REG_D => {}
            index => {
                let runs = is_time(index) && self.runs();
                if runs {
                    self.store_time(at);
                }
                self.cmos[usize::from(index)] = value;
                if runs {
                    self.load_time(at);
                }
            }
        }
    }

    /// Changes registers A and B, which may stop the clock or let it go on.
    fn control(&mut self, a: u8, b: u8, at: Moment) {
        let (ran, was_reset) = (self.runs(), self.divider_reset());
        if ran {
            self.store_time(at);
        }
        self.cmos[usize::from(REG_A)] = a;
        self.cmos[usize::from(REG_B)] = b;
        if was_reset && !self.divider_reset() {
            // The first update comes half a second after the divider was released.
            self.offset += SECOND / 2 - self.time(at).rem_euclid(SECOND);
        }
        if !ran && self.runs() {
            self.load_time(at);
        }
    }

    fn register(&self, index: u8) -> u8 {
        self.cmos[usize::from(index)]
    }

    fn divider_reset(&self) -> bool {
        self.register(REG_A) & A_DIVIDER_RESET == A_DIVIDER_RESET
    }

    fn runs(&self) -> bool {
        self.register(REG_B) & B_SET == 0 && !self.divider_reset()
    }

    /// The period of the periodic interrupt in ticks of the oscillator.
    fn period(&self) -> Option<u64> {
        match self.register(REG_A) & 0xf {
            _ if self.divider_reset() => None,
            0 => None,
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// The clock's time in ns since 1970.
    fn time(&self, at: Moment) -> i128 {
        i128::from(at.wall) + self.offset
    }

    fn second(&self, at: Moment) -> i64 {
        self.time(at).div_euclid(SECOND) as i64
    }

    /// Computes the time registers.
    fn store_time(&mut self, at: Moment) {
        let civil = Civil::from_unix(self.second(at));
        for (index, value) in [
            (SECONDS, self.encode(civil.second)),
            (MINUTES, self.encode(civil.minute)),
            (HOURS, self.encode_hour(civil.hour)),
            (WEEKDAY, self.encode(civil.weekday())),
            (DAY_OF_MONTH, self.encode(civil.day)),
            (MONTH, self.encode(civil.month)),
            (YEAR, self.encode(civil.year.rem_euclid(100))),
            (
                CENTURY,
                self.encode(civil.year.div_euclid(100).rem_euclid(100)),
            ),
        ] {
            self.cmos[usize::from(index)] = value;
        }
    }

    /// Sets the clock from the time registers; the fraction of the second stays.
    fn load_time(&mut self, at: Moment) {
        let field = |index| self.decode(self.register(index));
        let civil = Civil {
            year: field(CENTURY) * 100 + field(YEAR),
            month: field(MONTH),
            day: field(DAY_OF_MONTH),
            hour: self.decode_hour(self.register(HOURS)),
            minute: field(MINUTES),
            second: field(SECONDS),
        };
        let fraction = self.time(at).rem_euclid(SECOND);
        self.seen_second = civil.to_unix();
        self.offset = i128::from(self.seen_second) * SECOND + fraction - i128::from(at.wall);
    }

    /// The first second after `second` that the alarm registers match.
    fn next_alarm(&self, second: i64) -> Option<i64> {
        let matches = |index, shown: u8| {
            let alarm = self.register(index);
            alarm & ALARM_ANY == ALARM_ANY || alarm == shown
        };
        let hours = |hour| matches(HOURS_ALARM, self.encode_hour(hour));
        let minutes = |minute| matches(MINUTES_ALARM, self.encode(minute));
        let seconds = |second| matches(SECONDS_ALARM, self.encode(second));
        let first_from = |start: i64| {
            (start / 3600..24).filter(|&h| hours(h)).find_map(|h| {
                (0..60).filter(|&m| minutes(m)).find_map(|m| {
                    let minute = h * 3600 + m * 60;
                    let first = (start - minute).max(0);
                    (first..60).find(|&s| seconds(s)).map(|s| minute + s)
                })
            })
        };
        let today = second.div_euclid(DAY).saturating_mul(DAY);
        match first_from(second.rem_euclid(DAY) + 1) {
            Some(time) => Some(today.saturating_add(time)),
            None => first_from(0).map(|time| today.saturating_add(DAY + time)),
        }
    }

    fn encode(&self, value: i64) -> u8 {
        let value = value as u8;
        match self.register(REG_B) & B_BINARY {
            0 => ((value / 10) << 4) | (value % 10),
            _ => value,
        }
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.register(REG_B) & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        self.encode((hour + 11) % 12 + 1) | if hour >= 12 { HOUR_PM } else { 0 }
    }

    fn decode(&self, byte: u8) -> i64 {
        i64::from(match self.register(REG_B) & B_BINARY {
            0 => (byte >> 4) * 10 + (byte & 0xf),
            _ => byte,
        })
    }

    fn decode_hour(&self, byte: u8) -> i64 {
        if self.register(REG_B) & B_24_HOURS != 0 {
            return self.decode(byte);
        }
        let pm = if byte & HOUR_PM != 0 { 12 } else { 0 };
        self.decode(byte & !HOUR_PM) % 12 + pm
    }
}

fn is_time(index: u8) -> bool {
    matches!(
        index,
        SECONDS | MINUTES | HOURS | WEEKDAY | DAY_OF_MONTH | MONTH | YEAR | CENTURY
    )
}
