//! Cases as lines of text: what a few instructions do, independent of the engine.
//!
//! `mode | code | before | after ; the code as assembly`. The files are in `cases/`. A line says everything that changes: a
//! register, flag or byte of memory that is not named after must be as before.
//!
//! * modes: `long0 long3 compat32 compat16 prot0 prot3 prot16 real` (see [`Mode`]);
//! * code: bytes; an end is put behind them. Numbers are hexadecimal everywhere;
//! * before: `rax=1` ... `r15=`, `at=20ffe` (where the code is), `fl=c,z,ac,iopl3` (flags that are set), `[30010]=aabb` (bytes in
//!   memory), `+smep -wp` (bits of CR0, CR4, EFER), `pte31=7` (flags of a page), `map31=200007` (its whole entry; a device that
//!   remembers what is written is at 200000), `ds.limit=`, `.base=`, `.attr=`, `.sel=`, `dr7=`,
//!   `cr2=`, `xmm1=`, `mxcsr=`, `fcw=`, `fsw=`, `ftw=`, `paging` and `pae` (32-bit paging), `nohost` (not to be compared with the host);
//! * after: the same, and `#PF(7)` (an exception and its error code), `#int30`, `shutdown`, `rip=+3` (from the code's start; by default
//!   the start after an exception, else the end), `fl=c,?a` (AF is undefined), `ticks=3`.

use lodger_vcpu::Engine;
use lodger_x86::bits::{cr0, cr4, efer};
use lodger_x86::{CpuState, Segment};

use crate::host::{CODE_SIZE, Host, Registers};
use crate::machine::{CODE, DATA, DATA_PAGES, END_OF_PROGRAM, End, Machine, Mode, Outcome};

const GPR: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
const FLAGS: [(&str, u64); 19] = [
    ("c", 1),
    ("p", 4),
    ("a", 0x10),
    ("z", 0x40),
    ("s", 0x80),
    ("t", 0x100),
    ("i", 0x200),
    ("d", 0x400),
    ("o", 0x800),
    ("iopl1", 0x1000),
    ("iopl2", 0x2000),
    ("iopl3", 0x3000),
    ("nt", 0x4000),
    ("rf", 0x1_0000),
    ("vm", 0x2_0000),
    ("ac", 0x4_0000),
    ("vif", 0x8_0000),
    ("vip", 0x10_0000),
    ("id", 0x20_0000),
];
const EXCEPTIONS: [(&str, u8); 17] = [
    ("DE", 0),
    ("DB", 1),
    ("BP", 3),
    ("OF", 4),
    ("BR", 5),
    ("UD", 6),
    ("NM", 7),
    ("DF", 8),
    ("TS", 10),
    ("NP", 11),
    ("SS", 12),
    ("GP", 13),
    ("PF", 14),
    ("MF", 16),
    ("AC", 17),
    ("MC", 18),
    ("XM", 19),
];
/// More than any line needs.
const TICKS: u64 = 2000;

/// One case.
pub struct Case {
    pub text: String,
    pub mode: Mode,
    pub code: Vec<u8>,
    before: Vec<(String, String)>,
    after: Vec<(String, String)>,
}

fn hex(text: &str) -> u64 {
    let (text, negative) = text.strip_prefix('-').map_or((text, false), |t| (t, true));
    let value = u64::from_str_radix(text, 16)
        .unwrap_or_else(|_| panic!("{text}: not a hexadecimal number"));
    if negative {
        value.wrapping_neg()
    } else {
        value
    }
}

fn bytes(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b' ').collect();
    assert!(digits.len().is_multiple_of(2), "{text}: half a byte");
    digits
        .chunks(2)
        .map(|pair| hex(std::str::from_utf8(pair).expect("ASCII")) as u8)
        .collect()
}

/// `name=value` and words.
fn tokens(text: &str) -> Vec<(String, String)> {
    text.split_whitespace()
        .map(|token| {
            let (name, value) = token.split_once('=').unwrap_or((token, ""));
            (name.to_owned(), value.to_owned())
        })
        .collect()
}

fn mode(name: &str) -> Mode {
    match name {
        "long0" => Mode::Long(0),
        "long3" => Mode::Long(3),
        "compat32" => Mode::Compat32,
        "compat16" => Mode::Compat16,
        "prot0" => Mode::Protected(0),
        "prot3" => Mode::Protected(3),
        "prot16" => Mode::Protected16,
        "real" => Mode::Real,
        _ => panic!("{name}: no such mode"),
    }
}

/// The cases of a file's text.
pub fn parse(text: &str) -> Vec<Case> {
    let lines = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines
        .map(|line| {
            let content = line.split_once(';').map_or(line, |(content, _)| content);
            let fields: Vec<&str> = content.split('|').map(str::trim).collect();
            assert_eq!(fields.len(), 4, "{line}: not four fields");
            Case {
                text: line.to_owned(),
                mode: mode(fields[0]),
                code: bytes(fields[1]),
                before: tokens(fields[2]),
                after: tokens(fields[3]),
            }
        })
        .collect()
}

fn flags(text: &str) -> (u64, u64) {
    let (mut set, mut undefined) = (0, 0);
    for name in text.split(',').filter(|n| !n.is_empty()) {
        let (name, into) = match name.strip_prefix('?') {
            Some(name) => (name, &mut undefined),
            None => (name, &mut set),
        };
        let found = FLAGS.iter().find(|(n, _)| *n == name);
        *into |= found.unwrap_or_else(|| panic!("{name}: no such flag")).1;
    }
    (set, undefined)
}

/// Sets what `name` means in a state. False: it means nothing there.
fn set(state: &mut CpuState, name: &str, value: &str) -> bool {
    if let Some(n) = GPR.iter().position(|r| *r == name) {
        state.gpr[n] = hex(value);
        return true;
    }
    if let Some((register, part)) = name.split_once('.')
        && !matches!(register, "gdtr" | "idtr")
    {
        let n = SEGMENTS.iter().position(|r| *r == register);
        let segment: &mut Segment = match n {
            Some(n) => &mut state.segments[n],
            None if register == "tr" => &mut state.tr,
            None => panic!("{name}: no such segment register"),
        };
        match part {
            "sel" => segment.selector = hex(value) as u16,
            "base" => segment.base = hex(value),
            "limit" => segment.limit = hex(value) as u32,
            "attr" => segment.attributes = hex(value) as u16,
            _ => panic!("{name}: no such part"),
        }
        return true;
    }
    if let Some(n) = name.strip_prefix("xmm").or(name.strip_prefix("ymm")) {
        let n: usize = n.parse().unwrap_or_else(|_| panic!("{name}"));
        let mut number = bytes(&format!("{value:0>2}"));
        number.reverse();
        state.fpu.ymm[n][..number.len()].copy_from_slice(&number);
        return true;
    }
    if let Some(n) = name
        .strip_prefix("st")
        .and_then(|n| n.parse::<usize>().ok())
    {
        let mut number = bytes(value);
        number.reverse();
        state.fpu.st[n][..number.len()].copy_from_slice(&number);
        return true;
    }
    match name {
        "cr0" => state.cr0 = hex(value),
        "cr2" => state.cr2 = hex(value),
        "cr3" => state.cr3 = hex(value),
        "cr4" => state.cr4 = hex(value),
        "dr0" => state.dr[0] = hex(value),
        "dr1" => state.dr[1] = hex(value),
        "dr2" => state.dr[2] = hex(value),
        "dr3" => state.dr[3] = hex(value),
        "dr6" => state.dr6 = hex(value),
        "dr7" => state.dr7 = hex(value),
        "mxcsr" => state.fpu.mxcsr = hex(value) as u32,
        "fcw" => state.fpu.fcw = hex(value) as u16,
        "fsw" => state.fpu.fsw = hex(value) as u16,
        "ftw" => state.fpu.ftw = hex(value) as u8,
        "star" => state.msrs.star = hex(value),
        "lstar" => state.msrs.lstar = hex(value),
        "sfmask" => state.msrs.sfmask = hex(value),
        "kgsbase" => state.msrs.kernel_gs_base = hex(value),
        "gdtr.limit" => state.gdtr.limit = hex(value) as u16,
        "idtr.limit" => state.idtr.limit = hex(value) as u16,
        _ => return false,
    }
    true
}

/// `+name` or `-name`: a bit of a control register.
fn set_bit(state: &mut CpuState, token: &str) {
    let (sign, name) = token.split_at(1);
    let (register, bit) = match name {
        "mp" => (&mut state.cr0, cr0::MP),
        "em" => (&mut state.cr0, cr0::EM),
        "ts" => (&mut state.cr0, cr0::TS),
        "ne" => (&mut state.cr0, cr0::NE),
        "wp" => (&mut state.cr0, cr0::WP),
        "am" => (&mut state.cr0, cr0::AM),
        "tsd" => (&mut state.cr4, cr4::TSD),
        "de" => (&mut state.cr4, cr4::DE),
        "pse" => (&mut state.cr4, cr4::PSE),
        "pae" => (&mut state.cr4, cr4::PAE),
        "pge" => (&mut state.cr4, cr4::PGE),
        "osfxsr" => (&mut state.cr4, cr4::OSFXSR),
        "osxmmexcpt" => (&mut state.cr4, cr4::OSXMMEXCPT),
        "osxsave" => (&mut state.cr4, cr4::OSXSAVE),
        "umip" => (&mut state.cr4, cr4::UMIP),
        "fsgsbase" => (&mut state.cr4, cr4::FSGSBASE),
        "smep" => (&mut state.cr4, cr4::SMEP),
        "smap" => (&mut state.cr4, cr4::SMAP),
        "nxe" => (&mut state.efer, efer::NXE),
        "sce" => (&mut state.efer, efer::SCE),
        _ => panic!("{token}: no such bit"),
    };
    *register = if sign == "+" {
        *register | bit
    } else {
        *register & !bit
    };
}

impl Case {
    /// Where the code is.
    fn start(&self) -> u64 {
        let at = self.before.iter().find(|(name, _)| name == "at");
        at.map_or(CODE, |(_, value)| hex(value))
    }

    /// Whether the line is only about what a user program can do on the host as well.
    pub fn runs_on_host(&self) -> bool {
        let user = matches!(self.mode, Mode::Long(3) | Mode::Compat32 | Mode::Compat16);
        let plain = |(name, value): &(String, String)| {
            GPR.contains(&name.as_str())
                || matches!(name.as_str(), "at" | "mxcsr")
                || name.starts_with("[3")
                || name.starts_with("xmm")
                || name == "fl" && flags(value).0 & !0x20_0cd5 == 0
        };
        user && self.before.iter().all(plain)
    }

    /// Bytes of memory named in `tokens`.
    fn memory(tokens: &[(String, String)]) -> Vec<(u64, Vec<u8>)> {
        let cells = tokens.iter().filter_map(|(name, value)| {
            let address = name.strip_prefix('[')?.strip_suffix(']')?;
            Some((hex(address), bytes(value)))
        });
        cells.collect()
    }

    /// Fills memory and gives the state to begin with.
    fn prepare(&self, machine: &mut Machine) -> CpuState {
        machine.reset_memory();
        let mut state = machine.start(0);
        let start = self.start();
        state.rip = start - self.mode.code_base();
        machine
            .memory
            .write(start, &[&self.code[..], &END_OF_PROGRAM].concat())
            .expect("RAM");
        for (address, bytes) in Case::memory(&self.before) {
            machine.memory.write(address, &bytes).expect("RAM");
        }
        for (name, value) in &self.before {
            match name.as_str() {
                "at" | "nohost" => {}
                "fl" => state.rflags = flags(value).0 | 2,
                "paging" | "pae" => {
                    let pae = name == "pae";
                    state.cr3 = machine.cr3_for_32_bit_paging(pae);
                    state.cr0 |= cr0::PG | cr0::WP;
                    if pae {
                        state.cr4 |= cr4::PAE;
                        state.efer |= efer::NXE;
                    }
                }
                n if n.starts_with(['+', '-']) => set_bit(&mut state, n),
                n if n.starts_with('[') => {}
                n if n.starts_with("map") => machine.map_page(hex(&n[3..]), hex(value)),
                n if n.starts_with("pte") => machine.set_page(hex(&n[3..]), hex(value)),
                n => assert!(set(&mut state, n, value), "{n}: not known before"),
            }
        }
        state
    }

    /// How it must end.
    fn expected_end(&self) -> End {
        for (name, _) in &self.after {
            if name == "shutdown" {
                return End::Shutdown;
            }
            let Some(exception) = name.strip_prefix('#') else {
                continue;
            };
            let (name, error) = exception.split_once('(').unwrap_or((exception, "0)"));
            let vector = match name.strip_prefix("int") {
                Some(vector) => hex(vector) as u8,
                None => {
                    let found = EXCEPTIONS.iter().find(|(n, _)| *n == name);
                    found
                        .unwrap_or_else(|| panic!("{name}: no such exception"))
                        .1
                }
            };
            return End::Exception {
                vector,
                error: hex(error.trim_end_matches(')')) as u32,
            };
        }
        End::Done
    }

    /// The state after the line, from that before, and the flags that do not matter. What cannot be told from the line (CR2 if it is not
    /// named, what a handler changed) is taken from `outcome`.
    fn expected_state(&self, start: &CpuState, outcome: &Outcome) -> (CpuState, u64) {
        let end = self.expected_end();
        let (base, code) = (self.start(), self.code.len() as u64);
        let mut state = start.clone();
        let mut undefined = 0;
        state.rip = if end == End::Done { base + code } else { base } - self.mode.code_base();
        if let End::Exception { vector: 14, .. } = end {
            state.cr2 = outcome.state.cr2;
        }
        // Faults push RF; only lines about it name it.
        if let End::Exception { .. } = end {
            undefined |= 0x1_0000 | crate::FORGOTTEN;
        }
        for (name, value) in &self.after {
            match name.as_str() {
                "fl" => {
                    let (set, ignored) = flags(value);
                    state.rflags = set | 2;
                    undefined |= ignored;
                    if set & 0x1_0000 != 0 {
                        undefined &= !0x1_0000;
                    }
                }
                "rip" => {
                    state.rip = match value.strip_prefix('+') {
                        Some(offset) => base - self.mode.code_base() + hex(offset),
                        None => hex(value),
                    }
                }
                "ticks" | "shutdown" => {}
                n if n.starts_with(['#', '[']) => {}
                n if n.starts_with(['+', '-']) => set_bit(&mut state, n),
                n => assert!(set(&mut state, n, value), "{n}: not known after"),
            }
        }
        (state, undefined)
    }

    /// What differs between the outcome and the line.
    fn check(&self, start: &CpuState, outcome: &Outcome) -> Vec<String> {
        let mut found = self.check_but_ticks(start, outcome);
        for (name, value) in &self.after {
            if name == "ticks" && outcome.ticks != hex(value) {
                found.push(format!("{} ticks, expected {value}", outcome.ticks));
            }
        }
        found
    }

    fn check_but_ticks(&self, start: &CpuState, outcome: &Outcome) -> Vec<String> {
        let mut found = Vec::new();
        let expected = self.expected_end();
        if outcome.end != expected {
            found.push(format!(
                "ended with {:x?}, expected {expected:x?}",
                outcome.end
            ));
        }
        let (want, undefined) = self.expected_state(start, outcome);
        let got = &outcome.state;
        let mut compare = |what: &str, got: u64, want: u64| {
            if got != want {
                found.push(format!("{what} = {got:x}, expected {want:x}"));
            }
        };
        for (n, name) in GPR.iter().enumerate() {
            compare(name, got.gpr[n], want.gpr[n]);
        }
        compare("rip", got.rip, want.rip);
        compare("flags", got.rflags & !undefined, want.rflags & !undefined);
        for (n, name) in SEGMENTS.iter().enumerate() {
            let (g, w) = (&got.segments[n], &want.segments[n]);
            compare(&format!("{name}.sel"), g.selector.into(), w.selector.into());
            // The hidden part of what the handler's segments replaced is not known.
            if n != 1 && n != 2 || outcome.end == End::Done {
                compare(&format!("{name}.base"), g.base, w.base);
                compare(&format!("{name}.limit"), g.limit.into(), w.limit.into());
            }
        }
        compare("cr0", got.cr0, want.cr0);
        compare("cr2", got.cr2, want.cr2);
        compare("cr3", got.cr3, want.cr3);
        compare("cr4", got.cr4, want.cr4);
        compare("dr6", got.dr6, want.dr6);
        compare("dr7", got.dr7, want.dr7);
        for n in 0..4 {
            compare(&format!("dr{n}"), got.dr[n], want.dr[n]);
        }
        compare("kgsbase", got.msrs.kernel_gs_base, want.msrs.kernel_gs_base);
        compare("mxcsr", got.fpu.mxcsr.into(), want.fpu.mxcsr.into());
        compare("fcw", got.fpu.fcw.into(), want.fpu.fcw.into());
        compare("fsw", got.fpu.fsw.into(), want.fpu.fsw.into());
        compare("ftw", got.fpu.ftw.into(), want.fpu.ftw.into());
        for n in 0..16 {
            if got.fpu.ymm[n] != want.fpu.ymm[n] {
                found.push(format!(
                    "ymm{n} = {:02x?}, expected {:02x?}",
                    got.fpu.ymm[n], want.fpu.ymm[n]
                ));
            }
        }
        for n in 0..8 {
            if got.fpu.st[n] != want.fpu.st[n] {
                found.push(format!(
                    "st{n} = {:02x?}, expected {:02x?}",
                    got.fpu.st[n], want.fpu.st[n]
                ));
            }
        }
        found
    }

    /// What differs between the programs' memory and the line; `before`: what it held.
    fn check_memory(&self, before: &Memory, now: &Memory, outcome: &Outcome) -> Vec<String> {
        let mut expected = before.clone();
        for (address, bytes) in Case::memory(&self.after) {
            expected.set(address, &bytes);
        }
        // An exception at the same privilege level pushes below the stack pointer.
        let pushed = matches!(
            self.mode,
            Mode::Protected(0) | Mode::Protected16 | Mode::Real
        ) && outcome.end != End::Done;
        let stack = &outcome.state.segments[2];
        let mask = if stack.is_big() { 0xffff_ffff } else { 0xffff };
        let ignored = |at: u64| {
            let below =
                (outcome.state.gpr[4] & mask).wrapping_sub(at.wrapping_sub(stack.base)) & mask;
            pushed && (1..=16).contains(&below)
        };
        let different = now.differences(&expected).filter(|(at, ..)| !ignored(*at));
        let shown = different
            .take(20)
            .map(|(at, now, want)| format!("[{at:x}] = {now:02x}, expected {want:02x}"));
        shown.collect()
    }

    /// Runs the line in one go, and again instruction by instruction; what is wrong. `machines` are for this engine.
    pub fn run(&self, machines: &mut Machines) -> Vec<String> {
        let exact_ticks = machines.engine.probe().is_ok_and(|c| c.exact_ticks);
        let [machine, stepped] = machines.of(self.mode);
        let start = self.prepare(machine);
        let before = memory(machine, &self.after);
        let outcome = machine.run(&start, TICKS);
        let after = memory(machine, &self.after);
        let mut found = self.check(&start, &outcome);
        found.extend(self.check_memory(&before, &after, &outcome));
        if found.is_empty() && exact_ticks {
            found.extend(self.run_in_steps(machine, stepped, &outcome, &after));
        }
        found
    }

    /// The state at every instruction boundary must not depend on whether one stopped there, or at those before.
    fn run_in_steps(
        &self,
        machine: &mut Machine,
        stepped: &mut Machine,
        whole: &Outcome,
        memory_after: &Memory,
    ) -> Vec<String> {
        let start = self.prepare(stepped);
        let mut found = Vec::new();
        let outcome = stepped.run_in_steps(&start, TICKS, |tick, state| {
            let begin = self.prepare(machine);
            let at_once = machine.run(&begin, tick);
            if at_once.end == End::TickLimit && !same_state(&at_once.state, state) {
                let elements = at_once.state.differences(state);
                found.push(format!(
                    "after {tick} instructions at once other {elements:?} than one by one"
                ));
            }
        });
        if !same(&outcome, whole) {
            found.push(format!(
                "stepped it ends with {outcome:x?}\n    in one go with {whole:x?}"
            ));
        }
        if memory(stepped, &self.after) != *memory_after {
            found.push("stepped it leaves other memory".into());
        }
        found
    }

    /// Runs the line on the host processor.
    pub fn run_on_host(&self, machines: &mut Machines, host: &mut Host) -> Vec<String> {
        let [machine, _] = machines.of(self.mode);
        let start = self.prepare(machine);
        let before = memory(machine, &self.after);
        let mut registers = Registers::zero();
        (registers.gpr, registers.rip, registers.rflags) =
            (start.gpr, start.rip, start.rflags | 0x200);
        registers.ymm = start.fpu.ymm;
        registers.fx[24..28].copy_from_slice(&start.fpu.mxcsr.to_le_bytes());
        for (at, register) in registers.fx[160..416]
            .chunks_exact_mut(16)
            .zip(&start.fpu.ymm)
        {
            at.copy_from_slice(&register[..16]);
        }
        // The end on the host is longer.
        let mut code = machine.bytes(CODE, CODE_SIZE);
        let end = (self.start() - CODE) as usize + self.code.len();
        let end_on_host = host.end_of_program(self.mode.bitness());
        code[end..end + end_on_host.len()].copy_from_slice(&end_on_host);
        host.write_code(&code);
        let data: Vec<u8> = DATA_PAGES
            .iter()
            .flat_map(|(page, _)| machine.bytes(DATA + (page << 12), 4096))
            .collect();
        host.write_data(&data);

        let native = host.run(self.mode, &registers);
        let mut outcome = Outcome {
            end: native.end,
            state: start.clone(),
            ticks: 0,
        };
        let s = &mut outcome.state;
        let after = &native.registers;
        // What this mode cannot see is not compared; interrupts are always on for host programs.
        let count = if self.mode.bitness() == 64 { 16 } else { 8 };
        let mask = if self.mode.bitness() == 64 {
            u64::MAX
        } else {
            0xffff_ffff
        };
        for n in 0..count {
            s.gpr[n] = after.gpr[n] & mask;
        }
        s.rip = match native.end {
            End::Done => self.start() + self.code.len() as u64 - self.mode.code_base(),
            _ => after.rip,
        };
        s.rflags = after.rflags & !0x200;
        s.cr2 = if native.end == End::Done {
            0
        } else {
            native.cr2
        };
        s.fpu.ymm = after.ymm;
        s.fpu.mxcsr = u32::from_le_bytes(after.fx[24..28].try_into().expect("4 bytes"));
        if !matches!(native.end, End::Exception { vector: 14, .. }) {
            s.cr2 = 0;
        }
        let mut now = before.clone();
        for ((page, _), bytes) in DATA_PAGES.iter().zip(host.data().chunks_exact(4096)) {
            now.set(DATA + (page << 12), bytes);
        }
        // What the kernel makes of DR6 is not the processor's.
        outcome.state.dr6 = self.expected_state(&start, &outcome).0.dr6;
        let mut found = self.check_but_ticks(&start, &outcome);
        found.extend(self.check_memory(&before, &now, &outcome));
        found
    }
}

/// Two machines for each mode, which are used again and again.
pub struct Machines<'a> {
    engine: &'a dyn Engine,
    machines: Vec<[Machine; 2]>,
}

impl<'a> Machines<'a> {
    pub fn new(engine: &'a dyn Engine) -> Machines<'a> {
        Machines {
            engine,
            machines: Vec::new(),
        }
    }

    fn of(&mut self, mode: Mode) -> &mut [Machine; 2] {
        let found = self.machines.iter().position(|m| m[0].mode == mode);
        let n = found.unwrap_or_else(|| {
            self.machines
                .push([(); 2].map(|()| Machine::new(self.engine, mode, 1)));
            self.machines.len() - 1
        });
        &mut self.machines[n]
    }
}

/// Whether two states are the same as far as time does not matter.
pub fn same_state(a: &CpuState, b: &CpuState) -> bool {
    a.differences(b).iter().all(|e| !e.comparable())
}

/// The same for outcomes.
pub fn same(a: &Outcome, b: &Outcome) -> bool {
    let mut state = a.state.clone();
    if matches!(a.end, End::Exception { .. }) {
        let differences = a.state.rflags ^ b.state.rflags;
        state.rflags ^= differences & crate::FORGOTTEN;
    }
    a.end == b.end && a.ticks == b.ticks && same_state(&state, &b.state)
}

/// Ranges of memory.
#[derive(Clone, PartialEq, Eq)]
struct Memory(Vec<(u64, Vec<u8>)>);

impl Memory {
    fn set(&mut self, at: u64, new: &[u8]) {
        for (start, bytes) in &mut self.0 {
            for (address, byte) in (at..).zip(new) {
                if let Some(cell) = bytes.get_mut(address.wrapping_sub(*start) as usize) {
                    *cell = *byte;
                }
            }
        }
    }

    /// Addresses, with the bytes here and there, where they differ.
    fn differences<'a>(&'a self, other: &'a Memory) -> impl Iterator<Item = (u64, u8, u8)> + 'a {
        let ranges = self.0.iter().zip(&other.0).filter(|(a, b)| a != b);
        ranges.flat_map(|((start, a), (_, b))| {
            let cells = (*start..).zip(a.iter().zip(b));
            cells
                .filter(|(_, (a, b))| a != b)
                .map(|(at, (a, b))| (at, *a, *b))
        })
    }
}

/// The programs' memory, and what else the line is about.
fn memory(machine: &Machine, named: &[(String, String)]) -> Memory {
    let code = [0, 1].map(|page| CODE + (page << 12));
    let data = DATA_PAGES.map(|(page, _)| DATA + (page << 12));
    let pages = code.iter().chain(&data).map(|at| (*at, 4096));
    let cells = Case::memory(named)
        .into_iter()
        .map(|(at, bytes)| (at, bytes.len()));
    Memory(
        pages
            .chain(cells)
            .map(|(at, len)| (at, machine.bytes(at, len)))
            .collect(),
    )
}
