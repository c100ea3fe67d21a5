//! Which instructions run natively, and what each form of them needs: registers, memory, flags, MXCSR, x87 state.
//!
//! Registers and accesses come from iced-x86's tables. What they do not tell is here: which instructions use MXCSR, which
//! operands must be aligned (SDM volume 2, section 2.4, exception types), which x87 instructions do not wait.

use crate::state::offset;
use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, InstructionInfoOptions,
    Mnemonic, OpAccess, OpCodeOperandKind, OpKind, Register, RflagsBits,
};
use std::arch::is_x86_feature_detected as detected;

/// The group an instruction belongs to when the guest's control registers decide whether it may execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// General-purpose registers only: no check (BMI, ADX, MOVBE, CRC32, POPCNT, MOVNTI, prefetches).
    Gpr,
    /// Legacy-encoded with XMM registers: CR0.EM, CR0.TS, CR4.OSFXSR.
    Sse,
    /// VEX-encoded with vector registers: CR4.OSXSAVE, XCR0.SSE and AVX, CR0.TS.
    Avx,
    /// x87: CR0.EM and CR0.TS (FWAIT: MP and TS together).
    X87,
    /// MMX registers only: CR0.EM (which gives #UD here), CR0.TS.
    Mmx,
}

/// The memory operand, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemUse {
    /// No memory is accessed.
    None,
    /// So many bytes are read.
    Read(u8),
    /// So many bytes are written.
    Write(u8),
}

impl MemUse {
    /// Bytes to put into the staging area first; 0 if the operand is not read.
    #[inline]
    pub fn read(self) -> usize {
        match self {
            Self::Read(size) => size.into(),
            Self::None | Self::Write(_) => 0,
        }
    }

    /// Bytes to take from the staging area afterwards; 0 if the operand is not written.
    #[inline]
    pub fn write(self) -> usize {
        match self {
            Self::Write(size) => size.into(),
            Self::None | Self::Read(_) => 0,
        }
    }
}

/// A guest general-purpose register and the host register that stands for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GprUse {
    pub(crate) guest: usize,
    pub(crate) host: Register,
    /// AH, CH, DH or BH, standing in the low byte of `host`.
    pub(crate) high_byte: bool,
    pub(crate) written: bool,
}

/// How vector registers are loaded and stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vectors {
    /// 128 bits; the upper half is not touched.
    Legacy,
    /// 128 bits; a write clears the upper half.
    Vex128,
    Vex256,
}

/// Everything that the stub generator and the caller of the stub have to know.
#[derive(Clone, Debug)]
pub(crate) struct Form {
    /// The instruction on host registers, its memory operand in the staging area.
    pub(crate) instruction: Instruction,
    pub(crate) gprs: Vec<GprUse>,
    /// Number, and whether it is written.
    pub(crate) vectors: Vec<(usize, bool)>,
    pub(crate) vector_kind: Vectors,
    pub(crate) flags: bool,
    pub(crate) mxcsr: bool,
    /// Uses the x87/MMX register file.
    pub(crate) x87: bool,
    /// Changes the x87 last-instruction pointers.
    pub(crate) x87_pointers: bool,
    pub(crate) waits_x87: bool,
    /// Size of the fields of the x87 environment that is written; 0 if none is.
    pub(crate) x87_environment: u8,
    pub(crate) class: Class,
    pub(crate) vex: bool,
    pub(crate) mem: MemUse,
    pub(crate) align: Option<u8>,
}

/// What `instruction` is to this module.
pub(crate) enum Kind {
    /// A hint that does nothing.
    Hint,
    /// VZEROUPPER, VZEROALL.
    ZeroVectors { all: bool },
    /// One to generate a stub for.
    Stub,
}

/// Whether the host processor has `feature` and this module runs its instructions natively (or, for gathers and masked
/// moves, by [`Masked`](crate::Masked)). False for features that have nothing to do with this module.
pub fn supported(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match feature {
        F::FPU | F::FPU287 | F::FPU387 | F::CMOV | F::MMX | F::SSE | F::SSE2 => true,
        F::PREFETCHW | F::PREFETCHWT1 => true,
        F::SSE3 => detected!("sse3"),
        F::SSSE3 => detected!("ssse3"),
        F::SSE4_1 => detected!("sse4.1"),
        F::SSE4_2 => detected!("sse4.2"),
        F::AVX => detected!("avx"),
        F::AVX2 => detected!("avx2"),
        F::FMA => detected!("fma"),
        F::F16C => detected!("f16c"),
        F::BMI1 => detected!("bmi1"),
        F::BMI2 => detected!("bmi2"),
        F::LZCNT => detected!("lzcnt"),
        F::POPCNT => detected!("popcnt"),
        F::MOVBE => detected!("movbe"),
        F::ADX => detected!("adx"),
        F::AES => detected!("aes"),
        F::PCLMULQDQ => detected!("pclmulqdq"),
        F::SHA => detected!("sha"),
        _ => false,
    }
}

/// What the host must know to execute `instruction` among its own: nothing but XMM or YMM registers, general ones and memory. `None` for
/// everything else: x87 and MMX registers, elements accessed one by one, instructions that this module does not run.
pub fn in_place(instruction: &Instruction, info: &mut InstructionInfoFactory) -> Option<InPlace> {
    let plain = |class| InPlace {
        class,
        mem: MemUse::None,
    };
    match kind(instruction)? {
        Kind::Hint => Some(plain(Class::Gpr)),
        Kind::ZeroVectors { .. } => Some(plain(Class::Avx)),
        Kind::Stub => {
            let form = Form::new(&canonical(instruction), info)?;
            (!form.x87 && form.class != Class::X87).then_some(InPlace {
                class: form.class,
                mem: form.mem,
            })
        }
    }
}

/// See [`in_place`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InPlace {
    /// Which control registers decide whether the guest may execute it.
    pub class: Class,
    /// Its memory operand.
    pub mem: MemUse,
}

/// `None` if this module does not run the instruction.
pub(crate) fn kind(instruction: &Instruction) -> Option<Kind> {
    use Mnemonic as M;
    let code = instruction.code();
    if code == Code::Wait {
        return Some(Kind::Stub);
    }
    if !matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        || !code
            .cpuid_features()
            .iter()
            .all(|&feature| supported(feature))
    {
        return None;
    }
    match instruction.mnemonic() {
        M::Prefetch | M::Prefetchw | M::Prefetchwt1 => return Some(Kind::Hint),
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 => return Some(Kind::Hint),
        M::Vzeroupper => return Some(Kind::ZeroVectors { all: false }),
        M::Vzeroall => return Some(Kind::ZeroVectors { all: true }),
        M::Lfence | M::Mfence | M::Sfence => return None,
        M::Ldmxcsr | M::Stmxcsr | M::Vldmxcsr | M::Vstmxcsr => return None,
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => return None,
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => return None,
        // An integer instruction; the features tell it from FCMOV, which needs FPU too.
        _ if code.cpuid_features() == [CpuidFeature::CMOV] => return None,
        _ => {}
    }
    let op_code = code.op_code();
    // FSTSW and its like are FWAIT and FNSTSW: two instructions, and decoded as such.
    if op_code.fwait() || instruction.is_vsib() {
        return None;
    }
    Some(Kind::Stub)
}

/// The instruction with everything taken out that makes no difference to its stub.
pub(crate) fn canonical(instruction: &Instruction) -> Instruction {
    let mut canonical = *instruction;
    canonical.set_len(0);
    canonical.set_next_ip(0);
    canonical.set_segment_prefix(Register::None);
    canonical.set_has_lock_prefix(false);
    canonical.set_has_rep_prefix(false);
    canonical.set_has_repne_prefix(false);
    canonical.set_has_xacquire_prefix(false);
    canonical.set_has_xrelease_prefix(false);
    if memory_operand(instruction).is_some() {
        canonical.set_memory_base(Register::RDI);
        canonical.set_memory_index(Register::None);
        canonical.set_memory_index_scale(1);
        canonical.set_memory_displ_size(8);
        canonical.set_memory_displacement64(offset::STAGING as u64);
    }
    canonical
}

fn memory_operand(instruction: &Instruction) -> Option<u32> {
    (0..instruction.op_count()).find(|&i| instruction.op_kind(i) == OpKind::Memory)
}

impl Form {
    /// Analyses a canonical instruction of [`Kind::Stub`]. `None` for operands that the tables above do not expect.
    pub(crate) fn new(canonical: &Instruction, info: &mut InstructionInfoFactory) -> Option<Form> {
        let code = canonical.code();
        let op_code = code.op_code();
        let legacy = code.encoding() == EncodingKind::Legacy;
        let mut instruction = *canonical;
        let mut gprs = rename_gprs(&mut instruction)?;
        let mut vectors: Vec<(usize, bool)> = Vec::new();
        let info = info.info_options(&instruction, InstructionInfoOptions::NO_MEMORY_USAGE);
        for used in info.used_registers() {
            let register = used.register();
            let written = writes(used.access());
            if register.is_gpr() {
                let full = register.full_register();
                match gprs.iter_mut().find(|gpr| gpr.host == full) {
                    Some(gpr) => gpr.written |= written,
                    // The base of the staged operand.
                    None if full == Register::RDI => {}
                    None => gprs.push(GprUse {
                        guest: full.number(),
                        host: full,
                        high_byte: false,
                        written,
                    }),
                }
            } else if register.is_vector_register() {
                match vectors
                    .iter_mut()
                    .find(|(number, _)| *number == register.number())
                {
                    Some((_, already)) => *already |= written,
                    None => vectors.push((register.number(), written)),
                }
            }
        }
        let mem = match memory_operand(&instruction) {
            None => MemUse::None,
            Some(operand) => {
                let size = instruction.memory_size().size() as u8;
                match info.op_access(operand) {
                    OpAccess::Read | OpAccess::CondRead => MemUse::Read(size),
                    OpAccess::Write | OpAccess::CondWrite => MemUse::Write(size),
                    _ => return None,
                }
            }
        };
        let kinds = || op_code.op_kinds().iter().copied();
        let has_mmx = kinds().any(is_mmx);
        let is_x87 = code == Code::Wait
            || code.cpuid_features().contains(&CpuidFeature::FPU)
            || is_80287(code);
        // With a memory operand, this one does not touch the MMX registers.
        let ignores_x87 = code == Code::Cvtpi2pd_xmm_mmm64 && mem != MemUse::None;
        let x87 = (is_x87 || has_mmx || code == Code::Emms) && !ignores_x87;
        let class = match () {
            () if is_x87 => Class::X87,
            () if kinds().any(is_xmm) && legacy => Class::Sse,
            () if kinds().any(is_xmm) || kinds().any(is_ymm) => Class::Avx,
            () if x87 => Class::Mmx,
            () => Class::Gpr,
        };
        let flag_bits = RflagsBits::OF
            | RflagsBits::SF
            | RflagsBits::ZF
            | RflagsBits::AF
            | RflagsBits::PF
            | RflagsBits::CF;
        Some(Form {
            instruction,
            gprs,
            vectors,
            vector_kind: match () {
                () if legacy => Vectors::Legacy,
                () if kinds().any(is_ymm) => Vectors::Vex256,
                () => Vectors::Vex128,
            },
            flags: (canonical.rflags_read() | canonical.rflags_modified()) & flag_bits != 0,
            mxcsr: uses_mxcsr(canonical),
            x87,
            x87_pointers: is_x87 && !is_x87_control(code),
            waits_x87: x87 && !is_x87_no_wait(code),
            x87_environment: match code {
                Code::Fnstenv_m14byte | Code::Fnsave_m94byte => 2,
                Code::Fnstenv_m28byte | Code::Fnsave_m108byte => 4,
                _ => 0,
            },
            class,
            vex: !legacy,
            mem,
            align: alignment(canonical, class, mem),
        })
    }
}

/// Gives every general-purpose register operand a host register that the stub may use. Registers that the encoding
/// implies (RDX of MULX, RAX of PCMPESTRI) are caller-saved and stand for themselves.
fn rename_gprs(instruction: &mut Instruction) -> Option<Vec<GprUse>> {
    const LOW_BYTES: [Register; 4] = [Register::R8L, Register::R9L, Register::R10L, Register::R11L];
    let mut gprs: Vec<GprUse> = Vec::new();
    for operand in 0..instruction.op_count() {
        let register = instruction.op_register(operand);
        if instruction.op_kind(operand) != OpKind::Register || !register.is_gpr() {
            continue;
        }
        if instruction.op_code().op_kind(operand) == OpCodeOperandKind::ax {
            continue;
        }
        let high_byte = matches!(
            register,
            Register::AH | Register::CH | Register::DH | Register::BH
        );
        let guest = register.full_register().number();
        let known = gprs
            .iter()
            .position(|gpr| (gpr.guest, gpr.high_byte) == (guest, high_byte));
        let index = known.unwrap_or(gprs.len());
        let low_byte = *LOW_BYTES.get(index)?;
        if known.is_none() {
            gprs.push(GprUse {
                guest,
                host: low_byte.full_register(),
                high_byte,
                written: false,
            });
        }
        let host = match register.size() {
            1 => low_byte,
            2 => Register::R8W + index as u32,
            4 => low_byte.full_register32(),
            _ => low_byte.full_register(),
        };
        instruction.set_op_register(operand, host);
    }
    Some(gprs)
}

fn writes(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

fn is_mmx(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(kind, K::mm_reg | K::mm_rm | K::mm_or_mem)
}

fn is_xmm(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(
        kind,
        K::xmm_reg | K::xmm_rm | K::xmm_or_mem | K::xmm_vvvv | K::xmm_is4
    )
}

fn is_ymm(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(
        kind,
        K::ymm_reg | K::ymm_rm | K::ymm_or_mem | K::ymm_vvvv | K::ymm_is4
    )
}

/// x87 instructions that are not in the feature FPU.
fn is_80287(code: Code) -> bool {
    use CpuidFeature as F;
    matches!(code.cpuid_features(), [F::FPU287] | [F::FPU387])
}

/// Does not look for a pending exception first.
fn is_x87_no_wait(code: Code) -> bool {
    use Code as C;
    matches!(
        code,
        C::Fninit
            | C::Fnclex
            | C::Fnstcw_m2byte
            | C::Fnstsw_m2byte
            | C::Fnstsw_AX
            | C::Fnstenv_m14byte
            | C::Fnstenv_m28byte
            | C::Fnsave_m94byte
            | C::Fnsave_m108byte
            | C::Fneni
            | C::Fndisi
            | C::Fnsetpm
    )
}

/// A control instruction: the last-instruction pointers stay, or are loaded or cleared (SDM volume 1, 8.1.8).
fn is_x87_control(code: Code) -> bool {
    use Code as C;
    is_x87_no_wait(code)
        || matches!(
            code,
            C::Wait
                | C::Fldcw_m2byte
                | C::Fldenv_m14byte
                | C::Fldenv_m28byte
                | C::Frstor_m94byte
                | C::Frstor_m108byte
        )
}

/// The alignment without which the memory operand raises #GP.
fn alignment(instruction: &Instruction, class: Class, mem: MemUse) -> Option<u8> {
    use Mnemonic as M;
    let size = match mem {
        MemUse::Read(size) | MemUse::Write(size) => size,
        MemUse::None => return None,
    };
    let aligned = match (class, instruction.mnemonic()) {
        (Class::Sse, M::Movups | M::Movupd | M::Movdqu | M::Lddqu) => false,
        (Class::Sse, M::Pcmpestri | M::Pcmpestri64 | M::Pcmpistri) => false,
        (Class::Sse, M::Pcmpestrm | M::Pcmpestrm64 | M::Pcmpistrm) => false,
        (Class::Sse, _) => size == 16,
        (Class::Avx, M::Vmovaps | M::Vmovapd | M::Vmovdqa) => true,
        (Class::Avx, M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa) => true,
        _ => false,
    };
    aligned.then_some(size)
}

/// Whether the instruction depends on MXCSR or sets exception flags in it.
#[rustfmt::skip]
fn uses_mxcsr(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let features = instruction.code().cpuid_features();
    if features.contains(&CpuidFeature::FMA) || features.contains(&CpuidFeature::F16C) {
        return true;
    }
    matches!(
        instruction.mnemonic(),
        M::Addps | M::Addpd | M::Addss | M::Addsd | M::Subps | M::Subpd | M::Subss | M::Subsd
        | M::Mulps | M::Mulpd | M::Mulss | M::Mulsd | M::Divps | M::Divpd | M::Divss | M::Divsd
        | M::Minps | M::Minpd | M::Minss | M::Minsd | M::Maxps | M::Maxpd | M::Maxss | M::Maxsd
        | M::Sqrtps | M::Sqrtpd | M::Sqrtss | M::Sqrtsd | M::Cmpps | M::Cmppd | M::Cmpss | M::Cmpsd
        | M::Comiss | M::Comisd | M::Ucomiss | M::Ucomisd
        | M::Addsubps | M::Addsubpd | M::Haddps | M::Haddpd | M::Hsubps | M::Hsubpd | M::Dpps | M::Dppd
        | M::Roundps | M::Roundpd | M::Roundss | M::Roundsd
        | M::Cvtpi2ps | M::Cvtsi2ss | M::Cvtsi2sd | M::Cvtdq2ps
        | M::Cvtps2pi | M::Cvtpd2pi | M::Cvtss2si | M::Cvtsd2si | M::Cvtps2dq | M::Cvtpd2dq
        | M::Cvttps2pi | M::Cvttpd2pi | M::Cvttss2si | M::Cvttsd2si | M::Cvttps2dq | M::Cvttpd2dq
        | M::Cvtps2pd | M::Cvtpd2ps | M::Cvtss2sd | M::Cvtsd2ss
        | M::Vaddps | M::Vaddpd | M::Vaddss | M::Vaddsd | M::Vsubps | M::Vsubpd | M::Vsubss | M::Vsubsd
        | M::Vmulps | M::Vmulpd | M::Vmulss | M::Vmulsd | M::Vdivps | M::Vdivpd | M::Vdivss | M::Vdivsd
        | M::Vminps | M::Vminpd | M::Vminss | M::Vminsd | M::Vmaxps | M::Vmaxpd | M::Vmaxss | M::Vmaxsd
        | M::Vsqrtps | M::Vsqrtpd | M::Vsqrtss | M::Vsqrtsd | M::Vcmpps | M::Vcmppd | M::Vcmpss | M::Vcmpsd
        | M::Vcomiss | M::Vcomisd | M::Vucomiss | M::Vucomisd
        | M::Vaddsubps | M::Vaddsubpd | M::Vhaddps | M::Vhaddpd | M::Vhsubps | M::Vhsubpd | M::Vdpps | M::Vdppd
        | M::Vroundps | M::Vroundpd | M::Vroundss | M::Vroundsd
        | M::Vcvtsi2ss | M::Vcvtsi2sd | M::Vcvtdq2ps
        | M::Vcvtss2si | M::Vcvtsd2si | M::Vcvtps2dq | M::Vcvtpd2dq
        | M::Vcvttss2si | M::Vcvttsd2si | M::Vcvttps2dq | M::Vcvttpd2dq
        | M::Vcvtps2pd | M::Vcvtpd2ps | M::Vcvtss2sd | M::Vcvtsd2ss
    )
}
