//! The four interrupt lines of the bus, each shared by several devices: a line is high while any of them asserts it.

use std::sync::{Arc, Mutex, MutexGuard};

use lodger_device_model::{IrqLine, IrqSink};

/// Joins the devices' pins; input `slot` is pin A of device `slot`.
pub(crate) struct IntxRouter {
    lines: [IrqLine; 4],
    /// A bit for each slot that asserts its pin.
    asserted: Mutex<u32>,
}

/// Which of the lines A to D (0 to 3) pin A of device `slot` is wired to: the usual swizzle, (slot + pin) modulo 4.
pub fn intx_line(slot: u8) -> usize {
    usize::from(slot) % 4
}

impl IntxRouter {
    pub(crate) fn new(lines: [IrqLine; 4]) -> Arc<IntxRouter> {
        Arc::new(IntxRouter {
            lines,
            asserted: Mutex::new(0),
        })
    }

    /// Notes the level; returns the line, what it is to be, and the lock under which it must be driven, so that levels
    /// arrive in order.
    fn note(&self, slot: u32, level: bool) -> (&IrqLine, bool, MutexGuard<'_, u32>) {
        let mut asserted = self.asserted.lock().expect("an interrupt sink panicked");
        let bit = 1 << (slot & 31);
        *asserted = if level {
            *asserted | bit
        } else {
            *asserted & !bit
        };
        let line = intx_line(slot as u8);
        let high = *asserted & (0x1111_1111 << line) != 0;
        (&self.lines[line], high, asserted)
    }
}

impl IrqSink for IntxRouter {
    fn set(&self, slot: u32, level: bool) {
        let (line, high, _held) = self.note(slot, level);
        line.set(high);
    }

    fn import(&self, slot: u32, level: bool) {
        let (line, high, _held) = self.note(slot, level);
        line.import(high);
    }
}
