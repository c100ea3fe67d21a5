//! The real-time clock and CMOS memory: [`mc146818`](crate::mc146818) joined to the clock and to interrupt line 8.

use std::sync::{Arc, Mutex, MutexGuard};

use lodger_address_space::BusTarget;
use lodger_clock::SharedClock;
use lodger_device_model::{Device, IrqLine, Payload, RestoreError};

use crate::alarm::Alarm;
use crate::mc146818::{Mc146818, Moment, saved};

/// The index port and the data port.
pub const RTC_PORT: u16 = 0x70;
/// Length of that block of ports.
pub const RTC_LEN: u64 = 2;
/// The interrupt line.
pub const RTC_IRQ: u32 = 8;
/// The register that holds the century, for the FADT.
pub const RTC_CENTURY: u8 = 0x32;

const KIND: &str = "mc146818";
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Conventional memory.
const BASE_KIB: u64 = 640;

/// How an [`Rtc`] is made.
pub struct RtcConfig {
    /// RAM below 4 GiB in bytes, from address 0; firmware finds the size in the CMOS memory.
    pub ram_below_4g: u64,
    /// RAM at and above 4 GiB in bytes.
    pub ram_above_4g: u64,
    /// Further bytes of CMOS memory that firmware looks for: (index, value). Index 0x0e and up.
    pub memory: Vec<(u8, u8)>,
}

/// A real-time clock. It shows [`Clock::wall`](lodger_clock::Clock::wall) (UTC) until the guest sets it; what
/// the guest sets stays set through resets.
pub struct Rtc {
    // Runtime glue.
    clock: SharedClock,
    irq: IrqLine,
    alarm: Alarm,

    // Volatile state.
    registers: Mutex<Mc146818>,
}

impl Rtc {
    /// A clock after power-on, which interrupts through `irq`.
    pub fn new(config: RtcConfig, clock: SharedClock, irq: IrqLine) -> Arc<Rtc> {
        let registers = Mc146818::new(&memory(&config), moment(&clock));
        Arc::new_cyclic(|weak| Rtc {
            alarm: Alarm::new(&clock, weak, Rtc::ring),
            clock,
            irq,
            registers: Mutex::new(registers),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Mc146818> {
        self.registers.lock().expect("a user of the RTC panicked")
    }

    fn access<R>(&self, act: impl FnOnce(&mut Mc146818, Moment) -> R) -> R {
        let mut registers = self.lock();
        let at = moment(&self.clock);
        registers.catch_up(at);
        let result = act(&mut registers, at);
        self.irq.set(registers.irq());
        self.alarm.set(registers.deadline(at));
        result
    }

    fn ring(&self) {
        self.access(|_, _| self.alarm.rung());
    }
}

fn moment(clock: &SharedClock) -> Moment {
    Moment {
        now: clock.now(),
        wall: clock.wall(),
    }
}

/// The CMOS memory as firmware expects it.
fn memory(config: &RtcConfig) -> Vec<(u8, u8)> {
    let mut bytes = vec![];
    let mut put = |index: u8, len: usize, value: u64, limit: u64| {
        let value = value.min(limit).to_le_bytes();
        bytes.extend((index..).zip(value[..len].iter().copied()));
    };
    let extended = config.ram_below_4g.saturating_sub(MIB) / KIB;
    put(0x15, 2, BASE_KIB, 0xffff);
    put(0x17, 2, extended, 0xffff);
    put(0x30, 2, extended, 0xffff);
    let above_16m = config.ram_below_4g.saturating_sub(16 * MIB) / (64 * KIB);
    put(0x34, 2, above_16m, 0xffff);
    put(0x5b, 3, config.ram_above_4g / (64 * KIB), 0xff_ffff);
    bytes.extend(&config.memory);
    // The checksum of the bytes from 0x10 to 0x2d, high byte first.
    let mut cmos = [0_u8; 128];
    for &(index, value) in &bytes {
        cmos[usize::from(index & 0x7f)] = value;
    }
    let sum: u16 = cmos[0x10..0x2e].iter().map(|&b| u16::from(b)).sum();
    let [high, low] = sum.to_be_bytes();
    bytes.extend([(0x2e, high), (0x2f, low)]);
    bytes
}

impl BusTarget for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            *byte = match port {
                // Nobody drives the bus: the index cannot be read.
                0 => 0xff,
                _ => self.access(|r, at| r.read_data(at)),
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, &byte) in (offset..).zip(data) {
            self.access(|r, at| match port {
                0 => r.write_index(byte),
                _ => r.write_data(byte, at),
            });
        }
    }
}

impl Device for Rtc {
    fn name(&self) -> &str {
        "rtc"
    }

    fn reset(&self) {
        self.access(|registers, _| registers.reset());
    }

    fn save(&self) -> Payload {
        Payload::encode(KIND, 1, &self.lock().save())
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved: saved::V1 = payload.decode(KIND, 1)?;
        let restored = Mc146818::restore(saved).ok_or_else(|| RestoreError::Damaged {
            kind: KIND,
            why: "the CMOS memory has another size".into(),
        })?;
        let mut registers = self.lock();
        *registers = restored;
        self.irq.import(registers.irq());
        // What has become due while the machine was stored is found when time goes on.
        self.alarm.set(registers.deadline(moment(&self.clock)));
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
    use lodger_device_model::assert_round_trip;

    fn rig() -> (Rig, Arc<Rtc>) {
        let rig = Rig::new();
        let config = RtcConfig {
            ram_below_4g: 512 * MIB,
            ram_above_4g: 3 << 30,
            memory: vec![(0x5f, 3)],
        };
        let rtc = Rtc::new(config, rig.clock.clone(), rig.line(8));
        let ports = &rig.space.ports;
        ports
            .map(RTC_PORT.into(), RTC_LEN, rtc.clone() as _)
            .unwrap();
        (rig, rtc)
    }

    /// Words: `set INDEX VALUE`, `get INDEX`, and `date`: century, year, month, day, weekday, hours, minutes,
    /// seconds as they stand.
    fn run(rig: &Rig, script: &str) {
        let ports = &rig.space.ports;
        let number = |text: &str| u8::from_str_radix(text, 16).unwrap();
        let get = |index: u8| {
            ports.write(RTC_PORT.into(), &[index]);
            let mut value = [0];
            ports.read(u64::from(RTC_PORT) + 1, &mut value);
            format!("{:02x}", value[0])
        };
        rig.run_with(script, |words| match words[0] {
            "set" => {
                ports.write(RTC_PORT.into(), &[number(words[1]), number(words[2])]);
                String::new()
            }
            "get" => get(number(words[1])),
            "date" => [0x32, 9, 8, 7, 6, 4, 2, 0].map(get).join(" "),
            other => panic!("{other}"),
        });
    }

    #[test]
    fn register_scripts() {
        for (what, script) in [
            (
                "the wall clock, over a leap day",
                "get a = 26; get b = 02; get d = 80; date = 20 24 02 29 05 23 59 58; t 2s;
                 date = 20 24 03 01 06 00 00 00; r 70 = ff",
            ),
            (
                "binary, and twelve hours",
                "set b 06; date = 14 18 02 1d 05 17 3b 3a; set b 00; get 4 = 91; t 2s; get 4 = 12; set b 04;
                 get 4 = 0c; set 4 0c; get 4 = 0c; set 4 8c; get 4 = 8c; set b 02; get 4 = 12",
            ),
            (
                "UIP is seen just before the second, and never while the clock stands",
                "t 999755us; get a = 26; t 2us; get a = a6; t 242us; get a = a6; t 1us; get a = 26;
                 get 0 = 59; set b 82; t 999900us; get a = 26",
            ),
            (
                "setting the time as Linux does: SET, divider reset, and the next second half a second later",
                "set b 82; set a 76; set 0 50; set 2 59; set 4 23; set 7 31; set 8 12; set 9 99; set 32 19;
                 t 5s; get 0 = 50; set b 02; t 5s; get 0 = 50; set a 26; t 499ms; get 0 = 50; t 1ms;
                 get 0 = 51; t 9s; date = 20 00 01 01 07 00 00 00",
            ),
            (
                "with SET alone the fraction of the second goes on",
                "t 400ms; set b 82; t 1s; set 0 10; set b 02; t 599ms; get 0 = 10; t 1ms; get 0 = 11",
            ),
            (
                "setting a running clock; values that are none",
                "set 0 10; get 0 = 10; set 2 00; get 2 = 00; set 8 ff; get 8 = 12; set 8 00; get 8 = 01;
                 set 7 ff; set 9 ff; set 32 ff; set 4 ff; date = .. .. .. .. .. .. .. ..",
            ),
            (
                "the update interrupt, once a second, cleared by reading C",
                "get c = 00; set b 12; t 999ms; irq 8 = 0; t 1ms; irq 8 = 1; t 5s; edges 8 = 1; get c = f0;
                 irq 8 = 0; get c = 00; t 1s; edges 8 = 1; set b 92; irq 8 = 0; get b = 82; get c = 50",
            ),
            (
                "flags without interrupts",
                "get c = 00; t 1s; get c = 50; t 1us; get c = 00; t 1ms; get c = 40",
            ),
            (
                "the periodic interrupt at 1024, 8192, 256 Hz and never",
                "set b 42; t 976us; irq 8 = 0; t 1us; irq 8 = 1; get c = c0; t 976us; irq 8 = 0; t 1us;
                 irq 8 = 1; set a 23; get c = c0; t 123us; irq 8 = 1; get c = c0; set a 21; t 100ms;
                 get c = c0; t 4ms; get c = c0; set a 20; t 1s; get c = 10; set a 76; t 1s; get c = 00",
            ),
            (
                "an alarm at a time of day, tomorrow",
                "set 1 05; set 3 00; set 5 00; get c = 00; set b 22; t 6999ms; irq 8 = 0; t 1ms; irq 8 = 1;
                 get c = f0; t 86399s; irq 8 = 0; t 1s; irq 8 = 1",
            ),
            (
                "alarms that match every second, minute, hour; in twelve hours; and never",
                "set 1 ff; set 3 ff; set 5 ff; set b 22; t 1s; get c = f0; t 1s; get c = f0; set 1 03; t 3s;
                 get c = f0; t 59s; irq 8 = 0; t 1s; get c = f0; set 3 01; t 58s; irq 8 = 0; t 3539s;
                 irq 8 = 0; t 3s; irq 8 = 1; set b 20; set 5 82; get c = f0; t 46000s; irq 8 = 0; t 1000s;
                 irq 8 = 1; get c = f0; set 5 77; t 90000s; irq 8 = 0",
            ),
            (
                "memory for firmware, and memory of the guest's own",
                "get 15 = 80; get 16 = 02; get 17 = ff; get 18 = ff; get 30 = ff; get 31 = ff; get 34 = 00;
                 get 35 = 1f; get 5b = 00; get 5c = c0; get 5d = 00; get 5f = 03; get 2e = 02; get 2f = 80;
                 set 40 77; get 40 = 77; get c0 = 77; set d ff; set c ff; get d = 80; get c = 00",
            ),
        ] {
            let (rig, _rtc) = rig();
            println!("{what}");
            run(&rig, script);
        }
    }

    #[test]
    fn time_and_memory_outlive_a_reset_but_interrupts_do_not() {
        let (rig, rtc) = rig();
        run(&rig, "set 40 77; set 4 03; set b 52; t 1s; irq 8 = 1");
        rtc.reset();
        run(&rig, "irq 8 = 0; get b = 02; get 40 = 77; get 4 = 03");
    }

    #[test]
    fn state_survives() {
        let (rig, rtc) = rig();
        run(
            &rig,
            "set 9 85; set b 52; t 1s; irq 8 = 1; edges 8 = 1; set 1 00",
        );
        assert_round_trip(&*rtc);
        run(
            &rig,
            "edges 8 = 0; irq 8 = 1; get 9 = 85; get c = .0; t 1s; irq 8 = 1",
        );
    }

    #[test]
    fn the_memory_sizes_of_small_and_huge_machines_fit() {
        for (below, above) in [(0, 0), (MIB, 0), (u64::MAX, u64::MAX)] {
            let config = RtcConfig {
                ram_below_4g: below,
                ram_above_4g: above,
                memory: vec![],
            };
            let bytes = memory(&config);
            let value = |index| bytes.iter().find(|b| b.0 == index).unwrap().1;
            let expected = if below > MIB { 0xff } else { 0 };
            assert_eq!([0x17, 0x34, 0x5b].map(value), [expected; 3]);
        }
    }

    #[test]
    fn hostile_accesses() {
        let (rig, rtc) = rig();
        rig.hammer(&[(0x70, 2)], &[], &[&*rtc]);
    }
}
