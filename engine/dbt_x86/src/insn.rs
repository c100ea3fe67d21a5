//! What the translator makes of each guest instruction: how it is translated, what memory it accesses, which flags it needs.

use iced_x86::{
    Code, Instruction, InstructionInfoFactory, Mnemonic as M, OpKind, Register, RflagsBits,
};
use lodger_native::{Class, MemUse, in_place};

use crate::group::written;
use crate::translate::{Mode, Width};

/// The status flags, as iced's bits.
pub const FLAGS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// How an instruction is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing to execute.
    Nothing,
    /// As it is: registers only.
    Registers,
    /// RIP-relative LEA: a constant.
    Constant(u64),
    /// One memory operand of so many bytes.
    Memory {
        size: u8,
        write: bool,
    },
    /// PUSH of a register.
    Push(Register),
    /// PUSH of an immediate, sign-extended.
    PushImmediate(i32),
    /// PUSH of memory.
    PushMemory,
    /// POP to a register.
    Pop(Register),
    Leave,
    /// Conditional jump, with the target.
    Branch(u64),
    /// LOOP and JRCXZ.
    ShortBranch(u64),
    Jump(u64),
    Call(u64),
    JumpRegister(Register),
    JumpMemory,
    CallRegister(Register),
    CallMemory,
    /// RET, releasing so many bytes of arguments.
    Return(u16),
    /// MOV from the segment register of this number.
    MoveSegment(usize),
    PushFlags,
    PopFlags,
    ClearInterrupts,
    SetInterrupts,
    SwapGs,
    SystemCall,
    SystemReturn,
    /// CLD.
    ClearDirection,
    /// MOV from the control register of this number.
    ReadControl(usize),
    /// RDTSC, and with `aux` RDTSCP.
    ReadTime {
        aux: bool,
    },
    /// STAC (true) and CLAC.
    SetAccess(bool),
    /// BT, BTS, BTR, BTC of a bit in memory by a register's number, in elements of so many bytes.
    BitMemory {
        size: u8,
        write: bool,
    },
    /// RDFSBASE, RDGSBASE, and the opposites, with the segment's number.
    ReadBase(usize),
    WriteBase(usize),
    /// REP MOVS, REP STOS, of elements of 2^`log` bytes.
    Repeat {
        log: u8,
        moves: bool,
    },
    /// By the interpreter.
    Interpret,
}

/// Which SIMD instructions the guest may execute now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Simd {
    pub sse: bool,
    pub avx: bool,
}

/// One guest instruction.
#[derive(Clone, Copy)]
pub struct Insn {
    pub instruction: Instruction,
    /// See [`Mode::word`].
    pub word: u8,
    pub kind: Kind,
    /// The host may trap on it, beside for its memory.
    pub traps: bool,
    /// It uses the vector registers.
    pub vector: bool,
    /// A conditional jump after which, if it is taken, the next instruction of the block comes: another round of a loop.
    pub goes_on: bool,
    /// Flags that it or what follows needs of those before it.
    pub live: u32,
    /// Flags that what follows needs.
    pub live_after: u32,
    /// General registers that it writes, of those instructions for which that matters.
    pub written: u16,
}

/// R10 or R11, whatever the width.
pub fn is_stolen(register: Register) -> bool {
    matches!(register.full_register(), Register::R10 | Register::R11)
}

impl Insn {
    pub fn new(instruction: &Instruction, info: &mut InstructionInfoFactory, mode: Mode) -> Insn {
        let mut insn = Insn {
            instruction: match mode.is_32() {
                true => in_64_bit_mode(*instruction),
                false => *instruction,
            },
            word: mode.word(),
            kind: Kind::Interpret,
            traps: false,
            vector: false,
            goes_on: false,
            live: FLAGS,
            live_after: FLAGS,
            written: 0,
        };
        insn.kind = insn.classify(info, mode);
        insn.written = match insn.kind {
            Kind::Registers | Kind::Memory { .. } => written(&insn, info),
            Kind::Constant(_) => 1 << instruction.op0_register().number(),
            _ => 0,
        };
        insn
    }

    /// Whether nothing of the block is executed after it.
    pub fn ends_block(&self) -> bool {
        matches!(
            self.kind,
            Kind::Interpret
                | Kind::Jump(_)
                | Kind::Call(_)
                | Kind::JumpRegister(_)
                | Kind::JumpMemory
                | Kind::CallRegister(_)
                | Kind::CallMemory
                | Kind::Return(_)
                | Kind::SystemCall
                | Kind::SystemReturn
                | Kind::SetAccess(_)
        )
    }

    /// Flags needed before the instruction if `after` are needed behind it.
    pub fn live_before(&self, after: u32) -> u32 {
        let i = &self.instruction;
        match self.kind {
            Kind::Interpret | Kind::SystemCall | Kind::SystemReturn => FLAGS,
            Kind::Nothing => after,
            Kind::PopFlags => 0,
            _ => (after & !self.kills() | i.rflags_read()) & FLAGS,
        }
    }

    /// Whether it writes any flag, certainly or not.
    pub fn writes_flags(&self) -> bool {
        self.instruction.rflags_modified() & FLAGS != 0
    }

    /// Whether the flags from before it must be in the flags register when it is executed.
    pub fn needs_flags(&self) -> bool {
        let through = self.live_after & !self.kills();
        self.instruction.rflags_read() & FLAGS != 0 || self.writes_flags() && through != 0
    }

    /// Flags that it certainly writes.
    fn kills(&self) -> u32 {
        let i = &self.instruction;
        match i.mnemonic() {
            // A count of zero leaves the flags alone.
            M::Shl
            | M::Shr
            | M::Sar
            | M::Sal
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd => {
                let last = i.op_count() - 1;
                let mask = if i.op0_register().is_gpr64() || i.memory_size().size() == 8 {
                    63
                } else {
                    31
                };
                if i.op_kind(last) == OpKind::Immediate8 && i.immediate8() & mask != 0 {
                    i.rflags_modified()
                } else if i.op_kind(last) == OpKind::Immediate8
                    || i.op_kind(last) == OpKind::Register && i.op_register(last) == Register::CL
                {
                    0
                } else {
                    // By one.
                    i.rflags_modified()
                }
            }
            // What these leave undefined is what was there, on some processors.
            M::Bsf | M::Bsr => RflagsBits::ZF,
            M::Bt | M::Bts | M::Btr | M::Btc => RflagsBits::CF,
            M::Div | M::Idiv => 0,
            _ => i.rflags_modified(),
        }
    }

    fn classify(&mut self, info: &mut InstructionInfoFactory, mode: Mode) -> Kind {
        let i = self.instruction;
        if i.is_invalid() {
            return Kind::Interpret;
        }
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        match i.mnemonic() {
            M::Nop
            | M::Endbr64
            | M::Endbr32
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetch => Kind::Nothing,
            _ if mode.is_32() && !is_addressable(&i, memory, mode) => Kind::Interpret,
            M::Lea if !i.is_ip_rel_memory_operand() => Kind::Registers,
            M::Lea if i.op0_register().is_gpr64() => Kind::Constant(i.ip_rel_memory_address()),
            M::Lea => Kind::Interpret,
            M::Push => match i.code() {
                Code::Push_r64 | Code::Push_rm64 | Code::Push_r32 | Code::Push_rm32 if !memory => {
                    Kind::Push(i.op0_register())
                }
                Code::Push_rm64 | Code::Push_rm32 => Kind::PushMemory,
                Code::Pushq_imm8 => Kind::PushImmediate(i.immediate8to64() as i32),
                Code::Pushq_imm32 => Kind::PushImmediate(i.immediate32to64() as i32),
                Code::Pushd_imm8 => Kind::PushImmediate(i.immediate8to32()),
                Code::Pushd_imm32 => Kind::PushImmediate(i.immediate32() as i32),
                _ => Kind::Interpret,
            },
            M::Pop => match i.code() {
                Code::Pop_r64 | Code::Pop_rm64 | Code::Pop_r32 | Code::Pop_rm32 if !memory => {
                    Kind::Pop(i.op0_register())
                }
                _ => Kind::Interpret,
            },
            M::Leave if matches!(i.code(), Code::Leaveq | Code::Leaved) => Kind::Leave,
            M::Ret => match i.code() {
                Code::Retnq | Code::Retnd => Kind::Return(0),
                Code::Retnq_imm16 | Code::Retnd_imm16 => Kind::Return(i.immediate16()),
                _ => Kind::Interpret,
            },
            M::Jmp => match i.code() {
                Code::Jmp_rel8_64 | Code::Jmp_rel32_64 | Code::Jmp_rel8_32 | Code::Jmp_rel32_32 => {
                    target(&i, Kind::Jump)
                }
                Code::Jmp_rm64 | Code::Jmp_rm32 if memory => Kind::JumpMemory,
                Code::Jmp_rm64 | Code::Jmp_rm32 => Kind::JumpRegister(i.op0_register()),
                _ => Kind::Interpret,
            },
            M::Call => match i.code() {
                Code::Call_rel32_64 | Code::Call_rel32_32 => target(&i, Kind::Call),
                Code::Call_rm64 | Code::Call_rm32 if memory => Kind::CallMemory,
                Code::Call_rm64 | Code::Call_rm32 => Kind::CallRegister(i.op0_register()),
                _ => Kind::Interpret,
            },
            M::Loop | M::Loope | M::Loopne | M::Jrcxz | M::Jecxz => match i.code() {
                Code::Loop_rel8_64_RCX
                | Code::Loop_rel8_64_ECX
                | Code::Loope_rel8_64_RCX
                | Code::Loope_rel8_64_ECX
                | Code::Loopne_rel8_64_RCX
                | Code::Loopne_rel8_64_ECX
                | Code::Jrcxz_rel8_64
                | Code::Jecxz_rel8_64
                | Code::Loop_rel8_32_ECX
                | Code::Loope_rel8_32_ECX
                | Code::Loopne_rel8_32_ECX
                | Code::Jecxz_rel8_32 => target(&i, Kind::ShortBranch),
                _ => Kind::Interpret,
            },
            _ if i.is_jcc_short_or_near() => match i.op0_kind() {
                OpKind::NearBranch64 | OpKind::NearBranch32 => target(&i, Kind::Branch),
                _ => Kind::Interpret,
            },
            _ => match special(&i, mode) {
                Some(kind) => kind,
                None => self.classify_data(info, mode.simd, memory),
            },
        }
    }

    /// Instructions that compute.
    fn classify_data(
        &mut self,
        info: &mut InstructionInfoFactory,
        simd: Simd,
        memory: bool,
    ) -> Kind {
        let i = self.instruction;
        let (size, write) = match in_place_integer(&i) {
            Some(write) => (i.memory_size().size() as u8, write),
            None if matches!(
                i.mnemonic(),
                M::Ldmxcsr | M::Stmxcsr | M::Vldmxcsr | M::Vstmxcsr
            ) =>
            {
                self.vector = true;
                let vex = matches!(i.mnemonic(), M::Vldmxcsr | M::Vstmxcsr);
                if !simd.sse || vex && !simd.avx {
                    return Kind::Interpret;
                }
                (4, matches!(i.mnemonic(), M::Stmxcsr | M::Vstmxcsr))
            }
            None => {
                let Some(form) = in_place(&i, info) else {
                    return Kind::Interpret;
                };
                self.vector = matches!(form.class, Class::Sse | Class::Avx);
                let permitted = match form.class {
                    Class::Gpr => true,
                    Class::Sse => simd.sse,
                    Class::Avx => simd.avx,
                    Class::X87 | Class::Mmx => false,
                };
                if !permitted {
                    return Kind::Interpret;
                }
                self.traps = form.class != Class::Gpr;
                (
                    (form.mem.read() + form.mem.write()) as u8,
                    matches!(form.mem, MemUse::Write(_)),
                )
            }
        };
        self.traps |= matches!(i.mnemonic(), M::Div | M::Idiv);
        if !memory {
            return Kind::Registers;
        }
        self.traps = true;
        let registers = || {
            (0..i.op_count())
                .filter(|&n| i.op_kind(n) == OpKind::Register)
                .map(|n| i.op_register(n))
        };
        let high = registers()
            .any(|r| matches!(r, Register::AH | Register::BH | Register::CH | Register::DH));
        let both = [Register::R10, Register::R11]
            .iter()
            .all(|s| registers().any(|r| r.full_register() == *s));
        let far = matches!(
            i.code(),
            Code::Mov_AL_moffs8
                | Code::Mov_AX_moffs16
                | Code::Mov_EAX_moffs32
                | Code::Mov_RAX_moffs64
                | Code::Mov_moffs8_AL
                | Code::Mov_moffs16_AX
                | Code::Mov_moffs32_EAX
                | Code::Mov_moffs64_RAX
        );
        if high || both || far || size == 0 {
            return Kind::Interpret;
        }
        Kind::Memory { size, write }
    }
}

fn target(i: &Instruction, kind: fn(u64) -> Kind) -> Kind {
    match i.near_branch_target() >> 47 {
        0 | 0x1ffff => kind(i.near_branch_target()),
        _ => Kind::Interpret,
    }
}

/// The same instruction of 32-bit code in a form that 64-bit mode has.
fn in_64_bit_mode(mut i: Instruction) -> Instruction {
    i.set_code(match i.code() {
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        other => other,
    });
    i
}

/// Whether the memory operand of an instruction of 32-bit code, if it has one, has a 32-bit address in a segment without a limit.
fn is_addressable(i: &Instruction, memory: bool, mode: Mode) -> bool {
    let Width::Bits32 { fs, gs } = mode.width else {
        return true;
    };
    let registers = [i.memory_base(), i.memory_index()];
    let wide = registers
        .iter()
        .all(|r| matches!(r, Register::None) || r.is_gpr32())
        && (registers != [Register::None; 2] || i.memory_displ_size() == 4);
    let segment = match i.memory_segment() {
        Register::CS => false,
        Register::FS => fs,
        Register::GS => gs,
        _ => true,
    };
    !memory || wide && (segment || i.mnemonic() == M::Lea)
}

/// Instructions with sequences of their own.
fn special(i: &Instruction, mode: Mode) -> Option<Kind> {
    let repeated = |log, moves| {
        let plain = i.has_rep_prefix()
            && (0..i.op_count()).all(|n| {
                !matches!(
                    i.op_kind(n),
                    OpKind::MemorySegESI
                        | OpKind::MemoryESEDI
                        | OpKind::MemorySegSI
                        | OpKind::MemoryESDI
                )
            })
            && !matches!(i.memory_segment(), Register::FS | Register::GS);
        plain.then_some(Kind::Repeat { log, moves })
    };
    let memory = i.op_count() > 0 && i.op0_kind() == OpKind::Memory && !mode.is_32();
    let bit = |write| {
        let size = i.op1_register().size() as u8;
        Some(Kind::BitMemory { size, write })
    };
    match i.code() {
        Code::Pushfq => Some(Kind::PushFlags),
        Code::Popfq => Some(Kind::PopFlags),
        Code::Cli if mode.is_ring0() => Some(Kind::ClearInterrupts),
        Code::Sti if mode.is_ring0() => Some(Kind::SetInterrupts),
        Code::Swapgs if mode.is_ring0() => Some(Kind::SwapGs),
        Code::Syscall if !mode.is_ring0() && !mode.is_32() => Some(Kind::SystemCall),
        Code::Sysretq if mode.is_ring0() => Some(Kind::SystemReturn),
        Code::Cld => Some(Kind::ClearDirection),
        Code::Mov_r64_cr
            if mode.is_ring0() && matches!(i.op1_register().number(), 0 | 2 | 3 | 4) =>
        {
            Some(Kind::ReadControl(i.op1_register().number()))
        }
        // If ticks are counted, time may depend on them.
        Code::Rdtsc if !mode.counted => Some(Kind::ReadTime { aux: false }),
        Code::Rdtscp if !mode.counted => Some(Kind::ReadTime { aux: true }),
        Code::Stac if mode.is_ring0() => Some(Kind::SetAccess(true)),
        Code::Clac if mode.is_ring0() => Some(Kind::SetAccess(false)),
        Code::Bt_rm32_r32 | Code::Bt_rm64_r64 if memory => bit(false),
        Code::Bts_rm32_r32
        | Code::Bts_rm64_r64
        | Code::Btr_rm32_r32
        | Code::Btr_rm64_r64
        | Code::Btc_rm32_r32
        | Code::Btc_rm64_r64
            if memory =>
        {
            bit(true)
        }
        Code::Rdfsbase_r32 | Code::Rdfsbase_r64 if mode.bases => Some(Kind::ReadBase(4)),
        Code::Rdgsbase_r32 | Code::Rdgsbase_r64 if mode.bases => Some(Kind::ReadBase(5)),
        Code::Wrfsbase_r32 | Code::Wrfsbase_r64 if mode.bases => Some(Kind::WriteBase(4)),
        Code::Wrgsbase_r32 | Code::Wrgsbase_r64 if mode.bases => Some(Kind::WriteBase(5)),
        Code::Movsb_m8_m8 => repeated(0, true),
        Code::Movsw_m16_m16 => repeated(1, true),
        Code::Movsd_m32_m32 => repeated(2, true),
        Code::Movsq_m64_m64 => repeated(3, true),
        Code::Stosb_m8_AL => repeated(0, false),
        Code::Stosw_m16_AX => repeated(1, false),
        Code::Stosd_m32_EAX => repeated(2, false),
        Code::Stosq_m64_RAX => repeated(3, false),
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg
            if i.op0_kind() == OpKind::Register =>
        {
            Some(Kind::MoveSegment(i.op1_register().number()))
        }
        _ => None,
    }
}

/// Integer instructions that are executed as they are; whether the memory operand, if they have one, is written.
fn in_place_integer(i: &Instruction) -> Option<bool> {
    if (0..i.op_count()).any(|n| {
        i.op_kind(n) == OpKind::Register && !i.op_register(n).is_gpr()
            || !matches!(
                i.op_kind(n),
                OpKind::Register
                    | OpKind::Memory
                    | OpKind::Immediate8
                    | OpKind::Immediate8to16
                    | OpKind::Immediate8to32
                    | OpKind::Immediate8to64
                    | OpKind::Immediate16
                    | OpKind::Immediate32
                    | OpKind::Immediate32to64
                    | OpKind::Immediate64
            )
    }) {
        return None;
    }
    let first = i.op_count() > 0 && i.op0_kind() == OpKind::Memory;
    match i.mnemonic() {
        M::Add | M::Adc | M::Sub | M::Sbb | M::And | M::Or | M::Xor => Some(first),
        M::Mov => Some(first),
        M::Inc | M::Dec | M::Neg | M::Not => Some(true),
        M::Cmp
        | M::Test
        | M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Imul
        | M::Mul
        | M::Div
        | M::Idiv => Some(false),
        M::Bsf | M::Bsr => Some(false),
        M::Shl
        | M::Shr
        | M::Sar
        | M::Sal
        | M::Rol
        | M::Ror
        | M::Rcl
        | M::Rcr
        | M::Shld
        | M::Shrd => Some(true),
        // Both ways round memory is written.
        M::Xchg | M::Xadd | M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b => Some(true),
        // With a register as bit number the operand may be anywhere.
        M::Bt | M::Bts | M::Btr | M::Btc if first && i.op1_kind() == OpKind::Register => None,
        M::Bt => Some(false),
        M::Bts | M::Btr | M::Btc => Some(true),
        M::Seta
        | M::Setae
        | M::Setb
        | M::Setbe
        | M::Sete
        | M::Setg
        | M::Setge
        | M::Setl
        | M::Setle
        | M::Setne
        | M::Setno
        | M::Setnp
        | M::Setns
        | M::Seto
        | M::Setp
        | M::Sets => Some(true),
        M::Cmova
        | M::Cmovae
        | M::Cmovb
        | M::Cmovbe
        | M::Cmove
        | M::Cmovg
        | M::Cmovge
        | M::Cmovl
        | M::Cmovle
        | M::Cmovne
        | M::Cmovno
        | M::Cmovnp
        | M::Cmovns
        | M::Cmovo
        | M::Cmovp
        | M::Cmovs => Some(false),
        M::Bswap | M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo => Some(false),
        M::Clc | M::Stc | M::Cmc | M::Lahf | M::Sahf => Some(false),
        M::Lfence | M::Mfence | M::Sfence => Some(false),
        _ => None,
    }
}
