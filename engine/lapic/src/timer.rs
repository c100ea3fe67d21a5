//! The APIC timer: one-shot, periodic and TSC-deadline (SDM vol. 3, 10.5.4).
//!
//! Nothing runs in the background: the state holds when the count reaches zero, and the engine calls [`Lapic::expire`] at
//! or after [`Lapic::next_deadline`]. Periods missed in between become one interrupt, as they do in IRR.

use lodger_x86::lapic_state::{divide_shift, lvt};

use crate::{Lapic, Now};

/// The timer's input clock at divide-by-1: one count is one nanosecond.
pub const TIMER_HZ: u64 = 1_000_000_000;

/// A periodic timer is served at most once in this many ns, so that a guest cannot keep the host busy with timers.
pub const MIN_PERIOD: u64 = 10_000;

/// When the timer wants [`Lapic::expire`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deadline {
    /// At this guest time in ns.
    Ns(u64),
    /// When RDTSC returns this.
    Tsc(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

fn mode(entry: u32) -> Mode {
    match entry >> 17 & 3 {
        0 => Mode::OneShot,
        1 => Mode::Periodic,
        2 => Mode::TscDeadline,
        _ => Mode::Reserved,
    }
}

impl Lapic {
    fn timer_mode(&self) -> Mode {
        mode(self.state.lvt[lvt::TIMER])
    }

    /// Length of a whole count in ns; below 2^39.
    fn period(&self) -> u64 {
        u64::from(self.state.timer_initial) << divide_shift(self.state.timer_divide)
    }

    /// When the timer next has an effect; `None`: not until it is programmed again.
    pub fn next_deadline(&self) -> Option<Deadline> {
        if self.state.lvt[lvt::TIMER] & lvt::MASKED != 0 || !self.is_enabled() {
            return None;
        }
        match self.timer_mode() {
            Mode::OneShot | Mode::Periodic => {
                (self.state.timer_expiry != 0).then_some(Deadline::Ns(self.state.timer_expiry))
            }
            Mode::TscDeadline => {
                (self.state.tsc_deadline != 0).then_some(Deadline::Tsc(self.state.tsc_deadline))
            }
            Mode::Reserved => None,
        }
    }

    /// Does what the timer has to do by `now`: requests its interrupt, begins the next period. Calling it early or often is harmless.
    pub fn expire(&mut self, now: Now) {
        match self.timer_mode() {
            Mode::OneShot | Mode::Periodic => {
                let expiry = self.state.timer_expiry;
                if expiry == 0 || now.ns < expiry {
                    return;
                }
                let period = self.period();
                let repeats = self.timer_mode() == Mode::Periodic && period != 0;
                self.state.timer_expiry = if repeats {
                    next_in_step(expiry, period, now.ns)
                } else {
                    0
                };
            }
            Mode::TscDeadline => {
                if self.state.tsc_deadline == 0 || now.tsc < self.state.tsc_deadline {
                    return;
                }
                self.state.tsc_deadline = 0;
            }
            Mode::Reserved => return,
        }
        self.local_interrupt(lvt::TIMER);
    }

    /// The current count.
    pub(crate) fn timer_count(&self, now: Now) -> u32 {
        let (expiry, period) = (self.state.timer_expiry, self.period());
        let left = match self.timer_mode() {
            Mode::OneShot => expiry.saturating_sub(now.ns),
            // Between deadlines MIN_PERIOD apart a shorter period goes on counting.
            Mode::Periodic if expiry > now.ns && period != 0 => match (expiry - now.ns) % period {
                0 => period,
                left => left,
            },
            Mode::Periodic if expiry != 0 && period != 0 => period - (now.ns - expiry) % period,
            _ => 0,
        };
        let shift = divide_shift(self.state.timer_divide);
        let count = left.div_ceil(1 << shift);
        count.min(u64::from(self.state.timer_initial)) as u32
    }

    pub(crate) fn write_timer_initial(&mut self, value: u32, now: Now) {
        if matches!(self.timer_mode(), Mode::TscDeadline) {
            return;
        }
        self.expire(now);
        self.state.timer_initial = value;
        self.state.timer_expiry = match value {
            0 => 0,
            _ => now.ns.saturating_add(self.period()),
        };
    }

    pub(crate) fn write_timer_divide(&mut self, value: u32, now: Now) {
        self.expire(now);
        let count = u64::from(self.timer_count(now));
        self.state.timer_divide = value & 0xb;
        if self.state.timer_expiry != 0 {
            let left = count.max(1) << divide_shift(value);
            self.state.timer_expiry = now.ns.saturating_add(left);
        }
    }

    pub(crate) fn write_timer_entry(&mut self, value: u32, now: Now) {
        self.expire(now);
        // Between TSC-deadline and the counting modes the timer is disarmed.
        let deadline = |entry| mode(entry) == Mode::TscDeadline;
        if deadline(value) != deadline(self.state.lvt[lvt::TIMER]) {
            self.state.timer_expiry = 0;
            self.state.timer_initial = 0;
            self.state.tsc_deadline = 0;
        }
        self.state.lvt[lvt::TIMER] = value;
    }

    /// IA32_TSC_DEADLINE; 0 unless the timer is armed in that mode.
    pub(crate) fn tsc_deadline(&self, now: Now) -> u64 {
        match self.timer_mode() {
            Mode::TscDeadline if self.state.tsc_deadline > now.tsc => self.state.tsc_deadline,
            _ => 0,
        }
    }

    pub(crate) fn write_tsc_deadline(&mut self, value: u64, now: Now) {
        if self.timer_mode() == Mode::TscDeadline {
            self.expire(now);
            self.state.tsc_deadline = value;
            self.expire(now);
        }
    }
}

/// The first of `expiry`, `expiry` + `period`, ... that is after `now`, or later so that [`MIN_PERIOD`] passes.
fn next_in_step(expiry: u64, period: u64, now: u64) -> u64 {
    let missed = (now - expiry) / period + 1;
    let next = expiry.saturating_add(missed.saturating_mul(period));
    let earliest = now.saturating_add(MIN_PERIOD);
    match earliest.checked_sub(next) {
        None | Some(0) => next,
        Some(short) => next.saturating_add(short.div_ceil(period).saturating_mul(period)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodger_x86::LapicState;

    fn at(ns: u64) -> Now {
        Now { ns, tsc: ns * 2 }
    }

    fn timer(entry: u32, divide: u32) -> Lapic {
        let mut state = LapicState::reset(0, true);
        state.svr = 0x1ff;
        state.timer_divide = divide;
        state.lvt[lvt::TIMER] = entry;
        Lapic::new(state)
    }

    const ONE_SHOT: u32 = 0x30;
    const PERIODIC: u32 = 0x2_0030;
    const TSC_DEADLINE: u32 = 0x4_0030;

    #[test]
    fn the_divide_configuration_selects_a_power_of_two() {
        for (configuration, divisor) in [
            (0, 2),
            (1, 4),
            (2, 8),
            (3, 16),
            (8, 32),
            (9, 64),
            (10, 128),
            (11, 1),
        ] {
            assert_eq!(1 << divide_shift(configuration), divisor, "{configuration}");
        }
    }

    #[test]
    fn one_shot_counts_down_and_fires_once() {
        let mut t = timer(ONE_SHOT, 3);
        t.write_timer_initial(1000, at(500));
        assert_eq!(t.next_deadline(), Some(Deadline::Ns(16_500)));
        for (ns, count) in [(500, 1000), (516, 999), (517, 999), (16_499, 1)] {
            assert_eq!(t.timer_count(at(ns)), count, "at {ns}");
        }
        t.expire(at(16_499));
        assert_eq!(t.pending(), None);
        t.expire(at(16_500));
        assert_eq!((t.acknowledge(), t.next_deadline()), (Some(0x30), None));
        assert_eq!(t.timer_count(at(20_000)), 0);
        t.eoi();
        t.expire(at(40_000));
        assert_eq!(t.pending(), None);
    }

    #[test]
    fn periodic_keeps_step_and_merges_missed_periods() {
        let mut t = timer(PERIODIC, 11);
        t.write_timer_initial(1_000_000, at(0));
        for (now, next) in [
            (1_000_000, 2_000_000),
            (2_300_000, 3_000_000),
            (7_999_999, 8_000_000 + 1_000_000),
            (9_000_000, 10_000_000),
        ] {
            t.expire(at(now));
            assert_eq!(t.next_deadline(), Some(Deadline::Ns(next)), "at {now}");
            assert_eq!((t.acknowledge(), t.acknowledge()), (Some(0x30), None));
            t.eoi();
        }
        assert_eq!(t.timer_count(at(9_250_000)), 750_000);
    }

    #[test]
    fn a_tiny_period_does_not_flood() {
        for (initial, now) in [(1, 1), (3, 7), (9_999, 50_000), (1, u64::MAX - 5)] {
            let mut t = timer(PERIODIC, 11);
            t.write_timer_initial(initial, at(0));
            t.expire(Now { ns: now, tsc: 0 });
            let Some(Deadline::Ns(next)) = t.next_deadline() else {
                panic!("disarmed")
            };
            assert!(
                next >= now.saturating_add(MIN_PERIOD),
                "{initial} at {now}: {next}"
            );
            assert!(t.timer_count(Now { ns: now, tsc: 0 }) <= initial);
        }
    }

    #[test]
    fn the_tsc_deadline_fires_at_its_time_or_at_once() {
        let mut t = timer(TSC_DEADLINE, 0);
        t.write_tsc_deadline(2_000, at(0));
        assert_eq!(t.next_deadline(), Some(Deadline::Tsc(2_000)));
        assert_eq!(t.tsc_deadline(at(0)), 2_000);
        t.expire(at(999));
        assert_eq!(t.pending(), None);
        t.expire(at(1_000));
        assert_eq!(
            (t.acknowledge(), t.tsc_deadline(at(1_000))),
            (Some(0x30), 0)
        );
        t.eoi();
        t.write_tsc_deadline(1_000, at(1_000));
        assert_eq!((t.acknowledge(), t.next_deadline()), (Some(0x30), None));
        t.eoi();
        t.write_tsc_deadline(9_000, at(1_000));
        t.write_tsc_deadline(0, at(1_000));
        assert_eq!(t.next_deadline(), None);
    }

    #[test]
    fn changing_the_mode_or_divisor_in_mid_count() {
        let mut t = timer(ONE_SHOT, 11);
        t.write_tsc_deadline(5_000, at(0));
        assert_eq!(t.next_deadline(), None, "not in that mode");
        t.write_timer_initial(1_000, at(0));
        t.write_timer_divide(0, at(400));
        assert_eq!(t.next_deadline(), Some(Deadline::Ns(400 + 600 * 2)));
        t.write_timer_entry(TSC_DEADLINE, at(500));
        assert_eq!((t.next_deadline(), t.timer_count(at(500))), (None, 0));
        t.write_timer_initial(7, at(500));
        assert_eq!(t.next_deadline(), None, "ignored in TSC-deadline mode");
    }

    #[test]
    fn a_count_that_ends_while_masked_is_lost() {
        let mut t = timer(ONE_SHOT | lvt::MASKED, 11);
        t.write_timer_initial(1_000, at(0));
        assert_eq!(t.next_deadline(), None);
        assert_eq!(t.timer_count(at(400)), 600);
        t.write_timer_entry(ONE_SHOT, at(2_000));
        t.expire(at(3_000));
        assert_eq!(t.pending(), None);
    }
}
