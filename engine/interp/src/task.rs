//! Task-state segments: stacks of inner privilege levels, the I/O permission map, and hardware task switches
//! (SDM vol. 3, chapter 7; vol. 1, 18.5.2).

use lodger_x86::bits::{RFlags, cr0, dr6};
use lodger_x86::{Exception, Segment, Vector};

use crate::cpu::{Cpu, Event, Exec, Stop, gpr, seg};
use crate::frame::Frame;
use crate::segment::{Descriptor, fetch_ldt, is_null, null_stack, rpl, system_type, within};
use crate::transfer::{WRITABLE_FLAGS, v86_segment};

/// Why a task is switched to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// The old task ends.
    Jump,
    /// The old task waits for the new one's IRET.
    Call,
    /// An interrupt or exception: like a call.
    Interrupt,
    /// IRET with NT set: back to the task that waits.
    Return,
}

impl Switch {
    /// The new task is nested in the old one.
    fn nests(self) -> bool {
        matches!(self, Switch::Call | Switch::Interrupt)
    }
}

/// Where things are in a TSS.
struct Layout {
    /// Bytes of a general register or pointer.
    word: u64,
    /// The limit must be at least this.
    min_limit: u32,
    cr3: Option<u64>,
    ip: u64,
    flags: u64,
    registers: u64,
    segments: u64,
    /// Distance between two segment selectors.
    segment_step: u64,
    segment_count: usize,
    ldt: u64,
    trap: Option<u64>,
}

const LAYOUT16: Layout = Layout {
    word: 2,
    min_limit: 43,
    cr3: None,
    ip: 0x0e,
    flags: 0x10,
    registers: 0x12,
    segments: 0x22,
    segment_step: 2,
    segment_count: 4,
    ldt: 0x2a,
    trap: None,
};

const LAYOUT32: Layout = Layout {
    word: 4,
    min_limit: 103,
    cr3: Some(0x1c),
    ip: 0x20,
    flags: 0x24,
    registers: 0x28,
    segments: 0x48,
    segment_step: 4,
    segment_count: 6,
    ldt: 0x60,
    trap: Some(0x64),
};

impl Layout {
    fn of(tss: &Segment) -> &'static Layout {
        if tss.kind() & 8 != 0 {
            &LAYOUT32
        } else {
            &LAYOUT16
        }
    }
}

/// The dynamic part of a TSS.
struct Image {
    cr3: Option<u64>,
    ip: u64,
    flags: u64,
    registers: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Cpu {
    /// SS and ESP for an inner privilege level, from a 16- or 32-bit TSS.
    fn tss_stack(&mut self, level: u8) -> Exec<(u16, u64)> {
        let layout = Layout::of(&self.tr);
        let word = layout.word;
        let offset = word + 2 * word * u64::from(level);
        if offset + word + 1 > u64::from(self.tr.limit) {
            return self.raise(Exception::ts(self.tr.selector));
        }
        let sp = self.tss_word(offset, word)?;
        let ss = self.tss_word(offset + word, 2)? as u16;
        Ok((ss, sp))
    }

    /// RSP for a privilege level or, if `ist` is not zero, of that interrupt stack, from a 64-bit TSS.
    pub(crate) fn tss_stack64(&mut self, level: u8, ist: u8) -> Exec<u64> {
        let offset = match ist {
            0 => 4 + 8 * u64::from(level),
            _ => 0x1c + 8 * u64::from(ist),
        };
        if offset + 7 > u64::from(self.tr.limit) {
            return self.raise(Exception::ts(self.tr.selector));
        }
        self.tss_word(offset, 8)
    }

    /// SS and the stack for pushes of `size` bytes at an inner privilege level; `ist` as in a 64-bit interrupt gate.
    pub(crate) fn inner_stack(&mut self, level: u8, ist: u8, size: u64) -> Exec<(Segment, Frame)> {
        if self.long_mode() {
            let rsp = self.tss_stack64(level, ist)?;
            let stack = null_stack(level.into(), level);
            return Ok((stack, Frame::long(rsp, size, true)));
        }
        let (ss, sp) = self.tss_stack(level)?;
        let stack = self.fetch_stack(ss, level, false, Exception::ts)?;
        Ok((stack, Frame::inner(stack, sp, size)))
    }

    /// Reads 2, 4 or 8 bytes of the current TSS.
    fn tss_word(&mut self, offset: u64, size: u64) -> Exec<u64> {
        self.word_at(self.tr.base, offset, size)
    }

    fn word_at(&mut self, base: u64, offset: u64, size: u64) -> Exec<u64> {
        let linear = base.wrapping_add(offset);
        Ok(match size {
            2 => self.read_system::<u16>(linear)?.into(),
            4 => self.read_system::<u32>(linear)?.into(),
            _ => self.read_system::<u64>(linear)?,
        })
    }

    fn set_word_at(&mut self, base: u64, offset: u64, size: u64, value: u64) -> Exec {
        let linear = base.wrapping_add(offset);
        match size {
            2 => self.write_system(linear, value as u16),
            _ => self.write_system(linear, value as u32),
        }
    }

    /// #GP(0) unless `size` bytes at `port` may be accessed.
    pub fn check_port(&mut self, port: u16, size: u8) -> Exec {
        if self.real_mode() || self.cpl <= self.iopl() && !self.v86() {
            return Ok(());
        }
        let limit = u64::from(self.tr.limit);
        if self.tr.kind() & 8 == 0 || !self.tr.is_present() || limit < 103 {
            return self.gp0();
        }
        let byte = self.tss_word(0x66, 2)? + u64::from(port / 8);
        // Two bytes are always read, so that the map needs a byte after its end.
        if byte + 1 > limit {
            return self.gp0();
        }
        let mask = (1 << size) - 1;
        if self.tss_word(byte, 2)? >> (port & 7) & mask != 0 {
            return self.gp0();
        }
        Ok(())
    }

    /// The TSS that a task gate names; #GP if it is not there or busy.
    pub(crate) fn available_task(&mut self, selector: u16) -> Exec<Descriptor> {
        self.task(selector, Exception::gp, 0)
    }

    /// The task that the current one is nested in; #TS if it is not there or not busy.
    pub(crate) fn previous_task(&mut self) -> Exec<Descriptor> {
        let link = self.tss_word(0, 2)? as u16;
        self.task(link, Exception::ts, 2)
    }

    fn task(&mut self, selector: u16, bad: fn(u16) -> Exception, busy: u8) -> Exec<Descriptor> {
        if selector & 4 != 0 || is_null(selector) {
            return self.raise(bad(selector));
        }
        let descriptor = self.descriptor(selector, bad(selector))?;
        let available = [system_type::TSS16 | busy, system_type::TSS32 | busy];
        if !descriptor.system().is_some_and(|t| available.contains(&t)) {
            return self.raise(bad(selector));
        }
        if !descriptor.segment().is_present() {
            return self.raise(Exception::np(selector));
        }
        Ok(descriptor)
    }

    /// [`Cpu::switch_task`] by an instruction. A fault that belongs to the new task is left for the run loop, as that
    /// instruction is complete.
    pub(crate) fn switch_task_for_instruction(&mut self, tss: &Descriptor, switch: Switch) -> Exec {
        let later = self.switch_task(tss, switch, self.flags, None)?;
        self.raise_in_new_task(later);
        Err(Stop::EndBlock)
    }

    /// Leaves a fault of a new task for the run loop.
    pub(crate) fn raise_in_new_task(&mut self, exception: Option<Exception>) {
        if let Some(exception) = exception {
            self.delivering = Some(Event::Exception(exception));
            self.check_events = true;
        }
    }

    /// Switches to the task with descriptor `tss`, whose type, privilege and presence have been checked. `flags` is what the
    /// old task will find; `error` goes onto the new task's stack.
    ///
    /// A fault before the new registers are in place is raised; a later one belongs to the new task and is returned.
    pub(crate) fn switch_task(
        &mut self,
        tss: &Descriptor,
        switch: Switch,
        flags: u64,
        error: Option<u32>,
    ) -> Exec<Option<Exception>> {
        let bad = Exception::ts(tss.selector);
        let mut new = tss.segment();
        let layout = Layout::of(&new);
        if new.limit < layout.min_limit {
            return self.raise(bad);
        }
        let image = self.read_task(new.base, layout)?;
        let mut paging = self.paging();
        if let (Some(cr3), true) = (image.cr3, paging.enabled()) {
            paging.cr3 = cr3;
            if paging.is_pae32() {
                match paging.load_pdptes(&self.vm.ram) {
                    Some(pdptes) => paging.pdptes = pdptes,
                    None => return self.raise(bad),
                }
            }
        }

        let nested = RFlags::NT.bits();
        let flags = if switch == Switch::Return {
            flags & !nested
        } else {
            flags
        };
        self.save_task(flags)?;
        if switch.nests() {
            self.set_word_at(new.base, 0, 2, self.tr.selector.into())?;
        } else if let Some(old) = self.find_descriptor(self.tr.selector)? {
            self.change_type_byte(&old, |b| b & !2)?;
        }
        if switch != Switch::Return {
            self.set_type_bits(tss, 2)?;
        }

        // From here on the new task runs.
        new.attributes |= 2;
        self.tr = new;
        if paging.cr3 != self.cr3 {
            let old = std::mem::replace(&mut self.cr3, paging.cr3);
            self.pdptes = paging.pdptes;
            self.switch_space(old, false);
        }
        self.cr0 |= cr0::TS;
        // The local enable bits.
        self.dr7 &= !0x155;
        let mut flags = image.flags & WRITABLE_FLAGS | RFlags::FIXED.bits();
        if switch.nests() {
            flags |= nested;
        }
        self.flags = flags;
        self.set_rip(image.ip);
        for (i, value) in image.registers.into_iter().enumerate() {
            self.regs[i] = value;
        }
        match self.load_task_segments(&image) {
            Ok(()) => {}
            // Descriptor tables in device memory: there is nothing to repeat any more.
            Err(Stop::Io) => return Ok(Some(bad)),
            Err(_) => return Ok(Some(self.fault)),
        }
        if let Some(error) = error {
            let mut frame = Frame::current(self, layout.word);
            match frame.push(self, error.into()) {
                Ok(()) => self.regs[gpr::RSP as usize] = frame.sp,
                Err(Stop::Io) => return Ok(Some(Exception::SS0)),
                Err(_) => return Ok(Some(self.fault)),
            }
        }
        if image.trap {
            self.dr6 |= dr6::BT;
            return Ok(Some(Exception::plain(Vector::Debug)));
        }
        Ok(None)
    }

    fn read_task(&mut self, base: u64, layout: &Layout) -> Exec<Image> {
        let mut registers = [0; 8];
        for (i, value) in registers.iter_mut().enumerate() {
            let offset = layout.registers + layout.word * i as u64;
            *value = self.word_at(base, offset, layout.word)?;
            if layout.word == 2 {
                // The upper halves are undefined after a switch to a 16-bit task; real processors set them.
                *value |= 0xffff_0000;
            }
        }
        let mut selectors = [0; 6];
        for (i, value) in selectors.iter_mut().enumerate().take(layout.segment_count) {
            let offset = layout.segments + layout.segment_step * i as u64;
            *value = self.word_at(base, offset, 2)? as u16;
        }
        Ok(Image {
            cr3: match layout.cr3 {
                Some(offset) => Some(self.word_at(base, offset, 4)?),
                None => None,
            },
            ip: self.word_at(base, layout.ip, layout.word)?,
            flags: self.word_at(base, layout.flags, layout.word)?,
            registers,
            selectors,
            ldt: self.word_at(base, layout.ldt, 2)? as u16,
            trap: match layout.trap {
                Some(offset) => self.word_at(base, offset, 2)? & 1 != 0,
                None => false,
            },
        })
    }

    /// Writes the current task's registers into its TSS.
    fn save_task(&mut self, flags: u64) -> Exec {
        let layout = Layout::of(&self.tr);
        let (base, word) = (self.tr.base, layout.word);
        self.set_word_at(base, layout.ip, word, self.rip())?;
        self.set_word_at(base, layout.flags, word, flags)?;
        for i in 0..8 {
            let offset = layout.registers + word * i as u64;
            self.set_word_at(base, offset, word, self.regs[i])?;
        }
        for i in 0..layout.segment_count {
            let offset = layout.segments + layout.segment_step * i as u64;
            self.set_word_at(base, offset, 2, self.segments[i].selector.into())?;
        }
        Ok(())
    }

    /// Loads LDTR and the segment registers of a new task, whose flags are in place.
    fn load_task_segments(&mut self, image: &Image) -> Exec {
        // Until it is checked every register holds its selector and nothing else.
        for (segment, &selector) in self.segments.iter_mut().zip(&image.selectors) {
            *segment = Segment {
                selector,
                ..Segment::default()
            };
        }
        let level = rpl(image.selectors[seg::CS as usize]);
        self.segments[seg::SS as usize].attributes = u16::from(level) << 5;
        self.ldtr = Segment {
            selector: image.ldt,
            ..Segment::default()
        };
        if self.v86() {
            for (segment, &selector) in self.segments.iter_mut().zip(&image.selectors) {
                *segment = v86_segment(selector);
            }
        }
        self.update_mode();
        self.ldtr = match fetch_ldt(self, image.ldt, Exception::ts) {
            Ok(ldt) => ldt,
            Err(Stop::Fault) if self.fault == Exception::np(image.ldt) => {
                return self.raise(Exception::ts(image.ldt));
            }
            Err(other) => return Err(other),
        };
        if self.v86() {
            return Ok(());
        }

        let selector = image.selectors[seg::CS as usize];
        let bad = Exception::ts(selector);
        if is_null(selector) {
            return self.raise(bad);
        }
        let descriptor = self.descriptor(selector, bad)?;
        let s = descriptor.segment();
        let reachable = if s.is_conforming() {
            s.dpl() <= level
        } else {
            s.dpl() == level
        };
        if !s.is_code() || !reachable {
            return self.raise(bad);
        }
        if !s.is_present() {
            return self.raise(Exception::np(selector));
        }
        let code = self.accessed(&descriptor)?;
        let ss = image.selectors[seg::SS as usize];
        let stack = self.fetch_stack(ss, level, false, Exception::ts)?;
        self.segments[seg::CS as usize] = code;
        self.segments[seg::SS as usize] = stack;
        self.update_mode();
        for reg in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let selector = image.selectors[reg as usize];
            match self.load_segment(reg, selector) {
                Err(Stop::Fault) if self.fault == Exception::gp(selector) => {
                    return self.raise(Exception::ts(selector));
                }
                other => other?,
            }
        }
        if !within(&code, self.rip(), 1) {
            return self.gp0();
        }
        Ok(())
    }
}
