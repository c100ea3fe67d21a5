//! String instructions. An iteration is complete before the next one begins, so that a fault, an interrupt or a device
//! access in the middle of a repetition finds RSI, RDI and RCX where hardware leaves them.
//!
//! Repeated MOVS and STOS within pages that the TLB knows are done in one go.

use std::arch::asm;

use lodger_softmmu::Direction;
use lodger_x86::bits::RFlags;
use lodger_x86::paging::Access;

use crate::alu::Alu;
use crate::cpu::{Cpu, Exec, Stop, gpr, seg};
use crate::op::Op;
use crate::word::Word;

/// The repeat prefix, in `Op::dst`.
#[allow(missing_docs)]
pub mod rep {
    pub const NONE: u8 = 0;
    /// REP, REPE.
    pub const E: u8 = 1;
    pub const NE: u8 = 2;
}

/// Iterations without a look at what happens outside.
const BUDGET: u64 = 1 << 14;

/// One of the seven instructions.
pub trait StringOp {
    /// Stops a repetition by ZF.
    const COMPARES: bool = false;
    /// Registers that a repetition with 32-bit addresses zero-extends from the beginning, on processors.
    const EXTENDED: &[u8] = &[gpr::RCX];
    /// One iteration, RSI and RDI moved on.
    fn step<T: Alu>(c: &mut Cpu, op: &Op) -> Exec;
    /// Does up to `count` iterations at once if that is possible; how many.
    fn bulk<T: Alu>(_: &mut Cpu, _: &Op, _count: u64) -> u64 {
        0
    }
}

fn mask(op: &Op) -> u64 {
    u64::MAX << op.address_shift >> op.address_shift
}

/// Writes an address-sized register.
#[inline(always)]
fn set_sized(c: &mut Cpu, op: &Op, reg: u8, value: u64) {
    match op.address_shift {
        0 => c.set::<u64>(reg, value),
        32 => c.set::<u32>(reg, value as u32),
        _ => c.set::<u16>(reg, value as u16),
    }
}

#[inline(always)]
fn advance<T: Word>(c: &mut Cpu, op: &Op, reg: u8) {
    let old = c.regs[reg as usize];
    let new = if c.flag(RFlags::DF) {
        old.wrapping_sub(T::SIZE)
    } else {
        old.wrapping_add(T::SIZE)
    };
    set_sized(c, op, reg, new);
}

#[inline(always)]
fn source<T: Word>(c: &mut Cpu, op: &Op) -> Exec<T> {
    let offset = c.regs[gpr::RSI as usize] & mask(op);
    let linear = c.linear(op.seg, offset, T::SIZE, Access::Read)?;
    c.read(linear, op.seg)
}

#[inline(always)]
fn destination<T: Word>(c: &mut Cpu, op: &Op, access: Access) -> Exec<u64> {
    let offset = c.regs[gpr::RDI as usize] & mask(op);
    c.linear(seg::ES, offset, T::SIZE, access)
}

/// Host address of `segment:reg` and how many `T` from there lie within its page, if the TLB permits the access.
#[inline(always)]
fn span<T: Word>(c: &Cpu, op: &Op, segment: u8, reg: u8, write: bool) -> Option<(*mut u8, u64)> {
    let access = if write { Access::Write } else { Access::Read };
    let offset = c.regs[reg as usize] & mask(op);
    let mut linear = offset.wrapping_add(c.bases[segment as usize]);
    if !c.long64() {
        if c.flat[segment as usize] & (1 << access as u8) == 0 {
            return None;
        }
        linear &= 0xffff_ffff;
    }
    if c.flag(RFlags::DF) {
        return None;
    }
    let direction = match write {
        true => Direction::Write,
        false => Direction::Read,
    };
    let host = c.tlb.entry(c.mmu, direction, linear).host(linear, 1)?;
    // The offset must not wrap on the way.
    let room = (0x1000 - (linear & 0xfff)).min((mask(op) - offset).saturating_add(1));
    Some((host, room / T::SIZE))
}

/// A string instruction, repeated as `op.dst` says.
pub fn string<K: StringOp, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    if op.dst == rep::NONE {
        return K::step::<T>(c, op);
    }
    if op.address_shift == 32 {
        for &register in K::EXTENDED {
            set_sized(c, op, register, c.regs[register as usize]);
        }
    }
    let flags = c.flags;
    let result = repeat::<K, T>(c, op);
    if K::COMPARES && result.is_err() {
        // The flags change when the repetition ends (SDM vol. 2, REP).
        c.flags = flags;
    }
    result
}

#[inline(always)]
fn repeat<K: StringOp, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let mut budget = BUDGET;
    loop {
        let count = c.regs[gpr::RCX as usize] & mask(op);
        if count == 0 {
            return Ok(());
        }
        let single = c.flag(RFlags::TF) || c.io.is_active() || c.watch.any();
        let bulk = if single {
            0
        } else {
            K::bulk::<T>(c, op, count)
        };
        let done = if bulk == 0 {
            K::step::<T>(c, op)?;
            c.io.clear();
            1
        } else {
            bulk
        };
        set_sized(c, op, gpr::RCX, count - done);
        if K::COMPARES && c.flag(RFlags::ZF) != (op.dst == rep::E) {
            return Ok(());
        }
        budget = budget.saturating_sub(done);
        if count != done && (budget == 0 || single || c.code_written || c.debug_trap != 0) {
            return Err(Stop::Again);
        }
    }
}

pub struct Movs;
impl StringOp for Movs {
    const EXTENDED: &[u8] = &[gpr::RCX, gpr::RSI, gpr::RDI];
    #[inline(always)]
    fn step<T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
        let value: T = source(c, op)?;
        let to = destination::<T>(c, op, Access::Write)?;
        c.write(to, seg::ES, value)?;
        advance::<T>(c, op, gpr::RSI);
        advance::<T>(c, op, gpr::RDI);
        Ok(())
    }

    #[inline(always)]
    fn bulk<T: Alu>(c: &mut Cpu, op: &Op, count: u64) -> u64 {
        let Some((from, n)) = span::<T>(c, op, op.seg, gpr::RSI, false) else {
            return 0;
        };
        let Some((to, m)) = span::<T>(c, op, seg::ES, gpr::RDI, true) else {
            return 0;
        };
        let n = count.min(n).min(m);
        // The host's own instruction, so that overlapping operands give what they give on hardware.
        macro_rules! rep_movs {
            ($ins:literal) => {
                // SAFETY: `n` elements from both addresses lie within pages of guest RAM.
                unsafe {
                    asm!($ins, inout("rcx") n => _, inout("rsi") from => _, inout("rdi") to => _,
                        options(nostack, preserves_flags));
                }
            };
        }
        match T::SIZE {
            1 => rep_movs!("rep movsb"),
            2 => rep_movs!("rep movsw"),
            4 => rep_movs!("rep movsd"),
            _ => rep_movs!("rep movsq"),
        }
        for reg in [gpr::RSI, gpr::RDI] {
            set_sized(c, op, reg, c.regs[reg as usize].wrapping_add(n * T::SIZE));
        }
        n
    }
}

pub struct Stos;
impl StringOp for Stos {
    const EXTENDED: &[u8] = &[gpr::RCX, gpr::RDI];
    #[inline(always)]
    fn step<T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
        let to = destination::<T>(c, op, Access::Write)?;
        c.write::<T>(to, seg::ES, c.get(gpr::RAX))?;
        advance::<T>(c, op, gpr::RDI);
        Ok(())
    }

    #[inline(always)]
    fn bulk<T: Alu>(c: &mut Cpu, op: &Op, count: u64) -> u64 {
        let Some((to, n)) = span::<T>(c, op, seg::ES, gpr::RDI, true) else {
            return 0;
        };
        let n = count.min(n);
        let value = c.regs[gpr::RAX as usize];
        macro_rules! rep_stos {
            ($ins:literal) => {
                // SAFETY: `n` elements lie within a page of guest RAM.
                unsafe {
                    asm!($ins, inout("rcx") n => _, in("rax") value, inout("rdi") to => _,
                        options(nostack, preserves_flags));
                }
            };
        }
        match T::SIZE {
            1 => rep_stos!("rep stosb"),
            2 => rep_stos!("rep stosw"),
            4 => rep_stos!("rep stosd"),
            _ => rep_stos!("rep stosq"),
        }
        set_sized(
            c,
            op,
            gpr::RDI,
            c.regs[gpr::RDI as usize].wrapping_add(n * T::SIZE),
        );
        n
    }
}

pub struct Lods;
impl StringOp for Lods {
    fn step<T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
        let value: T = source(c, op)?;
        c.set(gpr::RAX, value);
        advance::<T>(c, op, gpr::RSI);
        Ok(())
    }
}

pub struct Scas;
impl StringOp for Scas {
    const COMPARES: bool = true;
    fn step<T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
        let at = destination::<T>(c, op, Access::Read)?;
        let value: T = c.read(at, seg::ES)?;
        c.flags = T::sub(c.get(gpr::RAX), value, c.flags).1;
        advance::<T>(c, op, gpr::RDI);
        Ok(())
    }
}

pub struct Cmps;
impl StringOp for Cmps {
    const COMPARES: bool = true;
    fn step<T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
        // In the order of processors, which shows when both fault.
        let at = destination::<T>(c, op, Access::Read)?;
        let b: T = c.read(at, seg::ES)?;
        let a: T = source(c, op)?;
        c.flags = T::sub(a, b, c.flags).1;
        advance::<T>(c, op, gpr::RSI);
        advance::<T>(c, op, gpr::RDI);
        Ok(())
    }
}

pub struct Ins;
impl StringOp for Ins {
    fn step<T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
        let port: u16 = c.get(gpr::RDX);
        c.check_port(port, T::SIZE as u8)?;
        let to = destination::<T>(c, op, Access::Write)?;
        c.check_write(to, T::SIZE, seg::ES)?;
        let value = c.port_read(port, T::SIZE as u8)?;
        c.write(to, seg::ES, T::cut(u64::from(value)))?;
        c.debug_trap |= c.port_breakpoints(port, T::SIZE);
        advance::<T>(c, op, gpr::RDI);
        Ok(())
    }
}

pub struct Outs;
impl StringOp for Outs {
    fn step<T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
        let port: u16 = c.get(gpr::RDX);
        c.check_port(port, T::SIZE as u8)?;
        let value: T = source(c, op)?;
        c.port_write(port, T::SIZE as u8, value.zext() as u32)?;
        c.debug_trap |= c.port_breakpoints(port, T::SIZE);
        advance::<T>(c, op, gpr::RSI);
        Ok(())
    }
}
