//! The routines between Rust and translated code: in with the guest's registers, out with them.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use lodger_softmmu::MmuIndex;

use crate::env::{Layout, exit};
use crate::refill::{self, Refills};

/// Addresses of the routines.
#[derive(Debug, Clone, Copy)]
pub struct Routines {
    /// `extern "sysv64" fn()`: goes to `Env::target`.
    pub enter: usize,
    /// Where code jumps to leave, with the reason in T.
    pub leave: usize,
    /// The same if the flags are saved already.
    pub leave_saved: usize,
    /// Where an empty slot of a jump table leads, with saved flags.
    pub miss: usize,
    /// Where the signal handler continues.
    pub trap: usize,
    /// Loads the vector registers, unless they are, and goes to the address in S. Destroys flags.
    pub load_vectors: usize,
    /// By privilege.
    pub refills: [Refills<usize>; 3],
}

/// MXCSR while Rust code runs: everything masked, round to nearest.
const HOST_MXCSR: u32 = 0x1f80;

/// The code for `base`, and where the routines are in it.
///
/// The guest's vector registers are loaded when code is entered that uses them, or by code that goes on in such code, and saved when code
/// is left, if they have been loaded: ring 0's code keeps them for the user code that called it.
pub fn assemble(layout: &Layout, base: usize) -> Result<(Vec<u8>, Routines), IcedError> {
    let a = &mut CodeAssembler::new(64)?;
    let (labels, refills) = emit(a, layout)?;
    let result = a.assemble_options(
        base as u64,
        iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS,
    )?;
    let place = |label: &CodeLabel| Ok::<_, IcedError>(result.label_ip(label)? as usize);
    let [enter, leave, leave_saved, miss, trap, load_vectors] = &labels;
    let [kernel, kernel_ac, user] = refills;
    let routines = Routines {
        enter: place(enter)?,
        leave: place(leave)?,
        leave_saved: place(leave_saved)?,
        miss: place(miss)?,
        trap: place(trap)?,
        load_vectors: place(load_vectors)?,
        refills: [
            kernel.try_map(|label| place(&label))?,
            kernel_ac.try_map(|label| place(&label))?,
            user.try_map(|label| place(&label))?,
        ],
    };
    Ok((result.inner.code_buffer.clone(), routines))
}

fn emit(
    a: &mut CodeAssembler,
    layout: &Layout,
) -> Result<([CodeLabel; 6], [Refills<CodeLabel>; 3]), IcedError> {
    let mut enter = a.create_label();
    let mut leave = a.create_label();
    let mut leave_saved = a.create_label();
    let mut miss = a.create_label();
    let mut trap = a.create_label();
    let mut load = a.create_label();
    let mut host_mxcsr = a.create_label();
    let held = dword_ptr(layout.holds_vectors() as i32);
    let at = |address: u32| qword_ptr(address as i32);
    let vector = |n: usize| ymmword_ptr((layout.vectors + 32 * n as u32) as i32);
    // RAX is last: it carries the flags. R10 and R11 stay in memory.
    let general = [
        (1, rcx),
        (2, rdx),
        (3, rbx),
        (5, rbp),
        (6, rsi),
        (7, rdi),
        (8, r8),
        (9, r9),
        (12, r12),
        (13, r13),
        (14, r14),
        (15, r15),
    ];
    let ymm = [
        ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13,
        ymm14, ymm15,
    ];
    let xmm = [
        xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13,
        xmm14, xmm15,
    ];
    let saved = [rbx, rbp, r12, r13, r14, r15];

    a.set_label(&mut enter)?;
    for register in saved {
        a.push(register)?;
    }
    a.mov(at(layout.host_rsp()), rsp)?;
    let mut prepared = a.create_label();
    a.lea(r11, qword_ptr(prepared))?;
    a.cmp(dword_ptr(layout.wants_vectors() as i32), 0)?;
    a.jne(load)?;
    a.set_label(&mut prepared)?;
    for (n, register) in general {
        a.mov(register, at(layout.register(n)))?;
    }
    a.mov(r11, at(layout.argument()))?;
    a.mov(rsp, at(layout.register(4)))?;
    a.mov(rax, at(layout.flags()))?;
    a.add(al, 0x7f)?; // overflows if OF is to be set
    a.sahf()?;
    a.mov(rax, at(layout.register(0)))?;
    a.jmp(at(layout.target()))?;

    a.set_label(&mut load)?;
    // Upper halves that are zero are left in their initial state: with them, SSE instructions are many times slower on some
    // processors.
    let (mut done, mut whole, mut loaded) = (a.create_label(), a.create_label(), a.create_label());
    let half = |n: usize| xmmword_ptr((layout.vectors + 32 * n as u32) as i32);
    let upper = |n: usize| xmmword_ptr((layout.vectors + 32 * n as u32 + 16) as i32);
    a.cmp(held, 0)?;
    a.jne(done)?;
    a.mov(held, 1)?;
    a.vzeroupper()?;
    a.vmovups(xmm0, upper(0))?;
    for n in 1..16 {
        a.vpor(xmm0, xmm0, upper(n))?;
    }
    a.vptest(xmm0, xmm0)?;
    a.jne(whole)?;
    for (n, register) in xmm.into_iter().enumerate() {
        a.movups(register, half(n))?;
    }
    a.jmp(loaded)?;
    a.set_label(&mut whole)?;
    for (n, register) in ymm.into_iter().enumerate() {
        a.vmovups(register, vector(n))?;
    }
    a.set_label(&mut loaded)?;
    a.ldmxcsr(dword_ptr(layout.mxcsr as i32))?;
    a.set_label(&mut done)?;
    a.jmp(r11)?;

    a.set_label(&mut trap)?;
    a.mov(at(layout.register(0)), rax)?;
    a.lahf()?;
    a.seto(al)?;
    a.movzx(eax, ax)?;
    a.mov(at(layout.trap_flags()), rax)?;
    a.mov(rax, at(layout.register(0)))?;
    a.mov(r10d, exit::TRAP as i32)?;
    a.jmp(leave_saved)?;
    a.set_label(&mut miss)?;
    a.mov(r10d, exit::MISS as i32)?;
    a.jmp(leave_saved)?;
    a.set_label(&mut leave)?;
    a.mov(at(layout.register(0)), rax)?;
    a.lahf()?;
    a.seto(al)?;
    a.movzx(eax, ax)?;
    a.mov(at(layout.flags()), rax)?;
    a.mov(rax, at(layout.register(0)))?;
    a.set_label(&mut leave_saved)?;
    a.mov(at(layout.register(0)), rax)?;
    a.mov(at(layout.argument()), r11)?;
    a.mov(at(layout.exit()), r10)?;
    a.mov(at(layout.register(4)), rsp)?;
    for (n, register) in general {
        a.mov(at(layout.register(n)), register)?;
    }
    a.mov(rsp, at(layout.host_rsp()))?;
    let mut unheld = a.create_label();
    a.cmp(held, 0)?;
    a.je(unheld)?;
    a.mov(held, 0)?;
    a.stmxcsr(dword_ptr(layout.mxcsr as i32))?;
    a.ldmxcsr(dword_ptr(host_mxcsr))?;
    for (n, register) in ymm.into_iter().enumerate() {
        a.vmovups(vector(n), register)?;
    }
    a.vzeroupper()?;
    a.set_label(&mut unheld)?;
    for register in saved.into_iter().rev() {
        a.pop(register)?;
    }
    a.ret()?;
    a.set_label(&mut host_mxcsr)?;
    a.dd(&[HOST_MXCSR])?;
    let kernel = refill::emit(a, layout, MmuIndex::Kernel, leave_saved)?;
    let kernel_ac = refill::emit(a, layout, MmuIndex::KernelAc, leave_saved)?;
    let user = refill::emit(a, layout, MmuIndex::User, leave_saved)?;
    let refills = [kernel, kernel_ac, user];
    Ok(([enter, leave, leave_saved, miss, trap, load], refills))
}
