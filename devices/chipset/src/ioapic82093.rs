//! The registers of an I/O APIC (Intel 82093AA data sheet, May 1996), in the later version 0x20 that has an
//! EOI register, without locks. It speaks to the local APICs in messages as the ICH does (Intel ICH9 data
//! sheet, section 5.10.4.3).
//!
//! Inputs are logical levels: the board has taken polarity into account. An edge on a masked input is lost, as the
//! data sheet says. Only fixed and lowest-priority interrupts are level-triggered; nothing would ever end the others.

use lodger_device_model::Msi;

/// Number of inputs.
pub(crate) const PINS: usize = 24;

const VERSION: u32 = 0x20 | ((PINS as u32 - 1) << 16);
const ID_MASK: u32 = 0x0f00_0000;

const DELIVERY_SHIFT: u64 = 8;
const LOWEST_PRIORITY: u64 = 1;
const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// All but delivery status, remote IRR and the reserved bits.
const WRITABLE: u64 = 0xffff_0000_0001_afff;

/// See the module documentation.
pub(crate) struct Ioapic82093 {
    id: u32,
    select: u8,
    table: [u64; PINS],
    /// Levels of the inputs.
    lines: u32,
}

/// Saved forms.
pub(crate) mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub(crate) struct V1 {
        pub(super) id: u32,
        pub(super) select: u8,
        pub(super) table: [u64; super::PINS],
        pub(super) lines: u32,
    }
}

impl Ioapic82093 {
    /// After power-on: every input masked.
    pub(crate) fn new(id: u8) -> Ioapic82093 {
        Ioapic82093 {
            id: u32::from(id) << 24 & ID_MASK,
            select: 0,
            table: [MASKED; PINS],
            lines: 0,
        }
    }

    pub(crate) fn save(&self) -> saved::V1 {
        let Ioapic82093 {
            id,
            select,
            table,
            lines,
        } = self;
        saved::V1 {
            id: *id,
            select: *select,
            table: *table,
            lines: *lines,
        }
    }

    pub(crate) fn restore(state: saved::V1) -> Ioapic82093 {
        Ioapic82093 {
            id: state.id & ID_MASK,
            select: state.select,
            table: state.table.map(|entry| entry & (WRITABLE | REMOTE_IRR)),
            lines: state.lines,
        }
    }

    /// After power-on again; the levels of the inputs, which others drive, stay.
    pub(crate) fn reset(&mut self, id: u8) {
        *self = Ioapic82093 {
            lines: self.lines,
            ..Ioapic82093::new(id)
        };
    }

    /// Input `pin` has this level without an edge.
    pub(crate) fn import(&mut self, pin: usize, level: bool) {
        if pin < PINS {
            self.lines = self.lines & !(1 << pin) | u32::from(level) << pin;
        }
    }

    /// Input `pin` has this level now. Here and below, messages to be sent are added to `out`.
    pub(crate) fn set(&mut self, pin: usize, level: bool, out: &mut Vec<Msi>) {
        if pin >= PINS {
            return;
        }
        let rises = level && self.lines & 1 << pin == 0;
        self.import(pin, level);
        if level_triggered(self.table[pin]) {
            self.ask(pin, out);
        } else if rises && self.table[pin] & MASKED == 0 {
            out.push(message(self.table[pin]));
        }
    }

    /// A processor has finished the level-triggered interrupt `vector`.
    pub(crate) fn eoi(&mut self, vector: u8, out: &mut Vec<Msi>) {
        for pin in 0..PINS {
            if self.table[pin] as u8 == vector && self.table[pin] & REMOTE_IRR != 0 {
                self.table[pin] &= !REMOTE_IRR;
                self.ask(pin, out);
            }
        }
    }

    /// Reads the register at the aligned `offset`.
    pub(crate) fn read(&self, offset: u64) -> u32 {
        match offset {
            0x00 => self.select.into(),
            0x10 => self.window(),
            _ => 0,
        }
    }

    /// Writes the bits `mask` of the register at the aligned `offset`.
    pub(crate) fn write(&mut self, offset: u64, value: u32, mask: u32, out: &mut Vec<Msi>) {
        match offset {
            0x00 if mask & 0xff != 0 => self.select = value as u8,
            0x10 => self.write_window(self.window() & !mask | value & mask, out),
            0x40 if mask & 0xff != 0 => self.eoi(value as u8, out),
            _ => {}
        }
    }

    fn window(&self) -> u32 {
        match self.select {
            // The arbitration ID is loaded from the ID.
            0 | 2 => self.id,
            1 => VERSION,
            index => match self.entry(index) {
                Some((pin, 0)) => self.table[pin] as u32,
                Some((pin, _)) => (self.table[pin] >> 32) as u32,
                None => 0,
            },
        }
    }

    fn write_window(&mut self, value: u32, out: &mut Vec<Msi>) {
        if self.select == 0 {
            self.id = value & ID_MASK;
        }
        let Some((pin, half)) = self.entry(self.select) else {
            return;
        };
        let old = self.table[pin];
        let written = match half {
            0 => old & !0xffff_ffff | u64::from(value),
            _ => old & 0xffff_ffff | u64::from(value) << 32,
        };
        let mut entry = written & WRITABLE | old & REMOTE_IRR;
        // Software that knows no EOI register ends an interrupt by making it an edge for a moment.
        if !level_triggered(entry) {
            entry &= !REMOTE_IRR;
        }
        self.table[pin] = entry;
        self.ask(pin, out);
    }

    /// Which pin's redirection entry, and which half of it, register `index` is.
    fn entry(&self, index: u8) -> Option<(usize, u8)> {
        let index = index.checked_sub(0x10)?;
        let pin = usize::from(index / 2);
        (pin < PINS).then_some((pin, index & 1))
    }

    /// Sends the interrupt of a level-triggered pin if it is due.
    fn ask(&mut self, pin: usize, out: &mut Vec<Msi>) {
        let entry = self.table[pin];
        let due = self.lines & 1 << pin != 0 && entry & (MASKED | REMOTE_IRR) == 0;
        if due && level_triggered(entry) {
            self.table[pin] |= REMOTE_IRR;
            out.push(message(entry));
        }
    }
}

fn level_triggered(entry: u64) -> bool {
    entry & LEVEL != 0 && entry >> DELIVERY_SHIFT & 7 <= LOWEST_PRIORITY
}

/// Destination ID, extended destination ID, redirection hint and destination mode make the address; trigger
/// mode, the assert bit, delivery mode and vector make the data.
fn message(entry: u64) -> Msi {
    let delivery = entry >> DELIVERY_SHIFT & 7;
    let hint = u64::from(delivery == LOWEST_PRIORITY) << 3;
    let logical = u64::from(entry & LOGICAL != 0) << 2;
    let level = if level_triggered(entry) { LEVEL } else { 0 };
    Msi {
        address: 0xfee0_0000 | entry >> 56 << 12 | (entry >> 48 & 0xff) << 4 | hint | logical,
        data: (level | 1 << 14 | delivery << DELIVERY_SHIFT | entry & 0xff) as u32,
    }
}
