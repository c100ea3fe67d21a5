//! The interval timer: [`pit8254`](crate::pit8254) joined to the clock and to interrupt line 0, with system
//! control port B.

use std::sync::{Arc, Mutex, MutexGuard};

use lodger_address_space::BusTarget;
use lodger_clock::SharedClock;
use lodger_device_model::{Device, IrqLine, Payload, RestoreError};

use crate::alarm::Alarm;
use crate::pit8254::{Pit8254, saved};
use crate::rate::{MIN_INTERVAL, Rate};

/// The I/O ports of the counters and of the control word.
pub const PIT_PORT: u16 = 0x40;
/// Length of that block.
pub const PIT_LEN: u64 = 4;
/// System control port B: gate and output of channel 2, refresh toggle. One port.
pub const PORT_B: u16 = 0x61;
/// The interrupt line of channel 0 (at an IOAPIC, conventionally input 2).
pub const PIT_IRQ: u32 = 0;
/// The timer's input clock.
pub const PIT_HZ: u32 = 1_193_182;

const RATE: Rate = Rate(PIT_HZ);
/// Half a period of the refresh toggle: software times short delays by it (15.085 us, from channel 1 of the PC/AT).
const REFRESH_TOGGLE: u64 = 15_085;
const KIND: &str = "pit8254";

/// The interval timer. Interrupts that were missed because the host was slow are made up for, but only a few.
pub struct Pit {
    // Runtime glue.
    clock: SharedClock,
    irq: IrqLine,
    alarm: Alarm,

    // Volatile state.
    registers: Mutex<Pit8254>,
}

struct PortB(Arc<Pit>);

impl Pit {
    /// A timer after power-on; channel 0 drives `irq`.
    pub fn new(clock: SharedClock, irq: IrqLine) -> Arc<Pit> {
        Arc::new_cyclic(|weak| Pit {
            alarm: Alarm::new(&clock, weak, Pit::ring),
            clock,
            irq,
            registers: Mutex::new(Pit8254::new()),
        })
    }

    /// System control port B, conventionally at [`PORT_B`].
    pub fn port_b(self: &Arc<Self>) -> Arc<dyn BusTarget> {
        Arc::new(PortB(Arc::clone(self)))
    }

    fn lock(&self) -> MutexGuard<'_, Pit8254> {
        self.registers.lock().expect("a user of the PIT panicked")
    }

    fn access<R>(&self, act: impl FnOnce(&mut Pit8254, u64) -> R) -> R {
        let mut registers = self.lock();
        let now = self.clock.now();
        let tick = RATE.ticks(now);
        registers.catch_up(tick);
        let result = act(&mut registers, tick);
        self.irq.set(registers.irq());
        self.rearm(&registers, now);
        result
    }

    fn ring(&self) {
        let mut registers = self.lock();
        self.alarm.rung();
        let now = self.clock.now();
        let tick = RATE.ticks(now);
        registers.catch_up(tick);
        if registers.take_rise(tick) {
            self.irq.set(false);
            self.irq.set(true);
        }
        let next = registers.next_rise().map(|rise| RATE.moment(rise));
        self.alarm.set(next.map(|at| at.max(now + MIN_INTERVAL)));
    }

    /// After an access: the alarm keeps the pace that `ring` gave it, unless the next rise has moved.
    fn rearm(&self, registers: &Pit8254, now: u64) {
        match registers.next_rise().map(|rise| RATE.moment(rise)) {
            // What is overdue has its alarm already.
            Some(at) if at <= now => {}
            next => self.alarm.set(next),
        }
    }
}

impl BusTarget for Pit {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            *byte = self.access(|r, tick| r.read(port, tick));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, &byte) in (offset..).zip(data) {
            self.access(|r, tick| r.write(port, byte, tick));
        }
    }
}

impl BusTarget for PortB {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let refresh = self.0.clock.now() / REFRESH_TOGGLE % 2 == 1;
        data.fill(self.0.access(|r, tick| r.read_port_b(tick, refresh)));
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if let Some(&value) = data.first() {
            self.0.access(|r, tick| r.write_port_b(value, tick));
        }
    }
}

impl Device for Pit {
    fn name(&self) -> &str {
        "pit"
    }

    fn reset(&self) {
        self.access(|registers, _| *registers = Pit8254::new());
    }

    fn save(&self) -> Payload {
        Payload::encode(KIND, 1, &self.lock().save())
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved: saved::V1 = payload.decode(KIND, 1)?;
        let restored = Pit8254::restore(saved).ok_or_else(|| RestoreError::Damaged {
            kind: KIND,
            why: "a counter is in a state that it cannot have".into(),
        })?;
        let mut registers = self.lock();
        *registers = restored;
        self.irq.import(registers.irq());
        self.alarm
            .set(registers.next_rise().map(|rise| RATE.moment(rise)));
        Ok(())
    }

    fn as_pio(&self) -> Option<&dyn BusTarget> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rig;
    use lodger_clock::Clock;
    use lodger_device_model::assert_round_trip;

    fn rig() -> (Rig, Arc<Pit>) {
        let rig = Rig::new();
        let pit = Pit::new(rig.clock.clone(), rig.line(0));
        let ports = &rig.space.ports;
        ports
            .map(PIT_PORT.into(), PIT_LEN, pit.clone() as _)
            .unwrap();
        ports.map(PORT_B.into(), 1, pit.port_b()).unwrap();
        (rig, pit)
    }

    /// Words: `ticks N` lets N ticks of the timer pass, `out2` is bit 5 of port B.
    fn run(rig: &Rig, script: &str) {
        rig.run_with(script, |words| {
            if words[0] == "out2" {
                let mut port_b = [0];
                rig.space.ports.read(PORT_B.into(), &mut port_b);
                return (port_b[0] >> 5 & 1).to_string();
            }
            assert_eq!(words[0], "ticks");
            let now = rig.clock.now();
            let target = RATE.ticks(now) + words[1].parse::<u64>().unwrap();
            rig.clock.advance(RATE.moment(target) - now);
            String::new()
        });
    }

    #[test]
    fn register_scripts() {
        for (what, script) in [
            (
                "mode 2 interrupts once a period, and reading does not disturb it",
                "w 43 34 \n w 40 e8 \n w 40 03 \n edges 0 = 1 \n ticks 999 \n edges 0 = 0 \n r 40 = 01 \n r 40 = 00 \n ticks 1 \n edges 0 = 1 \n
                 r 40 = e8 \n r 40 = 03 \n ticks 3500 \n edges 0 = 3 \n irq 0 = 1 \n t 1s \n edges 0 = 1193",
            ),
            (
                "mode 0 interrupts once; a new count starts it anew",
                "w 43 30 \n irq 0 = 0 \n w 40 0a \n w 40 00 \n ticks 9 \n irq 0 = 0 \n ticks 1 \n irq 0 = 1 \n r 40 = 00 \n r 40 = 00 \n ticks 1 \n
                 r 40 = ff \n r 40 = ff \n t 1s \n edges 0 = 1 \n w 40 05 \n irq 0 = 0 \n t 1s \n irq 0 = 0 \n w 40 00 \n ticks 5 \n edges 0 = 1",
            ),
            (
                "mode 3 counts by two and interrupts once a period; no count at all is 65536",
                "w 43 36 \n w 40 00 \n w 40 00 \n ticks 3 \n r 40 = fa \n r 40 = ff \n edges 0 = 1 \n ticks 65532 \n edges 0 = 0 \n ticks 1 \n edges 0 = 1",
            ),
            (
                "a new count of a running period waits for the end of it",
                "w 43 34 \n w 40 0a \n w 40 00 \n ticks 5 \n w 40 14 \n w 40 00 \n w 43 e2 \n r 40 = f4 \n edges 0 = 1 \n ticks 5 \n edges 0 = 1 \n
                 w 43 e2 \n r 40 = b4 \n ticks 19 \n edges 0 = 0 \n ticks 1 \n edges 0 = 1",
            ),
            (
                "modes 4 and 1 on channel 0: a strobe, and a trigger that never comes",
                "w 43 18 \n w 40 03 \n edges 0 = 1 \n ticks 3 \n edges 0 = 0 \n ticks 1 \n edges 0 = 1 \n t 1s \n edges 0 = 0 \n w 43 12 \n w 40 03 \n
                 t 1s \n edges 0 = 0",
            ),
            (
                "latches hold, the first one counts, and status comes before count",
                "w 43 34 \n w 40 64 \n w 40 00 \n ticks 10 \n w 43 00 \n ticks 10 \n w 43 00 \n w 43 c2 \n r 40 = b4 \n r 40 = 5a \n r 40 = 00 \n r 40 = 50",
            ),
            (
                "read-back of several channels; the control word itself cannot be read",
                "w 43 94 \n w 42 10 \n w 43 54 \n w 41 20 \n w 43 ec \n r 41 = 94 \n r 42 = d4 \n r 43 = ff \n w 43 ee \n r 40 = f6",
            ),
            (
                "one-byte access",
                "w 43 14 \n w 40 20 \n ticks 1 \n r 40 = 1f \n r 40 = 1f \n w 43 24 \n w 40 02 \n ticks 1 \n r 40 = 01",
            ),
            (
                "decimal counting, and digits that are none",
                "w 43 35 \n w 40 00 \n w 40 10 \n ticks 1 \n r 40 = 99 \n r 40 = 09 \n w 43 31 \n w 40 00 \n w 40 00 \n ticks 1 \n r 40 = 99 \n r 40 = 99 \n
                 w 43 35 \n w 40 ff \n w 40 ff \n t 1s \n r 40 = .. \n r 40 = ..",
            ),
            (
                "Linux calibrates with channel 2 in mode 0, gated by port B",
                "w 61 01 \n r 61 = .1 \n w 43 b0 \n w 42 ff \n w 42 ff \n ticks 256 \n r 42 = ff \n r 42 = fe \n r 61 = .1 \n out2 = 0 \n ticks 65279 \n r 61 = .1 \n out2 = 1 \n
                 w 61 00 \n w 43 b0 \n w 42 10 \n w 42 00 \n ticks 100 \n r 42 = 10 \n r 42 = 00 \n w 61 01 \n ticks 8 \n w 61 00 \n ticks 50 \n r 42 = 08 \n
                 r 42 = 00 \n r 61 = .0 \n out2 = 0 \n w 61 01 \n ticks 8 \n r 61 = .1 \n out2 = 1",
            ),
            (
                "one-shots and strobes by gate",
                "w 43 b2 \n w 42 05 \n w 42 00 \n t 0ns \n r 61 = .0 \n out2 = 1 \n w 61 01 \n r 61 = .1 \n out2 = 0 \n ticks 4 \n r 61 = .1 \n out2 = 0 \n w 61 00 \n w 61 01 \n ticks 4 \n
                 r 61 = .1 \n out2 = 0 \n ticks 1 \n r 61 = .1 \n out2 = 1 \n w 43 ba \n w 42 05 \n w 42 00 \n w 61 00 \n w 61 01 \n ticks 5 \n r 61 = .1 \n out2 = 0 \n ticks 1 \n r 61 = .1 \n out2 = 1",
            ),
            (
                "the square wave rests high while the gate is low",
                "w 43 b6 \n w 42 0a \n w 42 00 \n r 61 = .0 \n out2 = 1 \n w 61 03 \n ticks 4 \n r 61 = .3 \n out2 = 1 \n ticks 1 \n r 61 = .3 \n out2 = 0 \n w 61 00 \n r 61 = .0 \n out2 = 1 \n w 61 01 \n r 61 = .1 \n out2 = 1",
            ),
            (
                "the refresh toggle",
                "r 61 = 20 \n t 15085ns \n r 61 = 30 \n t 15085ns \n r 61 = 20 \n w 61 fe \n r 61 = 2e",
            ),
        ] {
            let (rig, _pit) = rig();
            println!("{what}");
            run(&rig, script);
        }
    }

    #[test]
    fn a_slow_host_makes_up_for_a_few_interrupts_only() {
        let (rig, _pit) = rig();
        run(&rig, "w 43 34 \n w 40 e8 \n w 40 03 \n edges 0 = 1");
        // The clock leaps, as after a stall of the host: 1000 periods are overdue.
        rig.clock.pause();
        rig.clock.set_now(1_000_000_000);
        rig.clock.resume();
        rig.clock.advance(0);
        assert_eq!(rig.lines.take_edges(0), 1);
        rig.clock.advance(400_000);
        let made_up = rig.lines.take_edges(0);
        assert!((5..=11).contains(&made_up), "{made_up}");
        rig.clock.advance(1_000_000_000);
        assert!((1192..=1194).contains(&rig.lines.take_edges(0)));
    }

    #[test]
    fn a_guest_cannot_have_more_interrupts_than_the_host_can_bear() {
        let (rig, _pit) = rig();
        run(&rig, "w 43 14 \n w 40 01 \n t 1s");
        assert!(rig.lines.take_edges(0) <= 50_001);
    }

    #[test]
    fn state_survives() {
        let (rig, pit) = rig();
        run(
            &rig,
            "w 43 34 \n w 40 e8 \n w 40 03 \n w 61 03 \n w 43 b6 \n w 42 10 \n ticks 10 \n w 43 c6 \n edges 0 = 1",
        );
        assert_round_trip(&*pit);
        run(
            &rig,
            "edges 0 = 0 \n irq 0 = 1 \n r 40 = b4 \n r 40 = de \n r 40 = 03 \n w 42 00 \n ticks 990 \n edges 0 = 1 \n r 42 = 04 \n r 42 = 00",
        );
    }

    #[test]
    fn a_saved_state_that_cannot_be_is_refused() {
        let (_rig, pit) = rig();
        let mut bad = pit.save();
        bad.bytes[0] = 6;
        assert!(pit.restore(&bad).is_err());
    }

    #[test]
    fn hostile_accesses() {
        let (rig, pit) = rig();
        rig.hammer(&[(0x40, 4), (0x61, 1)], &[], &[&*pit]);
    }
}
