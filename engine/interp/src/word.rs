//! Operand widths: how a register is read and written at 8, 16, 32 and 64 bits, and how guest RAM is accessed.
//!
//! RAM is shared with other vCPUs and with devices, so it is accessed by single machine instructions that the compiler
//! can neither split, merge nor assume anything about: an aligned access is atomic, as on hardware.

use std::arch::asm;
use std::fmt::{Debug, LowerHex};

/// A bit in an 8-bit register's number: AH, CH, DH or BH (of registers 0-3) rather than the low byte.
pub const HIGH_BYTE: u8 = 0x20;

/// An operand of 1, 2, 4 or 8 bytes.
pub trait Word: Copy + Eq + Debug + LowerHex + 'static {
    /// Bytes.
    const SIZE: u64;
    /// Bits.
    const BITS: u32;

    fn get(regs: &[u64; 32], reg: u8) -> Self;
    fn set(regs: &mut [u64; 32], reg: u8, value: Self);
    /// Truncates.
    fn cut(value: u64) -> Self;
    /// Zero-extends.
    fn zext(self) -> u64;
    /// Sign-extends.
    fn sext(self) -> u64;

    /// Reads memory.
    ///
    /// # Safety
    /// `from` is readable for `SIZE` bytes; it need not be aligned.
    unsafe fn load(from: *const u8) -> Self;

    /// Writes memory.
    ///
    /// # Safety
    /// `to` is writable for `SIZE` bytes; it need not be aligned.
    unsafe fn store(to: *mut u8, value: Self);

    /// LOCK CMPXCHG: replaces `old` by `new`; the value that was there.
    ///
    /// # Safety
    /// `at` is writable for `SIZE` bytes; it need not be aligned.
    unsafe fn compare_exchange(at: *mut u8, old: Self, new: Self) -> Self;
}

macro_rules! word {
    ($type:ty, $signed:ty, $class:ident, $modifier:literal, $acc:tt,
     |$regs:ident, $reg:ident| $get:expr, |$mregs:ident, $mreg:ident, $value:ident| $set:expr) => {
        impl Word for $type {
            const SIZE: u64 = size_of::<$type>() as u64;
            const BITS: u32 = <$type>::BITS;

            #[inline(always)]
            fn get($regs: &[u64; 32], $reg: u8) -> $type {
                $get
            }

            #[inline(always)]
            fn set($mregs: &mut [u64; 32], $mreg: u8, $value: $type) {
                $set
            }

            #[inline(always)]
            fn cut(value: u64) -> $type {
                value as $type
            }

            #[inline(always)]
            fn zext(self) -> u64 {
                self as u64
            }

            #[inline(always)]
            fn sext(self) -> u64 {
                self as $signed as i64 as u64
            }

            #[inline(always)]
            unsafe fn load(from: *const u8) -> $type {
                let value: $type;
                // SAFETY: the caller's promise.
                unsafe {
                    asm!(concat!("mov {v", $modifier, "}, [{p}]"), v = out($class) value, p = in(reg) from,
                        options(nostack, readonly, preserves_flags));
                }
                value
            }

            #[inline(always)]
            unsafe fn store(to: *mut u8, value: $type) {
                // SAFETY: the caller's promise.
                unsafe {
                    asm!(concat!("mov [{p}], {v", $modifier, "}"), v = in($class) value, p = in(reg) to,
                        options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn compare_exchange(at: *mut u8, old: $type, new: $type) -> $type {
                let mut found = old;
                // SAFETY: the caller's promise.
                unsafe {
                    asm!(concat!("lock cmpxchg [{p}], {v", $modifier, "}"), v = in($class) new, p = in(reg) at,
                        inout($acc) found, options(nostack));
                }
                found
            }
        }
    };
}

word!(
    u8,
    i8,
    reg_byte,
    "",
    "al",
    |regs, reg| (regs[reg as usize & 31] >> ((reg & HIGH_BYTE) >> 2)) as u8,
    |regs, reg, value| {
        let shift = (reg & HIGH_BYTE) >> 2;
        let r = &mut regs[(reg & 31) as usize];
        *r = *r & !(0xff << shift) | (value as u64) << shift;
    }
);
word!(
    u16,
    i16,
    reg,
    ":x",
    "ax",
    |regs, reg| regs[reg as usize & 31] as u16,
    |regs, reg, value| {
        let r = &mut regs[(reg & 31) as usize];
        *r = *r & !0xffff | value as u64;
    }
);
word!(
    u32,
    i32,
    reg,
    ":e",
    "eax",
    |regs, reg| regs[reg as usize & 31] as u32,
    |regs, reg, value| regs[(reg & 31) as usize] = value as u64
);
word!(
    u64,
    i64,
    reg,
    ":r",
    "rax",
    |regs, reg| regs[reg as usize & 31],
    |regs, reg, value| regs[(reg & 31) as usize] = value
);
