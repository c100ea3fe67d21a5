//! Generates the stub of one instruction form.
//!
//! A stub is `extern "sysv64" fn(rdi: *mut NativeState, rsi: *mut [u64; 16], rdx: flags) -> flags`. It uses only
//! caller-saved registers, so it has no prologue; vector registers keep their numbers, general-purpose ones are renamed.
//! Every register that the instruction names is loaded, even if it is only written: a partial write then keeps the
//! guest's bits, and no host value can leak. In order:
//!
//! ```text
//! fxrstor64, ldmxcsr       only what the instruction uses
//! flags from edx           with sahf; destroys rax
//! loads
//! the instruction
//! stmxcsr, host's ldmxcsr
//! stores, fxsave64         skipped if an unmasked SIMD exception was raised
//! fninit, vzeroupper       the host's own state, clean
//! eax = flags
//! ret
//! ```

use crate::form::{Form, Vectors};
use crate::state::offset;
use iced_x86::code_asm::*;
use iced_x86::{IcedError, Register};

/// The bits of RFLAGS that a stub takes and returns: OF, SF, ZF, AF, PF, CF.
pub(crate) const STATUS_FLAGS: u32 = 0x8d5;

/// The machine code; it is position independent.
pub(crate) fn assemble(form: &Form) -> Result<Vec<u8>, IcedError> {
    let a = &mut CodeAssembler::new(64)?;
    if form.x87 {
        a.fxrstor64(ptr(rdi + offset::FXSAVE))?;
    }
    if form.mxcsr {
        a.ldmxcsr(dword_ptr(rdi + offset::RUN_MXCSR))?;
    }
    if form.flags {
        load_flags(a)?;
    }
    load_registers(a, form)?;
    a.add_instruction(form.instruction)?;
    let mut skip = a.create_label();
    if form.mxcsr {
        a.stmxcsr(dword_ptr(rdi + offset::RUN_MXCSR))?;
        a.ldmxcsr(dword_ptr(rdi + offset::HOST_MXCSR))?;
        // Comparisons return flags and store nothing, so these two uses of the flags never meet.
        if !form.flags {
            a.mov(eax, dword_ptr(rdi + offset::RUN_MXCSR))?;
            a.test(dword_ptr(rdi + offset::FATAL), eax)?;
            a.jne(skip)?;
        }
    }
    store_registers(a, form)?;
    if form.x87 {
        a.fxsave64(ptr(rdi + offset::FXSAVE))?;
    }
    a.set_label(&mut skip)?;
    if form.x87 {
        a.fninit()?;
    }
    if form.vector_kind == Vectors::Vex256 {
        a.vzeroupper()?;
    }
    if form.flags {
        return_flags(a)?;
    }
    a.ret()?;
    a.assemble(0)
}

fn load_flags(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.bt(edx, 11)?; // OF
    a.setc(al)?;
    a.add(al, 0x7f)?; // overflows if al is 1
    a.mov(ah, dl)?;
    a.sahf()
}

fn return_flags(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.lahf()?;
    a.seto(al)?;
    a.movzx(ecx, ah)?;
    a.movzx(eax, al)?;
    a.shl(eax, 11)?;
    a.or(eax, ecx)
}

fn load_registers(a: &mut CodeAssembler, form: &Form) -> Result<(), IcedError> {
    for &(number, _) in &form.vectors {
        let at = rdi + offset::ymm(number);
        match form.vector_kind {
            Vectors::Legacy => a.movups(xmm(number), xmmword_ptr(at))?,
            Vectors::Vex128 => a.vmovups(xmm(number), xmmword_ptr(at))?,
            Vectors::Vex256 => a.vmovups(ymm(number), ymmword_ptr(at))?,
        }
    }
    for gpr in &form.gprs {
        let at = rsi + 8 * gpr.guest;
        if gpr.high_byte {
            a.movzx(gpr32(gpr.host), byte_ptr(at + 1))?;
        } else {
            a.mov(gpr64(gpr.host), qword_ptr(at))?;
        }
    }
    Ok(())
}

fn store_registers(a: &mut CodeAssembler, form: &Form) -> Result<(), IcedError> {
    for &(number, _) in form.vectors.iter().filter(|(_, written)| *written) {
        let at = rdi + offset::ymm(number);
        match form.vector_kind {
            Vectors::Legacy => a.movups(xmmword_ptr(at), xmm(number))?,
            // The upper half of the host's register was cleared too.
            Vectors::Vex128 | Vectors::Vex256 => a.vmovups(ymmword_ptr(at), ymm(number))?,
        }
    }
    for gpr in form.gprs.iter().filter(|gpr| gpr.written) {
        a.mov(qword_ptr(rsi + 8 * gpr.guest), gpr64(gpr.host))?;
    }
    Ok(())
}

fn xmm(number: usize) -> AsmRegisterXmm {
    get_xmm(Register::XMM0 + number as u32).expect("number below 16")
}

fn ymm(number: usize) -> AsmRegisterYmm {
    get_ymm(Register::YMM0 + number as u32).expect("number below 16")
}

fn gpr64(register: Register) -> AsmRegister64 {
    get_gpr64(register).expect("a 64-bit register")
}

fn gpr32(register: Register) -> AsmRegister32 {
    get_gpr32(register.full_register32()).expect("a 32-bit register")
}
