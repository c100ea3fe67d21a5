//! Random programs, in the interpreter and on the host processor: registers, flags, vector and x87 state, memory and faults
//! must be the same.
//!
//! See [`search`] for the number of cases.

use iced_x86::{Instruction, Mnemonic};
use lodger_x86::CpuState;

use crate::host::{Host, HostOutcome, is_mapped};
use crate::machine::{CODE, End, Machine, Mode, Outcome};
use crate::program::{Program, difference, search};

/// Longer than any program.
const TICKS: u64 = 10_000;

/// Both sides of the comparison.
struct Bench {
    host: Host,
    machine: Machine,
    start: CpuState,
}

impl Bench {
    fn new(mode: Mode) -> Bench {
        let mut machine = Machine::new(crate::engine(), mode, 1);
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

    fn guest(&mut self, program: &Program) -> (Outcome, Vec<u8>) {
        program.load(&self.machine);
        let start = program.start(&self.start);
        let outcome = self.machine.run(&start, TICKS);
        (outcome, self.machine.data())
    }

    fn native(&mut self, program: &Program) -> (HostOutcome, Vec<u8>) {
        let end = self.host.end_of_program(program.mode.bitness());
        self.host.write_code(&program.code_pages(&end));
        self.host.write_data(&program.data());
        let mut before = program.before.clone();
        for n in 0..16 {
            let (low, at) = (before.ymm[n], 160 + 16 * n);
            before.fx[at..at + 16].copy_from_slice(&low[..16]);
        }
        let outcome = self.host.run(program.mode, &before);
        (outcome, self.host.data())
    }

    /// What differs.
    fn differences(&mut self, program: &Program) -> Vec<String> {
        let (guest, guest_data) = self.guest(program);
        if matches!(guest.end, End::TickLimit | End::Shutdown) {
            return vec![format!("{:?}", guest.end)];
        }
        if matches!(guest.end, End::Exception { vector: 14, .. }) && is_mapped(guest.state.cr2) {
            // The host program would hit this process's own memory.
            return Vec::new();
        }
        let (native, native_data) = self.native(program);
        let mut found = compare(program, &guest, &native);
        found.extend(difference(&guest_data, &native_data));
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

fn compare(program: &Program, guest: &Outcome, native: &HostOutcome) -> Vec<String> {
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
        program.instruction_at(g.rip)
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
    let wide = program.mode.bitness() == 64;
    for n in 0..if wide { 16 } else { 8 } {
        // ESP's upper half is not kept while interrupts return to a 16-bit stack.
        let mask = match (wide, n, program.mode.bitness()) {
            (true, ..) => u64::MAX,
            (_, 4, 16) => 0xffff,
            _ => 0xffff_ffff,
        };
        let (a, b) = (g.gpr[n] & mask, h.gpr[n] & mask);
        same(&format!("GPR {n}"), &a, &b, a == b);
    }
    // RF is up to the kernel.
    let mask = 0x20_0fd5 & if faulted { !crate::FORGOTTEN } else { u64::MAX };
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

fn fuzz(mode: Mode) {
    let mut bench = Bench::new(mode);
    search(mode, 8_000, |program| bench.differences(program));
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
