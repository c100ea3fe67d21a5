//! The guest registers that stubs work on: vector registers, MXCSR, x87/MMX, and the staged memory operand.
//!
//! The layout is known to the generated code, by `offset_of!` alone. The x87 state is in the format of FXSAVE64
//! (SDM volume 1, table 10-2); its fields for SSE hold host values of no meaning and are not accessible.

/// MXCSR after reset, and the host's while Rust code runs: everything masked, round to nearest.
pub(crate) const MXCSR_DEFAULT: u32 = 0x1f80;
/// Bytes of an FXSAVE image that hold x87 state: header and eight registers.
const X87_IMAGE: usize = 160;
/// MXCSR and its mask inside the image.
const FX_MXCSR: core::ops::Range<usize> = 24..32;

/// Guest registers outside the general-purpose ones; embedded in an interpreter's CPU.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct NativeState {
    /// YMM0 to YMM15; XMM registers are the first 16 bytes.
    pub ymm: [[u8; 32]; 16],
    /// The memory operand: the caller puts here what it read, and finds here what it has to write.
    pub staging: [u8; 128],
    /// FXSAVE64 image. Private because a bad MXCSR in it would fault on the host.
    fxsave: [u8; 512],
    /// The guest's MXCSR.
    pub mxcsr: u32,
    /// MXCSR to run with, then MXCSR after the instruction.
    pub(crate) run_mxcsr: u32,
    /// Exception flags on which a stub must not store its results.
    pub(crate) fatal: u32,
    /// What a stub leaves in the host's MXCSR.
    host_mxcsr: u32,
    /// Address of the instruction being executed (offset in CS): FIP after an x87 instruction.
    pub x87_ip: u64,
    /// Address of its memory operand (offset in its segment): FDP after an x87 instruction that has one.
    pub x87_dp: u64,
}

/// Offsets from the state's address, for the stub generator.
pub(crate) mod offset {
    use super::NativeState;
    use std::mem::offset_of;

    pub(crate) const fn ymm(number: usize) -> i32 {
        (offset_of!(NativeState, ymm) + 32 * number) as i32
    }
    pub(crate) const STAGING: i32 = offset_of!(NativeState, staging) as i32;
    pub(crate) const FXSAVE: i32 = offset_of!(NativeState, fxsave) as i32;
    pub(crate) const RUN_MXCSR: i32 = offset_of!(NativeState, run_mxcsr) as i32;
    pub(crate) const FATAL: i32 = offset_of!(NativeState, fatal) as i32;
    pub(crate) const HOST_MXCSR: i32 = offset_of!(NativeState, host_mxcsr) as i32;
    const _: () = assert!(FXSAVE % 16 == 0 && STAGING % 64 == 0);
}

impl Default for NativeState {
    fn default() -> Self {
        Self::new()
    }
}

impl NativeState {
    /// The registers after RESET (SDM volume 3, table 9-1): vector registers zero, MXCSR 1F80H, FCW 0040H, all eight
    /// x87 registers a valid +0.0.
    pub fn new() -> Self {
        let mut fxsave = [0; 512];
        fxsave[0] = 0x40;
        fxsave[4] = 0xff;
        fxsave[FX_MXCSR][..4].copy_from_slice(&MXCSR_DEFAULT.to_le_bytes());
        Self {
            ymm: [[0; 32]; 16],
            staging: [0; 128],
            fxsave,
            mxcsr: MXCSR_DEFAULT,
            run_mxcsr: MXCSR_DEFAULT,
            fatal: 0,
            host_mxcsr: MXCSR_DEFAULT,
            x87_ip: 0,
            x87_dp: 0,
        }
    }

    /// The x87/MMX state as the first 160 bytes of an FXSAVE64 image. Bytes 24 to 31 (MXCSR and its mask) are zero.
    pub fn x87(&self) -> [u8; X87_IMAGE] {
        let mut image = [0; X87_IMAGE];
        image.copy_from_slice(&self.fxsave[..X87_IMAGE]);
        image[FX_MXCSR].fill(0);
        image
    }

    /// Sets the x87/MMX state from the first 160 bytes of an FXSAVE64 image; any bytes will do. Bytes 24 to 31 are
    /// ignored.
    pub fn set_x87(&mut self, image: &[u8; X87_IMAGE]) {
        self.fxsave[..FX_MXCSR.start].copy_from_slice(&image[..FX_MXCSR.start]);
        self.fxsave[FX_MXCSR.end..X87_IMAGE].copy_from_slice(&image[FX_MXCSR.end..]);
    }

    /// The x87 control word.
    pub fn fcw(&self) -> u16 {
        u16::from_le_bytes([self.fxsave[0], self.fxsave[1]])
    }

    /// The x87 status word.
    pub fn fsw(&self) -> u16 {
        u16::from_le_bytes([self.fxsave[2], self.fxsave[3]])
    }

    /// Whether an unmasked x87 exception waits to be delivered: the next waiting instruction raises #MF.
    pub fn x87_exception_pending(&self) -> bool {
        self.x87_unmasked() != 0
    }

    /// The x87 exception flags that are set and not masked.
    pub(crate) fn x87_unmasked(&self) -> u16 {
        self.fsw() & !self.fcw() & 0x3f
    }

    /// Notes where the last x87 instruction was; `memory` says that it had a memory operand.
    pub(crate) fn update_x87_pointers(&mut self, memory: bool) {
        self.fxsave[6..8].fill(0);
        self.fxsave[8..16].copy_from_slice(&self.x87_ip.to_le_bytes());
        if memory {
            self.fxsave[16..24].copy_from_slice(&self.x87_dp.to_le_bytes());
        }
    }

    /// MMX register `number`: the physical register, whatever the x87 stack's top is.
    pub(crate) fn mmx(&self, number: usize) -> [u8; 8] {
        let at = 32 + 16 * ((number + 8 - self.x87_top()) % 8);
        self.fxsave[at..at + 8].try_into().expect("8 bytes")
    }

    /// What every MMX instruction but EMMS does to the x87 state: top of stack zero, all registers valid.
    pub(crate) fn enter_mmx(&mut self) {
        let top = self.x87_top();
        // Registers are stored in stack order, so a new top moves them.
        self.fxsave[32..X87_IMAGE].rotate_right(16 * top);
        self.fxsave[3] &= !0x38;
        self.fxsave[4] = 0xff;
    }

    fn x87_top(&self) -> usize {
        usize::from(self.fsw() >> 11 & 7)
    }
}
