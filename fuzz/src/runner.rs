//! Makes inputs from numbers and runs a target on them for a bounded time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use crate::Target;

/// The longest input that is made from nothing.
const LONGEST: u64 = 600;

/// A target failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The target.
    pub target: &'static str,
    /// The number from which the input is made again.
    pub seed: u64,
    /// What the panic said.
    pub message: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Failure {
            target,
            seed,
            message,
        } = self;
        write!(
            f,
            "{message}\nreproduce with: cargo run -p lodger-fuzz -- {target} --seed {seed} --runs 1"
        )
    }
}

/// Pseudo-random numbers (xorshift64*).
pub struct Random(u64);

impl Random {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Random {
        // Neighbouring seeds must not give similar sequences, and the state must not be 0.
        let mixed = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Random((mixed ^ mixed >> 29) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.number() >> 16) % end
    }
}

/// The input number `seed` of a target with these samples.
pub fn input(samples: &[Vec<u8>], seed: u64) -> Vec<u8> {
    let mut r = Random::new(seed);
    if samples.is_empty() || r.below(8) == 0 {
        let len = r.below(LONGEST);
        return (0..len).map(|_| byte(&mut r)).collect();
    }
    let mut bytes = samples[r.below(samples.len() as u64) as usize].clone();
    for _ in 0..=r.below(8) {
        mutate(&mut bytes, &mut r);
    }
    bytes
}

/// Small numbers and those with few or nearly all bits are likelier to mean something.
fn byte(r: &mut Random) -> u8 {
    match r.below(8) {
        0..4 => r.below(8) as u8,
        4 => [0x7f, 0x80, 0xfe, 0xff][r.below(4) as usize],
        _ => r.number() as u8,
    }
}

fn mutate(bytes: &mut Vec<u8>, r: &mut Random) {
    if bytes.is_empty() {
        return bytes.push(byte(r));
    }
    // Headers are in front, and they decide.
    let window = match r.below(2) {
        0 => bytes.len().min(256),
        _ => bytes.len(),
    };
    let at = r.below(window as u64) as usize;
    match r.below(6) {
        0 => bytes[at] ^= 1 << r.below(8),
        1 => bytes[at] = byte(r),
        2 => {
            let value = [0, 1, u64::MAX, u64::MAX - 7, 1 << 31, r.number()][r.below(6) as usize];
            let len = 1 << r.below(4);
            for (b, v) in bytes[at..].iter_mut().zip(value.to_le_bytes()).take(len) {
                *b = v;
            }
        }
        3 => bytes.truncate(at),
        4 => bytes.insert(at, byte(r)),
        _ => {
            let from = r.below(bytes.len() as u64) as usize;
            let len = r.below(16).min((bytes.len() - from.max(at)) as u64) as usize;
            bytes.copy_within(from..from + len, at);
        }
    }
}

/// Panics so far, in any thread, and what the last one said.
static PANICS: AtomicU64 = AtomicU64::new(0);
static LAST: Mutex<String> = Mutex::new(String::new());

/// Panics in the threads of a device end that thread only; the hook sees them.
fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let shown = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if let Ok(mut last) = LAST.lock() {
                *last = info.to_string();
            }
            PANICS.fetch_add(1, Ordering::SeqCst);
            shown(info);
        }));
    });
}

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    /// After so many inputs.
    pub runs: u64,
    /// After so much time; the input at hand is finished.
    pub time: Duration,
}

/// Runs `target` on the inputs number `seed`, `seed + 1` and so on. Returns how many it was, or the first failure. One target at a
/// time in a process: a panic is not told from another target's.
pub fn run(target: &Target, seed: u64, bound: Bound) -> Result<u64, Failure> {
    watch_panics();
    let samples = (target.samples)();
    let start = Instant::now();
    for n in 0..bound.runs {
        if start.elapsed() >= bound.time {
            return Ok(n);
        }
        let seed = seed.wrapping_add(n);
        let bytes = input(&samples, seed);
        let before = PANICS.load(Ordering::SeqCst);
        let returned = catch_unwind(AssertUnwindSafe(|| (target.run)(&bytes)));
        if returned.is_err() || PANICS.load(Ordering::SeqCst) != before {
            return Err(Failure {
                target: target.name,
                seed,
                message: LAST.lock().map(|m| m.clone()).unwrap_or_default(),
            });
        }
    }
    Ok(bound.runs)
}
