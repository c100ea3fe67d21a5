//! The state of one interpreted vCPU, and the small vocabulary that every instruction group uses.

use std::sync::Arc;

use lodger_host_sys::low::LowBox;
use lodger_lapic::Lapic;
use lodger_native::{NativeState, StubCache};
use lodger_softmmu::{MmuIndex, Tlb};
use lodger_vcpu::Exit;
use lodger_x86::bits::{STATUS_FLAGS, cr0, cr4, efer};
use lodger_x86::paging::Paging;
use lodger_x86::{Activity, DescriptorTable, Exception, Msrs, Segment};

use crate::block::BlockCache;
use crate::breakpoint::Watch;
use crate::io::IoReplay;
use crate::run::History;
use crate::translator::Changes;
use crate::vm::VmShared;
use crate::word::Word;

/// What an instruction does not finish with: the reason why the next instruction of the block is not simply next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The exception in [`Cpu::fault`] was raised; the instruction had no effect.
    Fault,
    /// The instruction is complete and the block ends: a branch, or a change of state that the rest of the block
    /// may depend on.
    EndBlock,
    /// [`Cpu::exit`] must be answered outside; then the instruction is executed again from its start (see
    /// [`crate::io`]).
    Io,
    /// A repeated string instruction made progress and must be executed again for the rest.
    Again,
}

/// The result of executing one instruction.
pub type Exec<T = ()> = Result<T, Stop>;

/// Index of RIP in [`Cpu::regs`]: during an instruction the address of the next one.
pub const RIP: u8 = 16;
/// Index of a register that is always zero.
pub const ZERO: u8 = 17;

/// General registers by encoding.
#[allow(missing_docs)]
pub mod gpr {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R11: u8 = 11;
}

/// Segment registers by encoding, and the pseudo-register without a base.
#[allow(missing_docs)]
pub mod seg {
    pub const ES: u8 = 0;
    pub const CS: u8 = 1;
    pub const SS: u8 = 2;
    pub const DS: u8 = 3;
    pub const FS: u8 = 4;
    pub const GS: u8 = 5;
    /// Linear addresses: no base, no limit.
    pub const NONE: u8 = 6;
}

/// How code is decoded: CS.L and CS.D, or real mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CodeSize {
    /// 16-bit operands and addresses by default.
    Bits16 = 0,
    /// 32-bit.
    Bits32 = 1,
    /// 64-bit mode.
    Bits64 = 2,
}

/// An event that waits to be delivered through the IDT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A fault, trap or abort.
    Exception(Exception),
    /// INT n, INT3, INTO: RIP is already that of the next instruction.
    Software {
        /// The vector.
        vector: u8,
        /// INT3 and INTO: privilege checks differ in virtual-8086 mode.
        int3: bool,
    },
    /// An external interrupt.
    External(u8),
    /// A non-maskable interrupt.
    Nmi,
}

/// One interpreted vCPU.
pub struct Cpu {
    /// R0-R15, RIP, zero; 32 so that a masked index needs no bounds check.
    pub regs: [u64; 32],
    /// RFLAGS.
    pub flags: u64,
    /// Base that an access adds, by [`seg`]: in 64-bit mode zero for ES, CS, SS, DS.
    pub bases: [u64; 8],
    /// What the limits and types allow without a look: see [`crate::segment`].
    pub flat: [u8; 8],
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    pub pdptes: [u64; 4],
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    pub msrs: Msrs,
    /// At an address that does not change, and below 2 GiB.
    pub native: LowBox<NativeState>,
    pub stubs: StubCache,
    pub lapic: Lapic,
    pub tsc_base: u64,
    pub activity: Activity,
    pub nmi_pending: bool,
    pub nmi_blocked: bool,
    /// Interrupts are held off for one instruction.
    pub shadow: bool,

    // Derived from the above by `update_mode`.
    /// Current privilege level.
    pub cpl: u8,
    /// How code is decoded.
    pub code: CodeSize,
    /// Stack pointer width: all ones, 32 or 16 bits.
    pub stack_mask: u64,
    /// Which TLB table data accesses use.
    pub mmu: MmuIndex,
    /// Data accesses must take the slow path: breakpoints or alignment checks are on.
    pub watch: Watch,

    pub tlb: Tlb,
    /// What happened to cached translations, for a translator.
    pub changes: Changes,
    pub blocks: BlockCache,

    /// The exception of [`Stop::Fault`].
    pub fault: Exception,
    /// The exit of [`Stop::Io`].
    pub exit: Option<Exit>,
    pub io: IoReplay,
    /// An event whose delivery has begun (and may have to be repeated after an I/O).
    pub delivering: Option<Event>,
    /// Debug conditions met by the current instruction (DR6 bits), for a trap after it.
    pub debug_trap: u64,
    /// PAUSE instructions so far.
    pub pauses: u32,
    /// RIP is at a repeated string instruction that has begun: what interrupts it sets RF in the saved flags.
    pub repeating: bool,
    /// RFLAGS.TF was set when the instruction began: a trap follows it. What enters a handler drops it, as does a
    /// load of SS.
    pub step_trap: bool,
    /// As in `CpuState`: after a load of SS, the debug traps that come after the next instruction.
    pub held_debug: Option<u64>,
    /// A level-triggered interrupt was finished: its vector must go to the IOAPICs.
    pub eoi: Option<u8>,
    /// Something changed that may make an event deliverable: look before the next block.
    pub check_events: bool,
    /// An interrupt waits for IF, as of the latest look; not zero: it does.
    pub waiting: u32,
    /// Code that this vCPU may be executing was written.
    pub code_written: bool,

    /// Instructions retired.
    pub ticks: u64,
    /// The exact limit, if any.
    pub tick_limit: Option<u64>,
    /// `ticks` at which the loop looks at the clock, or at the limit if that is nearer.
    pub next_check: u64,

    /// What was interpreted last, for crash reports.
    pub history: History,

    /// This vCPU's number and APIC ID.
    pub index: u32,
    pub vm: Arc<VmShared>,
}

impl Cpu {
    /// Raises an exception.
    #[inline]
    pub fn raise<T>(&mut self, exception: Exception) -> Exec<T> {
        self.fault = exception;
        Err(Stop::Fault)
    }

    /// #GP(0).
    #[cold]
    pub fn gp0<T>(&mut self) -> Exec<T> {
        self.raise(Exception::GP0)
    }

    /// #UD.
    #[cold]
    pub fn ud<T>(&mut self) -> Exec<T> {
        self.raise(Exception::UD)
    }

    /// Reads a general register; 8-bit registers as encoded by [`crate::decode::reg8`].
    #[inline(always)]
    pub fn get<T: Word>(&self, reg: u8) -> T {
        T::get(&self.regs, reg)
    }

    /// Writes a general register with the width's rules: 32 bits zero-extend, less leave the rest alone.
    #[inline(always)]
    pub fn set<T: Word>(&mut self, reg: u8, value: T) {
        T::set(&mut self.regs, reg, value);
    }

    /// RIP: during an instruction that of the next one.
    #[inline(always)]
    pub fn rip(&self) -> u64 {
        self.regs[RIP as usize]
    }

    /// Sets RIP.
    #[inline(always)]
    pub fn set_rip(&mut self, rip: u64) {
        self.regs[RIP as usize] = rip;
    }

    /// Replaces the arithmetic flags.
    #[inline(always)]
    pub fn set_status(&mut self, status: u64) {
        self.flags = self.flags & !STATUS_FLAGS | status;
    }

    /// One flag.
    #[inline(always)]
    pub fn flag(&self, bit: lodger_x86::bits::RFlags) -> bool {
        self.flags & bit.bits() != 0
    }

    /// CR0.PE is clear.
    pub fn real_mode(&self) -> bool {
        self.cr0 & cr0::PE == 0
    }

    /// RFLAGS.VM is set.
    pub fn v86(&self) -> bool {
        self.flag(lodger_x86::bits::RFlags::VM) && !self.long_mode()
    }

    /// IA-32e mode is active, in 64-bit or compatibility mode.
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// 64-bit mode.
    #[inline(always)]
    pub fn long64(&self) -> bool {
        self.code == CodeSize::Bits64
    }

    /// I/O privilege level.
    pub fn iopl(&self) -> u8 {
        (self.flags >> 12 & 3) as u8
    }

    /// What the page walk needs.
    pub fn paging(&self) -> Paging {
        Paging {
            cr0: self.cr0,
            cr3: self.cr3,
            cr4: self.cr4,
            efer: self.efer,
            pdptes: self.pdptes,
            physical_bits: self.vm.physical_bits,
        }
    }

    /// Brings everything that is derived from segments, control registers and flags up to date. Called after any change of
    /// CS, SS, CR0, CR4, EFER, RFLAGS.VM, RFLAGS.AC or the debug registers. Costs little; flushes nothing.
    pub fn update_mode(&mut self) {
        let cs = &self.segments[seg::CS as usize];
        self.code = if self.long_mode() && cs.is_long() {
            CodeSize::Bits64
        } else if cs.is_big() && !self.real_mode() && !self.v86() {
            CodeSize::Bits32
        } else if cs.is_big() && self.real_mode() {
            // "Unreal" code: the hidden D bit survives the switch to real mode until CS is reloaded.
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        self.cpl = if self.real_mode() {
            0
        } else if self.v86() {
            3
        } else {
            self.segments[seg::SS as usize].dpl()
        };
        self.stack_mask = if self.code == CodeSize::Bits64 {
            u64::MAX
        } else if self.segments[seg::SS as usize].is_big() {
            0xffff_ffff
        } else {
            0xffff
        };
        self.blocks.set_mode(self.code, self.cpl == 3);
        self.update_segments();
        self.update_privilege();
    }

    /// The part of `update_mode` that depends on CPL, RFLAGS.AC, CR0.AM, CR4.SMAP and the debug registers only.
    pub fn update_privilege(&mut self) {
        use lodger_x86::bits::RFlags;
        let ac = self.flag(RFlags::AC);
        self.mmu = if self.cpl == 3 {
            MmuIndex::User
        } else if ac && self.cr4 & cr4::SMAP != 0 {
            MmuIndex::KernelAc
        } else {
            MmuIndex::Kernel
        };
        let watch = Watch {
            alignment: ac && self.cpl == 3 && self.cr0 & cr0::AM != 0,
            data: self.dr7 & 0xff != 0,
        };
        if watch != self.watch {
            self.watch = watch;
            self.tlb.flush();
            self.blocks.all_mappings_changed();
            self.changes.everything();
        }
    }
}
