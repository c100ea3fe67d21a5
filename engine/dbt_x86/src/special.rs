//! Instructions on flags, segments and strings that need more than a memory lookup, inline because they are frequent: PUSHF, POPF, CLI,
//! STI, SWAPGS, MOV from a segment register, REP MOVS and REP STOS.
//!
//! RFLAGS but for the status flags is in [`lodger_interp::Cpu::flags`].

use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register as R};
use lodger_x86::bits::{RFlags, STATUS_FLAGS};

use crate::check::Address;
use crate::emit::{Op, RAX, RCX, RSP, Reg, S, T, abs, at, cc};
use crate::exits::Rare;
use crate::flags::Flags;
use crate::translate::{Block, Site};

const IF: u64 = RFlags::IF.bits();
const DF: u32 = RFlags::DF.bits() as u32;

/// `[address]` for iced.
pub fn low(address: u32) -> MemoryOperand {
    MemoryOperand::with_displ(address.into(), 4)
}

impl Block<'_> {
    /// Emits instructions that can be encoded.
    pub fn asm<const N: usize>(&mut self, instructions: [Result<Instruction, IcedError>; N]) {
        for instruction in instructions {
            let instruction = instruction.expect("operands that fit");
            self.encode(&instruction).ok().expect("a valid instruction");
        }
    }

    /// `reg &= mask` without touching a flag.
    pub fn clear_bits(&mut self, mask: u32) {
        self.code.pext(T, T, mask);
        self.code.pdep(T, T, mask);
    }

    /// MOV of segment register `number` to a general one.
    pub fn move_segment(&mut self, register: R, number: usize) {
        let place = low(self.layout.selector(number));
        self.load_for(register);
        let (host, code) = match register.size() {
            8 => (self.scratch_for(register), Code::Movzx_r64_rm16),
            4 => (self.scratch_for(register), Code::Movzx_r32_rm16),
            _ => (self.scratch_for(register), Code::Mov_r16_rm16),
        };
        self.asm([Instruction::with2(code, host, place)]);
        self.store_for(register);
    }

    /// PUSHFQ.
    pub fn push_flags(&mut self, i: &Instruction) {
        self.save_flags();
        let place = self.check(Address::Register(RSP, -8), 8, true, 0);
        let value = abs(self.layout.value());
        self.code.op(Op::Store, RAX, value);
        let others = STATUS_FLAGS | RFlags::RF.bits() | RFlags::VM.bits();
        self.assemble_rflags(!others as u32);
        self.code.mov(T, RAX);
        self.code.op(Op::Mov, RAX, value);
        self.note_trap(i);
        self.code.op(Op::Store, T, place);
        self.code.op(Op::Lea, RSP, at(RSP, -8));
    }

    /// POPFQ, as long as it changes no more than the status flags and, in ring 0, IF.
    pub fn pop_flags(&mut self, i: &Instruction, site: Site, live: u32) {
        let place = self.check(Address::Register(RSP, 0), 8, false, live);
        let (value, flags) = (self.layout.value(), self.layout.rflags());
        let ring0 = self.source.mode.is_ring0();
        let harmless = STATUS_FLAGS | if ring0 { IF } else { 0 };
        self.note_trap(i);
        self.code.op(Op::Mov, S, place);
        self.code.op(Op::Mov, T, abs(flags));
        self.asm([
            Instruction::with2(Code::Xor_r64_rm64, R::R10, R::R11),
            Instruction::with2(Code::Test_rm64_imm32, R::R10, !harmless as i32),
        ]);
        let more = self.code.jcc_forward(cc::NE);
        self.stub(more, Rare::Leave, site);
        if ring0 {
            self.asm([Instruction::with2(
                Code::Test_rm32_imm32,
                R::R11D,
                IF as u32,
            )]);
            let off = self.code.jcc_forward(cc::E);
            self.code.cmp_zero32(abs(self.layout.waiting()));
            let waiting = self.code.jcc_forward(cc::NE);
            self.stub(waiting, Rare::Leave, site);
            self.code.land(off);
            self.code.op(Op::Store, S, abs(flags));
        }
        self.code.op(Op::Store, RAX, abs(value));
        self.asm([
            Instruction::with2(Code::Mov_r32_rm32, R::EAX, R::R11D),
            Instruction::with2(Code::Shl_rm32_imm8, R::EAX, 8_u32),
            Instruction::with2(Code::Bt_rm32_imm8, R::R11D, 11_u32),
            Instruction::with1(Code::Setb_rm8, R::AL),
            Instruction::with2(Code::Mov_rm16_r16, low(self.layout.flags()), R::AX),
        ]);
        self.flags = Flags::Saved;
        self.code.op(Op::Mov, RAX, abs(value));
        self.code.op(Op::Lea, RSP, at(RSP, 8));
    }

    /// CLI in ring 0.
    pub fn clear_interrupts(&mut self) {
        let flags = self.layout.rflags();
        self.code.op(Op::Mov, T, abs(flags));
        self.clear_bits(self.layout.no_if_mask());
        self.code.op(Op::Store, T, abs(flags));
    }

    /// STI in ring 0, followed by an instruction of this block. If an interrupt waits, it is the interpreter's.
    pub fn set_interrupts(&mut self, site: Site) {
        let (flags, waiting) = (self.layout.rflags(), self.layout.waiting());
        let c = &mut *self.code;
        c.mov(T, RCX);
        c.op32(Op::Mov, RCX, abs(waiting));
        let none = c.jrcxz();
        c.mov(RCX, T);
        let jump = c.jmp_forward();
        c.land(none);
        c.mov(RCX, T);
        c.op(Op::Mov, T, abs(flags));
        self.stub(jump, Rare::Leave, site);
        self.clear_bits(self.layout.no_if_mask());
        self.code.op(Op::Lea, T, at(T, IF as i32));
        self.code.op(Op::Store, T, abs(flags));
    }

    /// SWAPGS in ring 0.
    pub fn swap_gs(&mut self) {
        let (kernel, base) = (self.layout.kernel_gs_base(), self.layout.segment_base(5));
        self.code.op(Op::Mov, T, abs(kernel));
        self.code.op(Op::Mov, S, abs(base));
        self.code.op(Op::Store, S, abs(kernel));
        self.code.op(Op::Store, T, abs(base));
        self.code.op(Op::Store, T, abs(self.layout.bases + 8 * 5));
    }

    /// REP MOVS and REP STOS of elements of 2^`log` bytes, up to the end of a page at a time. What is not upwards is the interpreter's.
    pub fn repeat(&mut self, instruction: &Instruction, log: u8, moves: bool, site: Site) {
        let rip = instruction.ip();
        let size = 1 << log;
        let saved = |n: u32| low(self.layout.strings() + 8 * n);
        let (source_host, source_after, target_after, count_after) =
            (saved(0), saved(1), saved(2), saved(3));
        let value = low(self.layout.value());
        self.code.op(Op::Store, RAX, abs(self.layout.value()));
        let top = self.code.here();
        self.asm([Instruction::with2(Code::Test_rm64_r64, R::RCX, R::RCX)]);
        let done = self.code.jcc_forward(cc::E);
        let flags = low(self.layout.rflags());
        self.asm([Instruction::with2(Code::Test_rm32_imm32, flags, DF)]);
        let down = self.code.jcc_forward(cc::NE);
        self.stub(down, Rare::Leave, site);
        if moves {
            self.look_up(Address::Register(Reg(6), 0), size, false, false, 0);
            self.asm([Instruction::with2(Code::Mov_rm64_r64, source_host, R::R11)]);
        }
        self.look_up(Address::Register(Reg(7), 0), size, true, false, 0);
        // T: bytes that are left of the nearer page's end.
        self.asm([
            Instruction::with2(Code::Mov_r32_rm32, R::R10D, R::EDI),
            Instruction::with2(Code::Or_rm32_imm32, R::R10D, 0xffff_f000_u32),
            Instruction::with1(Code::Neg_rm32, R::R10D),
        ]);
        if moves {
            self.asm([
                Instruction::with2(Code::Mov_r32_rm32, R::EAX, R::ESI),
                Instruction::with2(Code::Or_rm32_imm32, R::EAX, 0xffff_f000_u32),
                Instruction::with1(Code::Neg_rm32, R::EAX),
                Instruction::with2(Code::Cmp_r32_rm32, R::EAX, R::R10D),
                Instruction::with2(Code::Cmovb_r32_rm32, R::R10D, R::EAX),
            ]);
        }
        // T: elements; what the registers are afterwards; the registers for the host.
        let end = |base| MemoryOperand::new(base, R::R10, size.into(), 0, 0, false, R::None);
        self.asm([
            Instruction::with2(Code::Shr_rm32_imm8, R::R10D, u32::from(log)),
            Instruction::with2(Code::Cmp_r64_rm64, R::R10, R::RCX),
            Instruction::with2(Code::Cmova_r64_rm64, R::R10, R::RCX),
            Instruction::with2(Code::Lea_r64_m, R::RAX, end(R::RDI)),
            Instruction::with2(Code::Mov_rm64_r64, target_after, R::RAX),
            Instruction::with2(Code::Mov_r64_rm64, R::RAX, R::RCX),
            Instruction::with2(Code::Sub_r64_rm64, R::RAX, R::R10),
            Instruction::with2(Code::Mov_rm64_r64, count_after, R::RAX),
            Instruction::with2(Code::Mov_r64_rm64, R::RCX, R::R10),
            Instruction::with2(Code::Mov_r64_rm64, R::RDI, R::R11),
        ]);
        if moves {
            self.asm([
                Instruction::with2(Code::Lea_r64_m, R::RAX, end(R::RSI)),
                Instruction::with2(Code::Mov_rm64_r64, source_after, R::RAX),
                Instruction::with2(Code::Mov_r64_rm64, R::RSI, source_host),
            ]);
        }
        self.asm([Instruction::with2(Code::Mov_r64_rm64, R::RAX, value)]);
        self.code.raw(match (moves, log) {
            (true, 0) => &[0xf3, 0xa4],
            (true, 1) => &[0xf3, 0x66, 0xa5],
            (true, 2) => &[0xf3, 0xa5],
            (true, _) => &[0xf3, 0x48, 0xa5],
            (false, 0) => &[0xf3, 0xaa],
            (false, 1) => &[0xf3, 0x66, 0xab],
            (false, 2) => &[0xf3, 0xab],
            (false, _) => &[0xf3, 0x48, 0xab],
        });
        if moves {
            self.asm([Instruction::with2(Code::Mov_r64_rm64, R::RSI, source_after)]);
        }
        self.asm([
            Instruction::with2(Code::Mov_r64_rm64, R::RDI, target_after),
            Instruction::with2(Code::Mov_r64_rm64, R::RCX, count_after),
        ]);
        self.code.cmp_zero32(abs(self.layout.requests));
        self.code.jcc(cc::E, top);
        // Requests: between two repetitions, if there are more.
        self.asm([Instruction::with2(Code::Test_rm64_r64, R::RCX, R::RCX)]);
        let interrupted = self.code.jcc_forward(cc::NE);
        self.stub(
            interrupted,
            Rare::Leave,
            Site::Repeat {
                rip,
                rest: self.rest,
            },
        );
        self.code.land(done);
    }
}
