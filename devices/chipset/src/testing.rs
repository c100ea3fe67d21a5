//! What the tests of this crate share: a bus with a manual clock, recorders for everything a device drives, scripts.
//!
//! A script is steps, one a line or with `;` between them; `#` begins a comment; numbers are hexadecimal but
//! for times and line numbers:
//!
//! ```text
//! w 3f8 41          write port 0x3f8, one byte; the number of digits gives the size
//! r 3fd = 60        read port 0x3fd and compare; `.` is a digit that does not matter
//! W fec00000 10     the same on the memory bus
//! R fec00010 = 0000_0000
//! t 10us            time goes on (ns, us, ms, s)
//! irq 4 = 1         level of a line
//! edges 4 = 2       rising edges of a line since it was last asked
//! word ... = text   anything else: the test's own words
//! ```

use std::sync::{Arc, Mutex};

use lodger_address_space::{AddressSpace, Bus};
use lodger_clock::manual::ManualClock;
use lodger_device_model::{
    Device, IrqLine, IrqSink, MachineControl, MachineRequest, Msi, MsiTarget, assert_round_trip,
};

use crate::ByteSink;

/// 2024-02-29T23:59:58Z, in ns: a leap day's end.
pub const WALL: u64 = 1_709_251_198 * 1_000_000_000;

/// Records what happens to 32 interrupt lines.
#[derive(Default)]
pub struct Lines(Mutex<[Line; 32]>);

#[derive(Default, Clone, Copy)]
struct Line {
    level: bool,
    edges: u32,
}

impl Lines {
    fn with<R>(&self, line: u32, f: impl FnOnce(&mut Line) -> R) -> R {
        f(&mut self.0.lock().unwrap()[line as usize])
    }

    pub fn level(&self, line: u32) -> bool {
        self.with(line, |l| l.level)
    }

    pub fn take_edges(&self, line: u32) -> u32 {
        self.with(line, |l| std::mem::take(&mut l.edges))
    }
}

impl IrqSink for Lines {
    fn set(&self, line: u32, level: bool) {
        self.with(line, |l| {
            l.edges += u32::from(level && !l.level);
            l.level = level;
        });
    }

    fn import(&self, line: u32, level: bool) {
        self.with(line, |l| l.level = level);
    }
}

/// Records requests and messages.
#[derive(Default)]
pub struct Records {
    requests: Mutex<Vec<MachineRequest>>,
    messages: Mutex<Vec<Msi>>,
}

impl MachineControl for Records {
    fn request(&self, request: MachineRequest) {
        self.requests.lock().unwrap().push(request);
    }
}

impl MsiTarget for Records {
    fn send(&self, msi: Msi) {
        self.messages.lock().unwrap().push(msi);
    }
}

/// See the module documentation.
pub struct Rig {
    pub clock: Arc<ManualClock>,
    pub space: AddressSpace,
    pub lines: Arc<Lines>,
    pub records: Arc<Records>,
    pub output: Arc<Mutex<Vec<u8>>>,
}

impl Default for Rig {
    fn default() -> Rig {
        Rig::new()
    }
}

impl Rig {
    pub fn new() -> Rig {
        Rig {
            clock: ManualClock::new(WALL),
            space: AddressSpace::default(),
            lines: Arc::default(),
            records: Arc::default(),
            output: Arc::default(),
        }
    }

    pub fn line(&self, line: u32) -> IrqLine {
        IrqLine::new(Arc::clone(&self.lines) as _, line)
    }

    /// A sink whose bytes gather in `output`.
    pub fn sink(&self) -> ByteSink {
        let output = Arc::clone(&self.output);
        Box::new(move |data| output.lock().unwrap().extend(data))
    }

    /// The bytes that were written since the last call.
    pub fn take_output(&self) -> Vec<u8> {
        std::mem::take(&mut self.output.lock().unwrap())
    }

    pub fn take_requests(&self) -> Vec<MachineRequest> {
        std::mem::take(&mut self.records.requests.lock().unwrap())
    }

    pub fn take_messages(&self) -> Vec<Msi> {
        std::mem::take(&mut self.records.messages.lock().unwrap())
    }

    /// Runs a script of the common words.
    pub fn run(&self, script: &str) {
        self.run_with(script, |words| panic!("no such word: {words:?}"));
    }

    /// Runs a script; `own` answers the words that are not common.
    pub fn run_with(&self, script: &str, mut own: impl FnMut(&[&str]) -> String) {
        let lines = script.lines().map(|line| line.split('#').next().unwrap());
        let steps = lines.flat_map(|line| line.split(';')).map(str::trim);
        for text in steps.filter(|text| !text.is_empty()) {
            let (step, expected) = match text.split_once('=') {
                Some((step, expected)) => (step, expected.trim().replace('_', "")),
                None => (text, String::new()),
            };
            let words: Vec<&str> = step.split_whitespace().collect();
            let found = match words[..] {
                ["w", address, value] => write(&self.space.ports, address, value),
                ["W", address, value] => write(&self.space.mmio, address, value),
                ["r", address] => read(&self.space.ports, address, &expected),
                ["R", address] => read(&self.space.mmio, address, &expected),
                ["t", time] => {
                    self.clock.advance(nanos(time));
                    String::new()
                }
                ["irq", line] => u8::from(self.lines.level(line.parse().unwrap())).to_string(),
                ["edges", line] => self.lines.take_edges(line.parse().unwrap()).to_string(),
                _ => own(&words),
            };
            assert!(matches(&found, &expected), "{text}\nfound {found:?}");
        }
    }

    /// Accesses ports and memory in `ports` and `mmio` (start, length) at random, with time going on at
    /// random, and checks every now and then that each device's state survives being saved and restored.
    pub fn hammer(&self, ports: &[(u64, u64)], mmio: &[(u64, u64)], devices: &[&dyn Device]) {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for round in 0..30_000_u64 {
            let choice = random.below((ports.len() + mmio.len()) as u64) as usize;
            let (bus, (start, len), sizes) = match choice.checked_sub(ports.len()) {
                None => (&self.space.ports, ports[choice], 3),
                Some(i) => (&self.space.mmio, mmio[i], 4),
            };
            let address = start + random.below(len);
            let size = 1 << random.below(sizes);
            let mut data = match random.below(4) {
                0 => [0; 8],
                1 => [0xff; 8],
                2 => (1_u64 << random.below(64)).to_le_bytes(),
                _ => random.next().to_le_bytes(),
            };
            if random.below(3) == 0 {
                bus.read(address, &mut data[..size]);
            } else {
                bus.write(address, &data[..size]);
            }
            match random.below(64) {
                0 => self.clock.advance(random.below(20_000_000)),
                1..16 => self.clock.advance(random.below(5_000)),
                _ => {}
            }
            if round % 100 == 0 {
                devices.iter().for_each(|d| assert_round_trip(*d));
            }
        }
    }
}

/// A deterministic generator (xorshift64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 8) % limit
    }
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn write(bus: &Bus, address: &str, value: &str) -> String {
    let digits = value.replace('_', "");
    bus.write(
        hex(address),
        &hex(&digits).to_le_bytes()[..digits.len() / 2],
    );
    String::new()
}

fn read(bus: &Bus, address: &str, expected: &str) -> String {
    let mut data = [0; 8];
    let size = expected.len() / 2;
    bus.read(hex(address), &mut data[..size]);
    format!("{:0width$x}", u64::from_le_bytes(data), width = size * 2)
}

fn nanos(time: &str) -> u64 {
    let digits = time.trim_end_matches(|c: char| c.is_alphabetic());
    let unit = match &time[digits.len()..] {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        other => panic!("no unit: {other}"),
    };
    digits.parse::<u64>().unwrap() * unit
}

fn matches(found: &str, expected: &str) -> bool {
    found.len() == expected.len()
        && found
            .chars()
            .zip(expected.chars())
            .all(|(f, e)| e == '.' || f == e)
}
