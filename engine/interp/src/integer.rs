//! The common integer instructions: moves, arithmetic, shifts, bits, conditional moves and sets, the stack.
//!
//! Handlers are generic over the operation and the operand width; the decoder picks the instance. The naming of
//! operand forms follows the encodings: r register, m memory, i immediate; destination first.

use lodger_x86::paging::Access;

use crate::alu::{Alu, Binary, BitOp, Shift, Unary, condition};
use crate::cpu::{Cpu, Exec, gpr};
use crate::op::Op;
use crate::word::{HIGH_BYTE, Word};

// ---- arithmetic and logic ----

pub fn alu_rr<O: Binary, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let (r, flags) = O::apply::<T>(c.get(op.dst), c.get(op.src), c.flags);
    c.flags = flags;
    if O::WRITES {
        c.set(op.dst, r);
    }
    Ok(())
}

pub fn alu_ri<O: Binary, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let (r, flags) = O::apply::<T>(c.get(op.dst), T::cut(op.imm), c.flags);
    c.flags = flags;
    if O::WRITES {
        c.set(op.dst, r);
    }
    Ok(())
}

pub fn alu_rm<O: Binary, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let b: T = c.load(op)?;
    let (r, flags) = O::apply::<T>(c.get(op.dst), b, c.flags);
    c.flags = flags;
    if O::WRITES {
        c.set(op.dst, r);
    }
    Ok(())
}

#[inline(always)]
fn alu_memory<O: Binary, T: Alu>(c: &mut Cpu, op: &Op, b: T, lock: bool) -> Exec {
    let old = c.flags;
    c.flags = if O::WRITES {
        c.modify::<T, u64>(op, lock, |a| O::apply(a, b, old))?
    } else {
        O::apply::<T>(c.load(op)?, b, old).1
    };
    Ok(())
}

pub fn alu_mr<O: Binary, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    alu_memory::<O, T>(c, op, c.get(op.src), false)
}

pub fn alu_mi<O: Binary, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    alu_memory::<O, T>(c, op, T::cut(op.imm), false)
}

pub fn alu_mr_lock<O: Binary, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    alu_memory::<O, T>(c, op, c.get(op.src), true)
}

pub fn alu_mi_lock<O: Binary, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    alu_memory::<O, T>(c, op, T::cut(op.imm), true)
}

pub fn unary_r<O: Unary, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let (r, flags) = O::apply::<T>(c.get(op.dst), c.flags);
    c.flags = flags;
    c.set(op.dst, r);
    Ok(())
}

pub fn unary_m<O: Unary, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let old = c.flags;
    c.flags = c.modify::<T, u64>(op, false, |a| O::apply(a, old))?;
    Ok(())
}

pub fn unary_m_lock<O: Unary, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let old = c.flags;
    c.flags = c.modify::<T, u64>(op, true, |a| O::apply(a, old))?;
    Ok(())
}

// ---- shifts ----

#[inline(always)]
fn count<T: Word>(raw: u8) -> u8 {
    raw & if T::BITS == 64 { 63 } else { 31 }
}

#[inline(always)]
fn shift_r<O: Shift, T: Alu>(c: &mut Cpu, op: &Op, raw: u8) -> Exec {
    let n = count::<T>(raw);
    let value: T = c.get(op.dst);
    if n == 0 {
        // A 32-bit destination is zero-extended even so.
        c.set(op.dst, value);
        return Ok(());
    }
    let (r, flags) = O::apply::<T>(value, n, c.flags);
    c.flags = flags;
    c.set(op.dst, r);
    Ok(())
}

#[inline(always)]
fn shift_m<O: Shift, T: Alu>(c: &mut Cpu, op: &Op, raw: u8) -> Exec {
    let n = count::<T>(raw);
    let old = c.flags;
    c.flags = c.modify::<T, u64>(op, false, |a| {
        if n == 0 {
            (a, old)
        } else {
            O::apply(a, n, old)
        }
    })?;
    Ok(())
}

pub fn shift_ri<O: Shift, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    shift_r::<O, T>(c, op, op.imm as u8)
}

pub fn shift_rc<O: Shift, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    shift_r::<O, T>(c, op, c.get(gpr::RCX))
}

pub fn shift_mi<O: Shift, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    shift_m::<O, T>(c, op, op.imm as u8)
}

pub fn shift_mc<O: Shift, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let raw = c.get(gpr::RCX);
    shift_m::<O, T>(c, op, raw)
}

/// SHLD, SHRD: `RIGHT` chooses; `BY_CL`: the count is CL, else the immediate.
pub fn double_shift_r<const RIGHT: bool, const BY_CL: bool, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let n = count::<T>(if BY_CL { c.get(gpr::RCX) } else { op.imm as u8 });
    let value: T = c.get(op.dst);
    let (r, flags) = double_shift::<RIGHT, T>(value, c.get(op.src), n, c.flags);
    c.flags = flags;
    c.set(op.dst, r);
    Ok(())
}

pub fn double_shift_m<const RIGHT: bool, const BY_CL: bool, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let n = count::<T>(if BY_CL { c.get(gpr::RCX) } else { op.imm as u8 });
    let (b, old) = (c.get(op.src), c.flags);
    c.flags = c.modify::<T, u64>(op, false, |a| double_shift::<RIGHT, T>(a, b, n, old))?;
    Ok(())
}

#[inline(always)]
fn double_shift<const RIGHT: bool, T: Alu>(a: T, b: T, n: u8, flags: u64) -> (T, u64) {
    match (n, RIGHT) {
        (0, _) => (a, flags),
        (_, true) => T::shrd(a, b, n, flags),
        (_, false) => T::shld(a, b, n, flags),
    }
}

// ---- multiplication and division ----

/// The explicit operand: a register if `MEM` is false.
#[inline(always)]
fn source<const MEM: bool, T: Word>(c: &mut Cpu, op: &Op) -> Exec<T> {
    if MEM { c.load(op) } else { Ok(c.get(op.src)) }
}

/// The register that holds the high half of RAX's products: AH or RDX.
fn high<T: Word>() -> u8 {
    if T::SIZE == 1 {
        gpr::RAX | HIGH_BYTE
    } else {
        gpr::RDX
    }
}

pub fn mul<const SIGNED: bool, const MEM: bool, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let b: T = source::<MEM, T>(c, op)?;
    let a: T = c.get(gpr::RAX);
    let (lo, hi, flags) = if SIGNED {
        T::imul(a, b, c.flags)
    } else {
        T::mul(a, b, c.flags)
    };
    c.flags = flags;
    c.set(gpr::RAX, lo);
    c.set(high::<T>(), hi);
    Ok(())
}

pub fn div<const SIGNED: bool, const MEM: bool, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let by: T = source::<MEM, T>(c, op)?;
    let (hi, lo): (T, T) = (c.get(high::<T>()), c.get(gpr::RAX));
    let result = if SIGNED {
        T::idiv(hi, lo, by)
    } else {
        T::div(hi, lo, by)
    };
    let Some((quotient, remainder)) = result else {
        return c.raise(lodger_x86::Exception::DE);
    };
    c.set(gpr::RAX, quotient);
    c.set(high::<T>(), remainder);
    Ok(())
}

/// IMUL r, r/m.
pub fn imul2<const MEM: bool, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let b: T = source::<MEM, T>(c, op)?;
    let (lo, _, flags) = T::imul(c.get(op.dst), b, c.flags);
    c.flags = flags;
    c.set(op.dst, lo);
    Ok(())
}

/// IMUL r, r/m, imm.
pub fn imul3<const MEM: bool, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let a: T = source::<MEM, T>(c, op)?;
    let (lo, _, flags) = T::imul(a, T::cut(op.imm), c.flags);
    c.flags = flags;
    c.set(op.dst, lo);
    Ok(())
}

// ---- moves ----

pub fn mov_rr<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    c.set::<T>(op.dst, c.get(op.src));
    Ok(())
}

pub fn mov_ri<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    c.set(op.dst, T::cut(op.imm));
    Ok(())
}

pub fn mov_rm<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let value: T = c.load(op)?;
    c.set(op.dst, value);
    Ok(())
}

pub fn mov_mr<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    c.store::<T>(op, c.get(op.src))
}

pub fn mov_mi<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    c.store(op, T::cut(op.imm))
}

/// MOVZX, MOVSX, MOVSXD from `S` to `T`.
pub fn extend<const SIGNED: bool, const MEM: bool, S: Word, T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let value: S = source::<MEM, S>(c, op)?;
    c.set(
        op.dst,
        T::cut(if SIGNED { value.sext() } else { value.zext() }),
    );
    Ok(())
}

pub fn lea<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    c.set(op.dst, T::cut(c.offset(op)));
    Ok(())
}

pub fn xchg_rr<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let (a, b): (T, T) = (c.get(op.dst), c.get(op.src));
    c.set(op.dst, b);
    c.set(op.src, a);
    Ok(())
}

/// Always locked.
pub fn xchg_mr<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let new: T = c.get(op.src);
    let old = c.modify(op, true, |old: T| (new, old))?;
    c.set(op.src, old);
    Ok(())
}

pub fn xadd_rr<T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let (a, b): (T, T) = (c.get(op.dst), c.get(op.src));
    let (sum, flags) = T::add(a, b, c.flags);
    c.flags = flags;
    c.set(op.src, a);
    c.set(op.dst, sum);
    Ok(())
}

pub fn xadd_mr<const LOCK: bool, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let (b, old): (T, u64) = (c.get(op.src), c.flags);
    let (a, flags) = c.modify(op, LOCK, |a: T| {
        let (sum, flags) = T::add(a, b, old);
        (sum, (a, flags))
    })?;
    c.flags = flags;
    c.set(op.src, a);
    Ok(())
}

pub fn cmpxchg_rr<T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let (a, d): (T, T) = (c.get(gpr::RAX), c.get(op.dst));
    c.flags = T::sub(a, d, c.flags).1;
    if a == d {
        let new: T = c.get(op.src);
        c.set(op.dst, new);
    } else {
        c.set(gpr::RAX, d);
    }
    Ok(())
}

pub fn cmpxchg_mr<const LOCK: bool, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let (a, new): (T, T) = (c.get(gpr::RAX), c.get(op.src));
    // The destination is written in any case: with its old value if the comparison fails.
    let d = c.modify(op, LOCK, |d: T| (if a == d { new } else { d }, d))?;
    c.flags = T::sub(a, d, c.flags).1;
    if a != d {
        c.set(gpr::RAX, d);
    }
    Ok(())
}

pub fn bswap<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let value: T = c.get(op.dst);
    c.set(op.dst, T::cut(value.zext().swap_bytes() >> (64 - T::BITS)));
    Ok(())
}

// ---- conditions ----

pub fn setcc_r<const CC: u8>(c: &mut Cpu, op: &Op) -> Exec {
    c.set(op.dst, u8::from(condition(CC, c.flags)));
    Ok(())
}

pub fn setcc_m<const CC: u8>(c: &mut Cpu, op: &Op) -> Exec {
    c.store(op, u8::from(condition(CC, c.flags)))
}

/// CMOVcc; the source is read, and a 32-bit destination zero-extended, in any case.
pub fn cmov<const CC: u8, const MEM: bool, T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let value: T = source::<MEM, T>(c, op)?;
    let old: T = c.get(op.dst);
    c.set(op.dst, if condition(CC, c.flags) { value } else { old });
    Ok(())
}

// ---- bits ----

pub fn bit_ri<O: BitOp, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    bit_r::<O, T>(c, op, op.imm)
}

pub fn bit_rr<O: BitOp, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let bit: T = c.get(op.src);
    bit_r::<O, T>(c, op, bit.zext())
}

#[inline(always)]
fn bit_r<O: BitOp, T: Alu>(c: &mut Cpu, op: &Op, bit: u64) -> Exec {
    let (r, flags) = O::apply::<T>(c.get(op.dst), bit as u32 & (T::BITS - 1), c.flags);
    c.flags = flags;
    if O::WRITES {
        c.set(op.dst, r);
    }
    Ok(())
}

/// The bit offset is the immediate: within the operand.
pub fn bit_mi<O: BitOp, T: Alu, const LOCK: bool>(c: &mut Cpu, op: &Op) -> Exec {
    let bit = op.imm as u32 & (T::BITS - 1);
    let access = if O::WRITES {
        Access::Write
    } else {
        Access::Read
    };
    let linear = c.operand(op, T::SIZE, access)?;
    bit_m::<O, T>(c, op, linear, bit, LOCK)
}

/// The bit offset is a register: a signed distance from the operand, in bits.
pub fn bit_mr<O: BitOp, T: Alu, const LOCK: bool>(c: &mut Cpu, op: &Op) -> Exec {
    let bit = c.get::<T>(op.src).sext() as i64;
    let words = bit >> T::BITS.trailing_zeros();
    let offset = c.offset(op).wrapping_add((words * T::SIZE as i64) as u64);
    let offset = offset << op.address_shift >> op.address_shift;
    let access = if O::WRITES {
        Access::Write
    } else {
        Access::Read
    };
    let linear = c.linear(op.seg, offset, T::SIZE, access)?;
    bit_m::<O, T>(c, op, linear, bit as u32 & (T::BITS - 1), LOCK)
}

#[inline(always)]
fn bit_m<O: BitOp, T: Alu>(c: &mut Cpu, op: &Op, linear: u64, bit: u32, lock: bool) -> Exec {
    let old = c.flags;
    c.flags = if O::WRITES {
        c.modify_at::<T, u64>(linear, op.seg, lock, |a| O::apply(a, bit, old))?
    } else {
        O::apply::<T>(c.read(linear, op.seg)?, bit, old).1
    };
    Ok(())
}

/// BSF, BSR: the destination keeps its value if the source is zero.
pub fn bit_scan<const REVERSE: bool, const MEM: bool, T: Alu>(c: &mut Cpu, op: &Op) -> Exec {
    let value: T = source::<MEM, T>(c, op)?;
    let (found, flags) = if REVERSE {
        T::bsr(value, c.flags)
    } else {
        T::bsf(value, c.flags)
    };
    c.flags = flags;
    if let Some(index) = found {
        c.set(op.dst, index);
    }
    Ok(())
}

// ---- sign extension of the accumulator ----

/// CBW, CWDE, CDQE: from `S` to `T`.
pub fn extend_accumulator<S: Word, T: Word>(c: &mut Cpu, _: &Op) -> Exec {
    let value: S = c.get(gpr::RAX);
    c.set(gpr::RAX, T::cut(value.sext()));
    Ok(())
}

/// CWD, CDQ, CQO.
pub fn sign_into_rdx<T: Word>(c: &mut Cpu, _: &Op) -> Exec {
    let value: T = c.get(gpr::RAX);
    c.set(gpr::RDX, T::cut((value.sext() as i64 >> 63) as u64));
    Ok(())
}

// ---- flags ----

/// CLC, STC, CLD, STD: `imm` holds the flag, `src` its new value.
pub fn set_flag(c: &mut Cpu, op: &Op) -> Exec {
    c.flags = c.flags & !op.imm | if op.src != 0 { op.imm } else { 0 };
    Ok(())
}

pub fn cmc(c: &mut Cpu, _: &Op) -> Exec {
    c.flags ^= 1;
    Ok(())
}

pub fn lahf(c: &mut Cpu, _: &Op) -> Exec {
    c.set(gpr::RAX | HIGH_BYTE, (c.flags & 0xd5 | 2) as u8);
    Ok(())
}

pub fn sahf(c: &mut Cpu, _: &Op) -> Exec {
    let ah: u8 = c.get(gpr::RAX | HIGH_BYTE);
    c.flags = c.flags & !0xd5 | u64::from(ah) & 0xd5;
    Ok(())
}

pub fn nop(_: &mut Cpu, _: &Op) -> Exec {
    Ok(())
}

/// PAUSE: the guest waits for another vCPU, which may need this host processor. Not every time: most waits are short.
pub fn pause(c: &mut Cpu, _: &Op) -> Exec {
    const PATIENCE: u32 = 64;
    c.pauses = c.pauses.wrapping_add(1);
    if c.pauses.is_multiple_of(PATIENCE) {
        c.yield_now();
    }
    Ok(())
}

// ---- stack ----

pub fn push_r<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    c.push::<T>(c.get(op.src))
}

pub fn push_i<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    c.push(T::cut(op.imm))
}

pub fn push_m<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let value: T = c.load(op)?;
    c.push(value)
}

pub fn pop_r<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let value: T = c.pop()?;
    c.set(op.dst, value);
    Ok(())
}

/// POP to memory: an RSP-based address uses the value after the pop (SDM vol. 2, POP).
pub fn pop_m<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let before = c.regs[gpr::RSP as usize];
    let value: T = c.pop()?;
    let stored = c.store(op, value);
    if stored.is_err() {
        c.regs[gpr::RSP as usize] = before;
    }
    stored
}

pub fn leave<T: Word>(c: &mut Cpu, _: &Op) -> Exec {
    let frame = c.regs[gpr::RBP as usize] & c.stack_mask;
    let value: T = c.stack_read(frame)?;
    c.set_sp(frame.wrapping_add(T::SIZE));
    c.set(gpr::RBP, value);
    Ok(())
}

/// XLAT: AL = byte at [base + AL].
pub fn xlat(c: &mut Cpu, op: &Op) -> Exec {
    let al: u8 = c.get(gpr::RAX);
    let offset = c.offset(op).wrapping_add(u64::from(al));
    let offset = offset << op.address_shift >> op.address_shift;
    let linear = c.linear(op.seg, offset, 1, Access::Read)?;
    let value: u8 = c.read(linear, op.seg)?;
    c.set(gpr::RAX, value);
    Ok(())
}
