//! What every format comes down to: pieces of a file at addresses, and an entry.

use std::ops::Range;

use linux_loader::loader::bootparam::setup_header;
use lodger_guest_memory::GuestMemory;

use crate::BootKind;
use crate::error::Reason;

/// Bytes that go to an address; what of `len` they do not fill is zero.
#[derive(Debug, Clone)]
pub(crate) struct Piece<'a> {
    pub(crate) data: &'a [u8],
    pub(crate) address: u64,
    pub(crate) len: u64,
}

/// How to load and enter a kernel.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) kind: BootKind,
    /// Guest-physical.
    pub(crate) entry: u64,
    pub(crate) pieces: Vec<Piece<'a>>,
    /// Memory that the kernel needs beyond its pieces.
    pub(crate) workspace: Range<u64>,
    /// The bzImage's header, or one like it, for `boot_params`.
    pub(crate) header: setup_header,
    /// The longest command line.
    pub(crate) append_limit: usize,
    /// The initial RAM disk must end at or below this address.
    pub(crate) initrd_limit: u64,
    pub(crate) description: String,
}

/// What the kernel is told.
pub(crate) struct Handover<'a> {
    /// The command line, with its final NUL.
    pub(crate) append: &'a [u8],
    pub(crate) kernel_name: String,
    pub(crate) initrd_name: Option<String>,
    pub(crate) initrd: Option<Range<u64>>,
    /// Address of the RSDP.
    pub(crate) rsdp: u64,
}

impl<'a> Plan<'a> {
    /// A plan with nothing in particular.
    pub(crate) fn new(kind: BootKind, entry: u64, description: impl Into<String>) -> Plan<'a> {
        Plan {
            kind,
            entry,
            pieces: Vec::new(),
            workspace: 0..0,
            header: setup_header::default(),
            append_limit: 0xffff,
            initrd_limit: 1 << 32,
            description: description.into(),
        }
    }

    /// The memory that it takes: ascending, disjoint.
    pub(crate) fn ranges(&self) -> Vec<Range<u64>> {
        let pieces = self.pieces.iter().map(|p| p.address..p.address + p.len);
        let mut ranges: Vec<_> = pieces.chain([self.workspace.clone()]).collect();
        ranges.retain(|r| r.start < r.end);
        ranges.sort_by_key(|r| r.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        merged
    }

    /// Writes the pieces.
    pub(crate) fn write(&self, memory: &GuestMemory) -> Result<(), Reason> {
        static ZEROS: [u8; 0x1_0000] = [0; 0x1_0000];
        for piece in &self.pieces {
            memory.write(piece.address, piece.data)?;
            let end = piece.address + piece.len;
            let mut at = piece.address + piece.data.len() as u64;
            while at < end {
                let len = (end - at).min(ZEROS.len() as u64);
                memory.write(at, &ZEROS[..len as usize])?;
                at += len;
            }
        }
        Ok(())
    }
}
