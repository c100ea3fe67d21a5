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
                "w 43 34; w 40 e8; w 40 03; edges 0 = 1; ticks 999; edges 0 = 0; r 40 = 01; r 40 = 00;
                 ticks 1; edges 0 = 1; r 40 = e8; r 40 = 03; ticks 3500; edges 0 = 3; irq 0 = 1; t 1s;
                 edges 0 = 1193",
            ),
            (
                "mode 0 interrupts once; a new count starts it anew",
                "w 43 30; irq 0 = 0; w 40 0a; w 40 00; ticks 9; irq 0 = 0; ticks 1; irq 0 = 1; r 40 = 00;
                 r 40 = 00; ticks 1; r 40 = ff; r 40 = ff; t 1s; edges 0 = 1; w 40 05; irq 0 = 0; t 1s;
                 irq 0 = 0; w 40 00; ticks 5; edges 0 = 1",
            ),
            (
                "mode 3 counts by two and interrupts once a period; no count at all is 65536",
                "w 43 36; w 40 00; w 40 00; ticks 3; r 40 = fa; r 40 = ff; edges 0 = 1; ticks 65532;
                 edges 0 = 0; ticks 1; edges 0 = 1",
            ),
            (
                "a new count of a running period waits for the end of it",
                "w 43 34; w 40 0a; w 40 00; ticks 5; w 40 14; w 40 00; w 43 e2; r 40 = f4; edges 0 = 1;
                 ticks 5; edges 0 = 1; w 43 e2; r 40 = b4; ticks 19; edges 0 = 0; ticks 1; edges 0 = 1",
            ),
            (
                "modes 4 and 1 on channel 0: a strobe, and a trigger that never comes",
                "w 43 18; w 40 03; edges 0 = 1; ticks 3; edges 0 = 0; ticks 1; edges 0 = 1; t 1s;
                 edges 0 = 0; w 43 12; w 40 03; t 1s; edges 0 = 0",
            ),
            (
                "latches hold, the first one counts, and status comes before count",
                "w 43 34; w 40 64; w 40 00; ticks 10; w 43 00; ticks 10; w 43 00; w 43 c2; r 40 = b4;
                 r 40 = 5a; r 40 = 00; r 40 = 50",
            ),
            (
                "read-back of several channels; the control word itself cannot be read",
                "w 43 94; w 42 10; w 43 54; w 41 20; w 43 ec; r 41 = 94; r 42 = d4; r 43 = ff; w 43 ee;
                 r 40 = f6",
            ),
            (
                "one-byte access",
                "w 43 14; w 40 20; ticks 1; r 40 = 1f; r 40 = 1f; w 43 24; w 40 02; ticks 1; r 40 = 01",
            ),
            (
                "decimal counting, and digits that are none",
                "w 43 35; w 40 00; w 40 10; ticks 1; r 40 = 99; r 40 = 09; w 43 31; w 40 00; w 40 00;
                 ticks 1; r 40 = 99; r 40 = 99; w 43 35; w 40 ff; w 40 ff; t 1s; r 40 = ..; r 40 = ..",
            ),
            (
                "Linux calibrates with channel 2 in mode 0, gated by port B",
                "w 61 01; r 61 = .1; w 43 b0; w 42 ff; w 42 ff; ticks 256; r 42 = ff; r 42 = fe; r 61 = .1;
                 out2 = 0; ticks 65279; r 61 = .1; out2 = 1; w 61 00; w 43 b0; w 42 10; w 42 00; ticks 100;
                 r 42 = 10; r 42 = 00; w 61 01; ticks 8; w 61 00; ticks 50; r 42 = 08; r 42 = 00; r 61 = .0;
                 out2 = 0; w 61 01; ticks 8; r 61 = .1; out2 = 1",
            ),
            (
                "one-shots and strobes by gate",
                "w 43 b2; w 42 05; w 42 00; t 0ns; r 61 = .0; out2 = 1; w 61 01; r 61 = .1; out2 = 0;
                 ticks 4; r 61 = .1; out2 = 0; w 61 00; w 61 01; ticks 4; r 61 = .1; out2 = 0; ticks 1;
                 r 61 = .1; out2 = 1; w 43 ba; w 42 05; w 42 00; w 61 00; w 61 01; ticks 5; r 61 = .1;
                 out2 = 0; ticks 1; r 61 = .1; out2 = 1",
            ),
            (
                "the square wave rests high while the gate is low",
                "w 43 b6; w 42 0a; w 42 00; r 61 = .0; out2 = 1; w 61 03; ticks 4; r 61 = .3; out2 = 1;
                 ticks 1; r 61 = .3; out2 = 0; w 61 00; r 61 = .0; out2 = 1; w 61 01; r 61 = .1; out2 = 1",
            ),
            (
                "the refresh toggle",
                "r 61 = 20; t 15085ns; r 61 = 30; t 15085ns; r 61 = 20; w 61 fe; r 61 = 2e",
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
        run(&rig, "w 43 34; w 40 e8; w 40 03; edges 0 = 1");
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
        run(&rig, "w 43 14; w 40 01; t 1s");
        assert!(rig.lines.take_edges(0) <= 50_001);
    }

    #[test]
    fn state_survives() {
        let (rig, pit) = rig();
        run(
            &rig,
            "w 43 34; w 40 e8; w 40 03; w 61 03; w 43 b6; w 42 10; ticks 10; w 43 c6; edges 0 = 1",
        );
        assert_round_trip(&*pit);
        run(
            &rig,
            "edges 0 = 0; irq 0 = 1; r 40 = b4; r 40 = de; r 40 = 03; w 42 00; ticks 990; edges 0 = 1;
             r 42 = 04; r 42 = 00",
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
