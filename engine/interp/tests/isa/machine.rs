//! A small machine for any engine: RAM, vCPUs, and tables so arranged that every exception is seen from outside with
//! the state of the interrupted program.
//!
//! Programs run from [`CODE`], with data and stack from [`DATA`]: addresses that the host can map as well, so that the same
//! code runs there. In long mode the machine's own tables are mapped in the upper half of the address space only. A program
//! ends with OUT to [`DONE`], which every mode and privilege level may use, or in an exception.

use std::sync::Arc;

use lodger_clock::LiveClock;
use lodger_guest_memory::{GuestMemory, RamRange};
use lodger_vcpu::{Engine, Entry, Exit, Vcpu, VmConfig};
use lodger_x86::bits::{cr0, cr4, efer, xcr0};
use lodger_x86::{CpuModel, CpuState, DescriptorTable, Segment};

/// Bytes of RAM.
const RAM: u64 = 0x10_0000;
/// Where the machine's only device is, behind RAM, and its size.
pub const DEVICE: u64 = 0x20_0000;
const DEVICE_SIZE: usize = 0x1_0000;
const GDT: u64 = 0x1000;
const LDT: u64 = 0x1800;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const TSS_SIZE: u64 = 0x100;
/// One OUT for each vector, 16 bytes apart.
const HANDLERS: u64 = 0x4000;
/// The top of the first vCPU's stack for exceptions; those of the others lie below.
const KERNEL_STACK: u64 = 0x1_0000;
const KERNEL_STACK_SIZE: u64 = 0x800;
const PML4: u64 = 0x1_0000;
/// Physical address of the last level of long mode's page tables for the low 2 MiB.
pub const LOW_TABLE: u64 = PML4 + 0x3000;
const DIRECTORY32: u64 = PML4 + 0x7000;
const LOW_TABLE32: u64 = PML4 + 0x8000;
const POINTERS_PAE: u64 = PML4 + 0x9000;
const LOW_TABLE_PAE: u64 = PML4 + 0xb000;

/// Where the machine's own tables are in long mode: RAM from here on, for ring 0.
pub const KERNEL: u64 = 0xffff_8000_0000_0000;
/// Two pages for programs.
pub const CODE: u64 = 0x2_0000;
/// 16 pages of which [`DATA_PAGES`] exist; segments of the 16-bit modes begin here.
pub const DATA: u64 = 0x3_0000;
/// The pages from [`DATA`] that are mapped, and whether they may be written.
pub const DATA_PAGES: [(u64, bool); 5] = [(0, true), (1, true), (2, false), (14, true), (15, true)];
/// Where stacks begin, relative to [`DATA`].
pub const STACK_OFFSET: u64 = 0x1c00;

/// The port that a program ends at: `OUT 0xf5, AL` is e6 f5.
pub const DONE: u8 = 0xf5;
pub const END_OF_PROGRAM: [u8; 2] = [0xe6, DONE];
/// The port that the handlers use.
const REPORT: u8 = 0xf4;

/// Selectors; those for ring 3 are Linux's, so that code can compare them.
mod sel {
    pub const CODE64: u16 = 0x08;
    pub const DATA0: u16 = 0x10;
    pub const CODE32: u16 = 0x18;
    pub const CODE32_3: u16 = 0x23;
    pub const DATA3: u16 = 0x2b;
    pub const CODE64_3: u16 = 0x33;
    pub const TSS: u16 = 0x38;
    pub const LDT: u16 = 0x48;
    pub const CODE16: u16 = 0x58;
    pub const DATA16: u16 = 0x60;
    pub const GDT_END: u16 = 0x68;
    /// In the LDT.
    pub const CODE16_3: u16 = 0x07;
    pub const DATA16_3: u16 = 0x0f;
}

/// The mode a program runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit mode, ring 0 or 3.
    Long(u8),
    /// Long mode, ring 3, flat 32-bit segments.
    Compat32,
    /// Long mode, ring 3, 16-bit segments from [`CODE`] and [`DATA`].
    Compat16,
    /// Legacy protected mode without paging, flat 32-bit segments, ring 0 or 3.
    Protected(u8),
    /// Legacy protected mode without paging, 16-bit segments, ring 0.
    Protected16,
    /// Real mode.
    Real,
}

impl Mode {
    /// Bits of a code address by default.
    pub fn bitness(self) -> u32 {
        match self {
            Mode::Long(_) => 64,
            Mode::Compat32 | Mode::Protected(_) => 32,
            Mode::Compat16 | Mode::Protected16 | Mode::Real => 16,
        }
    }

    fn is_long(self) -> bool {
        matches!(self, Mode::Long(_) | Mode::Compat32 | Mode::Compat16)
    }

    fn ring(self) -> u8 {
        match self {
            Mode::Long(ring) | Mode::Protected(ring) => ring,
            Mode::Compat32 | Mode::Compat16 => 3,
            Mode::Protected16 | Mode::Real => 0,
        }
    }

    /// What CS-relative addresses are relative to.
    pub fn code_base(self) -> u64 {
        if self.bitness() == 16 { CODE } else { 0 }
    }

    /// What other addresses are relative to.
    pub fn data_base(self) -> u64 {
        if self.bitness() == 16 { DATA } else { 0 }
    }
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// At [`DONE`].
    Done,
    /// By an exception.
    Exception {
        vector: u8,
        /// Zero for those without one.
        error: u32,
    },
    Shutdown,
    TickLimit,
}

/// How a program ended, and the state at that point: after an exception that which the handler would return to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub end: End,
    pub state: CpuState,
    /// Instructions that the program retired.
    pub ticks: u64,
}

/// A machine with one or more vCPUs.
pub struct Machine {
    pub memory: GuestMemory,
    pub vcpus: Vec<Box<dyn Vcpu>>,
    pub mode: Mode,
    /// A device that remembers what is written to it, at guest-physical [`DEVICE`].
    pub device: Vec<u8>,
}

/// A descriptor of a segment; `attributes` as in [`Segment`].
pub fn descriptor(base: u32, limit: u32, attributes: u16) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(attributes & 0xf0ff) << 40
        | (limit >> 16 & 0xf) << 48
        | base >> 24 << 56
}

impl Machine {
    /// With `vcpus` vCPUs, all tables in place.
    pub fn new(engine: &dyn Engine, mode: Mode, vcpus: u32) -> Machine {
        let memory = GuestMemory::new(&[RamRange { start: 0, len: RAM }]).unwrap();
        let host = lodger_interp::host_features();
        let vm = engine
            .create_vm(VmConfig {
                memory: memory.clone(),
                clock: LiveClock::start(),
                entropy: Arc::new(|bytes| bytes.fill(0xa5)),
                model: Arc::new(CpuModel::v3(vcpus, &host, 1_000_000)),
                vcpus,
            })
            .unwrap();
        let vcpus = (0..vcpus).map(|i| vm.create_vcpu(i).unwrap()).collect();
        let mut machine = Machine {
            memory,
            vcpus,
            mode,
            device: vec![0; DEVICE_SIZE],
        };
        machine.reset_memory();
        machine
    }

    /// Puts all tables in place and clears the programs' memory.
    pub fn reset_memory(&mut self) {
        self.write_tables();
        self.map_pages();
        self.device.fill(0);
        for page in [0, 1] {
            self.memory.write(CODE + (page << 12), &[0; 4096]).unwrap();
        }
        for (page, _) in DATA_PAGES {
            self.memory.write(DATA + (page << 12), &[0; 4096]).unwrap();
        }
    }

    pub fn put32(&self, at: u64, value: u32) {
        self.memory.write(at, &value.to_le_bytes()).unwrap();
    }

    pub fn put64(&self, at: u64, value: u64) {
        self.memory.write(at, &value.to_le_bytes()).unwrap();
    }

    /// Reads `len` bytes of RAM.
    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read(at, &mut data).unwrap();
        data
    }

    /// What the data pages hold.
    pub fn data(&self) -> Vec<u8> {
        let pages = DATA_PAGES
            .iter()
            .map(|(page, _)| self.bytes(DATA + (page << 12), 4096));
        pages.collect::<Vec<_>>().concat()
    }

    /// Sets the flags of a low page's entry, in long mode's tables and in those for 32-bit paging; the address stays.
    pub fn set_page(&self, page: u64, flags: u64) {
        self.map_page(page, page << 12 | flags);
    }

    /// Sets a low page's entry.
    pub fn map_page(&self, page: u64, entry: u64) {
        self.put64(LOW_TABLE + 8 * page, entry);
        self.put32(LOW_TABLE32 + 4 * page, entry as u32);
        self.put64(LOW_TABLE_PAE + 8 * page, entry);
    }

    /// An interrupt gate of long mode to code of ring 0.
    pub fn set_gate(&self, vector: u8, handler: u64) {
        let low = handler & 0xffff | u64::from(sel::CODE64) << 16 | 0x8e << 40;
        let at = IDT + 16 * u64::from(vector);
        self.put64(at, low | (handler >> 16 & 0xffff) << 48);
        self.put64(at + 8, handler >> 32);
    }

    /// CR3 for 32-bit paging, without and with PAE: maps the low 1 MiB, the programs' pages as in long mode, the rest for
    /// ring 0.
    pub fn cr3_for_32_bit_paging(&self, pae: bool) -> u64 {
        if pae { POINTERS_PAE } else { DIRECTORY32 }
    }

    fn write_tables(&self) {
        for v in 0..=255_u64 {
            let handler = HANDLERS + 16 * v;
            self.memory.write(handler, &[0xe6, REPORT]).unwrap();
            // Interrupt gates; INT3 and INTO are for every ring.
            let kind = if matches!(v, 3 | 4) { 0xee } else { 0x8e };
            if self.mode == Mode::Real {
                self.put32(
                    4 * v,
                    (handler as u32) << 12 & 0xffff_0000 | handler as u32 & 0xf,
                );
            } else if self.mode.is_long() {
                let handler = KERNEL + handler;
                let low = handler & 0xffff | u64::from(sel::CODE64) << 16 | kind << 40 | 1 << 32;
                self.put64(IDT + 16 * v, low | (handler >> 16 & 0xffff) << 48);
                self.put64(IDT + 16 * v + 8, handler >> 32);
            } else {
                let low = handler & 0xffff | u64::from(sel::CODE32) << 16 | kind << 40;
                self.put64(IDT + 8 * v, low);
            }
        }
        let flat = |attributes| descriptor(0, 0xf_ffff, attributes);
        let tss = |i: u64| descriptor((TSS + i * TSS_SIZE) as u32, TSS_SIZE as u32 - 1, 0x8b);
        let high = |low: u64| {
            if self.mode.is_long() {
                (low, KERNEL >> 32)
            } else {
                (low, 0)
            }
        };
        let (tss_low, tss_high) = high(tss(0));
        let (ldt_low, ldt_high) = high(descriptor(LDT as u32, 0x2f, 0x82));
        for (selector, entry) in [
            (sel::CODE64, flat(0xa09b)),
            (sel::DATA0, flat(0xc093)),
            (sel::CODE32, flat(0xc09b)),
            (sel::CODE32_3, flat(0xc0fb)),
            (sel::DATA3, flat(0xc0f3)),
            (sel::CODE64_3, flat(0xa0fb)),
            (sel::TSS, tss_low),
            (sel::TSS + 8, tss_high),
            (sel::LDT, ldt_low),
            (sel::LDT + 8, ldt_high),
            (sel::CODE16, descriptor(CODE as u32, 0xffff, 0x9b)),
            (sel::DATA16, descriptor(DATA as u32, 0xffff, 0x93)),
        ] {
            self.put64(GDT + u64::from(selector & !7), entry);
        }
        self.put64(LDT, descriptor(CODE as u32, 0xffff, 0xfb));
        self.put64(LDT + 8, descriptor(DATA as u32, 0xffff, 0xf3));
        for i in 0..self.vcpus.len() as u64 {
            let (tss, stack) = (TSS + i * TSS_SIZE, KERNEL_STACK - i * KERNEL_STACK_SIZE);
            if self.mode.is_long() {
                self.put64(tss + 4, KERNEL + stack);
                self.put64(tss + 0x24, KERNEL + stack);
            } else {
                self.put32(tss + 4, stack as u32);
                self.put32(tss + 8, sel::DATA0.into());
            }
            // The I/O permission map denies everything but the last ports that it covers.
            self.put32(tss + 0x64, 0x68 << 16);
            self.memory.write(tss + 0x68, &[0xff; 0x20]).unwrap();
            self.memory.write(tss + 0x68 + 0x1e, &[0xcf]).unwrap();
        }
    }

    fn map_pages(&self) {
        let user = if self.mode.ring() == 3 { 4 } else { 0 };
        for (at, entry) in [
            (PML4, PML4 + 0x1007),
            (PML4 + 0x1000, PML4 + 0x2007),
            (PML4 + 0x2000, PML4 + 0x3007),
            (PML4 + 0x800, PML4 + 0x4003),
            (PML4 + 0x4000, PML4 + 0x5003),
            (PML4 + 0x5000, PML4 + 0x6003),
        ] {
            self.put64(at, entry);
        }
        // What earlier programs may have set.
        for table in [
            PML4 + 0x1000,
            PML4 + 0x2000,
            DIRECTORY32,
            POINTERS_PAE,
            POINTERS_PAE + 0x1000,
        ] {
            self.put64(table + 8, 0);
        }
        self.put64(DIRECTORY32, LOW_TABLE32 | 7);
        self.put64(POINTERS_PAE, (POINTERS_PAE + 0x1000) | 1);
        self.put64(POINTERS_PAE + 0x1000, LOW_TABLE_PAE | 7);
        for page in 0..RAM >> 12 {
            self.put64(PML4 + 0x6000 + 8 * page, page << 12 | 3);
            self.put32(LOW_TABLE32 + 4 * page, (page << 12) as u32 | 3);
            self.put64(LOW_TABLE_PAE + 8 * page, page << 12 | 3);
        }
        for page in [CODE >> 12, (CODE >> 12) + 1] {
            self.set_page(page, 3 | user);
        }
        for (page, writable) in DATA_PAGES {
            let flags = if writable { 3 } else { 1 };
            self.set_page((DATA >> 12) + page, flags | user);
        }
    }

    /// The state in which vCPU `index` begins a program.
    pub fn start(&mut self, index: usize) -> CpuState {
        let mode = self.mode;
        let mut s = self.vcpus[index].store().unwrap();
        let fresh = CpuState::reset(index as u32, 0);
        s = CpuState {
            lapic: s.lapic,
            tsc_base: s.tsc_base,
            activity: lodger_x86::Activity::Running,
            ..fresh
        };
        let kernel = if mode.is_long() { KERNEL } else { 0 };
        s.gdtr = DescriptorTable {
            base: kernel + GDT,
            limit: sel::GDT_END - 1,
        };
        s.idtr = match mode {
            Mode::Real => DescriptorTable {
                base: 0,
                limit: 0x3ff,
            },
            _ => DescriptorTable {
                base: kernel + IDT,
                limit: 0xfff,
            },
        };
        s.tr = Segment {
            selector: sel::TSS,
            attributes: 0x8b,
            limit: TSS_SIZE as u32 - 1,
            base: kernel + TSS + index as u64 * TSS_SIZE,
        };
        s.ldtr = Segment {
            selector: sel::LDT,
            attributes: 0x82,
            limit: 0x2f,
            base: kernel + LDT,
        };
        let (code, data) = match mode {
            Mode::Long(0) => (
                Segment::flat(sel::CODE64, 0xa09b),
                Segment::flat(sel::DATA0, 0xc093),
            ),
            Mode::Long(_) => (
                Segment::flat(sel::CODE64_3, 0xa0fb),
                Segment::flat(sel::DATA3, 0xc0f3),
            ),
            Mode::Protected(0) => (
                Segment::flat(sel::CODE32, 0xc09b),
                Segment::flat(sel::DATA0, 0xc093),
            ),
            Mode::Compat32 | Mode::Protected(_) => (
                Segment::flat(sel::CODE32_3, 0xc0fb),
                Segment::flat(sel::DATA3, 0xc0f3),
            ),
            Mode::Compat16 => (
                small(sel::CODE16_3, CODE, 0xfb),
                small(sel::DATA16_3, DATA, 0xf3),
            ),
            Mode::Protected16 => (
                small(sel::CODE16, CODE, 0x9b),
                small(sel::DATA16, DATA, 0x93),
            ),
            Mode::Real => (
                small((CODE >> 4) as u16, CODE, 0x9b),
                small((DATA >> 4) as u16, DATA, 0x93),
            ),
        };
        s.segments = [data; 6];
        s.segments[1] = code;
        s.rip = CODE - mode.code_base();
        s.gpr = [0; 16];
        s.gpr[4] = DATA + STACK_OFFSET - mode.data_base();
        s.rflags = 2;
        s.cr0 = cr0::ET | cr0::NE;
        if mode != Mode::Real {
            s.cr0 |= cr0::PE | cr0::MP;
        }
        s.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        s.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
        if mode.is_long() {
            s.cr0 |= cr0::PG | cr0::WP;
            s.cr4 |= cr4::PAE | cr4::FSGSBASE;
            s.cr3 = PML4;
            s.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        }
        s.fpu.fcw = 0x37f;
        s
    }

    /// Runs the first vCPU from `start` until the program ends, for at most `limit` instructions.
    pub fn run(&mut self, start: &CpuState, limit: u64) -> Outcome {
        self.vcpus[0].load(start).unwrap();
        let outcome = finish(&mut *self.vcpus[0], &mut self.device, limit);
        self.interrupted(start, outcome)
    }

    /// The same in steps of one instruction, at each of which the state is stored and loaded again. `each` sees it.
    pub fn run_in_steps(
        &mut self,
        start: &CpuState,
        limit: u64,
        mut each: impl FnMut(u64, &CpuState),
    ) -> Outcome {
        let mut state = start.clone();
        for tick in 1..=limit {
            self.vcpus[0].load(&state).unwrap();
            let mut outcome = finish(&mut *self.vcpus[0], &mut self.device, 1);
            outcome.ticks += tick - 1;
            if outcome.end != End::TickLimit || tick == limit {
                return self.interrupted(start, outcome);
            }
            state = outcome.state;
            each(tick, &state);
        }
        unreachable!("the limit is not zero")
    }

    /// Turns the state in a handler into that of the interrupted program.
    fn interrupted(&self, start: &CpuState, mut outcome: Outcome) -> Outcome {
        let End::Exception { vector, error } = &mut outcome.end else {
            return outcome;
        };
        let s = &mut outcome.state;
        let word = match self.mode {
            Mode::Real => 2,
            _ if self.mode.is_long() => 8,
            _ => 4,
        };
        let ss = s.segments[2];
        let (base, mask) = match ss.is_big() || self.mode.is_long() {
            true => (0, u64::MAX),
            false => (ss.base, 0xffff),
        };
        let mut sp = s.gpr[4];
        let mut pop = || {
            let at = base.wrapping_add(sp & mask) & (RAM - 1);
            let bytes = self.bytes(at, word as usize);
            sp += word;
            bytes
                .iter()
                .rev()
                .fold(0, |value, b| value << 8 | u64::from(*b))
        };
        let has_error = matches!(*vector, 8 | 10..=14 | 17) && self.mode != Mode::Real;
        *error = if has_error { pop() as u32 } else { 0 };
        s.rip = pop();
        let code = pop() as u16;
        s.rflags = pop();
        let switched = self.mode.is_long() || code & 3 != 0 && self.mode != Mode::Real;
        let (rsp, stack) = if switched {
            (pop(), pop() as u16)
        } else {
            (sp, s.segments[2].selector)
        };
        s.gpr[4] = rsp;
        for (n, selector) in [(1, code), (2, stack)] {
            s.segments[n] = match start.segments[n] {
                same if same.selector == selector => same,
                _ => Segment {
                    selector,
                    ..Segment::default()
                },
            };
        }
        outcome
    }
}

fn small(selector: u16, base: u64, attributes: u16) -> Segment {
    Segment {
        selector,
        attributes,
        limit: 0xffff,
        base,
    }
}

/// `size` bytes of the device; `None`: nothing is there.
fn register(device: &mut [u8], address: u64, size: u8) -> Option<&mut [u8]> {
    let at = address.checked_sub(DEVICE)? as usize;
    device.get_mut(at..at + usize::from(size))
}

/// Runs a loaded vCPU until the program ends.
fn finish(vcpu: &mut dyn Vcpu, device: &mut [u8], limit: u64) -> Outcome {
    let before = vcpu.ticks();
    vcpu.set_tick_limit(Some(before + limit));
    let mut entry = Entry::Resume;
    loop {
        let exit = vcpu.run(entry).unwrap();
        let end = match exit {
            Exit::PortWrite { port, .. } if [DONE, REPORT].map(u16::from).contains(&port) => {
                vcpu.set_tick_limit(None);
                // The OUT is completed; nothing behind it is executed.
                vcpu.kicker().kick();
                assert_eq!(vcpu.run(Entry::Written).unwrap(), Exit::Kicked);
                let mut state = vcpu.store().unwrap();
                let end = if port == u16::from(DONE) {
                    state.rip -= END_OF_PROGRAM.len() as u64;
                    End::Done
                } else {
                    let offset = (state.segments[1].base + state.rip - 2) & 0xfff;
                    End::Exception {
                        vector: (offset / 16) as u8,
                        error: 0,
                    }
                };
                return Outcome {
                    end,
                    state,
                    // An engine may not count.
                    ticks: (vcpu.ticks() - before).saturating_sub(1),
                };
            }
            Exit::PortRead { port, size } => {
                entry = Entry::Data((u64::from(port) * 0x1111_1111) & u64::MAX >> (64 - 8 * size));
                continue;
            }
            Exit::MmioRead { address, size } => {
                let mut value = [0xff; 8];
                if let Some(register) = register(device, address, size) {
                    value[..size.into()].copy_from_slice(register);
                }
                let value = u64::from_le_bytes(value) & u64::MAX >> (64 - 8 * size);
                entry = Entry::Data(value);
                continue;
            }
            Exit::MmioWrite {
                address,
                size,
                value,
            } => {
                if let Some(register) = register(device, address, size) {
                    register.copy_from_slice(&value.to_le_bytes()[..size.into()]);
                }
                entry = Entry::Written;
                continue;
            }
            Exit::PortWrite { .. } => {
                entry = Entry::Written;
                continue;
            }
            Exit::TickLimit => End::TickLimit,
            Exit::Shutdown => End::Shutdown,
            other => panic!("{other:x?} at {:x?}", vcpu.store()),
        };
        return Outcome {
            end,
            state: vcpu.store().unwrap(),
            ticks: vcpu.ticks() - before,
        };
    }
}
