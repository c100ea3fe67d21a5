//! From iced's decoded instruction to an [`Op`]: picks the handler and lays out its operands.
//!
//! The common integer instructions get specialised handlers here; every other one becomes a [`Rare`], executed natively
//! on the host if [`lodger_native`] can, else by [`crate::rare`].

use iced_x86::{CodeSize, FlowControl, Instruction, Mnemonic, OpKind, Register};
use lodger_native::{Full, Masked, StubCache};

use crate::alu::*;
use crate::cpu::{RIP, ZERO, seg};
use crate::flow::*;
use crate::integer::*;
use crate::op::{Handler, Op, Rare};
use crate::string::{Cmps, Ins, Lods, Movs, Outs, Scas, Stos, StringOp, rep, string};
use crate::word::HIGH_BYTE;

/// Picks the instance of a generic handler for an operand of `$size` bytes.
macro_rules! sized {
    ($size:expr, $f:ident[$($g:tt)*]) => {
        match $size {
            1 => $f::<$($g)* u8> as Handler,
            2 => $f::<$($g)* u16>,
            4 => $f::<$($g)* u32>,
            _ => $f::<$($g)* u64>,
        }
    };
}

/// The same for operands that are never bytes.
macro_rules! sized_word {
    ($size:expr, $f:ident[$($g:tt)*]) => {
        match $size {
            2 => $f::<$($g)* u16> as Handler,
            4 => $f::<$($g)* u32>,
            _ => $f::<$($g)* u64>,
        }
    };
}

/// Picks the instance for condition code `$cc`.
macro_rules! by_condition {
    ($cc:expr, |$n:ident| $handler:expr) => {
        by_condition!(@ $cc, $n, $handler, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $cc:expr, $n:ident, $handler:expr, $($value:literal)*) => {
        match $cc {
            $($value => {
                const $n: u8 = $value;
                $handler
            })*
            _ => unreachable!("a condition code has four bits"),
        }
    };
}

/// Decodes into an [`Op`], and the [`Rare`] that its `imm` points to for the instructions that need one.
///
/// `instruction` must have been decoded with RIP relative to the start of its block.
pub fn decode(i: &Instruction, stubs: &mut StubCache) -> Result<(Op, Option<Box<Rare>>), Full> {
    let mut op = Op {
        run: nop,
        disp: 0,
        imm: 0,
        len: i.len() as u8,
        dst: 0,
        src: 0,
        base: ZERO,
        index: ZERO,
        scale: 0,
        seg: seg::DS,
        address_shift: 0,
    };
    memory_operand(i, &mut op);
    if let Some(handler) = common(i, &mut op) {
        op.run = handler;
        return Ok((op, None));
    }
    let native = if i.is_invalid() {
        None
    } else {
        stubs.prepare(i)?
    };
    let masked = Masked::decode(i);
    let rare = Box::new(Rare {
        instruction: *i,
        native,
        masked,
    });
    op.imm = &raw const *rare as u64;
    op.run = match (&rare.native, &rare.masked) {
        (Some(native), _) => crate::native::handler(native),
        (None, Some(_)) => crate::native::run_masked,
        (None, None) => crate::rare::execute,
    };
    Ok((op, Some(rare)))
}

/// Whether a block ends with this instruction whatever happens.
pub fn ends_block(i: &Instruction) -> bool {
    !matches!(
        i.flow_control(),
        FlowControl::Next | FlowControl::ConditionalBranch | FlowControl::XbeginXabortXend
    )
}

/// The number of a general register as handlers take it.
pub fn reg(register: Register) -> u8 {
    let number = register.full_register().number() as u8;
    let high = matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    );
    if high { number | HIGH_BYTE } else { number }
}

fn address_size(i: &Instruction) -> u64 {
    match (i.memory_base(), i.memory_index()) {
        (Register::None, Register::None) => i.memory_displ_size() as u64,
        (Register::None, index) => index.size() as u64,
        (base, _) => base.size() as u64,
    }
}

/// Lays out the explicit memory operand, if there is one.
fn memory_operand(i: &Instruction, op: &mut Op) {
    if !i.op_kinds().any(|k| k == OpKind::Memory) {
        return;
    }
    let base = i.memory_base();
    op.seg = match i.memory_segment() {
        // 64-bit mode ignores the other prefixes; which of the two it is tells #SS from #GP.
        segment if i.code_size() == CodeSize::Code64 && segment < Register::FS => match base {
            Register::RSP | Register::RBP | Register::ESP | Register::EBP => seg::SS,
            _ => seg::DS,
        },
        segment => segment.number() as u8,
    };
    op.disp = i.memory_displacement64();
    op.address_shift = match address_size(i) {
        2 => 48,
        4 => 32,
        _ => 0,
    };
    op.base = match base {
        Register::None => ZERO,
        Register::RIP | Register::EIP => {
            // iced gives the target; the handlers add the displacement to the next instruction's RIP.
            op.disp = op.disp.wrapping_sub(i.next_ip());
            RIP
        }
        r => r.number() as u8,
    };
    // XLAT's index is AL, which its handler adds.
    let index = i.memory_index();
    if index != Register::None && index != Register::AL && !index.is_vector_register() {
        op.index = index.number() as u8;
        op.scale = i.memory_index_scale().trailing_zeros() as u8;
    }
}

/// What kind of operand it is, as far as the common instructions are concerned.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Reg,
    Mem,
    Imm,
    Other,
}
use Kind::{Imm, Mem, Reg};

fn kind(i: &Instruction, n: u32) -> Kind {
    if n >= i.op_count() {
        return Kind::Other;
    }
    match i.op_kind(n) {
        OpKind::Register if i.op_register(n).is_gpr() => Reg,
        OpKind::Memory => Mem,
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Imm,
        _ => Kind::Other,
    }
}

/// Bytes of operand `n`.
fn size(i: &Instruction, n: u32) -> usize {
    match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size(),
        _ => i.memory_size().size(),
    }
}

/// Picks the specialised handler of a common instruction and fills in its operands.
fn common(i: &Instruction, op: &mut Op) -> Option<Handler> {
    use Mnemonic::*;
    let (k0, k1) = (kind(i, 0), kind(i, 1));
    if k0 == Reg {
        op.dst = reg(i.op0_register());
    }
    if k1 == Reg {
        op.src = reg(i.op1_register());
    }
    for n in 0..i.op_count() {
        if kind(i, n) == Imm {
            op.imm = i.immediate(n);
        }
    }
    match i.mnemonic() {
        Add => alu::<crate::alu::Add>(i, k0, k1),
        Or => alu::<crate::alu::Or>(i, k0, k1),
        Adc => alu::<crate::alu::Adc>(i, k0, k1),
        Sbb => alu::<crate::alu::Sbb>(i, k0, k1),
        And => alu::<crate::alu::And>(i, k0, k1),
        Sub => alu::<crate::alu::Sub>(i, k0, k1),
        Xor => alu::<crate::alu::Xor>(i, k0, k1),
        Cmp => alu::<crate::alu::Cmp>(i, k0, k1),
        Test => alu::<crate::alu::Test>(i, k0, k1),
        Inc => unary::<crate::alu::Inc>(i, k0),
        Dec => unary::<crate::alu::Dec>(i, k0),
        Neg => unary::<crate::alu::Neg>(i, k0),
        Not => unary::<crate::alu::Not>(i, k0),
        Shl | Sal => shift::<crate::alu::Shl>(i, k0, k1),
        Shr => shift::<crate::alu::Shr>(i, k0, k1),
        Sar => shift::<crate::alu::Sar>(i, k0, k1),
        Rol => shift::<crate::alu::Rol>(i, k0, k1),
        Ror => shift::<crate::alu::Ror>(i, k0, k1),
        Rcl => shift::<crate::alu::Rcl>(i, k0, k1),
        Rcr => shift::<crate::alu::Rcr>(i, k0, k1),
        Shld => double_shift::<false>(i, k0),
        Shrd => double_shift::<true>(i, k0),
        Mul => one_operand(i, k0, op, Multiply::<false>),
        Imul if i.op_count() == 1 => one_operand(i, k0, op, Multiply::<true>),
        Imul => imul(i, k1, op),
        Div => one_operand(i, k0, op, Divide::<false>),
        Idiv => one_operand(i, k0, op, Divide::<true>),
        Mov => mov(i, k0, k1),
        Movzx => movx::<false>(i, k1),
        Movsx | Movsxd => movx::<true>(i, k1),
        Lea => Some(sized_word!(size(i, 0), lea[])),
        Xchg => match (k0, k1) {
            (Reg, Reg) => Some(sized!(size(i, 0), xchg_rr[])),
            (Mem, Reg) => Some(sized!(size(i, 1), xchg_mr[])),
            (Reg, Mem) => {
                op.src = op.dst;
                Some(sized!(size(i, 0), xchg_mr[]))
            }
            _ => None,
        },
        Xadd => match (k0, i.has_lock_prefix()) {
            (Reg, _) => Some(sized!(size(i, 1), xadd_rr[])),
            (_, true) => Some(sized!(size(i, 1), xadd_mr[true,])),
            _ => Some(sized!(size(i, 1), xadd_mr[false,])),
        },
        Cmpxchg => match (k0, i.has_lock_prefix()) {
            (Reg, _) => Some(sized!(size(i, 1), cmpxchg_rr[])),
            (_, true) => Some(sized!(size(i, 1), cmpxchg_mr[true,])),
            _ => Some(sized!(size(i, 1), cmpxchg_mr[false,])),
        },
        Bswap if size(i, 0) == 4 => Some(bswap::<u32>),
        Bswap if size(i, 0) == 8 => Some(bswap::<u64>),
        Bt => bits::<crate::alu::Bt>(i, k0, k1),
        Bts => bits::<crate::alu::Bts>(i, k0, k1),
        Btr => bits::<crate::alu::Btr>(i, k0, k1),
        Btc => bits::<crate::alu::Btc>(i, k0, k1),
        Bsf => Some(match k1 {
            Mem => sized_word!(size(i, 0), bit_scan[false, true,]),
            _ => sized_word!(size(i, 0), bit_scan[false, false,]),
        }),
        Bsr => Some(match k1 {
            Mem => sized_word!(size(i, 0), bit_scan[true, true,]),
            _ => sized_word!(size(i, 0), bit_scan[true, false,]),
        }),
        Cbw => Some(extend_accumulator::<u8, u16>),
        Cwde => Some(extend_accumulator::<u16, u32>),
        Cdqe => Some(extend_accumulator::<u32, u64>),
        Cwd => Some(sign_into_rdx::<u16>),
        Cdq => Some(sign_into_rdx::<u32>),
        Cqo => Some(sign_into_rdx::<u64>),
        Clc => flag(op, 1, 0),
        Stc => flag(op, 1, 1),
        Cld => flag(op, 0x400, 0),
        Std => flag(op, 0x400, 1),
        Mnemonic::Cmc => Some(cmc),
        Mnemonic::Lahf => Some(lahf),
        Mnemonic::Sahf => Some(sahf),
        Pause => Some(pause),
        Mnemonic::Nop | Endbr64 | Endbr32 => Some(nop),
        Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchw | Prefetch | Reservednop => {
            Some(nop)
        }
        Push | Pop => push_pop(i, k0, op),
        Mnemonic::Leave => Some(match i.code() {
            iced_x86::Code::Leavew => leave::<u16>,
            iced_x86::Code::Leaved => leave::<u32>,
            _ => leave::<u64>,
        }),
        Xlatb => Some(xlat),
        Mnemonic::Jmp | Mnemonic::Call | Mnemonic::Ret => transfer(i, k0, op),
        Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz => counted(i, op),
        Movsb | Movsw | Movsd | Movsq if i.is_string_instruction() => strings::<Movs>(i, op),
        Stosb | Stosw | Stosd | Stosq => strings::<Stos>(i, op),
        Lodsb | Lodsw | Lodsd | Lodsq => strings::<Lods>(i, op),
        Scasb | Scasw | Scasd | Scasq => strings::<Scas>(i, op),
        Cmpsb | Cmpsw | Cmpsd | Cmpsq if i.is_string_instruction() => strings::<Cmps>(i, op),
        Insb | Insw | Insd => strings::<Ins>(i, op),
        Outsb | Outsw | Outsd => strings::<Outs>(i, op),
        _ => conditional(i, k0, k1, op),
    }
}

fn alu<O: Binary>(i: &Instruction, k0: Kind, k1: Kind) -> Option<Handler> {
    Some(match (k0, k1, i.has_lock_prefix()) {
        (Reg, Reg, _) => sized!(size(i, 0), alu_rr[O,]),
        (Reg, Imm, _) => sized!(size(i, 0), alu_ri[O,]),
        (Reg, Mem, _) => sized!(size(i, 0), alu_rm[O,]),
        (Mem, Reg, false) => sized!(size(i, 1), alu_mr[O,]),
        (Mem, Imm, false) => sized!(size(i, 0), alu_mi[O,]),
        (Mem, Reg, true) => sized!(size(i, 1), alu_mr_lock[O,]),
        (Mem, Imm, true) => sized!(size(i, 0), alu_mi_lock[O,]),
        _ => return None,
    })
}

fn unary<O: Unary>(i: &Instruction, k0: Kind) -> Option<Handler> {
    Some(match (k0, i.has_lock_prefix()) {
        (Reg, _) => sized!(size(i, 0), unary_r[O,]),
        (Mem, false) => sized!(size(i, 0), unary_m[O,]),
        (Mem, true) => sized!(size(i, 0), unary_m_lock[O,]),
        _ => return None,
    })
}

fn shift<O: Shift>(i: &Instruction, k0: Kind, k1: Kind) -> Option<Handler> {
    Some(match (k0, k1) {
        (Reg, Imm) => sized!(size(i, 0), shift_ri[O,]),
        (Reg, _) => sized!(size(i, 0), shift_rc[O,]),
        (Mem, Imm) => sized!(size(i, 0), shift_mi[O,]),
        (Mem, _) => sized!(size(i, 0), shift_mc[O,]),
        _ => return None,
    })
}

fn double_shift<const RIGHT: bool>(i: &Instruction, k0: Kind) -> Option<Handler> {
    Some(match (k0, kind(i, 2)) {
        (Reg, Imm) => sized_word!(size(i, 1), double_shift_r[RIGHT, false,]),
        (Reg, _) => sized_word!(size(i, 1), double_shift_r[RIGHT, true,]),
        (_, Imm) => sized_word!(size(i, 1), double_shift_m[RIGHT, false,]),
        _ => sized_word!(size(i, 1), double_shift_m[RIGHT, true,]),
    })
}

/// MUL, IMUL, DIV, IDIV with one explicit operand.
trait OneOperand {
    fn register(size: usize) -> Handler;
    fn memory(size: usize) -> Handler;
}

struct Multiply<const SIGNED: bool>;
impl<const SIGNED: bool> OneOperand for Multiply<SIGNED> {
    fn register(size: usize) -> Handler {
        sized!(size, mul[SIGNED, false,])
    }
    fn memory(size: usize) -> Handler {
        sized!(size, mul[SIGNED, true,])
    }
}

struct Divide<const SIGNED: bool>;
impl<const SIGNED: bool> OneOperand for Divide<SIGNED> {
    fn register(size: usize) -> Handler {
        sized!(size, div[SIGNED, false,])
    }
    fn memory(size: usize) -> Handler {
        sized!(size, div[SIGNED, true,])
    }
}

fn one_operand<O: OneOperand>(i: &Instruction, k0: Kind, op: &mut Op, _: O) -> Option<Handler> {
    op.src = op.dst;
    match k0 {
        Reg => Some(O::register(size(i, 0))),
        Mem => Some(O::memory(size(i, 0))),
        _ => None,
    }
}

fn imul(i: &Instruction, k1: Kind, _: &mut Op) -> Option<Handler> {
    Some(match (i.op_count(), k1) {
        (2, Reg) => sized_word!(size(i, 0), imul2[false,]),
        (2, Mem) => sized_word!(size(i, 0), imul2[true,]),
        (3, Reg) => sized_word!(size(i, 0), imul3[false,]),
        (3, Mem) => sized_word!(size(i, 0), imul3[true,]),
        _ => return None,
    })
}

fn mov(i: &Instruction, k0: Kind, k1: Kind) -> Option<Handler> {
    Some(match (k0, k1) {
        (Reg, Reg) => sized!(size(i, 0), mov_rr[]),
        (Reg, Imm) => sized!(size(i, 0), mov_ri[]),
        (Reg, Mem) => sized!(size(i, 0), mov_rm[]),
        (Mem, Reg) => sized!(size(i, 1), mov_mr[]),
        (Mem, Imm) => sized!(size(i, 0), mov_mi[]),
        _ => return None,
    })
}

fn movx<const SIGNED: bool>(i: &Instruction, k1: Kind) -> Option<Handler> {
    Some(match (size(i, 1), k1) {
        (1, Reg) => sized_word!(size(i, 0), extend[SIGNED, false, u8,]),
        (1, Mem) => sized_word!(size(i, 0), extend[SIGNED, true, u8,]),
        (2, Reg) => sized_word!(size(i, 0), extend[SIGNED, false, u16,]),
        (2, Mem) => sized_word!(size(i, 0), extend[SIGNED, true, u16,]),
        (4, Reg) => sized_word!(size(i, 0), extend[SIGNED, false, u32,]),
        (4, Mem) => sized_word!(size(i, 0), extend[SIGNED, true, u32,]),
        _ => return None,
    })
}

fn bits<O: BitOp>(i: &Instruction, k0: Kind, k1: Kind) -> Option<Handler> {
    macro_rules! memory {
        ($f:ident, $size:expr) => {
            match ($size, i.has_lock_prefix()) {
                (2, false) => $f::<O, u16, false> as Handler,
                (4, false) => $f::<O, u32, false>,
                (_, false) => $f::<O, u64, false>,
                (2, true) => $f::<O, u16, true>,
                (4, true) => $f::<O, u32, true>,
                (_, true) => $f::<O, u64, true>,
            }
        };
    }
    Some(match (k0, k1) {
        (Reg, Reg) => sized_word!(size(i, 0), bit_rr[O,]),
        (Reg, Imm) => sized_word!(size(i, 0), bit_ri[O,]),
        (Mem, Reg) => memory!(bit_mr, size(i, 1)),
        (Mem, Imm) => memory!(bit_mi, size(i, 0)),
        _ => return None,
    })
}

fn flag(op: &mut Op, mask: u64, value: u8) -> Option<Handler> {
    (op.imm, op.src) = (mask, value);
    Some(set_flag)
}

fn push_pop(i: &Instruction, k0: Kind, op: &mut Op) -> Option<Handler> {
    let bytes = i.stack_pointer_increment().unsigned_abs();
    let push = i.mnemonic() == Mnemonic::Push;
    op.src = op.dst;
    Some(match (k0, push) {
        (Reg, true) => sized_word!(bytes, push_r[]),
        (Mem, true) => sized_word!(bytes, push_m[]),
        (Imm, true) => sized_word!(bytes, push_i[]),
        (Reg, false) => sized_word!(bytes, pop_r[]),
        (Mem, false) => sized_word!(bytes, pop_m[]),
        _ => return None, // segment registers
    })
}

/// Near JMP, CALL, RET.
fn transfer(i: &Instruction, k0: Kind, op: &mut Op) -> Option<Handler> {
    use iced_x86::Code::*;
    op.src = op.dst;
    let distance = |op: &mut Op| op.imm = i.near_branch_target().wrapping_sub(i.next_ip());
    let call = i.mnemonic() == Mnemonic::Call;
    if i.mnemonic() == Mnemonic::Ret {
        return Some(match i.code() {
            Retnw | Retnw_imm16 => ret::<u16>,
            Retnd | Retnd_imm16 => ret::<u32>,
            _ => ret::<u64>,
        });
    }
    if i.op0_kind() == OpKind::FarBranch16 || i.op0_kind() == OpKind::FarBranch32 {
        return None;
    }
    if i.is_jmp_far_indirect() || i.is_call_far_indirect() {
        return None;
    }
    Some(match (i.op0_kind(), k0, call) {
        (OpKind::NearBranch16, _, _) => {
            distance(op);
            if call {
                crate::flow::call::<u16>
            } else {
                jmp::<u16>
            }
        }
        (OpKind::NearBranch32, _, _) => {
            distance(op);
            if call {
                crate::flow::call::<u32>
            } else {
                jmp::<u32>
            }
        }
        (OpKind::NearBranch64, _, _) => {
            distance(op);
            if call {
                crate::flow::call::<u64>
            } else {
                jmp::<u64>
            }
        }
        (_, Reg, false) => sized_word!(size(i, 0), jmp_r[]),
        (_, Reg, true) => sized_word!(size(i, 0), call_r[]),
        (_, Mem, false) => sized_word!(size(i, 0), jmp_m[]),
        (_, Mem, true) => sized_word!(size(i, 0), call_m[]),
        _ => return None,
    })
}

/// LOOPcc and JrCXZ.
fn counted(i: &Instruction, op: &mut Op) -> Option<Handler> {
    use iced_x86::Code::*;
    op.imm = i.near_branch_target().wrapping_sub(i.next_ip());
    let operand = match i.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        _ => 8,
    };
    let counter = match i.code() {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX
        | Loopne_rel8_16_CX | Loopne_rel8_32_CX | Jcxz_rel8_16 | Jcxz_rel8_32 => 2,
        Loop_rel8_64_RCX | Loop_rel8_16_RCX | Loope_rel8_64_RCX | Loope_rel8_16_RCX
        | Loopne_rel8_64_RCX | Loopne_rel8_16_RCX | Jrcxz_rel8_64 | Jrcxz_rel8_16 => 8,
        _ => 4,
    };
    macro_rules! pick {
        ($kind:literal) => {
            match (operand, counter) {
                (2, 2) => loop_::<$kind, u16, u16> as Handler,
                (2, 4) => loop_::<$kind, u16, u32>,
                (2, _) => loop_::<$kind, u16, u64>,
                (4, 2) => loop_::<$kind, u32, u16>,
                (4, _) => loop_::<$kind, u32, u32>,
                (_, 4) => loop_::<$kind, u64, u32>,
                _ => loop_::<$kind, u64, u64>,
            }
        };
    }
    Some(match i.mnemonic() {
        Mnemonic::Loop => pick!(0),
        Mnemonic::Loope => pick!(1),
        Mnemonic::Loopne => pick!(2),
        _ => pick!(3),
    })
}

fn strings<K: StringOp>(i: &Instruction, op: &mut Op) -> Option<Handler> {
    op.dst = if i.has_repne_prefix() {
        rep::NE
    } else if i.has_rep_prefix() {
        rep::E
    } else {
        rep::NONE
    };
    let mut kinds = i.op_kinds();
    op.address_shift = if kinds.any(|k| {
        matches!(
            k,
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI
        )
    }) {
        48
    } else if i.op_kinds().any(|k| {
        matches!(
            k,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI
        )
    }) {
        32
    } else {
        0
    };
    op.seg = match i.memory_segment() {
        Register::None => seg::DS,
        s => s.number() as u8,
    };
    Some(match i.memory_size().size() {
        1 => string::<K, u8>,
        2 => string::<K, u16>,
        4 => string::<K, u32>,
        _ => string::<K, u64>,
    })
}

/// Jcc, SETcc, CMOVcc.
fn conditional(i: &Instruction, k0: Kind, k1: Kind, op: &mut Op) -> Option<Handler> {
    let code = i.condition_code();
    if code == iced_x86::ConditionCode::None {
        return None;
    }
    // iced counts from O = 1 in encoding order.
    let cc = code as u8 - 1;
    if i.is_jcc_short_or_near() {
        op.imm = i.near_branch_target().wrapping_sub(i.next_ip());
        return Some(by_condition!(cc, |CC| match i.op0_kind() {
            OpKind::NearBranch16 => jcc::<CC, u16> as Handler,
            OpKind::NearBranch32 => jcc::<CC, u32>,
            _ => jcc::<CC, u64>,
        }));
    }
    if i.op_count() == 1 {
        return Some(by_condition!(cc, |CC| match k0 {
            Mem => setcc_m::<CC> as Handler,
            _ => setcc_r::<CC>,
        }));
    }
    if i.op_count() == 2 && k0 == Reg {
        return Some(by_condition!(cc, |CC| match k1 {
            Mem => sized_word!(size(i, 0), cmov[CC, true,]),
            _ => sized_word!(size(i, 0), cmov[CC, false,]),
        }));
    }
    None
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, ConditionCode};

    #[test]
    fn iced_counts_condition_codes_in_encoding_order() {
        for (code, condition, cc) in [
            (Code::Jo_rel8_64, ConditionCode::o, 0),
            (Code::Jb_rel8_64, ConditionCode::b, 2),
            (Code::Jle_rel8_64, ConditionCode::le, 14),
            (Code::Jg_rel8_64, ConditionCode::g, 15),
        ] {
            assert_eq!(code.condition_code(), condition);
            assert_eq!(condition as u8 - 1, cc);
        }
    }
}
