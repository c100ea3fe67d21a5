//! Dispatch of the instructions that are not common enough for a decoded form of their own, and how they reach
//! their operands.

use iced_x86::{Code, Mnemonic, OpKind};

use crate::cpu::{Cpu, Event, Exec, Stop, gpr, seg};
use crate::op::Op;
use crate::word::Word;
use crate::{control, fpu_state, legacy, msr, segment, syscall, system, transfer};

/// The number of a register operand: general, segment, control or debug. Not for AH, CH, DH, BH.
pub fn register(op: &Op, operand: u32) -> u8 {
    op.rare().instruction.op_register(operand).number() as u8
}

/// Whether an operand is in memory.
pub fn is_memory(op: &Op, operand: u32) -> bool {
    op.rare().instruction.op_kind(operand) == OpKind::Memory
}

/// Reads a register or memory operand; of a wider register its low part.
pub fn read_rm<T: Word>(c: &mut Cpu, op: &Op, operand: u32) -> Exec<T> {
    if is_memory(op, operand) {
        c.load(op)
    } else {
        Ok(c.get(register(op, operand)))
    }
}

/// Writes the first operand: 16 bits of `value` to memory, as many as fit to a register.
pub fn write_system_word(c: &mut Cpu, op: &Op, value: u64) -> Exec {
    if is_memory(op, 0) {
        return c.store(op, value as u16);
    }
    match op.rare().instruction.op0_register().size() {
        2 => c.set(op.dst, value as u16),
        4 => c.set(op.dst, value as u32),
        _ => c.set(op.dst, value),
    }
    Ok(())
}

/// INT1 (ICEBP): a #DB without a condition in DR6, and without a check of the gate's privilege level.
fn int1(c: &mut Cpu) -> Exec {
    use lodger_x86::{Exception, Vector};
    let event = Event::Exception(Exception::plain(Vector::Debug));
    transfer::instruction_event(c, event)
}

/// Executes an instruction that has no handler of its own.
pub fn execute(c: &mut Cpu, op: &Op) -> Exec {
    let i = &op.rare().instruction;
    match i.mnemonic() {
        Mnemonic::Mov => mov(c, op, i.code()),
        Mnemonic::Push | Mnemonic::Pop => push_pop(c, op, i.code()),
        Mnemonic::Les => segment::load_far_pointer(c, op, seg::ES, far_size(i.code())),
        Mnemonic::Lds => segment::load_far_pointer(c, op, seg::DS, far_size(i.code())),
        Mnemonic::Lss => segment::load_far_pointer(c, op, seg::SS, far_size(i.code())),
        Mnemonic::Lfs => segment::load_far_pointer(c, op, seg::FS, far_size(i.code())),
        Mnemonic::Lgs => segment::load_far_pointer(c, op, seg::GS, far_size(i.code())),
        Mnemonic::Lldt => segment::lldt(c, op),
        Mnemonic::Ltr => segment::ltr(c, op),
        Mnemonic::Lar | Mnemonic::Lsl | Mnemonic::Verr | Mnemonic::Verw => segment::probe(c, op),
        Mnemonic::Arpl => segment::arpl(c, op),

        Mnemonic::Jmp => transfer::jump_or_call(c, op, far_size(i.code()), false),
        Mnemonic::Call => transfer::jump_or_call(c, op, far_size(i.code()), true),
        Mnemonic::Retf => {
            let release = if i.op_count() == 1 {
                i.immediate16()
            } else {
                0
            };
            transfer::ret(c, far_size(i.code()), release.into())
        }
        Mnemonic::Iret => transfer::iret(c, 2),
        Mnemonic::Iretd => transfer::iret(c, 4),
        Mnemonic::Iretq => transfer::iret(c, 8),
        Mnemonic::Int => transfer::software_interrupt(c, i.immediate8(), false),
        Mnemonic::Int3 => transfer::software_interrupt(c, 3, true),
        Mnemonic::Into if c.flags & 1 << 11 != 0 => transfer::software_interrupt(c, 4, true),
        Mnemonic::Into => Ok(()),
        Mnemonic::Int1 => int1(c),
        Mnemonic::Pushf => transfer::pushf(c, 2),
        Mnemonic::Pushfd => transfer::pushf(c, 4),
        Mnemonic::Pushfq => transfer::pushf(c, 8),
        Mnemonic::Popf => transfer::popf(c, 2),
        Mnemonic::Popfd => transfer::popf(c, 4),
        Mnemonic::Popfq => transfer::popf(c, 8),
        Mnemonic::Cli => transfer::cli(c),
        Mnemonic::Sti => transfer::sti(c),
        Mnemonic::Hlt => system::hlt(c),

        Mnemonic::Syscall => syscall::syscall(c),
        Mnemonic::Sysret => syscall::sysret(c, false),
        Mnemonic::Sysretq => syscall::sysret(c, true),
        Mnemonic::Sysenter => syscall::sysenter(c),
        Mnemonic::Sysexit => syscall::sysexit(c, false),
        Mnemonic::Sysexitq => syscall::sysexit(c, true),
        Mnemonic::Swapgs => syscall::swapgs(c),
        Mnemonic::Rdfsbase => syscall::read_base(c, op, seg::FS),
        Mnemonic::Rdgsbase => syscall::read_base(c, op, seg::GS),
        Mnemonic::Wrfsbase => syscall::write_base(c, op, seg::FS),
        Mnemonic::Wrgsbase => syscall::write_base(c, op, seg::GS),

        Mnemonic::Clts => control::clts(c),
        Mnemonic::Lmsw => control::lmsw(c, op),
        Mnemonic::Smsw => control::smsw(c, op),
        Mnemonic::Rdmsr => msr::rdmsr(c),
        Mnemonic::Wrmsr => msr::wrmsr(c),

        Mnemonic::Lgdt => {
            c.gdtr = system::load_table(c, op, table_size(i.code()))?;
            Err(Stop::EndBlock)
        }
        Mnemonic::Lidt => {
            c.idtr = system::load_table(c, op, table_size(i.code()))?;
            Err(Stop::EndBlock)
        }
        Mnemonic::Sgdt => system::store_table(c, op, c.gdtr),
        Mnemonic::Sidt => system::store_table(c, op, c.idtr),
        Mnemonic::Sldt => system::store_selector(c, op, c.ldtr.selector),
        Mnemonic::Str => system::store_selector(c, op, c.tr.selector),
        Mnemonic::Invlpg => system::invlpg(c, op),
        Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => system::write_back(c),
        Mnemonic::Cpuid => system::cpuid(c),
        Mnemonic::Rdtsc => system::rdtsc(c, false),
        Mnemonic::Rdtscp => system::rdtsc(c, true),
        // There are no performance counters.
        Mnemonic::Rdpmc => c.gp0(),
        Mnemonic::Rdpid => system::rdpid(c, op),
        Mnemonic::Xgetbv => system::xgetbv(c),
        Mnemonic::Xsetbv => system::xsetbv(c),
        Mnemonic::In | Mnemonic::Out => port(c, i.code(), i.immediate8()),
        Mnemonic::Clac => system::set_ac(c, false),
        Mnemonic::Stac => system::set_ac(c, true),
        Mnemonic::Rdrand | Mnemonic::Rdseed => system::random(c, op),
        Mnemonic::Clflush | Mnemonic::Clflushopt => system::touch(c, op),

        // Hints, what is one without control-flow enforcement, and fences: RAM is accessed in program order already, and the host's own order is no weaker than the guest's.
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Cldemote
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        | Mnemonic::Lfence => Ok(()),
        Mnemonic::Sfence | Mnemonic::Mfence => {
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            Ok(())
        }

        Mnemonic::Fxsave
        | Mnemonic::Fxsave64
        | Mnemonic::Fxrstor
        | Mnemonic::Fxrstor64
        | Mnemonic::Xsave
        | Mnemonic::Xsave64
        | Mnemonic::Xrstor
        | Mnemonic::Xrstor64
        | Mnemonic::Ldmxcsr
        | Mnemonic::Stmxcsr
        | Mnemonic::Vldmxcsr
        | Mnemonic::Vstmxcsr => fpu_state::execute(c, op),

        Mnemonic::Aaa
        | Mnemonic::Aas
        | Mnemonic::Aam
        | Mnemonic::Aad
        | Mnemonic::Daa
        | Mnemonic::Das
        | Mnemonic::Salc
        | Mnemonic::Pusha
        | Mnemonic::Pushad
        | Mnemonic::Popa
        | Mnemonic::Popad
        | Mnemonic::Enter
        | Mnemonic::Bound
        | Mnemonic::Bswap
        | Mnemonic::Cmpxchg8b
        | Mnemonic::Cmpxchg16b => legacy::execute(c, op),

        _ => {
            tracing::trace!(rip = c.rip(), code = ?i.code(), "undefined instruction");
            c.ud()
        }
    }
}

/// MOV to and from segment, control and debug registers.
fn mov(c: &mut Cpu, op: &Op, code: Code) -> Exec {
    match code {
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
            let selector = c.segments[register(op, 1) as usize].selector;
            write_system_word(c, op, selector.into())
        }
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
            segment::mov_to_segment(c, op)
        }
        Code::Mov_r32_cr | Code::Mov_r64_cr => control::mov_from_cr(c, op),
        Code::Mov_cr_r32 | Code::Mov_cr_r64 => control::mov_to_cr(c, op),
        Code::Mov_r32_dr | Code::Mov_r64_dr => control::mov_from_dr(c, op),
        Code::Mov_dr_r32 | Code::Mov_dr_r64 => control::mov_to_dr(c, op),
        _ => c.ud(),
    }
}

/// PUSH and POP of segment registers.
fn push_pop(c: &mut Cpu, op: &Op, code: Code) -> Exec {
    use Code::*;
    match code {
        Pushw_ES | Pushw_CS | Pushw_SS | Pushw_DS | Pushw_FS | Pushw_GS => segment::push(c, op, 2),
        Pushd_ES | Pushd_CS | Pushd_SS | Pushd_DS | Pushd_FS | Pushd_GS => segment::push(c, op, 4),
        Pushq_FS | Pushq_GS => segment::push(c, op, 8),
        Popw_ES | Popw_SS | Popw_DS | Popw_FS | Popw_GS => segment::pop(c, op, 2),
        Popd_ES | Popd_SS | Popd_DS | Popd_FS | Popd_GS => segment::pop(c, op, 4),
        Popq_FS | Popq_GS => segment::pop(c, op, 8),
        _ => c.ud(),
    }
}

/// The operand size of a far transfer or far pointer, in bytes.
fn far_size(code: Code) -> u64 {
    use Code::*;
    match code {
        Jmp_ptr1616 | Jmp_m1616 | Call_ptr1616 | Call_m1616 | Retfw | Retfw_imm16 => 2,
        Les_r16_m1616 | Lds_r16_m1616 | Lss_r16_m1616 | Lfs_r16_m1616 | Lgs_r16_m1616 => 2,
        Jmp_m1664 | Call_m1664 | Retfq | Retfq_imm16 => 8,
        Lss_r64_m1664 | Lfs_r64_m1664 | Lgs_r64_m1664 => 8,
        _ => 4,
    }
}

/// Bytes of the base address that LGDT and LIDT load: 3, 4 or 8.
fn table_size(code: Code) -> u64 {
    match code {
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 3,
        Code::Lgdt_m1632 | Code::Lidt_m1632 => 4,
        _ => 8,
    }
}

/// IN and OUT.
fn port(c: &mut Cpu, code: Code, immediate: u8) -> Exec {
    let dx = c.get::<u16>(gpr::RDX);
    match code {
        Code::In_AL_imm8 => system::input(c, immediate.into(), 1),
        Code::In_AX_imm8 => system::input(c, immediate.into(), 2),
        Code::In_EAX_imm8 => system::input(c, immediate.into(), 4),
        Code::In_AL_DX => system::input(c, dx, 1),
        Code::In_AX_DX => system::input(c, dx, 2),
        Code::In_EAX_DX => system::input(c, dx, 4),
        Code::Out_imm8_AL => system::output(c, immediate.into(), 1),
        Code::Out_imm8_AX => system::output(c, immediate.into(), 2),
        Code::Out_imm8_EAX => system::output(c, immediate.into(), 4),
        Code::Out_DX_AL => system::output(c, dx, 1),
        Code::Out_DX_AX => system::output(c, dx, 2),
        Code::Out_DX_EAX => system::output(c, dx, 4),
        _ => c.ud(),
    }
}
