//! Real mode, and the ways into and out of it.

use iced_x86::code_asm::*;
use lodger_x86::bits::{cr0, cr4, efer};

use crate::machine::*;

#[test]
fn an_interrupt_and_its_return() {
    let mut m = Machine::real();
    m.u32(4 * 0x40, 0x1100 << 16);
    m.state.rflags = 0x4_0202;
    m.code(16, CODE, |a| {
        a.int(0x40)?;
        a.done()
    });
    m.code(16, 0x1_1000, |a| {
        a.mov(bp, sp)?;
        a.mov(ax, word_ptr(bp))?;
        a.mov(bx, word_ptr(bp + 2))?;
        a.mov(cx, word_ptr(bp + 4))?;
        a.pushfd()?;
        a.pop(edx)?;
        a.iret()
    });
    m.expect_done();
    let g = &m.state.gpr;
    assert_eq!([g[0] & 0xffff, g[3] & 0xffff], [2, 0x1000]);
    assert_eq!(g[1] & 0xffff, 0x0202);
    assert_eq!(g[2] & 0x4_0300, 0, "IF, TF and AC are clear in the handler");
    assert_eq!(m.state.rflags & 0x4_0200, 0x200, "AC is not in 16 bits");
    assert_eq!(m.state.gpr[4], STACK);
}

#[test]
fn a_far_call_and_segment_loads() {
    let mut m = Machine::real();
    m.u32(0x2_3456, 0xcafe_babe);
    m.code(16, CODE, |a| {
        a.mov(ax, 0x2000)?;
        a.mov(ds, ax)?;
        a.mov(ecx, dword_ptr(0x3456))?;
        a.db(&[0x9a, 0x00, 0x10, 0x00, 0x10])?; // call 0x1000:0x1000
        a.done()
    });
    m.code(16, 0x1_1000, |a| {
        a.mov(bx, cs)?;
        a.retf()
    });
    m.expect_done();
    assert_eq!(m.state.gpr[1], 0xcafe_babe);
    assert_eq!(m.state.gpr[3], 0x1000);
    assert_eq!(m.state.segments[3].base, 0x2_0000);
}

#[test]
fn limits_are_64_kib() {
    // A word at offset 0xffff: #GP without an error code.
    let mut m = Machine::real();
    m.code(16, CODE, |a| {
        a.mov(bx, 0xffff_u32 as i32)?;
        a.mov(ax, word_ptr(bx))
    });
    let stack = m.expect(13);
    assert_eq!(stack[..2], [3, 0x1000]);
}

#[test]
fn what_protected_mode_has_is_undefined() {
    for code in [
        &[0x0f, 0x00, 0xd0][..],
        &[0x0f, 0x00, 0xd8],
        &[0x0f, 0x02, 0xc0],
        &[0x63, 0xc0],
    ] {
        let mut m = Machine::real();
        m.memory.write(CODE, code).unwrap();
        let stack = m.expect(6);
        assert_eq!(stack[0], 0, "{code:x?}");
    }
}

/// Real mode to protected mode to 64-bit mode, and all the way back.
#[test]
fn up_to_long_mode_and_back() {
    let mut long = Machine::long(0);
    let tables = (long.state.gdtr, long.state.cr3);
    long.state.gdtr.limit = 0;
    let mut m = Machine::real();
    for at in (0..0x3_0000).step_by(8) {
        let value = long.get64(at);
        if at >= 0x1000 && value != 0 && !(HANDLERS..HANDLERS + 0x1000).contains(&at) {
            m.u64(at, value);
        }
    }
    m.memory.write(DATA, &tables.0.limit.to_le_bytes()).unwrap();
    m.u32(DATA + 2, tables.0.base as u32);
    m.state.segments[3].base = DATA;
    m.state.segments[3].selector = (DATA >> 4) as u16;
    m.code(16, CODE, |a| {
        a.lgdt(ptr(0))?;
        a.mov(eax, cr0)?;
        a.or(eax, cr0::PE as u32)?;
        a.mov(cr0, eax)?;
        a.db(&[0x66, 0xea, 0x00, 0x11, 0x01, 0x00, 0x08, 0x00]) // jmp 0x08:0x11100
    });
    m.code(32, 0x1_1100, |a| {
        a.mov(eax, u32::from(sel::DATA0))?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)?;
        a.mov(eax, cr4)?;
        a.or(eax, cr4::PAE as u32)?;
        a.mov(cr4, eax)?;
        a.mov(eax, tables.1 as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080_u32)?;
        a.rdmsr()?;
        a.or(eax, efer::LME as u32)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, cr0::PG as u32)?;
        a.mov(cr0, eax)?;
        a.db(&[0xea, 0x00, 0x12, 0x01, 0x00, 0xb0, 0x00]) // jmp 0xb0:0x11200
    });
    m.code(64, 0x1_1200, |a| {
        a.mov(r8, 0x1234_5678_9abc_def0_u64)?;
        a.mov(ecx, 0xc000_0080_u32)?;
        a.rdmsr()?;
        a.mov(r9d, eax)?;
        a.push(u64::from(sel::CODE0) as i32)?;
        a.push(0x1_1300)?;
        a.db(&[0x48, 0xcb])
    });
    m.code(32, 0x1_1300, |a| {
        a.mov(eax, cr0)?;
        a.and(eax, !(cr0::PG as u32) as i32)?;
        a.mov(cr0, eax)?;
        a.mov(eax, u32::from(sel::DATA16))?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)?;
        a.mov(ecx, 0xc000_0080_u32)?;
        a.rdmsr()?;
        a.mov(ebx, eax)?;
        a.db(&[0xea, 0xf0, 0x4f, 0x00, 0x00, 0x90, 0x00]) // jmp 0x90:0x4ff0
    });
    m.code(16, 0x4ff0, |a| {
        a.mov(eax, cr0)?;
        a.and(eax, !1)?;
        a.mov(cr0, eax)?;
        a.db(&[0xea, 0x00, 0x20, 0x00, 0x10]) // jmp 0x1000:0x2000
    });
    m.code(16, 0x1_2000, |a| {
        a.mov(dx, cs)?;
        a.done()
    });
    m.expect_done();
    let g = &m.state.gpr;
    assert_eq!(g[8], 0x1234_5678_9abc_def0);
    assert_eq!(g[9], efer::LME | efer::LMA, "LMA in 64-bit mode");
    assert_eq!(g[3], efer::LME, "LMA is off again");
    assert_eq!((g[2] & 0xffff, m.state.cr0 & cr0::PE), (0x1000, 0));
}
