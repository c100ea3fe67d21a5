//! Random programs in different circumstances that must make no difference: instruction by instruction, with the state stored
//! and loaded in between; with data that lies in a device instead of RAM, so that every access is answered outside and the
//! instruction repeated; with breakpoints on that are not met, which take every access off the fast path.

use lodger_x86::CpuState;

use crate::lines::{same, same_state};
use crate::machine::{CODE, DATA, DATA_PAGES, DEVICE, End, Machine, Mode, Outcome};
use crate::program::{Program, difference, search};

const TICKS: u64 = 10_000;

struct Bench {
    machine: Machine,
    start: CpuState,
}

impl Bench {
    fn new(mode: Mode) -> Bench {
        let mut machine = Machine::new(crate::engine(), mode, 1);
        for page in [CODE >> 12, (CODE >> 12) + 1] {
            machine.set_page(page, 5);
        }
        let start = machine.start(0);
        Bench { machine, start }
    }

    fn run(&mut self, program: &Program) -> (Outcome, Vec<u8>) {
        program.load(&self.machine);
        let start = program.start(&self.start);
        let outcome = self.machine.run(&start, TICKS);
        (outcome, self.machine.data())
    }

    fn run_in_steps(&mut self, program: &Program) -> (Outcome, Vec<u8>) {
        program.load(&self.machine);
        let start = program.start(&self.start);
        let outcome = self.machine.run_in_steps(&start, TICKS, |_, _| {});
        (outcome, self.machine.data())
    }

    fn run_watched(&mut self, program: &Program) -> (Outcome, Vec<u8>) {
        program.load(&self.machine);
        let mut start = program.start(&self.start);
        // A write breakpoint and one on instructions, elsewhere.
        start.dr = [0x1_0000, 0x1_1000, 0, 0];
        start.dr7 = 0x1_0405;
        let mut outcome = self.machine.run(&start, TICKS);
        let fresh = &self.start;
        (outcome.state.dr, outcome.state.dr6, outcome.state.dr7) = (fresh.dr, fresh.dr6, fresh.dr7);
        (outcome, self.machine.data())
    }

    /// `chosen`: bits of the pages that lie in the device.
    fn run_in_device(&mut self, program: &Program, chosen: u64) -> (Outcome, Vec<u8>) {
        program.load(&self.machine);
        let start = program.start(&self.start);
        let m = &mut self.machine;
        let flags = |writable| if writable { 7 } else { 5 };
        let pages = DATA_PAGES
            .into_iter()
            .filter(|(page, _)| chosen >> page & 1 != 0);
        for (page, writable) in pages.clone() {
            let at = page << 12;
            let bytes = m.bytes(DATA + at, 4096);
            m.device[at as usize..at as usize + 4096].copy_from_slice(&bytes);
            m.map_page((DATA >> 12) + page, (DEVICE + at) | flags(writable));
        }
        let outcome = m.run(&start, TICKS);
        for (page, writable) in pages {
            let at = page << 12;
            let bytes = &m.device[at as usize..at as usize + 4096];
            m.memory.write(DATA + at, bytes).expect("RAM");
            m.set_page((DATA >> 12) + page, flags(writable));
        }
        (outcome, m.data())
    }

    fn differences(&mut self, program: &Program) -> Vec<String> {
        let (plain, data) = self.run(program);
        let mut found = Vec::new();
        for (what, (outcome, other)) in [
            ("in steps", self.run_in_steps(program)),
            ("watched", self.run_watched(program)),
            ("in a device", self.run_in_device(program, u64::MAX)),
            (
                "partly in a device",
                self.run_in_device(program, program.memory_seed),
            ),
        ] {
            if !same(&outcome, &plain) {
                let (a, b) = (&outcome.state, &plain.state);
                found.push(format!(
                    "{what}: {:?} after {} ticks, at {:x}, GPRs {:x?}, flags {:x}, CR2 {:x}; plain: {:?} after {}, at {:x}, \
                     GPRs {:x?}, flags {:x}, CR2 {:x}",
                    outcome.end, outcome.ticks, a.rip, a.gpr, a.rflags, a.cr2,
                    plain.end, plain.ticks, b.rip, b.gpr, b.rflags, b.cr2,
                ));
                if !same_state(a, b) {
                    found.push(format!("in {:?}", a.differences(b)));
                }
            }
            let text = difference(&other, &data);
            found.extend(text.map(|text| format!("{what}: {text}")));
        }
        if matches!(plain.end, End::TickLimit | End::Shutdown) {
            found.push(format!("ends with {:?}", plain.end));
        }
        found
    }
}

fn fuzz(mode: Mode) {
    let mut bench = Bench::new(mode);
    search(mode, 1_500, |program| bench.differences(program));
}

#[test]
fn circumstances_in_64_bit_mode() {
    fuzz(Mode::Long(3));
}

#[test]
fn circumstances_with_32_bit_segments() {
    fuzz(Mode::Compat32);
}

#[test]
fn circumstances_with_16_bit_segments() {
    fuzz(Mode::Compat16);
}
