//! Misses that need no Rust code. S is the guest address that was looked up, T the site and what else is in [`Reason`]; the flags are
//! saved or dead.
//!
//! A copy of a TLB entry (that of the stack, that of a site) is taken anew from the TLB. A read that crosses from one page to another is
//! made from a buffer to which both sides are copied. Where several accesses were looked up together, and the first page is in the TLB, they
//! are not all in that page: code goes on that looks up each alone. All else leaves.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use lodger_softmmu::{Direction, ENTRIES, MmuIndex, TlbEntry};

use crate::cache::REFILLS;
use crate::env::{BOUNCE, Layout, SiteEntry};

/// Bits of the site's number in T.
const SITE_BITS: u32 = 24;
const SIZE_BITS: u32 = 6;
const TOGETHER: u32 = 30;
const WRITE: u32 = 31;

/// What T says of a miss beside the site.
#[derive(Debug, Clone, Copy)]
pub enum Reason {
    Other,
    /// A single read of so many bytes, for which `Env::resume` is the code behind the lookup.
    Read(u8),
    /// Several accesses, for which `Env::resume` is the code for each alone; some write.
    Together {
        write: bool,
    },
}

impl Reason {
    pub fn with(self, site: u32) -> u32 {
        site | match self {
            Reason::Other => 0,
            Reason::Read(size) => u32::from(size) << SITE_BITS,
            Reason::Together { write } => 1 << TOGETHER | u32::from(write) << WRITE,
        }
    }
}

/// Addresses of the routines of one privilege.
#[derive(Debug, Clone, Copy)]
pub struct Refills<P> {
    /// For the stack's entry; tries again at `Env::retry`.
    pub stack: P,
    /// For the entry at `Env::entry`, for reading and for writing.
    pub site: [P; 2],
    /// For no entry: for those only that can go on at `Env::resume`.
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
    let mut other = a.create_label();
    let mut fail = a.create_label();
    let routine = |a: &mut CodeAssembler, direction: Direction, own: bool| {
        let mut label = a.create_label();
        a.set_label(&mut label)?;
        begin(a, layout)?;
        match own {
            true => a.mov(ecx, dword_ptr(layout.entry() as i32))?,
            false => a.mov(ecx, layout.stack(index) as i32)?,
        }
        take_entry(a, layout.tables[index as usize][direction as usize], other)?;
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
    a.set_label(&mut other)?;
    cross(a, layout, index, fail)?;
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

/// Goes on with each access alone if there are several. Makes S the address of a copy of what it points to, if that is read and in two pages
/// that may both be read.
fn cross(
    a: &mut CodeAssembler,
    layout: &Layout,
    index: MmuIndex,
    fail: CodeLabel,
) -> Result<(), IcedError> {
    let table = layout.tables[index as usize][Direction::Read as usize] as i32;
    let (tag, page) = (TlbEntry::LAYOUT.0 as i32, TlbEntry::LAYOUT.1 as i32);
    let bounce = layout.bounce() as i32;
    let mut single = a.create_label();
    a.mov(ecx, dword_ptr(layout.exit() as i32))?;
    a.bt(ecx, TOGETHER)?;
    a.jnc(single)?;
    let writes = layout.tables[index as usize][Direction::Write as usize] as i32 - table;
    a.rorx(r10, r11, 8)?;
    a.and(r10d, SLOT)?;
    a.shr(ecx, WRITE)?;
    a.imul_3(ecx, ecx, writes)?;
    a.add(r10, rcx)?;
    a.mov(rax, r11)?;
    a.and(rax, -4096)?;
    a.cmp(rax, qword_ptr(r10 + (table + tag)))?;
    a.jne(fail)?;
    end(a, layout)?;
    a.jmp(at(layout.resume()))?;
    a.set_label(&mut single)?;
    a.shr(ecx, SITE_BITS)?;
    a.and(ecx, (1 << SIZE_BITS) - 1)?;
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
