//! ACPI power management: [`acpi_registers`](crate::acpi_registers) joined to the clock, the system control
//! interrupt and the machine's switch.

use std::sync::{Arc, Mutex, MutexGuard};

use lodger_address_space::BusTarget;
use lodger_clock::SharedClock;
use lodger_device_model::{
    Device, GuestMistakes, IrqLine, MachineControl, MachineRequest, Payload, RestoreError,
};

use crate::acpi_registers::{AcpiRegisters, POWER_BUTTON, TIMER_HZ, saved};
use crate::alarm::Alarm;

/// The block of I/O ports.
pub const PM_PORT: u16 = 0x600;
/// Length of the block.
pub const PM_LEN: u64 = 0x24;
/// Offset of PM1a_EVT_BLK (4 bytes) in the block.
pub const PM1A_EVT_OFFSET: u16 = 0;
/// Offset of PM1a_CNT_BLK (2 bytes).
pub const PM1A_CNT_OFFSET: u16 = 4;
/// Offset of PM_TMR_BLK (4 bytes).
pub const PM_TMR_OFFSET: u16 = 8;
/// Offset of GPE0_BLK (4 bytes: 16 events).
pub const GPE0_OFFSET: u16 = 0x20;
/// Length of GPE0_BLK.
pub const GPE0_LEN: u8 = 4;
/// The line of the system control interrupt; level-triggered.
pub const SCI_IRQ: u32 = 9;
/// SLP_TYPa of soft-off, for the DSDT's \_S5.
pub const S5_SLEEP_TYPE: u8 = 5;
/// The power management timer's frequency.
pub const PM_TIMER_HZ: u32 = TIMER_HZ;

const KIND: &str = "acpi-pm";

/// How an [`AcpiPm`] is made.
pub struct AcpiPmConfig {
    /// The timer has 32 bits (TMR_VAL_EXT in the FADT) instead of 24.
    pub wide_timer: bool,
}

/// Power management: event and control registers, timer, one block of general-purpose events.
pub struct AcpiPm {
    // Fixed configuration.
    wide_timer: bool,

    // Runtime glue.
    clock: SharedClock,
    sci: IrqLine,
    control: Arc<dyn MachineControl>,
    alarm: Alarm,
    mistakes: GuestMistakes,

    // Volatile state.
    registers: Mutex<AcpiRegisters>,
}

impl AcpiPm {
    /// Registers after power-on, interrupting through `sci`; soft-off goes to `control`.
    pub fn new(
        config: AcpiPmConfig,
        clock: SharedClock,
        sci: IrqLine,
        control: Arc<dyn MachineControl>,
    ) -> Arc<AcpiPm> {
        let registers = AcpiRegisters::new(config.wide_timer, clock.now());
        Arc::new_cyclic(|weak| AcpiPm {
            wide_timer: config.wide_timer,
            alarm: Alarm::new(&clock, weak, AcpiPm::ring),
            clock,
            sci,
            control,
            mistakes: GuestMistakes::default(),
            registers: Mutex::new(registers),
        })
    }

    /// Somebody presses the power button: most guests shut down. False: the guest has not enabled the button's event, so
    /// nothing will come of it yet.
    pub fn press_power_button(&self) -> bool {
        self.access(|r, _| {
            r.raise(POWER_BUTTON);
            r.listens(POWER_BUTTON)
        })
    }

    /// General-purpose event `number` (0 to 15) happens.
    pub fn raise_gpe(&self, number: u32) {
        self.access(|r, _| r.raise_gpe(number));
    }

    fn lock(&self) -> MutexGuard<'_, AcpiRegisters> {
        self.registers
            .lock()
            .expect("a user of power management panicked")
    }

    fn access<R>(&self, act: impl FnOnce(&mut AcpiRegisters, u64) -> R) -> R {
        let mut registers = self.lock();
        let now = self.clock.now();
        registers.catch_up(now);
        let result = act(&mut registers, now);
        self.sci.set(registers.sci());
        self.alarm.set(registers.deadline());
        result
    }

    fn ring(&self) {
        self.access(|_, _| self.alarm.rung());
    }
}

impl BusTarget for AcpiPm {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.access(|r, now| r.read(offset, data, now));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (at, &byte) in (offset..).zip(data) {
            match self.access(|r, _| r.write(at, byte)) {
                Some(S5_SLEEP_TYPE) => self.control.request(MachineRequest::PowerOff),
                Some(other) => {
                    let what = format_args!("sleep type {other} does not exist");
                    self.mistakes.note(self.name(), what);
                }
                None => {}
            }
        }
    }
}

impl Device for AcpiPm {
    fn name(&self) -> &str {
        "acpi-pm"
    }

    fn reset(&self) {
        self.access(|r, now| *r = AcpiRegisters::new(self.wide_timer, now));
    }

    fn save(&self) -> Payload {
        Payload::encode(KIND, 1, &self.lock().save())
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved: saved::V1 = payload.decode(KIND, 1)?;
        let mut registers = self.lock();
        *registers = AcpiRegisters::restore(self.wide_timer, saved);
        self.sci.import(registers.sci());
        self.alarm.set(registers.deadline());
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

    fn rig(wide_timer: bool) -> (Rig, Arc<AcpiPm>) {
        let rig = Rig::new();
        let config = AcpiPmConfig { wide_timer };
        let pm = AcpiPm::new(config, rig.clock.clone(), rig.line(9), rig.records.clone());
        let ports = &rig.space.ports;
        ports.map(PM_PORT.into(), PM_LEN, pm.clone() as _).unwrap();
        (rig, pm)
    }

    /// Words: `button`, `gpe N`, `requests`.
    fn run(rig: &Rig, pm: &AcpiPm, script: &str) {
        rig.run_with(script, |words| {
            match words[0] {
                "button" => return pm.press_power_button().to_string(),
                "gpe" => pm.raise_gpe(words[1].parse().unwrap()),
                "requests" => return format!("{:?}", rig.take_requests()),
                other => panic!("{other}"),
            }
            String::new()
        });
    }

    #[test]
    fn register_scripts() {
        for (what, wide, script) in [
            (
                "ACPI mode is on; unknown bits and registers read as 0",
                false,
                "r 600 = 00000000; r 604 = 0001; w 604 ffdd; r 604 = 1c01; w 602 ffff; r 602 = 0721;
                 r 60c = 00000000; w 60c 55; r 61f = 00; requests = []",
            ),
            (
                "a 24-bit timer and its overflow event",
                false,
                "r 608 = 00000000; t 1s; r 608 = 00369e99; t 1s; r 60a = 6d; w 602 0001; t 343ms; irq 9 = 0;
                 t 1ms; irq 9 = 1; r 600 = 0001; w 600 01; irq 9 = 0; t 2344ms; irq 9 = 1; r 608 = 0000....",
            ),
            (
                "a 32-bit timer",
                true,
                "w 602 01; t 10s; r 608 = 022231fa; r 600 = 00; t 589s; irq 9 = 0; t 1s; irq 9 = 1; t 600s;
                 r 600 = 01; w 600 01; t 1s; r 608 = 00......",
            ),
            (
                "the power button, cleared by writing 1",
                false,
                "button = false; irq 9 = 0; r 600 = 0100; w 602 0100; irq 9 = 1; w 600 00ff; irq 9 = 1; w 601 01;
                 irq 9 = 0; r 600 = 0000; button = true; irq 9 = 1",
            ),
            (
                "general-purpose events",
                false,
                "gpe 3; gpe 15; gpe 16; gpe 4000000000; r 620 = 00008008; irq 9 = 0; w 622 8000; irq 9 = 1;
                 w 620 ffff; irq 9 = 0; r 620 = 80000000",
            ),
            (
                "soft-off, as a word and as a byte; other sleeping states do nothing",
                false,
                "w 604 1400; requests = []; w 604 3400; requests = [PowerOff]; r 604 = 1401; w 605 34;
                 requests = [PowerOff]; w 604 2000; w 604 2400; w 604 00ff; requests = []; r 604 = 0003",
            ),
        ] {
            let (rig, pm) = rig(wide);
            println!("{what}");
            run(&rig, &pm, script);
        }
    }

    #[test]
    fn state_survives() {
        let (rig, pm) = rig(false);
        run(
            &rig,
            &pm,
            "w 602 0101; w 622 0002; w 604 1400; button = true; gpe 1; edges 9 = 1",
        );
        assert_round_trip(&*pm);
        run(
            &rig,
            &pm,
            "edges 9 = 0; irq 9 = 1; r 600 = 01010100; r 604 = 1401; r 620 = 00020002; w 600 0100; w 620 02;
             irq 9 = 0; t 3s; irq 9 = 1",
        );
    }

    #[test]
    fn hostile_accesses() {
        let (rig, pm) = rig(true);
        rig.hammer(&[(0x600, 0x28)], &[], &[&*pm]);
    }
}
