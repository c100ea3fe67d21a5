//! ELF files (System V ABI, chapters 4 and 5): their segments, entry and PVH note.

use object::Endianness;
use object::elf::{EM_386, EM_X86_64, ET_DYN, ET_EXEC, FileHeader32, FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};

use crate::BootKind;
use crate::error::Reason;
use crate::linux;
use crate::plan::{Piece, Plan};

const LE: Endianness = Endianness::Little;
/// The note that gives the PVH entry (Xen `elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// More loadable segments than any kernel has.
const MAX_SEGMENTS: usize = 256;

/// An ELF file as far as it is loaded.
#[derive(Debug)]
pub(crate) struct Elf<'a> {
    wide: bool,
    entry: u64,
    segments: Vec<Segment<'a>>,
    pvh_entry: Option<u32>,
}

#[derive(Debug)]
struct Segment<'a> {
    piece: Piece<'a>,
    linear: u64,
}

impl<'a> Elf<'a> {
    pub(crate) fn is_elf(bytes: &[u8]) -> bool {
        bytes.starts_with(b"\x7fELF")
    }

    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Elf<'a>, Reason> {
        if !Elf::is_elf(bytes) {
            return Err(Reason::NotAKernel("not an ELF file"));
        }
        match bytes.get(4) {
            Some(1) => Elf::read::<FileHeader32<Endianness>>(bytes, false),
            Some(2) => Elf::read::<FileHeader64<Endianness>>(bytes, true),
            _ => Err(damaged("unknown ELF class")),
        }
    }

    fn read<H: FileHeader<Endian = Endianness>>(
        bytes: &'a [u8],
        wide: bool,
    ) -> Result<Elf<'a>, Reason> {
        let header = H::parse(bytes).map_err(damaged)?;
        if header.is_big_endian() || !matches!(header.e_machine(LE), EM_386 | EM_X86_64) {
            return Err(Reason::NotAKernel("an ELF file for another processor"));
        }
        if !matches!(header.e_type(LE), ET_EXEC | ET_DYN) {
            return Err(Reason::NotAKernel("an ELF file that is not executable"));
        }
        let headers = header.program_headers(LE, bytes).map_err(damaged)?;
        let mut elf = Elf {
            wide,
            entry: header.e_entry(LE).into(),
            segments: Vec::new(),
            pvh_entry: None,
        };
        for program_header in headers {
            if program_header.p_type(LE) == PT_LOAD {
                elf.add_segment::<H>(program_header, bytes)?;
            } else if elf.pvh_entry.is_none() {
                elf.pvh_entry = pvh_note::<H>(program_header, bytes)?;
            }
        }
        if elf.segments.is_empty() {
            return Err(damaged("the ELF file has no loadable segment"));
        }
        Ok(elf)
    }

    fn add_segment<H: FileHeader<Endian = Endianness>>(
        &mut self,
        header: &H::ProgramHeader,
        bytes: &'a [u8],
    ) -> Result<(), Reason> {
        let len: u64 = header.p_memsz(LE).into();
        if len == 0 {
            return Ok(());
        }
        if self.segments.len() == MAX_SEGMENTS {
            return Err(damaged("too many segments"));
        }
        let (offset, in_file) = header.file_range(LE);
        let data = header.data(LE, bytes).map_err(|()| Reason::Truncated {
            what: "a segment",
            end: offset.saturating_add(in_file),
            len: bytes.len() as u64,
        })?;
        let address: u64 = header.p_paddr(LE).into();
        if in_file > len || address.checked_add(len).is_none() {
            return Err(damaged("a segment with impossible sizes"));
        }
        let piece = Piece { data, address, len };
        let linear = header.p_vaddr(LE).into();
        self.segments.push(Segment { piece, linear });
        Ok(())
    }

    /// Whether a segment is loaded at guest-physical `address`.
    fn has(&self, address: u64) -> bool {
        let mut segments = self.segments.iter();
        segments.any(|s| address.wrapping_sub(s.piece.address) < s.piece.len)
    }

    /// The guest-physical address of the entry, which may be given as a linear one.
    fn physical_entry(&self) -> Result<u64, Reason> {
        if self.has(self.entry) {
            return Ok(self.entry);
        }
        let translate = |s: &Segment| {
            let offset = self.entry.wrapping_sub(s.linear);
            (offset < s.piece.len).then(|| s.piece.address + offset)
        };
        let translated = self.segments.iter().find_map(translate);
        translated.ok_or_else(|| damaged("the entry point is in no segment"))
    }

    fn plan_for(&self, kind: BootKind, entry: u64) -> Plan<'a> {
        let mut plan = Plan::new(kind, entry, "ELF kernel");
        plan.pieces = self.segments.iter().map(|s| s.piece.clone()).collect();
        plan
    }

    /// By the PVH note, or else by the entry of the ELF header.
    pub(crate) fn plan(&self) -> Result<Plan<'a>, Reason> {
        if let Some(entry) = self.pvh_entry.map(u64::from) {
            if !self.has(entry) {
                return Err(damaged("the PVH entry is in no segment"));
            }
            return Ok(self.plan_for(BootKind::Pvh, entry));
        }
        let kind = if self.wide {
            BootKind::Elf64
        } else {
            BootKind::Elf32
        };
        let mut plan = self.plan_for(kind, self.physical_entry()?);
        plan.header = linux::header_of_vmlinux();
        plan.append_limit = linux::COMMAND_LINE_LIMIT;
        Ok(plan)
    }

    /// As a Multiboot kernel.
    pub(crate) fn plan_multiboot(&self) -> Result<Plan<'a>, Reason> {
        Ok(self.plan_for(BootKind::Multiboot1, self.physical_entry()?))
    }
}

/// The PVH entry, if this is a note segment that has one.
fn pvh_note<H: FileHeader<Endian = Endianness>>(
    header: &H::ProgramHeader,
    bytes: &[u8],
) -> Result<Option<u32>, Reason> {
    let Some(mut notes) = header.notes(LE, bytes).map_err(damaged)? else {
        return Ok(None);
    };
    while let Some(note) = notes.next().map_err(damaged)? {
        if note.n_type(LE) == XEN_ELFNOTE_PHYS32_ENTRY && note.name() == b"Xen" {
            let entry = note.desc().first_chunk();
            let entry = entry.ok_or_else(|| damaged("the PVH note is too short"))?;
            return Ok(Some(u32::from_le_bytes(*entry)));
        }
    }
    Ok(None)
}

fn damaged(what: impl ToString) -> Reason {
    Reason::Damaged(what.to_string())
}
