//! The state of a vCPU, by numbered elements.
//!
//! This is the only form in which a vCPU enters snapshots, migration, debuggers and tests. An [`Element`] can be
//! asked for its reset value, and two states can be compared element by element.

use serde::{Deserialize, Serialize};

use crate::bits::{cr0, dr6, dr7};
use crate::lapic_state::LapicState;
use crate::segment::{DescriptorTable, Segment};

/// The state of one vCPU between two instructions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15: encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags; bit 1 is always set.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS: encoding order.
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4. (CR8 is part of the local APIC.)
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0-DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// Model-specific registers.
    pub msrs: Msrs,
    /// x87, SSE and AVX registers.
    pub fpu: Fpu,
    /// Local APIC.
    pub lapic: LapicState,
    /// The time-stamp counter at guest time 0: what RDTSC returns is this plus guest time in TSC cycles (wrapping).
    pub tsc_base: u64,
    /// What the vCPU is doing.
    pub activity: Activity,
    /// An NMI waits to be delivered.
    pub nmi_pending: bool,
    /// NMIs are blocked until the next IRET.
    pub nmi_blocked: bool,
    /// The instruction before was STI or a load of SS: interrupts are held off for one instruction.
    pub interrupt_shadow: bool,
    /// The instruction before was a load of SS: no instruction breakpoint is met at this one, and a #DB that reports these bits of
    /// DR6 follows it, if there are any (SDM vol. 3, 6.8.3).
    pub held_debug: Option<u64>,
}

/// What a vCPU does when it is let run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Executes instructions.
    Running,
    /// Waits for an interrupt after HLT.
    Halted,
    /// An application processor after INIT: waits for a start-up IPI.
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
}

/// The MSRs that hold state and are in no other element.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    /// Base and mask of the variable-range MTRRs, alternating.
    pub mtrr_variable: [u64; 16],
    /// 64K, two 16K, eight 4K fixed-range MTRRs.
    pub mtrr_fixed: [u64; 11],
    pub kvm_system_time: u64,
    pub kvm_wall_clock: u64,
}

/// x87, SSE and AVX state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fpu {
    /// Control word.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// Abridged tag word of FXSAVE: bit n set = physical register n is not empty.
    pub ftw: u8,
    /// Last opcode.
    pub fop: u16,
    /// Last instruction pointer.
    pub fip: u64,
    /// Last data pointer.
    pub fdp: u64,
    /// ST0-ST7 in the low 10 bytes of each; the low 8 are MM0-MM7.
    pub st: [[u8; 16]; 8],
    /// SSE control and status.
    pub mxcsr: u32,
    /// YMM0-YMM15, whose low 16 bytes are XMM0-XMM15.
    pub ymm: [[u8; 32]; 16],
}

impl Default for Fpu {
    /// After power-on (SDM vol. 3, table 9-1).
    fn default() -> Fpu {
        Fpu {
            fcw: 0x40,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            st: [[0; 16]; 8],
            mxcsr: 0x1f80,
            ymm: [[0; 32]; 16],
        }
    }
}

impl Default for Msrs {
    fn default() -> Msrs {
        Msrs {
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            mtrr_def_type: 0,
            mtrr_variable: [0; 16],
            mtrr_fixed: [0; 11],
            kvm_system_time: 0,
            kvm_wall_clock: 0,
        }
    }
}

/// One part of a [`CpuState`]; the numbers are part of saved formats and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
#[repr(u8)]
pub enum Element {
    Registers = 1,
    Segments = 2,
    Control = 3,
    Debug = 4,
    Msrs = 5,
    Fpu = 6,
    Lapic = 7,
    Tsc = 8,
    Activity = 9,
}

impl Element {
    /// All elements.
    pub const ALL: [Element; 9] = [
        Element::Registers,
        Element::Segments,
        Element::Control,
        Element::Debug,
        Element::Msrs,
        Element::Fpu,
        Element::Lapic,
        Element::Tsc,
        Element::Activity,
    ];

    /// Whether two engines that ran the same instructions must agree on it: not so where host time flows in.
    pub fn comparable(self) -> bool {
        !matches!(self, Element::Lapic | Element::Tsc)
    }
}

impl CpuState {
    /// After power-on or RESET (SDM vol. 3, table 9-1). vCPU 0 is the bootstrap processor and runs; the others wait
    /// for a start-up IPI. `signature` is CPUID leaf 1 EAX, which RESET leaves in RDX.
    pub fn reset(id: u32, signature: u32) -> CpuState {
        let bsp = id == 0;
        let mut gpr = [0; 16];
        gpr[2] = u64::from(signature);
        let mut segments = [Segment::real_mode(0); 6];
        segments[1] = Segment {
            selector: 0xf000,
            attributes: 0x9b,
            limit: 0xffff,
            base: 0xffff_0000,
        };
        let system = |attributes| Segment {
            selector: 0,
            attributes,
            limit: 0xffff,
            base: 0,
        };
        let table = DescriptorTable {
            base: 0,
            limit: 0xffff,
        };
        CpuState {
            gpr,
            rip: 0xfff0,
            rflags: 2,
            segments,
            ldtr: system(0x82),
            tr: system(0x8b),
            gdtr: table,
            idtr: table,
            cr0: cr0::ET | cr0::NW | cr0::CD,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: dr6::FIXED,
            dr7: dr7::FIXED,
            msrs: Msrs::default(),
            fpu: Fpu::default(),
            lapic: LapicState::reset(id, bsp),
            tsc_base: 0,
            activity: if bsp {
                Activity::Running
            } else {
                Activity::WaitForSipi
            },
            nmi_pending: false,
            nmi_blocked: false,
            interrupt_shadow: false,
            held_debug: None,
        }
    }

    /// What INIT leaves of this state (SDM vol. 3, table 9-1): FPU, MSRs, TSC and the APIC's ID and base survive.
    pub fn after_init(&self, signature: u32) -> CpuState {
        let fresh = CpuState::reset(self.lapic.id, signature);
        let lapic = LapicState {
            base: self.lapic.base,
            ..fresh.lapic.clone()
        };
        CpuState {
            cr0: self.cr0 & (cr0::CD | cr0::NW) | cr0::ET,
            msrs: self.msrs.clone(),
            fpu: self.fpu.clone(),
            tsc_base: self.tsc_base,
            lapic,
            ..fresh
        }
    }

    /// What a start-up IPI with `vector` does to a vCPU that waits for one: real mode at vector * 4096.
    pub fn start_up(&mut self, vector: u8) {
        self.segments[1] = Segment {
            selector: u16::from(vector) << 8,
            attributes: 0x9b,
            limit: 0xffff,
            base: u64::from(vector) << 12,
        };
        self.rip = 0;
        self.activity = Activity::Running;
    }

    /// Copies one element from `other`.
    pub fn take(&mut self, element: Element, other: &CpuState) {
        let o = other;
        match element {
            Element::Registers => (self.gpr, self.rip, self.rflags) = (o.gpr, o.rip, o.rflags),
            Element::Segments => {
                (self.segments, self.ldtr, self.tr) = (o.segments, o.ldtr, o.tr);
                (self.gdtr, self.idtr) = (o.gdtr, o.idtr);
            }
            Element::Control => {
                (self.cr0, self.cr2, self.cr3) = (o.cr0, o.cr2, o.cr3);
                (self.cr4, self.efer, self.xcr0) = (o.cr4, o.efer, o.xcr0);
            }
            Element::Debug => {
                (self.dr, self.dr6, self.dr7) = (o.dr, o.dr6, o.dr7);
                self.held_debug = o.held_debug;
            }
            Element::Msrs => self.msrs = o.msrs.clone(),
            Element::Fpu => self.fpu = o.fpu.clone(),
            Element::Lapic => self.lapic = o.lapic.clone(),
            Element::Tsc => self.tsc_base = o.tsc_base,
            Element::Activity => {
                self.activity = o.activity;
                (self.nmi_pending, self.nmi_blocked) = (o.nmi_pending, o.nmi_blocked);
                self.interrupt_shadow = o.interrupt_shadow;
            }
        }
    }

    /// The elements in which the two states differ.
    pub fn differences(&self, other: &CpuState) -> Vec<Element> {
        let differs = |e: &Element| {
            let mut merged = self.clone();
            merged.take(*e, other);
            merged != *self
        };
        Element::ALL.into_iter().filter(differs).collect()
    }

    /// Current privilege level.
    pub fn cpl(&self) -> u8 {
        self.segments[2].dpl()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_name_the_element() {
        let a = CpuState::reset(0, 0x600);
        let mut b = a.clone();
        assert_eq!(a.differences(&b), []);
        b.gdtr.limit = 7;
        b.nmi_blocked = true;
        assert_eq!(a.differences(&b), [Element::Segments, Element::Activity]);
        let mut c = a.clone();
        for e in Element::ALL {
            c.take(e, &b);
        }
        assert_eq!(c, b, "the elements cover the whole state");
    }

    #[test]
    fn init_keeps_what_it_must_and_a_start_up_ipi_starts() {
        let mut s = CpuState::reset(1, 0x600);
        s.fpu.mxcsr = 0x1fc0;
        s.cr4 = 0x20;
        s.lapic.svr = 0x1ff;
        let mut s = s.after_init(0x600);
        assert_eq!(
            (s.cr4, s.fpu.mxcsr, s.lapic.svr, s.activity),
            (0, 0x1fc0, 0xff, Activity::WaitForSipi)
        );
        s.start_up(0x9a);
        assert_eq!(
            (s.segments[1].base, s.rip, s.activity),
            (0x9a000, 0, Activity::Running)
        );
    }
}
