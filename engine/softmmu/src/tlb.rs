//! The TLB: direct-mapped tables of page translations, one per privilege and direction of data access.
//!
//! A hit is one comparison: the distance of the address from the tag is at most the page size less that of the access. It fails for
//! another page and for an access that leaves the page. The layout is known to translated code.

use std::collections::{HashMap, HashSet};
use std::hash::BuildHasherDefault;
use std::io;
use std::mem::offset_of;

use lodger_guest_memory::PAGE_SIZE;
use lodger_host_sys::low::LowBox;

use crate::hash::AddressHasher;

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

/// Entries of one table: they cover 64 MiB.
pub const ENTRIES: usize = 1 << 14;

/// An entry with a tag that no address which is looked up in `slot` is near to. Zeros for all but one, so that memory which is never used
/// is never touched.
const fn invalid(slot: usize) -> TlbEntry {
    TlbEntry {
        tag: if slot == 0 { 1 << 63 | 1 << 25 } else { 0 },
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
const VALID: Facts = 2;
/// The slot is in the list of local, or of global ones.
const LISTED: [Facts; 2] = [4, 8];
const ALL_LISTED: Facts = LISTED[0] | LISTED[1];
const BITS: Facts = 0xfff;

/// Address spaces that are remembered while others are in use, and entries of each. Systems number few of them.
const SPACES: usize = 8;
const KEPT: usize = 2048;
/// Large mappings that are known, at most.
const LARGE: usize = 4096;

/// Where an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    index: MmuIndex,
    direction: Direction,
    slot: u16,
}

/// Which write entries of the tables may be of a guest-physical page. They may have been dropped since.
#[derive(Clone, Copy)]
enum Writers {
    One(Place),
    Several,
}

/// Pages that are known to have write entries, at most.
const WRITERS: usize = 8 * ENTRIES;

/// An entry of an address space that is not in use.
struct Kept {
    place: Place,
    facts: Facts,
    entry: TlbEntry,
}

/// An address space that is not in use.
#[derive(Default)]
struct Space {
    number: u16,
    entries: Vec<Kept>,
}

/// The data TLB of one vCPU.
///
/// Entries that are not global belong to an address space (a PCID). Only those of the current one are in the tables; the others are
/// put aside, and back when their space is used again.
pub struct Tlb {
    tables: LowBox<Tables>,
    facts: Box<[[[Facts; ENTRIES]; 2]; 3]>,
    /// Which slots were filled with local, and with global entries since these were last all flushed, so that a flush need not look
    /// at the others.
    filled: [Vec<Place>; 2],
    /// By guest-physical page.
    writers: HashMap<u64, Writers, BuildHasherDefault<AddressHasher>>,
    /// The current address space, and others, the latest last.
    space: u16,
    spaces: Vec<Space>,
    /// Room for the entries of one.
    spare: Vec<Kept>,
    /// Mappings larger than 4 KiB that entries were made from: address, and log2 of the size in its low bits. INVLPG means all of one.
    large: HashSet<u64, BuildHasherDefault<AddressHasher>>,
    /// How often entries have been dropped or lost a permission.
    age: u64,
}

/// Log2 of the sizes of large mappings; the last is half of all addresses: no paging, or too many to tell apart.
const LARGE_SIZES: [u32; 4] = [21, 22, 30, 63];

fn slot_of(linear: u64) -> usize {
    (linear >> 12) as usize % ENTRIES
}

/// How a mapping of 2^`log` bytes at `linear` is known.
fn large_key(linear: u64, log: u32) -> u64 {
    linear >> log << log | u64::from(log)
}

impl Tlb {
    /// An empty TLB. Fails if the host has no memory for it.
    pub fn new() -> io::Result<Tlb> {
        // SAFETY: numbers.
        let mut tables = unsafe { LowBox::<Tables>::zeroed() }?;
        for table in tables.0.iter_mut().flatten() {
            table[0] = invalid(0);
        }
        Ok(Tlb {
            tables,
            facts: vec![[[0; ENTRIES]; 2]; 3].try_into().expect("three"),
            filled: Default::default(),
            writers: HashMap::default(),
            space: 0,
            spaces: Vec::new(),
            spare: Vec::new(),
            large: HashSet::default(),
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

    fn facts(&mut self, place: Place) -> &mut Facts {
        &mut self.facts[place.index as usize][place.direction as usize][usize::from(place.slot)]
    }

    fn at(&mut self, place: Place) -> &mut TlbEntry {
        &mut self.tables.0[place.index as usize][place.direction as usize][usize::from(place.slot)]
    }

    fn clear(&mut self, place: Place) {
        *self.at(place) = invalid(place.slot.into());
        *self.facts(place) &= ALL_LISTED;
    }

    /// Enters a translation of the page at `linear` to RAM at `host`, guest-physical `page`, for an access of direction `wanted`.
    /// `write`: it may be written through the entry. `size`: bytes of the whole mapping that the page is part of.
    ///
    /// Accesses of the other direction get it, too, unless they have another page there: a copy between pages that share a slot
    /// keeps both.
    #[allow(clippy::too_many_arguments)]
    pub fn fill(
        &mut self,
        index: MmuIndex,
        wanted: Direction,
        linear: u64,
        host: *mut u8,
        page: u64,
        write: bool,
        global: bool,
        size: u64,
    ) {
        let linear = linear & !0xfff;
        self.note_size(linear, size);
        let entry = TlbEntry {
            tag: linear,
            page: host as u64,
        };
        let facts = page | VALID | if global { GLOBAL } else { 0 };
        for direction in [Direction::Read, Direction::Write] {
            let place = Place {
                index,
                direction,
                slot: slot_of(linear) as u16,
            };
            let same = self.at(place).tag == linear;
            if direction == Direction::Write && !write {
                if same {
                    self.clear(place);
                }
            } else if same || direction == wanted || *self.facts(place) & VALID == 0 {
                self.put(place, entry, facts);
            }
        }
    }

    fn put(&mut self, place: Place, entry: TlbEntry, new: Facts) {
        let list = usize::from(new & GLOBAL != 0);
        let facts = self.facts(place);
        let old = std::mem::replace(facts, new | *facts & ALL_LISTED | LISTED[list]);
        if old & LISTED[list] == 0 {
            self.filled[list].push(place);
        }
        *self.at(place) = entry;
        if place.direction == Direction::Write {
            self.note_writer(place, new & !BITS);
        }
    }

    fn note_writer(&mut self, place: Place, page: u64) {
        if self.writers.len() == WRITERS {
            self.writers.clear();
            for list in [0, 1] {
                for n in 0..self.filled[list].len() {
                    let other = self.filled[list][n];
                    let facts = *self.facts(other);
                    if other.direction == Direction::Write && facts & VALID != 0 {
                        self.note_writer(other, facts & !BITS);
                    }
                }
            }
        }
        let known = self.writers.entry(page).or_insert(Writers::One(place));
        if !matches!(known, Writers::One(other) if *other == place) {
            *known = Writers::Several;
        }
    }

    /// Something is cached of the mapping of `size` bytes that `linear` is part of (`u64::MAX`: there is no paging).
    pub fn note_size(&mut self, linear: u64, size: u64) {
        if size <= 4096 {
            return;
        }
        if self.large.len() == LARGE {
            // All in two.
            self.large.clear();
            self.large
                .extend([large_key(0, 63), large_key(1 << 63, 63)]);
        }
        self.large.insert(large_key(linear, size.ilog2()));
    }

    /// Drops everything, in all address spaces.
    pub fn flush(&mut self) {
        self.age += 1;
        for list in [0, 1] {
            for place in std::mem::take(&mut self.filled[list]) {
                self.clear(place);
                *self.facts(place) = 0;
            }
        }
        self.spaces.clear();
        self.large.clear();
        self.writers.clear();
    }

    /// Drops everything but global pages from the current address space (a CR3 load).
    pub fn flush_local(&mut self) {
        self.take_local(|_| {});
    }

    /// Empties the tables of what belongs to the current address space.
    fn take_local(&mut self, mut dropped: impl FnMut(Kept)) {
        self.age += 1;
        let mut local = std::mem::take(&mut self.filled[0]);
        for place in local.drain(..) {
            let facts = self.facts(place);
            *facts &= !LISTED[0];
            let facts = *facts;
            if facts & (VALID | GLOBAL) == VALID {
                dropped(Kept {
                    place,
                    facts: facts & !ALL_LISTED,
                    entry: *self.at(place),
                });
                self.clear(place);
            }
        }
        // With the room it has.
        self.filled[0] = local;
    }

    /// Makes another address space the current one (a CR3 load with PCIDs). `keep`: what is remembered of it is still true.
    pub fn switch(&mut self, space: u16, keep: bool) {
        if space == self.space {
            if !keep {
                self.flush_local();
            }
            return;
        }
        let known = self.spaces.iter().position(|s| s.number == space);
        let new = known.map(|n| self.spaces.remove(n));
        if self.spaces.len() == SPACES {
            self.spaces.remove(0);
        }
        let mut entries = std::mem::take(&mut self.spare);
        self.take_local(|kept| {
            if entries.len() < KEPT {
                entries.push(kept);
            }
        });
        let old = std::mem::replace(&mut self.space, space);
        self.spaces.push(Space {
            number: old,
            entries,
        });
        let mut entries = new.map(|space| space.entries).unwrap_or_default();
        for kept in entries.drain(..).filter(|_| keep) {
            self.put(kept.place, kept.entry, kept.facts);
        }
        self.spare = entries;
    }

    /// Drops the translation of the page at `linear` from the current address space (INVLPG), also if it is part of a large page;
    /// whether it is.
    pub fn flush_page(&mut self, linear: u64) -> bool {
        self.age += 1;
        let mut large = false;
        for log in LARGE_SIZES {
            if self.large.remove(&large_key(linear, log)) {
                large = true;
                self.flush_range(large_key(linear, log), log);
            }
        }
        let linear = linear & !0xfff;
        for index in [MmuIndex::Kernel, MmuIndex::KernelAc, MmuIndex::User] {
            for direction in [Direction::Read, Direction::Write] {
                if self.entry(index, direction, linear).tag == linear {
                    self.clear(Place {
                        index,
                        direction,
                        slot: slot_of(linear) as u16,
                    });
                }
            }
        }
        large
    }

    /// Drops what lies within 2^`log` bytes of `linear`.
    fn flush_range(&mut self, linear: u64, log: u32) {
        if log == 63 {
            return self.flush();
        }
        for list in [0, 1] {
            for n in 0..self.filled[list].len() {
                let place = self.filled[list][n];
                if (self.at(place).tag ^ linear) >> log == 0 {
                    self.clear(place);
                }
            }
        }
    }

    fn drop_writer(&mut self, place: Place, page: u64) {
        let holds = *self.facts(place) & !BITS == page;
        if holds && place.direction == Direction::Write {
            self.clear(place);
        }
    }

    /// Drops the write permission from all entries of guest-physical `page`: it holds code now.
    pub fn protect(&mut self, page: u64) {
        self.age += 1;
        match self.writers.remove(&page) {
            None => {}
            Some(Writers::One(place)) => self.drop_writer(place, page),
            Some(Writers::Several) => {
                for list in [0, 1] {
                    for n in 0..self.filled[list].len() {
                        self.drop_writer(self.filled[list][n], page);
                    }
                }
            }
        }
        for space in &mut self.spaces {
            space.entries.retain(|kept| {
                kept.place.direction == Direction::Read || kept.facts & !BITS != page
            });
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
            Direction::Read,
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
        tlb.fill(
            Kernel,
            Direction::Read,
            global,
            host,
            0x5000,
            true,
            true,
            4096,
        );
        tlb.fill(
            User,
            Direction::Read,
            local,
            host,
            0x6000,
            true,
            false,
            4096,
        );
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
        tlb.fill(
            User,
            Direction::Read,
            local,
            host,
            0x6000,
            true,
            false,
            4096,
        );
        tlb.fill(
            Kernel,
            Direction::Read,
            global,
            host,
            0x5000,
            true,
            true,
            1 << 21,
        );
        tlb.fill(
            Kernel,
            Direction::Read,
            global + 0x20_0000,
            host,
            0x7000,
            true,
            true,
            4096,
        );
        assert!(!tlb.flush_page(local + 0x20_0000));
        assert_eq!(hit(&tlb, Kernel, global), (true, true), "far away");
        assert!(tlb.flush_page(global + 0x10_0000));
        assert_eq!(
            hit(&tlb, Kernel, global),
            (false, false),
            "a large page goes as a whole"
        );
        assert_eq!(hit(&tlb, User, local), (true, true), "and nothing else");
        assert_eq!(hit(&tlb, Kernel, global + 0x20_0000), (true, true));
        tlb.fill(
            User,
            Direction::Read,
            local,
            host,
            0x6000,
            true,
            false,
            u64::MAX,
        );
        assert!(tlb.flush_page(0));
        assert_eq!(hit(&tlb, User, local), (false, false), "without paging");
    }

    #[test]
    fn too_many_large_pages_to_know_are_all_dropped_together() {
        let mut ram = [0u8; 4096];
        let host = ram.as_mut_ptr();
        let first = 0xffff_8000_0000_1000;
        let mut tlb = Tlb::new().unwrap();
        for n in 0..=LARGE as u64 {
            let linear = first + n * (1 << 21) + if n > 0 { 0x1000 } else { 0 };
            tlb.fill(
                MmuIndex::Kernel,
                Direction::Read,
                linear,
                host,
                0x1000,
                true,
                true,
                1 << 21,
            );
        }
        assert!(hit(&tlb, MmuIndex::Kernel, first).0);
        assert!(tlb.flush_page(first + 0x5000));
        assert!(!hit(&tlb, MmuIndex::Kernel, first).0);
    }

    #[test]
    fn a_slot_may_hold_local_and_global_pages_in_turn() {
        let mut ram = [0u8; 4096];
        let host = ram.as_mut_ptr();
        let mut tlb = Tlb::new().unwrap();
        let (one, other) = (0x5000, 0x5000 + (ENTRIES as u64) * 4096);
        for (first, second) in [(false, true), (true, false), (true, true), (false, false)] {
            tlb.fill(
                MmuIndex::Kernel,
                Direction::Read,
                one,
                host,
                0x1000,
                true,
                first,
                4096,
            );
            tlb.fill(
                MmuIndex::Kernel,
                Direction::Read,
                other,
                host,
                0x1000,
                true,
                second,
                4096,
            );
            tlb.flush_local();
            assert_eq!(
                hit(&tlb, MmuIndex::Kernel, other).0,
                second,
                "{first} {second}"
            );
            tlb.flush();
            assert!(!hit(&tlb, MmuIndex::Kernel, other).0, "{first} {second}");
        }
    }

    #[test]
    fn reading_one_page_and_writing_another_of_the_same_slot_keeps_both() {
        use MmuIndex::*;
        let mut ram = [0u8; 4096];
        let host = ram.as_mut_ptr();
        let mut tlb = Tlb::new().unwrap();
        let (from, to) = (0x5000, 0x5000 + (ENTRIES as u64) * 4096);
        tlb.fill(
            User,
            Direction::Read,
            from,
            host,
            0x1000,
            false,
            false,
            4096,
        );
        tlb.fill(User, Direction::Write, to, host, 0x2000, true, false, 4096);
        assert_eq!(hit(&tlb, User, from), (true, false));
        assert_eq!(hit(&tlb, User, to), (false, true));
        tlb.fill(User, Direction::Read, from, host, 0x1000, true, false, 4096);
        assert_eq!(
            hit(&tlb, User, to),
            (false, true),
            "a read evicts no write entry"
        );
        tlb.fill(
            User,
            Direction::Write,
            from,
            host,
            0x1000,
            true,
            false,
            4096,
        );
        assert_eq!(hit(&tlb, User, from), (true, true));
        assert_eq!(hit(&tlb, User, to), (false, false));
        tlb.fill(
            User,
            Direction::Read,
            from,
            host,
            0x3000,
            false,
            false,
            4096,
        );
        assert_eq!(
            hit(&tlb, User, from),
            (true, false),
            "not writable any more"
        );
    }

    #[test]
    fn a_page_that_becomes_code_is_written_through_no_entry() {
        use MmuIndex::*;
        let mut ram = [0u8; 4096];
        let host = ram.as_mut_ptr();
        let mut tlb = Tlb::new().unwrap();
        let fill = |tlb: &mut Tlb, linear, page| {
            tlb.fill(
                User,
                Direction::Write,
                linear,
                host,
                page,
                true,
                false,
                4096,
            );
        };
        // Two entries of a page, one of which another page has replaced and left again.
        let (one, other, alias) = (0x5000, 0x6000, 0x5000 + (ENTRIES as u64) * 4096);
        fill(&mut tlb, one, 0x1000);
        fill(&mut tlb, alias, 0x2000);
        fill(&mut tlb, one, 0x1000);
        fill(&mut tlb, other, 0x1000);
        tlb.protect(0x1000);
        assert_eq!(hit(&tlb, User, one), (true, false));
        assert_eq!(hit(&tlb, User, other), (true, false));
        fill(&mut tlb, other, 0x1000);
        tlb.protect(0x1000);
        assert_eq!(hit(&tlb, User, other), (true, false));
        // More pages than are known.
        for n in 0..WRITERS as u64 + 2 {
            fill(&mut tlb, n << 12, (n + 16) << 12);
        }
        let last = WRITERS as u64 + 1;
        for n in [last, last - 1, last - 2, last - 3] {
            assert!(hit(&tlb, User, n << 12).1);
            tlb.protect((n + 16) << 12);
            assert!(!hit(&tlb, User, n << 12).1, "{n}");
        }
    }

    #[test]
    fn address_spaces_are_remembered_until_they_are_flushed() {
        use MmuIndex::*;
        let mut ram = [0u8; 4096];
        let host = ram.as_mut_ptr();
        let fill = |tlb: &mut Tlb, linear| {
            tlb.fill(
                User,
                Direction::Read,
                linear,
                host,
                0x3000,
                true,
                false,
                4096,
            )
        };
        let mut tlb = Tlb::new().unwrap();
        let (both, one, gone) = ((true, true), (true, false), (false, false));
        tlb.switch(1, false);
        fill(&mut tlb, 0x1000);
        fill(&mut tlb, 0x2000);
        tlb.switch(2, false);
        assert_eq!(hit(&tlb, User, 0x1000), gone, "another space");
        fill(&mut tlb, 0x1000);
        fill(&mut tlb, 0x4000);
        assert!(!tlb.flush_page(0x2000), "INVLPG is for the current space");
        tlb.switch(1, true);
        assert_eq!(hit(&tlb, User, 0x1000), both);
        assert_eq!(hit(&tlb, User, 0x2000), both);
        assert_eq!(hit(&tlb, User, 0x4000), gone);
        tlb.protect(0x3000);
        assert_eq!(hit(&tlb, User, 0x1000), one);
        tlb.switch(2, true);
        assert_eq!(hit(&tlb, User, 0x4000), one, "protected while it was away");
        tlb.switch(1, false);
        assert_eq!(hit(&tlb, User, 0x1000), gone, "flushed");
        tlb.switch(2, true);
        assert_eq!(hit(&tlb, User, 0x4000), one, "but not the other");
        tlb.flush();
        tlb.switch(1, true);
        tlb.switch(2, true);
        assert_eq!(hit(&tlb, User, 0x4000), gone, "all of them");
        for space in 10..40 {
            tlb.switch(space, true);
            fill(&mut tlb, u64::from(space) << 12);
        }
        tlb.switch(10, true);
        assert_eq!(hit(&tlb, User, 10 << 12), gone, "not for ever");
    }
}
