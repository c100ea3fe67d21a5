//! The legacy interrupt controllers: [`pic8259`](crate::pic8259) joined to sixteen input lines and the
//! processor's INTR.

use std::sync::{Arc, Mutex, MutexGuard};

use lodger_address_space::BusTarget;
use lodger_device_model::{Device, IrqLine, IrqSink, Payload, RestoreError};

use crate::pic8259::{Pic8259, Which, saved};

/// The master's two I/O ports.
pub const PIC_MASTER_PORT: u16 = 0x20;
/// The slave's two I/O ports.
pub const PIC_SLAVE_PORT: u16 = 0xa0;
/// The two edge/level control registers.
pub const PIC_ELCR_PORT: u16 = 0x4d0;
/// Length of each of these blocks of I/O ports.
pub const PIC_LEN: u64 = 2;

const KIND: &str = "pic8259";

/// The pair of 8259A: an [`IrqSink`] for lines 0 to 15.
///
/// INTR is a level. As long as it is high and the processor accepts interrupts, the engine calls [`Pic::acknowledge`].
pub struct Pic {
    // Runtime glue.
    intr: IrqLine,

    // Volatile state.
    registers: Mutex<Pic8259>,
}

/// One of the pair's blocks of ports.
struct Block {
    pic: Arc<Pic>,
    part: Part,
}

enum Part {
    Chip(Which),
    Elcr,
}

impl Pic {
    /// Controllers after power-on, whose INTR output drives `intr`.
    pub fn new(intr: IrqLine) -> Arc<Pic> {
        Arc::new(Pic {
            intr,
            registers: Mutex::default(),
        })
    }

    /// The master's ports, conventionally at [`PIC_MASTER_PORT`].
    pub fn master_ports(self: &Arc<Self>) -> Arc<dyn BusTarget> {
        self.block(Part::Chip(Which::Master))
    }

    /// The slave's ports, conventionally at [`PIC_SLAVE_PORT`].
    pub fn slave_ports(self: &Arc<Self>) -> Arc<dyn BusTarget> {
        self.block(Part::Chip(Which::Slave))
    }

    /// The edge/level control registers, conventionally at [`PIC_ELCR_PORT`].
    pub fn elcr_ports(self: &Arc<Self>) -> Arc<dyn BusTarget> {
        self.block(Part::Elcr)
    }

    /// The processor acknowledges: which vector it is to take. Spurious interrupts have input 7's vector.
    pub fn acknowledge(&self) -> u8 {
        self.access(Pic8259::acknowledge)
    }

    /// The level of INTR.
    pub fn pending(&self) -> bool {
        self.lock().output()
    }

    fn block(self: &Arc<Self>, part: Part) -> Arc<dyn BusTarget> {
        Arc::new(Block {
            pic: Arc::clone(self),
            part,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Pic8259> {
        self.registers.lock().expect("a user of the PIC panicked")
    }

    fn access<R>(&self, act: impl FnOnce(&mut Pic8259) -> R) -> R {
        let mut registers = self.lock();
        let result = act(&mut registers);
        self.intr.set(registers.output());
        result
    }
}

impl BusTarget for Block {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            *byte = self.pic.access(|r| match self.part {
                Part::Chip(which) => r.read(which, port),
                Part::Elcr => r.read_elcr(port),
            });
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, &byte) in (offset..).zip(data) {
            self.pic.access(|r| match self.part {
                Part::Chip(which) => r.write(which, port, byte),
                Part::Elcr => r.write_elcr(port, byte),
            });
        }
    }
}

impl IrqSink for Pic {
    fn set(&self, line: u32, level: bool) {
        self.access(|r| r.set(line, level));
    }

    fn import(&self, line: u32, level: bool) {
        self.lock().import(line, level);
    }
}

impl Device for Pic {
    fn name(&self) -> &str {
        "pic"
    }

    fn reset(&self) {
        self.access(Pic8259::reset);
    }

    fn save(&self) -> Payload {
        Payload::encode(KIND, 1, &self.lock().save())
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved: saved::V1 = payload.decode(KIND, 1)?;
        let mut registers = self.lock();
        *registers = Pic8259::restore(saved);
        self.intr.import(registers.output());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rig;
    use lodger_device_model::assert_round_trip;

    /// INTR is line 31 of the rig.
    fn rig() -> (Rig, Arc<Pic>) {
        let rig = Rig::new();
        let pic = Pic::new(rig.line(31));
        for (port, block) in [
            (PIC_MASTER_PORT, pic.master_ports()),
            (PIC_SLAVE_PORT, pic.slave_ports()),
            (PIC_ELCR_PORT, pic.elcr_ports()),
        ] {
            rig.space.ports.map(port.into(), PIC_LEN, block).unwrap();
        }
        (rig, pic)
    }

    /// As Linux does it: vectors from 0x30 and 0x38, nothing masked.
    const INIT: &str =
        "w 20 11; w 21 30; w 21 04; w 21 01; w 21 00; w a0 11; w a1 38; w a1 02; w a1 01;
                        w a1 00";

    /// Words: `up N`, `down N`, `pulse N`, `ack`.
    fn run(rig: &Rig, pic: &Pic, script: &str) {
        rig.run_with(script, |words| {
            let line = || words[1].parse().unwrap();
            match words[0] {
                "up" => pic.set(line(), true),
                "down" => pic.set(line(), false),
                "pulse" => {
                    pic.set(line(), true);
                    pic.set(line(), false);
                }
                "ack" => return format!("{:02x}", pic.acknowledge()),
                other => panic!("{other}"),
            }
            String::new()
        });
    }

    #[test]
    fn register_scripts() {
        for (what, script) in [
            (
                "an edge is latched, taken once, and blocks its like until EOI",
                "up 4; irq 31 = 1; r 20 = 10; ack = 34; irq 31 = 0; r 20 = 00; w 20 0b; r 20 = 10; pulse 4;
                 irq 31 = 0; down 4; pulse 4; irq 31 = 0; w 20 20; irq 31 = 1; ack = 34; w 20 20; irq 31 = 0",
            ),
            (
                "a higher priority interrupts a lower one, not the reverse",
                "pulse 4; ack = 34; pulse 5; irq 31 = 0; pulse 1; irq 31 = 1; ack = 31; w 20 61; w 20 64;
                 ack = 35",
            ),
            (
                "the mask holds back what stays latched",
                "w 21 10; r 21 = 10; pulse 4; irq 31 = 0; r 20 = 10; w 21 ef; irq 31 = 1; w 21 ff;
                 irq 31 = 0; ack = 37",
            ),
            (
                "the slave comes through input 2",
                "pulse 12; r 20 = 04; r a0 = 10; ack = 3c; irq 31 = 0; w 20 0b; r 20 = 04; pulse 8;
                 irq 31 = 0; w 20 20; irq 31 = 1; ack = 38; w a0 20; w a0 20; w 20 20; pulse 2; irq 31 = 0",
            ),
            (
                "in special fully nested mode the slave interrupts itself",
                "w 20 11; w 21 30; w 21 04; w 21 11; pulse 12; ack = 3c; pulse 8; irq 31 = 1; ack = 38",
            ),
            (
                "spurious interrupts are not in service",
                "ack = 37; w 20 0b; r 20 = 00",
            ),
            (
                "level-triggered inputs ask as long as they are high",
                "w 4d0 ff; w 4d1 ff; r 4d0 = def8; up 10; ack = 3a; w a0 62; w 20 62; irq 31 = 1; ack = 3a;
                 down 10; w a0 62; w 20 62; irq 31 = 0; up 11; down 11; irq 31 = 0",
            ),
            (
                "automatic EOI, with rotation",
                "w 20 11; w 21 30; w 21 04; w 21 03; pulse 3; ack = 33; pulse 3; ack = 33; w 20 80; pulse 3;
                 ack = 33; pulse 3; pulse 4; ack = 34; ack = 33; w 20 00; pulse 3; pulse 4; ack = 34;
                 ack = 33; pulse 3; pulse 4; ack = 34",
            ),
            (
                "rotation on EOI and set priority",
                "pulse 3; ack = 33; w 20 a0; pulse 3; pulse 4; ack = 34; w 20 e4; w 20 c5; pulse 6;
                 ack = 36; w 20 66; ack = 33",
            ),
            (
                "special mask mode lets lower priorities through",
                "pulse 1; ack = 31; w 21 02; pulse 6; irq 31 = 0; w 20 68; irq 31 = 1; ack = 36; w 20 48;
                 pulse 7; irq 31 = 0",
            ),
            (
                "polling acknowledges",
                "w 20 0c; r 20 = 00; pulse 5; w 20 0c; r 20 = 85; irq 31 = 0; w 20 0b; r 20 = 20; pulse 9;
                 w a0 0c; r a0 = 81",
            ),
            (
                "initialisation forgets edges, mask and service; nothing is delivered until it is complete",
                "pulse 4; ack = 34; up 5; w 21 ff; w 20 11; r 21 = 00; irq 31 = 0; pulse 6; irq 31 = 0;
                 w 21 47; w 21 04; w 21 01; r 20 = 40; ack = 46",
            ),
            (
                "single mode has no third word",
                "w 20 13; w 21 50; w 21 01; w 21 fe; pulse 0; ack = 50; w 20 12; w 21 58; w 21 fe; r 21 = fe",
            ),
        ] {
            let (rig, pic) = rig();
            println!("{what}");
            run(&rig, &pic, INIT);
            run(&rig, &pic, script);
        }
    }

    #[test]
    fn state_survives_and_makes_no_edges() {
        let (rig, pic) = rig();
        run(&rig, &pic, INIT);
        run(
            &rig,
            &pic,
            "w 4d1 08; up 11; up 4; pulse 1; ack = 31; edges 31 = 1",
        );
        assert_round_trip(&*pic);
        pic.import(4, true);
        pic.import(5, true);
        run(
            &rig,
            &pic,
            "edges 31 = 0; r 20 = 14; w 20 20; ack = 3b; up 5; r 20 = 10",
        );
    }

    #[test]
    fn hostile_accesses() {
        let (rig, pic) = rig();
        for line in [2, 16, u32::MAX] {
            pic.set(line, true);
        }
        rig.hammer(&[(0x20, 2), (0xa0, 2), (0x4d0, 2)], &[], &[&*pic]);
        pic.acknowledge();
    }
}
