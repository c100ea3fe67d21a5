//! Which device answers at an address: the memory-mapped and the port address space of a machine.
//!
//! RAM is not listed here: an engine asks [`lodger-guest-memory`] first and comes here for what is not RAM. Ranges
//! never overlap; what nobody answers reads as all ones and swallows writes, as on a PC bus. Layout changes (a
//! guest moving a PCI BAR) take effect at once; a listener hears of each one.
//!
//! [`lodger-guest-memory`]: ../lodger_guest_memory/index.html

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

/// A block of registers on a bus. Called on a vCPU's thread; offsets are relative to the mapped range.
///
/// Every access is the guest's: any offset within the range, any size of 1, 2, 4 or 8 bytes (ports: 1, 2, 4), aligned or not. Data is
/// little-endian.
pub trait BusTarget: Send + Sync {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Hears of layout changes.
pub trait LayoutListener: Send + Sync {
    /// `start..start + len` is mapped now (true) or no longer (false).
    fn changed(&self, start: u64, len: u64, mapped: bool);
}

/// A range was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{start:#x}..{end:#x} overlaps {other_start:#x}..{other_end:#x}, or is empty")]
pub struct Overlap {
    /// Start of the refused range.
    pub start: u64,
    /// Its end, exclusive.
    pub end: u64,
    /// Start of the range that is in the way.
    pub other_start: u64,
    /// Its end, exclusive.
    pub other_end: u64,
}

/// One bus: ranges of addresses, each answered by a target.
#[derive(Default)]
pub struct Bus {
    /// By start address.
    ranges: RwLock<BTreeMap<u64, Mapped>>,
    listeners: RwLock<Vec<Arc<dyn LayoutListener>>>,
}

#[derive(Clone)]
struct Mapped {
    len: u64,
    target: Arc<dyn BusTarget>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Bus {
        Bus::default()
    }

    /// Lets `target` answer at `start..start + len`.
    pub fn map(&self, start: u64, len: u64, target: Arc<dyn BusTarget>) -> Result<(), Overlap> {
        let mut ranges = self.ranges.write().expect("a bus user panicked");
        let end = start.saturating_add(len);
        let refused = |other_start, other_end| Overlap {
            start,
            end,
            other_start,
            other_end,
        };
        if len == 0 {
            return Err(refused(start, start));
        }
        if let Some((&s, m)) = ranges.range(..end).next_back()
            && s + m.len > start
        {
            return Err(refused(s, s + m.len));
        }
        ranges.insert(start, Mapped { len, target });
        drop(ranges);
        self.tell(start, len, true);
        Ok(())
    }

    /// Removes the range that starts at `start`; nothing happens if there is none.
    pub fn unmap(&self, start: u64) {
        let removed = self
            .ranges
            .write()
            .expect("a bus user panicked")
            .remove(&start);
        if let Some(m) = removed {
            self.tell(start, m.len, false);
        }
    }

    /// From now on `listener` hears of every change.
    pub fn listen(&self, listener: Arc<dyn LayoutListener>) {
        self.listeners
            .write()
            .expect("a bus user panicked")
            .push(listener);
    }

    fn tell(&self, start: u64, len: u64, mapped: bool) {
        for l in self.listeners.read().expect("a bus user panicked").iter() {
            l.changed(start, len, mapped);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, Mapped)> {
        let ranges = self.ranges.read().expect("a bus user panicked");
        let (&start, m) = ranges.range(..=address).next_back()?;
        (address - start < m.len).then(|| (start, m.clone()))
    }

    /// Reads; bytes that nobody answers are 0xff. An access that runs over the end of a range is answered by that
    /// range for its part, and so on byte by byte.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((start, m)) if address - start + data.len() as u64 <= m.len => {
                m.target.read(address - start, data);
            }
            None if data.len() == 1 => data.fill(0xff),
            _ => {
                for (i, byte) in data.chunks_mut(1).enumerate() {
                    self.read(address.wrapping_add(i as u64), byte);
                }
            }
        }
    }

    /// Writes; see [`Bus::read`].
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address) {
            Some((start, m)) if address - start + data.len() as u64 <= m.len => {
                m.target.write(address - start, data);
            }
            None if data.len() == 1 => {}
            _ => {
                for (i, byte) in data.chunks(1).enumerate() {
                    self.write(address.wrapping_add(i as u64), byte);
                }
            }
        }
    }
}

/// The two address spaces of an x86 machine.
#[derive(Default)]
pub struct AddressSpace {
    /// Memory-mapped registers, by guest-physical address.
    pub mmio: Bus,
    /// I/O ports, 0..65536.
    pub ports: Bus,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Registers(Mutex<[u8; 8]>);
    impl BusTarget for Registers {
        fn read(&self, offset: u64, data: &mut [u8]) {
            let o = offset as usize;
            data.copy_from_slice(&self.0.lock().unwrap()[o..o + data.len()]);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            let o = offset as usize;
            self.0.lock().unwrap()[o..o + data.len()].copy_from_slice(data);
        }
    }

    #[test]
    fn accesses_reach_their_target_and_holes_float_high() {
        let bus = Bus::new();
        bus.map(0x60, 8, Arc::new(Registers::default())).unwrap();
        bus.write(0x62, &[1, 2, 3, 4]);
        let mut data = [0; 4];
        bus.read(0x62, &mut data);
        assert_eq!(data, [1, 2, 3, 4]);
        bus.read(0x66, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff], "the tail runs over the end");
        bus.write(0x5e, &[9, 9, 7, 9]);
        bus.read(0x5e, &mut data);
        assert_eq!(data, [0xff, 0xff, 7, 9]);
        bus.read(u64::MAX, &mut data);
        assert_eq!(data[0], 0xff);
    }

    #[test]
    fn overlaps_are_refused_and_unmapping_frees() {
        let bus = Bus::new();
        let r = || Arc::new(Registers::default());
        bus.map(0x100, 8, r()).unwrap();
        for (start, len) in [(0x100, 8), (0xff, 2), (0x107, 1), (0x80, 0x200), (0x104, 0)] {
            assert!(bus.map(start, len, r()).is_err(), "{start:#x}+{len:#x}");
        }
        bus.map(0x108, 8, r()).unwrap();
        bus.unmap(0x100);
        bus.map(0xf8, 0x10, r()).unwrap();
    }
}
