//! Measures what one `Native::exec` costs (median of several rounds), and making and finding a stub.

// UNSAFETY: executing a stub is unsafe, its cache must be alive; here it is.
#![allow(unsafe_code)]

use iced_x86::{Decoder, DecoderOptions};
use lodger_native::{NativeState, StubCache};
use std::hint::black_box;
use std::time::Instant;

const CALLS: u32 = 200_000;

fn main() {
    let instructions: &[(&str, &[u8])] = &[
        ("prefetchnta [rcx]", &[0x0f, 0x18, 0x01]),
        ("popcnt rax, rbx", &[0xf3, 0x48, 0x0f, 0xb8, 0xc3]),
        ("movaps xmm0, xmm1", &[0x0f, 0x28, 0xc1]),
        ("pxor xmm0, [rcx]", &[0x66, 0x0f, 0xef, 0x01]),
        ("vpaddd ymm0, ymm1, ymm2", &[0xc5, 0xf5, 0xfe, 0xc2]),
        ("addsd xmm0, xmm1", &[0xf2, 0x0f, 0x58, 0xc1]),
        ("comisd xmm0, xmm1", &[0x66, 0x0f, 0x2f, 0xc1]),
        ("fadd st, st(1)", &[0xd8, 0xc1]),
        ("paddd mm0, mm1", &[0x0f, 0xfe, 0xc1]),
    ];
    let mut cache = StubCache::new().expect("executable memory");
    let mut state = NativeState::new();
    let (mut gprs, mut flags) = ([0; 16], 2);
    for (name, bytes) in instructions {
        let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        let native = cache
            .prepare(&instruction)
            .expect("room")
            .expect("a native instruction");
        let mut rounds: Vec<f64> = (0..9)
            .map(|_| {
                let start = Instant::now();
                for _ in 0..CALLS {
                    // SAFETY: the cache is alive and is not cleared.
                    let _ = black_box(unsafe {
                        black_box(&native).exec(&mut state, &mut gprs, &mut flags)
                    });
                }
                start.elapsed().as_nanos() as f64 / f64::from(CALLS)
            })
            .collect();
        rounds.sort_by(f64::total_cmp);
        println!("{name:24} {:6.1} ns", rounds[rounds.len() / 2]);
    }

    // pshufd xmm0,xmm1,immediate: a form each.
    let forms: Vec<_> = (0..=255)
        .map(|immediate| {
            Decoder::new(
                64,
                &[0x66, 0x0f, 0x70, 0xc1, immediate],
                DecoderOptions::NONE,
            )
            .decode()
        })
        .collect();
    for name in ["prepare, new form", "prepare, known form"] {
        let start = Instant::now();
        for instruction in &forms {
            black_box(cache.prepare(instruction)).expect("room");
        }
        println!(
            "{name:24} {:6.0} ns",
            start.elapsed().as_nanos() as f64 / 256.0
        );
    }
}
