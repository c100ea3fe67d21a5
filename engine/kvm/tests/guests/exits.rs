//! Why a vCPU stops, and how it goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use iced_x86::code_asm::*;
use lodger_vcpu::{EngineError, Entry, Exit};

use crate::harness::{DATA, Guest};

#[test]
fn ports_are_read_and_written_in_every_size() {
    let guest = Guest::real_mode(|a| {
        a.mov(dx, 0x3f8_u32)?;
        a.in_(al, dx)?;
        a.inc(al)?;
        a.out(dx, al)?;
        a.in_(ax, dx)?;
        a.inc(ax)?;
        a.out(0x80, ax)?;
        a.in_(eax, 0x81)?;
        a.inc(eax)?;
        a.out(dx, eax)?;
        a.hlt()
    });
    let Some(mut g) = guest else { return };
    let read = |port, size| Exit::PortRead { port, size };
    let write = |port, size, value| Exit::PortWrite { port, size, value };
    g.expect(Entry::Resume, read(0x3f8, 1));
    g.expect(Entry::Data(0x41), write(0x3f8, 1, 0x42));
    g.expect(Entry::Written, read(0x3f8, 2));
    g.expect(Entry::Data(0x1234), write(0x80, 2, 0x1235));
    g.expect(Entry::Written, read(0x81, 4));
    g.expect(Entry::Data(0x1234_5678), write(0x3f8, 4, 0x1234_5679));
}

#[test]
fn string_port_instructions_go_item_by_item() {
    let guest = Guest::real_mode(|a| {
        a.mov(dx, 0x100_u32)?;
        a.mov(si, 0x7000_u32)?;
        a.mov(di, 0x7000_u32)?;
        a.mov(cx, 3_u32)?;
        a.cld()?;
        a.rep().insb()?;
        a.mov(cx, 3_u32)?;
        a.rep().outsb()?;
        a.mov(eax, 0x77_u32)?;
        a.out(0xf4, eax)?;
        a.hlt()
    });
    let Some(mut g) = guest else { return };
    let mut entry = Entry::Resume;
    for value in [b'a', b'b', b'c'] {
        g.expect(
            entry,
            Exit::PortRead {
                port: 0x100,
                size: 1,
            },
        );
        entry = Entry::Data(value.into());
    }
    for value in [b'a', b'b', b'c'] {
        let value = value.into();
        g.expect(
            entry,
            Exit::PortWrite {
                port: 0x100,
                size: 1,
                value,
            },
        );
        entry = Entry::Written;
    }
    g.expect_out(entry, 0xf4, 0x77);
}

#[test]
fn memory_that_is_no_ram_is_read_and_written_in_every_size() {
    let base = 0xd000_0000_u64;
    let guest = Guest::long_mode(|a| {
        a.mov(rbx, base)?;
        a.mov(al, byte_ptr(rbx))?;
        a.mov(byte_ptr(rbx + 1), al)?;
        a.mov(ax, word_ptr(rbx + 2))?;
        a.mov(word_ptr(rbx + 4), ax)?;
        a.mov(eax, dword_ptr(rbx + 8))?;
        a.mov(dword_ptr(rbx + 0xc), eax)?;
        a.mov(rax, qword_ptr(rbx + 0x10))?;
        a.mov(qword_ptr(rbx + 0x18), rax)?;
        a.hlt()
    });
    let Some(mut g) = guest else { return };
    let mut entry = Entry::Resume;
    for (offset, to, size, value) in [
        (0, 1, 1, 0x81_u64),
        (2, 4, 2, 0x8182),
        (8, 0xc, 4, 0x8182_8384),
        (0x10, 0x18, 8, 0x8182_8384_8586_8788),
    ] {
        let address = base + offset;
        g.expect(entry, Exit::MmioRead { address, size });
        let address = base + to;
        g.expect(
            Entry::Data(value),
            Exit::MmioWrite {
                address,
                size,
                value,
            },
        );
        entry = Entry::Written;
    }
}

#[test]
fn a_kick_ends_halting_and_looping_and_is_never_lost() {
    for halting in [true, false] {
        let guest = Guest::real_mode(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            if halting {
                a.cli()?;
                a.hlt()?;
            }
            a.jmp(again)
        });
        let Some(mut g) = guest else { return };
        let kicker = g.vcpu.kicker();
        kicker.kick();
        g.expect(Entry::Resume, Exit::Kicked);
        for delay in [0, 1, 10, 100, 1_000, 20_000] {
            let kicker = Arc::clone(&kicker);
            let other = thread::spawn(move || {
                thread::sleep(Duration::from_micros(delay));
                kicker.kick();
            });
            g.expect(Entry::Resume, Exit::Kicked);
            other.join().unwrap();
        }
    }
}

#[test]
fn a_kick_during_io_loses_neither() {
    let guest = Guest::real_mode(|a| {
        let mut again = a.create_label();
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.out(0x80, eax)?;
        a.inc(eax)?;
        a.in_(al, 0x81)?;
        a.jmp(again)
    });
    let Some(mut g) = guest else { return };
    let stop = Arc::new(AtomicBool::new(false));
    let kicker = g.vcpu.kicker();
    let other = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                kicker.kick();
                thread::yield_now();
            }
        })
    };
    let mut entry = Entry::Resume;
    let (mut value, mut kicks) = (0_u32, 0);
    while value < 2_000 {
        entry = match g.vcpu.run(entry).unwrap() {
            Exit::PortWrite {
                port: 0x80,
                value: written,
                ..
            } => {
                assert_eq!(written, value);
                Entry::Written
            }
            Exit::PortRead { port: 0x81, .. } => {
                value += 1;
                Entry::Data(u64::from(value & 0xff))
            }
            Exit::Kicked => {
                kicks += 1;
                Entry::Resume
            }
            other => panic!("{other:?}"),
        };
    }
    stop.store(true, Ordering::Relaxed);
    other.join().unwrap();
    assert!(kicks > 0);
}

#[test]
fn a_kicker_outlives_its_vcpu() {
    let Some(g) = Guest::real_mode(|a| a.hlt()) else {
        return;
    };
    let kicker = g.vcpu.kicker();
    drop(g);
    kicker.kick();
}

#[test]
fn a_triple_fault_is_a_shutdown_and_stays_one() {
    let guest = Guest::long_mode(|a| a.ud2());
    let Some(mut g) = guest else { return };
    g.expect(Entry::Resume, Exit::Shutdown);
    g.expect(Entry::Resume, Exit::Shutdown);
}

#[test]
fn what_kvm_cannot_run_is_named() {
    let guest = Guest::long_mode(|a| {
        a.mov(rdi, DATA)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.lock().cmpxchg16b(ptr(rdi))?;
        a.mov(eax, 1)?;
        a.out(0xf4, eax)?;
        a.hlt()
    });
    let Some(mut g) = guest else { return };
    match g.vcpu.run(Entry::Resume) {
        Ok(Exit::PortWrite {
            port: 0xf4,
            value: 1,
            ..
        }) => {}
        Err(EngineError::Internal(text)) => {
            assert!(
                text.contains("cmpxchg16b") && text.contains("0x80"),
                "{text}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn cpuid_is_the_models() {
    let guest = Guest::long_mode(|a| {
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.mov(eax, ebx)?;
        a.out(0x80, eax)?;
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.out(0x80, eax)?;
        a.mov(eax, 0x4000_0000)?;
        a.cpuid()?;
        a.mov(eax, ebx)?;
        a.out(0x80, eax)?;
        a.hlt()
    });
    let Some(mut g) = guest else { return };
    g.expect_out(Entry::Resume, 0x80, 0x6874_7541);
    g.expect_out(Entry::Written, 0x80, crate::harness::signature());
    g.expect_out(Entry::Written, 0x80, 0x4b4d_564b);
}
