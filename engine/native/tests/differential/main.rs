//! Every covered instruction, with random operands, against the host processor itself.

// UNSAFETY: generated machine code is called, on both sides of the comparison.
#![allow(unsafe_code)]

mod direct;
mod inputs;
mod masked;

use direct::{Direct, End, Machine, OPERAND};
use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, Encoder, Instruction, Mnemonic};
use inputs::Random;
use lodger_native::{Class, Masked, Native, NativeState, Outcome, StubCache, supported};

/// Where the x87 instructions of these tests are said to be.
const X87_IP: u64 = 0x1234_5678_9abc;

/// The instruction as a guest's bytes decode.
fn through_bytes(instruction: &Instruction) -> Option<Instruction> {
    through_bytes_in(64, instruction)
}

/// The instruction, encoded for 64-bit mode, as its bytes decode in a mode.
fn through_bytes_in(bitness: u32, instruction: &Instruction) -> Option<Instruction> {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, 0).ok()?;
    let bytes = encoder.take_buffer();
    let decoded = Decoder::with_ip(bitness, &bytes, 0, DecoderOptions::NONE).decode();
    (decoded.code() == instruction.code()).then_some(decoded)
}

fn state_of(machine: &Machine, random: &mut Random) -> NativeState {
    let mut state = NativeState::new();
    state.ymm = machine.ymm;
    state.mxcsr = machine.mxcsr;
    state.set_x87(machine.fxsave[..160].try_into().unwrap());
    // What is left there from earlier instructions must not matter.
    random.fill(&mut state.staging);
    state.x87_ip = X87_IP;
    state.x87_dp = 0x4321_8765_cba9;
    state
}

/// Executes as an interpreter would.
fn interpret(native: &Native, machine: &mut Machine, random: &mut Random) -> Outcome {
    let mut state = state_of(machine, random);
    let read = native.mem.read();
    state.staging[..read].copy_from_slice(&machine.memory[OPERAND..][..read]);
    let mut flags = machine.flags as u32;
    // SAFETY: the cache lives on.
    let outcome = unsafe { native.exec(&mut state, &mut machine.gprs, &mut flags) };
    if outcome == Outcome::Done {
        let written = native.mem.write();
        machine.memory[OPERAND..][..written].copy_from_slice(&state.staging[..written]);
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

/// Calls `test` with random instances of every form.
fn each_form(
    random: &mut Random,
    instances: usize,
    mut test: impl FnMut(&mut Random, Instruction),
) {
    for code in Code::values() {
        for memory in [false, true] {
            for _ in 0..instances {
                let Some(built) = random.instruction(code, memory) else {
                    break;
                };
                if let Some(decoded) = through_bytes(&built) {
                    test(random, decoded);
                }
            }
        }
    }
}

/// The mnemonics of covered features that neither `prepare` nor `Masked` runs: the interpreter's own.
const NOT_NATIVE: [Mnemonic; 15] = [
    Mnemonic::Ldmxcsr,
    Mnemonic::Stmxcsr,
    Mnemonic::Vldmxcsr,
    Mnemonic::Vstmxcsr,
    Mnemonic::Lfence,
    Mnemonic::Mfence,
    Mnemonic::Sfence,
    // FWAIT and a non-waiting instruction: decoded as two.
    Mnemonic::Fstenv,
    Mnemonic::Fstcw,
    Mnemonic::Fstsw,
    Mnemonic::Fsave,
    Mnemonic::Fclex,
    Mnemonic::Finit,
    Mnemonic::Feni,
    Mnemonic::Fdisi,
];

#[test]
fn every_instruction_of_the_features_is_covered() {
    let mut random = Random::new(1);
    let mut cache = StubCache::new().unwrap();
    let mut forms = 0;
    let fstsw = |code: Code| code.op_code().fwait();
    for code in Code::values().filter(|code| code.op_code().mode64() && !fstsw(*code)) {
        let features = code.cpuid_features();
        let implied = [
            Code::Maskmovq_rDI_mm_mm,
            Code::Maskmovdqu_rDI_xmm_xmm,
            Code::VEX_Vmaskmovdqu_rDI_xmm_xmm,
        ];
        if features == [CpuidFeature::CMOV]
            || features.is_empty()
            || !features.iter().all(|feature| supported(*feature))
            || NOT_NATIVE.contains(&code.mnemonic())
            || implied.contains(&code)
        {
            continue;
        }
        for memory in [false, true] {
            let Some(instruction) = (0..50)
                .filter_map(|_| random.instruction(code, memory))
                .find_map(|built| through_bytes(&built))
            else {
                continue;
            };
            let native = cache.prepare(&instruction).unwrap();
            let masked = Masked::decode(&instruction);
            assert!(
                native.is_some() ^ masked.is_some(),
                "{code:?} {instruction}"
            );
            forms += 1;
        }
    }
    // An unusually poor host has SSE4.2 only.
    assert!(forms > 700, "{forms} forms");
}

#[test]
fn every_form_does_what_the_processor_does() {
    let mut random = Random::new(0x10d6e5);
    let mut direct = Direct::new();
    let mut cache = StubCache::new().unwrap();
    each_form(&mut random, 6, |random, instruction| {
        let Some(native) = cache.prepare(&instruction).unwrap() else {
            return;
        };
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
            let completed = match native.class {
                Class::X87 => matches!(outcome, Outcome::Done | Outcome::NotStored),
                _ => outcome == Outcome::Done,
            };
            assert_eq!((completed, end), (true, End::Done), "{instruction}");
            if native.class == Class::X87 && got.fxsave[8..16] == X87_IP.to_le_bytes() {
                // The direct run's pointers are host addresses; those of the other are tested apart.
                wanted.fxsave[6..24].copy_from_slice(&got.fxsave[6..24]);
            }
            assert_eq!(difference(&got, &wanted), "", "{instruction}");
        }
    });
}

#[test]
fn stubs_are_the_same_in_32_bit_mode() {
    let mut random = Random::new(32);
    let mut cache = StubCache::with_capacity(16 << 20).unwrap();
    let mut same = 0;
    each_form(&mut random, 20, |_, instruction| {
        let Some(native) = cache.prepare(&instruction).unwrap() else {
            return;
        };
        let Some(other) = through_bytes_in(32, &instruction) else {
            return;
        };
        // Registers above 7 do not exist there: their prefix is another instruction, and these two clear fewer.
        let clears = matches!(
            instruction.mnemonic(),
            Mnemonic::Vzeroupper | Mnemonic::Vzeroall
        );
        let operands = |i: &Instruction| {
            (0..i.op_count())
                .map(|n| i.op_register(n))
                .collect::<Vec<_>>()
        };
        if clears || operands(&instruction) != operands(&other) {
            return;
        }
        let other = cache.prepare(&other).unwrap();
        assert_eq!(
            format!("{other:?}"),
            format!("{:?}", Some(native)),
            "{instruction}"
        );
        same += 1;
    });
    assert!(same > 1000, "{same}");
}

#[test]
fn unmasked_simd_exceptions_are_those_of_the_processor() {
    const INEXACT: u32 = 0x20;
    const UNDERFLOW: u32 = 0x10;
    const OVERFLOW: u32 = 0x08;
    let mut random = Random::new(0x5eed);
    let mut direct = Direct::new();
    let mut cache = StubCache::new().unwrap();
    let (mut done, mut raised) = (0, 0);
    each_form(&mut random, 4, |random, instruction| {
        let Some(native) = cache.prepare(&instruction).unwrap() else {
            return;
        };
        if !native.raises_simd_fp {
            return;
        }
        let prepared = direct.prepare(&instruction, OPERAND);
        for _ in 0..40 {
            let mut before = random.machine();
            before.mxcsr = random.next() as u32 & 0xffff;
            before.fxsave[2] = 0;
            let mut got = before.clone();
            let outcome = interpret(&native, &mut got, random);
            let mut wanted = before.clone();
            match direct.run(&prepared, &mut wanted) {
                End::Done => {
                    assert_eq!(outcome, Outcome::Done, "{instruction}");
                    done += 1;
                }
                End::Fault { signal, mxcsr } => {
                    assert_eq!(signal, libc::SIGFPE, "{instruction}");
                    // The documented deviations. An exact denormal half-precision result is not noticed ...
                    let to_half = instruction.mnemonic() == Mnemonic::Vcvtps2ph;
                    let unmasked = mxcsr & !before.mxcsr >> 7;
                    if to_half && unmasked & UNDERFLOW != 0 && outcome == Outcome::Done {
                        continue;
                    }
                    assert_eq!(outcome, Outcome::SimdException, "{instruction}");
                    wanted = before.clone();
                    wanted.mxcsr = mxcsr;
                    if to_half {
                        wanted.mxcsr = wanted.mxcsr & !UNDERFLOW | got.mxcsr & UNDERFLOW;
                    }
                    // ... inexactness is that of the masked result, and dot products do all their steps.
                    if unmasked & (UNDERFLOW | OVERFLOW) != 0 {
                        wanted.mxcsr = wanted.mxcsr & !INEXACT | got.mxcsr & INEXACT;
                    }
                    if is_dot_product(&instruction) {
                        wanted.mxcsr = got.mxcsr;
                    }
                    raised += 1;
                }
            }
            assert_eq!(
                difference(&got, &wanted),
                "",
                "{instruction} with MXCSR {:04x}",
                before.mxcsr
            );
        }
    });
    assert!(
        done > 1000 && raised > 1000,
        "{done} completed, {raised} exceptions"
    );
}

fn is_dot_product(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Dpps | M::Dppd | M::Vdpps | M::Vdppd
    )
}

#[test]
fn alignment_is_asked_for_where_the_processor_does() {
    let mut random = Random::new(0xa119);
    let mut direct = Direct::new();
    let mut cache = StubCache::new().unwrap();
    let mut aligned = 0;
    each_form(&mut random, 1, |random, instruction| {
        let Some(native) = cache.prepare(&instruction).unwrap() else {
            return;
        };
        let mut before = random.machine();
        before.fxsave[..3].copy_from_slice(&[0x7f, 3, 0]);
        for offset in [1, 16] {
            let prepared = direct.prepare(&instruction, OPERAND + offset);
            let faults = direct.run(&prepared, &mut before.clone()) != End::Done;
            let misaligned = native
                .align
                .is_some_and(|align| offset % usize::from(align) != 0);
            assert_eq!(misaligned, faults, "{instruction} at {offset}");
            aligned += usize::from(misaligned);
        }
    });
    assert!(aligned > 100, "{aligned}");
}
