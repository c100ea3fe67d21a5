//! Pushes and pops. RSP changes only after the access has succeeded.

use lodger_x86::paging::Access;

use crate::cpu::{Cpu, Exec, gpr, seg};
use crate::word::Word;

impl Cpu {
    /// RSP within the stack's width.
    #[inline(always)]
    pub fn sp(&self) -> u64 {
        self.regs[gpr::RSP as usize] & self.stack_mask
    }

    /// Sets RSP within the stack's width: 32-bit stacks zero-extend, 16-bit ones leave the rest alone.
    #[inline(always)]
    pub fn set_sp(&mut self, value: u64) {
        let rsp = &mut self.regs[gpr::RSP as usize];
        *rsp = match self.stack_mask {
            0xffff => *rsp & !0xffff | value & 0xffff,
            mask => value & mask,
        };
    }

    /// Writes at offset `sp` of the stack segment.
    #[inline(always)]
    pub fn stack_write<T: Word>(&mut self, sp: u64, value: T) -> Exec {
        let linear = self.linear(seg::SS, sp & self.stack_mask, T::SIZE, Access::Write)?;
        self.write(linear, seg::SS, value)
    }

    /// Reads at offset `sp` of the stack segment.
    #[inline(always)]
    pub fn stack_read<T: Word>(&mut self, sp: u64) -> Exec<T> {
        let linear = self.linear(seg::SS, sp & self.stack_mask, T::SIZE, Access::Read)?;
        self.read(linear, seg::SS)
    }

    /// Pushes.
    #[inline(always)]
    pub fn push<T: Word>(&mut self, value: T) -> Exec {
        let sp = self.sp().wrapping_sub(T::SIZE) & self.stack_mask;
        self.stack_write(sp, value)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Pops.
    #[inline(always)]
    pub fn pop<T: Word>(&mut self) -> Exec<T> {
        let sp = self.sp();
        let value = self.stack_read(sp)?;
        self.set_sp(sp.wrapping_add(T::SIZE));
        Ok(value)
    }
}
