//! Multiboot 1 (Multiboot specification 0.6.96): finds the header, loads ELF and flat images, enters them.

use lodger_x86::CpuState;

use crate::BootKind;
use crate::elf::Elf;
use crate::entry::{self, RAX, RBX};
use crate::error::Reason;
use crate::placement::Placement;
use crate::plan::{Handover, Piece, Plan};

/// The header lies in the first bytes of the file, at a multiple of 4.
const SEARCHED: usize = 8192;
const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// Header flags: the header has load addresses. Of the others below bit 16, which are demands, the loader meets
/// page-aligned modules and memory information; a video mode it cannot set.
const HAS_ADDRESSES: u32 = 1 << 16;
const KNOWN_DEMANDS: u32 = 7;

/// `None`: no Multiboot kernel.
pub(crate) fn plan(bytes: &[u8]) -> Result<Option<Plan<'_>>, Reason> {
    let searched = &bytes[..bytes.len().min(SEARCHED)];
    let field = |at: usize| {
        let bytes = bytes.get(at..at + 4)?.first_chunk();
        bytes.map(|b| u32::from_le_bytes(*b))
    };
    let is_header = |at: &usize| {
        let words = [0, 4, 8].map(|i| field(at + i));
        let [Some(HEADER_MAGIC), Some(flags), Some(checksum)] = words else {
            return false;
        };
        HEADER_MAGIC.wrapping_add(flags).wrapping_add(checksum) == 0
    };
    let Some(header) = (0..searched.len()).step_by(4).find(is_header) else {
        return Ok(None);
    };
    let flags = field(header + 4).unwrap_or(0);
    if flags & 0xffff & !KNOWN_DEMANDS != 0 {
        let what = format!("Multiboot: the kernel demands unknown features ({flags:#x})");
        return Err(Reason::Unsupported(what));
    }
    let mut plan = if flags & HAS_ADDRESSES != 0 {
        let truncated = || Reason::Truncated {
            what: "the Multiboot header",
            end: header as u64 + 32,
            len: bytes.len() as u64,
        };
        let mut addresses = [0; 5];
        for (i, address) in addresses.iter_mut().enumerate() {
            *address = field(header + 12 + 4 * i).ok_or_else(truncated)?.into();
        }
        flat(bytes, header as u64, addresses)?
    } else {
        Elf::parse(bytes)?.plan_multiboot()?
    };
    plan.description = "Multiboot kernel".to_string();
    Ok(Some(plan))
}

/// An image whose header says where it goes: where the header itself, the first loaded byte, the byte after the
/// last loaded and after the last cleared one are (0: to the end of the file; nothing to clear), and the entry.
fn flat(bytes: &[u8], header: u64, addresses: [u64; 5]) -> Result<Plan<'_>, Reason> {
    let [header_address, load, load_end, bss_end, entry] = addresses;
    let impossible = || Reason::Damaged("impossible addresses in the Multiboot header".into());
    let before_header = header_address.checked_sub(load);
    let start = before_header.and_then(|before| header.checked_sub(before));
    let start = start.ok_or_else(impossible)? as usize;
    let data = &bytes[start..];
    let data = match load_end {
        0 => data,
        end => {
            let len = end.checked_sub(load).ok_or_else(impossible)? as usize;
            data.get(..len).ok_or(Reason::Truncated {
                what: "the kernel",
                end: (start + len) as u64,
                len: bytes.len() as u64,
            })?
        }
    };
    let mut len = data.len() as u64;
    if bss_end != 0 {
        let cleared = bss_end.checked_sub(load).filter(|cleared| *cleared >= len);
        len = cleared.ok_or_else(impossible)?;
    }
    if !(load..load + len).contains(&entry) {
        return Err(impossible());
    }
    let mut plan = Plan::new(BootKind::Multiboot1, entry, "");
    plan.pieces.push(Piece {
        data,
        address: load,
        len,
    });
    Ok(plan)
}

pub(crate) fn enter(
    plan: &Plan,
    handover: &Handover,
    placement: &mut Placement,
) -> Result<CpuState, Reason> {
    /// Flags of the information: memory sizes, command line, modules, memory map, loader name.
    const GIVEN: u32 = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
    const KIB: u64 = 1024;
    const MIB: u64 = 1 << 20;

    // By custom the command line starts with the name of the kernel, a module's with that of the module.
    let mut append = handover.kernel_name.clone().into_bytes();
    append.push(b' ');
    append.extend_from_slice(handover.append);
    let append = placement.put(&append, 4)? as u32;
    let loader = placement.put(b"lodger\0", 4)? as u32;
    let (mut modules, mut count) = (0, 0);
    if let Some(initrd) = &handover.initrd {
        let mut name = handover
            .initrd_name
            .clone()
            .unwrap_or_default()
            .into_bytes();
        name.push(0);
        let name = placement.put(&name, 4)? as u32;
        let module = words(&[initrd.start as u32, initrd.end as u32, name, 0]);
        modules = placement.put(&module, 4)? as u32;
        count = 1;
    }
    let entries = placement.memory_map();
    let mut map = Vec::new();
    for entry in &entries {
        // The size does not count itself.
        map.extend(20u32.to_le_bytes());
        map.extend(entry.range.start.to_le_bytes());
        map.extend(entry.len().to_le_bytes());
        map.extend(entry.kind().to_le_bytes());
    }
    let usable_from = |start| {
        let found = entries.iter().find(|e| e.usable && e.range.start == start);
        found.map_or(0, |e| (e.len() / KIB) as u32)
    };
    let (lower, upper) = (usable_from(0), usable_from(MIB));
    let map_len = map.len() as u32;
    let map = placement.put(&map, 4)? as u32;
    let mut info = [0u32; 22];
    info[0] = GIVEN;
    info[1] = lower;
    info[2] = upper;
    info[4] = append;
    info[5] = count;
    info[6] = modules;
    info[11] = map_len;
    info[12] = map;
    info[16] = loader;
    let info = placement.put(&words(&info), 4)?;
    let mut state = entry::protected_mode(placement, plan.entry)?;
    state.gpr[RAX] = LOADER_MAGIC;
    state.gpr[RBX] = info;
    Ok(state)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
