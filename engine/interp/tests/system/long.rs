//! Long mode: interrupts and stacks, system calls, control registers, MSRs.

use iced_x86::code_asm::*;
use lodger_x86::bits::{cr0, cr4, msr};

use crate::machine::*;

const DB: u8 = 1;
const UD: u8 = 6;
const NP: u8 = 11;
const GP: u8 = 13;
const PF: u8 = 14;

#[test]
fn an_interrupt_from_ring_3_and_its_return() {
    let mut m = Machine::long(3);
    m.u64(IDT + 16 * 0x40, gate(sel::CODE64, CODE2 as u32, 0xee, 0));
    m.state.rflags = 0x202;
    m.state.gpr[4] = STACK - 3;
    m.code(64, CODE, |a| {
        a.int(0x40)?;
        a.mov(r10d, ss)?;
        a.end()
    });
    m.code(64, CODE2, |a| {
        a.mov(r8, rsp)?;
        a.mov(r9d, ss)?;
        a.iretq()
    });
    let stack = m.expect(END);
    let g = &m.state.gpr;
    assert_eq!([g[8], g[9], g[10]], [STACK0 - 40, 0, sel::DATA3.into()]);
    let end = CODE + 2 + 3 + 2;
    assert_eq!(stack[..2], [end, sel::CODE64_3.into()]);
    assert_eq!(stack[2] & 0x200, 0x200);
    assert_eq!(stack[3..5], [STACK - 3, sel::DATA3.into()]);
}

#[test]
fn the_stack_is_aligned_and_the_ist_used() {
    for (ist, top) in [(0, STACK - 0x10), (1, DATA), (7, DATA + 0x100)] {
        let mut m = Machine::long(0);
        m.state.gpr[4] = STACK - 5;
        m.u64(TSS + 0x24, DATA + 7);
        m.u64(TSS + 0x54, DATA + 0x100);
        m.u64(
            IDT + 16 * 6,
            gate(sel::CODE64, HANDLERS as u32 + 96, 0x8e, ist),
        );
        m.memory.write(CODE, &[0x0f, 0x0b]).unwrap();
        let stack = m.expect(UD);
        assert_eq!(m.state.gpr[4], top - 40 - 8, "IST {ist}");
        assert_eq!(stack[..2], [CODE, sel::CODE64.into()]);
        assert_eq!(stack[3..5], [STACK - 5, sel::DATA0.into()]);
    }
}

#[test]
fn handlers_must_be_64_bit_code() {
    for selector in [sel::CODE0, sel::DATA0, sel::CODE64_3] {
        let mut m = Machine::long(0);
        m.u64(IDT + 16 * 0x21, gate(selector, CODE2 as u32, 0x8e, 0));
        m.memory.write(CODE, &[0xcd, 0x21]).unwrap();
        m.expect_fault(GP, u64::from(selector & !3), CODE);
    }
    let mut m = Machine::long(0);
    m.u64(IDT + 16 * 0x21, gate(sel::CODE64, CODE2 as u32, 0x85, 0));
    m.memory.write(CODE, &[0xcd, 0x21]).unwrap();
    m.expect_fault(GP, 0x21 * 8 + 2, CODE);
    let mut m = Machine::long(0);
    m.u64(IDT + 16 * 0x21, gate(sel::CODE64, CODE2 as u32, 0x0e, 0));
    m.memory.write(CODE, &[0xcd, 0x21]).unwrap();
    m.expect_fault(NP, 0x21 * 8 + 2, CODE);
}

#[test]
fn a_page_fault_sets_cr2_and_a_second_one_is_a_double_fault() {
    let mut m = Machine::long(0);
    m.code(64, CODE, |a| a.mov(dword_ptr(0x20_1234), eax));
    let stack = m.expect(PF);
    assert_eq!((stack[0], stack[1], m.state.cr2), (2, CODE, 0x20_1234));

    let mut m = Machine::long(0);
    m.u64(
        IDT + 16 * 8,
        gate(sel::CODE64, HANDLERS as u32 + 128, 0x8e, 1),
    );
    m.u64(TSS + 0x24, STACK0);
    m.code(64, CODE, |a| {
        a.mov(esp, 0x30_0000)?;
        a.mov(eax, dword_ptr(0x20_1234))
    });
    m.expect_fault(8, 0, CODE + 5);
    assert_eq!(m.state.cr2, 0x30_0000 - 8);
}

#[test]
fn non_canonical_addresses() {
    for (write, vector) in [
        (&[0x8b, 0x03][..], GP),         // mov eax, [rbx]
        (&[0xff, 0xe3], GP),             // jmp rbx
        (&[0x48, 0x8b, 0xe3, 0x50], 12), // mov rsp, rbx; push rax
        (&[0x0f, 0xae, 0x3b], GP),       // clflush [rbx]
    ] {
        let mut m = Machine::long(0);
        // The stack of the handler must be a good one.
        m.u64(
            IDT + 16 * u64::from(vector),
            gate(
                sel::CODE64,
                HANDLERS as u32 + 16 * u32::from(vector),
                0x8e,
                1,
            ),
        );
        m.u64(TSS + 0x24, STACK0);
        m.state.gpr[3] = 0x9000_0000_0000;
        m.memory.write(CODE, write).unwrap();
        let at = if vector == 12 { CODE + 3 } else { CODE };
        m.expect_fault(vector, 0, at);
    }
}

#[test]
fn syscall_and_sysret() {
    // With and without AC, which the mask clears.
    for ac in [0x4_0000, 0] {
        let mut m = Machine::long(3);
        // SYSRET: CS = base + 16, SS = base + 8. The GDT is not looked at.
        m.state.msrs.star = 0x0013_0008_0000_0000;
        m.state.msrs.lstar = CODE2;
        m.state.msrs.sfmask = 0x4_0700;
        m.state.rflags = ac | 0x202 | 1;
        m.code(64, CODE, |a| {
            a.syscall()?;
            a.mov(r12d, cs)?;
            a.mov(r13d, ss)?;
            a.end()
        });
        m.code(64, CODE2, |a| {
            a.mov(r8, rcx)?;
            a.mov(r9, r11)?;
            a.mov(r14d, cs)?;
            a.mov(r15d, ss)?;
            a.pushfq()?;
            a.pop(rbx)?;
            a.sysretq()
        });
        let stack = m.expect(END);
        let g = &m.state.gpr;
        assert_eq!([g[8], g[9]], [CODE + 2, ac | 0x203]);
        assert_eq!([g[14], g[15], g[3]], [0x08, 0x10, 3], "flags are masked");
        assert_eq!([g[12], g[13]], [0x23, 0x1b]);
        assert_eq!(stack[2] & 0x4_0203, ac | 0x203, "and restored");
    }
}

#[test]
fn a_system_call_keeps_the_vector_registers_and_may_return_to_other_flags() {
    let mut m = Machine::long(3);
    m.state.cr4 |= cr4::OSFXSR;
    m.state.msrs.star = 0x0013_0008_0000_0000;
    m.state.msrs.lstar = CODE2;
    m.state.msrs.sfmask = 0x4_0700;
    m.state.rflags = 0x202;
    for n in 0..16 {
        m.state.fpu.ymm[n] = [n as u8 + 1; 32];
    }
    let before = m.state.fpu.clone();
    m.code(64, CODE, |a| {
        a.mov(ebx, 3)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.movd(eax, xmm3)?;
        a.syscall()?;
        // The flags that the system call returned.
        a.pushfq()?;
        a.pop(r9)?;
        a.movd(r8d, xmm3)?;
        a.sub(r8d, eax)?;
        a.or(r12, r8)?;
        a.dec(ebx)?;
        a.jnz(again)?;
        a.end()
    });
    m.code(64, CODE2, |a| {
        // What translated code leaves to others.
        a.mov(r8, cr2)?;
        a.mov(dword_ptr(DATA), ebx)?;
        a.or(r11d, 0xc95)?; // DF and OF among them
        a.sysretq()
    });
    m.expect(END);
    let g = &m.state.gpr;
    assert_eq!((g[12], g[9] & 0xfff), (0, 0xe97));
    assert_eq!(m.state.fpu.ymm, before.ymm);
    assert_eq!(m.get32(DATA), 1);
}

#[test]
fn returns_that_are_not_plain() {
    let mut m = Machine::long(0);
    m.state.msrs.star = 0x0013_0008_0000_0000;
    m.state.gpr[1] = 1 << 47;
    m.state.gpr[11] = 0x202;
    m.memory.write(CODE, &[0x48, 0x0f, 0x07]).unwrap();
    // SYSRET to an address that is not canonical faults there, in user mode.
    let stack = m.expect(GP);
    assert_eq!((stack[1], stack[2]), (1 << 47, 0x23));
    // With TF, a trap follows the first instruction of user code.
    let mut m = Machine::long(0);
    m.state.msrs.star = 0x0013_0008_0000_0000;
    m.state.gpr[1] = CODE2;
    m.state.gpr[11] = 0x302;
    m.memory.write(CODE, &[0x48, 0x0f, 0x07]).unwrap();
    m.memory.write(CODE2, &[0x90, 0x90]).unwrap();
    assert_eq!(m.expect(DB)[0], CODE2 + 1);
}

#[test]
fn syscall_needs_its_enable_bit_and_sysret_ring_0() {
    let mut m = Machine::long(3);
    m.state.efer &= !1;
    m.memory.write(CODE, &[0x0f, 0x05]).unwrap();
    assert_eq!(m.expect(UD)[0], CODE);
    let mut m = Machine::long(3);
    m.memory.write(CODE, &[0x48, 0x0f, 0x07]).unwrap();
    m.expect_fault(GP, 0, CODE);
}

#[test]
fn sysenter_and_sysexit_are_not_there_on_amd() {
    for code in [[0x0f, 0x34], [0x0f, 0x35]] {
        let mut m = Machine::long(0);
        m.state.msrs.sysenter_cs = 8;
        m.memory.write(CODE, &code).unwrap();
        assert_eq!(m.expect(UD)[0], CODE);
    }
}

#[test]
fn bases_of_fs_and_gs() {
    let mut m = Machine::long(0);
    m.state.cr4 |= cr4::FSGSBASE;
    m.u64(DATA, 0xaaaa);
    m.u64(DATA + 0x100, 0xbbbb);
    m.state.msrs.kernel_gs_base = DATA + 0x100;
    m.code(64, CODE, |a| {
        a.mov(eax, DATA as u32)?;
        a.wrgsbase(rax)?;
        a.mov(r8, qword_ptr(0).gs())?;
        a.swapgs()?;
        a.mov(r9, qword_ptr(0).gs())?;
        a.rdgsbase(r10)?;
        a.mov(ecx, msr::FS_BASE)?;
        a.mov(eax, DATA as u32 + 0x100)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(r11, qword_ptr(0).fs())?;
        a.xor(eax, eax)?;
        a.mov(gs, ax)?;
        a.rdgsbase(r12)?;
        a.done()
    });
    m.expect_done();
    let g = &m.state.gpr;
    assert_eq!(g[8..13], [0xaaaa, 0xbbbb, DATA + 0x100, 0xbbbb, 0]);
    assert_eq!(m.state.msrs.kernel_gs_base, DATA);
    // Without the enable bit they are undefined; a bad base is #GP(0).
    let mut m = Machine::long(0);
    m.code(64, CODE, |a| a.rdfsbase(rax));
    assert_eq!(m.expect(UD)[0], CODE);
    let mut m = Machine::long(0);
    m.state.cr4 |= cr4::FSGSBASE;
    m.state.gpr[0] = 1 << 60;
    m.code(64, CODE, |a| a.wrfsbase(rax));
    m.expect_fault(GP, 0, CODE);
}

#[test]
fn iret_may_load_a_null_stack_in_ring_0_only() {
    for (code, stack_selector, vector, error) in [
        (sel::CODE64, 0, 0, 0),
        (sel::CODE64_3, 3, GP, 0),
        (sel::CODE64_3, sel::DATA3, 0, 0),
        (sel::CODE64, sel::DATA3, GP, sel::DATA3 & !3),
        (sel::CODE3, sel::DATA3, 0, 0),
    ] {
        let mut m = Machine::long(0);
        m.code(64, CODE, |a| {
            a.push(i32::from(stack_selector))?;
            a.push(DATA as i32)?;
            a.push(2)?;
            a.push(i32::from(code))?;
            a.push(CODE2 as i32)?;
            a.iretq()
        });
        m.memory.write(CODE2, &[0xcd, END]).unwrap();
        let wanted = if vector == 0 { END } else { vector };
        let stack = m.expect(wanted);
        if vector == 0 {
            assert_eq!(stack[..2], [CODE2 + 2, u64::from(code)]);
            assert_eq!(stack[3..5], [DATA, u64::from(stack_selector)]);
        } else {
            assert_eq!(stack[0], u64::from(error));
        }
    }
}

#[test]
fn compatibility_mode_is_32_bit() {
    let mut m = Machine::long(0);
    m.code(64, CODE, |a| {
        a.mov(rax, 0xffff_ffff_0000_0001_u64)?;
        a.push(i32::from(sel::CODE0))?;
        a.push(CODE2 as i32)?;
        a.db(&[0x48, 0xcb])
    });
    m.code(32, CODE2, |a| {
        a.inc(eax)?; // 0x40: a REX prefix in 64-bit mode
        a.mov(ecx, dword_ptr(DATA + 4))?;
        a.done()
    });
    m.u32(DATA + 4, 0x5a5a);
    m.expect_done();
    assert_eq!((m.state.gpr[0], m.state.gpr[1]), (2, 0x5a5a));
}

#[test]
fn a_64_bit_call_gate() {
    let mut m = Machine::long(3);
    m.u64(GDT + 0x58, gate(sel::CODE64, CODE2 as u32, 0xec, 0));
    m.u64(GDT + 0x60, 0);
    m.u32(DATA, 0);
    m.memory.write(DATA + 4, &0x5b_u16.to_le_bytes()).unwrap();
    m.memory
        .write(CODE, &[0xff, 0x1c, 0x25, 0, 0xa0, 0, 0, 0xcd, END])
        .unwrap();
    m.code(64, CODE2, |a| {
        a.mov(r8, rsp)?;
        a.mov(r9, qword_ptr(rsp + 24))?;
        a.db(&[0x48, 0xcb])
    });
    let stack = m.expect(END);
    assert_eq!(
        [m.state.gpr[8], m.state.gpr[9]],
        [STACK0 - 32, sel::DATA3.into()]
    );
    assert_eq!(stack[0], CODE + 9);
    assert_eq!(stack[3..5], [STACK, sel::DATA3.into()]);
}

/// Writes of control registers that are refused with #GP(0), in 64-bit mode.
#[test]
fn control_registers_are_checked() {
    let on = Machine::long(0).state;
    for (number, value) in [
        (0, on.cr0 & !cr0::PG),
        (0, on.cr0 & !cr0::PE),
        (0, on.cr0 | cr0::NW),
        (0, on.cr0 | 1 << 32),
        (3, 1 << 52),
        (3, 1 << 63),
        (4, on.cr4 & !cr4::PAE),
        (4, on.cr4 | cr4::VME),
        (4, on.cr4 | cr4::LA57),
        (4, on.cr4 | 1 << 31),
        (8, 16),
    ] {
        let mut m = Machine::long(0);
        m.state.gpr[0] = value;
        m.code(64, CODE, |a| match number {
            0 => a.mov(cr0, rax),
            3 => a.mov(cr3, rax),
            4 => a.mov(cr4, rax),
            _ => a.mov(cr8, rax),
        });
        m.expect_fault(GP, 0, CODE);
    }
}

/// MSR writes: refused with #GP(0), or read back as what.
#[test]
fn address_spaces_with_numbers_are_kept_apart_and_flushed_one_by_one() {
    const KEEP: u64 = 1 << 63;
    const WINDOW: u64 = 0x20_0000;
    let (tables, pages) = ([0x2_8000, 0x2_c000], [0x3_0000, 0x3_1000, 0x3_2000]);
    let mut m = Machine::long(0);
    for (n, at) in tables.into_iter().enumerate() {
        m.u64(at, at + 0x1007);
        m.u64(at + 0x1000, at + 0x2007);
        m.u64(at + 0x2000, 0x87);
        m.u64(at + 0x2008, at + 0x3007);
        m.u64(at + 0x3000, pages[n] | 7);
    }
    for (n, at) in (1_u64..).zip(pages) {
        // mov eax, n; ret; and n as data.
        m.u64(at, 0xc300_0000_00b8 | n << 8);
        m.u64(at + 8, n);
    }
    let entry = |n: usize| tables[n] + 0x3000;
    // What is loaded to CR3, and the pages whose code and data are seen then.
    let steps = [
        (tables[0] | 1, 1_u64),
        (tables[1] | 2, 2),
        (tables[0] | 1 | KEEP, 1),
        (tables[1] | 2 | KEEP, 2),
        (tables[1] | 1, 2),
        (tables[0] | 1, 1),
        // Here the mappings of both spaces change.
        (tables[0] | 1, 3),
        (tables[1] | 2, 3),
        (tables[0] | 1 | KEEP, 3),
    ];
    m.code(64, CODE, |a| {
        a.mov(rax, cr4)?;
        a.or(eax, cr4::PCIDE as i32)?;
        a.mov(cr4, rax)?;
        a.mov(r15, WINDOW)?;
        for (n, (value, _)) in steps.into_iter().enumerate() {
            if n == 6 {
                for space in [0, 1] {
                    a.mov(rax, entry(space))?;
                    a.mov(dword_ptr(rax), (pages[2] | 7) as i32)?;
                }
            }
            a.mov(rcx, value)?;
            a.mov(cr3, rcx)?;
            a.mov(rdx, cr3)?;
            a.mov(rbx, value & !KEEP)?;
            a.sub(rdx, rbx)?;
            a.or(r14, rdx)?;
            a.mov(r13d, dword_ptr(r15 + 8))?;
            a.call(r15)?;
            a.shl(r12, 4)?;
            a.or(r12, rax)?;
            a.sub(r13, rax)?;
            a.or(r14, r13)?;
        }
        a.done()
    });
    m.expect_done();
    let seen = steps.iter().fold(0, |seen, (_, page)| seen << 4 | page);
    assert_eq!(m.state.gpr[12], seen);
    assert_eq!(m.state.gpr[14], 0, "CR3 as loaded, data and code alike");
}

#[test]
fn msrs_are_checked() {
    let bad = 1_u64 << 62;
    for (number, value, result) in [
        (
            msr::LSTAR,
            0xffff_8000_0000_1234,
            Some(0xffff_8000_0000_1234),
        ),
        (msr::LSTAR, bad, None),
        (msr::FS_BASE, bad, None),
        (msr::KERNEL_GS_BASE, bad, None),
        (msr::SYSENTER_EIP, bad, None),
        (msr::PAT, 0x0007_0406_0007_0106, Some(0x0007_0406_0007_0106)),
        (msr::PAT, 2, None),
        (msr::MTRR_DEF_TYPE, 0xc06, Some(0xc06)),
        (msr::MTRR_DEF_TYPE, 2, None),
        (msr::MTRR_DEF_TYPE, 0x1000, None),
        (
            msr::MTRR_FIX_64K,
            0x0606_0606_0606_0606,
            Some(0x0606_0606_0606_0606),
        ),
        (msr::MTRR_FIX_4K_F8000, 7, None),
        (msr::MTRR_PHYS_BASE0, 0x8000_0006, Some(0x8000_0006)),
        (msr::MTRR_PHYS_BASE0, 0x806, None),
        (msr::MTRR_PHYS_MASK7, 0x800, Some(0x800)),
        (msr::MTRR_PHYS_MASK7, 1 << 52, None),
        (msr::MTRR_CAP, 0, None),
        (msr::EFER, 0xd01, Some(0xd01)),
        (msr::EFER, 0x101, Some(0x501)), // LMA is kept
        (msr::EFER, 0xc00, None),        // LME while paging
        (msr::EFER, 1 << 12, None),
        (msr::TSC_AUX, 1 << 32, None),
        (msr::TSC_AUX, 7, Some(7)),
        (msr::TSC_DEADLINE, 0, Some(0)),
        (msr::APIC_BASE, 0xfee0_0d00, Some(0xfee0_0d00)),
        (msr::SPEC_CTRL, 0, None),
        (0x1234_5678, 0, None),
        (0xc001_0015, 0, Some(1 << 24)),
    ] {
        let mut m = Machine::long(0);
        let (low, high) = (value as u32, (value >> 32) as u32);
        m.code(64, CODE, |a| {
            a.mov(ecx, number)?;
            a.mov(eax, low)?;
            a.mov(edx, high)?;
            a.wrmsr()?;
            a.rdmsr()?;
            a.done()
        });
        let case = format!("MSR {number:#x} = {value:#x}");
        match (m.run(), result) {
            (End::Done, Some(result)) => {
                let read = m.state.gpr[2] << 32 | m.state.gpr[0];
                assert_eq!(read, result, "{case}");
            }
            (End::Handler(GP, stack), None) => assert_eq!(stack[..2], [0, CODE + 15], "{case}"),
            (other, _) => panic!("{case}: {other:x?}"),
        }
    }
}

#[test]
fn the_time_stamp_counter() {
    let mut m = Machine::long(3);
    m.state.tsc_base = 1000;
    m.state.msrs.tsc_aux = 0x42;
    m.clock_forward(5_000);
    m.code(64, CODE, |a| {
        a.rdtscp()?;
        a.mov(r8d, eax)?;
        a.rdpid(r9)?;
        a.end()
    });
    m.expect(END);
    // 1 GHz: a cycle is a nanosecond.
    assert_eq!(m.state.gpr[8], 6_000);
    assert_eq!((m.state.gpr[1], m.state.gpr[9]), (0x42, 0x42));
    let mut m = Machine::long(3);
    m.state.cr4 |= cr4::TSD;
    m.code(64, CODE, |a| a.rdtsc());
    m.expect_fault(GP, 0, CODE);
}

#[test]
fn the_kvm_clock_is_the_time_stamp_counter() {
    let mut m = Machine::long(0);
    m.state.tsc_base = 0x1_0000_0007;
    m.clock_forward(77);
    m.code(64, CODE, |a| {
        a.xor(edx, edx)?;
        for (number, value) in [
            (msr::KVM_SYSTEM_TIME_NEW, DATA as u32 | 1),
            (msr::KVM_WALL_CLOCK_NEW, DATA as u32 + 0x100),
        ] {
            a.mov(ecx, number)?;
            a.mov(eax, value)?;
            a.wrmsr()?;
        }
        a.rdtsc()?;
        a.done()
    });
    m.expect_done();
    let tsc = m.state.gpr[2] << 32 | m.state.gpr[0];
    assert_eq!(m.get32(DATA) & 1, 0, "the version is even");
    let delta = tsc - m.get64(DATA + 8);
    let shift = (m.get32(DATA + 28) as u8) as i8;
    let shifted = if shift < 0 {
        delta >> -shift
    } else {
        delta << shift
    };
    let ns = m.get64(DATA + 16) + ((shifted * u64::from(m.get32(DATA + 24))) >> 32);
    assert!((76..=77).contains(&ns), "{ns}");
    assert_eq!(m.get32(DATA + 28) >> 8 & 1, 1, "stable");
    assert_eq!(m.get32(DATA + 0x104), 1_700_000_000);
}

#[test]
fn xcr0_is_checked() {
    for (value, fine) in [
        (1, true),
        (3, true),
        (7, true),
        (0, false),
        (5, false),
        (1 << 9, false),
    ] {
        let mut m = Machine::long(0);
        m.state.cr4 |= cr4::OSXSAVE;
        m.state.gpr[0] = value;
        m.code(64, CODE, |a| {
            a.xsetbv()?;
            a.xgetbv()?;
            a.done()
        });
        if fine {
            m.expect_done();
            assert_eq!((m.state.gpr[0], m.state.xcr0), (value, value));
        } else {
            m.expect_fault(GP, 0, CODE);
        }
    }
    let mut m = Machine::long(0);
    m.code(64, CODE, |a| a.xgetbv());
    assert_eq!(m.expect(UD)[0], CODE);
}

#[test]
fn umip_hides_the_tables_from_ring_3() {
    for code in [
        &[0x0f, 0x01, 0x00][..], // sgdt [rax]
        &[0x0f, 0x01, 0x08],     // sidt [rax]
        &[0x0f, 0x00, 0xc0],     // sldt eax
        &[0x0f, 0x00, 0xc8],     // str eax
        &[0x0f, 0x01, 0xe0],     // smsw eax
    ] {
        let mut m = Machine::long(3);
        m.state.cr4 |= cr4::UMIP;
        m.state.gpr[0] = DATA;
        m.memory.write(CODE, code).unwrap();
        m.expect_fault(GP, 0, CODE);
    }
    let mut m = Machine::long(0);
    m.state.cr4 |= cr4::UMIP;
    m.code(64, CODE, |a| {
        a.sidt(ptr(DATA))?;
        a.str(eax)?;
        a.smsw(rcx)?;
        a.done()
    });
    m.expect_done();
    assert_eq!(m.get64(DATA), IDT << 16 | 0xfff);
    assert_eq!(
        (m.state.gpr[0], m.state.gpr[1]),
        (sel::TSS.into(), m.state.cr0)
    );
}

#[test]
fn debug_registers() {
    let mut m = Machine::long(0);
    m.state.dr7 = 0x2400; // general detect
    m.code(64, CODE, |a| a.mov(rax, dr0));
    let stack = m.expect(1);
    assert_eq!(stack[0], CODE, "a fault");
    assert_eq!(m.state.dr6 & 0x2000, 0x2000);
    assert_eq!(m.state.dr7 & 0x2000, 0, "cleared for the handler");

    let mut m = Machine::long(0);
    m.code(64, CODE, |a| {
        a.mov(rax, 0xffff_ffff_u64)?;
        a.mov(dr6, rax)?;
        a.mov(rcx, dr4)?;
        a.mov(dr3, rcx)?;
        a.mov(rdx, dr3)?;
        a.done()
    });
    m.expect_done();
    assert_eq!((m.state.gpr[1], m.state.gpr[2]), (0xffff_efff, 0xffff_efff));

    let mut m = Machine::long(0);
    m.state.cr4 |= cr4::DE;
    m.code(64, CODE, |a| a.mov(rcx, dr4));
    assert_eq!(m.expect(UD)[0], CODE);
}

#[test]
fn an_interrupt_stack_in_device_memory() {
    // Every push leaves the engine and the delivery begins anew: each value is written once, and nothing changes
    // before the last.
    let mut m = Machine::long(3);
    let top = 0x18_0108;
    m.u64(TSS + 4, top);
    m.u64(IDT + 16 * 13, gate(sel::CODE64, CODE2 as u32, 0x8e, 0));
    m.memory.write(CODE, &[0xf4]).unwrap();
    m.code(64, CODE2, |a| a.done());
    m.expect_done();
    let values = [
        sel::DATA3.into(),
        STACK,
        0x1_0002,
        sel::CODE64_3.into(),
        CODE,
        0,
    ];
    let expected: Vec<_> = (1..)
        .zip(values)
        .map(|(i, v)| (0x18_0100 - 8 * i, v))
        .collect();
    assert_eq!(m.device_writes, expected);
    assert_eq!(m.state.gpr[4], 0x18_0100 - 48);
}
