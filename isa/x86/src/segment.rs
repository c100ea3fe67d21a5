//! Segment registers with their hidden parts, and descriptors (SDM vol. 3, 3.4).

use serde::{Deserialize, Serialize};

/// The six segment registers, in encoding order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
#[repr(u8)]
pub enum SegmentRegister {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

/// A segment register (or LDTR, TR) with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Bits 40-55 of the descriptor with the limit's bits cleared: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13,
    /// D/B 14, G 15. A register loaded with a null selector has P clear.
    pub attributes: u16,
    /// The limit in bytes (granularity applied).
    pub limit: u32,
    /// The linear base address.
    pub base: u64,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Offset of the last valid byte.
    pub limit: u16,
}

impl Segment {
    /// A segment as in real mode: base = selector * 16, limit 64 KiB, read/write data (or code as x86 resets it).
    #[inline]
    pub const fn real_mode(selector: u16) -> Segment {
        Segment {
            selector,
            attributes: 0x93,
            limit: 0xffff,
            base: (selector as u64) << 4,
        }
    }

    /// A flat 4 GiB segment; `attributes` as in the field of that name.
    #[inline]
    pub const fn flat(selector: u16, attributes: u16) -> Segment {
        Segment {
            selector,
            attributes,
            limit: 0xffff_ffff,
            base: 0,
        }
    }

    /// Decodes an 8-byte descriptor that is loaded with `selector`.
    #[inline]
    pub const fn from_descriptor(selector: u16, descriptor: u64) -> Segment {
        let raw = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
        let granular = descriptor >> 55 & 1 != 0;
        Segment {
            selector,
            attributes: (descriptor >> 40) as u16 & 0xf0ff,
            limit: if granular { raw << 12 | 0xfff } else { raw },
            base: descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000,
        }
    }

    /// Type field, bits 0-3.
    #[inline]
    pub const fn kind(&self) -> u8 {
        self.attributes as u8 & 0xf
    }

    /// Code or data (S = 1) rather than a system segment.
    #[inline]
    pub const fn is_code_or_data(&self) -> bool {
        self.attributes & 0x10 != 0
    }

    /// A code segment.
    #[inline]
    pub const fn is_code(&self) -> bool {
        self.attributes & 0x18 == 0x18
    }

    /// A conforming code segment.
    #[inline]
    pub const fn is_conforming(&self) -> bool {
        self.attributes & 0x1c == 0x1c
    }

    /// A data segment that may be written.
    #[inline]
    pub const fn is_writable_data(&self) -> bool {
        self.attributes & 0x1a == 0x12
    }

    /// A data segment, or a code segment that may be read.
    #[inline]
    pub const fn is_readable(&self) -> bool {
        self.attributes & 0x18 == 0x10 || self.attributes & 0x1a == 0x1a
    }

    /// An expand-down data segment.
    #[inline]
    pub const fn is_expand_down(&self) -> bool {
        self.attributes & 0x1c == 0x14
    }

    /// Descriptor privilege level.
    #[inline]
    pub const fn dpl(&self) -> u8 {
        self.attributes as u8 >> 5 & 3
    }

    /// The present bit; clear for a null register.
    #[inline]
    pub const fn is_present(&self) -> bool {
        self.attributes & 0x80 != 0
    }

    /// The L bit of a code segment: 64-bit code.
    #[inline]
    pub const fn is_long(&self) -> bool {
        self.attributes & 0x2000 != 0
    }

    /// The D/B bit: 32-bit operands, stack or upper bound.
    #[inline]
    pub const fn is_big(&self) -> bool {
        self.attributes & 0x4000 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_decode() {
        for (descriptor, base, limit, attributes) in [
            (0x00af_9b00_0000_ffff_u64, 0, 0xffff_ffff_u32, 0xa09b_u16),
            (0x00cf_9300_0000_ffff, 0, 0xffff_ffff, 0xc093),
            (0x1240_8934_5678_0067, 0x1234_5678, 0x67, 0x4089),
            (0xff0f_f2ff_ffff_ffff, 0xffff_ffff, 0xf_ffff, 0x00f2),
        ] {
            let s = Segment::from_descriptor(8, descriptor);
            assert_eq!(
                (s.base, s.limit, s.attributes),
                (base, limit, attributes),
                "{descriptor:#x}"
            );
        }
    }
}
