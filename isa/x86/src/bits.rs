//! Bits of RFLAGS, the control registers, EFER and the debug registers, and MSR numbers.

use bitflags::bitflags;

bitflags! {
    /// RFLAGS (SDM vol. 1, 3.4.3).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct RFlags: u64 {
        #[allow(missing_docs)] const CF = 1;
        #[allow(missing_docs)] const FIXED = 1 << 1;
        #[allow(missing_docs)] const PF = 1 << 2;
        #[allow(missing_docs)] const AF = 1 << 4;
        #[allow(missing_docs)] const ZF = 1 << 6;
        #[allow(missing_docs)] const SF = 1 << 7;
        #[allow(missing_docs)] const TF = 1 << 8;
        #[allow(missing_docs)] const IF = 1 << 9;
        #[allow(missing_docs)] const DF = 1 << 10;
        #[allow(missing_docs)] const OF = 1 << 11;
        #[allow(missing_docs)] const IOPL = 3 << 12;
        #[allow(missing_docs)] const NT = 1 << 14;
        #[allow(missing_docs)] const RF = 1 << 16;
        #[allow(missing_docs)] const VM = 1 << 17;
        #[allow(missing_docs)] const AC = 1 << 18;
        #[allow(missing_docs)] const VIF = 1 << 19;
        #[allow(missing_docs)] const VIP = 1 << 20;
        #[allow(missing_docs)] const ID = 1 << 21;
    }
}

/// The arithmetic flags: CF, PF, AF, ZF, SF, OF.
pub const STATUS_FLAGS: u64 = 0x8d5;

/// CR0 (SDM vol. 3, 2.5).
#[allow(missing_docs)]
pub mod cr0 {
    pub const PE: u64 = 1;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
    /// The bits that exist.
    pub const ALL: u64 = PE | MP | EM | TS | ET | NE | WP | AM | NW | CD | PG;
}

/// CR4 (SDM vol. 3, 2.5).
#[allow(missing_docs)]
pub mod cr4 {
    pub const VME: u64 = 1;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// EFER (SDM vol. 3, 2.2.1).
#[allow(missing_docs)]
pub mod efer {
    pub const SCE: u64 = 1;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    /// Automatic IBRS (APM vol. 2, 3.1.7).
    pub const AIBRSE: u64 = 1 << 21;
}

/// XCR0 (SDM vol. 1, 13.3).
#[allow(missing_docs)]
pub mod xcr0 {
    pub const X87: u64 = 1;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
}

/// DR6 (SDM vol. 3, 17.2.3).
#[allow(missing_docs)]
pub mod dr6 {
    pub const BD: u64 = 1 << 13;
    pub const BS: u64 = 1 << 14;
    pub const BT: u64 = 1 << 15;
    /// The bits that always read as one.
    pub const FIXED: u64 = 0xffff_0ff0;
}

/// DR7 (SDM vol. 3, 17.2.4).
#[allow(missing_docs)]
pub mod dr7 {
    pub const GD: u64 = 1 << 13;
    /// The bit that always reads as one.
    pub const FIXED: u64 = 0x400;
}

/// MSR numbers (SDM vol. 4; APM vol. 2, appendix A).
#[allow(missing_docs)]
pub mod msr {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MCG_CTL: u32 = 0x17b;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUG_CTL: u32 = 0x1d9;
    pub const MTRR_PHYS_BASE0: u32 = 0x200;
    pub const MTRR_PHYS_MASK7: u32 = 0x20f;
    pub const MTRR_FIX_64K: u32 = 0x250;
    pub const MTRR_FIX_16K_80000: u32 = 0x258;
    pub const MTRR_FIX_16K_A0000: u32 = 0x259;
    pub const MTRR_FIX_4K_C0000: u32 = 0x268;
    pub const MTRR_FIX_4K_F8000: u32 = 0x26f;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_LAST: u32 = 0x8ff;
    pub const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
    pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}
