//! The keyboard controller: [`i8042_registers`](crate::i8042_registers) joined to interrupt line 1 and the
//! machine's reset.
//!
//! Not taken from `vm-superio`: its i8042 knows the reset command only, so that probing it ends in time-outs.

use std::sync::{Arc, Mutex, MutexGuard};

use lodger_address_space::BusTarget;
use lodger_device_model::{Device, IrqLine, MachineControl, MachineRequest, Payload, RestoreError};

use crate::i8042_registers::{I8042Registers, ResetAsked, saved};

/// The data port.
pub const I8042_DATA_PORT: u16 = 0x60;
/// The status and command port.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// The fast A20 and reset port (system control port A).
pub const FAST_A20_PORT: u16 = 0x92;
/// The keyboard's interrupt line.
pub const I8042_IRQ: u32 = 1;

const KIND: &str = "i8042";

/// A keyboard controller that nothing is plugged into. Its three ports lie apart: each is a block of length 1.
pub struct I8042 {
    // Runtime glue.
    irq: IrqLine,
    control: Arc<dyn MachineControl>,

    // Volatile state.
    registers: Mutex<I8042Registers>,
}

struct Port {
    device: Arc<I8042>,
    read: fn(&mut I8042Registers) -> u8,
    write: fn(&mut I8042Registers, u8) -> Option<ResetAsked>,
}

impl I8042 {
    /// A controller as firmware leaves it, interrupting through `irq`; resets go to `control`.
    pub fn new(irq: IrqLine, control: Arc<dyn MachineControl>) -> Arc<I8042> {
        Arc::new(I8042 {
            irq,
            control,
            registers: Mutex::new(I8042Registers::new()),
        })
    }

    /// The data port, conventionally [`I8042_DATA_PORT`].
    pub fn data_port(self: &Arc<Self>) -> Arc<dyn BusTarget> {
        Arc::new(Port {
            device: Arc::clone(self),
            read: I8042Registers::read_data,
            write: I8042Registers::write_data,
        })
    }

    /// The status and command port, conventionally [`I8042_COMMAND_PORT`].
    pub fn command_port(self: &Arc<Self>) -> Arc<dyn BusTarget> {
        Arc::new(Port {
            device: Arc::clone(self),
            read: |r| r.read_status(),
            write: I8042Registers::write_command,
        })
    }

    /// The fast A20 port, conventionally [`FAST_A20_PORT`].
    pub fn fast_a20_port(self: &Arc<Self>) -> Arc<dyn BusTarget> {
        Arc::new(Port {
            device: Arc::clone(self),
            read: |r| r.read_fast_a20(),
            write: I8042Registers::write_fast_a20,
        })
    }

    fn lock(&self) -> MutexGuard<'_, I8042Registers> {
        self.registers
            .lock()
            .expect("a user of the keyboard controller panicked")
    }

    fn access<R>(&self, act: impl FnOnce(&mut I8042Registers) -> R) -> R {
        let mut registers = self.lock();
        let result = act(&mut registers);
        self.irq.set(registers.irq());
        result
    }
}

impl BusTarget for Port {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.device.access(self.read));
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        for &byte in data {
            if self.device.access(|r| (self.write)(r, byte)) == Some(ResetAsked) {
                self.device.control.request(MachineRequest::Reset);
            }
        }
    }
}

impl Device for I8042 {
    fn name(&self) -> &str {
        "i8042"
    }

    fn reset(&self) {
        self.access(|registers| *registers = I8042Registers::new());
    }

    fn save(&self) -> Payload {
        Payload::encode(KIND, 1, &self.lock().save())
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved: saved::V1 = payload.decode(KIND, 1)?;
        let mut registers = self.lock();
        *registers = I8042Registers::restore(saved);
        self.irq.import(registers.irq());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rig;
    use lodger_device_model::assert_round_trip;

    fn rig() -> (Rig, Arc<I8042>) {
        let rig = Rig::new();
        let device = I8042::new(rig.line(1), rig.records.clone());
        for (port, target) in [
            (I8042_DATA_PORT, device.data_port()),
            (I8042_COMMAND_PORT, device.command_port()),
            (FAST_A20_PORT, device.fast_a20_port()),
        ] {
            rig.space.ports.map(port.into(), 1, target).unwrap();
        }
        (rig, device)
    }

    fn run(rig: &Rig, script: &str) {
        rig.run_with(script, |words| {
            assert_eq!(words[0], "requests");
            format!("{:?}", rig.take_requests())
        });
    }

    #[test]
    fn register_scripts() {
        for (what, script) in [
            (
                "self-test and port test",
                "r 64 = 14; w 64 aa; r 64 = 1d; r 60 = 55; r 64 = 1c; w 64 ab; r 60 = 00",
            ),
            (
                "Linux's search for an auxiliary port ends at once, in vain",
                "w 64 20; r 60 = 65; w 64 d3; w 60 5a; r 64 = 15; r 60 = 5a; w 64 a9; r 64 = 1d; r 60 = 02",
            ),
            (
                "a byte for the keyboard that is not there times out at once, with an interrupt",
                "w 60 f2; irq 1 = 1; r 64 = 55; r 60 = fe; irq 1 = 0; r 64 = 14; w 64 d4; w 60 ff;
                 r 64 = 55; r 60 = fe",
            ),
            (
                "the command byte",
                "w 64 60; w 60 30; w 64 20; irq 1 = 0; r 64 = 19; r 60 = 30; w 64 ae; w 64 a8; w 64 20;
                 r 60 = 00; w 64 ad; w 64 a7; w 64 20; r 60 = 30",
            ),
            (
                "a command cancels the one that waits for its byte",
                "w 64 60; w 64 20; r 60 = 65; w 60 00; r 60 = fe; w 64 20; r 60 = 65",
            ),
            (
                "the output port and A20, by all its ways",
                "w 64 d0; r 60 = 03; r 92 = 02; w 64 dd; w 64 d0; w 64 d0; r 60 = 11; w 92 02; w 64 d0;
                 r 60 = 03; w 64 d1; w 60 01; r 92 = 00; w 64 df; r 92 = 02; requests = []",
            ),
            (
                "resets",
                "w 64 fe; requests = [Reset]; w 64 f0; requests = [Reset]; w 64 ff; requests = []; w 64 d1;
                 w 60 fe; requests = [Reset]; w 92 03; requests = [Reset]; w 92 02; requests = []",
            ),
            (
                "unknown commands do nothing",
                "w 64 00; w 64 5f; w 64 b0; r 64 = 1c; w 64 c0; r 60 = 80; w 64 e0; r 60 = 00",
            ),
        ] {
            let (rig, _device) = rig();
            println!("{what}");
            run(&rig, script);
        }
    }

    #[test]
    fn state_survives() {
        let (rig, device) = rig();
        run(&rig, "w 64 dd; w 60 f2; w 64 60; edges 1 = 1");
        assert_round_trip(&*device);
        run(
            &rig,
            "edges 1 = 0; irq 1 = 1; r 64 = 5d; r 92 = 00; w 60 00; irq 1 = 0",
        );
    }

    #[test]
    fn hostile_accesses() {
        let (rig, device) = rig();
        rig.hammer(&[(0x60, 1), (0x64, 1), (0x92, 1)], &[], &[&*device]);
    }
}
