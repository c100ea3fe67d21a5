//! Fast system calls (SYSCALL, SYSRET, SYSENTER, SYSEXIT), SWAPGS and the FS and GS bases.
//!
//! SYSCALL and SYSRET follow AMD (APM vol. 3): they also work in compatibility and legacy protected mode, and SYSRET to
//! a non-canonical address faults at that address, in user mode. SYSENTER and SYSEXIT follow Intel (SDM vol. 2): they also
//! work in long mode.

use lodger_x86::Segment;
use lodger_x86::bits::{RFlags, cr4, efer};

use crate::cpu::{Cpu, Exec, Stop, gpr, seg};
use crate::memory::canonical;
use crate::op::Op;
use crate::segment::privileged;
use crate::transfer::WRITABLE_FLAGS;

/// A flat code segment at a privilege level, 64-bit or 32-bit.
fn code(selector: u16, level: u8, long: bool) -> Segment {
    let attributes = if long { 0xa09b } else { 0xc09b };
    Segment::flat(
        selector & !3 | u16::from(level),
        attributes | u16::from(level) << 5,
    )
}

/// A flat stack segment at a privilege level.
fn stack(selector: u16, level: u8) -> Segment {
    Segment::flat(
        selector & !3 | u16::from(level),
        0xc093 | u16::from(level) << 5,
    )
}

/// Switches to flat segments: `cs`, and SS 8 after it.
fn switch(c: &mut Cpu, cs: u16, level: u8, long: bool, rip: u64) -> Exec {
    c.segments[seg::CS as usize] = code(cs, level, long);
    c.segments[seg::SS as usize] = stack(cs.wrapping_add(8), level);
    c.set_rip(rip);
    c.update_mode();
    Err(Stop::EndBlock)
}

/// SYSCALL.
pub fn syscall(c: &mut Cpu) -> Exec {
    if c.efer & efer::SCE == 0 || c.unprotected() {
        return c.ud();
    }
    let cs = (c.msrs.star >> 32) as u16;
    c.regs[gpr::RCX as usize] = c.rip();
    let rf = RFlags::RF.bits();
    if !c.long_mode() {
        c.flags &= !(rf | RFlags::IF.bits());
        return switch(c, cs, 0, false, c.msrs.star & 0xffff_ffff);
    }
    c.regs[gpr::R11 as usize] = c.flags & !rf;
    c.flags = c.flags & !c.msrs.sfmask & !rf | RFlags::FIXED.bits();
    let rip = if c.long64() {
        c.msrs.lstar
    } else {
        c.msrs.cstar
    };
    // Single-stepping goes on in the handler if the mask lets it.
    c.step_trap &= c.flags & RFlags::TF.bits() != 0;
    switch(c, cs, 0, true, rip)
}

/// SYSRET; `long`: to 64-bit mode.
pub fn sysret(c: &mut Cpu, long: bool) -> Exec {
    if c.efer & efer::SCE == 0 {
        return c.ud();
    }
    if c.real_mode() {
        return c.gp0();
    }
    privileged(c)?;
    let cs = (c.msrs.star >> 48) as u16;
    let rcx = c.regs[gpr::RCX as usize];
    if c.long64() {
        let cleared = (RFlags::RF | RFlags::VM).bits();
        c.flags = c.regs[gpr::R11 as usize] & WRITABLE_FLAGS & !cleared | RFlags::FIXED.bits();
    } else {
        c.flags |= RFlags::IF.bits();
    }
    c.interrupts_may_come();
    if !long {
        return switch(c, cs, 3, false, rcx & 0xffff_ffff);
    }
    // SS is 8 above the 32-bit code segment, CS 16 above it.
    c.segments[seg::CS as usize] = code(cs.wrapping_add(16), 3, true);
    c.segments[seg::SS as usize] = stack(cs.wrapping_add(8), 3);
    c.set_rip(rcx);
    c.update_mode();
    Err(Stop::EndBlock)
}

/// SYSENTER and SYSEXIT in long mode are Intel's; AMD's processors do not have them there (APM vol. 3).
fn has_sysenter(c: &Cpu) -> bool {
    !(c.long_mode() && c.vm.is_amd)
}

/// SYSENTER.
pub fn sysenter(c: &mut Cpu) -> Exec {
    if !has_sysenter(c) {
        return c.ud();
    }
    let cs = c.msrs.sysenter_cs as u16;
    if c.real_mode() || cs & !3 == 0 {
        return c.gp0();
    }
    let long = c.long_mode();
    let width = if long { u64::MAX } else { 0xffff_ffff };
    c.flags &= !(RFlags::VM | RFlags::IF | RFlags::RF).bits();
    c.regs[gpr::RSP as usize] = c.msrs.sysenter_esp & width;
    switch(c, cs, 0, long, c.msrs.sysenter_eip & width)
}

/// SYSEXIT; `long`: to 64-bit mode.
pub fn sysexit(c: &mut Cpu, long: bool) -> Exec {
    if !has_sysenter(c) {
        return c.ud();
    }
    let cs = c.msrs.sysenter_cs as u16;
    if c.real_mode() || cs & !3 == 0 {
        return c.gp0();
    }
    privileged(c)?;
    let (rip, rsp) = (c.regs[gpr::RDX as usize], c.regs[gpr::RCX as usize]);
    if !long {
        c.regs[gpr::RSP as usize] = rsp & 0xffff_ffff;
        return switch(c, cs.wrapping_add(16), 3, false, rip & 0xffff_ffff);
    }
    if !canonical(rip) || !canonical(rsp) {
        return c.gp0();
    }
    c.regs[gpr::RSP as usize] = rsp;
    switch(c, cs.wrapping_add(32), 3, true, rip)
}

/// SWAPGS.
pub fn swapgs(c: &mut Cpu) -> Exec {
    privileged(c)?;
    let base = std::mem::replace(
        &mut c.msrs.kernel_gs_base,
        c.segments[seg::GS as usize].base,
    );
    c.set_base(seg::GS, base);
    Ok(())
}

/// RDFSBASE, RDGSBASE.
pub fn read_base(c: &mut Cpu, op: &Op, reg: u8) -> Exec {
    if c.cr4 & cr4::FSGSBASE == 0 {
        return c.ud();
    }
    let base = c.segments[reg as usize].base;
    match op.rare().instruction.op0_register().size() {
        4 => c.set(op.dst, base as u32),
        _ => c.set(op.dst, base),
    }
    Ok(())
}

/// WRFSBASE, WRGSBASE.
pub fn write_base(c: &mut Cpu, op: &Op, reg: u8) -> Exec {
    if c.cr4 & cr4::FSGSBASE == 0 {
        return c.ud();
    }
    let base = match op.rare().instruction.op0_register().size() {
        4 => c.get::<u32>(op.dst).into(),
        _ => c.get::<u64>(op.dst),
    };
    if !canonical(base) {
        return c.gp0();
    }
    c.set_base(reg, base);
    Ok(())
}

impl Cpu {
    /// Sets the base of FS or GS, in or for 64-bit mode.
    pub(crate) fn set_base(&mut self, reg: u8, base: u64) {
        self.segments[reg as usize].base = base;
        self.bases[reg as usize] = base;
    }
}
