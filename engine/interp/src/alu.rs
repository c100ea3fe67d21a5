//! Arithmetic with flags, computed by the host's own instructions: results and flags are what hardware gives, also
//! where the manuals leave a flag undefined.
//!
//! Every function takes the guest's RFLAGS and returns the result with the new arithmetic flags in place.

use std::arch::asm;

use lodger_x86::bits::STATUS_FLAGS;

use crate::word::Word;

const CF: u64 = 1;
const OF: u64 = 1 << 11;

/// LAHF left SF, ZF, AF, PF, CF in AH; SETO left OF in AL.
#[inline(always)]
fn unpack(ax: u16) -> u64 {
    u64::from(ax >> 8) & 0xd5 | u64::from(ax & 1) << 11
}

#[inline(always)]
fn replace(flags: u64, mask: u64, new: u64) -> u64 {
    flags & !mask | new & mask
}

/// An operation on two operands, such as ADD.
pub trait Binary {
    /// The result is written (not for CMP and TEST).
    const WRITES: bool = true;
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64);
}

/// An operation on one operand, such as NEG.
pub trait Unary {
    fn apply<T: Alu>(a: T, flags: u64) -> (T, u64);
}

/// A shift or rotate by a count that is masked already and not zero.
pub trait Shift {
    fn apply<T: Alu>(a: T, count: u8, flags: u64) -> (T, u64);
}

/// A bit test: the operand with the bit changed, and the flags.
pub trait BitOp {
    /// The operand is written (not for BT).
    const WRITES: bool = true;
    fn apply<T: Alu>(a: T, bit: u32, flags: u64) -> (T, u64);
}

macro_rules! declare {
    ($($name:ident),*; $($unary:ident),*; $($shift:ident),*; $($double:ident),*) => {
        /// The operations at one width.
        pub trait Alu: Word {
            $(fn $name(a: Self, b: Self, flags: u64) -> (Self, u64);)*
            $(fn $unary(a: Self, flags: u64) -> (Self, u64);)*
            $(fn $shift(a: Self, count: u8, flags: u64) -> (Self, u64);)*
            $(fn $double(a: Self, b: Self, count: u8, flags: u64) -> (Self, u64);)*
            /// MUL and IMUL of one operand: low half, high half, flags.
            fn mul(a: Self, b: Self, flags: u64) -> (Self, Self, u64);
            fn imul(a: Self, b: Self, flags: u64) -> (Self, Self, u64);
            /// BSF and BSR; `None`: the source is zero.
            fn bsf(a: Self, flags: u64) -> (Option<Self>, u64);
            fn bsr(a: Self, flags: u64) -> (Option<Self>, u64);
            /// DIV and IDIV of `high:low`: quotient, remainder; `None` is #DE.
            fn div(high: Self, low: Self, by: Self) -> Option<(Self, Self)>;
            fn idiv(high: Self, low: Self, by: Self) -> Option<(Self, Self)>;
        }
    };
}
declare!(add, adc, sub, sbb, and, or, xor; inc, dec, neg; shl, shr, sar, rol, ror, rcl, rcr; shld, shrd);

macro_rules! implement {
    ($type:ty, $signed:ty, $wide:ty, $swide:ty, $class:ident, $m:literal, $wider:ty, $wm:literal, $kind:ident) => {
        impl Alu for $type {
            implement!(@binary $type, $class, $m, add "add", sub "sub", and "and", or "or", xor "xor");
            implement!(@carry $type, $class, $m, adc "adc", sbb "sbb");
            implement!(@unary $type, $class, $m, inc "inc" !CF, dec "dec" !CF, neg "neg" !0);
            implement!(@shift $type, $class, $m, shl "shl" !0, shr "shr" !0, sar "sar" !0, rol "rol" (CF | OF), ror "ror" (CF | OF));
            implement!(@rotate $type, $class, $m, rcl "rcl", rcr "rcr");
            implement!(@double $wider, $wm, shld "shld", shrd "shrd");

            implement!(@multiply $kind $type, $m, mul "mul", imul "imul");
            implement!(@scan $kind $type, $m, bsf "bsf", bsr "bsr");

            #[inline(always)]
            fn div(high: $type, low: $type, by: $type) -> Option<($type, $type)> {
                if high == 0 {
                    return Some((low.checked_div(by)?, low % by));
                }
                let value = (high as $wide) << <$type>::BITS | low as $wide;
                // Also when `by` is zero.
                let fits = high < by;
                fits.then(|| ((value / by as $wide) as $type, (value % by as $wide) as $type))
            }

            #[inline(always)]
            fn idiv(high: $type, low: $type, by: $type) -> Option<($type, $type)> {
                let value = ((high as $wide) << <$type>::BITS | low as $wide) as $swide;
                let by = by as $signed as $swide;
                let quotient = value.checked_div(by)?;
                let fits = quotient as $signed as $swide == quotient;
                fits.then(|| (quotient as $type, (value % by) as $type))
            }
        }
    };
    (@multiply byte $type:ty, $m:literal, $($name:ident $ins:literal),*) => { $(
        #[inline(always)]
        fn $name(a: u8, b: u8, flags: u64) -> (u8, u8, u64) {
            let (wide, ax): (u16, u16);
            // SAFETY: computes on registers only.
            unsafe {
                asm!(concat!($ins, " {b}"), "mov {wide:x}, ax", "lahf", "seto al",
                    b = in(reg_byte) b, wide = out(reg) wide, inout("ax") u16::from(a) => ax,
                    options(pure, nomem, nostack));
            }
            (wide as u8, (wide >> 8) as u8, replace(flags, STATUS_FLAGS, unpack(ax)))
        }
    )* };
    (@multiply word $type:ty, $m:literal, $($name:ident $ins:literal),*) => { $(
        #[inline(always)]
        fn $name(a: $type, b: $type, flags: u64) -> ($type, $type, u64) {
            let (low, high, ax): ($type, $type, u64);
            // SAFETY: computes on registers only.
            unsafe {
                asm!(concat!($ins, " {b", $m, "}"), "mov {low:r}, rax", "lahf", "seto al",
                    b = in(reg) b, low = out(reg) low, out("rdx") high, inout("rax") u64::from(a) => ax,
                    options(pure, nomem, nostack));
            }
            (low, high, replace(flags, STATUS_FLAGS, unpack(ax as u16)))
        }
    )* };
    (@scan byte $type:ty, $m:literal, $($name:ident $ins:literal),*) => { $(
        fn $name(_: u8, _: u64) -> (Option<u8>, u64) {
            unreachable!("bits are scanned in words")
        }
    )* };
    (@scan word $type:ty, $m:literal, $($name:ident $ins:literal),*) => { $(
        #[inline(always)]
        fn $name(a: $type, flags: u64) -> (Option<$type>, u64) {
            let mut index: $type = 0;
            let ax: u16;
            // SAFETY: computes on registers only.
            unsafe {
                asm!(concat!($ins, " {i", $m, "}, {a", $m, "}"), "lahf", "seto al",
                    i = inout(reg) index, a = in(reg) a, out("ax") ax, options(pure, nomem, nostack));
            }
            ((a != 0).then_some(index), replace(flags, STATUS_FLAGS, unpack(ax)))
        }
    )* };
    (@binary $type:ty, $class:ident, $m:literal, $($name:ident $ins:literal),*) => { $(
        #[inline(always)]
        fn $name(a: $type, b: $type, flags: u64) -> ($type, u64) {
            let mut a = a;
            let ax: u16;
            // SAFETY: computes on registers only.
            unsafe {
                asm!(concat!($ins, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    a = inout($class) a, b = in($class) b, out("ax") ax, options(pure, nomem, nostack));
            }
            (a, replace(flags, STATUS_FLAGS, unpack(ax)))
        }
    )* };
    (@carry $type:ty, $class:ident, $m:literal, $($name:ident $ins:literal),*) => { $(
        #[inline(always)]
        fn $name(a: $type, b: $type, flags: u64) -> ($type, u64) {
            let mut a = a;
            let ax: u16;
            // SAFETY: computes on registers only.
            unsafe {
                asm!("bt {f:e}, 0", concat!($ins, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    a = inout($class) a, b = in($class) b, f = in(reg) flags as u32, out("ax") ax,
                    options(pure, nomem, nostack));
            }
            (a, replace(flags, STATUS_FLAGS, unpack(ax)))
        }
    )* };
    (@unary $type:ty, $class:ident, $m:literal, $($name:ident $ins:literal $mask:expr),*) => { $(
        #[inline(always)]
        fn $name(a: $type, flags: u64) -> ($type, u64) {
            let mut a = a;
            let ax: u16;
            // SAFETY: computes on registers only.
            unsafe {
                asm!(concat!($ins, " {a", $m, "}"), "lahf", "seto al",
                    a = inout($class) a, out("ax") ax, options(pure, nomem, nostack));
            }
            (a, replace(flags, STATUS_FLAGS & $mask, unpack(ax)))
        }
    )* };
    (@shift $type:ty, $class:ident, $m:literal, $($name:ident $ins:literal $mask:expr),*) => { $(
        #[inline(always)]
        fn $name(a: $type, count: u8, flags: u64) -> ($type, u64) {
            let mut a = a;
            let ax: u16;
            // SAFETY: computes on registers only.
            unsafe {
                asm!(concat!($ins, " {a", $m, "}, cl"), "lahf", "seto al",
                    a = inout($class) a, in("cl") count, out("ax") ax, options(pure, nomem, nostack));
            }
            (a, replace(flags, STATUS_FLAGS & $mask, unpack(ax)))
        }
    )* };
    (@rotate $type:ty, $class:ident, $m:literal, $($name:ident $ins:literal),*) => { $(
        #[inline(always)]
        fn $name(a: $type, count: u8, flags: u64) -> ($type, u64) {
            let mut a = a;
            let ax: u16;
            // SAFETY: computes on registers only.
            unsafe {
                asm!("bt {f:e}, 0", concat!($ins, " {a", $m, "}, cl"), "lahf", "seto al",
                    a = inout($class) a, in("cl") count, f = in(reg) flags as u32, out("ax") ax,
                    options(pure, nomem, nostack));
            }
            (a, replace(flags, CF | OF, unpack(ax)))
        }
    )* };
    (@double $wider:ty, $wm:literal, $($name:ident $ins:literal),*) => { $(
        #[inline(always)]
        fn $name(a: Self, b: Self, count: u8, flags: u64) -> (Self, u64) {
            let mut wide = a as $wider;
            let ax: u16;
            // SAFETY: computes on registers only.
            unsafe {
                asm!(concat!($ins, " {a", $wm, "}, {b", $wm, "}, cl"), "lahf", "seto al",
                    a = inout(reg) wide, b = in(reg) b as $wider, in("cl") count, out("ax") ax,
                    options(pure, nomem, nostack));
            }
            (wide as Self, replace(flags, STATUS_FLAGS, unpack(ax)))
        }
    )* };
}

implement!(u8, i8, u16, i16, reg_byte, "", u16, ":x", byte);
implement!(u16, i16, u32, i32, reg, ":x", u16, ":x", word);
implement!(u32, i32, u64, i64, reg, ":e", u32, ":e", word);
implement!(u64, i64, u128, i128, reg, ":r", u64, ":r", word);

macro_rules! operations {
    (unary: $($type:ident $name:ident),*) => { $(
        pub struct $type;
        impl Unary for $type {
            #[inline(always)]
            fn apply<T: Alu>(a: T, flags: u64) -> (T, u64) {
                T::$name(a, flags)
            }
        }
    )* };
    (shift: $($type:ident $name:ident),*) => { $(
        pub struct $type;
        impl Shift for $type {
            #[inline(always)]
            fn apply<T: Alu>(a: T, count: u8, flags: u64) -> (T, u64) {
                T::$name(a, count, flags)
            }
        }
    )* };
    ($trait:ident: $($type:ident $name:ident),*) => { $(
        pub struct $type;
        impl $trait for $type {
            #[inline(always)]
            fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64) {
                T::$name(a, b, flags)
            }
        }
    )* };
}
operations!(Binary: Add add, Or or, Adc adc, Sbb sbb, And and, Sub sub, Xor xor);
operations!(unary: Inc inc, Dec dec, Neg neg);
operations!(shift: Shl shl, Shr shr, Sar sar, Rol rol, Ror ror, Rcl rcl, Rcr rcr);

/// CMP.
pub struct Cmp;
impl Binary for Cmp {
    const WRITES: bool = false;
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64) {
        T::sub(a, b, flags)
    }
}

/// TEST.
pub struct Test;
impl Binary for Test {
    const WRITES: bool = false;
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: u64) -> (T, u64) {
        T::and(a, b, flags)
    }
}

/// NOT; no flags.
pub struct Not;
impl Unary for Not {
    #[inline(always)]
    fn apply<T: Alu>(a: T, flags: u64) -> (T, u64) {
        (T::cut(!a.zext()), flags)
    }
}

macro_rules! bit_operations {
    ($($type:ident $writes:literal |$v:ident, $m:ident| $new:expr;)*) => { $(
        pub struct $type;
        impl BitOp for $type {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply<T: Alu>(a: T, bit: u32, flags: u64) -> (T, u64) {
                let ($v, $m) = (a.zext(), 1u64 << bit);
                (T::cut($new), replace(flags, CF, $v >> bit & 1))
            }
        }
    )* };
}
bit_operations! {
    Bt false |v, _m| v;
    Bts true |v, m| v | m;
    Btr true |v, m| v & !m;
    Btc true |v, m| v ^ m;
}

/// Condition `cc` (the low four bits of Jcc, SETcc, CMOVcc).
#[inline(always)]
pub fn condition(cc: u8, flags: u64) -> bool {
    let bit = |n: u32| flags >> n & 1 != 0;
    let (cf, pf, zf, sf, of) = (bit(0), bit(2), bit(6), bit(7), bit(11));
    let holds = match cc >> 1 {
        0 => of,
        1 => cf,
        2 => zf,
        3 => cf | zf,
        4 => sf,
        5 => pf,
        6 => sf != of,
        _ => zf | (sf != of),
    };
    holds != (cc & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_those_of_the_manual() {
        for (got, want, flags) in [
            (u8::add(0xff, 1, 0), 0, 0x55),
            (u8::add(0x7f, 1, 0), 0x80, 0x890),
            (u8::adc(0xff, 0, 1), 0, 0x55),
            (u8::sbb(0, 0, 1), 0xff, 0x95),
            (u8::inc(0xff, 1), 0, 0x55),
            (u8::shl(0x81, 1, 0), 2, 0x801),
            (u8::rcl(0x80, 1, 1), 1, 0x801),
            (u8::ror(1, 1, 0x40), 0x80, 0x841),
        ] {
            assert_eq!((got.0, got.1 & !0x10 | flags & 0x10), (want, flags));
        }
    }

    #[test]
    fn division_refuses_what_hardware_refuses() {
        assert_eq!(u8::div(0, 7, 0), None);
        assert_eq!(u8::div(2, 0, 2), None);
        assert_eq!(u8::div(1, 0xff, 2), Some((0xff, 1)));
        assert_eq!(u64::idiv(1 << 63, 0, u64::MAX), None);
        assert_eq!(u8::idiv(0xff, 0x80, 0xff), None, "-128 / -1");
        assert_eq!(
            u32::idiv(u32::MAX, -7i32 as u32, 2),
            Some((-3i32 as u32, -1i32 as u32))
        );
    }
}
