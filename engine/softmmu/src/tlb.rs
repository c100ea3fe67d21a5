//! The TLB: direct-mapped tables of page translations, one per privilege of data access.
//!
//! A hit is one comparison: a tag is the linear address of the page, or [`INVALID`]. Reads and writes have tags of their
//! own, as a page may be readable but not (yet) writable.

/// A tag that no page has.
pub const INVALID: u64 = u64::MAX;

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

/// One translation.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct TlbEntry {
    /// Linear address of the page if it may be read, else [`INVALID`].
    pub read: u64,
    /// Linear address of the page if it may be written, else [`INVALID`].
    pub write: u64,
    /// Host address of a byte = its linear address + this (wrapping).
    pub addend: u64,
    /// Guest-physical address of the page; bit 0: global, bit 1: the entry is in `filled`.
    page: u64,
}

const GLOBAL: u64 = 1;
const LISTED: u64 = 2;

const EMPTY: TlbEntry = TlbEntry {
    read: INVALID,
    write: INVALID,
    addend: 0,
    page: 0,
};

/// Entries of one table: 1024 cover 4 MiB; more did not pay for the longer flush.
const ENTRIES: usize = 1024;

/// The data TLB of one vCPU.
pub struct Tlb {
    tables: [Box<[TlbEntry; ENTRIES]>; 3],
    /// Which entries were filled since they were last all flushed, so that a flush need not look at the others.
    filled: Vec<(MmuIndex, u16)>,
    /// The smallest aligned range that holds all entered mappings larger than 4 KiB, as address and mask: INVLPG within it
    /// drops everything.
    large: Option<(u64, u64)>,
}

impl Default for Tlb {
    fn default() -> Self {
        Tlb::new()
    }
}

impl Tlb {
    /// An empty TLB.
    pub fn new() -> Tlb {
        Tlb {
            tables: std::array::from_fn(|_| Box::new([EMPTY; ENTRIES])),
            filled: Vec::new(),
            large: None,
        }
    }

    /// The entry in which a translation of `linear` would be.
    #[inline(always)]
    pub fn entry(&self, index: MmuIndex, linear: u64) -> &TlbEntry {
        &self.tables[index as usize][(linear >> 12) as usize % ENTRIES]
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
        let slot = (linear >> 12) as usize % ENTRIES;
        let entry = &mut self.tables[index as usize][slot];
        if entry.page & LISTED == 0 {
            self.filled.push((index, slot as u16));
        }
        *entry = TlbEntry {
            read: linear,
            write: if write { linear } else { INVALID },
            addend: (host as u64).wrapping_sub(linear),
            page: page | LISTED | if global { GLOBAL } else { 0 },
        };
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
        for (index, slot) in self.filled.drain(..) {
            self.tables[index as usize][slot as usize] = EMPTY;
        }
        self.large = None;
    }

    /// Drops everything but global pages (a CR3 load).
    pub fn flush_local(&mut self) {
        let tables = &mut self.tables;
        self.filled.retain(|&(index, slot)| {
            let entry = &mut tables[index as usize][slot as usize];
            let stays = entry.page & GLOBAL != 0 && entry.read != INVALID;
            if !stays {
                *entry = EMPTY;
            }
            stays
        });
    }

    /// Drops the translation of the page at `linear` (INVLPG), also if it is part of a large page.
    pub fn flush_page(&mut self, linear: u64) {
        if self.large.is_some_and(|(base, mask)| linear & mask == base) {
            return self.flush();
        }
        let linear = linear & !0xfff;
        for table in &mut self.tables {
            let entry = &mut table[(linear >> 12) as usize % ENTRIES];
            if entry.read == linear {
                (entry.read, entry.write) = (INVALID, INVALID);
            }
        }
    }

    /// Drops the write permission from all entries of guest-physical `page`: it holds code now.
    pub fn protect(&mut self, page: u64) {
        let entries = self.tables.iter_mut().flat_map(|t| t.iter_mut());
        entries
            .filter(|e| e.page & !(GLOBAL | LISTED) == page)
            .for_each(|e| e.write = INVALID);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hit(tlb: &Tlb, index: MmuIndex, linear: u64) -> (bool, bool) {
        let e = tlb.entry(index, linear);
        (e.read == linear & !0xfff, e.write == linear & !0xfff)
    }

    #[test]
    fn flushes_drop_what_they_must_and_no_more() {
        use MmuIndex::*;
        let mut ram = [0u8; 8192];
        let host = ram.as_mut_ptr();
        let mut tlb = Tlb::new();
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
        tlb.flush_page(global + 0xfff);
        assert_eq!(hit(&tlb, Kernel, global), (false, false));
        tlb.fill(User, local, host, 0x6000, true, false, 4096);
        tlb.fill(Kernel, global, host, 0x5000, true, true, 1 << 21);
        tlb.flush_page(local + 0x20_0000);
        assert_eq!(hit(&tlb, Kernel, global), (true, true), "far away");
        tlb.flush_page(global + 0x10_0000);
        assert_eq!(
            hit(&tlb, Kernel, global),
            (false, false),
            "a large page goes as a whole"
        );
    }
}
