//! The high precision event timer: [`hpet_registers`](crate::hpet_registers) joined to the clock and to
//! interrupt lines.
//!
//! With legacy replacement its timers 0 and 1 take the place of the PIT and of the RTC. So the lines of those
//! two run through this device: it is their [`IrqSink`], and its own legacy outputs go to the interrupt
//! controllers.

use std::sync::{Arc, Mutex, MutexGuard};

use lodger_address_space::BusTarget;
use lodger_clock::SharedClock;
use lodger_device_model::{Device, IrqLine, IrqSink, Msi, MsiTarget, Payload, RestoreError};

use crate::alarm::Alarm;
use crate::hpet_registers::{Abilities, Destination, HZ, HpetRegisters, TIMERS, saved};
use crate::rate::Rate;
use crate::split;

/// Guest-physical address of the registers.
pub const HPET_BASE: u64 = 0xfed0_0000;
/// Length of the block of registers.
pub const HPET_LEN: u64 = 0x400;
/// The line of the HPET, as a sink, that the PIT drives.
pub const HPET_PIT_LINE: u32 = 0;
/// The line of the HPET, as a sink, that the RTC drives.
pub const HPET_RTC_LINE: u32 = 8;

const RATE: Rate = Rate(HZ);
const KIND: &str = "hpet";

/// How an [`Hpet`] is made.
#[derive(Default)]
pub struct HpetConfig {
    /// Takes messages, if timers are to be able to send them (FSB delivery).
    pub messages: Option<Arc<dyn MsiTarget>>,
}

/// The lines that an [`Hpet`] drives.
pub struct HpetLines {
    /// Interrupt 0: the PIT's, or timer 0's under legacy replacement (at an IOAPIC, conventionally input 2).
    pub pit: IrqLine,
    /// Interrupt 8: the RTC's, or timer 1's under legacy replacement.
    pub rtc: IrqLine,
    /// IOAPIC inputs (0 to 31) that timers can be routed to, with their lines.
    pub routes: Vec<(u32, IrqLine)>,
}

/// A high precision event timer.
pub struct Hpet {
    // Fixed configuration.
    abilities: Abilities,

    // Runtime glue.
    clock: SharedClock,
    lines: HpetLines,
    messages: Option<Arc<dyn MsiTarget>>,
    alarm: Alarm,

    // Volatile state.
    state: Mutex<State>,
}

struct State {
    registers: HpetRegisters,
    /// The levels that the PIT and the RTC drive; saved by them.
    pit: bool,
    rtc: bool,
}

impl Hpet {
    /// A timer after power-on.
    pub fn new(config: HpetConfig, clock: SharedClock, lines: HpetLines) -> Arc<Hpet> {
        let numbers = lines.routes.iter().map(|(number, _)| *number);
        let abilities = Abilities {
            routes: numbers.fold(0, |mask, n| mask | 1_u32.checked_shl(n).unwrap_or(0)),
            messages: config.messages.is_some(),
        };
        Arc::new_cyclic(|weak| Hpet {
            abilities,
            alarm: Alarm::new(&clock, weak, Hpet::ring),
            clock,
            lines,
            messages: config.messages,
            state: Mutex::new(State {
                registers: HpetRegisters::new(abilities),
                pit: false,
                rtc: false,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a user of the HPET panicked")
    }

    fn access<R>(&self, act: impl FnOnce(&mut HpetRegisters, u64) -> R) -> R {
        let mut state = self.lock();
        let tick = RATE.ticks(self.clock.now());
        let registers = &mut state.registers;
        registers.catch_up(tick, |r, number| self.send_edge(r, number));
        let result = act(registers, tick);
        // What was programmed for now or earlier fires within this access.
        registers.catch_up(tick, |r, number| self.send_edge(r, number));
        self.drive(&state, IrqLine::set);
        self.alarm
            .set(state.registers.deadline().map(|t| RATE.moment(t)));
        result
    }

    fn ring(&self) {
        self.access(|_, _| self.alarm.rung());
    }

    /// An edge of timer `number`.
    fn send_edge(&self, registers: &HpetRegisters, number: usize) {
        match registers.destination(number) {
            Destination::Message { address, data } => {
                if let Some(target) = &self.messages {
                    target.send(Msi { address, data });
                }
            }
            Destination::Legacy if number == 0 => self.lines.pit.pulse(),
            Destination::Legacy => self.lines.rtc.pulse(),
            Destination::Line(wanted) => {
                let mut routes = self.lines.routes.iter();
                if let Some((_, line)) = routes.find(|(n, _)| *n == wanted) {
                    line.pulse();
                }
            }
        }
    }

    /// Gives every line its level by `set`.
    fn drive(&self, state: &State, set: fn(&IrqLine, bool)) {
        let registers = &state.registers;
        let held = |destination| {
            (0..TIMERS).any(|n| registers.level(n) && registers.destination(n) == destination)
        };
        if registers.legacy() {
            let legacy = |n| registers.level(n) && registers.destination(n) == Destination::Legacy;
            set(&self.lines.pit, legacy(0));
            set(&self.lines.rtc, legacy(1));
        } else {
            set(&self.lines.pit, state.pit);
            set(&self.lines.rtc, state.rtc);
        }
        for (number, line) in &self.lines.routes {
            set(line, held(Destination::Line(*number)));
        }
    }

    /// The PIT or the RTC drives its line.
    fn input(&self, line: u32, level: bool, set: fn(&IrqLine, bool)) {
        let mut state = self.lock();
        match line {
            HPET_PIT_LINE => state.pit = level,
            HPET_RTC_LINE => state.rtc = level,
            _ => return,
        }
        if !state.registers.legacy() {
            match line {
                HPET_PIT_LINE => set(&self.lines.pit, level),
                _ => set(&self.lines.rtc, level),
            }
        }
    }
}

impl IrqSink for Hpet {
    fn set(&self, line: u32, level: bool) {
        self.input(line, level, IrqLine::set);
    }

    fn import(&self, line: u32, level: bool) {
        self.input(line, level, IrqLine::import);
    }
}

impl BusTarget for Hpet {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.access(|r, tick| {
            split::read(offset, data, |at| r.read(at, tick).to_le_bytes());
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.access(|r, tick| {
            split::write(offset, data, |at, value, mask| {
                let [value, mask] = [value, mask].map(u64::from_le_bytes);
                r.write(at, value, mask, tick);
            });
        });
    }
}

impl Device for Hpet {
    fn name(&self) -> &str {
        "hpet"
    }

    fn reset(&self) {
        self.access(|registers, _| *registers = HpetRegisters::new(self.abilities));
    }

    fn save(&self) -> Payload {
        let State {
            registers,
            pit: _,
            rtc: _,
        } = &*self.lock();
        Payload::encode(KIND, 1, &registers.save())
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved: saved::V1 = payload.decode(KIND, 1)?;
        let mut state = self.lock();
        state.registers = HpetRegisters::restore(self.abilities, saved);
        self.drive(&state, IrqLine::import);
        self.alarm
            .set(state.registers.deadline().map(|t| RATE.moment(t)));
        Ok(())
    }

    fn as_mmio(&self) -> Option<&dyn BusTarget> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rig;
    use lodger_device_model::assert_round_trip;

    /// The legacy outputs are lines 0 and 8; timers can go to 16 and 17.
    fn rig(messages: bool) -> (Rig, Arc<Hpet>) {
        let rig = Rig::new();
        let lines = HpetLines {
            pit: rig.line(0),
            rtc: rig.line(8),
            routes: vec![(16, rig.line(16)), (17, rig.line(17))],
        };
        let config = HpetConfig {
            messages: messages.then(|| rig.records.clone() as _),
        };
        let hpet = Hpet::new(config, rig.clock.clone(), lines);
        let mmio = &rig.space.mmio;
        mmio.map(HPET_BASE, HPET_LEN, hpet.clone() as _).unwrap();
        (rig, hpet)
    }

    /// Words: `pit LEVEL`, `rtc LEVEL`, and `sent`: the messages since the last time as ADDRESS:DATA.
    fn run(rig: &Rig, hpet: &Hpet, script: &str) {
        rig.run_with(script, |words| {
            match words[0] {
                "pit" => hpet.set(HPET_PIT_LINE, words[1] == "1"),
                "rtc" => hpet.set(HPET_RTC_LINE, words[1] == "1"),
                "sent" => {
                    let sent = rig.take_messages();
                    let sent = sent.iter().map(|m| format!("{:x}:{:x}", m.address, m.data));
                    return sent.collect::<Vec<_>>().join(" ");
                }
                other => panic!("{other}"),
            }
            String::new()
        });
    }

    #[test]
    fn register_scripts() {
        for (what, messages, script) in [
            (
                "capabilities: 10 ns, three timers, the first periodic",
                false,
                "R fed00000 = 00989680_8086a201; R fed00004 = 00989680; R fed00100 = 00030000_00000030;
                 R fed00120 = 00030000_00000020; R fed00140 = 00030000_00000020; R fed00160 = 00000000;
                 R fed00008 = 00000000_00000000; W fed00100 ffffffff_ffffffff;
                 R fed00100 = 00030000_0000013e; W fed00120 00002104; R fed00120 = 00030000_00002124;
                 W fed00120 00000204; R fed00120 = 00030000_00002024; W fed00110 ffffffff;
                 R fed00110 = 00000000",
            ),
            (
                "the counter stands, runs, stands and can be set while it stands",
                false,
                "t 1ms; R fed000f0 = 00000000_00000000; W fed00010 01; t 1ms;
                 R fed000f0 = 00000000_000186a0; W fed000f0 00000000; R fed000f2 = 0001; t 10ns;
                 W fed00010 00000000; t 1ms; R fed000f0 = 000186a1; W fed000f4 00000005; W fed00010 01;
                 t 20ns; R fed000f0 = 00000005_000186a3",
            ),
            (
                "a one-shot edge, and none while interrupts are off",
                false,
                "W fed00140 00002004; W fed00010 01; W fed00148 00000000_000003e8; t 9990ns; edges 16 = 0;
                 t 10ns; edges 16 = 1; irq 16 = 0; t 1s; edges 16 = 0; W fed00140 00002000;
                 W fed00148 00000000_05f5e500; t 1s; edges 16 = 0; R fed00020 = 00000000",
            ),
            (
                "a comparator set a little in the past fires at once, one far in the past never",
                false,
                "W fed00140 00002004; W fed00010 01; t 2s; W fed00148 00000000_0bebc1f0; edges 16 = 1; t 1s;
                 edges 16 = 0; W fed00148 00000000_00000100; t 100s; edges 16 = 0",
            ),
            (
                "32 bits: the comparator matches every 43 seconds",
                false,
                "W fed00140 00002104; W fed00010 01; W fed00148 00000000_00000100;
                 R fed00148 = 00000000_00000100; t 1s; edges 16 = 1; t 41s; edges 16 = 0; t 1s;
                 edges 16 = 1; t 43s; edges 16 = 1; W fed00148 11111111_22222222;
                 R fed00148 = 00000000_22222222",
            ),
            (
                "periodic as the specification says: VAL_SET sets comparator and period",
                false,
                "W fed00100 0000204c; W fed00108 00000000_00002710; R fed00100 = 00030000_0000203c;
                 W fed00010 01; t 1ms; edges 16 = 10; R fed00108 = 00000000_0001adb0; t 1s; edges 16 = 10000",
            ),
            (
                "periodic as Linux does it: the first time, then the period",
                false,
                "W fed00010 03; t 1s; W fed00100 0000014c; W fed00108 05f5e500; t 5us; W fed00108 00002710;
                 edges 0 = 0; t 10us; edges 0 = 1; t 100us; edges 0 = 1; t 100us; edges 0 = 1",
            ),
            (
                "a level stays until its status is cleared",
                false,
                "W fed00140 00002206; W fed00148 00000000_00000064; W fed00010 01; t 1us; irq 17 = 1;
                 R fed00020 = 00000004; W fed00020 00000003; irq 17 = 1; W fed00140 00002202; irq 17 = 0;
                 W fed00140 00002206; irq 17 = 1; W fed00010 00000000; irq 17 = 0; W fed00010 01;
                 irq 17 = 1; W fed00020 04; irq 17 = 0",
            ),
            (
                "without legacy replacement the PIT and the RTC come through; with it the timers do",
                false,
                "pit 1; irq 0 = 1; pit 0; irq 0 = 0; pit 1; edges 0 = 2; rtc 1; irq 8 = 1;
                 W fed00100 00000004; W fed00120 00000006; W fed00108 00000000_00000064;
                 W fed00128 00000000_000000c8; W fed00010 00000003; irq 0 = 0; irq 8 = 0; pit 0; pit 1;
                 edges 0 = 0; t 1us; edges 0 = 1; t 1us; irq 8 = 1; W fed00020 02; irq 8 = 0; W fed00010 01;
                 irq 0 = 1; irq 8 = 1",
            ),
            (
                "messages",
                true,
                "W fed00140 00004006; R fed00140 = 00030000_0000c026; W fed00150 fee01000_00004055;
                 W fed00148 00000000_00000064; W fed00010 01; t 1us; sent = fee01000:4055;
                 R fed00020 = 00000000; edges 16 = 0",
            ),
        ] {
            let (rig, hpet) = rig(messages);
            println!("{what}");
            run(&rig, &hpet, script);
        }
    }

    #[test]
    fn a_guest_cannot_have_more_interrupts_than_the_host_can_bear() {
        let (rig, hpet) = rig(false);
        run(
            &rig,
            &hpet,
            "W fed00100 0000204c; W fed00108 01; W fed00010 01; t 1s",
        );
        assert!(rig.lines.take_edges(16) <= 50_002);
    }

    #[test]
    fn state_survives() {
        let (rig, hpet) = rig(true);
        run(
            &rig,
            &hpet,
            "W fed00010 01; W fed00100 0000204c; W fed00108 00000000_00002710; W fed00120 00002206;
             W fed00128 00000000_00000064; W fed00150 fee01000_00004055; t 150us; edges 17 = 1;
             edges 16 = 1; rtc 1",
        );
        assert_round_trip(&*hpet);
        run(
            &rig,
            &hpet,
            "edges 17 = 0; irq 17 = 1; irq 8 = 1; edges 16 = 0; R fed00150 = fee01000_00004055; t 50us;
             edges 16 = 1; W fed00020 02; irq 17 = 0; R fed000f0 = 00000000_00004e20",
        );
    }

    #[test]
    fn hostile_accesses() {
        let (rig, hpet) = rig(true);
        rig.hammer(&[], &[(HPET_BASE, 0x180)], &[&*hpet]);
        let (rig, hpet) = self::rig(false);
        for block in [0x10, 0xf0, 0x100, 0x108, 0x120, 0x148] {
            rig.hammer(
                &[],
                &[(HPET_BASE + block, 8), (HPET_BASE + 0x10, 1)],
                &[&*hpet],
            );
        }
    }
}
