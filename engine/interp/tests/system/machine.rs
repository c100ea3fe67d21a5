//! A bare machine: RAM, one vCPU, tables at fixed places, and handlers that report which vector they are.
//!
//! A program ends with OUT to [`DONE`], or in a handler.

use std::sync::Arc;

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, al};
use lodger_clock::manual::ManualClock;
use lodger_guest_memory::{GuestMemory, RamRange};
use lodger_interp::host_features;
use lodger_vcpu::{Entry, Exit, Vcpu, VmConfig};
use lodger_x86::bits::{cr0, cr4, efer};
use lodger_x86::{CpuModel, CpuState, DescriptorTable, Segment};

pub const GDT: u64 = 0x1000;
pub const LDT: u64 = 0x1800;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
pub const TSS2: u64 = 0x3400;
/// The report handlers, 16 bytes each.
pub const HANDLERS: u64 = 0x4000;
/// Top of the stack that the TSS has for ring 0.
pub const STACK0: u64 = 0x8000;
/// Top of the stack that programs begin with.
pub const STACK: u64 = 0x9000;
pub const DATA: u64 = 0xa000;
pub const CODE: u64 = 0x1_0000;
/// A second place for code.
pub const CODE2: u64 = 0x1_1000;
const PML4: u64 = 0x2_0000;

/// The port that a program ends at.
pub const DONE: u8 = 0xf5;
/// The port that handlers end at.
const REPORT: u8 = 0xf4;
/// A gate that every privilege level may use, to end programs that may not use ports.
pub const END: u8 = 0x30;

/// Selectors of the GDT.
pub mod sel {
    pub const CODE0: u16 = 0x08;
    pub const DATA0: u16 = 0x10;
    pub const CODE3: u16 = 0x1b;
    pub const DATA3: u16 = 0x23;
    pub const TSS: u16 = 0x28;
    pub const TSS2: u16 = 0x38;
    pub const LDT: u16 = 0x48;
    pub const CALL_GATE: u16 = 0x58;
    pub const CONFORMING: u16 = 0x68;
    pub const ABSENT: u16 = 0x70;
    pub const READ_ONLY: u16 = 0x78;
    pub const EXECUTE_ONLY: u16 = 0x80;
    pub const TASK_GATE: u16 = 0x88;
    pub const CODE16: u16 = 0x90;
    pub const DATA16: u16 = 0x98;
    pub const EXPAND_DOWN: u16 = 0xa0;
    pub const ABSENT_CODE: u16 = 0xa8;
    pub const CODE64: u16 = 0xb0;
    pub const CODE64_3: u16 = 0xbb;
    pub const BEYOND: u16 = 0xc0;
}

/// How a run ended.
#[derive(Debug)]
pub enum End {
    /// At [`DONE`].
    Done,
    /// In a handler: its vector, and its stack from the top.
    Handler(u8, Vec<u64>),
    Shutdown,
}

/// How programs end.
pub trait Endings {
    /// Through the gate that is open to everybody.
    fn end(&mut self) -> Result<(), IcedError>;
    /// By the port.
    fn done(&mut self) -> Result<(), IcedError>;
}

impl Endings for CodeAssembler {
    fn end(&mut self) -> Result<(), IcedError> {
        self.int(u32::from(END))
    }

    fn done(&mut self) -> Result<(), IcedError> {
        self.out(u32::from(DONE), al)
    }
}

pub struct Machine {
    pub memory: GuestMemory,
    pub clock: Arc<ManualClock>,
    pub vcpu: Box<dyn Vcpu>,
    pub state: CpuState,
    /// Addresses and values of the writes outside of RAM.
    pub device_writes: Vec<(u64, u64)>,
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

/// A gate to `selector:offset`; `kind`: type, DPL and P.
pub fn gate(selector: u16, offset: u32, kind: u8, count: u8) -> u64 {
    let offset = u64::from(offset);
    offset & 0xffff
        | u64::from(selector) << 16
        | u64::from(count) << 32
        | u64::from(kind) << 40
        | offset >> 16 << 48
}

impl Machine {
    fn new() -> Machine {
        let memory = GuestMemory::new(&[RamRange {
            start: 0,
            len: 1 << 20,
        }])
        .unwrap();
        let clock = ManualClock::new(1_700_000_000_000_000_000);
        let model = Arc::new(CpuModel::v3(1, &host_features(), 1_000_000));
        let vm = crate::engine()
            .create_vm(VmConfig {
                memory: memory.clone(),
                clock: clock.clone(),
                entropy: Arc::new(|_| ()),
                model: Arc::clone(&model),
                vcpus: 1,
            })
            .unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let mut state = vcpu.store().unwrap();
        state.gpr = [0; 16];
        Machine {
            memory,
            clock,
            vcpu,
            state,
            device_writes: Vec::new(),
        }
    }

    /// In real mode at CODE.
    pub fn real() -> Machine {
        let mut m = Machine::new();
        m.state.segments = [Segment::real_mode(0); 6];
        m.state.segments[1].attributes = 0x9b;
        m.state.rip = CODE & 0xffff;
        m.state.segments[1] = Segment {
            attributes: 0x9b,
            ..Segment::real_mode((CODE >> 4) as u16)
        };
        m.state.gpr[4] = STACK;
        for v in 0..=255_u8 {
            let handler = HANDLERS + 16 * u64::from(v);
            m.u32(
                4 * u64::from(v),
                (handler & 0xf) as u32 | (handler as u32 >> 4) << 16,
            );
            m.memory.write(handler, &[0x6a, v, 0xe6, REPORT]).unwrap();
        }
        m
    }

    fn tables(&mut self, tss: u8) {
        let flat = |attributes| descriptor(0, 0xf_ffff, attributes);
        let entries = [
            (sel::CODE0, flat(0xc09b)),
            (sel::DATA0, flat(0xc093)),
            (sel::CODE3, flat(0xc0fb)),
            (sel::DATA3, flat(0xc0f3)),
            (sel::TSS, descriptor(TSS as u32, 0x1ff, tss as u16 | 2)),
            (sel::TSS2, descriptor(TSS2 as u32, 0x67, tss.into())),
            (sel::LDT, descriptor(LDT as u32, 0x17, 0x82)),
            (sel::CONFORMING, flat(0xc09f)),
            (sel::ABSENT, flat(0xc073)),
            (sel::READ_ONLY, flat(0xc0f1)),
            (sel::EXECUTE_ONLY, flat(0xc0f9)),
            (sel::TASK_GATE, gate(sel::TSS2, 0, 0xe5, 0)),
            (sel::CODE16, descriptor(0, 0xffff, 0x9b)),
            (sel::DATA16, descriptor(0, 0xffff, 0x93)),
            (sel::EXPAND_DOWN, descriptor(0, 0xfff, 0x40f7)),
            (sel::ABSENT_CODE, flat(0xc01b)),
            (sel::CODE64, flat(0xa09b)),
            (sel::CODE64_3, flat(0xa0fb)),
        ];
        for (selector, entry) in entries {
            self.u64(GDT + u64::from(selector & !7), entry);
        }
        self.state.gdtr = DescriptorTable {
            base: GDT,
            limit: sel::BEYOND - 1,
        };
        self.state.tr = Segment {
            selector: sel::TSS,
            attributes: tss as u16 | 2,
            limit: 0x1ff,
            base: TSS,
        };
        self.state.ldtr = Segment::default();
        for v in 0..=255_u8 {
            let handler = HANDLERS + 16 * u64::from(v);
            let code = [0x68, v, 0, 0, 0, 0xe6, REPORT, 0xeb, 0xfe];
            self.memory.write(handler, &code).unwrap();
        }
        self.state.gpr[4] = STACK;
        self.state.rip = CODE;
        self.state.rflags = 2;
    }

    /// In 32-bit protected mode without paging, in ring `level`.
    pub fn protected(level: u8) -> Machine {
        let mut m = Machine::new();
        m.tables(0x89);
        for v in 0..=255_u8 {
            let kind = if v == END { 0xee } else { 0x8e };
            let handler = HANDLERS as u32 + 16 * u32::from(v);
            m.u64(IDT + 8 * u64::from(v), gate(sel::CODE0, handler, kind, 0));
        }
        m.state.idtr = DescriptorTable {
            base: IDT,
            limit: 0x7ff,
        };
        m.state.cr0 = cr0::PE | cr0::ET | cr0::NE;
        m.u32(TSS + 4, STACK0 as u32);
        m.u32(TSS + 8, sel::DATA0.into());
        m.u32(TSS + 0x64, 0x80_0000);
        m.level(level, sel::CODE0, sel::CODE3, 0xc09b);
        m
    }

    /// In 64-bit mode, everything identity-mapped for all, in ring `level`.
    pub fn long(level: u8) -> Machine {
        let mut m = Machine::new();
        m.tables(0x89);
        for v in 0..=255_u8 {
            let kind = if v == END { 0xee } else { 0x8e };
            let handler = HANDLERS as u32 + 16 * u32::from(v);
            m.u64(IDT + 16 * u64::from(v), gate(sel::CODE64, handler, kind, 0));
            m.u64(IDT + 16 * u64::from(v) + 8, 0);
        }
        m.state.idtr = DescriptorTable {
            base: IDT,
            limit: 0xfff,
        };
        m.u64(PML4, PML4 + 0x1007);
        m.u64(PML4 + 0x1000, PML4 + 0x2007);
        m.u64(PML4 + 0x2000, 0x87);
        m.state.cr3 = PML4;
        m.state.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::PG | cr0::WP;
        m.state.cr4 = cr4::PAE;
        m.state.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        m.u64(TSS + 4, STACK0);
        m.u32(TSS + 0x64, 0x80_0000);
        m.level(level, sel::CODE64, sel::CODE64_3, 0xa09b);
        m
    }

    fn level(&mut self, level: u8, code0: u16, code3: u16, attributes: u16) {
        let dpl = u16::from(level) << 5;
        let (code, data) = match level {
            0 => (code0, sel::DATA0),
            _ => (code3, sel::DATA3),
        };
        self.state.segments = [Segment::flat(data, 0xc093 | dpl); 6];
        self.state.segments[1] = Segment::flat(code, attributes | dpl);
    }

    /// Lets guest time pass.
    pub fn clock_forward(&mut self, ns: u64) {
        self.clock.advance(ns);
    }

    /// Writes 4 bytes of RAM.
    pub fn u32(&mut self, at: u64, value: u32) {
        self.memory.write(at, &value.to_le_bytes()).unwrap();
    }

    /// Writes 8 bytes of RAM.
    pub fn u64(&mut self, at: u64, value: u64) {
        self.memory.write(at, &value.to_le_bytes()).unwrap();
    }

    /// Reads 4 bytes of RAM.
    pub fn get32(&self, at: u64) -> u32 {
        self.memory.read_u32(at).unwrap()
    }

    /// Reads 8 bytes of RAM.
    pub fn get64(&self, at: u64) -> u64 {
        self.memory.read_u64(at).unwrap()
    }

    /// Assembles code.
    pub fn code(
        &mut self,
        bits: u32,
        at: u64,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) {
        let mut a = CodeAssembler::new(bits).unwrap();
        write(&mut a).unwrap();
        let code = a.assemble(at).unwrap();
        self.memory.write(at, &code).unwrap();
    }

    /// Runs from `state` to the end; `state` is then that at the end.
    pub fn run(&mut self) -> End {
        self.vcpu.load(&self.state).unwrap();
        let ticks = self.vcpu.ticks();
        self.vcpu.set_tick_limit(Some(ticks + 10_000));
        let mut entry = Entry::Resume;
        loop {
            match self.vcpu.run(entry).unwrap() {
                Exit::PortWrite { port, .. } if [DONE, REPORT].map(u16::from).contains(&port) => {
                    self.vcpu.kicker().kick();
                    assert_eq!(self.vcpu.run(Entry::Written).unwrap(), Exit::Kicked);
                    self.state = self.vcpu.store().unwrap();
                    if port == u16::from(DONE) {
                        return End::Done;
                    }
                    let stack = self.stack();
                    return End::Handler(stack[0] as u8, stack[1..].to_vec());
                }
                Exit::PortWrite { .. } => entry = Entry::Written,
                Exit::MmioWrite { address, value, .. } => {
                    self.device_writes.push((address, value));
                    entry = Entry::Written;
                }
                Exit::MmioRead { .. } => entry = Entry::Data(0),
                Exit::PortRead { port, size } => {
                    let value = u64::from(port) * 0x1111_1111;
                    entry = Entry::Data(value & (u64::MAX >> (64 - 8 * u32::from(size))));
                }
                Exit::Shutdown => {
                    self.state = self.vcpu.store().unwrap();
                    return End::Shutdown;
                }
                other => panic!("{other:x?} at {:#x?}", self.vcpu.store().unwrap()),
            }
        }
    }

    /// The words on the stack.
    pub fn stack(&self) -> Vec<u64> {
        let [code, stack] = [self.state.segments[1], self.state.segments[2]];
        let mask = if code.is_long() || stack.is_big() {
            u64::MAX
        } else {
            0xffff
        };
        let base = if code.is_long() { 0 } else { stack.base };
        let sp = base + (self.state.gpr[4] & mask);
        let word = |i: u64| match (code.is_long(), code.is_big()) {
            (true, _) => self.get64(sp + 8 * i),
            (_, true) => self.get32(sp + 4 * i).into(),
            _ => u64::from(self.get32(sp + 2 * i) & 0xffff),
        };
        (0..14).map(word).collect()
    }

    /// Runs and expects the end in a handler; its stack.
    pub fn expect(&mut self, vector: u8) -> Vec<u64> {
        match self.run() {
            End::Handler(v, stack) if v == vector => stack,
            other => panic!(
                "expected vector {vector:#x}: {other:x?} at {:#x}",
                self.state.rip
            ),
        }
    }

    /// Runs and expects a fault with an error code at `rip`.
    pub fn expect_fault(&mut self, vector: u8, error: u64, rip: u64) {
        let stack = self.expect(vector);
        assert_eq!(
            (stack[0], stack[1]),
            (error, rip),
            "error code and RIP of vector {vector}"
        );
    }

    /// Runs and expects the program's own end.
    pub fn expect_done(&mut self) {
        match self.run() {
            End::Done => {}
            other => panic!("expected the end: {other:x?} at {:#x}", self.state.rip),
        }
    }
}
