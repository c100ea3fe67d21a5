//! Guest RAM with raw host pointers.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use lodger_guest_memory::{GuestMemory, PAGE_SIZE, Tracker};
use lodger_x86::paging::PhysicalMemory;

/// Guest RAM as an engine reaches it.
pub struct Ram {
    regions: Vec<Region>,
    /// Keeps the mapping alive.
    _memory: GuestMemory,
}

struct Region {
    start: u64,
    len: u64,
    host: *mut u8,
    tracker: Tracker,
}

// SAFETY: the pointers are into a mapping that lives as long as `_memory`; what is behind them is accessed only with
// atomic or volatile operations, by this crate's users' contract.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

/// One page of RAM.
#[derive(Clone, Copy)]
pub struct RamPage<'a> {
    /// Its first byte in this process.
    pub host: *mut u8,
    /// The tracker of its region.
    pub tracker: &'a Tracker,
    /// Its number in that tracker.
    pub index: usize,
}

impl Ram {
    /// The engine's view of `memory`.
    pub fn new(memory: &GuestMemory) -> Ram {
        let regions = memory.ranges().iter().map(|r| {
            let first = memory.host_page(r.start).expect("a range starts with RAM");
            Region {
                start: r.start,
                len: r.len,
                host: first.host,
                tracker: first.tracker,
            }
        });
        Ram {
            regions: regions.collect(),
            _memory: memory.clone(),
        }
    }

    fn region(&self, address: u64) -> Option<(&Region, u64)> {
        let holds = |r: &&Region| address.wrapping_sub(r.start) < r.len;
        let region = self.regions.iter().find(holds)?;
        Some((region, address - region.start))
    }

    /// The page that holds guest-physical `address`, if it is RAM.
    #[inline]
    pub fn page(&self, address: u64) -> Option<RamPage<'_>> {
        let (region, offset) = self.region(address & !(PAGE_SIZE - 1))?;
        Some(RamPage {
            // SAFETY: `offset` lies within the region.
            host: unsafe { region.host.add(offset as usize) },
            tracker: &region.tracker,
            index: (offset / PAGE_SIZE) as usize,
        })
    }

    /// Reports a write to the page that holds `address`.
    pub fn note_write(&self, address: u64) {
        if let Some((region, offset)) = self.region(address) {
            region.tracker.note_write((offset / PAGE_SIZE) as usize);
        }
    }

    fn word<T>(&self, address: u64) -> Option<*mut T> {
        debug_assert_eq!(address % size_of::<T>() as u64, 0);
        let page = self.page(address)?;
        // SAFETY: an aligned word does not leave its page.
        Some(unsafe { page.host.add((address & (PAGE_SIZE - 1)) as usize) }.cast())
    }

    /// An aligned 64-bit word of RAM.
    pub fn atomic_u64(&self, address: u64) -> Option<&AtomicU64> {
        // SAFETY: the pointer is aligned, and valid as long as `self`.
        Some(unsafe { AtomicU64::from_ptr(self.word(address)?) })
    }

    /// An aligned 32-bit word of RAM.
    pub fn atomic_u32(&self, address: u64) -> Option<&AtomicU32> {
        // SAFETY: the pointer is aligned, and valid as long as `self`.
        Some(unsafe { AtomicU32::from_ptr(self.word(address)?) })
    }
}

impl PhysicalMemory for Ram {
    fn read_u64(&self, address: u64) -> Option<u64> {
        Some(self.atomic_u64(address)?.load(Ordering::Acquire))
    }

    fn read_u32(&self, address: u64) -> Option<u32> {
        Some(self.atomic_u32(address)?.load(Ordering::Acquire))
    }

    fn exchange_u64(&self, address: u64, old: u64, new: u64) -> bool {
        let Some(word) = self.atomic_u64(address) else {
            return true;
        };
        let done = word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire);
        self.note_write(address);
        done.is_ok()
    }

    fn exchange_u32(&self, address: u64, old: u32, new: u32) -> bool {
        let Some(word) = self.atomic_u32(address) else {
            return true;
        };
        let done = word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire);
        self.note_write(address);
        done.is_ok()
    }
}
