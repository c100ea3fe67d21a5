//! Stacks that are written before the registers change: far calls, interrupts and task switches push here and only then
//! commit.

use lodger_x86::{Exception, Segment};

use crate::cpu::{Cpu, Exec, gpr, seg};
use crate::segment::within;

/// A stack under construction.
pub struct Frame {
    /// RSP after the pushes so far.
    pub sp: u64,
    /// The segment outside of 64-bit mode.
    segment: Option<Segment>,
    mask: u64,
    /// Bytes of a push: 2, 4 or 8.
    size: u64,
    /// A switch of stacks: the processor accesses the new one implicitly, with supervisor rights.
    switched: bool,
    /// What is raised if there is no room.
    no_room: Exception,
}

impl Frame {
    /// The current stack.
    pub fn current(c: &Cpu, size: u64) -> Frame {
        if c.long64() {
            return Frame::long(c.regs[gpr::RSP as usize], size, false);
        }
        let segment = c.segments[seg::SS as usize];
        let mut frame = Frame::inner(segment, c.regs[gpr::RSP as usize], size);
        frame.switched = false;
        frame.no_room = Exception::SS0;
        frame
    }

    /// The stack of an inner privilege level outside of 64-bit mode.
    pub fn inner(segment: Segment, sp: u64, size: u64) -> Frame {
        let mask = if segment.is_big() {
            0xffff_ffff
        } else {
            0xffff
        };
        Frame {
            // The part of ESP above a 16-bit stack pointer stays as it is.
            sp: if segment.is_big() { sp & mask } else { sp },
            segment: Some(segment),
            mask,
            size,
            switched: true,
            no_room: Exception::ss(segment.selector),
        }
    }

    /// A stack of 64-bit mode.
    pub fn long(rsp: u64, size: u64, switched: bool) -> Frame {
        Frame {
            sp: rsp,
            segment: None,
            mask: u64::MAX,
            size,
            switched,
            no_room: Exception::SS0,
        }
    }

    /// Pushes the low bytes of `value`.
    pub fn push(&mut self, c: &mut Cpu, value: u64) -> Exec {
        let offset = self.sp.wrapping_sub(self.size) & self.mask;
        let linear = match &self.segment {
            None => offset,
            Some(segment) if within(segment, offset, self.size) => {
                segment.base.wrapping_add(offset) & 0xffff_ffff
            }
            Some(_) => return c.raise(self.no_room),
        };
        let size = self.size;
        let write = |c: &mut Cpu| match size {
            2 => c.write(linear, seg::SS, value as u16),
            4 => c.write(linear, seg::SS, value as u32),
            _ => c.write(linear, seg::SS, value),
        };
        if self.switched {
            c.as_system(write)?;
        } else {
            write(c)?;
        }
        self.sp = self.sp & !self.mask | offset;
        Ok(())
    }
}
