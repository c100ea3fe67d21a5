//! 32-bit protected mode: segment loads, privilege, far transfers, interrupts, what looks at descriptors.

use iced_x86::code_asm::*;

use crate::machine::*;

const UD: u8 = 6;
const DF: u8 = 8;
const NP: u8 = 11;
const SS: u8 = 12;
const GP: u8 = 13;

/// What ring 3 may not do; each is #GP(0).
const PRIVILEGED: &[(&str, &[u8])] = &[
    ("hlt", &[0xf4]),
    ("cli", &[0xfa]),
    ("sti", &[0xfb]),
    ("clts", &[0x0f, 0x06]),
    ("invd", &[0x0f, 0x08]),
    ("wbinvd", &[0x0f, 0x09]),
    ("rdmsr", &[0x0f, 0x32]),
    ("wrmsr", &[0x0f, 0x30]),
    ("rdpmc", &[0x0f, 0x33]),
    ("mov eax, cr0", &[0x0f, 0x20, 0xc0]),
    ("mov cr3, eax", &[0x0f, 0x22, 0xd8]),
    ("mov eax, dr7", &[0x0f, 0x21, 0xf8]),
    ("mov dr0, eax", &[0x0f, 0x23, 0xc0]),
    ("lgdt [edx]", &[0x0f, 0x01, 0x12]),
    ("lidt [edx]", &[0x0f, 0x01, 0x1a]),
    ("lldt ax", &[0x0f, 0x00, 0xd0]),
    ("ltr ax", &[0x0f, 0x00, 0xd8]),
    ("lmsw ax", &[0x0f, 0x01, 0xf0]),
    ("invlpg [edx]", &[0x0f, 0x01, 0x3a]),
    ("in al, 0x60", &[0xe4, 0x60]),
    ("out dx, eax", &[0xef]),
    ("int 0x31", &[0xcd, 0x31]),
];

#[test]
fn ring_3_may_not() {
    for (name, code) in PRIVILEGED {
        for long in [false, true] {
            let mut m = if long {
                Machine::long(3)
            } else {
                Machine::protected(3)
            };
            m.memory.write(CODE, code).unwrap();
            m.state.gpr[2] = DATA;
            m.u32(TSS + 0x64, 0xffff_0000); // no I/O map
            let stack = m.expect(GP);
            let error = if code[0] == 0xcd { 0x31 * 8 + 2 } else { 0 };
            assert_eq!((stack[0], stack[1]), (error, CODE), "{name}, long {long}");
        }
    }
}

/// Loads of DS and SS in ring 0 and 3: vector (0: fine), error code.
#[test]
fn segment_loads_are_checked() {
    for (reg, level, selector, vector, error) in [
        ("ds", 0, sel::DATA0, 0, 0),
        ("ds", 0, sel::DATA3, 0, 0),
        ("ds", 0, sel::DATA0 | 3, GP, sel::DATA0),
        ("ds", 0, sel::CODE0, 0, 0),
        ("ds", 0, sel::CONFORMING | 3, 0, 0),
        ("ds", 0, sel::EXECUTE_ONLY, GP, sel::EXECUTE_ONLY),
        ("ds", 0, sel::TSS, GP, sel::TSS),
        ("ds", 0, sel::ABSENT, NP, sel::ABSENT),
        ("ds", 0, sel::BEYOND, GP, sel::BEYOND),
        ("ds", 0, 4, GP, 4),
        ("ds", 0, 3, 0, 0),
        ("ds", 3, sel::DATA0, GP, sel::DATA0),
        ("ds", 3, sel::DATA3 & !3, 0, 0),
        ("ds", 3, sel::READ_ONLY, 0, 0),
        ("ss", 0, sel::DATA0, 0, 0),
        ("ss", 0, 0, GP, 0),
        ("ss", 0, sel::DATA3, GP, sel::DATA3 & !3),
        ("ss", 0, sel::CODE0, GP, sel::CODE0),
        ("ss", 0, sel::ABSENT, GP, sel::ABSENT),
        ("ss", 3, sel::DATA3, 0, 0),
        ("ss", 3, sel::DATA3 & !3, GP, sel::DATA3 & !3),
        ("ss", 3, sel::READ_ONLY | 3, GP, sel::READ_ONLY),
        ("ss", 3, sel::ABSENT | 3, SS, sel::ABSENT),
    ] {
        let mut m = Machine::protected(level);
        m.code(32, CODE, |a| {
            a.mov(eax, u32::from(selector))?;
            match reg {
                "ds" => a.mov(ds, ax)?,
                _ => a.mov(ss, ax)?,
            }
            a.end()
        });
        let case = format!("{reg} = {selector:#x} in ring {level}");
        let wanted = if vector == 0 { END } else { vector };
        match m.run() {
            End::Handler(v, stack) if v == wanted => {
                if vector == 0 {
                    let index = if reg == "ds" { 3 } else { 2 };
                    if !(reg == "ss" && level == 3) {
                        assert_eq!(m.state.segments[index].selector, selector, "{case}");
                    }
                } else {
                    assert_eq!((stack[0], stack[1]), (error.into(), CODE + 5), "{case}");
                }
            }
            other => panic!("{case}: {other:x?}"),
        }
    }
}

#[test]
fn loading_a_segment_sets_its_accessed_bit() {
    let mut m = Machine::protected(0);
    let at = GDT + u64::from(sel::DATA16);
    m.u64(at, descriptor(0x100, 0xffff, 0x92));
    m.code(32, CODE, |a| {
        a.mov(eax, u32::from(sel::DATA16))?;
        a.mov(es, ax)?;
        a.done()
    });
    m.expect_done();
    assert_eq!(m.get64(at), descriptor(0x100, 0xffff, 0x93));
    assert_eq!(m.state.segments[0].base, 0x100);
}

/// Accesses beyond limits and against types: the instruction after a load of ES from EAX.
#[test]
fn limits_and_types_hold() {
    for (selector, offset, write, faults) in [
        (sel::DATA16, 0xffff_u32, false, false),
        (sel::DATA16, 0x1_0000, false, true),
        (sel::EXPAND_DOWN, 0x1000, true, false),
        (sel::EXPAND_DOWN, 0xfff, true, true),
        (sel::READ_ONLY, 0x100, false, false),
        (sel::READ_ONLY, 0x100, true, true),
        (sel::CODE0, 0x100, false, false),
        (sel::CODE0, 0x100, true, true),
        (0, 0x100, false, true),
    ] {
        let mut m = Machine::protected(0);
        m.code(32, CODE, |a| {
            a.mov(eax, u32::from(selector))?;
            a.mov(es, ax)?;
            a.mov(edx, offset)?;
            if write {
                a.mov(byte_ptr(edx).es(), cl)?;
            } else {
                a.mov(cl, byte_ptr(edx).es())?;
            }
            a.done()
        });
        let case = format!("{selector:#x}:{offset:#x} write {write}");
        match (m.run(), faults) {
            (End::Done, false) => {}
            (End::Handler(GP, stack), true) => assert_eq!(stack[0], 0, "{case}"),
            other => panic!("{case}: {other:x?}"),
        }
    }
}

/// Direct far jumps: vector (0: arrives), error code.
#[test]
fn far_jumps_are_checked() {
    for (level, selector, vector, error) in [
        (0, sel::CODE0, 0, 0),
        (0, sel::CONFORMING, 0, 0),
        (0, 0, GP, 0),
        (0, sel::DATA0, GP, sel::DATA0),
        (0, sel::CODE3, GP, sel::CODE3 & !3),
        (0, sel::CODE0 | 1, GP, sel::CODE0),
        (0, sel::ABSENT_CODE, NP, sel::ABSENT_CODE),
        (0, sel::BEYOND, GP, sel::BEYOND),
        (0, sel::LDT, GP, sel::LDT),
        (0, sel::TSS, GP, sel::TSS),
        (3, sel::CODE3 & !3, 0, 0),
        (3, sel::CODE3, 0, 0),
        (3, sel::CODE0, GP, sel::CODE0),
        (3, sel::CONFORMING, 0, 0),
        (3, sel::TSS2, GP, sel::TSS2),
    ] {
        let mut m = Machine::protected(level);
        let mut code = vec![0xea];
        code.extend((CODE2 as u32).to_le_bytes());
        code.extend(selector.to_le_bytes());
        m.memory.write(CODE, &code).unwrap();
        m.code(32, CODE2, |a| a.end());
        let case = format!("jump to {selector:#x} in ring {level}");
        match (m.run(), vector) {
            (End::Handler(END, stack), 0) => {
                assert_eq!(stack[0], CODE2 + 2, "{case}");
                assert_eq!(stack[1] as u16, selector & !3 | u16::from(level), "{case}");
            }
            (End::Handler(v, stack), _) if v == vector => {
                assert_eq!((stack[0], stack[1]), (error.into(), CODE), "{case}");
            }
            (other, _) => panic!("{case}: {other:x?}"),
        }
    }
}

#[test]
fn a_target_beyond_the_code_segment_faults_at_the_jump() {
    let mut m = Machine::protected(0);
    // jmp 0x90:0x10000: the limit is 64 KiB.
    m.memory.write(CODE, &[0xea, 0, 0, 1, 0, 0x90, 0]).unwrap();
    m.expect_fault(GP, 0, CODE);
}

#[test]
fn a_call_gate_switches_stacks_and_copies_parameters() {
    let mut m = Machine::protected(3);
    m.u64(GDT + 0x58, gate(sel::CODE0, CODE2 as u32, 0xec, 2));
    m.code(32, CODE, |a| {
        a.push(0x1111)?;
        a.push(0x2222)?;
        // call 0x5b:0
        a.db(&[0x9a, 0, 0, 0, 0, 0x5b, 0])?;
        a.end()
    });
    // Ring 0 looks at its frame and returns, releasing the parameters on both stacks.
    m.code(32, CODE2, |a| {
        a.mov(eax, dword_ptr(esp + 8))?;
        a.mov(ebx, dword_ptr(esp + 12))?;
        a.mov(ecx, dword_ptr(esp + 16))?;
        a.mov(edx, dword_ptr(esp + 20))?;
        a.mov(esi, esp)?;
        a.mov(edi, ss)?;
        a.retf_1(8)
    });
    let stack = m.expect(END);
    let g = &m.state.gpr;
    assert_eq!(
        [g[0], g[3], g[1], g[2], g[6], g[7]],
        [
            0x2222,
            0x1111,
            STACK - 8,
            sel::DATA3.into(),
            STACK0 - 24,
            sel::DATA0.into()
        ]
    );
    let end = CODE + 2 * 5 + 7 + 2;
    assert_eq!(stack[..2], [end, sel::CODE3.into()]);
    assert_eq!(
        stack[3..5],
        [STACK, sel::DATA3.into()],
        "back on the outer stack"
    );
}

#[test]
fn call_gates_are_checked() {
    const CALL: u16 = 0x58;
    const TARGET: u64 = 0x4ff0; // within 16 bits
    for (level, entry, vector, error) in [
        (3, gate(sel::CODE0, TARGET as u32, 0x8c, 0), GP, CALL), // DPL 0
        (3, gate(sel::CODE0, TARGET as u32, 0x6c, 0), NP, CALL),
        (3, gate(0, TARGET as u32, 0xec, 0), GP, 0),
        (3, gate(sel::DATA0, TARGET as u32, 0xec, 0), GP, sel::DATA0),
        (
            3,
            gate(sel::ABSENT_CODE, TARGET as u32, 0xec, 0),
            NP,
            sel::ABSENT_CODE,
        ),
        (
            0,
            gate(sel::CODE3, TARGET as u32, 0xec, 0),
            GP,
            sel::CODE3 & !3,
        ),
        (0, gate(sel::CODE0, TARGET as u32, 0xec, 0), UD, 0),
        (0, gate(sel::CODE0, TARGET as u32, 0xe4, 0), UD, 0),
        (3, gate(sel::CONFORMING, TARGET as u32, 0xec, 0), UD, 0),
    ] {
        let mut m = Machine::protected(level);
        m.u64(GDT + u64::from(CALL), entry);
        m.memory.write(CODE, &[0x9a, 0, 0, 0, 0, 0x58, 0]).unwrap();
        m.memory.write(TARGET, &[0x0f, 0x0b]).unwrap();
        let stack = m.expect(vector);
        if vector == UD {
            assert_eq!(stack[0], TARGET, "arrived");
        } else {
            assert_eq!((stack[0], stack[1]), (error.into(), CODE), "{entry:#x}");
        }
    }
}

#[test]
fn a_bad_inner_stack_is_an_invalid_tss() {
    const TS: u8 = 10;
    for (stack, top, vector, error) in [
        (0, STACK0, TS, 0),
        (sel::DATA3, STACK0, TS, sel::DATA3 & !3),
        (sel::READ_ONLY, STACK0, TS, sel::READ_ONLY),
        (sel::BEYOND, STACK0, TS, sel::BEYOND),
        (sel::EXPAND_DOWN & !3, STACK0, TS, sel::EXPAND_DOWN),
        (sel::LDT, STACK0, TS, sel::LDT),
        (sel::ABSENT_CODE + 8, 0x1_000b, SS, sel::ABSENT_CODE + 8),
    ] {
        let mut m = Machine::protected(3);
        // The last one: a stack segment that ends in the middle of a word.
        m.u64(GDT + u64::from(sel::CODE64), descriptor(0, 0xffff, 0x4093));
        m.u32(TSS + 4, top as u32);
        m.u32(TSS + 8, stack.into());
        // A handler in conforming code stays in ring 3, and so on the old stack.
        m.u64(
            IDT + 8 * u64::from(vector),
            gate(
                sel::CONFORMING,
                HANDLERS as u32 + 16 * u32::from(vector),
                0x8e,
                0,
            ),
        );
        m.memory.write(CODE, &[0xcd, END]).unwrap();
        m.expect_fault(vector, error.into(), CODE);
    }
}

#[test]
fn returns_are_checked() {
    // retf in ring 3 or 0 to a selector: vector (0: arrives), error code
    for (level, selector, vector, error) in [
        (0, sel::CODE0, 0, 0),
        (0, sel::CODE3, 0, 0),
        (0, 0, GP, 0),
        (0, sel::DATA0, GP, sel::DATA0),
        (0, sel::CODE3 & !3, GP, sel::CODE3 & !3),
        (0, sel::CODE0 | 3, GP, sel::CODE0),
        (0, sel::CONFORMING | 3, 0, 0),
        (0, sel::ABSENT_CODE, NP, sel::ABSENT_CODE),
        (3, sel::CODE0, GP, sel::CODE0),
        (3, sel::CODE3, 0, 0),
    ] {
        let mut m = Machine::protected(level);
        m.code(32, CODE, |a| {
            a.push(u32::from(sel::DATA3))?;
            a.push(DATA as u32)?;
            a.push(u32::from(selector))?;
            a.push(CODE2 as u32)?;
            a.retf()
        });
        m.code(32, CODE2, |a| a.end());
        let case = format!("retf to {selector:#x} in ring {level}");
        match (m.run(), vector) {
            (End::Handler(END, stack), 0) => {
                assert_eq!(stack[..2], [CODE2 + 2, selector.into()], "{case}");
                if selector & 3 > u16::from(level) {
                    assert_eq!(stack[3..5], [DATA, sel::DATA3.into()], "{case}");
                    for reg in [0, 3, 4, 5] {
                        assert_eq!(m.state.segments[reg].selector, 0, "{case}: inner data");
                    }
                }
            }
            (End::Handler(v, stack), _) if v == vector => {
                assert_eq!(stack[0], u64::from(error), "{case}");
            }
            (other, _) => panic!("{case}: {other:x?}"),
        }
    }
}

#[test]
fn an_interrupt_and_its_return() {
    let mut m = Machine::protected(3);
    m.u64(IDT + 8 * 0x40, gate(sel::CODE0, CODE2 as u32, 0xee, 0));
    m.state.rflags = 0x3202; // IF, IOPL 3
    m.code(32, CODE, |a| {
        a.mov(eax, 1)?;
        a.int(0x40)?;
        a.add(eax, 1)?;
        a.end()
    });
    m.code(32, CODE2, |a| {
        a.pushfd()?;
        a.pop(ecx)?;
        a.mov(ebx, esp)?;
        a.add(eax, 0x10)?;
        a.iretd()
    });
    let stack = m.expect(END);
    let g = &m.state.gpr;
    assert_eq!((g[0], g[3]), (0x12, STACK0 - 20));
    assert_eq!(g[1] & 0x200, 0, "an interrupt gate clears IF");
    assert_eq!(stack[2] & 0x3200, 0x3200, "IRET restores it");
    assert_eq!(
        stack[1..5],
        [sel::CODE3.into(), stack[2], STACK, sel::DATA3.into()]
    );
}

#[test]
fn bad_gates() {
    let code3 = gate(sel::CODE3, CODE2 as u32, 0x8e, 0);
    for (entry, vector, error) in [
        (0, GP, 0x21 * 8 + 2),
        (gate(sel::CODE0, CODE2 as u32, 0x8c, 0), GP, 0x21 * 8 + 2),
        (gate(sel::CODE0, CODE2 as u32, 0x0e, 0), NP, 0x21 * 8 + 2),
        (gate(0, CODE2 as u32, 0x8e, 0), GP, 0),
        (
            gate(sel::DATA0, CODE2 as u32, 0x8e, 0),
            GP,
            sel::DATA0.into(),
        ),
        (
            gate(sel::ABSENT_CODE, CODE2 as u32, 0x8e, 0),
            NP,
            sel::ABSENT_CODE.into(),
        ),
        (code3, GP, u64::from(sel::CODE3 & !3)),
    ] {
        let mut m = Machine::protected(0);
        m.u64(IDT + 8 * 0x21, entry);
        m.memory.write(CODE, &[0xcd, 0x21]).unwrap();
        m.expect_fault(vector, error, CODE);
        // The same for an exception, with EXT set. #UD is benign: the second fault is delivered as it is.
        let mut m = Machine::protected(0);
        m.u64(IDT + 8 * 6, entry);
        m.memory.write(CODE, &[0x0f, 0x0b]).unwrap();
        let error = if error == 0x21 * 8 + 2 {
            6 * 8 + 2
        } else {
            error
        };
        m.expect_fault(vector, error | 1, CODE);
    }
    let mut m = Machine::protected(0);
    m.state.idtr.limit = 0x20 * 8 + 6;
    m.memory.write(CODE, &[0xcd, 0x20]).unwrap();
    m.expect_fault(GP, 0x20 * 8 + 2, CODE);
}

#[test]
fn faults_during_delivery_combine() {
    // #GP whose gate is absent: #NP on top of #GP is a double fault.
    let mut m = Machine::protected(0);
    m.u64(IDT + 8 * u64::from(GP), 0);
    m.memory.write(CODE, &[0xcd, 0x21]).unwrap();
    m.u64(IDT + 8 * 0x21, 0);
    m.expect_fault(DF, 0, CODE);
    // And without a gate for that: a triple fault.
    let mut m = Machine::protected(0);
    m.state.idtr.limit = 7;
    m.memory.write(CODE, &[0x0f, 0x0b]).unwrap();
    assert!(matches!(m.run(), End::Shutdown));
    assert_eq!(m.state.rip, CODE);
}

#[test]
fn the_resume_flag_is_pushed_for_faults_only() {
    for (code, vector, rf) in [
        (&[0x0f, 0x0b][..], 6, true),
        (&[0xcd, 0x21], 0x21, false),
        (&[0xcc], 3, false),
        (&[0xf1], 1, false),
    ] {
        let mut m = Machine::protected(0);
        m.memory.write(CODE, code).unwrap();
        let stack = m.expect(vector);
        assert_eq!(stack[2] >> 16 & 1, u64::from(rf), "vector {vector}");
    }
}

/// LAR, LSL, VERR, VERW in ring 3: ZF and value.
#[test]
fn probes_of_descriptors() {
    type Probe = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let lar: Probe = |a| a.lar(ecx, eax);
    let lsl: Probe = |a| a.lsl(ecx, eax);
    let verr: Probe = |a| a.verr(eax);
    let verw: Probe = |a| a.verw(eax);
    const OLD: u64 = 0x5555;
    for (name, probe, selector, zf, value) in [
        ("lar", lar, sel::CODE3, true, 0x00c0_fb00),
        ("lar", lar, sel::CODE0, false, OLD),
        ("lar", lar, sel::CONFORMING, true, 0x00c0_9f00),
        ("lar", lar, sel::CALL_GATE, true, 0xec00),
        ("lar", lar, sel::TASK_GATE, true, 0xe500),
        ("lar", lar, sel::BEYOND, false, OLD),
        ("lar", lar, 0, false, OLD),
        ("lsl", lsl, sel::DATA3, true, 0xffff_ffff),
        ("lsl", lsl, sel::EXPAND_DOWN, true, 0xfff),
        ("lsl", lsl, sel::CALL_GATE, false, OLD),
        ("lsl", lsl, sel::TSS, false, OLD),
        ("verr", verr, sel::READ_ONLY, true, OLD),
        ("verr", verr, sel::EXECUTE_ONLY, false, OLD),
        ("verr", verr, sel::TASK_GATE, false, OLD),
        ("verw", verw, sel::READ_ONLY, false, OLD),
        ("verw", verw, sel::DATA3, true, OLD),
        ("verw", verw, sel::DATA0, false, OLD),
    ] {
        let mut m = Machine::protected(3);
        m.u64(
            GDT + u64::from(sel::CALL_GATE),
            gate(sel::CODE0, 0, 0xec, 3),
        );
        m.state.gpr[1] = OLD;
        m.state.gpr[0] = selector.into();
        m.code(32, CODE, |a| {
            probe(a)?;
            a.end()
        });
        let stack = m.expect(END);
        let got = (stack[2] & 0x40 != 0, m.state.gpr[1]);
        assert_eq!(got, (zf, value), "{name} {selector:#x}");
    }
}

#[test]
fn arpl_raises_the_rpl() {
    for (dest, source, result, zf) in [(0x10, 3, 0x13, true), (0x13, 1, 0x13, false)] {
        let mut m = Machine::protected(3);
        (m.state.gpr[0], m.state.gpr[1]) = (dest, source);
        m.code(32, CODE, |a| {
            a.arpl(ax, cx)?;
            a.end()
        });
        let stack = m.expect(END);
        assert_eq!((m.state.gpr[0], stack[2] & 0x40 != 0), (result, zf));
    }
}

/// LLDT and LTR: vector (0: fine), error code.
#[test]
fn system_segments_are_checked() {
    for (ltr, selector, vector, error) in [
        (false, sel::LDT, 0, 0),
        (false, 0, 0, 0),
        (false, sel::DATA0, GP, sel::DATA0),
        (false, sel::LDT | 4, GP, sel::LDT | 4),
        (true, sel::TSS2, 0, 0),
        (true, 0, GP, 0),
        (true, sel::TSS, GP, sel::TSS), // busy
        (true, sel::DATA0, GP, sel::DATA0),
    ] {
        let mut m = Machine::protected(0);
        m.state.gpr[0] = selector.into();
        m.code(32, CODE, |a| {
            if ltr {
                a.ltr(ax)?
            } else {
                a.lldt(ax)?
            }
            a.done()
        });
        if vector == 0 {
            m.expect_done();
            let loaded = if ltr { m.state.tr } else { m.state.ldtr };
            assert_eq!(loaded.selector, selector);
            if ltr {
                assert_eq!(
                    m.get32(GDT + u64::from(selector) + 4) >> 8 & 0xf,
                    0xb,
                    "busy"
                );
            }
        } else {
            m.expect_fault(vector, error.into(), CODE);
        }
    }
}

#[test]
fn the_ldt_is_used_by_selectors_with_ti() {
    let mut m = Machine::protected(0);
    m.u64(LDT + 8, descriptor(DATA as u32, 0xff, 0x4093));
    m.u32(DATA + 0x10, 0x1234_5678);
    m.code(32, CODE, |a| {
        a.mov(eax, u32::from(sel::LDT))?;
        a.lldt(ax)?;
        a.mov(eax, 0xc)?;
        a.mov(fs, ax)?;
        a.mov(ecx, dword_ptr(0x10).fs())?;
        a.done()
    });
    m.expect_done();
    assert_eq!(m.state.gpr[1], 0x1234_5678);
}

/// The I/O permission map: port, size, whether ring 3 may.
#[test]
fn the_io_map_decides() {
    for (port, size, allowed) in [
        (0x60_u16, 1, true),
        (0x61, 1, false),
        (0x5f, 2, true),
        (0x60, 2, false),
        (0x62, 4, true),
        (0x67, 2, true),
        (0xbf7, 1, true),
        (0xbf8, 1, false), // beyond the TSS
        (0xffff, 4, false),
    ] {
        for long in [false, true] {
            let mut m = if long {
                Machine::long(3)
            } else {
                Machine::protected(3)
            };
            // The map begins at 0x80: port 0x61 is refused, the others up to the TSS's end are allowed.
            m.u32(TSS + 0x8c, 2);
            m.state.gpr[2] = port.into();
            m.code(if long { 64 } else { 32 }, CODE, |a| {
                match size {
                    1 => a.in_(al, dx)?,
                    2 => a.in_(ax, dx)?,
                    _ => a.in_(eax, dx)?,
                }
                a.end()
            });
            let case = format!("{size} bytes at {port:#x}, long {long}");
            match (m.run(), allowed) {
                (End::Handler(END, _), true) => {}
                (End::Handler(GP, stack), false) => assert_eq!(stack[0], 0, "{case}"),
                other => panic!("{case}: {other:x?}"),
            }
        }
    }
}

#[test]
fn sixteen_bit_code_and_stack() {
    const START: u64 = 0x4f00;
    let mut m = Machine::protected(0);
    m.state.rip = START;
    m.code(32, START, |a| {
        a.mov(eax, u32::from(sel::DATA16))?;
        a.mov(ss, eax)?;
        a.mov(esp, 0x1_8000)?;
        // call 0x90:0x4ff0 with 16-bit operands
        a.db(&[0x66, 0x9a, 0xf0, 0x4f, 0x90, 0])?;
        a.done()
    });
    m.code(16, 0x4ff0, |a| {
        a.mov(bp, sp)?;
        a.mov(ecx, dword_ptr(bp))?;
        a.retf()
    });
    m.expect_done();
    let back = START + 5 + 2 + 5 + 6;
    assert_eq!(m.state.gpr[4], 0x1_8000, "the upper half of ESP is kept");
    assert_eq!(m.state.gpr[1], back | u64::from(sel::CODE0) << 16);
}

#[test]
fn sysenter_and_sysexit() {
    let mut m = Machine::protected(3);
    m.state.msrs.sysenter_cs = 0x8;
    m.state.msrs.sysenter_eip = CODE2;
    m.state.msrs.sysenter_esp = STACK0;
    m.state.rflags = 0x202;
    m.code(32, CODE, |a| a.sysenter());
    m.code(32, CODE2, |a| {
        a.mov(ebx, cs)?;
        a.mov(esi, esp)?;
        a.mov(edx, CODE2 as u32 + 0x100)?;
        a.mov(ecx, STACK as u32)?;
        a.sysexit()
    });
    m.code(32, CODE2 + 0x100, |a| {
        a.mov(edi, cs)?;
        a.end()
    });
    let stack = m.expect(END);
    let g = &m.state.gpr;
    assert_eq!([g[3], g[6], g[7]], [8, STACK0, 0x1b]);
    assert_eq!(stack[2] & 0x200, 0, "IF stays as SYSENTER left it");
    assert_eq!(stack[3..5], [STACK, 0x23]);
}
