//! Control and debug registers, EFER, and what must be flushed when they change (SDM vol. 3, 2.5, 4.10.4, 9.8.5, 17.2).

use lodger_x86::bits::{cr0, cr4, dr6, dr7, efer};
use lodger_x86::{Exception, Vector};

use crate::cpu::{Cpu, Exec, Stop, seg};
use crate::op::Op;
use crate::rare::{read_rm, register, write_system_word};
use crate::segment::privileged;
use crate::translator::Switch;

impl Cpu {
    /// Drops all translations, of all address spaces.
    pub fn flush_all(&mut self) {
        let space = self.space();
        self.tlb.flush();
        self.tlb.switch(space, false);
        self.blocks.all_mappings_changed();
        self.changes.everything();
        self.changes.switch(Switch {
            space,
            keep: false,
            same_tables: false,
        });
    }

    /// The process-context identifier: which address space translations that are not global belong to.
    fn space(&self) -> u16 {
        match self.cr4 & cr4::PCIDE {
            0 => 0,
            _ => self.cr3 as u16 & 0xfff,
        }
    }

    /// Goes on in the address space of CR3, which was `old`. Unless `keep`, its translations are dropped but for those of global pages.
    pub fn switch_space(&mut self, old: u64, keep: bool) {
        let space = self.space();
        self.tlb.switch(space, keep);
        self.blocks.local_mappings_changed();
        self.changes.switch(Switch {
            space,
            keep,
            same_tables: (self.cr3 ^ old) >> 12 == 0,
        });
    }

    /// Drops the translation of the page at `linear`.
    pub fn flush_page(&mut self, linear: u64) {
        match self.tlb.flush_page(linear) {
            true => {
                self.blocks.all_mappings_changed();
                self.changes.everything();
            }
            false => {
                self.blocks.mapping_changed(linear);
                self.changes.page(linear);
            }
        }
    }

    /// The PDPTEs under new control registers, if those are in use; a bad one is #GP(0).
    fn pdptes_under(&mut self, cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Exec<[u64; 4]> {
        let mut paging = self.paging();
        (paging.cr0, paging.cr3, paging.cr4, paging.efer) = (cr0, cr3, cr4, efer);
        if !paging.is_pae32() {
            return Ok(self.pdptes);
        }
        match paging.load_pdptes(&self.vm.ram) {
            Some(pdptes) => Ok(pdptes),
            None => self.gp0(),
        }
    }

    /// Writes CR0.
    fn set_cr0(&mut self, value: u64) -> Exec {
        let new = value & cr0::ALL | cr0::ET;
        let paged = new & cr0::PG != 0;
        let inconsistent = paged && new & cr0::PE == 0 || new & cr0::NW != 0 && new & cr0::CD == 0;
        if value >> 32 != 0 || inconsistent {
            return self.gp0();
        }
        let changed = new ^ self.cr0;
        let mut new_efer = self.efer;
        if changed & cr0::PG != 0 {
            let refused = match (paged, self.efer & efer::LME != 0) {
                (true, true) => {
                    self.cr4 & cr4::PAE == 0 || self.segments[seg::CS as usize].is_long()
                }
                (true, false) => false,
                (false, _) => self.long64() || self.cr4 & cr4::PCIDE != 0,
            };
            if refused {
                return self.gp0();
            }
            new_efer &= !efer::LMA;
            if paged && new_efer & efer::LME != 0 {
                new_efer |= efer::LMA;
            }
        }
        if changed & (cr0::PG | cr0::CD | cr0::NW) != 0 {
            self.pdptes = self.pdptes_under(new, self.cr3, self.cr4, new_efer)?;
        }
        (self.cr0, self.efer) = (new, new_efer);
        if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.flush_all();
        }
        self.update_mode();
        Ok(())
    }

    /// Writes CR3. With PCIDs, bit 63 keeps what is cached of the new address space (SDM vol. 3, 4.10.4.1).
    fn set_cr3(&mut self, value: u64) -> Exec {
        const KEEP: u64 = 1 << 63;
        let keep = value & KEEP != 0 && self.cr4 & cr4::PCIDE != 0;
        let value = if keep { value & !KEEP } else { value };
        if self.long_mode() && value >> self.vm.physical_bits != 0 {
            return self.gp0();
        }
        self.pdptes = self.pdptes_under(self.cr0, value, self.cr4, self.efer)?;
        let old = std::mem::replace(&mut self.cr3, value);
        self.switch_space(old, keep);
        Ok(())
    }

    /// Writes CR4.
    fn set_cr4(&mut self, value: u64) -> Exec {
        let changed = value ^ self.cr4;
        let pcid_on = changed & value & cr4::PCIDE != 0;
        if value & !self.vm.cr4_bits != 0
            || self.long_mode() && value & cr4::PAE == 0
            || pcid_on && (!self.long_mode() || self.cr3 & 0xfff != 0)
        {
            return self.gp0();
        }
        if changed & (cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP) != 0 {
            self.pdptes = self.pdptes_under(self.cr0, self.cr3, value, self.efer)?;
        }
        self.cr4 = value;
        let paging = cr4::PAE | cr4::PSE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;
        if changed & paging != 0 {
            self.flush_all();
        }
        self.update_mode();
        Ok(())
    }

    /// Writes EFER.
    pub(crate) fn set_efer(&mut self, value: u64) -> Exec {
        let new = value & !efer::LMA | self.efer & efer::LMA;
        let changed = new ^ self.efer;
        if value & !self.vm.efer_bits != 0 || changed & efer::LME != 0 && self.cr0 & cr0::PG != 0 {
            return self.gp0();
        }
        self.efer = new;
        if changed & efer::NXE != 0 {
            self.flush_all();
        }
        self.update_mode();
        Ok(())
    }
}

/// MOV r, CRn.
pub fn mov_from_cr(c: &mut Cpu, op: &Op) -> Exec {
    privileged(c)?;
    let value = match register(op, 1) {
        0 => c.cr0,
        2 => c.cr2,
        3 => c.cr3,
        4 => c.cr4,
        8 => c.lapic.cr8(),
        _ => return c.ud(),
    };
    write_whole(c, op, value)
}

/// MOV CRn, r.
pub fn mov_to_cr(c: &mut Cpu, op: &Op) -> Exec {
    privileged(c)?;
    let value = read_whole(c, op);
    match register(op, 0) {
        0 => c.set_cr0(value)?,
        2 => c.cr2 = value,
        3 => c.set_cr3(value)?,
        4 => c.set_cr4(value)?,
        8 if value > 15 => return c.gp0(),
        8 => {
            c.lapic.set_cr8(value);
            c.interrupts_may_come();
        }
        _ => return c.ud(),
    }
    Err(Stop::EndBlock)
}

/// The number of a debug register: 4 and 5 are 6 and 7 unless debugging extensions are on. #DB if they are guarded.
fn debug_register(c: &mut Cpu, number: u8) -> Exec<u8> {
    let number = match number {
        4 | 5 if c.cr4 & cr4::DE != 0 => return c.ud(),
        4 | 5 => number + 2,
        0..=7 => number,
        _ => return c.ud(),
    };
    privileged(c)?;
    if c.dr7 & dr7::GD != 0 {
        c.dr6 |= dr6::BD;
        return c.raise(Exception::plain(Vector::Debug));
    }
    Ok(number)
}

/// MOV r, DRn.
pub fn mov_from_dr(c: &mut Cpu, op: &Op) -> Exec {
    let value = match debug_register(c, register(op, 1))? {
        6 => c.dr6,
        7 => c.dr7,
        n => c.dr[n as usize],
    };
    write_whole(c, op, value)
}

/// MOV DRn, r.
pub fn mov_to_dr(c: &mut Cpu, op: &Op) -> Exec {
    let number = debug_register(c, register(op, 0))?;
    let value = read_whole(c, op);
    if number >= 6 && value >> 32 != 0 {
        return c.gp0();
    }
    match number {
        6 => c.dr6 = value & 0xe00f | dr6::FIXED,
        7 => c.dr7 = value & 0xffff_2bff | dr7::FIXED,
        n => c.dr[n as usize] = value,
    }
    c.update_privilege();
    Err(Stop::EndBlock)
}

/// CLTS.
pub fn clts(c: &mut Cpu) -> Exec {
    privileged(c)?;
    c.cr0 &= !cr0::TS;
    Err(Stop::EndBlock)
}

/// LMSW: PE can be set but not cleared.
pub fn lmsw(c: &mut Cpu, op: &Op) -> Exec {
    privileged(c)?;
    let value = u64::from(read_rm::<u16>(c, op, 0)?);
    let settable = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    let kept = c.cr0 & !settable | c.cr0 & cr0::PE;
    c.set_cr0(kept | value & settable)?;
    Err(Stop::EndBlock)
}

/// SMSW: the low 16 bits to memory, as many as fit to a register.
pub fn smsw(c: &mut Cpu, op: &Op) -> Exec {
    c.check_umip()?;
    write_system_word(c, op, c.cr0)
}

/// The general register operand of a MOV to a control or debug register, which is as wide as the mode.
fn read_whole(c: &Cpu, op: &Op) -> u64 {
    match c.long64() {
        true => c.get::<u64>(op.src),
        false => c.get::<u32>(op.src).into(),
    }
}

fn write_whole(c: &mut Cpu, op: &Op, value: u64) -> Exec {
    match c.long64() {
        true => c.set(op.dst, value),
        false => c.set(op.dst, value as u32),
    }
    Ok(())
}
