//! Random instructions that may run in user mode, with registers set beforehand so that their memory operands mostly hit
//! the data pages.
//!
//! An instruction begins as random bytes; what iced decodes, is in a known instruction set and shows nothing of the host is kept.

use iced_x86::{
    Code, ConstantOffsets, CpuidFeature, Decoder, DecoderOptions, EncodingKind, FlowControl,
    Instruction, Mnemonic, OpKind, Register,
};

use crate::machine::{DATA, Mode, STACK_OFFSET};

#[path = "nest.rs"]
mod nest;

pub use nest::Nest;

/// A small deterministic generator (SplitMix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// With a probability of one in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A value whose bits are interesting more often than those of a uniform one.
    pub fn value(&mut self) -> u64 {
        let v = self.next();
        match self.below(8) {
            0 => v & 0xf,
            1 => (v as i8) as u64,
            2 => 1 << (v & 63),
            3 => (1 << (v & 63)) - 1,
            4 => self.pick(&[
                0,
                1,
                0x80,
                0x8000,
                0x8000_0000,
                1 << 63,
                u64::MAX,
                0x7f,
                0x7fff,
                0x7fff_ffff,
                !(1 << 63),
            ]),
            _ => v,
        }
    }
}

/// An instruction of a program, with the loads of registers that it needs before it.
#[derive(Debug, Clone)]
pub struct Piece {
    /// Machine code.
    pub bytes: Vec<u8>,
    /// Where in `bytes` 32-bit RIP-relative displacements are, and the linear addresses that they must lead to, but for the bytes
    /// of the instruction behind them.
    pub rip_relative: Vec<(usize, u64)>,
    /// A relative branch over the next piece: its displacement is the last byte.
    pub skips_next: bool,
    /// What it was made from, if it has pieces inside.
    pub nest: Option<Box<Nest>>,
}

/// What pieces have to regard.
#[derive(Debug, Clone)]
pub struct Context {
    pub mode: Mode,
    /// There are pieces with others inside.
    pub nests: bool,
    /// Memory operands are where they do not fault.
    pub calm: bool,
    /// The piece is in a function, whose stack must not be overwritten.
    pub in_call: bool,
    /// Bits of general registers that must not be written.
    pub kept: u32,
    /// How many pieces are around.
    pub depth: u32,
}

impl Piece {
    pub fn plain(bytes: Vec<u8>) -> Piece {
        Piece {
            bytes,
            rip_relative: Vec::new(),
            skips_next: false,
            nest: None,
        }
    }
}

/// A random piece of code.
pub fn piece(rng: &mut Rng, context: &Context) -> Piece {
    if context.nests
        && rng.one_in(5)
        && let Some(piece) = nest::nest(rng, context)
    {
        return piece;
    }
    loop {
        if let Some(piece) = simple(rng, context)
            && (context.kept == 0 || piece.keeps(context.kept))
        {
            return piece;
        }
    }
}

/// One without others inside.
fn simple(rng: &mut Rng, context: &Context) -> Option<Piece> {
    let mode = context.mode;
    if rng.one_in(24) {
        return Some(branch(rng, mode));
    }
    if rng.one_in(40) {
        return Some(pop_flags(rng, mode));
    }
    let bytes = match context.nests && rng.one_in(3) {
        true => frequent_bytes(rng),
        false => random_bytes(rng, mode),
    };
    complete(rng, context, bytes)
}

/// A forward branch over the next piece, or a call to what follows and its return.
fn branch(rng: &mut Rng, mode: Mode) -> Piece {
    let opcode = match rng.below(8) {
        0 => 0xeb,
        n @ 1..=4 => 0xe0 + n as u8 - 1,
        _ => 0x70 | rng.below(16) as u8,
    };
    let mut bytes = Vec::new();
    if (0xe0..0xe8).contains(&opcode) && rng.one_in(2) {
        // LOOP and JCXZ with the other counter.
        bytes.extend(load(mode, 1, rng.below(3)));
        bytes.push(0x67);
    }
    bytes.extend([opcode, 0]);
    Piece {
        skips_next: true,
        ..Piece::plain(bytes)
    }
}

/// A POPF of flags that do not get in the way: no TF, AC, NT.
fn pop_flags(rng: &mut Rng, mode: Mode) -> Piece {
    let flags = (rng.next() as u32 & 0x0020_8ed7 & !0x8000) as i32;
    let mut bytes = Vec::new();
    if mode.bitness() == 16 {
        bytes.push(0x66);
    }
    bytes.push(0x68);
    bytes.extend(flags.to_le_bytes());
    if mode.bitness() == 16 {
        bytes.push(0x66);
    }
    bytes.push(0x9d);
    Piece::plain(bytes)
}

/// Prefixes, an opcode and what may follow it.
fn random_bytes(rng: &mut Rng, mode: Mode) -> Vec<u8> {
    let mut bytes = Vec::new();
    if rng.one_in(24) {
        bytes.push(0xf0);
    }
    if rng.one_in(10) {
        bytes.push(0x67);
    }
    if rng.one_in(16) {
        bytes.push(rng.pick(&[0x26, 0x36, 0x3e, 0x65]));
    }
    if rng.one_in(5) {
        bytes.push(0x66);
    }
    if rng.one_in(5) {
        bytes.push(rng.pick(&[0xf2, 0xf3]));
    }
    let kind = rng.below(100);
    if kind < 88 && mode.bitness() == 64 && rng.one_in(2) {
        bytes.push(0x40 | rng.below(16) as u8);
    }
    match kind {
        // The integer instructions and x87.
        0..50 => {}
        50..78 => bytes.push(0x0f),
        78..84 => bytes.extend([0x0f, 0x38]),
        84..88 => bytes.extend([0x0f, 0x3a]),
        _ => {
            // VEX, with its prefix bytes random; many instructions want all ones for the register in it.
            let unused = if rng.one_in(2) { 0x78 } else { 0 };
            let fields = rng.next() as u8;
            let low = match mode.bitness() {
                64 => fields,
                _ => fields | 0xc0,
            };
            if rng.one_in(2) {
                bytes.extend([0xc5, low | unused]);
            } else {
                let map = rng.pick(&[1, 2, 2, 3]);
                bytes.extend([0xc4, low & 0xe0 | map, rng.next() as u8 | unused]);
            }
        }
    }
    for _ in 0..16 {
        bytes.push(rng.next() as u8);
    }
    bytes
}

/// Opcodes with a ModR/M byte that programs are mostly made of: of one byte, and behind 0f.
const FREQUENT: &[u8] = &[
    0x00, 0x01, 0x02, 0x03, 0x09, 0x0b, 0x10, 0x11, 0x13, 0x19, 0x1b, 0x21, 0x23, 0x29, 0x2b, 0x31,
    0x33, 0x38, 0x39, 0x3a, 0x3b, 0x63, 0x69, 0x6b, 0x80, 0x81, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88,
    0x89, 0x8a, 0x8b, 0x8d, 0x8f, 0xc0, 0xc1, 0xc6, 0xc7, 0xd0, 0xd1, 0xd3, 0xf6, 0xf7, 0xfe, 0xff,
];
const FREQUENT_0F: &[u8] = &[
    0x10, 0x11, 0x28, 0x29, 0x40, 0x42, 0x44, 0x45, 0x48, 0x4c, 0x4f, 0x58, 0x59, 0x6f, 0x7f, 0x90,
    0x92, 0x94, 0x95, 0x98, 0x9c, 0x9f, 0xa3, 0xa4, 0xa5, 0xab, 0xac, 0xaf, 0xb0, 0xb1, 0xb3, 0xb6,
    0xb7, 0xb8, 0xba, 0xbb, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc7, 0xd6, 0xef,
];

/// What 64-bit programs have most, with R10, R11, the stack and locks more often than they have.
fn frequent_bytes(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::new();
    if rng.one_in(8) {
        bytes.push(0xf0);
    }
    if rng.one_in(8) {
        bytes.push(0x66);
    }
    if rng.one_in(12) {
        bytes.push(rng.pick(&[0xf2, 0xf3]));
    }
    if !rng.one_in(4) {
        bytes.push(0x40 | rng.below(16) as u8);
    }
    if rng.one_in(8) {
        // PUSH and POP.
        bytes.push(0x50 | rng.below(16) as u8);
        return bytes;
    }
    if rng.one_in(3) {
        bytes.extend([0x0f, rng.pick(FREQUENT_0F)]);
    } else {
        bytes.push(rng.pick(FREQUENT));
    }
    let mut number = || match rng.below(3) {
        0 => rng.pick(&[2, 3]),
        _ => rng.below(8) as u8,
    };
    let (register, other) = (number(), number());
    let kind = rng.below(4) as u8;
    match kind {
        0 => bytes.push(0xc0 | register << 3 | other),
        // [RSP+...]
        1 => bytes.extend([0x44 | register << 3, 0x24]),
        _ => bytes.push((rng.below(3) as u8) << 6 | register << 3 | other),
    }
    for _ in 0..12 {
        bytes.push(rng.next() as u8);
    }
    bytes
}

/// Keeps bytes that are one permitted instruction, and aims its memory operands.
fn complete(rng: &mut Rng, context: &Context, mut bytes: Vec<u8>) -> Option<Piece> {
    let mode = context.mode;
    bytes.truncate(15);
    let mut decoder = Decoder::with_ip(mode.bitness(), &bytes, 0, DecoderOptions::NONE);
    let i = decoder.decode();
    if i.is_invalid() || !permitted(&i, mode) {
        return None;
    }
    let offsets = decoder.get_constant_offsets(&i);
    bytes.truncate(i.len());
    let mut piece = Piece::plain(Vec::new());
    let mut loads: Vec<(u8, u64)> = Vec::new();
    aim(
        rng, context, &i, &offsets, &mut bytes, &mut loads, &mut piece,
    )?;
    temper(rng, &i, &mut loads);
    for (register, value) in loads {
        piece.bytes.extend(load(mode, register, value));
    }
    let before = piece.bytes.len();
    (piece.rip_relative.iter_mut()).for_each(|(at, _)| *at += before);
    piece.bytes.extend(bytes);
    if leaves_overflow_undefined(&i) {
        // TEST AL, AL: nothing depends on the flag.
        piece.bytes.extend([0x84, 0xc0]);
    }
    Some(piece)
}

/// Loads a register with all its bits.
fn load(mode: Mode, register: u8, value: u64) -> Vec<u8> {
    match mode.bitness() {
        64 => {
            let mut bytes = vec![0x48 | register >> 3, 0xb8 | register & 7];
            bytes.extend(value.to_le_bytes());
            bytes
        }
        bits => {
            let mut bytes = if bits == 16 { vec![0x66] } else { vec![] };
            bytes.push(0xb8 | register & 7);
            bytes.extend((value as u32).to_le_bytes());
            bytes
        }
    }
}

/// What the interpreter has beyond the 386, for user programs.
fn known(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL8086_ONLY
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CX8
            | F::CMPXCHG16B
            | F::MULTIBYTENOP
            | F::PAUSE
    ) || lodger_native::supported(feature)
}

/// Rotations by more than one bit: the flag differs between the forms of one instruction.
fn leaves_overflow_undefined(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(i.mnemonic(), M::Rol | M::Ror | M::Rcl | M::Rcr)
}

fn permitted(i: &Instruction, mode: Mode) -> bool {
    use Mnemonic as M;
    let code = i.code();
    let encoding = matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    if !encoding || !code.cpuid_features().iter().all(|f| known(*f)) {
        return false;
    }
    // A masked store that is masked off may fault, and 16-bit offsets of flat segments always do.
    if i.op0_kind() == OpKind::MemorySegDI && mode.bitness() == 32 {
        return false;
    }
    // Strings and masked stores are aimed without a look at the base of GS.
    let implicit = i.is_string_instruction()
        || matches!(i.op0_kind(), OpKind::MemorySegEDI | OpKind::MemorySegRDI);
    if implicit && mode.bitness() == 64 && i.memory_segment() == Register::GS {
        return false;
    }
    if i.is_privileged() || i.flow_control() != FlowControl::Next {
        return false;
    }
    // FS is the host's thread pointer; CS would read the code, whose end is not the same.
    let fs_or_cs =
        i.has_segment_prefix() && matches!(i.segment_prefix(), Register::FS | Register::CS);
    if fs_or_cs && mode.bitness() != 64 || i.memory_segment() == Register::FS {
        return false;
    }
    let segments = (0..i.op_count())
        .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register());
    let denied = matches!(
        i.mnemonic(),
        M::Cpuid
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdrand
            | M::Rdseed
            | M::Rdpid
            | M::Rdpmc
            | M::Xgetbv
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Lds
            | M::Les
            | M::Lfs
            | M::Lgs
            | M::Lss
            | M::In
            | M::Out
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd
            | M::Popf
            | M::Popfd
            | M::Popfq
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fnsave
            | M::Fnstenv
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Salc
    );
    // The host looks for pending x87 exceptions only with an MMX register.
    let unclear = code == Code::Cvtpi2ps_xmm_mmm64 && i.op1_kind() == OpKind::Memory;
    !segments && !denied && !unclear
}

/// A place in or around the data pages, relative to their start.
fn target(rng: &mut Rng, calm: bool) -> u64 {
    let offset = match rng.below(if calm { 25 } else { 32 }) {
        0..20 => rng.below(0x1f00),
        20..25 => 0x1000_u64.wrapping_sub(rng.below(40)),
        25..28 => 0x2000_u64.wrapping_sub(rng.below(40)),
        28 => 0x2000 + rng.below(0xf00),
        29 => 0x3000_u64.wrapping_sub(rng.below(40)),
        30 => 0x1_0000_u64.wrapping_sub(rng.below(40)),
        _ => 0_u64.wrapping_sub(rng.below(8)),
    };
    let align = rng.pick(&[1, 1, 4, 16, 32]);
    offset & !(align - 1)
}

fn bits_mask(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

/// Chooses registers or displacements so that memory operands lead to a [`target`]. `None`: it cannot be done.
fn aim(
    rng: &mut Rng,
    context: &Context,
    i: &Instruction,
    offsets: &ConstantOffsets,
    bytes: &mut [u8],
    loads: &mut Vec<(u8, u64)>,
    piece: &mut Piece,
) -> Option<()> {
    // What processors do in several accesses, of which some may be done when another one faults, or which may fault though
    // they are masked off.
    let parts = matches!(
        i.mnemonic(),
        Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu
    ) || matches!(
        i.mnemonic(),
        Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq
    ) || i.op_kinds().any(|k| k == OpKind::Memory)
        && !i.memory_size().size().is_power_of_two();
    let mode = context.mode;
    let target = |rng: &mut Rng| {
        let offset = match parts {
            true => rng.below(0x1f) << 7,
            false => target(rng, context.calm),
        };
        match context.in_call && NEAR_STACK.contains(&offset) {
            true => offset - 0x800,
            false => offset,
        }
    };
    let segment_base = DATA - if mode.bitness() == 16 { DATA } else { 0 };
    // The bits of a register above the address size are random.
    let upper = |rng: &mut Rng, value: u64, bits: u32| {
        let mask = bits_mask(bits);
        value & mask | rng.next() & !mask
    };
    let string_bits = |i: &Instruction| {
        i.op_kinds().find_map(|k| match k {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(16),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(32),
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(64),
            _ => None,
        })
    };
    if let Some(bits) = string_bits(i) {
        for register in [6, 7] {
            let at = segment_base.wrapping_add(target(rng));
            loads.push((register, upper(rng, at, bits)));
        }
        if i.has_rep_prefix() || i.has_repne_prefix() {
            let count = rng.below(20);
            loads.push((1, upper(rng, count, bits)));
        }
        return Some(());
    }
    match i.mnemonic() {
        Mnemonic::Enter | Mnemonic::Leave => {
            loads.push((5, segment_base.wrapping_add(target(rng))));
            return Some(());
        }
        _ => {}
    }
    if !i.op_kinds().any(|k| k == OpKind::Memory) {
        return Some(());
    }
    let gs_base = if mode.bitness() == 64 && i.memory_segment() == Register::GS {
        GS_BASE
    } else {
        0
    };
    let at = segment_base.wrapping_add(target(rng)).wrapping_sub(gs_base);
    let (base, index) = (i.memory_base(), i.memory_index());
    let number = |r: Register| r.full_register().number() as u8;
    let scale = u64::from(i.memory_index_scale());
    let mut patch = |value: u64| -> Option<()> {
        let (from, len) = (offsets.displacement_offset(), offsets.displacement_size());
        if len < 2 {
            return None;
        }
        bytes[from..from + len].copy_from_slice(&value.to_le_bytes()[..len]);
        Some(())
    };
    if base.is_ip() {
        piece.rip_relative = vec![(offsets.displacement_offset(), at)];
        return Some(());
    }
    let (base_bits, index_bits) = (base.size() as u32 * 8, index.size() as u32 * 8);
    let displacement = i.memory_displacement64();
    if i.mnemonic() == Mnemonic::Xlatb {
        loads.push((3, upper(rng, at, base_bits)));
        return Some(());
    }
    if base == Register::RSP && index == Register::None && rng.one_in(2) {
        // The stack as it is, but no return address.
        let far = matches!(
            i.mnemonic(),
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
        );
        let near = match context.in_call {
            true => -0x28 - rng.below(0x50) as i8,
            false => rng.next() as i8,
        };
        let (from, len) = (offsets.displacement_offset(), offsets.displacement_size());
        match len {
            _ if context.in_call && far => {}
            1 => {
                bytes[from] = near as u8;
                return Some(());
            }
            0 if !context.in_call => return Some(()),
            0 => {}
            _ => return patch(near as u64),
        }
    }
    match (base, index) {
        (Register::None, Register::None) => patch(at),
        (_, _) if index.is_vector_register() => {
            if base != Register::None {
                loads.push((
                    number(base),
                    upper(rng, at.wrapping_sub(displacement), base_bits),
                ));
            }
            Some(())
        }
        (base, Register::None) => {
            loads.push((
                number(base),
                upper(rng, at.wrapping_sub(displacement), base_bits),
            ));
            Some(())
        }
        (Register::None, index) => {
            let small = rng.below(64).wrapping_sub(32);
            loads.push((number(index), upper(rng, small, index_bits)));
            patch(at.wrapping_sub(small.wrapping_mul(scale)))
        }
        (base, index) if base == index => {
            let distance = at.wrapping_sub(displacement) & bits_mask(base_bits);
            loads.push((number(base), upper(rng, distance / (scale + 1), base_bits)));
            Some(())
        }
        (base, index) => {
            let small = rng.below(64).wrapping_sub(32);
            loads.push((number(index), upper(rng, small, index_bits)));
            let rest = at
                .wrapping_sub(displacement)
                .wrapping_sub(small.wrapping_mul(scale));
            loads.push((number(base), upper(rng, rest, base_bits)));
            Some(())
        }
    }
}

/// Offsets in the data pages around a function's stack: what strings and bit offsets reach included.
const NEAR_STACK: std::ops::Range<u64> = STACK_OFFSET - 0x200..STACK_OFFSET + 0x200;

/// The base of GS in 64-bit mode.
pub const GS_BASE: u64 = 0x7123;

/// Makes operands so that something happens: divisions that succeed, bit offsets near the operand.
fn temper(rng: &mut Rng, i: &Instruction, loads: &mut Vec<(u8, u64)>) {
    let mut set = |register: u8, value: u64| {
        if loads.iter().all(|(r, _)| *r != register) {
            loads.push((register, value));
        }
    };
    match i.mnemonic() {
        Mnemonic::Div | Mnemonic::Idiv if !rng.one_in(4) => {
            let (high, low) = match rng.below(3) {
                0 => (0, rng.value()),
                1 => (u64::MAX, rng.value() | 1 << 63),
                _ => (rng.below(5), rng.value()),
            };
            set(2, high);
            set(0, if rng.one_in(2) { low } else { low & 0xfff });
        }
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
            if i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register =>
        {
            let register = i.op1_register().full_register().number() as u8;
            set(register, rng.below(4096).wrapping_sub(2048));
        }
        _ => {}
    }
}
