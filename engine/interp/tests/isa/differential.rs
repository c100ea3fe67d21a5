//! Random programs, in the interpreter and on the host processor: registers, flags, vector and x87 state, memory and faults
//! must be the same.
//!
//! `LODGER_FUZZ_CASES` sets the number of cases (by default as many as take a few seconds), `LODGER_FUZZ_SEED` the first one's
//! seed.

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter, Mnemonic};
use lodger_interp::InterpEngine;
use lodger_x86::CpuState;

use crate::host::{CODE_SIZE, Host, HostOutcome, Registers};
use crate::machine::{
    CODE, DATA, DATA_PAGES, END_OF_PROGRAM, End, Machine, Mode, Outcome, STACK_OFFSET,
};
use crate::random::{GS_BASE, Piece, Rng, piece};

const DATA_SIZE: usize = DATA_PAGES.len() * 4096;
/// Longer than any program.
const TICKS: u64 = 10_000;

/// A program and what it begins with.
#[derive(Clone)]
struct Case {
    mode: Mode,
    before: Registers,
    pieces: Vec<Piece>,
    /// Where the code begins, from [`CODE`].
    offset: usize,
    memory_seed: u64,
}

impl Case {
    fn new(seed: u64, mode: Mode) -> Case {
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
        let pieces = (0..count).map(|_| piece(&mut rng, mode)).collect();
        Case {
            mode,
            before,
            pieces,
            offset,
            memory_seed: rng.next(),
        }
    }

    /// The machine code without its end.
    fn code(&self) -> Vec<u8> {
        let mut code = Vec::new();
        for (n, piece) in self.pieces.iter().enumerate() {
            let mut bytes = piece.bytes.clone();
            let next = CODE + (self.offset + code.len() + bytes.len()) as u64;
            if let Some((at, target)) = piece.rip_relative {
                let distance = target.wrapping_sub(next) as u32;
                bytes[at..at + 4].copy_from_slice(&distance.to_le_bytes());
            }
            if piece.skips_next {
                let len = self.pieces.get(n + 1).map_or(0, |p| p.bytes.len());
                *bytes.last_mut().expect("a branch") = len as u8;
            }
            code.extend(bytes);
        }
        code
    }

    /// The instruction at `rip`, if that is in the code.
    fn instruction_at(&self, rip: u64) -> Option<Instruction> {
        let start = CODE + self.offset as u64 - self.mode.code_base();
        let code = self.code();
        let rest = code.get(rip.checked_sub(start)? as usize..)?;
        let mut decoder = Decoder::with_ip(self.mode.bitness(), rest, rip, DecoderOptions::NONE);
        decoder.can_decode().then(|| decoder.decode())
    }

    fn data(&self) -> Vec<u8> {
        let mut rng = Rng(self.memory_seed);
        let mut data = vec![0; DATA_SIZE];
        for word in data.chunks_exact_mut(8) {
            word.copy_from_slice(&rng.next().to_le_bytes());
        }
        data
    }

    fn listing(&self) -> String {
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
            _ => 0x3ff0 + rng.below(32) as u16 | rng.next() as u16 & 0x8000,
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

/// Both sides of the comparison.
struct Bench {
    host: Host,
    machine: Machine,
    start: CpuState,
}

impl Bench {
    fn new(mode: Mode) -> Bench {
        let mut machine = Machine::new(&InterpEngine, mode, 1);
        for page in [CODE >> 12, (CODE >> 12) + 1] {
            // Not writable: nothing here is about code that changes.
            machine.set_page(page, 5);
        }
        let start = machine.start(0);
        Bench {
            host: Host::new(),
            machine,
            start,
        }
    }

    fn start_of(&self, case: &Case) -> CpuState {
        let mut s = self.start.clone();
        let b = &case.before;
        s.gpr = b.gpr;
        (s.rip, s.rflags) = (b.rip, b.rflags);
        if case.mode.bitness() == 64 {
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
    fn code_pages(case: &Case, code: &[u8], end: &[u8]) -> Vec<u8> {
        let mut pages = vec![0xcc; CODE_SIZE];
        let after = case.offset + code.len();
        pages[case.offset..after].copy_from_slice(code);
        let at = CODE_SIZE - 16;
        let (len, bytes) = if case.mode.bitness() == 16 {
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

    fn guest(&mut self, case: &Case, code: &[u8], data: &[u8]) -> (Outcome, Vec<u8>) {
        let m = &mut self.machine;
        m.memory
            .write(CODE, &Bench::code_pages(case, code, &END_OF_PROGRAM))
            .unwrap();
        for ((page, _), bytes) in DATA_PAGES.iter().zip(data.chunks_exact(4096)) {
            m.memory.write(DATA + (page << 12), bytes).unwrap();
        }
        let start = self.start_of(case);
        let outcome = self.machine.run(&start, TICKS);
        let pages = DATA_PAGES
            .iter()
            .map(|(page, _)| self.machine.bytes(DATA + (page << 12), 4096));
        (outcome, pages.collect::<Vec<_>>().concat())
    }

    fn native(&mut self, case: &Case, code: &[u8], data: &[u8]) -> (HostOutcome, Vec<u8>) {
        let end = self.host.end_of_program(case.mode.bitness());
        self.host.write_code(&Bench::code_pages(case, code, &end));
        self.host.write_data(data);
        let mut before = case.before.clone();
        for n in 0..16 {
            let (low, at) = (before.ymm[n], 160 + 16 * n);
            before.fx[at..at + 16].copy_from_slice(&low[..16]);
        }
        let outcome = self.host.run(case.mode, &before);
        (outcome, self.host.data())
    }

    /// What differs.
    fn differences(&mut self, case: &Case) -> Vec<String> {
        let (code, data) = (case.code(), case.data());
        if case.offset + code.len() + 32 > CODE_SIZE {
            return Vec::new();
        }
        let (guest, guest_data) = self.guest(case, &code, &data);
        if matches!(guest.end, End::TickLimit | End::Shutdown) {
            return vec![format!("{:?}", guest.end)];
        }
        let (native, native_data) = self.native(case, &code, &data);
        let mut found = compare(case, &guest, &native);
        if let Some(at) = (0..DATA_SIZE).find(|i| guest_data[*i] != native_data[*i]) {
            let page = DATA_PAGES[at / 4096].0;
            let address = DATA + (page << 12) + at as u64 % 4096;
            let bytes = |d: &[u8]| d[at..DATA_SIZE.min(at + 16)].to_vec();
            found.push(format!(
                "memory at {address:#x}: {:02x?}, host {:02x?}",
                bytes(&guest_data),
                bytes(&native_data)
            ));
        }
        found
    }
}

/// Linux does not tell user mode whether a page in its half of the address space is there.
fn as_linux_reports(guest: &Outcome) -> End {
    match guest.end {
        End::Exception { vector: 14, error } if guest.state.cr2 >= 0x7fff_ffff_f000 => {
            End::Exception {
                vector: 14,
                error: error | 1,
            }
        }
        end => end,
    }
}

fn compare(case: &Case, guest: &Outcome, native: &HostOutcome) -> Vec<String> {
    let mut found = Vec::new();
    let mut same =
        |what: &str, guest: &dyn std::fmt::Debug, host: &dyn std::fmt::Debug, equal: bool| {
            if !equal {
                found.push(format!("{what}: {guest:x?}, host {host:x?}"));
            }
        };
    let (g, h) = (&guest.state, &native.registers);
    let guest_end = as_linux_reports(guest);
    same("end", &guest_end, &native.end, guest_end == native.end);
    let faulted = matches!(guest.end, End::Exception { .. });
    if faulted {
        same("RIP", &g.rip, &h.rip, g.rip == h.rip);
    }
    let fault = if faulted {
        case.instruction_at(g.rip)
    } else {
        None
    };
    if let End::Exception { vector: 14, .. } = guest.end {
        // Of an operand of many parts, processors touch not always the first one first.
        let precise = fault.is_none_or(|i| {
            i.memory_size().size().is_power_of_two()
                && !matches!(
                    i.mnemonic(),
                    Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu | Mnemonic::Maskmovq
                )
        });
        let mask = if precise { u64::MAX } else { !0xfff };
        same(
            "CR2",
            &g.cr2,
            &native.cr2,
            g.cr2 & mask == native.cr2 & mask,
        );
    }
    let wide = case.mode.bitness() == 64;
    for n in 0..if wide { 16 } else { 8 } {
        // ESP's upper half is not kept while interrupts return to a 16-bit stack.
        let mask = match (wide, n, case.mode.bitness()) {
            (true, ..) => u64::MAX,
            (_, 4, 16) => 0xffff,
            _ => 0xffff_ffff,
        };
        let (a, b) = (g.gpr[n] & mask, h.gpr[n] & mask);
        same(&format!("GPR {n}"), &a, &b, a == b);
    }
    // RF is up to the kernel.
    let mask = 0x20_0fd5;
    let (a, b) = (g.rflags & mask, h.rflags & mask);
    same("RFLAGS", &a, &b, a == b);
    // What a faulting gather leaves in its registers differs between processors; that it can be repeated is what counts.
    let gather = fault.is_some_and(|i| i.is_vsib());
    let vectors = if wide { 16 } else { 8 };
    for n in 0..if gather { 0 } else { vectors } {
        same(
            &format!("YMM{n}"),
            &g.fpu.ymm[n],
            &h.ymm[n],
            g.fpu.ymm[n] == h.ymm[n],
        );
    }
    let word = |at: usize| u16::from_le_bytes([h.fx[at], h.fx[at + 1]]);
    // Documented differences: with an unmasked underflow or overflow the precision flag, of a dot product all flags. A store
    // that faults may have set flags already.
    use Mnemonic as M;
    let is = |list: &[Mnemonic]| fault.is_some_and(|i| list.contains(&i.mnemonic()));
    let mask = match guest.end {
        End::Exception { vector: 19, .. } if is(&[M::Dpps, M::Dppd, M::Vdpps, M::Vdppd]) => !0x3f,
        End::Exception { vector: 19, .. } => !0x20,
        _ if is(&[M::Vcvtps2ph]) => !0x3f,
        _ => u32::MAX,
    };
    let (a, b) = (g.fpu.mxcsr & mask, u32::from(word(24)) & mask);
    same("MXCSR", &a, &b, a == b);
    // Processors make the x87 registers MMX registers before they find the fault.
    let mmx = |i: Instruction| (0..i.op_count()).any(|n| i.op_register(n).is_mm());
    if fault.is_some_and(mmx) {
        return found;
    }
    same("FCW", &g.fpu.fcw, &word(0), g.fpu.fcw == word(0));
    same("FSW", &g.fpu.fsw, &word(2), g.fpu.fsw == word(2));
    same("FTW", &g.fpu.ftw, &h.fx[4], g.fpu.ftw == h.fx[4]);
    for n in 0..8 {
        let (a, b) = (&g.fpu.st[n][..10], &h.fx[32 + 16 * n..][..10]);
        same(&format!("ST{n}"), &a, &b, a == b);
    }
    found
}

/// Drops pieces as long as there is still a difference.
fn shrink(bench: &mut Bench, case: &Case) -> Case {
    let mut best = case.clone();
    loop {
        let smaller = (0..best.pieces.len()).find_map(|n| {
            let mut smaller = best.clone();
            smaller.pieces.remove(n);
            (!bench.differences(&smaller).is_empty()).then_some(smaller)
        });
        match smaller {
            Some(smaller) => best = smaller,
            None => return best,
        }
    }
}

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is not a number")),
        Err(_) => default,
    }
}

fn fuzz(mode: Mode) {
    let mut bench = Bench::new(mode);
    let cases = number("LODGER_FUZZ_CASES", 20_000);
    let first = number("LODGER_FUZZ_SEED", 1);
    let most = number("LODGER_FUZZ_FAILURES", 1);
    let mut failures = 0;
    for seed in first..first + cases {
        let case = Case::new(seed, mode);
        if bench.differences(&case).is_empty() {
            continue;
        }
        let small = shrink(&mut bench, &case);
        let found = bench.differences(&small);
        println!(
            "seed {seed}, {mode:?}:\n{}  {}\n  GPRs before {:x?}, flags {:x}\n",
            small.listing(),
            found.join("\n  "),
            small.before.gpr,
            small.before.rflags,
        );
        failures += 1;
        if failures >= most {
            break;
        }
    }
    assert_eq!(failures, 0, "differences between interpreter and host");
}

#[test]
fn random_programs_in_64_bit_mode() {
    fuzz(Mode::Long(3));
}

#[test]
fn random_programs_with_32_bit_segments() {
    fuzz(Mode::Compat32);
}

#[test]
fn random_programs_with_16_bit_segments() {
    fuzz(Mode::Compat16);
}
