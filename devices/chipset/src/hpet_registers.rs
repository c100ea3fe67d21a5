//! The registers of a high precision event timer (IA-PC HPET Specification 1.0a, October 2004), without
//! lines: a 64-bit counter at 100 MHz and three comparators, the first of which can be periodic.
//!
//! One deviation: a comparator that is set to a time up to a second in the past fires at once instead of
//! after the counter has gone round. A driver that is interrupted between reading the counter and setting the
//! comparator, as happens on a busy host, would otherwise lose its tick for 43 seconds.

use crate::rate::MIN_INTERVAL;

/// Ticks per second of the counter.
pub(crate) const HZ: u32 = 100_000_000;
/// Number of timers.
pub(crate) const TIMERS: usize = 3;

const FEMTOSECONDS_PER_TICK: u64 = 1_000_000_000_000_000 / HZ as u64;
/// Revision 1, three timers, 64 bits, legacy replacement, vendor Intel.
const CAPABILITIES: u64 =
    FEMTOSECONDS_PER_TICK << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | (TIMERS as u64 - 1) << 8 | 1;

const ENABLE: u64 = 1;
const LEGACY: u64 = 2;

const LEVEL: u64 = 1 << 1;
const INTERRUPT: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const CAN_BE_PERIODIC: u64 = 1 << 4;
const IS_64_BIT: u64 = 1 << 5;
const SET_VALUE: u64 = 1 << 6;
const MODE_32_BIT: u64 = 1 << 8;
const ROUTE: u64 = 0x1f << 9;
const MESSAGE: u64 = 1 << 14;
const CAN_MESSAGE: u64 = 1 << 15;
/// What every timer's configuration stores.
const STORED: u64 = LEVEL | INTERRUPT | MODE_32_BIT;

/// No timer fires of itself more often than this, in ticks.
const MIN_PERIOD: u64 = MIN_INTERVAL * HZ as u64 / 1_000_000_000;
/// How far in the past a comparator may be set and still fire.
const LATE: u64 = HZ as u64;

/// What the board makes possible.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Abilities {
    /// Which lines of the IOAPIC a timer can be routed to.
    pub(crate) routes: u32,
    /// Timers can send messages.
    pub(crate) messages: bool,
}

/// Where a timer's interrupt goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Destination {
    /// This line of the IOAPIC.
    Line(u32),
    /// In place of the PIT (timer 0) or of the RTC (timer 1).
    Legacy,
    /// A message.
    Message {
        /// Its address.
        address: u64,
        /// Its data.
        data: u32,
    },
}

#[derive(Clone)]
struct Timer {
    config: u64,
    comparator: u64,
    period: u64,
    /// The message: data in the lower half, address in the upper.
    message: u64,
    /// The next write of the comparator sets it even if the timer is periodic.
    set_value: bool,
    /// In which tick of guest time this fires next, while the counter runs.
    next: Option<u64>,
}

impl Timer {
    fn new() -> Timer {
        Timer {
            config: 0,
            comparator: u64::MAX,
            period: 0,
            message: 0,
            set_value: false,
            next: None,
        }
    }

    fn has(&self, bit: u64) -> bool {
        self.config & bit != 0
    }

    fn width_mask(&self) -> u64 {
        if self.has(MODE_32_BIT) {
            u64::from(u32::MAX)
        } else {
            u64::MAX
        }
    }

    fn period(&self) -> Option<u64> {
        let period = self.period & self.width_mask();
        (self.has(PERIODIC) && period != 0).then_some(period)
    }

    /// Computes when the comparator matches the counter, which has the value `counter` in `tick`; what it has
    /// matched within the last `late` ticks counts as now.
    fn schedule(&mut self, counter: u64, tick: u64, late: u64) {
        let mask = self.width_mask();
        let ahead = self.comparator.wrapping_sub(counter) & mask;
        let behind = counter.wrapping_sub(self.comparator) & mask;
        let wait = if behind <= late { 0 } else { ahead };
        self.next = Some(tick.saturating_add(wait));
    }

    /// Fires if that is due, however often it has been due, and looks for the next time.
    fn fires(&mut self, tick: u64) -> bool {
        let Some(due) = self.next.filter(|&due| due <= tick) else {
            return false;
        };
        let step = match self.period() {
            Some(period) => Some(period),
            // The counter goes round.
            None if self.has(MODE_32_BIT) => Some(1 << 32),
            None => None,
        };
        self.next = step.map(|step| {
            // Of a period that the host cannot bear, some are left out.
            let ahead = MIN_PERIOD.saturating_sub(step);
            let steps = ((tick - due + ahead) / step + 1).saturating_mul(step);
            if self.period().is_some() {
                self.comparator = self.comparator.wrapping_add(steps) & self.width_mask();
            }
            due.saturating_add(steps)
        });
        true
    }

    fn save(&self) -> saved::TimerV1 {
        let Timer {
            config,
            comparator,
            period,
            message,
            set_value,
            next,
        } = self.clone();
        saved::TimerV1 {
            config,
            comparator,
            period,
            message,
            set_value,
            next,
        }
    }

    fn restore(state: saved::TimerV1) -> Timer {
        Timer {
            config: state.config,
            comparator: state.comparator,
            period: state.period,
            message: state.message,
            set_value: state.set_value,
            next: state.next,
        }
    }
}

/// See the module documentation.
pub(crate) struct HpetRegisters {
    /// Configuration.
    abilities: Abilities,
    config: u64,
    /// Interrupt status.
    status: u64,
    /// While the counter runs, its value less the ticks of guest time; else its value.
    counter_base: u64,
    timers: [Timer; TIMERS],
}

/// Saved forms.
pub(crate) mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub(crate) struct V1 {
        pub(super) config: u64,
        pub(super) status: u64,
        pub(super) counter_base: u64,
        pub(super) timers: [TimerV1; super::TIMERS],
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct TimerV1 {
        pub(super) config: u64,
        pub(super) comparator: u64,
        pub(super) period: u64,
        pub(super) message: u64,
        pub(super) set_value: bool,
        pub(super) next: Option<u64>,
    }
}

impl HpetRegisters {
    /// After power-on: the counter stands at 0.
    pub(crate) fn new(abilities: Abilities) -> HpetRegisters {
        HpetRegisters {
            abilities,
            config: 0,
            status: 0,
            counter_base: 0,
            timers: std::array::from_fn(|_| Timer::new()),
        }
    }

    pub(crate) fn save(&self) -> saved::V1 {
        let HpetRegisters {
            abilities: _,
            config,
            status,
            counter_base,
            timers,
        } = self;
        saved::V1 {
            config: *config,
            status: *status,
            counter_base: *counter_base,
            timers: timers.each_ref().map(Timer::save),
        }
    }

    pub(crate) fn restore(abilities: Abilities, state: saved::V1) -> HpetRegisters {
        HpetRegisters {
            abilities,
            config: state.config & (ENABLE | LEGACY),
            status: state.status & ((1 << TIMERS) - 1),
            counter_base: state.counter_base,
            timers: state.timers.map(Timer::restore),
        }
    }

    /// Lets the time go on to `tick` (100 MHz of guest time); precedes every other call. Calls `edge` with
    /// the number of each timer that has an edge or a message to send.
    pub(crate) fn catch_up(&mut self, tick: u64, mut edge: impl FnMut(&HpetRegisters, usize)) {
        if !self.runs() {
            return;
        }
        for number in 0..TIMERS {
            if !self.timers[number].fires(tick) {
                continue;
            }
            if self.level_triggered(number) {
                self.status |= 1 << number;
            } else if self.timers[number].has(INTERRUPT) {
                edge(self, number);
            }
        }
    }

    /// In which tick of guest time the next interrupt is due.
    pub(crate) fn deadline(&self) -> Option<u64> {
        if !self.runs() {
            return None;
        }
        let awaited = |&number: &usize| {
            // A level that is high already can wait until the guest has acknowledged it.
            self.timers[number].has(INTERRUPT) && self.status & 1 << number == 0
        };
        (0..TIMERS)
            .filter(awaited)
            .filter_map(|number| self.timers[number].next)
            .min()
    }

    /// Whether the timers 0 and 1 take the place of the PIT and of the RTC.
    pub(crate) fn legacy(&self) -> bool {
        self.config & LEGACY != 0
    }

    /// Where timer `number`'s interrupts go.
    pub(crate) fn destination(&self, number: usize) -> Destination {
        let timer = &self.timers[number];
        if timer.has(MESSAGE) {
            Destination::Message {
                address: timer.message >> 32,
                data: timer.message as u32,
            }
        } else if self.legacy() && number < 2 {
            Destination::Legacy
        } else {
            Destination::Line((timer.config & ROUTE) as u32 >> 9)
        }
    }

    /// Whether timer `number` holds its line high.
    pub(crate) fn level(&self, number: usize) -> bool {
        self.runs()
            && self.level_triggered(number)
            && self.timers[number].has(INTERRUPT)
            && self.status & 1 << number != 0
    }

    /// Reads the register at `offset`, a multiple of 8.
    pub(crate) fn read(&self, offset: u64, tick: u64) -> u64 {
        match (offset, timer_register(offset)) {
            (0x00, _) => CAPABILITIES,
            (0x10, _) => self.config,
            (0x20, _) => self.status,
            (0xf0, _) => self.counter(tick),
            (_, Some((number, 0))) => self.timer_config(number),
            (_, Some((number, 8))) => self.timers[number].comparator,
            (_, Some((number, 0x10))) => self.timers[number].message,
            _ => 0,
        }
    }

    /// Writes the bits `mask` of the register at `offset`, a multiple of 8.
    pub(crate) fn write(&mut self, offset: u64, value: u64, mask: u64, tick: u64) {
        match (offset, timer_register(offset)) {
            (0x10, _) => self.write_config(self.config & !mask | value & mask, tick),
            (0x20, _) => self.status &= !(value & mask),
            // The counter can be set only while it stands.
            (0xf0, _) if !self.runs() => {
                self.counter_base = self.counter_base & !mask | value & mask;
            }
            (_, Some((number, 0))) => self.write_timer_config(number, value, mask, tick),
            (_, Some((number, 8))) => self.write_comparator(number, value, mask, tick),
            (_, Some((number, 0x10))) if self.abilities.messages => {
                let timer = &mut self.timers[number];
                timer.message = timer.message & !mask | value & mask;
            }
            _ => {}
        }
    }

    fn runs(&self) -> bool {
        self.config & ENABLE != 0
    }

    fn counter(&self, tick: u64) -> u64 {
        match self.runs() {
            true => tick.wrapping_add(self.counter_base),
            false => self.counter_base,
        }
    }

    /// Messages have no level.
    fn level_triggered(&self, number: usize) -> bool {
        self.timers[number].has(LEVEL) && !self.timers[number].has(MESSAGE)
    }

    fn write_config(&mut self, config: u64, tick: u64) {
        let (counter, ran) = (self.counter(tick), self.runs());
        self.config = config & (ENABLE | LEGACY);
        match (ran, self.runs()) {
            (false, true) => {
                self.counter_base = counter.wrapping_sub(tick);
                for timer in &mut self.timers {
                    timer.schedule(counter, tick, 0);
                }
            }
            (true, false) => self.counter_base = counter,
            _ => {}
        }
    }

    /// What the configuration of timer `number` can hold.
    fn storable(&self, number: usize) -> u64 {
        let periodic = if number == 0 { PERIODIC } else { 0 };
        let message = if self.abilities.messages { MESSAGE } else { 0 };
        STORED | periodic | message
    }

    fn timer_config(&self, number: usize) -> u64 {
        let periodic = if number == 0 { CAN_BE_PERIODIC } else { 0 };
        let message = match self.abilities.messages {
            true => CAN_MESSAGE,
            false => 0,
        };
        let routes = u64::from(self.abilities.routes) << 32;
        self.timers[number].config | periodic | IS_64_BIT | message | routes
    }

    fn write_timer_config(&mut self, number: usize, value: u64, mask: u64, tick: u64) {
        let storable = self.storable(number);
        let (counter, runs) = (self.counter(tick), self.runs());
        let old = self.timers[number].config;
        let new = old & !mask | value & mask;
        // A route that the board does not offer is not taken.
        let wanted = new >> 9 & 0x1f;
        let route = match self.abilities.routes >> wanted & 1 {
            0 => old & ROUTE,
            _ => new & ROUTE,
        };
        let timer = &mut self.timers[number];
        timer.config = new & storable | route;
        timer.set_value |= value & mask & SET_VALUE != 0;
        if (old ^ new) & MODE_32_BIT != 0 {
            timer.comparator &= timer.width_mask();
            if runs {
                timer.schedule(counter, tick, 0);
            }
        }
    }

    fn write_comparator(&mut self, number: usize, value: u64, mask: u64, tick: u64) {
        let (counter, runs) = (self.counter(tick), self.runs());
        let timer = &mut self.timers[number];
        if timer.has(PERIODIC) {
            timer.period = timer.period & !mask | value & mask;
        }
        let sets = std::mem::take(&mut timer.set_value) || !timer.has(PERIODIC);
        if sets {
            timer.comparator = (timer.comparator & !mask | value & mask) & timer.width_mask();
            if runs {
                timer.schedule(counter, tick, LATE);
            }
        }
    }
}

/// Which timer's register, and which one of it, is at `offset`.
fn timer_register(offset: u64) -> Option<(usize, u64)> {
    let offset = offset.checked_sub(0x100)?;
    let number = (offset / 0x20) as usize;
    (number < TIMERS).then_some((number, offset % 0x20))
}
