//! Segmentation (SDM vol. 3, chapters 3 and 5): limit and type checks, loading segment registers, and the instructions
//! that look at descriptors.
//!
//! In real and virtual-8086 mode only limits are checked: a register keeps the limit it had in protected mode, and what
//! its type was does not matter.

use iced_x86::Mnemonic;
use lodger_x86::bits::RFlags;
use lodger_x86::paging::Access;
use lodger_x86::{Exception, Segment};

use crate::cpu::{Cpu, Exec, Stop, seg};
use crate::op::Op;
use crate::rare::{read_rm, register};

/// An entry of the GDT or LDT.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    /// By which selector it was found.
    pub selector: u16,
    /// Its linear address.
    pub address: u64,
    /// Its 8 bytes; system descriptors of long mode have 8 more.
    pub raw: u64,
}

impl Descriptor {
    /// Decoded. Type, DPL and P are also right for gates.
    pub fn segment(&self) -> Segment {
        Segment::from_descriptor(self.selector, self.raw)
    }

    /// The type of a system descriptor; `None` for code and data.
    pub fn system(&self) -> Option<u8> {
        let s = self.segment();
        (!s.is_code_or_data()).then_some(s.kind())
    }
}

/// Types of system descriptors (SDM vol. 3, table 3-2).
#[allow(missing_docs)]
pub mod system_type {
    pub const TSS16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS32: u8 = 9;
    pub const TSS32_BUSY: u8 = 11;
    pub const CALL_GATE32: u8 = 12;
    pub const INTERRUPT_GATE32: u8 = 14;
    pub const TRAP_GATE32: u8 = 15;
}

/// An entry of [`Cpu::flat`] with a bit for every [`Access`].
const ALL_ACCESSES: u8 = 7;

/// Whether a selector is null, whatever its RPL.
pub fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// The requested privilege level.
pub fn rpl(selector: u16) -> u8 {
    selector as u8 & 3
}

/// Whether `len` bytes at `offset` are within the segment's limit.
pub fn within(segment: &Segment, offset: u64, len: u64) -> bool {
    let last = offset.wrapping_add(len - 1);
    if segment.is_expand_down() {
        let top = if segment.is_big() {
            0xffff_ffff
        } else {
            0xffff
        };
        offset > u64::from(segment.limit) && last <= top
    } else {
        last <= u64::from(segment.limit)
    }
}

/// A register that was loaded with a null selector.
fn null(selector: u16) -> Segment {
    Segment {
        selector,
        ..Segment::default()
    }
}

impl Cpu {
    /// Neither types nor privileges are checked.
    pub(crate) fn unprotected(&self) -> bool {
        self.real_mode() || self.v86()
    }

    /// Faults unless `len` bytes at `segment:offset` may be accessed; outside of 64-bit mode.
    #[cold]
    pub fn segment_check(&mut self, segment: u8, offset: u64, len: u64, access: Access) -> Exec {
        let Some(s) = self.segments.get(segment as usize) else {
            return Ok(());
        };
        let typed = s.is_present()
            && match access {
                Access::Read => s.is_readable(),
                Access::Write => s.is_writable_data(),
                Access::Execute => s.is_code(),
            };
        if (typed || self.unprotected()) && within(s, offset, len) {
            return Ok(());
        }
        self.raise(match segment {
            seg::SS => Exception::SS0,
            _ => Exception::GP0,
        })
    }

    /// Brings `bases` and `flat` up to date. Needs `code` (64-bit mode or not).
    pub(crate) fn update_segments(&mut self) {
        if self.long64() {
            let base = |reg: u8| self.segments[reg as usize].base;
            self.bases = [0, 0, 0, 0, base(seg::FS), base(seg::GS), 0, 0];
            self.flat = [ALL_ACCESSES; 8];
            return;
        }
        for reg in 0..6 {
            self.update_segment(reg);
        }
        for none in 6..8 {
            self.bases[none] = 0;
            self.flat[none] = ALL_ACCESSES;
        }
    }

    /// The same for one register.
    fn update_segment(&mut self, reg: u8) {
        let s = &self.segments[reg as usize];
        if self.long64() {
            self.bases[reg as usize] = if reg < seg::FS { 0 } else { s.base };
            return;
        }
        let free = self.unprotected();
        let mut flat = 0;
        if s.limit == u32::MAX && !s.is_expand_down() && (s.is_present() || free) {
            let allowed = [
                (Access::Read, s.is_readable()),
                (Access::Write, s.is_writable_data()),
                (Access::Execute, s.is_code()),
            ];
            for (access, typed) in allowed {
                flat |= u8::from(typed || free) << access as u8;
            }
        }
        self.bases[reg as usize] = s.base;
        self.flat[reg as usize] = flat;
    }

    /// Linear address of a descriptor of `len` bytes, if it is within its table.
    fn descriptor_address(&self, selector: u16, len: u64) -> Option<u64> {
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        } else if self.ldtr.is_present() {
            (self.ldtr.base, u64::from(self.ldtr.limit))
        } else {
            return None;
        };
        let offset = u64::from(selector & 0xfff8);
        (offset + len - 1 <= limit).then(|| self.wrap(base.wrapping_add(offset)))
    }

    /// Reads a descriptor; `None` if it is outside of its table. Null selectors are the caller's matter.
    pub(crate) fn find_descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        let Some(address) = self.descriptor_address(selector, 8) else {
            return Ok(None);
        };
        let raw = self.read_system::<u64>(address)?;
        Ok(Some(Descriptor {
            selector,
            address,
            raw,
        }))
    }

    /// Reads a descriptor; outside of its table `missing` is raised.
    pub(crate) fn descriptor(&mut self, selector: u16, missing: Exception) -> Exec<Descriptor> {
        match self.find_descriptor(selector)? {
            Some(descriptor) => Ok(descriptor),
            None => self.raise(missing),
        }
    }

    /// The second half of a 16-byte system descriptor; long mode. The type field in it must be zero.
    pub(crate) fn upper_half(&mut self, descriptor: &Descriptor, bad: Exception) -> Exec<u64> {
        if self.descriptor_address(descriptor.selector, 16).is_none() {
            return self.raise(bad);
        }
        let upper = self.read_system::<u64>(descriptor.address.wrapping_add(8))?;
        if upper >> 40 & 0x1f != 0 {
            return self.raise(bad);
        }
        Ok(upper)
    }

    /// Sets bits of a descriptor's type in memory, if they are not set.
    pub(crate) fn set_type_bits(&mut self, descriptor: &Descriptor, bits: u8) -> Exec {
        if descriptor.raw >> 40 & u64::from(bits) == u64::from(bits) {
            return Ok(());
        }
        self.change_type_byte(descriptor, |byte| byte | bits)
    }

    /// Atomically replaces the type, DPL and P byte of a descriptor in memory.
    pub(crate) fn change_type_byte(
        &mut self,
        descriptor: &Descriptor,
        change: impl Fn(u8) -> u8,
    ) -> Exec {
        let address = self.wrap(descriptor.address.wrapping_add(5));
        self.as_system(|c| c.modify_at::<u8, ()>(address, seg::NONE, true, |b| (change(b), ())))
    }

    /// The decoded descriptor after its accessed bit was set.
    pub(crate) fn accessed(&mut self, descriptor: &Descriptor) -> Exec<Segment> {
        self.set_type_bits(descriptor, 1)?;
        let mut segment = descriptor.segment();
        segment.attributes |= 1;
        Ok(segment)
    }

    /// What `reg` (not CS) becomes when `selector` is loaded into it.
    pub(crate) fn fetch_segment(&mut self, reg: u8, selector: u16) -> Exec<Segment> {
        if self.v86() {
            return Ok(Segment {
                attributes: 0xf3,
                ..Segment::real_mode(selector)
            });
        }
        if self.real_mode() {
            let old = self.segments[reg as usize];
            let fresh = Segment::real_mode(selector);
            return Ok(if old.is_present() {
                Segment {
                    selector,
                    base: fresh.base,
                    ..old
                }
            } else {
                fresh
            });
        }
        if reg == seg::SS {
            let long = self.long64() && self.cpl < 3;
            return self.fetch_stack(selector, self.cpl, long, Exception::gp);
        }
        if is_null(selector) {
            return Ok(null(selector));
        }
        let bad = Exception::gp(selector);
        let descriptor = self.descriptor(selector, bad)?;
        let s = descriptor.segment();
        if !s.is_readable() {
            return self.raise(bad);
        }
        if !s.is_conforming() && s.dpl() < self.cpl.max(rpl(selector)) {
            return self.raise(bad);
        }
        if !s.is_present() {
            return self.raise(Exception::np(selector));
        }
        self.accessed(&descriptor)
    }

    /// The stack segment `selector` for privilege level `cpl`. A null one is good enough if `null_ok` and its RPL is right.
    /// `bad` makes the exception for a wrong one.
    pub(crate) fn fetch_stack(
        &mut self,
        selector: u16,
        cpl: u8,
        null_ok: bool,
        bad: fn(u16) -> Exception,
    ) -> Exec<Segment> {
        if is_null(selector) {
            if null_ok && rpl(selector) == cpl {
                return Ok(null_stack(selector, cpl));
            }
            return self.raise(bad(0));
        }
        let descriptor = self.descriptor(selector, bad(selector))?;
        let s = descriptor.segment();
        if rpl(selector) != cpl || !s.is_writable_data() || s.dpl() != cpl {
            return self.raise(bad(selector));
        }
        if !s.is_present() {
            return self.raise(Exception::ss(selector));
        }
        self.accessed(&descriptor)
    }

    /// Loads ES, SS, DS, FS or GS as MOV and its like do.
    pub fn load_segment(&mut self, reg: u8, selector: u16) -> Exec {
        let segment = self.fetch_segment(reg, selector)?;
        self.set_segment(reg, segment);
        Ok(())
    }

    /// Puts a checked segment into a register.
    pub(crate) fn set_segment(&mut self, reg: u8, segment: Segment) {
        self.segments[reg as usize] = segment;
        if reg == seg::SS || reg == seg::CS {
            self.update_mode();
        } else {
            self.update_segment(reg);
        }
    }

    /// After a return to an outer level: data segments that it may not use become null.
    pub(crate) fn drop_inner_segments(&mut self) {
        for reg in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let s = &self.segments[reg as usize];
            if s.is_present() && s.dpl() < self.cpl && !s.is_conforming() {
                self.segments[reg as usize] = null(0);
                self.update_segment(reg);
            }
        }
    }

    /// Makes the four data segment registers null (entry into ring 0 from virtual-8086 mode).
    pub(crate) fn drop_data_segments(&mut self) {
        for reg in [seg::ES, seg::DS, seg::FS, seg::GS] {
            self.segments[reg as usize] = null(0);
        }
    }
}

/// The null stack segment of 64-bit mode: its DPL is the CPL.
pub fn null_stack(selector: u16, cpl: u8) -> Segment {
    Segment {
        attributes: u16::from(cpl) << 5,
        ..null(selector)
    }
}

/// MOV Sreg, r/m16.
pub fn mov_to_segment(c: &mut Cpu, op: &Op) -> Exec {
    let reg = register(op, 0);
    let selector = read_rm::<u16>(c, op, 1)?;
    c.load_segment(reg, selector)?;
    stack_loaded(c, reg);
    Err(Stop::EndBlock)
}

/// MOV SS and POP SS hold off interrupts and traps, so that the load of RSP that follows is not separated from them. A single-step
/// trap is lost, a data breakpoint's comes later.
fn stack_loaded(c: &mut Cpu, reg: u8) {
    if reg == seg::SS {
        c.shadow = true;
        c.step_trap = false;
        c.held_debug = Some(0);
    }
}

/// PUSH Sreg at an operand size of `size` bytes.
pub fn push(c: &mut Cpu, op: &Op, size: u64) -> Exec {
    let selector = c.segments[register(op, 0) as usize].selector;
    match size {
        2 => c.push(selector),
        4 => c.push(u32::from(selector)),
        _ => c.push(u64::from(selector)),
    }
}

/// POP Sreg at an operand size of `size` bytes.
pub fn pop(c: &mut Cpu, op: &Op, size: u64) -> Exec {
    let reg = register(op, 0);
    let sp = c.sp();
    let selector = c.stack_read::<u16>(sp)?;
    let segment = c.fetch_segment(reg, selector)?;
    c.set_sp(sp.wrapping_add(size));
    c.set_segment(reg, segment);
    stack_loaded(c, reg);
    Err(Stop::EndBlock)
}

/// LDS, LES, LFS, LGS, LSS: the offset, `size` bytes, then the selector.
pub fn load_far_pointer(c: &mut Cpu, op: &Op, reg: u8, size: u64) -> Exec {
    let (selector, offset) = crate::transfer::far_pointer(c, op, size)?;
    c.load_segment(reg, selector)?;
    let to = register(op, 0);
    match size {
        2 => c.set(to, offset as u16),
        4 => c.set(to, offset as u32),
        _ => c.set(to, offset),
    }
    Err(Stop::EndBlock)
}

/// LLDT.
pub fn lldt(c: &mut Cpu, op: &Op) -> Exec {
    protected_only(c)?;
    privileged(c)?;
    let selector = read_rm::<u16>(c, op, 0)?;
    c.ldtr = fetch_ldt(c, selector, Exception::gp)?;
    Err(Stop::EndBlock)
}

/// What LDTR becomes; a wrong selector is `bad`, one that is not present #NP or, in a task switch, `bad` too.
pub fn fetch_ldt(c: &mut Cpu, selector: u16, bad: fn(u16) -> Exception) -> Exec<Segment> {
    if is_null(selector) {
        return Ok(null(selector));
    }
    if selector & 4 != 0 {
        return c.raise(bad(selector));
    }
    let descriptor = c.descriptor(selector, bad(selector))?;
    if descriptor.system() != Some(system_type::LDT) {
        return c.raise(bad(selector));
    }
    let mut ldt = descriptor.segment();
    if !ldt.is_present() {
        return c.raise(Exception::np(selector));
    }
    if c.long_mode() {
        ldt.base |= c.upper_half(&descriptor, bad(selector))? << 32;
    }
    Ok(ldt)
}

/// LTR.
pub fn ltr(c: &mut Cpu, op: &Op) -> Exec {
    protected_only(c)?;
    privileged(c)?;
    let selector = read_rm::<u16>(c, op, 0)?;
    if is_null(selector) {
        return c.gp0();
    }
    let bad = Exception::gp(selector);
    if selector & 4 != 0 {
        return c.raise(bad);
    }
    let descriptor = c.descriptor(selector, bad)?;
    match descriptor.system() {
        Some(system_type::TSS32) => {}
        Some(system_type::TSS16) if !c.long_mode() => {}
        _ => return c.raise(bad),
    }
    let mut tr = descriptor.segment();
    if !tr.is_present() {
        return c.raise(Exception::np(selector));
    }
    if c.long_mode() {
        tr.base |= c.upper_half(&descriptor, bad)? << 32;
    }
    c.set_type_bits(&descriptor, 2)?;
    tr.attributes |= 2;
    c.tr = tr;
    Err(Stop::EndBlock)
}

/// LAR, LSL, VERR, VERW: ZF tells whether the selector can be used so at this privilege level.
pub fn probe(c: &mut Cpu, op: &Op) -> Exec {
    use system_type::*;
    protected_only(c)?;
    let mnemonic = op.rare().instruction.mnemonic();
    let operand = u32::from(matches!(mnemonic, Mnemonic::Lar | Mnemonic::Lsl));
    let selector = read_rm::<u16>(c, op, operand)?;
    let mut found = None;
    if !is_null(selector)
        && let Some(descriptor) = c.find_descriptor(selector)?
    {
        let s = descriptor.segment();
        let long = c.long_mode();
        let right_type = match (mnemonic, descriptor.system()) {
            (Mnemonic::Verr, None) => s.is_readable(),
            (Mnemonic::Verw, None) => s.is_writable_data(),
            (Mnemonic::Verr | Mnemonic::Verw, Some(_)) => false,
            (_, None) | (_, Some(LDT | TSS32 | TSS32_BUSY)) => true,
            (_, Some(TSS16 | TSS16_BUSY)) => !long,
            (Mnemonic::Lar, Some(CALL_GATE32)) => true,
            (Mnemonic::Lar, Some(CALL_GATE16 | TASK_GATE)) => !long,
            _ => false,
        };
        let reachable = s.is_conforming() || s.dpl() >= c.cpl.max(rpl(selector));
        if right_type && reachable {
            found = Some(match mnemonic {
                Mnemonic::Lsl => s.limit,
                _ => (descriptor.raw >> 32) as u32 & 0x00f0_ff00,
            });
        }
    }
    let zf = RFlags::ZF.bits();
    let Some(value) = found else {
        c.flags &= !zf;
        return Ok(());
    };
    c.flags |= zf;
    if operand == 1 {
        match op.rare().instruction.op0_register().size() {
            2 => c.set(register(op, 0), value as u16),
            _ => c.set(register(op, 0), value),
        }
    }
    Ok(())
}

/// ARPL.
pub fn arpl(c: &mut Cpu, op: &Op) -> Exec {
    protected_only(c)?;
    let source = c.get::<u16>(register(op, 1));
    let adjust = |old: u16| {
        if old & 3 < source & 3 {
            (old & !3 | source & 3, true)
        } else {
            (old, false)
        }
    };
    let (new, adjusted) = adjust(read_rm(c, op, 0)?);
    match adjusted {
        // Not written, so it may be read-only.
        false => {}
        true if crate::rare::is_memory(op, 0) => c.store(op, new)?,
        true => c.set(register(op, 0), new),
    }
    c.flags = c.flags & !RFlags::ZF.bits() | u64::from(adjusted) << 6;
    Ok(())
}

/// #UD in real and virtual-8086 mode.
pub fn protected_only(c: &mut Cpu) -> Exec {
    if c.unprotected() { c.ud() } else { Ok(()) }
}

/// #GP(0) unless CPL is 0.
pub fn privileged(c: &mut Cpu) -> Exec {
    if c.cpl != 0 { c.gp0() } else { Ok(()) }
}
