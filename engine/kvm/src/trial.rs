//! Whether this host's KVM runs stock guests: a small guest, run in a virtual machine of its own, says so.
//!
//! Some hosts (virtual machines without nested virtualization, for example) have a /dev/kvm that runs guest kernel code by emulating it,
//! without some instructions; a stock kernel stops there with an internal error within its first second. The trial guest executes in
//! ring 0 of long mode what such emulators are known to lack and kernels cannot do without.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kvm_ioctls::Kvm;
use lodger_clock::LiveClock;
use lodger_guest_memory::{GuestMemory, RamRange};
use lodger_vcpu::{EngineError, Entry, Exit, Vcpu, VmConfig};
use lodger_x86::bits::{cr0, cr4, efer, msr};
use lodger_x86::{CpuModel, CpuState, HostFeatures, Segment};

use crate::vm::Vm;

/// The trial takes well under a millisecond where KVM is in order.
const LIMIT: Duration = Duration::from_secs(2);

const PAGE_TABLES: u64 = 0x1000;
const STACK: u64 = 0x8000;
const CODE: u64 = 0x8000;
const DATA: u64 = 0x1_0000;
const MEMORY: u64 = 0x20_0000;

/// What the guest writes to [`PORT`] at the end.
const PASSED: u32 = 0x600d;
const PORT: u16 = 0xf4;

/// Runs the trial guest; the error says why stock guests do not run.
pub(crate) fn run(kvm: &Kvm) -> Result<(), String> {
    let mut vcpu = prepare(kvm).map_err(|e| e.to_string())?;
    let kicker = vcpu.kicker();
    let (done, result) = mpsc::channel();
    thread::spawn(move || {
        // Whether anybody still waits does not matter.
        let _ = done.send(vcpu.run(Entry::Resume));
    });
    let first = result.recv_timeout(LIMIT);
    let exit = first.or_else(|_| {
        kicker.kick();
        result.recv_timeout(LIMIT)
    });
    match exit {
        Ok(Ok(Exit::PortWrite {
            port: PORT,
            value: PASSED,
            ..
        })) => Ok(()),
        Ok(Ok(Exit::Kicked)) => Err(format!(
            "a few instructions of kernel code did not finish within {LIMIT:?}"
        )),
        Ok(Ok(Exit::Shutdown)) => Err(
            "an instruction that stock kernels use raised an exception that it must not raise"
                .into(),
        ),
        Ok(Ok(other)) => Err(format!("the trial guest went astray: {other:?}")),
        Ok(Err(EngineError::Internal(what))) => Err(format!(
            "this host's KVM emulates kernel code instead of running it. It needs real virtualization: if this host is itself \
             virtual, nested virtualization, switched on in the outer monitor. What failed: {what}"
        )),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("KVM does not let go of a running vCPU".into()),
    }
}

fn prepare(kvm: &Kvm) -> Result<impl Vcpu + use<>, EngineError> {
    let host = |e: &dyn std::error::Error| EngineError::Internal(format!("the trial guest: {e}"));
    let memory = GuestMemory::new(&[RamRange {
        start: 0,
        len: MEMORY,
    }])
    .map_err(|e| host(&e))?;
    // PML4 and page-directory-pointer table each with one entry, page directory with one 2 MiB page.
    for (address, entry) in [
        (PAGE_TABLES, PAGE_TABLES + 0x1003),
        (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2003),
        (PAGE_TABLES + 0x2000, 0x83),
    ] {
        memory
            .write(address, &u64::to_le_bytes(entry))
            .map_err(|e| host(&e))?;
    }
    let code = program().map_err(|e| host(&e))?;
    memory.write(CODE, &code).map_err(|e| host(&e))?;
    let model = CpuModel::v3(1, &HostFeatures::default(), 1_000_000);
    let signature = model.signature();
    let config = VmConfig {
        memory,
        clock: LiveClock::start(),
        entropy: Arc::new(|_| ()),
        model: Arc::new(model),
        vcpus: 1,
    };
    let mut vcpu = Arc::new(Vm::new(kvm, config)?).vcpu(0)?;
    vcpu.load(&long_mode(signature))?;
    Ok(vcpu)
}

/// Ring 0 of 64-bit mode at [`CODE`], the first 2 MiB mapped to themselves, no IDT: any exception is a shutdown.
fn long_mode(signature: u32) -> CpuState {
    let mut s = CpuState::reset(0, signature);
    s.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    s.cr3 = PAGE_TABLES;
    s.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    s.efer = efer::SCE | efer::LME | efer::LMA;
    s.segments = [Segment::flat(0x10, 0xc093); 6];
    s.segments[1] = Segment::flat(0x8, 0xa09b);
    s.idtr.limit = 0;
    s.gpr = [0; 16];
    s.gpr[4] = STACK;
    s.rip = CODE;
    s
}

/// What kernels do at the start and all the time.
fn program() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.mov(rdi, DATA)?;
    a.mov(rcx, u64::from(msr::GS_BASE))?;
    a.mov(rax, DATA)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.rdmsr()?;
    a.swapgs()?;
    a.mov(rax, cr3)?;
    a.mov(cr3, rax)?;
    a.invlpg(ptr(rdi))?;
    a.cpuid()?;
    a.rdtsc()?;
    a.pushfq()?;
    a.popfq()?;
    a.lock().xadd(qword_ptr(rdi), rax)?;
    a.xor(eax, eax)?;
    a.xor(edx, edx)?;
    a.mov(rbx, 1_u64)?;
    a.lock().cmpxchg16b(ptr(rdi + 0x10))?;
    a.fninit()?;
    a.fxsave64(ptr(rdi + 0x200))?;
    a.fxrstor64(ptr(rdi + 0x200))?;
    // XSAVE where it is offered: CPUID leaf 1, ECX bit 26.
    let mut no_xsave = a.create_label();
    a.mov(eax, 1)?;
    a.cpuid()?;
    a.bt(ecx, 26)?;
    a.jnc(no_xsave)?;
    a.mov(rax, cr4)?;
    a.bts(rax, 18)?;
    a.mov(cr4, rax)?;
    a.mov(rdi, DATA)?;
    a.xor(ecx, ecx)?;
    a.mov(eax, 3)?;
    a.xor(edx, edx)?;
    a.xsetbv()?;
    a.xsave64(ptr(rdi + 0x400))?;
    a.xrstor64(ptr(rdi + 0x400))?;
    a.set_label(&mut no_xsave)?;
    a.mov(eax, PASSED)?;
    a.mov(edx, u32::from(PORT))?;
    a.out(dx, eax)?;
    a.hlt()?;
    a.assemble(CODE)
}
