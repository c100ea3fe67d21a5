//! RDMSR and WRMSR (SDM vol. 4; APM vol. 2, appendix A). What is not here is #GP(0).

use lodger_x86::bits::msr::*;

use crate::cpu::{Cpu, Exec, Stop, gpr, seg};
use crate::memory::canonical;
use crate::segment::privileged;

/// Eight variable ranges, fixed ranges, write combining.
const MTRR_CAPABILITIES: u64 = 0x508;

/// AMD's configuration registers that systems read or adjust without asking whether they are there (APM vol. 2,
/// appendix A; BIOS and Kernel Developer's Guides): SYSCFG, IORRs, TOP_MEM, TOP_MEM2, NB_CFG, MMIO configuration base, OS visible
/// workarounds, LS_CFG, IC_CFG, DC_CFG, FP_CFG, DE_CFG, BU_CFG2. They read as zero and forget what is written.
fn is_amd_configuration(number: u32) -> bool {
    matches!(
        number,
        0xc001_0010
            | 0xc001_0016..=0xc001_001a
            | 0xc001_001d
            | 0xc001_001f
            | 0xc001_0058
            | 0xc001_0140
            | 0xc001_0141
            | 0xc001_1020..=0xc001_1023
            | 0xc001_1028..=0xc001_102a
    )
}

/// AMD's hardware configuration register; bit 24: the TSC counts at the P0 frequency.
const HWCR: u32 = 0xc001_0015;
const HWCR_VALUE: u64 = 1 << 24;

/// Memory types that an MTRR can hold.
fn is_mtrr_type(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

/// Memory types that an entry of the PAT can hold.
fn is_pat_type(kind: u8) -> bool {
    is_mtrr_type(kind) || kind == 7
}

/// Index into [`lodger_x86::Msrs::mtrr_fixed`].
fn fixed_mtrr(number: u32) -> Option<usize> {
    match number {
        MTRR_FIX_64K => Some(0),
        MTRR_FIX_16K_80000 => Some(1),
        MTRR_FIX_16K_A0000 => Some(2),
        MTRR_FIX_4K_C0000..=MTRR_FIX_4K_F8000 => Some((number - MTRR_FIX_4K_C0000) as usize + 3),
        _ => None,
    }
}

/// RDMSR.
pub fn rdmsr(c: &mut Cpu) -> Exec {
    privileged(c)?;
    let number = c.get::<u32>(gpr::RCX);
    let value = c.read_msr(number)?;
    c.set(gpr::RAX, value as u32);
    c.set(gpr::RDX, (value >> 32) as u32);
    Ok(())
}

/// WRMSR.
pub fn wrmsr(c: &mut Cpu) -> Exec {
    privileged(c)?;
    let number = c.get::<u32>(gpr::RCX);
    let low = u64::from(c.get::<u32>(gpr::RAX));
    let high = u64::from(c.get::<u32>(gpr::RDX));
    c.write_msr(number, high << 32 | low)?;
    Err(Stop::EndBlock)
}

impl Cpu {
    fn read_msr(&mut self, number: u32) -> Exec<u64> {
        if let Some(index) = fixed_mtrr(number) {
            return Ok(self.msrs.mtrr_fixed[index]);
        }
        Ok(match number {
            TSC => self.tsc(),
            APIC_BASE | TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => self.lapic_msr_read(number)?,
            BIOS_SIGN_ID | MCG_CAP | MCG_STATUS | DEBUG_CTL => 0,
            MTRR_CAP => MTRR_CAPABILITIES,
            SYSENTER_CS => self.msrs.sysenter_cs,
            SYSENTER_ESP => self.msrs.sysenter_esp,
            SYSENTER_EIP => self.msrs.sysenter_eip,
            MISC_ENABLE => self.msrs.misc_enable,
            MTRR_PHYS_BASE0..=MTRR_PHYS_MASK7 => {
                self.msrs.mtrr_variable[(number - MTRR_PHYS_BASE0) as usize]
            }
            PAT => self.msrs.pat,
            MTRR_DEF_TYPE => self.msrs.mtrr_def_type,
            KVM_WALL_CLOCK_NEW if self.has_kvm_clock() => self.msrs.kvm_wall_clock,
            KVM_SYSTEM_TIME_NEW if self.has_kvm_clock() => self.msrs.kvm_system_time,
            EFER => self.efer,
            STAR => self.msrs.star,
            LSTAR => self.msrs.lstar,
            CSTAR => self.msrs.cstar,
            SFMASK => self.msrs.sfmask,
            FS_BASE => self.segments[seg::FS as usize].base,
            GS_BASE => self.segments[seg::GS as usize].base,
            KERNEL_GS_BASE => self.msrs.kernel_gs_base,
            TSC_AUX => self.msrs.tsc_aux,
            HWCR => HWCR_VALUE,
            n if is_amd_configuration(n) => 0,
            _ => {
                tracing::debug!("read of unknown MSR {number:#x}");
                return self.gp0();
            }
        })
    }

    fn write_msr(&mut self, number: u32, value: u64) -> Exec {
        let bytes = value.to_le_bytes();
        let above_memory = value >> self.vm.physical_bits != 0;
        let address = [
            SYSENTER_ESP,
            SYSENTER_EIP,
            LSTAR,
            CSTAR,
            FS_BASE,
            GS_BASE,
            KERNEL_GS_BASE,
        ];
        let variable = MTRR_PHYS_BASE0..=MTRR_PHYS_MASK7;
        let invalid = match number {
            n if address.contains(&n) => !canonical(value),
            n if fixed_mtrr(n).is_some() => !bytes.into_iter().all(is_mtrr_type),
            n if variable.contains(&n) && n & 1 == 0 => {
                above_memory || value & 0xf00 != 0 || !is_mtrr_type(bytes[0])
            }
            n if variable.contains(&n) => above_memory || value & 0x7ff != 0,
            MTRR_DEF_TYPE => value & !0xcff != 0 || !is_mtrr_type(bytes[0]),
            PAT => !bytes.into_iter().all(is_pat_type),
            TSC_AUX => value >> 32 != 0,
            _ => false,
        };
        if invalid {
            return self.gp0();
        }
        if let Some(index) = fixed_mtrr(number) {
            self.msrs.mtrr_fixed[index] = value;
            return Ok(());
        }
        match number {
            TSC => {
                self.tsc_base = self.tsc_base.wrapping_add(value.wrapping_sub(self.tsc()));
                self.write_system_time();
            }
            APIC_BASE | TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => {
                self.lapic_msr_write(number, value)?;
            }
            BIOS_SIGN_ID | MCG_STATUS | DEBUG_CTL => {}
            SYSENTER_CS => self.msrs.sysenter_cs = value,
            SYSENTER_ESP => self.msrs.sysenter_esp = value,
            SYSENTER_EIP => self.msrs.sysenter_eip = value,
            MISC_ENABLE => self.msrs.misc_enable = value,
            MTRR_PHYS_BASE0..=MTRR_PHYS_MASK7 => {
                self.msrs.mtrr_variable[(number - MTRR_PHYS_BASE0) as usize] = value;
            }
            PAT => self.msrs.pat = value,
            MTRR_DEF_TYPE => self.msrs.mtrr_def_type = value,
            KVM_WALL_CLOCK_NEW if self.has_kvm_clock() => {
                self.msrs.kvm_wall_clock = value;
                self.write_wall_clock();
            }
            KVM_SYSTEM_TIME_NEW if self.has_kvm_clock() => {
                self.msrs.kvm_system_time = value;
                self.write_system_time();
            }
            EFER => self.set_efer(value)?,
            STAR => self.msrs.star = value,
            LSTAR => self.msrs.lstar = value,
            CSTAR => self.msrs.cstar = value,
            SFMASK => self.msrs.sfmask = value & 0xffff_ffff,
            FS_BASE => self.set_base(seg::FS, value),
            GS_BASE => self.set_base(seg::GS, value),
            KERNEL_GS_BASE => self.msrs.kernel_gs_base = value,
            TSC_AUX => self.msrs.tsc_aux = value,
            HWCR => {}
            n if is_amd_configuration(n) => {}
            _ => {
                tracing::debug!("write of {value:#x} to unknown MSR {number:#x}");
                return self.gp0();
            }
        }
        Ok(())
    }
}
