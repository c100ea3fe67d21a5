//! Where things go in guest memory, and the memory map that tells the guest about it.

use std::ops::Range;

use lodger_guest_memory::GuestMemory;
use lodger_tables::{AcpiConfig, RSDP_LEN, Tables};

use crate::error::Reason;
use crate::plan::Plan;

/// Interrupt vectors and BIOS data.
const BIOS_DATA: Range<u64> = 0..0x1000;
/// Extended BIOS data, video memory and ROM of a PC.
const LEGACY: Range<u64> = 0x9_fc00..0x10_0000;
/// Where an operating system searches for the RSDP, short of where it searches for SMBIOS.
const TABLES: Range<u64> = 0xe_0000..0xf_0000;
const PAGE: u64 = 4096;
const FOUR_GIB: u64 = 1 << 32;

/// A range of the memory map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MapEntry {
    pub(crate) range: Range<u64>,
    /// RAM that the kernel may use, or reserved.
    pub(crate) usable: bool,
}

impl MapEntry {
    /// The type code that e820, PVH and Multiboot have in common.
    pub(crate) fn kind(&self) -> u32 {
        if self.usable { 1 } else { 2 }
    }

    pub(crate) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// The end of the RAM below 4 GiB: what can be reached from a 32-bit entry.
pub(crate) fn low_memory(memory: &GuestMemory) -> u64 {
    let ends = memory.ranges().iter().map(|r| r.start + r.len);
    ends.filter(|end| *end <= FOUR_GIB).max().unwrap_or(0)
}

/// Guest memory and what is taken of it so far.
#[derive(Clone)]
pub(crate) struct Placement<'a> {
    pub(crate) memory: &'a GuestMemory,
    /// Ascending.
    taken: Vec<Range<u64>>,
    /// What the memory map calls reserved.
    reserved: Vec<Range<u64>>,
}

impl<'a> Placement<'a> {
    /// Nothing is taken but what a PC reserves.
    pub(crate) fn new(memory: &'a GuestMemory, acpi: &AcpiConfig) -> Placement<'a> {
        let mut reserved = vec![LEGACY];
        if let Some(ecam) = &acpi.ecam {
            let base = u64::from(ecam.base);
            reserved.push(base..base + u64::from(ecam.len()));
        }
        Placement {
            memory,
            taken: vec![BIOS_DATA, LEGACY],
            reserved,
        }
    }

    pub(crate) fn low_memory(&self) -> u64 {
        low_memory(self.memory)
    }

    /// Takes what `plan` needs.
    pub(crate) fn place(&self, plan: &Plan) -> Result<Placement<'a>, Reason> {
        let lens = plan.pieces.iter().map(|piece| piece.len);
        let len = lens.fold(0, u64::saturating_add);
        if len > self.memory.size() {
            let what = "the kernel";
            return Err(Reason::NoRoom { what, len });
        }
        let mut placement = self.clone();
        for range in plan.ranges() {
            placement.claim("the kernel", range)?;
        }
        Ok(placement)
    }

    /// Takes `range`.
    fn claim(&mut self, what: &'static str, range: Range<u64>) -> Result<(), Reason> {
        let mut gaps = self.gaps();
        if !gaps.any(|gap| gap.start <= range.start && range.end <= gap.end) {
            return Err(Reason::DoesNotFit {
                what,
                start: range.start,
                end: range.end,
                ram: self.low_memory(),
            });
        }
        drop(gaps);
        self.take(range);
        Ok(())
    }

    fn take(&mut self, range: Range<u64>) {
        let at = self.taken.partition_point(|t| t.start < range.start);
        self.taken.insert(at, range);
    }

    /// RAM that is not taken, ascending.
    fn gaps(&self) -> impl DoubleEndedIterator<Item = Range<u64>> {
        let mut gaps = Vec::new();
        for ram in self.memory.ranges() {
            let (mut start, end) = (ram.start, ram.start + ram.len);
            for taken in &self.taken {
                if taken.start > start {
                    gaps.push(start..taken.start.min(end));
                }
                start = start.max(taken.end);
                if start >= end {
                    break;
                }
            }
            if start < end {
                gaps.push(start..end);
            }
        }
        gaps.retain(|gap| gap.start < gap.end);
        gaps.into_iter()
    }

    /// Takes `len` bytes of whole pages, as high as possible below `limit` and 4 GiB.
    pub(crate) fn highest(
        &mut self,
        len: u64,
        what: &'static str,
        limit: u64,
    ) -> Result<Range<u64>, Reason> {
        let fit = |gap: Range<u64>| {
            let end = gap.end.min(limit).min(FOUR_GIB);
            let start = end.checked_sub(len)? / PAGE * PAGE;
            (start >= gap.start).then_some(start..start + len)
        };
        let found = self.gaps().rev().find_map(fit);
        let range = found.ok_or(Reason::NoRoom { what, len })?;
        self.take(range.start..range.end.next_multiple_of(PAGE));
        Ok(range)
    }

    /// Takes `len` bytes, as low as possible.
    pub(crate) fn lowest(&mut self, len: u64, align: u64) -> Result<u64, Reason> {
        let fit = |gap: Range<u64>| {
            let start = gap.start.next_multiple_of(align);
            (start + len <= gap.end.min(FOUR_GIB)).then_some(start)
        };
        let start = self.gaps().find_map(fit).ok_or(Reason::NoRoom {
            what: "the boot parameters",
            len,
        })?;
        self.take(start..start + len);
        Ok(start)
    }

    /// Writes `bytes` as low as possible and returns the address.
    pub(crate) fn put(&mut self, bytes: &[u8], align: u64) -> Result<u64, Reason> {
        let address = self.lowest(bytes.len() as u64, align)?;
        self.memory.write(address, bytes)?;
        Ok(address)
    }

    /// Writes what kernels look for in the BIOS data area: where the extended one is and where base memory ends.
    pub(crate) fn write_bios_data(&self) -> Result<(), Reason> {
        const EXTENDED_SEGMENT: u64 = 0x40e;
        const BASE_MEMORY_KIB: u64 = 0x413;
        let segment = (LEGACY.start >> 4) as u16;
        let kib = (LEGACY.start >> 10) as u16;
        self.memory
            .write(EXTENDED_SEGMENT, &segment.to_le_bytes())?;
        self.memory.write(BASE_MEMORY_KIB, &kib.to_le_bytes())?;
        // The extended area starts with its size in KiB.
        Ok(self.memory.write(LEGACY.start, &[1])?)
    }

    /// Builds the ACPI tables, writes them and returns the address of the RSDP. They are at 0xe0000, or at the top
    /// of low memory, with a copy of the RSDP at 0xe0000, if they are too long.
    pub(crate) fn place_tables(&mut self, acpi: &AcpiConfig) -> Result<u64, Reason> {
        let write = |memory: &GuestMemory, tables: &Tables| {
            memory.write(tables.base.into(), &tables.bytes)?;
            Ok(tables.rsdp_address().into())
        };
        let legacy = lodger_tables::build(acpi, TABLES.start as u32);
        let len = legacy.bytes.len();
        if len as u64 <= TABLES.end - TABLES.start && self.memory.contains(TABLES.start, len) {
            return write(self.memory, &legacy);
        }
        let range = self.highest(len as u64, "the ACPI tables", FOUR_GIB)?;
        let tables = lodger_tables::build(acpi, range.start as u32);
        if self.memory.contains(TABLES.start, RSDP_LEN) {
            self.memory.write(TABLES.start, tables.rsdp())?;
        }
        self.reserved
            .push(range.start..range.end.next_multiple_of(PAGE));
        write(self.memory, &tables)
    }

    /// The memory map, ascending.
    pub(crate) fn memory_map(&self) -> Vec<MapEntry> {
        let all = Placement {
            taken: {
                let mut reserved = self.reserved.clone();
                reserved.sort_by_key(|r| r.start);
                reserved
            },
            ..self.clone()
        };
        let usable = all.gaps().map(|range| (range, true));
        let reserved = all.taken.iter().cloned().map(|range| (range, false));
        let mut map: Vec<_> = usable
            .chain(reserved)
            .map(|(range, usable)| MapEntry { range, usable })
            .collect();
        map.sort_by_key(|entry| entry.range.start);
        map
    }
}
