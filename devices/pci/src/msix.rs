//! MSI-X: the table of messages and the pending bits. Pure: what is to be sent is returned.
//!
//! PCI Local Bus Specification 3.0, section 6.8.2. The table and the pending bit array are accessed through a memory
//! BAR; the message control word lies in configuration space.

use lodger_device_model::Msi;
use serde::{Deserialize, Serialize};

/// Bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;
/// The most vectors that a function can have (PCI Local Bus 3.0, section 6.8.2.3).
pub const MOST_VECTORS: u16 = 2048;
/// Message control: MSI-X is enabled.
pub const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
pub const CONTROL_MASK_ALL: u16 = 1 << 14;

const ENTRY_MASKED: u8 = 1;

/// See the module documentation.
#[derive(Debug, Clone)]
pub struct Msix {
    /// Entries as the guest sees them: address low and high, data, vector control.
    table: Vec<u8>,
    pending: Vec<u64>,
    /// Message control: enable and function mask.
    control: u16,
}

/// The volatile state of an [`Msix`]; message control lies in the configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMsix {
    table: Vec<u8>,
    pending: Vec<u64>,
}

impl Msix {
    /// `vectors` masked entries, 1 to 2048.
    pub fn new(vectors: u16) -> Msix {
        assert!((1..=MOST_VECTORS).contains(&vectors));
        let mut m = Msix {
            table: vec![0; usize::from(vectors) * ENTRY_SIZE as usize],
            pending: vec![0; usize::from(vectors).div_ceil(64)],
            control: 0,
        };
        m.reset();
        m
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        (self.table.len() / ENTRY_SIZE as usize) as u16
    }

    /// Whether the guest has enabled MSI-X.
    pub fn enabled(&self) -> bool {
        self.control & CONTROL_ENABLE != 0
    }

    /// Power-on: all entries masked and 0.
    pub fn reset(&mut self) {
        self.table.fill(0);
        for entry in self.table.chunks_mut(ENTRY_SIZE as usize) {
            entry[12] = ENTRY_MASKED;
        }
        self.pending.fill(0);
        self.control = 0;
    }

    /// The event of `vector` happened: the message to send now, if any. While the vector is masked the event is
    /// remembered.
    pub fn raise(&mut self, vector: u16) -> Option<Msi> {
        if !self.enabled() || vector >= self.vectors() {
            return None;
        }
        if self.masked(vector) {
            self.pending[usize::from(vector) / 64] |= 1 << (vector % 64);
            return None;
        }
        Some(self.message(vector))
    }

    /// Takes a new message control word; returns the remembered messages that are due.
    pub fn set_control(&mut self, control: u16) -> Vec<Msi> {
        self.control = control;
        self.take_due(0..self.vectors())
    }

    /// Reads table bytes.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (i, d) in data.iter_mut().enumerate() {
            *d = self.table.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    /// Writes table bytes; returns the remembered messages that are due.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> Vec<Msi> {
        for (i, &d) in data.iter().enumerate() {
            let at = offset as usize + i;
            if let Some(byte) = self.table.get_mut(at) {
                // Of vector control only the mask bit exists.
                *byte = match at as u64 % ENTRY_SIZE {
                    12 => d & ENTRY_MASKED,
                    13..=15 => 0,
                    _ => d,
                };
            }
        }
        let first = (offset / ENTRY_SIZE).min(u64::from(self.vectors()));
        let end = (offset + data.len() as u64).div_ceil(ENTRY_SIZE);
        self.take_due(first as u16..end.min(u64::from(self.vectors())) as u16)
    }

    /// Reads the pending bits; the guest cannot write them.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (i, d) in data.iter_mut().enumerate() {
            let at = offset as usize + i;
            let word = self.pending.get(at / 8).copied().unwrap_or(0);
            *d = (word >> (at % 8 * 8)) as u8;
        }
    }

    fn entry(&self, vector: u16) -> &[u8] {
        let at = usize::from(vector) * ENTRY_SIZE as usize;
        &self.table[at..at + ENTRY_SIZE as usize]
    }

    fn masked(&self, vector: u16) -> bool {
        self.control & CONTROL_MASK_ALL != 0 || self.entry(vector)[12] & ENTRY_MASKED != 0
    }

    fn message(&self, vector: u16) -> Msi {
        let e = self.entry(vector);
        let word = |at: usize| u32::from_le_bytes([e[at], e[at + 1], e[at + 2], e[at + 3]]);
        Msi {
            address: u64::from(word(0)) | u64::from(word(4)) << 32,
            data: word(8),
        }
    }

    fn take_due(&mut self, vectors: std::ops::Range<u16>) -> Vec<Msi> {
        let mut due = Vec::new();
        if !self.enabled() {
            return due;
        }
        for v in vectors {
            let (word, bit) = (usize::from(v) / 64, 1 << (v % 64));
            if self.pending[word] & bit != 0 && !self.masked(v) {
                self.pending[word] &= !bit;
                due.push(self.message(v));
            }
        }
        due
    }

    /// What `restore` takes.
    pub fn save(&self) -> SavedMsix {
        let Msix {
            table,
            pending,
            control: _, // in configuration space
        } = self;
        SavedMsix {
            table: table.clone(),
            pending: pending.clone(),
        }
    }

    /// Takes a saved state and the control word that goes with it; false if it is of another size. Sends nothing.
    pub fn restore(&mut self, saved: &SavedMsix, control: u16) -> bool {
        let same = saved.table.len() == self.table.len()
            && saved.pending.len() == self.pending.len()
            && (saved.table.chunks(ENTRY_SIZE as usize))
                .all(|e| e[12] <= ENTRY_MASKED && e[13..] == [0; 3]);
        if same {
            self.table.clone_from(&saved.table);
            self.pending.clone_from(&saved.pending);
            self.control = control;
        }
        same
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programmed() -> Msix {
        let mut m = Msix::new(70);
        for v in 0..70_u64 {
            let mut entry = [0; 16];
            entry[..4].copy_from_slice(&0xfee0_0000_u32.to_le_bytes());
            entry[8] = v as u8;
            assert_eq!(m.write_table(v * 16, &entry), []);
        }
        m
    }

    fn data(messages: Vec<Msi>) -> Vec<u32> {
        messages.iter().map(|m| m.data).collect()
    }

    #[test]
    fn an_enabled_vector_sends_its_message() {
        let mut m = programmed();
        assert_eq!(m.raise(3), None, "disabled");
        m.set_control(CONTROL_ENABLE);
        let address = 0xfee0_0000;
        assert_eq!(m.raise(69), Some(Msi { address, data: 69 }));
        assert_eq!(m.raise(70), None, "there is none");
        assert_eq!(m.raise(0xffff), None, "no vector");
    }

    #[test]
    fn masked_events_are_remembered_once_and_sent_on_unmasking() {
        let mut m = programmed();
        m.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        for v in [1, 68, 68] {
            assert_eq!(m.raise(v), None);
        }
        let mut bits = [0; 16];
        m.read_pending(0, &mut bits);
        assert_eq!((bits[0], bits[8]), (2, 16));
        assert_eq!(m.write_table(68 * 16 + 12, &[1, 0, 0, 0]), []);
        assert_eq!(data(m.set_control(CONTROL_ENABLE)), [1]);
        assert_eq!(data(m.write_table(68 * 16 + 12, &[0, 0, 0, 0])), [68]);
        m.read_pending(0, &mut bits);
        assert_eq!(bits, [0; 16]);
    }

    #[test]
    fn vector_control_has_one_bit_and_out_of_range_is_nothing() {
        let mut m = Msix::new(2);
        m.write_table(12, &[0xfe, 0xff, 0xff, 0xff]);
        let mut d = [9; 8];
        m.read_table(8, &mut d);
        assert_eq!(d, [0; 8]);
        m.write_table(30, &[0xff; 8]);
        m.write_table(1 << 40, &[0xff; 8]);
        m.read_table(30, &mut d);
        assert_eq!(d, [0; 8]);
        m.read_pending(1 << 40, &mut d);
    }

    #[test]
    fn a_state_of_another_size_is_refused() {
        let m = programmed();
        assert!(!Msix::new(69).restore(&m.save(), 0));
        let mut other = Msix::new(70);
        assert!(other.restore(&m.save(), CONTROL_ENABLE));
        assert_eq!(other.raise(5).unwrap().data, 5);
    }
}
