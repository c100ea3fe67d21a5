//! Where the guest's status flags are while a block is executed.
//!
//! They begin in the flags register. A lookup destroys that; if they are still needed they are saved to memory first
//! ([`Env::flags`](crate::env::Env)), once, and stay there until an instruction needs them. Most are never needed: the next arithmetic
//! instruction replaces them, in this block or in the one behind it.

use iced_x86::{Code, Instruction, Register as R};

use crate::emit::{Op, RAX, T, abs};
use crate::insn::Insn;
use crate::special::low;
use crate::translate::Block;

/// Where the flags are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flags {
    /// In the flags register, as far as they are needed.
    Register,
    /// In memory; the register holds anything.
    Saved,
}

impl Block<'_> {
    /// Saves the flags to memory if they are not there: the register may be destroyed then. T is destroyed.
    pub fn save_flags(&mut self) {
        if self.flags == Flags::Saved {
            return;
        }
        self.flags = Flags::Saved;
        let place = low(self.layout.flags());
        self.code.mov(T, RAX);
        self.asm([
            Ok(Instruction::with(Code::Lahf)),
            Instruction::with1(Code::Seto_rm8, R::AL),
            Instruction::with2(Code::Mov_rm16_r16, place, R::AX),
        ]);
        self.code.mov(RAX, T);
    }

    /// Puts them back into the flags register if they are not there. T is destroyed.
    pub fn restore_flags(&mut self) {
        if self.flags == Flags::Register {
            return;
        }
        self.flags = Flags::Register;
        let place = low(self.layout.flags());
        self.code.mov(T, RAX);
        self.asm([
            Instruction::with2(Code::Movzx_r32_rm16, R::EAX, place),
            // Overflows if OF is to be set.
            Instruction::with2(Code::Add_AL_imm8, R::AL, 0x7f_u32),
            Ok(Instruction::with(Code::Sahf)),
        ]);
        self.code.mov(RAX, T);
    }

    /// To be called right before the instruction's own operation. T may be destroyed.
    pub fn before_operation(&mut self, insn: &Insn) {
        if insn.needs_flags() {
            self.restore_flags();
        }
    }

    /// To be called right behind it.
    pub fn after_operation(&mut self, insn: &Insn) {
        if insn.writes_flags() {
            self.flags = Flags::Register;
        }
    }

    /// Bytes of RFLAGS as PUSHF stores it, in RAX; T is destroyed. They must be saved.
    pub fn assemble_rflags(&mut self, kept: u32) {
        let flags = self.layout.flags();
        self.code.op32(Op::Mov, RAX, abs(self.layout.rflags()));
        self.asm([
            Instruction::with2(Code::And_EAX_imm32, R::EAX, kept),
            Instruction::with2(Code::Movzx_r32_rm8, R::R10D, low(flags + 1)),
            Instruction::with2(Code::Or_r32_rm32, R::EAX, R::R10D),
            Instruction::with2(Code::Movzx_r32_rm8, R::R10D, low(flags)),
            Instruction::with2(Code::Shl_rm32_imm8, R::R10D, 11_u32),
            Instruction::with2(Code::Or_r32_rm32, R::EAX, R::R10D),
        ]);
    }
}
