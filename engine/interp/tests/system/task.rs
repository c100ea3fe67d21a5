//! Hardware task switches.

use iced_x86::code_asm::*;
use lodger_x86::bits::cr0;

use crate::machine::*;

/// Fills a 32-bit TSS for a ring 0 task.
fn fill(m: &mut Machine, tss: u64, entry: u64, top: u64) {
    m.u32(tss + 0x20, entry as u32);
    m.u32(tss + 0x24, 2);
    for i in 0..8 {
        m.u32(tss + 0x28 + 4 * i, 0x100 * i as u32);
    }
    m.u32(tss + 0x38, top as u32);
    for i in 0..6 {
        m.u32(tss + 0x48 + 4 * i, sel::DATA0.into());
    }
    m.u32(tss + 0x4c, sel::CODE0.into());
    m.u32(tss + 0x60, sel::LDT.into());
}

fn busy(m: &Machine, selector: u16) -> bool {
    m.get32(GDT + u64::from(selector) + 4) & 0x200 != 0
}

#[test]
fn call_nests_and_iret_returns() {
    for selector in [sel::TSS2, sel::TASK_GATE] {
        let mut m = Machine::protected(0);
        fill(&mut m, TSS2, CODE2, STACK0);
        m.state.gpr[3] = 0xbeef;
        let mut call = vec![0x9a, 0, 0, 0, 0];
        call.extend(selector.to_le_bytes());
        m.code(32, CODE, |a| {
            a.db(&call)?;
            a.pushfd()?;
            a.done()
        });
        m.code(32, CODE2, |a| {
            a.pushfd()?;
            a.pop(eax)?;
            a.mov(dword_ptr(DATA), eax)?;
            a.mov(dword_ptr(DATA + 4), esp)?;
            a.mov(eax, cr0)?;
            a.mov(dword_ptr(DATA + 8), eax)?;
            a.str(eax)?;
            a.mov(dword_ptr(DATA + 12), eax)?;
            a.mov(dword_ptr(DATA + 16), ecx)?;
            a.iretd()
        });
        m.expect_done();
        assert_eq!(m.get32(DATA) & 0x4000, 0x4000, "NT in the nested task");
        assert_eq!(m.get32(DATA + 4), STACK0 as u32);
        assert_eq!(m.get32(DATA + 8) & cr0::TS as u32, cr0::TS as u32);
        assert_eq!(m.get32(DATA + 12), u32::from(sel::TSS2));
        assert_eq!(m.get32(DATA + 16), 0x100);
        assert_eq!(m.get32(TSS2), u32::from(sel::TSS), "back link");
        assert_eq!(m.state.gpr[3], 0xbeef);
        assert_eq!(m.state.gpr[4], STACK - 4);
        assert_eq!(m.stack()[0] & 0x4000, 0, "NT is clear again");
        assert_eq!(m.state.tr.selector, sel::TSS);
        assert_eq!((busy(&m, sel::TSS), busy(&m, sel::TSS2)), (true, false));
    }
}

#[test]
fn jump_ends_the_old_task() {
    let mut m = Machine::protected(0);
    fill(&mut m, TSS2, CODE2, STACK0);
    m.memory.write(CODE, &[0xea, 0, 0, 0, 0, 0x38, 0]).unwrap();
    m.state.gpr[7] = 0x7777;
    m.code(32, CODE2, |a| a.done());
    m.expect_done();
    assert_eq!((busy(&m, sel::TSS), busy(&m, sel::TSS2)), (false, true));
    assert_eq!(m.get32(TSS + 0x20), CODE as u32 + 7);
    assert_eq!(m.get32(TSS + 0x44), 0x7777);
    assert_eq!(m.get32(TSS + 0x4c), u32::from(sel::CODE0));
    assert_eq!(m.state.rflags & 0x4000, 0);
    assert_eq!(m.state.ldtr.selector, sel::LDT);
    assert_eq!(m.state.gpr[7], 0x700);
}

#[test]
fn a_task_gate_takes_an_exception_with_its_error_code() {
    let mut m = Machine::protected(3);
    fill(&mut m, TSS2, CODE2, STACK0);
    m.u64(IDT + 8 * 13, gate(sel::TSS2, 0, 0x85, 0));
    m.code(32, CODE, |a| {
        a.mov(ecx, 5)?;
        a.hlt()
    });
    m.code(32, CODE2, |a| a.done());
    m.expect_done();
    assert_eq!(m.stack()[0], 0, "the error code");
    assert_eq!(m.state.gpr[4], STACK0 - 4);
    assert_eq!(m.get32(TSS + 0x20), CODE as u32 + 5);
    assert_eq!(
        m.get32(TSS + 0x24) & 0x1_0000,
        0x1_0000,
        "RF is saved for a fault"
    );
    assert_eq!(m.get32(TSS + 0x2c), 5);
    assert_eq!(m.get32(TSS + 0x4c), u32::from(sel::CODE3));
}

/// A new task with something wrong: vector and error code in the context of which task.
#[test]
fn a_bad_task_is_an_invalid_tss() {
    const TS: u8 = 10;
    const NP: u8 = 11;
    for (offset, value, vector, error, in_new) in [
        (0x4c, sel::DATA0, TS, sel::DATA0, true),
        (0x4c, 0, TS, 0, true),
        (0x4c, sel::ABSENT_CODE, NP, sel::ABSENT_CODE, true),
        (0x50, 0, TS, 0, true),
        (0x50, sel::DATA3, TS, sel::DATA3 & !3, true),
        (0x54, sel::EXECUTE_ONLY, TS, sel::EXECUTE_ONLY, true),
        (0x58, sel::ABSENT, NP, sel::ABSENT, true),
        (0x60, sel::DATA0, TS, sel::DATA0, true),
        (0xfff, 0, TS, sel::TSS2, false), // a limit that is too small
    ] {
        let mut m = Machine::protected(0);
        fill(&mut m, TSS2, CODE2, STACK0);
        if offset == 0xfff {
            m.u64(
                GDT + u64::from(sel::TSS2),
                descriptor(TSS2 as u32, 0x66, 0x89),
            );
        } else {
            m.u32(TSS2 + offset, value.into());
        }
        // The handler must not need what the new task failed to load.
        m.u64(IDT + 8 * u64::from(vector), gate(0xb8, 0, 0x85, 0));
        m.state.gdtr.limit = 0xc8 - 1;
        m.u64(GDT + 0xb8, descriptor(0x3800, 0x67, 0x89));
        fill(&mut m, 0x3800, 0x1_1800, STACK0 - 0x100);
        m.code(32, 0x1_1800, |a| a.done());
        m.memory.write(CODE, &[0xea, 0, 0, 0, 0, 0x38, 0]).unwrap();
        m.expect_done();
        let case = format!("{value:#x} at {offset:#x}");
        assert_eq!(m.stack()[0], u64::from(error), "{case}");
        let (tss, eip) = if in_new { (TSS2, CODE2) } else { (TSS, CODE) };
        assert_eq!(u64::from(m.get32(tss + 0x20)), eip, "{case}");
        assert_eq!(
            m.get32(0x3800) as u16,
            if in_new { sel::TSS2 } else { sel::TSS },
            "{case}"
        );
    }
}

#[test]
fn returning_needs_a_busy_task() {
    let mut m = Machine::protected(0);
    m.state.rflags = 0x4002;
    m.u32(TSS, sel::TSS2.into()); // available: nobody waits there
    m.memory.write(CODE, &[0xcf]).unwrap();
    m.expect_fault(10, sel::TSS2.into(), CODE);
}

#[test]
fn a_16_bit_task() {
    let mut m = Machine::protected(0);
    m.u64(
        GDT + u64::from(sel::TSS2),
        descriptor(TSS2 as u32, 0x2b, 0x81),
    );
    let words = [
        (0x0e, 0x4ff0),
        (0x10, 2),
        (0x12, 0x1234),
        (0x1a, 0x7ff0),
        (0x22, sel::DATA0),
        (0x24, sel::CODE16),
        (0x26, sel::DATA16),
        (0x28, sel::DATA16),
    ];
    for (at, value) in words {
        m.memory.write(TSS2 + at, &value.to_le_bytes()).unwrap();
    }
    m.memory
        .write(CODE, &[0x9a, 0, 0, 0, 0, 0x38, 0, 0xe6, DONE])
        .unwrap();
    m.code(16, 0x4ff0, |a| {
        a.add(ax, 1)?;
        a.mov(word_ptr(0x5000), ax)?;
        a.mov(word_ptr(0x5002), sp)?;
        a.iret()
    });
    m.expect_done();
    assert_eq!(m.get32(0x5000), 0x7ff0_1235);
    assert_eq!(m.state.tr.selector, sel::TSS);
    assert_eq!(m.get32(TSS2 + 0x12) & 0xffff, 0x1235, "saved in 16 bits");
}

#[test]
fn the_debug_flag_traps_in_the_new_task() {
    let mut m = Machine::protected(0);
    fill(&mut m, TSS2, CODE2, STACK0);
    m.u32(TSS2 + 0x64, 1);
    m.memory.write(CODE, &[0xea, 0, 0, 0, 0, 0x38, 0]).unwrap();
    let stack = m.expect(1);
    assert_eq!(stack[0], CODE2);
    assert_eq!(m.state.dr6 >> 13 & 7, 4);
}

#[test]
fn a_task_in_virtual_8086_mode() {
    let mut m = Machine::protected(0);
    fill(&mut m, TSS2, 0, 0xff0);
    m.u32(TSS2 + 0x24, 0x2_3002);
    m.u32(TSS2 + 4, STACK0 as u32);
    m.u32(TSS2 + 8, sel::DATA0.into());
    m.u32(TSS2 + 0x4c, (CODE2 >> 4) as u32);
    m.u32(TSS2 + 0x50, 0x800);
    m.memory.write(CODE, &[0xea, 0, 0, 0, 0, 0x38, 0]).unwrap();
    m.code(16, CODE2, |a| a.end());
    let stack = m.expect(END);
    assert_eq!(stack[..2], [2, CODE2 >> 4]);
    assert_eq!(stack[3..5], [0xff0, 0x800]);
}
