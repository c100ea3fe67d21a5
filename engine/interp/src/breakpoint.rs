//! Debug registers and alignment checks: what makes every data access take the slow path.

use lodger_x86::Exception;
use lodger_x86::Vector;
use lodger_x86::bits::cr4;
use lodger_x86::paging::Access;

use crate::cpu::Cpu;

/// Why data accesses must be looked at one by one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Watch {
    /// Alignment checking is on (CPL 3, CR0.AM, RFLAGS.AC).
    pub alignment: bool,
    /// A debug register is enabled.
    pub data: bool,
}

impl Watch {
    /// Anything to look at.
    #[inline]
    pub fn any(self) -> bool {
        self.alignment || self.data
    }
}

impl Cpu {
    /// Enabled breakpoints of DR7 that a data access of `len` bytes at `linear` meets: DR6 bits (SDM vol. 3, 17.2.4).
    pub fn data_breakpoints(&self, linear: u64, len: u64, access: Access) -> u64 {
        let mut hit = 0;
        for i in 0..4 {
            let control = self.dr7 >> (16 + 4 * i);
            let matches = match control & 3 {
                1 => access == Access::Write,
                2 => false, // I/O
                3 => access != Access::Execute,
                _ => false,
            };
            let size = [1, 2, 8, 4][control as usize >> 2 & 3];
            let start = self.dr[i as usize] & !(size - 1);
            let overlap = linear < start.wrapping_add(size) && start < linear.wrapping_add(len);
            if self.dr7 >> (2 * i) & 3 != 0 && matches && overlap {
                hit |= 1 << i;
            }
        }
        hit
    }

    /// I/O breakpoints (with CR4.DE) that an access to `port` meets: DR6 bits.
    pub fn port_breakpoints(&self, port: u16, len: u64) -> u64 {
        if self.cr4 & cr4::DE == 0 || self.dr7 & 0xff == 0 {
            return 0;
        }
        let mut hit = 0;
        for i in 0..4 {
            let control = self.dr7 >> (16 + 4 * i);
            let size = [1, 2, 8, 4][control as usize >> 2 & 3];
            let start = self.dr[i as usize] & !(size - 1);
            let port = u64::from(port);
            let overlap = port < start + size && start < port + len;
            if self.dr7 >> (2 * i) & 3 != 0 && control & 3 == 2 && overlap {
                hit |= 1 << i;
            }
        }
        hit
    }

    /// Instruction breakpoints at `linear`: DR6 bits.
    pub fn code_breakpoints(&self, linear: u64) -> u64 {
        let enabled = |i: &u64| self.dr7 >> (2 * i) & 3 != 0 && self.dr7 >> (16 + 4 * i) & 3 == 0;
        let hits = (0..4).filter(|i| enabled(i) && self.dr[*i as usize] == linear);
        hits.fold(0, |bits, i| bits | 1 << i)
    }

    /// What a data access is checked for when [`Watch::any`]; an alignment fault is raised here, a breakpoint noted.
    pub(crate) fn watched(
        &mut self,
        linear: u64,
        len: u64,
        access: Access,
    ) -> Result<(), Exception> {
        // What is longer than a register is a state image or a descriptor table, which have rules of their own.
        let natural = len.is_power_of_two() && len <= 16;
        if self.watch.alignment && natural && !linear.is_multiple_of(len) {
            return Err(Exception::with_code(Vector::AlignmentCheck, 0));
        }
        if self.watch.data {
            self.debug_trap |= self.data_breakpoints(linear, len, access);
        }
        Ok(())
    }
}
