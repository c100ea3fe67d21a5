//! Misses that need no Rust code. S is the guest address that was looked up, T the site and, in bits 24 and up, the bytes of the access if
//! it is a single read; the flags are saved or dead.
//!
//! A copy of a TLB entry (that of the stack, that of a site) is taken anew from the TLB. A read that crosses from one page to another is
//! made from a buffer to which both sides are copied. All else leaves.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use lodger_softmmu::{Direction, ENTRIES, MmuIndex, TlbEntry};

use crate::cache::REFILLS;
use crate::env::{BOUNCE, Layout, SiteEntry};

/// Bits of the site's number in T.
pub const SITE_BITS: u32 = 24;

/// Addresses of the routines of one privilege.
#[derive(Debug, Clone, Copy)]
pub struct Refills<P> {
    /// For the stack's entry; tries again at `Env::retry`.
    pub stack: P,
    /// For the entry at `Env::entry`, for reading and for writing.
    pub site: [P; 2],
    /// For no entry: reads across pages only, which go on at `Env::resume`.
    pub none: P,
}

impl<P> Refills<P> {
    pub fn try_map<Q, E>(self, mut f: impl FnMut(P) -> Result<Q, E>) -> Result<Refills<Q>, E> {
        let [read, write] = self.site;
        Ok(Refills {
            stack: f(self.stack)?,
            site: [f(read)?, f(write)?],
            none: f(self.none)?,
        })
    }
}

fn at(address: u32) -> AsmMemoryOperand {
    qword_ptr(address as i32)
}

/// Emits the routines for `index`; `leave` is where to leave with saved flags.
pub fn emit(
    a: &mut CodeAssembler,
    layout: &Layout,
    index: MmuIndex,
    leave: CodeLabel,
) -> Result<Refills<CodeLabel>, IcedError> {
    let mut cross = a.create_label();
    let mut fail = a.create_label();
    let routine = |a: &mut CodeAssembler, direction: Direction, own: bool| {
        let mut label = a.create_label();
        a.set_label(&mut label)?;
        begin(a, layout)?;
        match own {
            true => a.mov(ecx, dword_ptr(layout.entry() as i32))?,
            false => a.mov(ecx, layout.stack(index) as i32)?,
        }
        take_entry(a, layout.tables[index as usize][direction as usize], cross)?;
        if own {
            note_filled(a, layout, fail)?;
        }
        end(a, layout)?;
        a.jmp(at(layout.retry()))?;
        Ok::<_, IcedError>(label)
    };
    let stack = routine(a, Direction::Write, false)?;
    let site = [
        routine(a, Direction::Read, true)?,
        routine(a, Direction::Write, true)?,
    ];
    let mut none = a.create_label();
    a.set_label(&mut none)?;
    begin(a, layout)?;
    a.set_label(&mut cross)?;
    read_across(a, layout, index, fail)?;
    end(a, layout)?;
    a.jmp(at(layout.resume()))?;
    a.set_label(&mut fail)?;
    end(a, layout)?;
    a.mov(r10d, dword_ptr(layout.exit() as i32))?;
    a.and(r10d, (1 << SITE_BITS) - 1)?;
    a.jmp(leave)?;
    Ok(Refills { stack, site, none })
}

/// Makes RAX, RCX and T free.
fn begin(a: &mut CodeAssembler, layout: &Layout) -> Result<(), IcedError> {
    a.mov(at(layout.exit()), r10)?;
    a.mov(at(layout.register(0)), rax)?;
    a.mov(at(layout.register(1)), rcx)
}

fn end(a: &mut CodeAssembler, layout: &Layout) -> Result<(), IcedError> {
    a.mov(rax, at(layout.register(0)))?;
    a.mov(rcx, at(layout.register(1)))
}

const SLOT: i32 = (ENTRIES as i32 - 1) << 4;

/// Copies the entry for S in `table` to the one at RCX. `other`: there is none, or the copy is right already and the access leaves the page.
fn take_entry(a: &mut CodeAssembler, table: u32, other: CodeLabel) -> Result<(), IcedError> {
    let (tag, page) = (TlbEntry::LAYOUT.0 as i32, TlbEntry::LAYOUT.1 as i32);
    a.rorx(r10, r11, 8)?;
    a.and(r10d, SLOT)?;
    a.mov(rax, r11)?;
    a.and(rax, -4096)?;
    a.cmp(rax, qword_ptr(r10 + (table as i32 + tag)))?;
    a.jne(other)?;
    a.cmp(rax, qword_ptr(rcx + tag))?;
    a.je(other)?;
    a.mov(r10, qword_ptr(r10 + (table as i32 + page)))?;
    a.mov(qword_ptr(rcx + tag), rax)?;
    a.mov(qword_ptr(rcx + page), r10)
}

/// Counts the refills of the entry at RCX and puts it on the list of those that a flush must empty. `often`: where to go when there have
/// been many.
fn note_filled(a: &mut CodeAssembler, layout: &Layout, often: CodeLabel) -> Result<(), IcedError> {
    let mut listed = a.create_label();
    a.add(dword_ptr(rcx + SiteEntry::REFILLS), 1)?;
    a.cmp(dword_ptr(rcx + SiteEntry::REFILLS), REFILLS)?;
    a.je(often)?;
    a.cmp(dword_ptr(rcx + SiteEntry::LISTED), 0)?;
    a.jne(listed)?;
    a.mov(dword_ptr(rcx + SiteEntry::LISTED), 1)?;
    a.mov(eax, dword_ptr(layout.filled_sites() as i32))?;
    a.mov(dword_ptr(rax * 4 + layout.site_list() as i32), ecx)?;
    a.add(dword_ptr(layout.filled_sites() as i32), 1)?;
    a.set_label(&mut listed)
}

/// Makes S the address of a copy of what it points to, if that is in two pages that may both be read.
fn read_across(
    a: &mut CodeAssembler,
    layout: &Layout,
    index: MmuIndex,
    fail: CodeLabel,
) -> Result<(), IcedError> {
    let table = layout.tables[index as usize][Direction::Read as usize] as i32;
    let (tag, page) = (TlbEntry::LAYOUT.0 as i32, TlbEntry::LAYOUT.1 as i32);
    let bounce = layout.bounce() as i32;
    a.mov(ecx, dword_ptr(layout.exit() as i32))?;
    a.shr(ecx, SITE_BITS)?;
    a.jz(fail)?;
    a.lea(rax, qword_ptr(r11 + rcx - 1))?;
    a.and(rax, -4096)?;
    a.mov(rcx, r11)?;
    a.and(rcx, -4096)?;
    a.cmp(rax, rcx)?;
    a.je(fail)?;
    // RCX and RAX: the two pages.
    for (linear, from, to) in [(rcx, 4096 - BOUNCE, 0), (rax, 0, BOUNCE)] {
        a.rorx(r10, linear, 8)?;
        a.and(r10d, SLOT)?;
        a.cmp(linear, qword_ptr(r10 + (table + tag)))?;
        a.jne(fail)?;
        a.mov(r10, qword_ptr(r10 + (table + page)))?;
        for word in (0..BOUNCE).step_by(8) {
            a.mov(rcx, qword_ptr(r10 + (from + word)))?;
            a.mov(qword_ptr(bounce + to + word), rcx)?;
        }
    }
    a.and(r11d, 0xfff)?;
    a.lea(r11, qword_ptr(r11 + (bounce + BOUNCE - 4096)))
}
