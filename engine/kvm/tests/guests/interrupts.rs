//! Interrupts: messages, the 8259's line, the APIC timer, start-up of another vCPU.

use std::thread;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use lodger_vcpu::{Entry, Exit};

use crate::harness::{Guest, HANDLER, assemble, long_mode_state, watch};

const APIC: u64 = 0xfee0_0000;

/// Enables the APIC by software.
fn enable_apic(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rbx, APIC)?;
    a.mov(dword_ptr(rbx + 0xf0), 0x1ff)
}

/// Tells that it is ready, then halts with interrupts on, again and again.
fn wait_for_interrupts(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(eax, 1)?;
    a.out(0x80, eax)?;
    a.set_label(&mut again)?;
    a.sti()?;
    a.hlt()?;
    a.jmp(again)
}

/// A handler that tells `value`, ends the interrupt at the APIC if asked to, and returns.
fn handler(g: &Guest, vector: u8, value: u32, eoi: bool) {
    let address = HANDLER + u64::from(vector) * 64;
    let code = assemble(64, address, |a| {
        a.push(rax)?;
        a.push(rbx)?;
        a.mov(eax, value)?;
        a.out(0x81, eax)?;
        if eoi {
            a.mov(rbx, APIC)?;
            a.mov(dword_ptr(rbx + 0xb0), 0)?;
        }
        a.pop(rbx)?;
        a.pop(rax)?;
        a.iretq()
    });
    g.memory.write(address, &code).unwrap();
    g.set_gate(vector, address);
}

/// The machine's side of a wait: resumes a guest that must not do anything until `poke` was done from another thread.
fn while_halted(g: &mut Guest, entry: Entry, poke: impl FnOnce() + Send) -> Exit {
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(std::time::Duration::from_millis(5));
            poke();
        });
        g.vcpu.run(entry).unwrap()
    })
}

#[test]
fn a_message_wakes_a_halted_vcpu() {
    let guest = Guest::long_mode(|a| {
        enable_apic(a)?;
        wait_for_interrupts(a)
    });
    let Some(mut g) = guest else { return };
    handler(&g, 0x41, 0x41, true);
    handler(&g, 0x52, 0x52, true);
    g.expect_out(Entry::Resume, 0x80, 1);
    let vm = g.vm.clone();
    let exit = while_halted(&mut g, Entry::Written, || vm.send_msi(APIC, 0x41));
    assert_eq!(
        exit,
        Exit::PortWrite {
            port: 0x81,
            size: 4,
            value: 0x41
        }
    );
    // Both are pending: the higher vector comes first.
    g.vm.send_msi(APIC, 0x41);
    g.vm.send_msi(APIC, 0x52);
    g.expect_out(Entry::Written, 0x81, 0x52);
    g.expect_out(Entry::Written, 0x81, 0x41);
}

#[test]
fn malformed_messages_are_dropped() {
    let Some(g) = Guest::long_mode(|a| a.hlt()) else {
        return;
    };
    for address in [0, APIC, 0xffff_ffff_ffff_ffff, 0xfeef_f00c] {
        for data in [0, 0xffff_ffff, 0x8000, 0x0f, 0x341] {
            g.vm.send_msi(address, data);
        }
    }
}

#[test]
fn the_end_of_a_level_triggered_interrupt_is_reported() {
    let guest = Guest::long_mode(|a| {
        enable_apic(a)?;
        wait_for_interrupts(a)
    });
    let Some(mut g) = guest else { return };
    handler(&g, 0x41, 0x41, true);
    handler(&g, 0x51, 0x51, true);
    g.expect_out(Entry::Resume, 0x80, 1);
    let told = |value| Exit::PortWrite {
        port: 0x81,
        size: 4,
        value,
    };
    let vm = g.vm.clone();
    for (data, expected) in [
        (0xc041, vec![told(0x41), Exit::Eoi(0x41)]),
        (0x51, vec![told(0x51)]),
        (0x8041, vec![told(0x41), Exit::Eoi(0x41)]),
    ] {
        let mut exits = vec![while_halted(&mut g, Entry::Written, || {
            vm.send_msi(APIC, data);
        })];
        while exits.len() < expected.len() {
            exits.push(g.vcpu.run(Entry::Written).unwrap());
        }
        // A KVM that emulates may end an interrupt as early as it delivers it.
        if matches!(exits[0], Exit::Eoi(_)) {
            exits.reverse();
        }
        assert_eq!(exits, expected, "{data:#x}");
    }
}

#[test]
fn the_8259_interrupts_when_the_vcpu_takes_it() {
    let guest = Guest::long_mode(|a| {
        enable_apic(a)?;
        a.mov(dword_ptr(rbx + 0x350), 0x700)?; // LINT0: ExtINT
        wait_for_interrupts(a)
    });
    let Some(mut g) = guest else { return };
    handler(&g, 0x30, 0x30, false);
    // While interrupts are off nothing happens.
    g.vm.set_intr(true);
    g.expect_out(Entry::Resume, 0x80, 1);
    g.expect(Entry::Written, Exit::InterruptAcknowledge);
    g.vm.set_intr(false);
    g.expect_out(Entry::Interrupt(Some(0x30)), 0x81, 0x30);
    // While it is halted.
    let vm = g.vm.clone();
    let exit = while_halted(&mut g, Entry::Written, || vm.set_intr(true));
    assert_eq!(exit, Exit::InterruptAcknowledge);
    // The controller withdraws, and asks again later.
    g.vm.set_intr(false);
    let exit = while_halted(&mut g, Entry::Interrupt(None), || vm.set_intr(true));
    assert_eq!(exit, Exit::InterruptAcknowledge);
    g.vm.set_intr(false);
    g.expect_out(Entry::Interrupt(Some(0x30)), 0x81, 0x30);
}

#[test]
fn the_8259_is_not_heard_when_lint0_is_masked() {
    let guest = Guest::long_mode(|a| {
        enable_apic(a)?;
        a.mov(dword_ptr(rbx + 0x350), 0x1_0700)?;
        wait_for_interrupts(a)
    });
    let Some(mut g) = guest else { return };
    g.expect_out(Entry::Resume, 0x80, 1);
    g.vm.set_intr(true);
    let kicker = g.vcpu.kicker();
    let exit = while_halted(&mut g, Entry::Written, || kicker.kick());
    assert_eq!(exit, Exit::Kicked);
}

#[test]
fn a_kick_after_the_acknowledge_leaves_a_state_with_the_interrupt_delivered() {
    let guest = Guest::long_mode(|a| {
        enable_apic(a)?;
        a.mov(dword_ptr(rbx + 0x350), 0x700)?;
        wait_for_interrupts(a)
    });
    let Some(mut g) = guest else { return };
    handler(&g, 0x30, 0x30, false);
    g.expect_out(Entry::Resume, 0x80, 1);
    let vm = g.vm.clone();
    let exit = while_halted(&mut g, Entry::Written, || vm.set_intr(true));
    assert_eq!(exit, Exit::InterruptAcknowledge);
    g.vm.set_intr(false);
    g.vcpu.kicker().kick();
    // Either the handler's output comes first, or the kick with the handler entered; the interrupt is in neither case lost.
    let mut entry = Entry::Interrupt(Some(0x30));
    let mut told = false;
    for _ in 0..2 {
        match g.vcpu.run(entry).unwrap() {
            Exit::PortWrite {
                port: 0x81,
                value: 0x30,
                ..
            } => {
                told = true;
                entry = Entry::Written;
            }
            Exit::Kicked => {
                let state = g.vcpu.store().unwrap();
                g.vcpu.load(&state).unwrap();
                entry = Entry::Resume;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(told);
}

#[test]
fn the_apic_timer_interrupts() {
    for (entry, divide) in [(0x45, 0xb), (0x2_0045, 0x3)] {
        let guest = Guest::long_mode(|a| {
            enable_apic(a)?;
            a.mov(dword_ptr(rbx + 0x3e0), divide)?;
            a.mov(dword_ptr(rbx + 0x320), entry)?;
            a.mov(dword_ptr(rbx + 0x380), 100_000)?;
            wait_for_interrupts(a)
        });
        let Some(mut g) = guest else { return };
        handler(&g, 0x45, 0x45, true);
        g.expect_out(Entry::Resume, 0x80, 1);
        g.expect_out(Entry::Written, 0x81, 0x45);
        if entry & 0x2_0000 != 0 {
            g.expect_out(Entry::Written, 0x81, 0x45);
        }
    }
}

#[test]
fn another_vcpu_is_started_by_init_and_start_up() {
    let Some(mut g) = Guest::empty(2) else { return };
    // vCPU 1 starts in real mode at the page that the vector names.
    let page = 0x1_8000;
    let code = assemble(16, 0, |a| {
        a.mov(ax, cs)?;
        a.movzx(eax, ax)?;
        a.out(0x82, eax)?;
        a.hlt()
    });
    g.memory.write(page, &code).unwrap();
    g.prepare_long_mode(|a| {
        enable_apic(a)?;
        a.mov(dword_ptr(rbx + 0x310), 1 << 24)?;
        a.mov(dword_ptr(rbx + 0x300), 0x4500)?;
        a.mov(dword_ptr(rbx + 0x300), 0x4618)?;
        a.mov(eax, 2)?;
        a.out(0x80, eax)?;
        a.hlt()
    });
    g.vcpu.load(&long_mode_state()).unwrap();
    let mut second = g.vm.create_vcpu(1).unwrap();
    let _watchdog = watch(second.as_ref());
    let other = thread::spawn(move || second.run(Entry::Resume).unwrap());
    g.expect_out(Entry::Resume, 0x80, 2);
    let started = other.join().unwrap();
    let value = (page >> 4) as u32;
    assert_eq!(
        started,
        Exit::PortWrite {
            port: 0x82,
            size: 4,
            value
        }
    );
}
