//! A decoded instruction, ready to execute.

use iced_x86::Instruction;
use lodger_native::{Masked, Native};

use crate::cpu::{Cpu, Exec};

/// Executes one instruction. RIP is already that of the next one.
pub type Handler = fn(&mut Cpu, &Op) -> Exec;

/// A decoded instruction. What `dst`, `src` and `imm` mean is up to the handler.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Op {
    pub run: Handler,
    /// Displacement of the memory operand, sign-extended.
    pub disp: u64,
    /// Immediate (extended to 64 bits), branch distance, or for rare instructions the address of the [`Rare`].
    pub imm: u64,
    /// Length in bytes.
    pub len: u8,
    pub dst: u8,
    pub src: u8,
    /// Base register of the memory operand; [`crate::cpu::ZERO`] for none.
    pub base: u8,
    pub index: u8,
    /// Log2 of the index's factor.
    pub scale: u8,
    /// Segment of the memory operand; [`crate::cpu::seg::NONE`] if its base is zero and it has no limit.
    pub seg: u8,
    /// 64 - address size: shifts an offset's excess bits out.
    pub address_shift: u8,
}

/// What the handlers of rare instructions need beside the [`Op`].
pub struct Rare {
    /// The decoded instruction; its IP is not meaningful.
    pub instruction: Instruction,
    /// How it runs natively on the host, if that is how it is executed.
    pub native: Option<Native>,
    /// The gather or masked move, if it is one.
    pub masked: Option<Masked>,
}

impl Op {
    /// The whole instruction, for handlers of rare ones.
    #[inline]
    pub fn rare(&self) -> &Rare {
        // SAFETY: for every handler that calls this, the decoder sets `imm` to the address of a `Rare` that lives as long
        // as this op's block.
        unsafe { &*(self.imm as *const Rare) }
    }
}
