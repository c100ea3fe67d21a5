//! Several vCPUs on shared memory: locked instructions, code that another vCPU or a device changes, interrupts between vCPUs
//! and their start-up. Every vCPU has a thread; kicks come in between.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use lodger_vcpu::{Entry, Exit, Vcpu};
use lodger_x86::{Activity, CpuState};

use crate::machine::{CODE, DATA, DONE, KERNEL, Machine, Mode};

/// Where a waiting program gives up, so that an error is not a hang.
const TICKS: u64 = 1 << 40;
/// Each program's code begins at a multiple of this behind [`CODE`].
const PROGRAM: u64 = 0x400;
const FLAG: u64 = DATA + 0x1800;
const ANSWER: u64 = DATA + 0x1900;
const PATCHED: u64 = CODE + 0x1000;

type Program<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Assembles 64-bit code at a linear address that is also the physical one.
fn write(machine: &Machine, at: u64, program: Program) {
    let mut a = CodeAssembler::new(64).expect("64 bits are known");
    program(&mut a).expect("code");
    a.out(u32::from(DONE), al).expect("code");
    machine
        .memory
        .write(at, &a.assemble(at).expect("code"))
        .expect("RAM");
}

/// Runs to the program's end, whatever comes in between; the final state. Fails at the tick limit.
fn run(vcpu: &mut dyn Vcpu) -> CpuState {
    vcpu.set_tick_limit(Some(vcpu.ticks() + TICKS));
    let mut entry = Entry::Resume;
    loop {
        entry = match vcpu.run(entry).expect("it runs") {
            Exit::Kicked | Exit::Eoi(_) => Entry::Resume,
            Exit::PortWrite { port, .. } if port == u16::from(DONE) => {
                vcpu.kicker().kick();
                assert_eq!(vcpu.run(Entry::Written).expect("it runs"), Exit::Kicked);
                return vcpu.store().expect("no I/O is pending");
            }
            other => panic!("{other:x?} at {:x?}", vcpu.recent_instructions()),
        };
    }
}

/// Runs one program per vCPU, in ring 0 of 64-bit mode, each on its thread; a thread kicks all of them now and then.
fn run_all(machine: &mut Machine, programs: &[Program]) -> Vec<CpuState> {
    for (i, program) in programs.iter().enumerate() {
        let at = CODE + i as u64 * PROGRAM;
        write(machine, at, program);
        let mut state = machine.start(i);
        state.rip = at;
        state.gpr[4] = DATA + 0xf000 + 0x200 * (i as u64 + 1);
        state.gpr[13] = i as u64;
        machine.vcpus[i].load(&state).expect("a state");
    }
    run_threads(machine)
}

fn run_threads(machine: &mut Machine) -> Vec<CpuState> {
    let kickers: Vec<_> = machine.vcpus.iter().map(|v| v.kicker()).collect();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let threads: Vec<_> = machine
            .vcpus
            .iter_mut()
            .map(|vcpu| scope.spawn(move || run(&mut **vcpu)))
            .collect();
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                kickers.iter().for_each(|k| k.kick());
                thread::sleep(Duration::from_millis(1));
            }
        });
        let joined: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
        over.store(true, Ordering::SeqCst);
        joined
            .into_iter()
            .map(|r| r.expect("the vCPU's thread"))
            .collect()
    })
}

fn machine(vcpus: u32) -> Machine {
    Machine::new(crate::engine(), Mode::Long(0), vcpus)
}

fn word(machine: &Machine, at: u64) -> u64 {
    machine.memory.read_u64(at).expect("RAM")
}

/// Adds `count` times one with what `add` assembles, on four vCPUs; the counter's value.
fn count(at: u64, count: u32, add: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
    let mut m = machine(4);
    let program: Program = &|a| {
        a.mov(rbx, at)?;
        a.mov(r15d, count)?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        // For `add` may begin with a label.
        a.zero_bytes()?;
        add(a)?;
        a.dec(r15d)?;
        a.jne(top)
    };
    run_all(&mut m, &[program; 4]);
    word(&m, at)
}

#[test]
fn locked_instructions_lose_nothing() {
    // Aligned, across cache lines, across pages.
    for (at, n) in [
        (DATA + 0x100, 20_000),
        (DATA + 0x13d, 2_000),
        (DATA + 0xffd, 800),
    ] {
        let total = 4 * u64::from(n);
        let inc = |a: &mut CodeAssembler| a.lock().inc(dword_ptr(rbx));
        assert_eq!(count(at, n, &inc), total, "INC at {at:#x}");
        let xadd = |a: &mut CodeAssembler| {
            a.mov(eax, 1)?;
            a.lock().xadd(qword_ptr(rbx), rax)
        };
        assert_eq!(count(at, n, &xadd), total, "XADD at {at:#x}");
        let cmpxchg = |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.lea(rcx, qword_ptr(rax + 1))?;
            a.lock().cmpxchg(qword_ptr(rbx), rcx)?;
            a.jne(again)
        };
        assert_eq!(count(at, n, &cmpxchg), total, "CMPXCHG at {at:#x}");
        let btc = |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            // A lock in the bit 63, the counter in the others.
            a.mov(ecx, 63)?;
            a.lock().bts(qword_ptr(rbx), rcx)?;
            a.jc(again)?;
            a.lock().inc(dword_ptr(rbx))?;
            a.lock().btr(qword_ptr(rbx), rcx)
        };
        assert_eq!(count(at, n / 4, &btc), total / 4, "BTS at {at:#x}");
    }
}

#[test]
fn wide_compare_and_exchange_is_atomic() {
    let at = DATA + 0x100;
    let both = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(rdi, rbx)?;
        a.mov(rax, qword_ptr(rdi))?;
        a.mov(rdx, qword_ptr(rdi + 8))?;
        a.set_label(&mut again)?;
        a.lea(rbx, qword_ptr(rax + 1))?;
        a.lea(rcx, qword_ptr(rdx + 1))?;
        a.lock().cmpxchg16b(xmmword_ptr(rdi))?;
        a.jne(again)?;
        a.mov(rbx, rdi)
    };
    assert_eq!(count(at, 10_000, &both), 40_000);
}

#[test]
fn a_spin_lock_by_xchg() {
    for lock in [DATA + 0x200, DATA + 0xfff] {
        let at = DATA + 0x300;
        let add = |a: &mut CodeAssembler| {
            let (mut take, mut wait, mut taken) =
                (a.create_label(), a.create_label(), a.create_label());
            a.mov(rdi, lock)?;
            a.set_label(&mut take)?;
            a.mov(eax, 1)?;
            a.xchg(word_ptr(rdi), ax)?;
            a.test(eax, eax)?;
            a.je(taken)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(word_ptr(rdi), 0)?;
            a.jne(wait)?;
            a.jmp(take)?;
            a.set_label(&mut taken)?;
            a.inc(qword_ptr(rbx))?;
            a.mov(word_ptr(rdi), 0)
        };
        assert_eq!(count(at, 2_000, &add), 8_000, "lock at {lock:#x}");
    }
}

/// Where the immediate of the only MOV EAX, 0xdeadbeef in a program is.
fn immediate_in(program: Program, at: u64) -> u64 {
    let mut a = CodeAssembler::new(64).expect("64 bits are known");
    program(&mut a).expect("code");
    let code = a.assemble(at).expect("code");
    let found = code
        .windows(4)
        .position(|w| w == 0xdead_beef_u32.to_le_bytes());
    at + found.expect("the marker") as u64
}

/// One vCPU changes code, through either of its two addresses, the other executes it behind a serialising instruction:
/// in a function, and in the middle of straight code.
#[test]
fn code_changed_by_another_vcpu() {
    for (alias, called) in [(0, true), (KERNEL, true), (0, false), (KERNEL, false)] {
        let mut m = machine(2);
        let rounds = 3_000;
        m.memory
            .write(PATCHED, &[0xb8, 0, 0, 0, 0, 0xc3])
            .expect("RAM");
        let execute: Program = &|a| {
            a.mov(rsi, FLAG)?;
            a.mov(rdi, ANSWER)?;
            let (mut top, mut wait, mut end) =
                (a.create_label(), a.create_label(), a.create_label());
            a.set_label(&mut top)?;
            a.inc(r12d)?;
            a.set_label(&mut wait)?;
            a.cmp(dword_ptr(rsi), r12d)?;
            a.jne(wait)?;
            a.cpuid()?;
            if called {
                a.mov(r9, PATCHED)?;
                a.call(r9)?;
            } else {
                a.mov(eax, 0xdead_beef_u32)?;
            }
            a.cmp(eax, r12d)?;
            a.jne(end)?;
            a.mov(dword_ptr(rdi), r12d)?;
            a.cmp(r12d, rounds)?;
            a.jne(top)?;
            a.set_label(&mut end)?;
            // Lets the other one end as well.
            a.mov(dword_ptr(rdi + 4), 1)
        };
        let immediate = if called {
            PATCHED + 1
        } else {
            immediate_in(execute, CODE)
        };
        let patch: Program = &|a| {
            a.mov(rbx, alias + immediate)?;
            a.mov(rsi, FLAG)?;
            a.mov(rdi, ANSWER)?;
            let (mut top, mut wait, mut end) =
                (a.create_label(), a.create_label(), a.create_label());
            a.set_label(&mut top)?;
            a.inc(ecx)?;
            a.mov(dword_ptr(rbx), ecx)?;
            a.mov(dword_ptr(rsi), ecx)?;
            a.set_label(&mut wait)?;
            a.cmp(dword_ptr(rdi + 4), 0)?;
            a.jne(end)?;
            a.cmp(dword_ptr(rdi), ecx)?;
            a.jne(wait)?;
            a.jmp(top)?;
            a.set_label(&mut end)
        };
        let end = run_all(&mut m, &[execute, patch]);
        let expected = rounds as u64;
        assert_eq!(
            (end[0].gpr[12], end[0].gpr[0]),
            (expected, expected),
            "alias {alias:x}, called: {called}"
        );
    }
}

/// A device changes code (a host thread through [`GuestMemory::write`](lodger_guest_memory::GuestMemory::write)).
#[test]
fn code_changed_by_a_device() {
    let mut m = machine(1);
    let rounds = 2_000_u32;
    m.memory
        .write(PATCHED, &[0xb8, 0, 0, 0, 0, 0xc3])
        .expect("RAM");
    let execute: Program = &|a| {
        a.mov(rsi, FLAG)?;
        a.mov(rdi, ANSWER)?;
        a.mov(r9, PATCHED)?;
        let (mut top, mut wait, mut end) = (a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut top)?;
        a.inc(r12d)?;
        a.set_label(&mut wait)?;
        a.cmp(dword_ptr(rsi), r12d)?;
        a.jne(wait)?;
        a.call(r9)?;
        a.cmp(eax, r12d)?;
        a.jne(end)?;
        a.mov(dword_ptr(rdi), r12d)?;
        a.cmp(r12d, rounds)?;
        a.jne(top)?;
        a.set_label(&mut end)?;
        a.mov(dword_ptr(rdi + 4), 1)
    };
    let memory = m.memory.clone();
    let end = thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=rounds {
                memory
                    .write(PATCHED + 1, &round.to_le_bytes())
                    .expect("RAM");
                memory.write(FLAG, &round.to_le_bytes()).expect("RAM");
                while memory.read_u64(ANSWER).expect("RAM") < u64::from(round) {
                    thread::yield_now();
                }
                if memory.read_u64(ANSWER).expect("RAM") >> 32 != 0 {
                    return;
                }
            }
        });
        run_all(&mut m, &[execute])
    });
    assert_eq!(
        (end[0].gpr[12], end[0].gpr[0]),
        (rounds.into(), rounds.into())
    );
}

/// Enables the local APIC in x2APIC mode.
fn enable_apic(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(ecx, 0x1b)?;
    a.rdmsr()?;
    a.or(eax, 0xc00)?;
    a.wrmsr()?;
    a.mov(ecx, 0x80f)?;
    a.mov(eax, 0x1ff)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// Writes the interrupt command register.
fn send(a: &mut CodeAssembler, command: u32, to: u32) -> Result<(), IcedError> {
    a.mov(ecx, 0x830)?;
    a.mov(eax, command)?;
    a.mov(edx, to)?;
    a.wrmsr()
}

#[test]
fn interrupts_between_vcpus() {
    let mut m = machine(3);
    let rounds = 500_u32;
    let handler = CODE + 0x1800;
    m.set_gate(0x40, handler);
    let mut a = CodeAssembler::new(64).expect("64 bits are known");
    let body = |a: &mut CodeAssembler| -> Result<(), IcedError> {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.mov(eax, 1)?;
        a.lock().xadd(dword_ptr(r14), eax)?;
        a.mov(ecx, 0x80b)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    };
    body(&mut a).expect("code");
    m.memory
        .write(handler, &a.assemble(handler).expect("code"))
        .expect("RAM");
    // Waits for interrupts, asleep or busy.
    let wait = |a: &mut CodeAssembler, busy: bool| -> Result<(), IcedError> {
        enable_apic(a)?;
        a.mov(rsi, FLAG)?;
        a.mov(r14, ANSWER)?;
        a.mov(rdi, ANSWER + 0x40)?;
        a.lock().inc(dword_ptr(rdi))?;
        let (mut top, mut end) = (a.create_label(), a.create_label());
        a.set_label(&mut top)?;
        a.cli()?;
        a.cmp(dword_ptr(rsi), 0)?;
        a.jne(end)?;
        a.sti()?;
        if busy {
            a.nop()?;
        } else {
            a.hlt()?;
        }
        a.jmp(top)?;
        a.set_label(&mut end)
    };
    // Two interrupts of one vector may become one: so each is waited for.
    let sender: Program = &|a| {
        enable_apic(a)?;
        a.mov(rbx, ANSWER)?;
        a.mov(rdi, ANSWER + 0x40)?;
        let (mut ready, mut top) = (a.create_label(), a.create_label());
        a.set_label(&mut ready)?;
        a.cmp(dword_ptr(rdi), 2)?;
        a.jne(ready)?;
        a.set_label(&mut top)?;
        for (command, to, answers) in [(0x40, 1, 1), (0x40, 2, 1), (0xc_0040, 0, 2)] {
            send(a, command, to)?;
            a.add(r12d, answers)?;
            let mut answered = a.create_label();
            a.set_label(&mut answered)?;
            a.cmp(dword_ptr(rbx), r12d)?;
            a.jb(answered)?;
        }
        a.cmp(r12d, 4 * rounds)?;
        a.jb(top)?;
        a.mov(rsi, FLAG)?;
        a.mov(dword_ptr(rsi), 1)?;
        send(a, 0xc_0040, 0)
    };
    run_all(&mut m, &[sender, &|a| wait(a, false), &|a| wait(a, true)]);
    let answers = word(&m, ANSWER) as u32;
    assert!(
        (4 * rounds..=4 * rounds + 2).contains(&answers),
        "{answers}"
    );
}

#[test]
fn init_and_start_up() {
    let mut m = machine(2);
    // Real mode at CODE: a mark, then a loop until INIT; at the second start the end.
    let first = [
        0xb8, 0x00, 0x30, // mov ax, DATA >> 4
        0x8e, 0xd8, // mov ds, ax
        0xff, 0x06, 0x00, 0x19, // inc word [ANSWER]
        0xeb, 0xfe, // jmp $
    ];
    let second = [
        0xb8, 0x00, 0x30, // mov ax, DATA >> 4
        0x8e, 0xd8, // mov ds, ax
        0xff, 0x06, 0x00, 0x19, // inc word [ANSWER]
        0x8c, 0xcb, // mov bx, cs
        0xe6, DONE, // out DONE, al
    ];
    m.memory.write(PATCHED, &second).expect("RAM");
    m.memory.write(DATA + 0x1000, &first).expect("RAM");
    write(&m, CODE, &|a| {
        enable_apic(a)?;
        a.mov(rbx, ANSWER)?;
        for (vector, mark) in [((DATA + 0x1000) >> 12, 1), (PATCHED >> 12, 2)] {
            send(a, 0x4500, 1)?;
            send(a, 0x4600 | vector as u32, 1)?;
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.cmp(word_ptr(rbx), mark)?;
            a.jne(wait)?;
            // To one that runs: no effect.
            send(a, 0x4600 | 0x55, 1)?;
        }
        Ok(())
    });
    let state = m.start(0);
    m.vcpus[0].load(&state).expect("a state");
    let mut other = m.vcpus[1].store().expect("no I/O is pending");
    assert_eq!(
        other.activity,
        Activity::WaitForSipi,
        "application processors wait"
    );
    // INIT resets it whatever it holds.
    other.gpr[3] = 0xffff;
    other.cr4 = 0x620;
    m.vcpus[1].load(&other).expect("a state");
    let end = run_threads(&mut m);
    let s = &end[1];
    assert_eq!(
        (s.gpr[3], s.segments[1].base, s.cr4, s.cr0 & 1),
        (PATCHED >> 4, PATCHED, 0, 0)
    );
}
