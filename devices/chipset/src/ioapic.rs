//! The I/O APIC: [`ioapic82093`](crate::ioapic82093) joined to its input lines and to the local APICs.

use std::sync::{Arc, Mutex, MutexGuard};

use lodger_address_space::BusTarget;
use lodger_device_model::{Device, IrqSink, Msi, MsiTarget, Payload, RestoreError};

use crate::ioapic82093::{Ioapic82093, PINS, saved};
use crate::split;

/// Guest-physical address of the registers.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Length of the block of registers.
pub const IOAPIC_LEN: u64 = 0x1000;
/// Number of input lines.
pub const IOAPIC_PINS: u32 = PINS as u32;

const KIND: &str = "ioapic";

/// How an [`Ioapic`] is made.
pub struct IoapicConfig {
    /// Its APIC ID, 0 to 15, as in the MADT.
    pub id: u8,
}

/// An I/O APIC: an [`IrqSink`] for [`IOAPIC_PINS`] lines.
///
/// Messages are sent under its lock, so that they leave in order; the target must not call [`Ioapic::eoi`] from within.
pub struct Ioapic {
    // Fixed configuration.
    id: u8,

    // Runtime glue.
    target: Arc<dyn MsiTarget>,

    // Volatile state.
    registers: Mutex<Ioapic82093>,
}

impl Ioapic {
    /// A controller after power-on, which sends to `target`.
    pub fn new(config: IoapicConfig, target: Arc<dyn MsiTarget>) -> Arc<Ioapic> {
        Arc::new(Ioapic {
            id: config.id,
            target,
            registers: Mutex::new(Ioapic82093::new(config.id)),
        })
    }

    /// A local APIC broadcasts that the level-triggered interrupt `vector` is finished.
    pub fn eoi(&self, vector: u8) {
        self.access(|r, out| r.eoi(vector, out));
    }

    fn lock(&self) -> MutexGuard<'_, Ioapic82093> {
        self.registers
            .lock()
            .expect("a user of the IOAPIC panicked")
    }

    fn access(&self, act: impl FnOnce(&mut Ioapic82093, &mut Vec<Msi>)) {
        let mut out = Vec::new();
        let mut registers = self.lock();
        act(&mut registers, &mut out);
        for msi in out {
            self.target.send(msi);
        }
    }
}

impl IrqSink for Ioapic {
    fn set(&self, line: u32, level: bool) {
        self.access(|r, out| r.set(line as usize, level, out));
    }

    fn import(&self, line: u32, level: bool) {
        self.lock().import(line as usize, level);
    }
}

impl BusTarget for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.lock();
        split::read(offset, data, |at| registers.read(at).to_le_bytes());
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.access(|r, out| {
            split::write(offset, data, |at, value, mask| {
                let [value, mask] = [value, mask].map(u32::from_le_bytes);
                r.write(at, value, mask, out);
            });
        });
    }
}

impl Device for Ioapic {
    fn name(&self) -> &str {
        "ioapic"
    }

    fn reset(&self) {
        self.lock().reset(self.id);
    }

    fn save(&self) -> Payload {
        Payload::encode(KIND, 1, &self.lock().save())
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved: saved::V1 = payload.decode(KIND, 1)?;
        *self.lock() = Ioapic82093::restore(saved);
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

    fn rig() -> (Rig, Arc<Ioapic>) {
        let rig = Rig::new();
        let ioapic = Ioapic::new(IoapicConfig { id: 0 }, rig.records.clone());
        let mmio = &rig.space.mmio;
        mmio.map(IOAPIC_BASE, IOAPIC_LEN, ioapic.clone() as _)
            .unwrap();
        (rig, ioapic)
    }

    /// Words: `set INDEX VALUE` and `get INDEX` through select and window, `up N`, `down N`, `eoi VECTOR`;
    /// `sent` lists the messages since the last time as ADDRESS:DATA.
    fn run(rig: &Rig, ioapic: &Ioapic, script: &str) {
        let mmio = &rig.space.mmio;
        let number = |text: &str| u32::from_str_radix(text, 16).unwrap();
        rig.run_with(script, |words| {
            let arg = || words[1].parse().unwrap();
            match words[0] {
                "up" => ioapic.set(arg(), true),
                "down" => ioapic.set(arg(), false),
                "eoi" => ioapic.eoi(number(words[1]) as u8),
                "set" => {
                    mmio.write(IOAPIC_BASE, &number(words[1]).to_le_bytes());
                    mmio.write(IOAPIC_BASE + 0x10, &number(words[2]).to_le_bytes());
                }
                "get" => {
                    mmio.write(IOAPIC_BASE, &number(words[1]).to_le_bytes());
                    let mut data = [0; 4];
                    mmio.read(IOAPIC_BASE + 0x10, &mut data);
                    return format!("{:x}", u32::from_le_bytes(data));
                }
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
        for (what, script) in [
            (
                "identification; reserved and read-only bits; accesses narrower and wider than a register",
                "get 1 = 170020; get 0 = 0; set 0 ffffffff; get 0 = f000000; get 2 = f000000; set 1 0;
                 get 1 = 170020; get 10 = 10000; set 10 ffffffff; get 10 = 1afff; set 11 ffffffff;
                 get 11 = ffff0000; get 3f = 0; get 40 = 0; get ff = 0; set ff 1; W fec00000 11;
                 R fec00013 = ff; R fec0000e = 0000ffff_00000000; R fec00010 = 00000000_ffff0000;
                 W fec00013 12; R fec00010 = 12ff0000; R fec00ffc = 00000000",
            ),
            (
                "an edge is one message",
                "set 18 30; set 19 3000000; up 4; sent = fee03000:4030; up 4; sent =; down 4; sent =; up 4;
                 sent = fee03000:4030; get 18 = 30",
            ),
            (
                "an edge on a masked input is lost",
                "set 18 10030; up 4; set 18 30; sent =",
            ),
            (
                "logical, lowest priority, and extended destination",
                "set 18 933; set 19 81420000; up 4; sent = fee8142c:4133; set 18 833; down 4; up 4;
                 sent = fee81424:4033",
            ),
            (
                "NMI, INIT and ExtINT carry their mode and are never level-triggered",
                "set 10 8400; up 0; sent = fee00000:4400; get 10 = 8400; set 12 8500; up 1;
                 sent = fee00000:4500; set 14 8700; up 2; sent = fee00000:4700; down 2; up 2;
                 sent = fee00000:4700",
            ),
            (
                "a level is sent once, and again after EOI as long as it is high",
                "set 22 a040; up 9; sent = fee00000:c040; get 22 = e040; down 9; up 9; sent =; eoi 41;
                 sent =; eoi 40; sent = fee00000:c040; down 9; W fec00040 00000040; sent =; get 22 = a040;
                 up 9; sent = fee00000:c040",
            ),
            (
                "a masked level is sent on unmasking",
                "set 22 18040; up 9; sent =; set 22 8040; sent = fee00000:c040; set 22 18040; eoi 40;
                 sent =; set 22 8040; sent = fee00000:c040; set 22 18040; eoi 40; down 9; set 22 8040;
                 sent =",
            ),
            (
                "the EOI of old software: an edge for a moment",
                "set 22 8040; up 9; sent = fee00000:c040; set 22 10040; get 22 = 10040; set 22 8040;
                 sent = fee00000:c040",
            ),
            (
                "one EOI serves all pins of its vector",
                "set 22 8040; set 24 8040; up 9; up 10; sent = fee00000:c040 fee00000:c040; eoi 40;
                 sent = fee00000:c040 fee00000:c040",
            ),
        ] {
            let (rig, ioapic) = rig();
            println!("{what}");
            run(&rig, &ioapic, script);
        }
    }

    #[test]
    fn state_survives_and_sends_nothing() {
        let (rig, ioapic) = rig();
        run(
            &rig,
            &ioapic,
            "set 22 8040; set 23 7000000; up 9; up 3; set 16 55; sent = fee07000:c040",
        );
        assert_round_trip(&*ioapic);
        ioapic.import(9, true);
        ioapic.import(5, true);
        ioapic.import(24, true);
        run(
            &rig,
            &ioapic,
            "sent =; get 22 = c040; up 3; sent =; eoi 40; sent = fee07000:c040",
        );
    }

    #[test]
    fn hostile_accesses() {
        let (rig, ioapic) = rig();
        for line in 0..40 {
            ioapic.set(line * line, true);
        }
        rig.hammer(&[], &[(IOAPIC_BASE, 0x44)], &[&*ioapic]);
        rig.hammer(&[], &[(IOAPIC_BASE, 1), (IOAPIC_BASE + 16, 4)], &[&*ioapic]);
    }
}
