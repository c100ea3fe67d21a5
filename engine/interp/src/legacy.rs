//! Decimal adjustment, ENTER, BOUND, PUSHA and POPA, SALC, and the wide compare-and-exchange.

use std::arch::asm;

use iced_x86::{Code, Mnemonic};
use lodger_x86::bits::RFlags;
use lodger_x86::paging::Access;
use lodger_x86::{Exception, Vector};

use crate::alu::Alu;
use crate::cpu::{Cpu, Exec, gpr, seg};
use crate::op::Op;
use crate::word::{HIGH_BYTE, Word};

const CF: u64 = 1;
const AF: u64 = 1 << 4;
const AH: u8 = gpr::RAX | HIGH_BYTE;

/// Executes one of this group; others are #UD.
pub fn execute(c: &mut Cpu, op: &Op) -> Exec {
    let i = &op.rare().instruction;
    match i.mnemonic() {
        Mnemonic::Aaa => ascii_adjust(c, true),
        Mnemonic::Aas => ascii_adjust(c, false),
        Mnemonic::Daa => decimal_adjust(c, true),
        Mnemonic::Das => decimal_adjust(c, false),
        Mnemonic::Aam => aam(c, i.immediate8()),
        Mnemonic::Aad => aad(c, i.immediate8()),
        Mnemonic::Salc => {
            let al = if c.flag(RFlags::CF) { 0xff } else { 0 };
            c.set::<u8>(gpr::RAX, al);
            Ok(())
        }
        Mnemonic::Pusha => push_all::<u16>(c),
        Mnemonic::Pushad => push_all::<u32>(c),
        Mnemonic::Popa => pop_all::<u16>(c),
        Mnemonic::Popad => pop_all::<u32>(c),
        Mnemonic::Enter => {
            let (size, level) = (i.immediate16(), i.immediate8_2nd() & 31);
            match i.code() {
                Code::Enterw_imm16_imm8 => enter::<u16>(c, size, level),
                Code::Enterd_imm16_imm8 => enter::<u32>(c, size, level),
                _ => enter::<u64>(c, size, level),
            }
        }
        Mnemonic::Bound if i.code() == Code::Bound_r16_m1616 => bound::<u16>(c, op),
        Mnemonic::Bound => bound::<u32>(c, op),
        Mnemonic::Bswap => {
            // 16 bits: undefined by the manual; processors give zero.
            c.set::<u16>(op.dst, 0);
            Ok(())
        }
        Mnemonic::Cmpxchg8b => cmpxchg8b(c, op, i.has_lock_prefix()),
        Mnemonic::Cmpxchg16b => cmpxchg16b(c, op),
        _ => c.ud(),
    }
}

fn ascii_adjust(c: &mut Cpu, add: bool) -> Exec {
    let ax: u16 = c.get(gpr::RAX);
    let adjust = ax & 0xf > 9 || c.flag(RFlags::AF);
    let new = match (adjust, add) {
        (true, true) => ax.wrapping_add(0x106),
        (true, false) => ax.wrapping_sub(0x106),
        (false, _) => ax,
    };
    c.set(gpr::RAX, new & 0xff0f);
    let carry = if adjust { CF | AF } else { 0 };
    // The other flags are undefined by the manual; processors take them from AL.
    let al = new as u8 & 0xf;
    c.flags = u8::and(al, al, c.flags).1 & !(CF | AF) | carry;
    Ok(())
}

fn decimal_adjust(c: &mut Cpu, add: bool) -> Exec {
    let (al, cf): (u8, bool) = (c.get(gpr::RAX), c.flag(RFlags::CF));
    let low = al & 0xf > 9 || c.flag(RFlags::AF);
    let high = al > 0x99 || cf;
    let correction = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let new = if add {
        al.wrapping_add(correction)
    } else {
        al.wrapping_sub(correction)
    };
    // DAS also carries when the low correction borrows.
    let carry = high || !add && low && al < 6;
    c.flags = u8::and(new, new, c.flags).1 & !(CF | AF)
        | if carry { CF } else { 0 }
        | if low { AF } else { 0 };
    c.set(gpr::RAX, new);
    Ok(())
}

fn aam(c: &mut Cpu, base: u8) -> Exec {
    let al: u8 = c.get(gpr::RAX);
    let Some(high) = al.checked_div(base) else {
        return c.raise(Exception::DE);
    };
    let low = al % base;
    c.set(AH, high);
    c.set(gpr::RAX, low);
    c.flags = u8::and(low, low, c.flags).1;
    Ok(())
}

fn aad(c: &mut Cpu, base: u8) -> Exec {
    let (al, ah): (u8, u8) = (c.get(gpr::RAX), c.get(AH));
    let (new, flags) = u8::add(al, ah.wrapping_mul(base), c.flags);
    c.set(gpr::RAX, u16::from(new));
    c.flags = flags;
    Ok(())
}

/// RAX, RCX, RDX, RBX, the old RSP, RBP, RSI, RDI.
fn push_all<T: Word>(c: &mut Cpu) -> Exec {
    let sp = c.sp();
    for n in 0..8 {
        let value: T = c.get(n);
        c.stack_write(sp.wrapping_sub((u64::from(n) + 1) * T::SIZE), value)?;
    }
    c.set_sp(sp.wrapping_sub(8 * T::SIZE));
    Ok(())
}

/// Registers change one by one; only the stack pointer waits for the last access.
fn pop_all<T: Word>(c: &mut Cpu) -> Exec {
    let sp = c.sp();
    for n in 0..8 {
        let value: T = c.stack_read(sp.wrapping_add(u64::from(n) * T::SIZE))?;
        let register = gpr::RDI - n;
        if register != gpr::RSP {
            c.set(register, value);
        }
    }
    c.set_sp(sp.wrapping_add(8 * T::SIZE));
    Ok(())
}

fn enter<T: Word>(c: &mut Cpu, size: u16, level: u8) -> Exec {
    let step = T::SIZE;
    // With the bits above a 16-bit stack pointer too.
    let frame = c.regs[gpr::RSP as usize].wrapping_sub(step);
    let mut sp = frame;
    c.stack_write::<T>(sp, c.get(gpr::RBP))?;
    let outer = c.regs[gpr::RBP as usize];
    for n in 1..u64::from(level) {
        let value: T = c.stack_read(outer.wrapping_sub(n * step))?;
        sp = sp.wrapping_sub(step);
        c.stack_write(sp, value)?;
    }
    if level > 0 {
        sp = sp.wrapping_sub(step);
        c.stack_write(sp, T::cut(frame))?;
    }
    sp = sp.wrapping_sub(u64::from(size));
    // The new top of the stack must be writable.
    let top = c.linear(seg::SS, sp & c.stack_mask, step, Access::Write)?;
    c.check_write(top, step, seg::SS)?;
    c.set(gpr::RBP, T::cut(frame));
    c.set_sp(sp);
    Ok(())
}

fn bound<T: Word>(c: &mut Cpu, op: &Op) -> Exec {
    let index = c.get::<T>(op.dst).sext() as i64;
    let low: T = c.load(op)?;
    if index >= low.sext() as i64 {
        let offset = c.offset(op).wrapping_add(T::SIZE) << op.address_shift >> op.address_shift;
        let linear = c.linear(op.seg, offset, T::SIZE, Access::Read)?;
        let high: T = c.read(linear, op.seg)?;
        if index <= high.sext() as i64 {
            return Ok(());
        }
    }
    c.raise(Exception::plain(Vector::BoundRange))
}

fn set_zero(c: &mut Cpu, equal: bool) {
    let zf = RFlags::ZF.bits();
    c.flags = c.flags & !zf | if equal { zf } else { 0 };
}

fn pair(c: &Cpu, high: u8, low: u8) -> u64 {
    u64::from(c.get::<u32>(high)) << 32 | u64::from(c.get::<u32>(low))
}

fn cmpxchg8b(c: &mut Cpu, op: &Op, lock: bool) -> Exec {
    let (old, new) = (pair(c, gpr::RDX, gpr::RAX), pair(c, gpr::RCX, gpr::RBX));
    let found = c.modify(op, lock, |v: u64| (if v == old { new } else { v }, v))?;
    set_zero(c, found == old);
    if found != old {
        c.set(gpr::RAX, found as u32);
        c.set(gpr::RDX, (found >> 32) as u32);
    }
    Ok(())
}

fn cmpxchg16b(c: &mut Cpu, op: &Op) -> Exec {
    let linear = c.operand(op, 16, Access::Write)?;
    if linear % 16 != 0 {
        return c.gp0();
    }
    let (low, high) = (c.regs[gpr::RAX as usize], c.regs[gpr::RDX as usize]);
    let (new_low, new_high) = (c.regs[gpr::RBX as usize], c.regs[gpr::RCX as usize]);
    let (mut found_low, mut found_high) = (low, high);
    if let Some(host) = c.writable(linear, op.seg, 16)? {
        // SAFETY: 16 aligned bytes of RAM. RBX cannot be named as an operand, so it is swapped in and out.
        unsafe {
            asm!("xchg rbx, {new}", "lock cmpxchg16b [{p}]", "xchg rbx, {new}",
                p = in(reg) host, new = inout(reg) new_low => _, in("rcx") new_high,
                inout("rax") found_low, inout("rdx") found_high, options(nostack));
        }
        c.wrote_at(linear);
    } else {
        // A device register: nobody else can be looking at RAM in between.
        found_low = c.read(linear, op.seg)?;
        found_high = c.read(linear + 8, op.seg)?;
        let equal = (found_low, found_high) == (low, high);
        c.write(linear, op.seg, if equal { new_low } else { found_low })?;
        c.write(
            linear + 8,
            op.seg,
            if equal { new_high } else { found_high },
        )?;
    }
    let equal = (found_low, found_high) == (low, high);
    set_zero(c, equal);
    if !equal {
        c.regs[gpr::RAX as usize] = found_low;
        c.regs[gpr::RDX as usize] = found_high;
    }
    Ok(())
}
