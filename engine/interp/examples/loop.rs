//! Speed of the interpreter on an integer loop: a 64-bit guest without paging faults, nothing but registers and a
//! little memory. Prints millions of instructions per second.

use std::sync::Arc;
use std::time::Instant;

use iced_x86::code_asm::*;
use lodger_clock::LiveClock;
use lodger_guest_memory::{GuestMemory, RamRange};
use lodger_interp::{InterpEngine, host_features};
use lodger_vcpu::{Engine, Entry, Exit, VmConfig};
use lodger_x86::bits::{cr0, cr4, efer};
use lodger_x86::{CpuModel, CpuState, Segment};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let memory = GuestMemory::new(&[RamRange {
        start: 0,
        len: 16 << 20,
    }])?;
    // Identity mapping of the first GiB by 2 MiB pages.
    memory.write(0x1000, &0x2003_u64.to_le_bytes())?;
    memory.write(0x2000, &0x3003_u64.to_le_bytes())?;
    for i in 0..512_u64 {
        memory.write(0x3000 + 8 * i, &(i << 21 | 0x83).to_le_bytes())?;
    }
    let mut a = CodeAssembler::new(64)?;
    let (mut top, mut skip) = (a.create_label(), a.create_label());
    a.mov(rbx, 0x20_0000_u64)?;
    a.mov(ecx, 1_000_000_000_u32)?;
    a.mov(rax, 0x9e37_79b9_7f4a_7c15_u64)?;
    a.set_label(&mut top)?;
    a.mov(rdx, rax)?;
    a.shl(rdx, 13)?;
    a.xor(rax, rdx)?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 7)?;
    a.xor(rax, rdx)?;
    a.movzx(edx, al)?;
    a.add(qword_ptr(rbx + rdx * 8), rax)?;
    a.mov(rsi, qword_ptr(rbx + rdx * 8 + 8))?;
    a.test(sil, 1)?;
    a.je(skip)?;
    a.add(rax, rsi)?;
    a.set_label(&mut skip)?;
    a.dec(ecx)?;
    a.jne(top)?;
    a.hlt()?;
    memory.write(0x10_0000, &a.assemble(0x10_0000)?)?;

    let model = Arc::new(CpuModel::v3(1, &host_features(), 1_000_000));
    let vm = InterpEngine.create_vm(VmConfig {
        memory,
        clock: LiveClock::start(),
        entropy: Arc::new(|_| ()),
        model: Arc::clone(&model),
        vcpus: 1,
    })?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut state = CpuState::reset(0, model.signature());
    state.segments = [Segment::flat(16, 0xc093); 6];
    state.segments[1] = Segment::flat(8, 0xa09b);
    (state.cr0, state.cr3) = (cr0::PE | cr0::PG | cr0::ET, 0x1000);
    (state.cr4, state.efer) = (cr4::PAE, efer::LME | efer::LMA);
    state.rip = 0x10_0000;
    vcpu.load(&state)?;
    vcpu.set_tick_limit(Some(400_000_000));
    let start = Instant::now();
    let exit = vcpu.run(Entry::Resume)?;
    assert_eq!(exit, Exit::TickLimit);
    let rate = vcpu.ticks() as f64 / start.elapsed().as_secs_f64() / 1e6;
    println!("{rate:.0} M instructions/s");
    Ok(())
}
