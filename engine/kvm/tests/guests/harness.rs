//! A virtual machine for a guest written in line.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use lodger_clock::LiveClock;
use lodger_guest_memory::{GuestMemory, RamRange};
use lodger_kvm::KvmEngine;
use lodger_vcpu::{Engine, EngineVm, Entry, Exit, Vcpu, VmConfig};
use lodger_x86::bits::{cr0, cr4, efer};
use lodger_x86::{CpuModel, CpuState, HostFeatures, Segment};

/// Where guests start; also the page that a start-up IPI with vector 8 names.
pub const CODE: u64 = 0x8000;
/// A page for the guest's data.
pub const DATA: u64 = 0x1_0000;
/// Where handlers may be put.
pub const HANDLER: u64 = 0x9000;
/// Interrupt descriptor table of long-mode guests.
const IDT: u64 = 0x5000;
const GDT: u64 = 0x6000;
const PAGE_TABLES: u64 = 0x1000;
const MEMORY: u64 = 0x20_0000;

/// The TSC frequency that the model asks for.
const TSC_KHZ: u32 = 2_000_000;

/// A guest that hangs is kicked after this; the test then fails with an unexpected `Kicked`.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Guest {
    pub vm: Arc<dyn EngineVm>,
    pub vcpu: Box<dyn Vcpu>,
    pub memory: GuestMemory,
    _watchdog: mpsc::Sender<()>,
}

pub fn signature() -> u32 {
    model(1).signature()
}

fn model(vcpus: u32) -> CpuModel {
    CpuModel::v3(vcpus, &HostFeatures::ALL, TSC_KHZ)
}

/// Assembles a guest at `address`.
pub fn assemble(
    bits: u32,
    address: u64,
    program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    program(&mut a).unwrap();
    a.assemble(address).unwrap()
}

impl Guest {
    /// A VM of `vcpus` vCPUs with nothing in memory; `None` without a usable /dev/kvm.
    pub fn empty(vcpus: u32) -> Option<Guest> {
        let engine = KvmEngine::new();
        if let Err(error) = engine.probe() {
            eprintln!("nothing to run on: {error}");
            return None;
        }
        let memory = GuestMemory::new(&[RamRange {
            start: 0,
            len: MEMORY,
        }])
        .unwrap();
        let config = VmConfig {
            memory: memory.clone(),
            clock: LiveClock::start(),
            entropy: Arc::new(|_| ()),
            model: Arc::new(model(vcpus)),
            vcpus,
        };
        let vm = engine.create_vm(config).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        Some(Guest {
            _watchdog: watch(vcpu.as_ref()),
            vm,
            vcpu,
            memory,
        })
    }

    /// A guest in real mode.
    pub fn real_mode(
        program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Option<Guest> {
        let mut guest = Guest::empty(1)?;
        let code = assemble(16, CODE, program);
        guest.memory.write(CODE, &code).unwrap();
        guest.vcpu.load(&real_mode_state()).unwrap();
        Some(guest)
    }

    /// A guest in ring 0 of 64-bit mode.
    pub fn long_mode(
        program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Option<Guest> {
        let mut guest = Guest::empty(1)?;
        guest.prepare_long_mode(program);
        guest.vcpu.load(&long_mode_state()).unwrap();
        Some(guest)
    }

    /// Writes what a long-mode guest needs: its code, page tables (the first 2 MiB and the 2 MiB pages at 0xd0000000 and
    /// 0xfee00000 mapped to themselves), and a GDT.
    pub fn prepare_long_mode(
        &mut self,
        program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) {
        let code = assemble(64, CODE, program);
        self.memory.write(CODE, &code).unwrap();
        for (address, entry) in [
            (PAGE_TABLES, PAGE_TABLES + 0x1003),
            (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2003),
            (PAGE_TABLES + 0x1018, PAGE_TABLES + 0x3003),
            (PAGE_TABLES + 0x2000, 0x83),
            (PAGE_TABLES + 0x3000 + 0x80 * 8, 0xd000_009b),
            (PAGE_TABLES + 0x3000 + 0x1f7 * 8, 0xfee0_009b),
            (GDT + 8, 0x00af_9b00_0000_ffff),
            (GDT + 16, 0x00cf_9300_0000_ffff),
        ] {
            self.memory
                .write(address, &u64::to_le_bytes(entry))
                .unwrap();
        }
    }

    /// Points `vector` of the long-mode IDT at `handler`.
    pub fn set_gate(&self, vector: u8, handler: u64) {
        let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        let address = IDT + u64::from(vector) * 16;
        self.memory.write(address, &low.to_le_bytes()).unwrap();
        let high = handler >> 32;
        self.memory.write(address + 8, &high.to_le_bytes()).unwrap();
    }

    /// Runs, and expects this exit.
    #[track_caller]
    pub fn expect(&mut self, entry: Entry, exit: Exit) {
        let got = self.vcpu.run(entry);
        assert!(matches!(got, Ok(e) if e == exit), "{got:x?}, not {exit:x?}");
    }

    /// Runs, and expects OUT of a 32-bit value to `port`.
    #[track_caller]
    pub fn expect_out(&mut self, entry: Entry, port: u16, value: u32) {
        let size = 4;
        self.expect(entry, Exit::PortWrite { port, size, value });
    }
}

/// Kicks the vCPU if the result still lives after a long time.
pub fn watch(vcpu: &dyn Vcpu) -> mpsc::Sender<()> {
    let (alive, ended) = mpsc::channel();
    let kicker = vcpu.kicker();
    thread::spawn(move || {
        if ended.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            kicker.kick();
        }
    });
    alive
}

pub fn real_mode_state() -> CpuState {
    let mut s = CpuState::reset(0, signature());
    s.segments = [Segment::real_mode(0); 6];
    s.segments[1].attributes = 0x9b;
    s.idtr.limit = 0x3ff;
    s.gpr[4] = CODE;
    s.rip = CODE;
    s
}

pub fn long_mode_state() -> CpuState {
    let mut s = CpuState::reset(0, signature());
    s.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    s.cr3 = PAGE_TABLES;
    s.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    s.efer = efer::SCE | efer::LME | efer::LMA;
    s.segments = [Segment::flat(0x10, 0xc093); 6];
    s.segments[1] = Segment::flat(0x8, 0xa09b);
    (s.gdtr.base, s.gdtr.limit) = (GDT, 0x17);
    (s.idtr.base, s.idtr.limit) = (IDT, 0xfff);
    s.gpr[4] = CODE;
    s.rip = CODE;
    s
}
