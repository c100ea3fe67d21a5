//! The vCPU's state in and out.

use iced_x86::code_asm::*;
use lodger_vcpu::{EngineError, Entry, Exit};
use lodger_x86::bits::cr4;
use lodger_x86::lapic_state::lvt;
use lodger_x86::{Activity, CpuState, Element};

use crate::harness::{Guest, long_mode_state, real_mode_state, signature};

/// The elements in which two states differ, less those where host time flows in.
fn differences(a: &CpuState, b: &CpuState) -> Vec<Element> {
    let mut differences = a.differences(b);
    differences.retain(|e| e.comparable());
    differences
}

fn busy_state() -> CpuState {
    let mut s = long_mode_state();
    for (i, gpr) in s.gpr.iter_mut().enumerate() {
        *gpr = 0x0123_4567_89ab_cdef_u64.rotate_left(i as u32 * 5);
    }
    s.rflags = 0xcd7;
    s.cr2 = 0x1_2345_6789;
    s.dr = [0x1000, 0x2000, 0x3000, 0x4000];
    s.dr6 = 0xffff_0ff1;
    s.msrs.star = 0x23_0010_0000_0000;
    s.msrs.lstar = 0xffff_ffff_8000_1000;
    s.msrs.sfmask = 0x4_7700;
    s.msrs.kernel_gs_base = 0xffff_8880_0000_0000;
    s.msrs.sysenter_eip = 0xffff_ffff_8000_2000;
    s.segments[4].base = 0x7fff_0000_1000;
    s.segments[5].base = 0xffff_8880_1234_0000;
    s.fpu.fcw = 0x27f;
    s.fpu.mxcsr = 0x1fa0;
    s.fpu.ftw = 0x80;
    s.fpu.st[0][..10].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 0x88, 0xff, 0x3f]);
    s.fpu.ymm[3][..16].fill(0x5a);
    s.lapic.svr = 0x1ff;
    s.lapic.tpr = 0x20;
    s.lapic.irr[2] = 2;
    s.lapic.lvt[lvt::LINT0] = 0x700;
    s
}

#[test]
fn a_loaded_state_is_stored_as_it_was() {
    let Some(mut g) = Guest::empty(1) else { return };
    let halted = {
        let mut s = busy_state();
        (s.activity, s.nmi_blocked) = (Activity::Halted, true);
        s
    };
    let shadowed = {
        let mut s = busy_state();
        s.interrupt_shadow = true;
        s
    };
    let mut waiting = real_mode_state();
    waiting.activity = Activity::WaitForSipi;
    for (name, state) in [
        ("reset", CpuState::reset(0, signature())),
        ("real mode", real_mode_state()),
        ("long mode", busy_state()),
        ("halted", halted),
        ("in a shadow", shadowed),
        ("waiting", waiting),
    ] {
        g.vcpu.load(&state).unwrap();
        let stored = g.vcpu.store().unwrap();
        assert_eq!(differences(&state, &stored), [], "{name}: {stored:#x?}");
        let (old, new) = (&state.lapic, &stored.lapic);
        assert_eq!(
            (old.base, old.svr, old.tpr, old.irr, old.lvt),
            (new.base, new.svr, new.tpr, new.irr, new.lvt),
            "{name}"
        );
    }
}

#[test]
fn a_guest_goes_on_in_another_vm_where_it_stopped() {
    let program = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(eax, 1)?;
        a.set_label(&mut again)?;
        a.out(0x80, eax)?;
        a.add(eax, eax)?;
        a.jmp(again)
    };
    let (Some(mut first), Some(mut second)) =
        (Guest::long_mode(program), Guest::long_mode(program))
    else {
        return;
    };
    first.expect_out(Entry::Resume, 0x80, 1);
    first.expect_out(Entry::Written, 0x80, 2);
    first.vcpu.kicker().kick();
    first.expect(Entry::Written, Exit::Kicked);
    let state = first.vcpu.store().unwrap();
    second.vcpu.load(&state).unwrap();
    second.expect_out(Entry::Resume, 0x80, 4);
}

#[test]
fn guest_code_changes_what_is_stored() {
    let guest = Guest::long_mode(|a| {
        a.mov(rax, 0x1122_3344_5566_7788_u64)?;
        a.mov(r15, rax)?;
        a.stc()?;
        a.mov(rcx, cr4)?;
        a.out(0x80, al)?;
        a.cli()?;
        a.hlt()
    });
    let Some(mut g) = guest else { return };
    g.expect(
        Entry::Resume,
        Exit::PortWrite {
            port: 0x80,
            size: 1,
            value: 0x88,
        },
    );
    g.vcpu.kicker().kick();
    g.expect(Entry::Written, Exit::Kicked);
    let s = g.vcpu.store().unwrap();
    assert_eq!(
        (s.gpr[0], s.gpr[15]),
        (0x1122_3344_5566_7788, 0x1122_3344_5566_7788)
    );
    assert_eq!(s.gpr[1] & cr4::PAE, cr4::PAE);
    assert_eq!(s.rflags & 1, 1);
}

#[test]
fn impossible_states_are_refused() {
    let Some(mut g) = Guest::empty(1) else { return };
    for (name, spoil) in [
        ("XCR0", (|s| s.xcr0 = 0x2_0000_0001) as fn(&mut CpuState)),
        ("reserved CR4 bit", |s| s.cr4 |= 1 << 30),
        ("paging without protection", |s| s.cr0 &= !1),
    ] {
        let mut state = long_mode_state();
        spoil(&mut state);
        let result = g.vcpu.load(&state);
        assert!(
            matches!(result, Err(EngineError::State(_))),
            "{name}: {result:?}"
        );
    }
    g.vcpu.load(&long_mode_state()).unwrap();
}
