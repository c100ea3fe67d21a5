//! A random program: its instructions, registers and memory, and how it is laid out.

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};
use lodger_x86::CpuState;

use crate::host::{CODE_SIZE, Registers};
use crate::machine::{CODE, DATA, DATA_PAGES, END_OF_PROGRAM, Machine, Mode, STACK_OFFSET};
use crate::random::{Context, GS_BASE, Piece, Rng, piece};

/// Bytes of all data pages.
pub const DATA_SIZE: usize = DATA_PAGES.len() * 4096;

/// A program and what it begins with.
#[derive(Clone)]
pub struct Program {
    pub mode: Mode,
    pub before: Registers,
    pub pieces: Vec<Piece>,
    /// Where the code begins, from [`CODE`].
    offset: usize,
    pub memory_seed: u64,
}

impl Program {
    pub fn new(seed: u64, mode: Mode) -> Program {
        let mut rng = Rng(seed);
        let mut before = Registers::zero();
        for register in &mut before.gpr {
            *register = rng.value();
        }
        before.gpr[4] = DATA + STACK_OFFSET - mode.data_base() + rng.pick(&[0, 0, 0, 1, 3]);
        before.rflags = 0x202 | rng.next() & 0xcd5;
        if mode.bitness() == 64 {
            before.gs_base = GS_BASE;
        }
        for register in &mut before.ymm {
            for word in register.chunks_exact_mut(8) {
                word.copy_from_slice(&rng.value().to_le_bytes());
            }
        }
        fpu_state(&mut rng, &mut before);
        let offset = match rng.below(4) {
            0 => 0x1000 - rng.below(64) as usize,
            _ => rng.below(0x1d00) as usize,
        };
        before.rip = CODE + offset as u64 - mode.code_base();
        let count = 1 + rng.below(12);
        let nests = mode.bitness() == 64 && rng.one_in(2);
        let context = Context {
            mode,
            nests,
            calm: nests && !rng.one_in(4),
            in_call: false,
            kept: 0,
            depth: 0,
        };
        let mut pieces: Vec<Piece> = (0..count).map(|_| piece(&mut rng, &context)).collect();
        // The end needs some room.
        while offset + pieces.iter().map(|p| p.bytes.len()).sum::<usize>() > CODE_SIZE - 32 {
            pieces.pop();
        }
        Program {
            mode,
            before,
            pieces,
            offset,
            memory_seed: rng.next(),
        }
    }

    /// Programs that lack a part of this one.
    fn smaller(&self) -> Vec<Program> {
        let mut found = Vec::new();
        for n in 0..self.pieces.len() {
            let mut smaller = self.clone();
            smaller.pieces.remove(n);
            found.push(smaller);
        }
        for n in 0..self.pieces.len() {
            for simpler in self.pieces[n].simpler() {
                let mut smaller = self.clone();
                smaller.pieces[n] = simpler;
                found.push(smaller);
            }
        }
        found
    }

    /// The machine code without its end.
    pub fn code(&self) -> Vec<u8> {
        let mut code = Vec::new();
        for (n, piece) in self.pieces.iter().enumerate() {
            let mut bytes = piece.bytes.clone();
            for &(at, target) in &piece.rip_relative {
                let next = CODE + (self.offset + code.len() + at + 4) as u64;
                let distance = target.wrapping_sub(next) as u32;
                bytes[at..at + 4].copy_from_slice(&distance.to_le_bytes());
            }
            if piece.skips_next {
                let len = self.pieces.get(n + 1).map_or(0, |p| p.bytes.len());
                *bytes.last_mut().expect("a branch") = i8::try_from(len).unwrap_or(0) as u8;
            }
            code.extend(bytes);
        }
        code
    }

    /// The instruction at `rip`, if that is in the code.
    pub fn instruction_at(&self, rip: u64) -> Option<Instruction> {
        let start = CODE + self.offset as u64 - self.mode.code_base();
        let code = self.code();
        let rest = code.get(rip.checked_sub(start)? as usize..)?;
        let mut decoder = Decoder::with_ip(self.mode.bitness(), rest, rip, DecoderOptions::NONE);
        decoder.can_decode().then(|| decoder.decode())
    }

    pub fn data(&self) -> Vec<u8> {
        let mut rng = Rng(self.memory_seed);
        let mut data = vec![0; DATA_SIZE];
        for word in data.chunks_exact_mut(8) {
            word.copy_from_slice(&rng.next().to_le_bytes());
        }
        data
    }

    /// The state with which the program begins in a machine, from the one that the machine gives.
    pub fn start(&self, fresh: &CpuState) -> CpuState {
        let mut s = fresh.clone();
        let b = &self.before;
        s.gpr = b.gpr;
        (s.rip, s.rflags) = (b.rip, b.rflags);
        if self.mode.bitness() == 64 {
            s.segments[5].base = b.gs_base;
        }
        let word = |at: usize| u16::from_le_bytes([b.fx[at], b.fx[at + 1]]);
        (s.fpu.fcw, s.fpu.fsw, s.fpu.ftw) = (word(0), word(2), b.fx[4]);
        s.fpu.mxcsr = u32::from(word(24));
        for n in 0..8 {
            s.fpu.st[n][..10].copy_from_slice(&b.fx[32 + 16 * n..][..10]);
        }
        s.fpu.ymm = b.ymm;
        s
    }

    /// All of program memory: the code, a jump to what ends it there, and that at the very end; programs may read it.
    pub fn code_pages(&self, end: &[u8]) -> Vec<u8> {
        let mut pages = vec![0xcc; CODE_SIZE];
        let code = self.code();
        let after = self.offset + code.len();
        pages[self.offset..after].copy_from_slice(&code);
        let at = CODE_SIZE - 16;
        let (len, bytes) = if self.mode.bitness() == 16 {
            (3, 2)
        } else {
            (5, 4)
        };
        let distance = (at - after - len) as u32;
        pages[after] = 0xe9;
        pages[after + 1..after + len].copy_from_slice(&distance.to_le_bytes()[..bytes]);
        pages[at..at + end.len()].copy_from_slice(end);
        pages
    }

    /// Puts code and data into a machine.
    pub fn load(&self, machine: &Machine) {
        let code = self.code_pages(&END_OF_PROGRAM);
        machine.memory.write(CODE, &code).expect("RAM");
        for ((page, _), bytes) in DATA_PAGES.iter().zip(self.data().chunks_exact(4096)) {
            machine
                .memory
                .write(DATA + (page << 12), bytes)
                .expect("RAM");
        }
    }

    pub fn listing(&self) -> String {
        let mut text = String::new();
        let code = self.code();
        let ip = CODE + self.offset as u64 - self.mode.code_base();
        let mut decoder = Decoder::with_ip(self.mode.bitness(), &code, ip, DecoderOptions::NONE);
        let mut formatter = IntelFormatter::new();
        while decoder.can_decode() {
            let start = decoder.position();
            let instruction = decoder.decode();
            let mut line = String::new();
            formatter.format(&instruction, &mut line);
            let bytes: String = code[start..decoder.position()]
                .iter()
                .map(|b| format!("{b:02x} "))
                .collect();
            text += &format!("  {:6x}: {bytes:<46}{line}\n", instruction.ip());
        }
        text
    }
}

fn fpu_state(rng: &mut Rng, before: &mut Registers) {
    let fx = &mut before.fx;
    let control = if rng.one_in(8) {
        rng.next() as u16 & 0x0f3f | 0x40
    } else {
        0x37f
    };
    fx[..2].copy_from_slice(&control.to_le_bytes());
    // Top of stack and condition codes, no exceptions.
    let status = rng.next() as u16 & 0x7f00;
    fx[2..4].copy_from_slice(&status.to_le_bytes());
    fx[4] = rng.pick(&[0, 0xff, rng.0 as u8]);
    for n in 0..8 {
        let register = &mut fx[32 + 16 * n..][..10];
        let exponent = match rng.below(4) {
            0 => rng.next() as u16,
            _ => (0x3ff0 + rng.below(32) as u16) | rng.next() as u16 & 0x8000,
        };
        let integer = if rng.one_in(10) { 0 } else { 1 << 63 };
        register[..8].copy_from_slice(&(rng.value() | integer).to_le_bytes());
        register[8..].copy_from_slice(&exponent.to_le_bytes());
    }
    let mxcsr = match rng.below(8) {
        0 => rng.next() as u32 & 0xffc0,
        1 => 0x1f80 | rng.next() as u32 & 0xe07f,
        _ => 0x1f80,
    };
    fx[24..28].copy_from_slice(&mxcsr.to_le_bytes());
}

/// Where the contents of the data pages differ, for a person to read.
pub fn difference(a: &[u8], b: &[u8]) -> Option<String> {
    let at = (0..DATA_SIZE).find(|i| a[*i] != b[*i])?;
    let address = DATA + (DATA_PAGES[at / 4096].0 << 12) + at as u64 % 4096;
    let end = DATA_SIZE.min(at + 16);
    Some(format!(
        "memory at {address:#x}: {:02x?}, the other {:02x?}",
        &a[at..end],
        &b[at..end]
    ))
}

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is not a number")),
        Err(_) => default,
    }
}

/// Tries random programs with `differences`, which tells what is wrong; fails with the smallest part of a program that still
/// is. `LODGER_FUZZ_CASES` sets the number of programs, `LODGER_FUZZ_SEED` the first one's seed, `LODGER_FUZZ_FAILURES` how many are
/// shown.
pub fn search(mode: Mode, cases: u64, mut differences: impl FnMut(&Program) -> Vec<String>) {
    let cases = number("LODGER_FUZZ_CASES", cases);
    let first = number("LODGER_FUZZ_SEED", 1);
    let most = number("LODGER_FUZZ_FAILURES", 1);
    let mut failures = 0;
    for seed in first..first + cases {
        let mut program = Program::new(seed, mode);
        let mut found = differences(&program);
        if found.is_empty() {
            continue;
        }
        while let Some(smaller) = program
            .smaller()
            .into_iter()
            .map(|smaller| (differences(&smaller), smaller))
            .find(|(still, _)| !still.is_empty())
        {
            (found, program) = smaller;
        }
        let (gpr, flags) = (program.before.gpr, program.before.rflags);
        println!(
            "seed {seed}, {mode:?}:\n{}  {}",
            program.listing(),
            found.join("\n  ")
        );
        println!("  GPRs before {gpr:x?}, flags {flags:x}\n");
        failures += 1;
        if failures >= most {
            break;
        }
    }
    assert_eq!(failures, 0, "programs with differences");
}
