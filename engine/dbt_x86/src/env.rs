//! What translated code and the world around it share, at fixed addresses below 2 GiB.

use std::mem::offset_of;

use lodger_host_sys::low::LowBox;
use lodger_interp::Cpu;
use lodger_softmmu::{Direction, MmuIndex, TlbEntry};
use lodger_x86::{Msrs, Segment};

use crate::group::KEPT;

/// Slots of the jump tables of a privilege: an address is looked up by its low bits. User code jumps through them from page to page, the
/// kernel's code, which is global, does not.
const KERNEL_SLOTS: usize = 1 << 16;
const USER_SLOTS: usize = 1 << 18;

/// All slots.
pub const JUMP_SLOTS: usize = 2 * KERNEL_SLOTS + USER_SLOTS;

/// Slots of a privilege.
pub const fn jump_slots(index: MmuIndex) -> usize {
    match index {
        MmuIndex::User => USER_SLOTS,
        _ => KERNEL_SLOTS,
    }
}

/// The slot of code at `linear`.
pub fn jump_slot(index: MmuIndex, linear: u64) -> usize {
    index as usize * KERNEL_SLOTS + linear as usize % jump_slots(index)
}

/// A copy of a TLB entry for one access of translated code.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SiteEntry {
    pub entry: TlbEntry,
    /// How often it was filled since the last flush.
    pub refills: u32,
    /// It is in the list of those that are filled.
    pub listed: u32,
}

impl SiteEntry {
    pub const REFILLS: i32 = offset_of!(SiteEntry, refills) as i32;
    pub const LISTED: i32 = offset_of!(SiteEntry, listed) as i32;
    pub const EMPTY: SiteEntry = SiteEntry {
        entry: TlbEntry::NONE,
        refills: 0,
        listed: 0,
    };
}

/// Accesses that have an entry of their own, at most.
pub const SITE_ENTRIES: usize = 1 << 15;

/// Bytes of the longest read that may cross pages.
pub const BOUNCE: i32 = 32;

/// Aligned, because what is misaligned in guest memory must be misaligned here.
#[repr(C, align(64))]
pub struct Bounce([u8; 2 * BOUNCE as usize]);

/// Registers of the translator.
#[repr(C)]
pub struct Env {
    /// The stack of the Rust code that waits.
    pub host_rsp: u64,
    /// Where to enter.
    pub target: u64,
    /// Status flags while they are not in the flags register, and at entry and exit: OF in byte 0, the others as LAHF has them in
    /// byte 1.
    pub flags: u64,
    /// Why the code was left: number of a site, or one of [`exit`].
    pub exit: u64,
    /// S at that time.
    pub argument: u64,
    /// Where in the code a trap happened.
    pub trap: u64,
    /// A value between the two checks of an instruction that accesses memory twice.
    pub value: u64,
    /// What the return address of an indirect call replaced.
    pub replaced: u64,
    /// Site of the latest indirect jump.
    pub indirect: u64,
    /// Status flags where the host trapped, in the form of `flags`.
    pub trap_flags: u64,
    /// Masks for PEXT: the sign, and all of RFLAGS but IF.
    pub sign_mask: u64,
    pub no_if_mask: u64,
    /// All of RFLAGS but AC, and but DF; bits of a bit's number within 32 and 64 bits; what is zero in addresses of the lower half.
    pub no_ac_mask: u64,
    pub no_df_mask: u64,
    pub bit_masks: [u64; 2],
    pub upper_mask: u64,
    /// Where to try again after a miss.
    pub retry: u64,
    /// The code behind a lookup, and its site's entry.
    pub resume: u64,
    pub entry: u64,
    /// Both sides of a read that crosses pages.
    pub bounce: Bounce,
    /// Host addresses that the block uses again.
    pub kept: [u64; KEPT],
    /// By privilege, the page of the latest access off RSP.
    pub stacks: [TlbEntry; 3],
    /// Registers of a repeated string instruction.
    pub strings: [u64; 4],
    /// Ticks until the limit, if ticks are counted.
    pub ticks_left: u64,
    /// Not zero: code is to be entered with the guest's vector registers; they are in the vector registers.
    pub wants_vectors: u64,
    pub holds_vectors: u64,
    /// Not zero: the jump tables of ring 0, or of users, hold code that is not 64-bit code.
    pub narrow: [u32; 2],
    /// By slot, host addresses of code; all others lead to the miss routine. The code checks the address itself.
    pub jumps: [u64; JUMP_SLOTS],
    /// How many entries of sites are filled, and their addresses.
    pub filled_sites: u64,
    pub site_list: [u32; SITE_ENTRIES],
    pub sites: [SiteEntry; SITE_ENTRIES],
}

impl Env {
    /// Empties the entries of sites.
    pub fn empty_sites(&mut self) {
        let count = self.filled_sites as usize;
        self.filled_sites = 0;
        for n in 0..count {
            let number = self.site_number(self.site_list[n]);
            self.sites[number] = SiteEntry::EMPTY;
        }
    }

    fn site_number(&self, address: u32) -> usize {
        (address as usize - self.sites.as_ptr() as usize) / size_of::<SiteEntry>()
    }

    /// The entry at an address.
    pub fn site(&self, address: u32) -> &SiteEntry {
        &self.sites[self.site_number(address)]
    }
}

/// Reasons to leave that belong to no site.
pub mod exit {
    /// No code is known for the address in S.
    pub const MISS: u32 = u32::MAX;
    /// The host trapped.
    pub const TRAP: u32 = u32::MAX - 1;
}

/// Where everything is.
#[derive(Clone)]
pub struct Layout {
    cpu: u32,
    /// The guest's general registers.
    pub registers: u32,
    /// The guest's segment bases.
    pub bases: u32,
    /// YMM0.
    pub vectors: u32,
    pub mxcsr: u32,
    /// TLB tables by privilege and direction.
    pub tables: [[u32; 2]; 3],
    /// The word that is not zero if the vCPU must leave.
    pub requests: u32,
    pub env: u32,
}

impl Layout {
    /// Addresses for tests that look at code.
    #[cfg(test)]
    pub fn fixed() -> Layout {
        let table = |n: u32| 0x2000_0000 + (n << 20);
        Layout {
            cpu: 0x1000_0000,
            registers: 0x1100_0000,
            bases: 0x1200_0000,
            vectors: 0x1300_0000,
            mxcsr: 0x1400_0000,
            tables: [0, 2, 4].map(|n| [table(n), table(n + 1)]),
            requests: 0x1500_0000,
            env: 0x1600_0000,
        }
    }

    pub fn new(cpu: &Cpu, env: &LowBox<Env>) -> Layout {
        let low = |address: usize| u32::try_from(address).expect("vCPUs are below 2 GiB");
        let table = |index| {
            [Direction::Read, Direction::Write].map(|direction| cpu.tlb.table(index, direction))
        };
        Layout {
            cpu: low(&raw const *cpu as usize),
            registers: low(cpu.regs.as_ptr() as usize),
            bases: low(cpu.bases.as_ptr() as usize),
            vectors: low(cpu.native.ymm.as_ptr() as usize),
            mxcsr: low(&raw const cpu.native.mxcsr as usize),
            tables: [MmuIndex::Kernel, MmuIndex::KernelAc, MmuIndex::User].map(table),
            requests: low(cpu.requests() as *const _ as usize),
            env: env.address(),
        }
    }

    /// Memory of a guest register that has no host register.
    pub fn register(&self, number: usize) -> u32 {
        self.registers + 8 * number as u32
    }

    pub fn host_rsp(&self) -> u32 {
        self.env + offset_of!(Env, host_rsp) as u32
    }
    pub fn target(&self) -> u32 {
        self.env + offset_of!(Env, target) as u32
    }
    pub fn flags(&self) -> u32 {
        self.env + offset_of!(Env, flags) as u32
    }
    pub fn exit(&self) -> u32 {
        self.env + offset_of!(Env, exit) as u32
    }
    pub fn argument(&self) -> u32 {
        self.env + offset_of!(Env, argument) as u32
    }
    pub fn value(&self) -> u32 {
        self.env + offset_of!(Env, value) as u32
    }
    pub fn replaced(&self) -> u32 {
        self.env + offset_of!(Env, replaced) as u32
    }
    pub fn indirect(&self) -> u32 {
        self.env + offset_of!(Env, indirect) as u32
    }
    pub fn trap_flags(&self) -> u32 {
        self.env + offset_of!(Env, trap_flags) as u32
    }
    pub fn retry(&self) -> u32 {
        self.env + offset_of!(Env, retry) as u32
    }
    pub fn resume(&self) -> u32 {
        self.env + offset_of!(Env, resume) as u32
    }
    pub fn entry(&self) -> u32 {
        self.env + offset_of!(Env, entry) as u32
    }
    /// A host address that is kept.
    pub fn kept(&self, number: usize) -> u32 {
        self.env + (offset_of!(Env, kept) + 8 * number) as u32
    }
    pub fn bounce(&self) -> u32 {
        self.env + offset_of!(Env, bounce) as u32
    }
    pub fn filled_sites(&self) -> u32 {
        self.env + offset_of!(Env, filled_sites) as u32
    }
    pub fn site_list(&self) -> u32 {
        self.env + offset_of!(Env, site_list) as u32
    }
    /// The entry of a site.
    pub fn site_entry(&self, number: usize) -> u32 {
        self.env + (offset_of!(Env, sites) + number * size_of::<SiteEntry>()) as u32
    }
    /// The entry of the stack's page.
    pub fn stack(&self, index: MmuIndex) -> u32 {
        let entry = index as usize * size_of::<TlbEntry>();
        self.env + (offset_of!(Env, stacks) + entry) as u32
    }
    pub fn sign_mask(&self) -> u32 {
        self.env + offset_of!(Env, sign_mask) as u32
    }
    pub fn ticks_left(&self) -> u32 {
        self.env + offset_of!(Env, ticks_left) as u32
    }
    pub fn no_if_mask(&self) -> u32 {
        self.env + offset_of!(Env, no_if_mask) as u32
    }
    pub fn no_df_mask(&self) -> u32 {
        self.env + offset_of!(Env, no_df_mask) as u32
    }
    pub fn no_ac_mask(&self) -> u32 {
        self.env + offset_of!(Env, no_ac_mask) as u32
    }
    /// For elements of 4 or 8 bytes.
    pub fn bit_mask(&self, size: u8) -> u32 {
        self.env + offset_of!(Env, bit_masks) as u32 + u32::from(size == 8) * 8
    }
    pub fn upper_mask(&self) -> u32 {
        self.env + offset_of!(Env, upper_mask) as u32
    }
    pub fn narrow(&self, user: bool) -> u32 {
        self.env + offset_of!(Env, narrow) as u32 + u32::from(user) * 4
    }
    pub fn wants_vectors(&self) -> u32 {
        self.env + offset_of!(Env, wants_vectors) as u32
    }
    pub fn holds_vectors(&self) -> u32 {
        self.env + offset_of!(Env, holds_vectors) as u32
    }
    pub fn strings(&self) -> u32 {
        self.env + offset_of!(Env, strings) as u32
    }
    /// RFLAGS, of which the status flags are not up to date.
    pub fn rflags(&self) -> u32 {
        self.cpu + offset_of!(Cpu, flags) as u32
    }
    /// Not zero if an interrupt waits for IF.
    pub fn waiting(&self) -> u32 {
        self.cpu + offset_of!(Cpu, waiting) as u32
    }
    fn segment(&self, number: usize) -> u32 {
        self.cpu + (offset_of!(Cpu, segments) + number * size_of::<Segment>()) as u32
    }
    pub fn selector(&self, number: usize) -> u32 {
        self.segment(number) + offset_of!(Segment, selector) as u32
    }
    pub fn segment_base(&self, number: usize) -> u32 {
        self.segment(number) + offset_of!(Segment, base) as u32
    }
    pub fn segment_limit(&self, number: usize) -> u32 {
        self.segment(number) + offset_of!(Segment, limit) as u32
    }
    pub fn segment_attributes(&self, number: usize) -> u32 {
        self.segment(number) + offset_of!(Segment, attributes) as u32
    }
    /// CR0, CR2, CR3, CR4.
    pub fn control(&self, number: usize) -> u32 {
        let offset = match number {
            0 => offset_of!(Cpu, cr0),
            2 => offset_of!(Cpu, cr2),
            3 => offset_of!(Cpu, cr3),
            _ => offset_of!(Cpu, cr4),
        };
        self.cpu + offset as u32
    }
    pub fn efer(&self) -> u32 {
        self.cpu + offset_of!(Cpu, efer) as u32
    }
    fn msrs(&self) -> u32 {
        self.cpu + offset_of!(Cpu, msrs) as u32
    }
    pub fn star(&self) -> u32 {
        self.msrs() + offset_of!(Msrs, star) as u32
    }
    pub fn lstar(&self) -> u32 {
        self.msrs() + offset_of!(Msrs, lstar) as u32
    }
    pub fn sfmask(&self) -> u32 {
        self.msrs() + offset_of!(Msrs, sfmask) as u32
    }
    pub fn kernel_gs_base(&self) -> u32 {
        self.msrs() + offset_of!(Msrs, kernel_gs_base) as u32
    }
    /// A slot of the jump tables.
    pub fn jump(&self, slot: usize) -> u32 {
        self.env + (offset_of!(Env, jumps) + slot * size_of::<u64>()) as u32
    }
}
