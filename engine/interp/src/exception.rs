//! Delivery of exceptions and interrupts through the interrupt descriptor table (SDM vol. 3, chapter 6; real mode: 20.1.4).
//!
//! One attempt: a fault on the way is raised like any other, and the run loop combines it with the event. Registers
//! change only after the last memory access, as delivery is repeated from its start when the device outside had to be asked.

use lodger_x86::bits::{RFlags, dr7};
use lodger_x86::{Exception, Segment, Vector};

use crate::cpu::{Cpu, Event, Exec, Stop, gpr, seg};
use crate::frame::Frame;
use crate::segment::{is_null, system_type};
use crate::task::Switch;

impl Event {
    fn vector(self) -> u8 {
        match self {
            Event::Exception(e) => e.vector as u8,
            Event::Software { vector, .. } | Event::External(vector) => vector,
            Event::Nmi => Vector::Nmi as u8,
        }
    }

    fn is_software(self) -> bool {
        matches!(self, Event::Software { .. })
    }

    fn error(self) -> Option<u32> {
        match self {
            Event::Exception(e) => e.error,
            _ => None,
        }
    }

    /// Whether RF is set in the flags that are pushed: fault-class exceptions, so that an instruction breakpoint on the
    /// faulting instruction is not met twice (SDM vol. 3, 17.3.1.1).
    fn sets_rf(self) -> bool {
        use Vector::*;
        match self {
            Event::Exception(e) => !matches!(
                e.vector,
                Debug | Nmi | Breakpoint | Overflow | DoubleFault | MachineCheck
            ),
            _ => false,
        }
    }
}

/// The vectors whose error code is a selector or vector with the EXT bit.
fn has_ext_bit(vector: Vector) -> bool {
    use Vector::*;
    matches!(
        vector,
        InvalidTss | SegmentNotPresent | StackFault | GeneralProtection
    )
}

impl Cpu {
    /// Delivers an event to its handler. RIP is the return address.
    pub fn deliver(&mut self, event: Event) -> Exec {
        match self.deliver_event(event)? {
            None => Ok(()),
            Some(exception) => self.raise(exception),
        }
    }

    /// The same, telling apart a fault in the handler's new task, whose registers are then in place already.
    pub(crate) fn deliver_event(&mut self, event: Event) -> Exec<Option<Exception>> {
        if let Event::Exception(e) = event
            && e.vector == Vector::PageFault
        {
            self.cr2 = e.address;
        }
        let result = if self.real_mode() {
            self.deliver_real(event.vector())
        } else if self.long_mode() {
            self.deliver_long(event)
        } else {
            self.deliver_protected(event)
        };
        let external = |mut e: Exception| {
            if !event.is_software() && has_ext_bit(e.vector) {
                e.error = e.error.map(|code| code | 1);
            }
            e
        };
        match result {
            Err(Stop::Fault) => {
                self.fault = external(self.fault);
                if self.fault.vector == Vector::PageFault {
                    self.cr2 = self.fault.address;
                }
                Err(Stop::Fault)
            }
            Err(other) => Err(other),
            Ok(later) => {
                self.shadow = false;
                self.held_debug = None;
                match event {
                    Event::Nmi => self.nmi_blocked = true,
                    Event::Exception(e) if e.vector == Vector::Debug => {
                        self.dr7 &= !dr7::GD;
                        self.update_privilege();
                    }
                    _ => {}
                }
                Ok(later.map(external))
            }
        }
    }

    /// The flags as the handler finds them on its stack.
    fn saved_flags(&self, event: Event) -> u64 {
        let resumes = event.sets_rf() || self.repeating;
        self.flags | if resumes { RFlags::RF.bits() } else { 0 }
    }

    fn deliver_real(&mut self, vector: u8) -> Exec<Option<Exception>> {
        let offset = u64::from(vector) * 4;
        if offset + 3 > u64::from(self.idtr.limit) {
            return self.raise(in_idt(Vector::GeneralProtection, vector));
        }
        let pointer = self.read_system::<u32>(self.idtr.base.wrapping_add(offset))?;
        let code = self.unprotected_code((pointer >> 16) as u16);
        let rip = u64::from(pointer & 0xffff);
        self.check_target(&code, rip)?;
        let mut frame = Frame::current(self, 2);
        frame.push(self, self.flags)?;
        frame.push(self, self.segments[seg::CS as usize].selector.into())?;
        frame.push(self, self.rip())?;
        self.flags &= !(RFlags::IF | RFlags::TF | RFlags::AC | RFlags::RF).bits();
        self.enter(code, rip, 0, frame.sp);
        Ok(None)
    }

    fn deliver_protected(&mut self, event: Event) -> Exec<Option<Exception>> {
        use system_type::*;
        let vector = event.vector();
        let v86 = self.v86();
        if let Event::Software { int3: false, .. } = event
            && v86
            && self.iopl() < 3
        {
            return self.gp0();
        }
        let (raw, gate) = self.gate(event, 8)?;
        match gate.kind() {
            TASK_GATE | INTERRUPT_GATE16 | TRAP_GATE16 | INTERRUPT_GATE32 | TRAP_GATE32 => {}
            _ => return self.raise(in_idt(Vector::GeneralProtection, vector)),
        }
        self.check_gate(event, &gate)?;
        if gate.kind() == TASK_GATE {
            let tss = self.available_task((raw >> 16) as u16)?;
            let flags = self.saved_flags(event);
            return self.switch_task(&tss, Switch::Interrupt, flags, event.error());
        }
        let size = if gate.kind() >= INTERRUPT_GATE32 {
            4
        } else {
            2
        };
        let mut rip = raw & 0xffff;
        if size == 4 {
            rip |= raw >> 32 & 0xffff_0000;
        }
        let code = self.handler_code((raw >> 16) as u16)?;
        let inner = !code.is_conforming() && code.dpl() < self.cpl;
        if v86 && (!inner || code.dpl() != 0) {
            return self.raise(Exception::gp(code.selector));
        }
        let (stack, mut frame) = if inner {
            self.inner_stack(code.dpl(), 0, size)?
        } else {
            (self.segments[seg::SS as usize], Frame::current(self, size))
        };
        self.check_target(&code, rip)?;
        if v86 {
            for reg in [seg::GS, seg::FS, seg::DS, seg::ES] {
                frame.push(self, self.segments[reg as usize].selector.into())?;
            }
        }
        if inner {
            frame.push(self, self.segments[seg::SS as usize].selector.into())?;
            frame.push(self, self.regs[gpr::RSP as usize])?;
        }
        self.push_return(&mut frame, event)?;
        let level = if inner { code.dpl() } else { self.cpl };
        self.handler_flags(gate.kind());
        if v86 {
            self.drop_data_segments();
        }
        self.segments[seg::SS as usize] = stack;
        self.enter(code, rip, level, frame.sp);
        Ok(None)
    }

    fn deliver_long(&mut self, event: Event) -> Exec<Option<Exception>> {
        let (raw, gate) = self.gate(event, 16)?;
        let vector = event.vector();
        if !matches!(
            gate.kind(),
            system_type::INTERRUPT_GATE32 | system_type::TRAP_GATE32
        ) {
            return self.raise(in_idt(Vector::GeneralProtection, vector));
        }
        self.check_gate(event, &gate)?;
        let upper = self.idtr.base.wrapping_add(u64::from(vector) * 16 + 8);
        let upper = self.read_system::<u64>(upper)?;
        let rip = raw & 0xffff | raw >> 32 & 0xffff_0000 | upper << 32;
        let code = self.handler_code((raw >> 16) as u16)?;
        if !code.is_long() || code.is_big() {
            return self.raise(Exception::gp(code.selector));
        }
        let inner = !code.is_conforming() && code.dpl() < self.cpl;
        let level = if inner { code.dpl() } else { self.cpl };
        let ist = (raw >> 32 & 7) as u8;
        let old = self.segments[seg::SS as usize];
        let (stack, mut frame) = if inner {
            self.inner_stack(level, ist, 8)?
        } else if ist != 0 {
            let rsp = self.tss_stack64(level, ist)?;
            (old, Frame::long(rsp, 8, false))
        } else {
            (old, Frame::long(self.regs[gpr::RSP as usize], 8, false))
        };
        frame.sp &= !15;
        self.check_target(&code, rip)?;
        frame.push(self, old.selector.into())?;
        frame.push(self, self.regs[gpr::RSP as usize])?;
        self.push_return(&mut frame, event)?;
        self.handler_flags(gate.kind());
        self.segments[seg::SS as usize] = stack;
        self.enter(code, rip, level, frame.sp);
        Ok(None)
    }

    /// Reads the first half of a gate of `size` bytes.
    fn gate(&mut self, event: Event, size: u64) -> Exec<(u64, Segment)> {
        let vector = event.vector();
        let offset = u64::from(vector) * size;
        if offset + size - 1 > u64::from(self.idtr.limit) {
            return self.raise(in_idt(Vector::GeneralProtection, vector));
        }
        let raw = self.read_system::<u64>(self.idtr.base.wrapping_add(offset))?;
        let gate = Segment::from_descriptor(0, raw);
        if gate.is_code_or_data() {
            return self.raise(in_idt(Vector::GeneralProtection, vector));
        }
        Ok((raw, gate))
    }

    /// Software interrupts need a gate that is open to them; any gate must be present.
    fn check_gate(&mut self, event: Event, gate: &Segment) -> Exec {
        let vector = event.vector();
        if event.is_software() && gate.dpl() < self.cpl {
            return self.raise(in_idt(Vector::GeneralProtection, vector));
        }
        if !gate.is_present() {
            return self.raise(in_idt(Vector::SegmentNotPresent, vector));
        }
        Ok(())
    }

    /// The code segment of a handler.
    fn handler_code(&mut self, selector: u16) -> Exec<Segment> {
        if is_null(selector) {
            return self.gp0();
        }
        let bad = Exception::gp(selector);
        let descriptor = self.descriptor(selector, bad)?;
        let s = descriptor.segment();
        if !s.is_code() || s.dpl() > self.cpl {
            return self.raise(bad);
        }
        if !s.is_present() {
            return self.raise(Exception::np(selector));
        }
        self.accessed(&descriptor)
    }

    fn push_return(&mut self, frame: &mut Frame, event: Event) -> Exec {
        frame.push(self, self.saved_flags(event))?;
        frame.push(self, self.segments[seg::CS as usize].selector.into())?;
        frame.push(self, self.rip())?;
        match event.error() {
            Some(error) => frame.push(self, error.into()),
            None => Ok(()),
        }
    }

    /// The flags with which a handler begins; `kind`: of its gate.
    fn handler_flags(&mut self, kind: u8) {
        self.flags &= !(RFlags::TF | RFlags::NT | RFlags::VM | RFlags::RF).bits();
        if kind & 1 == 0 {
            self.flags &= !RFlags::IF.bits();
        }
    }

    /// Goes on in the handler.
    fn enter(&mut self, code: Segment, rip: u64, level: u8, sp: u64) {
        self.regs[gpr::RSP as usize] = sp;
        // The end of the block is no news to the run loop.
        let _ = self.go_at_level(code, rip, level);
    }
}

/// An exception whose error code names an entry of the IDT.
fn in_idt(exception: Vector, vector: u8) -> Exception {
    Exception::with_code(exception, u32::from(vector) * 8 + 2)
}
