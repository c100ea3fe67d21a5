//! Every covered instruction, with random operands, against the host processor itself.

// UNSAFETY: generated machine code is called, on both sides of the comparison.
#![allow(unsafe_code)]

mod direct;
mod inputs;

use direct::{Direct, End, Machine, OPERAND};
use iced_x86::{Code, Decoder, DecoderOptions, Encoder, Instruction};
use inputs::Random;
use lodger_native::{Class, MemUse, Native, NativeState, Outcome, StubCache};

/// The instruction as a guest's bytes decode.
fn through_bytes(instruction: &Instruction) -> Option<Instruction> {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, 0).ok()?;
    let bytes = encoder.take_buffer();
    let decoded = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
    (decoded.code() == instruction.code()).then_some(decoded)
}

fn state_of(machine: &Machine, random: &mut Random) -> NativeState {
    let mut state = NativeState::new();
    state.ymm = machine.ymm;
    state.mxcsr = machine.mxcsr;
    state.set_x87(machine.fxsave[..160].try_into().unwrap());
    // What is left there from earlier instructions must not matter.
    random.fill(&mut state.staging);
    state.x87_ip = 0x1234_5678_9abc;
    state.x87_dp = 0x4321_8765_cba9;
    state
}

/// Executes as an interpreter would.
fn interpret(native: &Native, machine: &mut Machine, random: &mut Random) -> Outcome {
    let mut state = state_of(machine, random);
    if let MemUse::Read(size) = native.mem {
        state.staging[..size].copy_from_slice(&machine.memory[OPERAND..][..size]);
    }
    let mut flags = machine.flags as u32;
    // SAFETY: the cache lives on.
    let outcome = unsafe { native.exec(&mut state, &mut machine.gprs, &mut flags) };
    if let (MemUse::Write(size), Outcome::Done) = (native.mem, outcome) {
        machine.memory[OPERAND..][..size].copy_from_slice(&state.staging[..size]);
    }
    machine.flags = u64::from(flags);
    machine.ymm = state.ymm;
    machine.mxcsr = state.mxcsr;
    let image = state.x87();
    machine.fxsave[..24].copy_from_slice(&image[..24]);
    machine.fxsave[32..160].copy_from_slice(&image[32..160]);
    outcome
}

/// What differs between two machines, in words.
fn difference(got: &Machine, wanted: &Machine) -> String {
    let mut text = String::new();
    let mut check = |name: String, got: &[u8], wanted: &[u8]| {
        if got != wanted {
            text += &format!("\n  {name}: {got:02x?}, the processor: {wanted:02x?}");
        }
    };
    for n in 0..16 {
        check(
            format!("gpr {n}"),
            &got.gprs[n].to_be_bytes(),
            &wanted.gprs[n].to_be_bytes(),
        );
        check(format!("ymm{n}"), &got.ymm[n], &wanted.ymm[n]);
    }
    for n in 0..8 {
        let at = 32 + 16 * n;
        check(
            format!("st{n}"),
            &got.fxsave[at..at + 10],
            &wanted.fxsave[at..at + 10],
        );
    }
    check(
        "flags".into(),
        &got.flags.to_be_bytes(),
        &wanted.flags.to_be_bytes(),
    );
    check(
        "mxcsr".into(),
        &got.mxcsr.to_be_bytes(),
        &wanted.mxcsr.to_be_bytes(),
    );
    check(
        "fcw, fsw, ftw".into(),
        &got.fxsave[..6],
        &wanted.fxsave[..6],
    );
    check(
        "fop, fip, fdp".into(),
        &got.fxsave[6..24],
        &wanted.fxsave[6..24],
    );
    check("memory".into(), &got.memory, &wanted.memory);
    text
}

fn x87_pending(machine: &Machine) -> bool {
    machine.fxsave[2] & !machine.fxsave[0] & 0x3f != 0
}

/// Calls `test` with random instances of every covered form: the instruction, and whether it has a memory operand.
fn each_form(
    random: &mut Random,
    instances: usize,
    mut test: impl FnMut(&mut Random, Code, Instruction),
) -> usize {
    let mut forms = 0;
    for code in Code::values() {
        for memory in [false, true] {
            let mut found = false;
            for _ in 0..instances {
                let Some(built) = random.instruction(code, memory) else {
                    break;
                };
                let Some(decoded) = through_bytes(&built) else {
                    continue;
                };
                found = true;
                test(random, code, decoded);
            }
            forms += usize::from(found);
        }
    }
    forms
}

#[test]
fn every_form_does_what_the_processor_does() {
    let mut random = Random::new(0x10d6e5);
    let mut direct = Direct::new();
    let mut cache = StubCache::new().unwrap();
    let mut covered = std::collections::BTreeSet::new();
    each_form(&mut random, 6, |random, code, instruction| {
        let Some(native) = cache.prepare(&instruction).unwrap() else {
            return;
        };
        covered.insert(code);
        let prepared = direct.prepare(&instruction, OPERAND);
        for _ in 0..24 {
            let before = random.machine();
            let mut got = before.clone();
            let outcome = interpret(&native, &mut got, random);
            let mut wanted = before.clone();
            if native.waits_x87 && x87_pending(&before) {
                assert_eq!(outcome, Outcome::X87Exception, "{instruction}");
                assert_eq!(difference(&got, &before), "", "{instruction}");
                continue;
            }
            let end = direct.run(&prepared, &mut wanted);
            let stored = outcome == Outcome::Done
                || matches!((outcome, native.class), (Outcome::NotStored, Class::X87));
            assert_eq!((stored, end), (true, End::Done), "{code:?} {instruction}");
            if native.class == Class::X87 && got.fxsave[8..16] == 0x1234_5678_9abcu64.to_le_bytes()
            {
                wanted.fxsave[6..24].copy_from_slice(&got.fxsave[6..24]);
            }
            assert_eq!(difference(&got, &wanted), "", "{code:?} {instruction}");
        }
    });
    println!("{} codes", covered.len());
    assert!(covered.len() > 1, "{}", covered.len());
}
