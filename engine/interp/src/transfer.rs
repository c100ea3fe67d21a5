//! Far control transfers: JMP, CALL, RET and IRET (SDM vol. 3, 5.8 and 6.12; vol. 2). Interrupts are in [`crate::exception`],
//! task switches in [`crate::task`], SYSCALL and its like in [`crate::syscall`].

use std::sync::atomic::Ordering::Relaxed;

use iced_x86::OpKind;
use lodger_x86::bits::{RFlags, STATUS_FLAGS};
use lodger_x86::paging::Access;
use lodger_x86::{Exception, Segment};

use crate::cpu::{Cpu, Event, Exec, Stop, gpr, seg};
use crate::frame::Frame;
use crate::memory::canonical;
use crate::op::Op;
use crate::segment::{Descriptor, is_null, rpl, system_type};
use crate::task::Switch;

/// The flags that exist and are not constant, but for VIF and VIP, which need virtual-8086 mode extensions.
pub const WRITABLE_FLAGS: u64 = 0x0027_7fd5;

/// Where a far transfer goes.
#[derive(Clone, Copy)]
struct Target {
    code: Segment,
    rip: u64,
}

/// Reads the far pointer operand: selector and offset of `size` bytes.
pub fn far_pointer(c: &mut Cpu, op: &Op, size: u64) -> Exec<(u16, u64)> {
    let linear = c.operand(op, size + 2, Access::Read)?;
    let offset = match size {
        2 => c.read::<u16>(linear, op.seg)?.into(),
        4 => c.read::<u32>(linear, op.seg)?.into(),
        _ => c.read::<u64>(linear, op.seg)?,
    };
    let at = c.wrap(linear.wrapping_add(size));
    Ok((c.read::<u16>(at, op.seg)?, offset))
}

/// Far JMP and CALL, `size` the operand size in bytes.
pub fn jump_or_call(c: &mut Cpu, op: &Op, size: u64, call: bool) -> Exec {
    let i = &op.rare().instruction;
    let (selector, rip) = match i.op0_kind() {
        OpKind::FarBranch16 => (i.far_branch_selector(), i.far_branch16().into()),
        OpKind::FarBranch32 => (i.far_branch_selector(), i.far_branch32().into()),
        _ => far_pointer(c, op, size)?,
    };
    let stack = Frame::current(c, size);
    if c.unprotected() {
        let code = c.unprotected_code(selector);
        return same_level(c, Target { code, rip }, call.then_some(stack));
    }
    if is_null(selector) {
        return c.gp0();
    }
    let bad = Exception::gp(selector);
    let descriptor = c.descriptor(selector, bad)?;
    let gate = descriptor.segment();
    if gate.is_code_or_data() {
        let code = c.same_level_code(&descriptor)?;
        return same_level(c, Target { code, rip }, call.then_some(stack));
    }
    let long = c.long_mode();
    let size = match gate.kind() {
        system_type::CALL_GATE32 if long => 8,
        system_type::CALL_GATE32 => 4,
        _ => 2,
    };
    let valid = match gate.kind() {
        system_type::CALL_GATE32 => true,
        system_type::CALL_GATE16 | system_type::TASK_GATE => !long,
        system_type::TSS16 | system_type::TSS32 => !long,
        _ => false,
    };
    if !valid || gate.dpl() < c.cpl.max(rpl(selector)) {
        return c.raise(bad);
    }
    if !gate.is_present() {
        return c.raise(Exception::np(selector));
    }
    let switch = if call { Switch::Call } else { Switch::Jump };
    match gate.kind() {
        system_type::CALL_GATE16 | system_type::CALL_GATE32 => {
            call_gate(c, &descriptor, size, call)
        }
        system_type::TASK_GATE => {
            let tss = c.available_task((descriptor.raw >> 16) as u16)?;
            c.switch_task_for_instruction(&tss, switch)
        }
        _ => c.switch_task_for_instruction(&descriptor, switch),
    }
}

/// Goes to `target` at the current privilege level; with a stack it is a call.
fn same_level(c: &mut Cpu, target: Target, stack: Option<Frame>) -> Exec {
    c.check_target(&target.code, target.rip)?;
    if let Some(mut frame) = stack {
        frame.push(c, c.segments[seg::CS as usize].selector.into())?;
        frame.push(c, c.rip())?;
        c.regs[gpr::RSP as usize] = frame.sp;
    }
    c.go(target.code, target.rip)
}

/// Through a call gate, which is present and may be used; `size` is that of its pushes.
fn call_gate(c: &mut Cpu, gate: &Descriptor, size: u64, call: bool) -> Exec {
    let mut rip = gate.raw & 0xffff;
    if size > 2 {
        rip |= gate.raw >> 32 & 0xffff_0000;
    }
    if size == 8 {
        rip |= c.upper_half(gate, Exception::gp(gate.selector))? << 32;
    }
    let selector = (gate.raw >> 16) as u16;
    if is_null(selector) {
        return c.gp0();
    }
    let bad = Exception::gp(selector);
    let descriptor = c.descriptor(selector, bad)?;
    let s = descriptor.segment();
    let right_mode = size < 8 || s.is_long() && !s.is_big();
    let reachable = s.dpl() <= c.cpl && (call || s.is_conforming() || s.dpl() == c.cpl);
    if !s.is_code() || !right_mode || !reachable {
        return c.raise(bad);
    }
    if !s.is_present() {
        return c.raise(Exception::np(selector));
    }
    let code = c.accessed(&descriptor)?;
    if !call || s.is_conforming() || s.dpl() == c.cpl {
        let stack = match size {
            8 => Frame::long(c.regs[gpr::RSP as usize], 8, false),
            _ => Frame::current(c, size),
        };
        return same_level(c, Target { code, rip }, call.then_some(stack));
    }
    let level = s.dpl();
    let (stack, mut frame) = c.inner_stack(level, 0, size)?;
    c.check_target(&code, rip)?;
    frame.push(c, c.segments[seg::SS as usize].selector.into())?;
    frame.push(c, c.regs[gpr::RSP as usize])?;
    let parameters = if size == 8 { 0 } else { gate.raw >> 32 & 31 };
    for i in (0..parameters).rev() {
        let parameter = c.popped(c.sp().wrapping_add(i * size), size)?;
        frame.push(c, parameter)?;
    }
    frame.push(c, c.segments[seg::CS as usize].selector.into())?;
    frame.push(c, c.rip())?;
    c.segments[seg::SS as usize] = stack;
    c.regs[gpr::RSP as usize] = frame.sp;
    c.go_at_level(code, rip, level)
}

/// Far RET, releasing `release` bytes of parameters.
pub fn ret(c: &mut Cpu, size: u64, release: u64) -> Exec {
    let sp = c.sp();
    let rip = c.popped(sp, size)?;
    let selector = c.popped(sp.wrapping_add(size), size)? as u16;
    let past = sp.wrapping_add(2 * size).wrapping_add(release);
    if c.unprotected() {
        let code = c.unprotected_code(selector);
        c.check_target(&code, rip)?;
        c.set_sp(past);
        return c.go(code, rip);
    }
    let target = c.return_target(selector, rip)?;
    if rpl(selector) == c.cpl {
        c.set_sp(past);
        return c.go(target.code, target.rip);
    }
    let new_sp = c.popped(past, size)?;
    let new_ss = c.popped(past.wrapping_add(size), size)? as u16;
    let stack = c.return_stack(new_ss, &target.code)?;
    c.go_outward(target, stack, new_sp.wrapping_add(release));
    Err(Stop::EndBlock)
}

/// IRET, IRETD, IRETQ.
pub fn iret(c: &mut Cpu, size: u64) -> Exec {
    let nested = c.flag(RFlags::NT) && !c.unprotected();
    if nested && c.long_mode() {
        return c.gp0();
    }
    if nested {
        let tss = c.previous_task()?;
        c.nmi_unblocked();
        return c.switch_task_for_instruction(&tss, Switch::Return);
    }
    if c.v86() && c.iopl() < 3 {
        return c.gp0();
    }
    let sp = c.sp();
    let rip = c.popped(sp, size)?;
    let selector = c.popped(sp.wrapping_add(size), size)? as u16;
    let image = c.popped(sp.wrapping_add(2 * size), size)?;
    let past = sp.wrapping_add(3 * size);
    if c.unprotected() {
        let code = c.unprotected_code(selector);
        c.check_target(&code, rip)?;
        c.set_sp(past);
        c.flags = c.restored_flags(image, size, true);
        c.nmi_unblocked();
        return c.go(code, rip);
    }
    if image & RFlags::VM.bits() != 0 && size == 4 && c.cpl == 0 && !c.long_mode() {
        return return_to_v86(c, rip, selector, image, past);
    }
    let target = c.return_target(selector, rip)?;
    let flags = c.restored_flags(image, size, true);
    if rpl(selector) == c.cpl && !c.long64() {
        c.set_sp(past);
        c.flags = flags;
        c.nmi_unblocked();
        return c.go(target.code, target.rip);
    }
    let new_sp = c.popped(past, size)?;
    let new_ss = c.popped(past.wrapping_add(size), size)? as u16;
    let stack = c.return_stack(new_ss, &target.code)?;
    c.flags = flags;
    c.nmi_unblocked();
    c.go_outward(target, stack, new_sp);
    Err(Stop::EndBlock)
}

/// The nine words of a frame that returns to virtual-8086 mode; `sp`: what follows the flags.
fn return_to_v86(c: &mut Cpu, rip: u64, selector: u16, image: u64, sp: u64) -> Exec {
    let mut popped = [0; 6];
    for (i, value) in popped.iter_mut().enumerate() {
        *value = c.popped(sp.wrapping_add(4 * i as u64), 4)?;
    }
    let [esp, ss, es, ds, fs, gs] = popped;
    if rip > 0xffff {
        return c.gp0();
    }
    c.flags = image & WRITABLE_FLAGS | RFlags::FIXED.bits();
    let selectors = [
        es as u16, selector, ss as u16, ds as u16, fs as u16, gs as u16,
    ];
    for (reg, selector) in c.segments.iter_mut().zip(selectors) {
        *reg = v86_segment(selector);
    }
    c.regs[gpr::RSP as usize] = esp;
    c.set_rip(rip);
    c.nmi_unblocked();
    c.update_mode();
    Err(Stop::EndBlock)
}

/// A segment register in virtual-8086 mode.
pub fn v86_segment(selector: u16) -> Segment {
    Segment {
        attributes: 0xf3,
        ..Segment::real_mode(selector)
    }
}

/// PUSHF.
pub fn pushf(c: &mut Cpu, size: u64) -> Exec {
    if c.v86() && c.iopl() < 3 {
        return c.gp0();
    }
    let image = c.flags & !(RFlags::VM | RFlags::RF).bits();
    match size {
        2 => c.push(image as u16),
        4 => c.push(image as u32),
        _ => c.push(image),
    }
}

/// POPF.
pub fn popf(c: &mut Cpu, size: u64) -> Exec {
    if c.v86() && c.iopl() < 3 {
        return c.gp0();
    }
    let sp = c.sp();
    let image = c.popped(sp, size)?;
    let flags = c.restored_flags(image, size, false) & !RFlags::RF.bits();
    let watched = (RFlags::TF | RFlags::IF | RFlags::AC).bits();
    let significant = (flags ^ c.flags) & watched != 0 || flags & RFlags::TF.bits() != 0;
    c.flags = flags;
    c.set_sp(sp.wrapping_add(size));
    if significant {
        c.update_privilege();
        c.interrupts_may_come();
        return Err(Stop::EndBlock);
    }
    Ok(())
}

/// CLI.
pub fn cli(c: &mut Cpu) -> Exec {
    if c.cpl > c.iopl() {
        return c.gp0();
    }
    c.flags &= !RFlags::IF.bits();
    Ok(())
}

/// STI: interrupts stay off for one more instruction.
pub fn sti(c: &mut Cpu) -> Exec {
    if c.cpl > c.iopl() {
        return c.gp0();
    }
    if c.flag(RFlags::IF) {
        return Ok(());
    }
    c.flags |= RFlags::IF.bits();
    c.shadow = true;
    c.interrupts_may_come();
    Err(Stop::EndBlock)
}

/// INT n, INT3, INTO.
pub fn software_interrupt(c: &mut Cpu, vector: u8, int3: bool) -> Exec {
    instruction_event(c, Event::Software { vector, int3 })
}

/// Delivers an event that an instruction asks for: its faults are the instruction's.
pub fn instruction_event(c: &mut Cpu, event: Event) -> Exec {
    let later = c.deliver_event(event)?;
    c.raise_in_new_task(later);
    c.step_trap = false;
    Err(Stop::EndBlock)
}

impl Cpu {
    /// Reads `size` bytes at offset `sp` of the stack.
    pub(crate) fn popped(&mut self, sp: u64, size: u64) -> Exec<u64> {
        Ok(match size {
            2 => self.stack_read::<u16>(sp)?.into(),
            4 => self.stack_read::<u32>(sp)?.into(),
            _ => self.stack_read::<u64>(sp)?,
        })
    }

    /// CS in real or virtual-8086 mode.
    pub(crate) fn unprotected_code(&self, selector: u16) -> Segment {
        if self.v86() {
            return v86_segment(selector);
        }
        Segment {
            attributes: 0x9b,
            limit: self.segments[seg::CS as usize].limit,
            ..Segment::real_mode(selector)
        }
    }

    /// A target must be within its code segment or, in 64-bit mode, canonical.
    pub(crate) fn check_target(&mut self, code: &Segment, rip: u64) -> Exec {
        let valid = if self.long_mode() && code.is_long() {
            canonical(rip)
        } else {
            rip <= u64::from(code.limit)
        };
        if valid { Ok(()) } else { self.gp0() }
    }

    /// The code segment of a direct far JMP or CALL, which does not change the privilege level.
    fn same_level_code(&mut self, descriptor: &Descriptor) -> Exec<Segment> {
        let selector = descriptor.selector;
        let s = descriptor.segment();
        let reachable = if s.is_conforming() {
            s.dpl() <= self.cpl
        } else {
            s.dpl() == self.cpl && rpl(selector) <= self.cpl
        };
        if !s.is_code() || !reachable || self.long_mode() && s.is_long() && s.is_big() {
            return self.raise(Exception::gp(selector));
        }
        if !s.is_present() {
            return self.raise(Exception::np(selector));
        }
        self.accessed(descriptor)
    }

    /// Where a far RET or IRET in protected mode goes.
    fn return_target(&mut self, selector: u16, rip: u64) -> Exec<Target> {
        if is_null(selector) {
            return self.gp0();
        }
        let bad = Exception::gp(selector);
        let descriptor = self.descriptor(selector, bad)?;
        let s = descriptor.segment();
        let level = rpl(selector);
        let reachable = if s.is_conforming() {
            s.dpl() <= level
        } else {
            s.dpl() == level
        };
        let ambiguous = self.long_mode() && s.is_long() && s.is_big();
        if !s.is_code() || level < self.cpl || !reachable || ambiguous {
            return self.raise(bad);
        }
        if !s.is_present() {
            return self.raise(Exception::np(selector));
        }
        let rip = if self.long_mode() && s.is_long() {
            rip
        } else {
            rip & 0xffff_ffff
        };
        self.check_target(&s, rip)?;
        Ok(Target {
            code: self.accessed(&descriptor)?,
            rip,
        })
    }

    /// The stack of the code that a RET or IRET returns to.
    fn return_stack(&mut self, selector: u16, code: &Segment) -> Exec<Segment> {
        let level = rpl(code.selector);
        let null_ok = self.long_mode() && code.is_long() && level != 3;
        self.fetch_stack(selector, level, null_ok, Exception::gp)
    }

    /// Goes on at the current privilege level.
    pub(crate) fn go(&mut self, code: Segment, rip: u64) -> Exec {
        self.go_at_level(code, rip, self.cpl)
    }

    /// Goes on at a privilege level, whose stack has been set.
    pub(crate) fn go_at_level(&mut self, mut code: Segment, rip: u64, cpl: u8) -> Exec {
        if !self.unprotected() {
            code.selector = code.selector & !3 | u16::from(cpl);
        }
        self.segments[seg::CS as usize] = code;
        self.set_rip(rip);
        self.update_mode();
        Err(Stop::EndBlock)
    }

    /// Goes on at the privilege level of the target's RPL with another stack.
    fn go_outward(&mut self, target: Target, stack: Segment, sp: u64) {
        let long = self.long_mode() && target.code.is_long();
        let rsp = &mut self.regs[gpr::RSP as usize];
        *rsp = match (long, stack.is_big()) {
            (true, _) => sp,
            (false, true) => sp & 0xffff_ffff,
            (false, false) => *rsp & !0xffff | sp & 0xffff,
        };
        self.segments[seg::SS as usize] = stack;
        self.segments[seg::CS as usize] = target.code;
        self.set_rip(target.rip);
        let inner = self.cpl;
        self.update_mode();
        if self.cpl > inner {
            self.drop_inner_segments();
        }
    }

    /// RFLAGS after IRET (`rf`: RF is taken from it) or POPF of `image`.
    fn restored_flags(&self, image: u64, size: u64, rf: bool) -> u64 {
        let mut mask = STATUS_FLAGS | (RFlags::TF | RFlags::DF | RFlags::NT).bits();
        if size > 2 {
            mask |= (RFlags::AC | RFlags::ID).bits();
            mask |= if rf { RFlags::RF.bits() } else { 0 };
        }
        if self.cpl <= self.iopl() {
            mask |= RFlags::IF.bits();
        }
        if self.cpl == 0 {
            mask |= RFlags::IOPL.bits();
        }
        self.flags & !mask | image & mask
    }

    /// What IRET does besides: NMIs may come again, and IF may have been set.
    fn nmi_unblocked(&mut self) {
        self.nmi_blocked = false;
        self.interrupts_may_come();
    }

    /// After IF may have been set, NMIs unblocked or the task priority lowered: makes the run loop look if something is
    /// waiting for that. What arrives later makes it look anyway.
    pub(crate) fn interrupts_may_come(&mut self) {
        let interrupt = || self.lapic.pending().is_some() || self.vm.intr.load(Relaxed);
        self.check_events |= self.nmi_pending || self.flag(RFlags::IF) && interrupt();
    }
}
