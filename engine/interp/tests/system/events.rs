//! When interrupts, NMIs and traps are taken.

use iced_x86::code_asm::*;

use crate::machine::*;

const VECTOR: u8 = 0x51;

/// A machine whose local APIC has an interrupt pending.
fn pending() -> Machine {
    let mut m = Machine::long(0);
    m.state.lapic.svr = 0x1ff;
    m.state.lapic.irr[usize::from(VECTOR) / 32] = 1 << (VECTOR % 32);
    m
}

#[test]
fn an_interrupt_waits_for_the_end_of_a_shadow() {
    // sti; nop; nop
    let mut m = pending();
    m.memory
        .write(CODE, &[0x90, 0xfb, 0x90, 0x90, 0x90])
        .unwrap();
    let stack = m.expect(VECTOR);
    assert_eq!(stack[0], CODE + 3);
    assert_eq!(stack[2] & 0x200, 0x200);
    // sti; cli: never
    let mut m = pending();
    m.code(64, CODE, |a| {
        a.sti()?;
        a.cli()?;
        a.done()
    });
    m.expect_done();
    // popf has no shadow
    let mut m = pending();
    m.memory
        .write(CODE, &[0x68, 2, 2, 0, 0, 0x9d, 0x90, 0x90])
        .unwrap();
    assert_eq!(m.expect(VECTOR)[0], CODE + 6);
    // mov ss: one instruction more
    let mut m = pending();
    m.state.gpr[0] = sel::DATA0.into();
    m.memory
        .write(CODE, &[0x90, 0xfb, 0x8e, 0xd0, 0x90, 0x90])
        .unwrap();
    assert_eq!(m.expect(VECTOR)[0], CODE + 5);
}

#[test]
fn an_interrupt_below_the_task_priority_waits() {
    let mut m = pending();
    m.state.rflags = 0x202;
    m.state.lapic.tpr = 0x50;
    m.code(64, CODE, |a| {
        a.nop()?;
        a.mov(eax, 4)?;
        a.mov(cr8, rax)?;
        a.nop()
    });
    assert_eq!(m.expect(VECTOR)[0], CODE + 1 + 5 + 4);
}

#[test]
fn an_interrupt_ends_hlt() {
    let mut m = pending();
    m.memory.write(CODE, &[0xfb, 0xf4, 0x90]).unwrap();
    assert_eq!(
        m.expect(VECTOR)[0],
        CODE + 2,
        "not before HLT: the shadow of STI"
    );
}

#[test]
fn nmis_are_blocked_until_iret() {
    for (blocked, at) in [(false, CODE), (true, CODE2)] {
        let mut m = Machine::long(0);
        m.state.nmi_pending = true;
        m.state.nmi_blocked = blocked;
        m.code(64, CODE, |a| {
            a.push(i32::from(sel::DATA0))?;
            a.push(STACK as i32)?;
            a.push(2)?;
            a.push(i32::from(sel::CODE64))?;
            a.push(CODE2 as i32)?;
            a.iretq()
        });
        m.memory.write(CODE2, &[0x90]).unwrap();
        assert_eq!(m.expect(2)[0], at);
        assert!(m.state.nmi_blocked);
        assert!(!m.state.nmi_pending);
    }
}

#[test]
fn the_trap_flag_steps() {
    // popf sets TF: the trap comes after the next instruction.
    let mut m = Machine::long(0);
    m.memory
        .write(CODE, &[0x68, 2, 1, 0, 0, 0x9d, 0x90, 0x90])
        .unwrap();
    let stack = m.expect(1);
    assert_eq!((stack[0], stack[2] & 0x100), (CODE + 7, 0x100));
    assert_eq!(m.state.dr6 & 0x4000, 0x4000, "BS");
    assert_eq!(m.state.rflags & 0x100, 0, "the handler is not stepped");
    // An INT n under TF: the trap is not taken in the handler.
    let mut m = Machine::long(0);
    m.state.rflags = 0x102;
    m.memory.write(CODE, &[0xcd, 0x40]).unwrap();
    let stack = m.expect(0x40);
    assert_eq!((stack[0], stack[2] & 0x100), (CODE + 2, 0x100));
    // A system call masks TF, and is not trapped either.
    let mut m = Machine::long(3);
    m.state.rflags = 0x102;
    m.state.msrs.star = 0x0013_0008_0000_0000;
    m.state.msrs.lstar = CODE2;
    m.state.msrs.sfmask = 0x100;
    m.memory.write(CODE, &[0x0f, 0x05]).unwrap();
    m.code(64, CODE2, |a| a.done());
    m.expect_done();
}

#[test]
fn breakpoints() {
    // Code: a fault, before the instruction; RF lets it pass.
    let mut m = Machine::long(0);
    m.state.dr[1] = CODE + 1;
    m.state.dr7 = 0x404;
    m.memory.write(CODE, &[0x90, 0x90, 0xe6, DONE]).unwrap();
    let stack = m.expect(1);
    assert_eq!((stack[0], m.state.dr6 & 0xf), (CODE + 1, 2));
    let mut m = Machine::long(0);
    m.state.dr[1] = CODE;
    m.state.dr7 = 0x404;
    m.state.rflags = 0x1_0002;
    m.memory.write(CODE, &[0x90, 0xe6, DONE]).unwrap();
    m.expect_done();
    // Data and ports: traps, after it.
    let mut m = Machine::long(0);
    m.state.dr[0] = DATA + 4;
    m.state.dr7 = 0x401 | 0xd << 16; // 4 bytes, writes
    m.code(64, CODE, |a| {
        a.mov(ecx, dword_ptr(DATA + 4))?;
        a.mov(byte_ptr(DATA + 7), cl)?;
        a.nop()
    });
    let stack = m.expect(1);
    assert_eq!((stack[0], m.state.dr6 & 0xf), (CODE + 14, 1));
    let mut m = Machine::long(0);
    m.state.dr[3] = 0x80;
    m.state.dr7 = 0x440 | 2 << 28;
    m.state.cr4 |= 8; // DE
    m.memory.write(CODE, &[0xe6, 0x80, 0x90]).unwrap();
    let stack = m.expect(1);
    assert_eq!((stack[0], m.state.dr6 & 0xf), (CODE + 2, 8));
}
