//! The TLB: direct-mapped tables of page translations, one per privilege and direction of data access.
//!
//! A hit is one comparison: the distance of the address from the tag is at most the page size less that of the access. It fails for
//! another page and for an access that leaves the page. The layout is known to translated code.

use std::io;
use std::mem::offset_of;

use lodger_guest_memory::PAGE_SIZE;
use lodger_host_sys::low::LowBox;

/// Which rights a table was filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum MmuIndex {
    /// Supervisor; under SMAP without access to user pages.
    Kernel = 0,
    /// Supervisor with RFLAGS.AC set.
    KernelAc = 1,
    /// User.
    User = 2,
}

/// Direction of a data access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Direction {
    /// Reads.
    Read = 0,
    /// Writes, and reads that a write follows.
    Write = 1,
}

/// One translation.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct TlbEntry {
    /// Linear address of the page, or of none that the slot could hold.
    tag: u64,
    /// Host address of the page.
    page: u64,
}

impl TlbEntry {
    /// An entry for a page that cannot be: of addresses that are not canonical, to host addresses on which the host traps.
    pub const NONE: TlbEntry = TlbEntry {
        tag: 1 << 63,
        page: 1 << 63,
    };

    /// Host address of the access of `size` bytes at `linear`, if this entry permits it.
    #[inline(always)]
    pub fn host(&self, linear: u64, size: u64) -> Option<*mut u8> {
        let offset = linear.wrapping_sub(self.tag);
        (offset <= PAGE_SIZE - size).then(|| self.page.wrapping_add(offset) as *mut u8)
    }
}

/// Entries of one table: they cover 16 MiB.
pub const ENTRIES: usize = 4096;

/// A tag for `slot` that no address which is looked up there is near to.
const fn invalid(slot: usize) -> TlbEntry {
    TlbEntry {
        tag: 1 << 63 | ((slot ^ (ENTRIES / 2)) as u64) << 12,
        page: 0,
    }
}

type Table = [TlbEntry; ENTRIES];

/// The tables as the hot paths see them.
#[repr(C, align(64))]
struct Tables([[Table; 2]; 3]);

impl TlbEntry {
    /// Bytes from the start of an entry to its tag, and to its page's host address.
    pub const LAYOUT: (usize, usize) = (offset_of!(TlbEntry, tag), offset_of!(TlbEntry, page));
}

/// What the hot paths need not know of an entry: guest-physical address of the page, and these bits.
type Facts = u64;
const GLOBAL: Facts = 1;
/// The slot is in `filled`.
const LISTED: Facts = 2;
const VALID: Facts = 4;
const BITS: Facts = 0xfff;

/// The data TLB of one vCPU.
pub struct Tlb {
    tables: LowBox<Tables>,
    facts: Box<[[Facts; ENTRIES]; 3]>,
    /// Which slots were filled since they were last all flushed, so that a flush need not look at the others.
    filled: Vec<(MmuIndex, u16)>,
    /// The smallest aligned range that holds all entered mappings larger than 4 KiB, as address and mask: INVLPG within it
    /// drops everything.
    large: Option<(u64, u64)>,
    /// How often entries have been dropped or lost a permission.
    age: u64,
}

fn slot_of(linear: u64) -> usize {
    (linear >> 12) as usize % ENTRIES
}

impl Tlb {
    /// An empty TLB. Fails if the host has no memory for it.
    pub fn new() -> io::Result<Tlb> {
        // SAFETY: numbers.
        let mut tables = unsafe { LowBox::<Tables>::zeroed() }?;
        for table in tables.0.iter_mut().flatten() {
            for (slot, entry) in table.iter_mut().enumerate() {
                *entry = invalid(slot);
            }
        }
        Ok(Tlb {
            tables,
            facts: vec![[0; ENTRIES]; 3].try_into().expect("three"),
            filled: Vec::new(),
            large: None,
            age: 0,
        })
    }

    /// Address of the table for accesses of this kind, for translated code, as long as this TLB lives.
    pub fn table(&self, index: MmuIndex, direction: Direction) -> u32 {
        let table = index as usize * 2 + direction as usize;
        self.tables.address() + (table * size_of::<Table>()) as u32
    }

    /// Changes whenever a copy of an entry may have become wrong.
    pub fn age(&self) -> u64 {
        self.age
    }

    /// The entry in which a translation of `linear` would be.
    #[inline(always)]
    pub fn entry(&self, index: MmuIndex, direction: Direction, linear: u64) -> &TlbEntry {
        &self.tables.0[index as usize][direction as usize][(linear >> 12) as usize % ENTRIES]
    }

    fn clear(&mut self, index: MmuIndex, slot: usize) {
        for table in &mut self.tables.0[index as usize] {
            table[slot] = invalid(slot);
        }
        self.facts[index as usize][slot] &= LISTED;
    }

    /// Enters a translation of the page at `linear` to RAM at `host`, guest-physical `page`. `write`: it may also be
    /// written through the entry. `size`: bytes of the whole mapping that the page is part of.
    #[allow(clippy::too_many_arguments)]
    pub fn fill(
        &mut self,
        index: MmuIndex,
        linear: u64,
        host: *mut u8,
        page: u64,
        write: bool,
        global: bool,
        size: u64,
    ) {
        let linear = linear & !0xfff;
        if size > 4096 {
            self.note_large(linear, size);
        }
        let slot = slot_of(linear);
        let facts = &mut self.facts[index as usize][slot];
        if *facts & LISTED == 0 {
            self.filled.push((index, slot as u16));
        }
        *facts = page | LISTED | VALID | if global { GLOBAL } else { 0 };
        let entry = TlbEntry {
            tag: linear,
            page: host as u64,
        };
        let [read_table, write_table] = &mut self.tables.0[index as usize];
        read_table[slot] = entry;
        write_table[slot] = if write { entry } else { invalid(slot) };
    }

    fn note_large(&mut self, linear: u64, size: u64) {
        // A size of 2^64 - 1 stands for "no paging".
        let mut mask = if size.is_power_of_two() {
            !(size - 1)
        } else {
            0
        };
        if let Some((base, old)) = self.large {
            mask &= old;
            while (base ^ linear) & mask != 0 {
                mask <<= 1;
            }
        }
        self.large = Some((linear & mask, mask));
    }

    /// Drops everything.
    pub fn flush(&mut self) {
        self.age += 1;
        for (index, slot) in std::mem::take(&mut self.filled) {
            self.clear(index, slot.into());
            self.facts[index as usize][usize::from(slot)] = 0;
        }
        self.large = None;
    }

    /// Drops everything but global pages (a CR3 load).
    pub fn flush_local(&mut self) {
        self.age += 1;
        let mut filled = std::mem::take(&mut self.filled);
        filled.retain(|&(index, slot)| {
            let facts = self.facts[index as usize][usize::from(slot)];
            let stays = facts & GLOBAL != 0 && facts & VALID != 0;
            if !stays {
                self.clear(index, slot.into());
                self.facts[index as usize][usize::from(slot)] = 0;
            }
            stays
        });
        self.filled = filled;
    }

    /// Drops the translation of the page at `linear` (INVLPG), also if it is part of a large page; whether that meant to
    /// drop everything.
    pub fn flush_page(&mut self, linear: u64) -> bool {
        self.age += 1;
        if self.large.is_some_and(|(base, mask)| linear & mask == base) {
            self.flush();
            return true;
        }
        let linear = linear & !0xfff;
        for index in [MmuIndex::Kernel, MmuIndex::KernelAc, MmuIndex::User] {
            if self.entry(index, Direction::Read, linear).tag == linear {
                self.clear(index, slot_of(linear));
            }
        }
        false
    }

    /// Drops the write permission from all entries of guest-physical `page`: it holds code now.
    pub fn protect(&mut self, page: u64) {
        self.age += 1;
        for &(index, slot) in &self.filled {
            let slot = usize::from(slot);
            if self.facts[index as usize][slot] & !BITS == page {
                self.tables.0[index as usize][Direction::Write as usize][slot] = invalid(slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hit(tlb: &Tlb, index: MmuIndex, linear: u64) -> (bool, bool) {
        let hit = |d| tlb.entry(index, d, linear).host(linear, 1).is_some();
        (hit(Direction::Read), hit(Direction::Write))
    }

    #[test]
    fn an_empty_slot_hits_for_no_address() {
        let tlb = Tlb::new().unwrap();
        for page in [
            0,
            1,
            2,
            4095,
            1 << 20,
            1 << 51,
            (1 << 51) + 1,
            (1 << 52) - 1,
        ] {
            for offset in [0, 1, 4095] {
                let linear = page << 12 | offset;
                assert_eq!(
                    hit(&tlb, MmuIndex::User, linear),
                    (false, false),
                    "{linear:#x}"
                );
            }
        }
    }

    #[test]
    fn an_access_that_leaves_the_page_does_not_hit() {
        let mut ram = [0u8; 4096];
        let mut tlb = Tlb::new().unwrap();
        tlb.fill(
            MmuIndex::User,
            0x5000,
            ram.as_mut_ptr(),
            0x1000,
            true,
            false,
            4096,
        );
        let host = |linear, size| {
            tlb.entry(MmuIndex::User, Direction::Write, linear)
                .host(linear, size)
        };
        assert_eq!(host(0x5ff8, 8), Some(ram.as_mut_ptr().wrapping_add(0xff8)));
        assert_eq!((host(0x5ff9, 8), host(0x4fff, 2)), (None, None));
    }

    #[test]
    fn flushes_drop_what_they_must_and_no_more() {
        use MmuIndex::*;
        let mut ram = [0u8; 8192];
        let host = ram.as_mut_ptr();
        let mut tlb = Tlb::new().unwrap();
        let (global, local) = (0xffff_8000_0000_1000, 0x40_2000);
        tlb.fill(Kernel, global, host, 0x5000, true, true, 4096);
        tlb.fill(User, local, host, 0x6000, true, false, 4096);
        assert_eq!(hit(&tlb, Kernel, global), (true, true));
        assert_eq!(
            hit(&tlb, User, global),
            (false, false),
            "rights do not leak between tables"
        );
        tlb.protect(0x6000);
        assert_eq!(hit(&tlb, User, local), (true, false));
        assert_eq!(hit(&tlb, Kernel, global), (true, true));
        tlb.flush_local();
        assert_eq!(hit(&tlb, User, local), (false, false));
        assert_eq!(hit(&tlb, Kernel, global), (true, true));
        assert!(!tlb.flush_page(global + 0xfff));
        assert_eq!(hit(&tlb, Kernel, global), (false, false));
        tlb.fill(User, local, host, 0x6000, true, false, 4096);
        tlb.fill(Kernel, global, host, 0x5000, true, true, 1 << 21);
        assert!(!tlb.flush_page(local + 0x20_0000));
        assert_eq!(hit(&tlb, Kernel, global), (true, true), "far away");
        assert!(tlb.flush_page(global + 0x10_0000));
        assert_eq!(
            hit(&tlb, Kernel, global),
            (false, false),
            "a large page goes as a whole"
        );
    }
}
