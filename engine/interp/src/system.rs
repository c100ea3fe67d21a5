//! Descriptor table registers, CPUID, time-stamp counter, ports, cache and TLB maintenance, random numbers, XCR0.

use lodger_x86::CpuidContext;
use lodger_x86::bits::{RFlags, STATUS_FLAGS, cr4, xcr0};
use lodger_x86::paging::Access;
use lodger_x86::{Activity, ApicMode, DescriptorTable};

use crate::cpu::{Cpu, Exec, Stop, gpr};
use crate::memory::canonical;
use crate::op::Op;
use crate::rare::write_system_word;
use crate::segment::{privileged, protected_only};

impl Cpu {
    /// What CPUID returns.
    pub(crate) fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let context = CpuidContext {
            apic_id: self.lapic.state().id,
            cr4: self.cr4,
            xcr0: self.xcr0,
            apic_enabled: self.lapic.mode() != ApicMode::Disabled,
        };
        self.vm.model.lookup(leaf, subleaf, &context)
    }

    /// 64 random bits.
    fn random(&self) -> u64 {
        let mut bytes = [0; 8];
        (self.vm.entropy)(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// RDTSC and, with `aux`, RDTSCP, if it may be read.
    pub fn read_time(&mut self, aux: bool) -> bool {
        if self.cr4 & cr4::TSD != 0 && self.cpl > 0 {
            return false;
        }
        let tsc = self.tsc();
        self.set(gpr::RAX, tsc as u32);
        self.set(gpr::RDX, (tsc >> 32) as u32);
        if aux {
            self.set(gpr::RCX, self.msrs.tsc_aux as u32);
        }
        true
    }

    /// User-mode instruction prevention: #GP(0).
    pub(crate) fn check_umip(&mut self) -> Exec {
        if self.cr4 & cr4::UMIP != 0 && self.cpl > 0 {
            return self.gp0();
        }
        Ok(())
    }
}

/// LGDT and LIDT; `base`: the bytes of the base address in memory.
pub fn load_table(c: &mut Cpu, op: &Op, base: u64) -> Exec<DescriptorTable> {
    privileged(c)?;
    let size = if base == 8 { 8 } else { 4 };
    let linear = c.operand(op, 2 + size, Access::Read)?;
    let limit = c.read::<u16>(linear, op.seg)?;
    let at = c.wrap(linear.wrapping_add(2));
    let base = match base {
        8 => c.read::<u64>(at, op.seg)?,
        4 => c.read::<u32>(at, op.seg)?.into(),
        _ => u64::from(c.read::<u32>(at, op.seg)? & 0xff_ffff),
    };
    if !canonical(base) {
        return c.gp0();
    }
    Ok(DescriptorTable { base, limit })
}

/// SGDT and SIDT.
pub fn store_table(c: &mut Cpu, op: &Op, table: DescriptorTable) -> Exec {
    c.check_umip()?;
    let size = if c.long64() { 10 } else { 6 };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let linear = c.operand(op, size, Access::Write)?;
    c.write_bytes(linear, op.seg, &bytes[..size as usize])
}

/// SLDT and STR.
pub fn store_selector(c: &mut Cpu, op: &Op, selector: u16) -> Exec {
    protected_only(c)?;
    c.check_umip()?;
    write_system_word(c, op, selector.into())
}

/// INVLPG.
pub fn invlpg(c: &mut Cpu, op: &Op) -> Exec {
    privileged(c)?;
    let linear = c.wrap(c.offset(op).wrapping_add(c.bases[(op.seg & 7) as usize]));
    c.flush_page(linear);
    Err(Stop::EndBlock)
}

/// CLFLUSH and its like: nothing to do but to fault as a read would.
pub fn touch(c: &mut Cpu, op: &Op) -> Exec {
    let linear = c.operand(op, 1, Access::Read)?;
    if c.long_mode() && !canonical(linear) {
        return c.gp0();
    }
    c.translate(linear, Access::Read)?;
    Ok(())
}

/// HLT.
pub fn hlt(c: &mut Cpu) -> Exec {
    privileged(c)?;
    c.activity = Activity::Halted;
    c.check_events = true;
    Err(Stop::EndBlock)
}

/// CPUID. Ends the block because it serialises: code that another vCPU changed before must be seen behind it (SDM vol. 3,
/// 9.1.3).
pub fn cpuid(c: &mut Cpu) -> Exec {
    let values = c.cpuid(c.get(gpr::RAX), c.get(gpr::RCX));
    for (reg, value) in [gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX]
        .into_iter()
        .zip(values)
    {
        c.set(reg, value);
    }
    Err(Stop::EndBlock)
}

/// INVD and WBINVD: there is no cache to write back, but they serialise like [`cpuid`].
pub fn write_back(c: &mut Cpu) -> Exec {
    privileged(c)?;
    Err(Stop::EndBlock)
}

/// RDTSC and, with `aux`, RDTSCP.
pub fn rdtsc(c: &mut Cpu, aux: bool) -> Exec {
    match c.read_time(aux) {
        true => Ok(()),
        false => c.gp0(),
    }
}

/// RDPID.
pub fn rdpid(c: &mut Cpu, op: &Op) -> Exec {
    c.set(op.dst, u64::from(c.msrs.tsc_aux as u32));
    Ok(())
}

/// XGETBV.
pub fn xgetbv(c: &mut Cpu) -> Exec {
    if c.cr4 & cr4::OSXSAVE == 0 {
        return c.ud();
    }
    if c.get::<u32>(gpr::RCX) != 0 {
        return c.gp0();
    }
    c.set(gpr::RAX, c.xcr0 as u32);
    c.set(gpr::RDX, (c.xcr0 >> 32) as u32);
    Ok(())
}

/// XSETBV.
pub fn xsetbv(c: &mut Cpu) -> Exec {
    if c.cr4 & cr4::OSXSAVE == 0 {
        return c.ud();
    }
    privileged(c)?;
    let low = u64::from(c.get::<u32>(gpr::RAX));
    let value = u64::from(c.get::<u32>(gpr::RDX)) << 32 | low;
    let incomplete = value & xcr0::X87 == 0 || value & xcr0::AVX != 0 && value & xcr0::SSE == 0;
    if c.get::<u32>(gpr::RCX) != 0 || value & !c.vm.xcr0_bits != 0 || incomplete {
        return c.gp0();
    }
    c.xcr0 = value;
    Err(Stop::EndBlock)
}

/// IN.
pub fn input(c: &mut Cpu, port: u16, size: u8) -> Exec {
    c.check_port(port, size)?;
    let value = c.port_read(port, size)?;
    c.debug_trap |= c.port_breakpoints(port, size.into());
    match size {
        1 => c.set(gpr::RAX, value as u8),
        2 => c.set(gpr::RAX, value as u16),
        _ => c.set(gpr::RAX, value),
    }
    Ok(())
}

/// OUT.
pub fn output(c: &mut Cpu, port: u16, size: u8) -> Exec {
    c.check_port(port, size)?;
    let value = match size {
        1 => c.get::<u8>(gpr::RAX).into(),
        2 => c.get::<u16>(gpr::RAX).into(),
        _ => c.get::<u32>(gpr::RAX),
    };
    c.port_write(port, size, value)?;
    c.debug_trap |= c.port_breakpoints(port, size.into());
    Ok(())
}

/// CLAC and STAC.
pub fn set_ac(c: &mut Cpu, on: bool) -> Exec {
    if c.cpl != 0 {
        return c.ud();
    }
    let ac = RFlags::AC.bits();
    c.flags = if on { c.flags | ac } else { c.flags & !ac };
    c.update_privilege();
    Ok(())
}

/// RDRAND and RDSEED: always successful.
pub fn random(c: &mut Cpu, op: &Op) -> Exec {
    let value = c.random();
    match op.rare().instruction.op0_register().size() {
        2 => c.set(op.dst, value as u16),
        4 => c.set(op.dst, value as u32),
        _ => c.set(op.dst, value),
    }
    c.flags = c.flags & !STATUS_FLAGS | RFlags::CF.bits();
    Ok(())
}
