//! Near control transfers. Far ones are in [`crate::transfer`].
//!
//! A target outside of the code segment, or not canonical, faults at the branch, before anything else happens.

use crate::alu::condition;
use crate::cpu::{CodeSize, Cpu, Exec, Stop, gpr, seg};
use crate::memory::canonical;
use crate::op::Op;
use crate::word::Word;

/// The target must be within the code segment (#GP(0) before anything else happens).
#[inline(always)]
fn checked(c: &mut Cpu, target: u64) -> Exec<u64> {
    let valid = if c.code == CodeSize::Bits64 {
        canonical(target)
    } else {
        target <= u64::from(c.segments[seg::CS as usize].limit)
    };
    if valid { Ok(target) } else { c.gp0() }
}

/// RIP + distance, at operand size `T`.
#[inline(always)]
fn relative<T: Word>(c: &mut Cpu, op: &Op) -> Exec<u64> {
    let target = T::cut(c.rip().wrapping_add(op.imm)).zext();
    checked(c, target)
}

#[inline(always)]
fn jump(c: &mut Cpu, target: u64) -> Exec {
    c.set_rip(target);
    Err(Stop::EndBlock)
}

pub fn jmp<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let target = relative::<T>(c, op)?;
    jump(c, target)
}

/// Not taken, the block goes on.
pub fn jcc<const CC: u8, T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    if condition(CC, c.flags) {
        let target = relative::<T>(c, op)?;
        return jump(c, target);
    }
    Ok(())
}

pub fn jmp_r<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let target = c.get::<T>(op.src).zext();
    let target = checked(c, target)?;
    jump(c, target)
}

pub fn jmp_m<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let target = c.load::<T>(op)?.zext();
    let target = checked(c, target)?;
    jump(c, target)
}

#[inline(always)]
fn call_to<T: Word>(c: &mut Cpu, target: u64) -> Exec {
    let target = checked(c, target)?;
    c.push(T::cut(c.rip()))?;
    jump(c, target)
}

pub fn call<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let target = relative::<T>(c, op)?;
    call_to::<T>(c, target)
}

pub fn call_r<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let target = c.get::<T>(op.src).zext();
    call_to::<T>(c, target)
}

pub fn call_m<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let target = c.load::<T>(op)?.zext();
    call_to::<T>(c, target)
}

/// RET, RET imm16.
pub fn ret<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let sp = c.sp();
    let target = c.stack_read::<T>(sp)?.zext();
    let target = checked(c, target)?;
    c.set_sp(sp.wrapping_add(T::SIZE).wrapping_add(op.imm));
    jump(c, target)
}

/// LOOP (`KIND` 0), LOOPE (1), LOOPNE (2), JrCXZ (3): `T` is the operand size, `A` the counter's (the address size).
pub fn loop_<const KIND: u8, T: Word, A: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let mut n = c.get::<A>(gpr::RCX).zext();
    if KIND != 3 {
        n = A::cut(n.wrapping_sub(1)).zext();
    }
    let zf = c.flags & 0x40 != 0;
    let taken = match KIND {
        0 => n != 0,
        1 => n != 0 && zf,
        2 => n != 0 && !zf,
        _ => n == 0,
    };
    let target = if taken {
        Some(relative::<T>(c, op)?)
    } else {
        None
    };
    if KIND != 3 {
        c.set(gpr::RCX, A::cut(n));
    }
    match target {
        Some(target) => jump(c, target),
        None => Ok(()),
    }
}
