//! Virtual-8086 mode.

use iced_x86::code_asm::*;

use crate::machine::*;

const GP: u8 = 13;
const VM: u64 = 1 << 17;

/// A machine that is about to run 16-bit code at CODE in virtual-8086 mode with these flags.
fn machine(flags: u32) -> Machine {
    let mut m = Machine::protected(0);
    m.code(32, CODE2, |a| {
        for selector in [0x1004, 0x1003, 0xa00, 0x1001] {
            a.push(selector)?; // GS, FS, DS, ES
        }
        a.push(0x800)?; // SS
        a.push(0xff0)?; // ESP
        a.push((flags | VM as u32 | 2) as i32)?;
        a.push(0x1000)?; // CS
        a.push(0)?;
        a.iretd()
    });
    m.state.rip = CODE2;
    m
}

#[test]
fn segments_are_paragraphs_and_interrupts_push_them() {
    let mut m = machine(0x3202);
    m.u32(0xa010, 0x1122_3344);
    m.code(16, CODE, |a| {
        a.mov(ecx, dword_ptr(0x10))?;
        a.push(cs)?;
        a.pop(ax)?;
        a.pushf()?;
        a.pop(dx)?;
        a.end()
    });
    let stack = m.expect(END);
    let g = &m.state.gpr;
    assert_eq!(
        (g[1], g[0] & 0xffff, g[2] & 0xffff),
        (0x1122_3344, 0x1000, 0x3202)
    );
    let end = 5 + 1 + 1 + 1 + 1 + 2;
    assert_eq!(stack[..2], [end, 0x1000]);
    assert_eq!(stack[2] & (VM | 0x3200), VM | 0x3200);
    assert_eq!(stack[3..9], [0xff0, 0x800, 0x1001, 0xa00, 0x1003, 0x1004]);
    assert_eq!(g[4], STACK0 - 9 * 4 - 4);
    for reg in [0, 3, 4, 5] {
        assert_eq!(m.state.segments[reg].selector, 0);
    }
    assert_eq!(m.state.rflags & (VM | 0x200), 0);
}

/// What needs IOPL 3 or is not there: vector with IOPL 0, vector with IOPL 3 (0: runs on).
#[test]
fn sensitive_instructions() {
    for (name, code, low, high) in [
        ("cli", &[0xfa][..], GP, 0),
        ("sti", &[0xfb], GP, 0),
        ("pushf", &[0x9c], GP, 0),
        ("popf", &[0x9d], GP, 0),
        ("int 0x20", &[0xcd, 0x20], GP, GP), // its gate has DPL 0
        ("int3", &[0xcc], GP, GP),
        ("hlt", &[0xf4], GP, GP),
        ("mov eax, cr0", &[0x0f, 0x20, 0xc0], GP, GP),
        ("lgdt", &[0x0f, 0x01, 0x16, 0, 0], GP, GP),
        ("lldt ax", &[0x0f, 0x00, 0xd0], 6, 6),
        ("lar ax, ax", &[0x0f, 0x02, 0xc0], 6, 6),
        ("in al, 0x61", &[0xe4, 0x61], GP, GP),
        ("in al, 0x60", &[0xe4, 0x60], 0, 0),
        ("smsw ax", &[0x0f, 0x01, 0xe0], 0, 0),
    ] {
        for (flags, vector) in [(0x2, low), (0x3002, high)] {
            let mut m = machine(flags);
            m.u32(TSS + 0x8c, 2); // not port 0x61
            let mut code = code.to_vec();
            code.extend([0x0f, 0x0b]);
            m.memory.write(CODE, &code).unwrap();
            let vector = if vector == 0 { 6 } else { vector };
            let stack = m.expect(vector);
            let name = format!("{name} with flags {flags:#x}");
            if vector == GP {
                let error = match code[0] {
                    0xcd if flags == 0x3002 => 0x20 * 8 + 2,
                    0xcc => 3 * 8 + 2,
                    _ => 0,
                };
                assert_eq!((stack[0], stack[1]), (error, 0), "{name}");
            } else {
                let ip = if low == 6 { 0 } else { code.len() as u64 - 2 };
                assert_eq!(stack[0], ip, "{name}");
            }
        }
    }
}

#[test]
fn iret_within_virtual_8086_mode_keeps_iopl() {
    let mut m = machine(0x3002);
    m.code(16, CODE, |a| {
        a.push(0x0202)?; // flags: IOPL 0, IF
        a.push(0x1000)?;
        a.push(0x40)?;
        a.iret()
    });
    m.code(16, CODE + 0x40, |a| a.end());
    let stack = m.expect(END);
    assert_eq!(stack[0], 0x42);
    assert_eq!(stack[2] & 0x3200, 0x3200);
}

#[test]
fn the_handler_returns_to_virtual_8086_mode() {
    let mut m = machine(0x3202);
    m.u64(IDT + 8 * 0x40, gate(sel::CODE0, 0x1_1800, 0xee, 0));
    m.code(32, 0x1_1800, |a| {
        a.mov(esi, 0x77)?;
        a.iretd()
    });
    m.code(16, CODE, |a| {
        a.int(0x40)?;
        a.mov(di, ds)?;
        a.end()
    });
    let stack = m.expect(END);
    assert_eq!((m.state.gpr[6], m.state.gpr[7] & 0xffff), (0x77, 0xa00));
    assert_eq!(stack[3..9], [0xff0, 0x800, 0x1001, 0xa00, 0x1003, 0x1004]);
}
