//! The registers of the PC's two cascaded 8259A interrupt controllers (Intel 8259A data sheet, December 1988) with the
//! edge/level control registers of the PIIX (82371AB data sheet, section 4.1.5), without locks or lines.
//!
//! As in the PIIX, LTIM of ICW1 has no effect (ELCR decides) and MCS-80 mode does not exist. A falling edge
//! does not withdraw a latched edge request, so a device may pulse its line.

/// The master's input that the slave is connected to.
const CASCADE: u8 = 2;
/// The inputs that ELCR can make level-triggered; the timer, keyboard, cascade, clock and coprocessor stay edges.
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];

/// One 8259A.
#[derive(Clone, Default)]
struct Chip {
    /// Levels of the inputs.
    lines: u8,
    /// Rising edges that have not been acknowledged.
    edges: u8,
    /// Inputs that are level-triggered.
    elcr: u8,
    in_service: u8,
    mask: u8,
    /// ICW2: the vector of input 0.
    base: u8,
    /// The input that has the highest priority.
    first: u8,
    /// The next initialisation command word to come (2, 3, 4), or 0 after initialisation.
    expected_icw: u8,
    /// ICW1: no ICW3 comes.
    single: bool,
    /// ICW1: an ICW4 comes.
    wants_icw4: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    read_in_service: bool,
    poll: bool,
}

impl Chip {
    fn requests(&self) -> u8 {
        self.edges & !self.elcr | self.lines & self.elcr
    }

    fn set(&mut self, bit: u8, level: bool) {
        if level {
            self.edges |= bit & !self.lines;
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
    }

    /// The request that would be acknowledged now, if any; `cascade` is the request of the slave.
    fn pending(&self, cascade: u8) -> Option<u8> {
        if self.expected_icw != 0 {
            return None;
        }
        let requests = (self.requests() | cascade) & !self.mask;
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.mask;
        }
        if self.special_fully_nested {
            blocking &= !cascade;
        }
        for step in 0..8 {
            let input = (self.first + step) & 7;
            if blocking & 1 << input != 0 {
                return None;
            }
            if requests & 1 << input != 0 {
                return Some(input);
            }
        }
        None
    }

    fn acknowledge(&mut self, input: u8) {
        self.edges &= !(1 << input);
        if !self.auto_eoi {
            self.in_service |= 1 << input;
        } else if self.rotate_on_auto_eoi {
            self.first = (input + 1) & 7;
        }
    }

    /// The input in service that has the highest priority.
    fn top_in_service(&self) -> Option<u8> {
        (0..8)
            .map(|step| (self.first + step) & 7)
            .find(|input| self.in_service & 1 << input != 0)
    }

    fn read_command_port(&mut self, cascade: u8) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.pending(cascade) {
                Some(input) => {
                    self.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        if self.read_in_service {
            self.in_service
        } else {
            self.requests() | cascade
        }
    }

    fn write_command_port(&mut self, value: u8) {
        match value & 0x18 {
            0x00 => self.write_ocw2(value),
            0x08 => {
                if value & 0x40 != 0 {
                    self.special_mask = value & 0x20 != 0;
                }
                self.poll = value & 4 != 0;
                if value & 2 != 0 {
                    self.read_in_service = value & 1 != 0;
                }
            }
            _ => {
                *self = Chip {
                    lines: self.lines,
                    elcr: self.elcr,
                    base: self.base,
                    expected_icw: 2,
                    single: value & 2 != 0,
                    wants_icw4: value & 1 != 0,
                    ..Chip::default()
                }
            }
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let (rotate, specific, eoi) = (value & 0x80 != 0, value & 0x40 != 0, value & 0x20 != 0);
        let named = value & 7;
        match (specific, eoi) {
            (false, false) => self.rotate_on_auto_eoi = rotate,
            // Set priority; without R it is a no-operation.
            (true, false) => {
                if rotate {
                    self.first = (named + 1) & 7;
                }
            }
            (_, true) => {
                let ended = if specific {
                    Some(named)
                } else {
                    self.top_in_service()
                };
                if let Some(input) = ended {
                    self.in_service &= !(1 << input);
                    if rotate {
                        self.first = (input + 1) & 7;
                    }
                }
            }
        }
    }

    fn write_data_port(&mut self, value: u8) {
        match self.expected_icw {
            0 => self.mask = value,
            2 => {
                self.base = value & 0xf8;
                self.expected_icw = match (self.single, self.wants_icw4) {
                    (false, _) => 3,
                    (true, true) => 4,
                    (true, false) => 0,
                };
            }
            3 => self.expected_icw = if self.wants_icw4 { 4 } else { 0 },
            _ => {
                self.auto_eoi = value & 2 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                self.expected_icw = 0;
            }
        }
    }

    fn save(&self) -> saved::ChipV1 {
        let Chip {
            lines,
            edges,
            elcr,
            in_service,
            mask,
            base,
            first,
            expected_icw,
            single,
            wants_icw4,
            auto_eoi,
            rotate_on_auto_eoi,
            special_fully_nested,
            special_mask,
            read_in_service,
            poll,
        } = self.clone();
        saved::ChipV1 {
            lines,
            edges,
            elcr,
            in_service,
            mask,
            base,
            first,
            expected_icw,
            single,
            wants_icw4,
            auto_eoi,
            rotate_on_auto_eoi,
            special_fully_nested,
            special_mask,
            read_in_service,
            poll,
        }
    }

    fn restore(state: saved::ChipV1) -> Chip {
        Chip {
            lines: state.lines,
            edges: state.edges,
            elcr: state.elcr,
            in_service: state.in_service,
            mask: state.mask,
            base: state.base & 0xf8,
            first: state.first & 7,
            expected_icw: state.expected_icw,
            single: state.single,
            wants_icw4: state.wants_icw4,
            auto_eoi: state.auto_eoi,
            rotate_on_auto_eoi: state.rotate_on_auto_eoi,
            special_fully_nested: state.special_fully_nested,
            special_mask: state.special_mask,
            read_in_service: state.read_in_service,
            poll: state.poll,
        }
    }
}

/// Saved forms.
pub(crate) mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub(crate) struct V1 {
        pub(super) master: ChipV1,
        pub(super) slave: ChipV1,
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct ChipV1 {
        pub(super) lines: u8,
        pub(super) edges: u8,
        pub(super) elcr: u8,
        pub(super) in_service: u8,
        pub(super) mask: u8,
        pub(super) base: u8,
        pub(super) first: u8,
        pub(super) expected_icw: u8,
        pub(super) single: bool,
        pub(super) wants_icw4: bool,
        pub(super) auto_eoi: bool,
        pub(super) rotate_on_auto_eoi: bool,
        pub(super) special_fully_nested: bool,
        pub(super) special_mask: bool,
        pub(super) read_in_service: bool,
        pub(super) poll: bool,
    }
}

/// Which of the two chips.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    /// Inputs 0 to 7.
    Master,
    /// Inputs 8 to 15, connected to the master's input 2.
    Slave,
}

/// The cascaded pair.
#[derive(Default)]
pub(crate) struct Pic8259 {
    master: Chip,
    slave: Chip,
}

impl Pic8259 {
    pub(crate) fn save(&self) -> saved::V1 {
        let Pic8259 { master, slave } = self;
        saved::V1 {
            master: master.save(),
            slave: slave.save(),
        }
    }

    pub(crate) fn restore(state: saved::V1) -> Pic8259 {
        Pic8259 {
            master: Chip::restore(state.master),
            slave: Chip::restore(state.slave),
        }
    }

    /// After power-on; the levels of the inputs, which others drive, stay.
    pub(crate) fn reset(&mut self) {
        for chip in [&mut self.master, &mut self.slave] {
            *chip = Chip {
                lines: chip.lines,
                ..Chip::default()
            };
        }
    }

    /// Input `line` (0..16) has this level now. The cascade input is nobody's to drive.
    pub(crate) fn set(&mut self, line: u32, level: bool) {
        match line {
            0..8 if line != u32::from(CASCADE) => self.master.set(1 << line, level),
            8..16 => self.slave.set(1 << (line - 8), level),
            _ => {}
        }
    }

    /// The same without an edge.
    pub(crate) fn import(&mut self, line: u32, level: bool) {
        let edges = (self.master.edges, self.slave.edges);
        self.set(line, level);
        (self.master.edges, self.slave.edges) = edges;
    }

    /// The level of the INTR output.
    pub(crate) fn output(&self) -> bool {
        self.master.pending(self.cascade()).is_some()
    }

    /// The processor's INTA cycles: the vector of the interrupt, which is in service from now on. A request
    /// that has gone is answered with the master's or slave's input 7 (spurious), which is not in service.
    pub(crate) fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.master.pending(self.cascade()) else {
            return self.master.base + 7;
        };
        self.master.acknowledge(input);
        if input != CASCADE {
            return self.master.base + input;
        }
        match self.slave.pending(0) {
            Some(input) => {
                self.slave.acknowledge(input);
                self.slave.base + input
            }
            None => self.slave.base + 7,
        }
    }

    /// Reads the command port (0) or the data port (1).
    pub(crate) fn read(&mut self, which: Which, port: u64) -> u8 {
        let cascade = self.cascade();
        match (which, port) {
            (Which::Master, 0) => self.master.read_command_port(cascade),
            (Which::Slave, 0) => self.slave.read_command_port(0),
            (Which::Master, _) => self.master.mask,
            (Which::Slave, _) => self.slave.mask,
        }
    }

    /// Writes the command port (0) or the data port (1).
    pub(crate) fn write(&mut self, which: Which, port: u64, value: u8) {
        let chip = match which {
            Which::Master => &mut self.master,
            Which::Slave => &mut self.slave,
        };
        match port {
            0 => chip.write_command_port(value),
            _ => chip.write_data_port(value),
        }
    }

    /// Reads the edge/level register of the master (0) or slave (1).
    pub(crate) fn read_elcr(&self, port: u64) -> u8 {
        match port {
            0 => self.master.elcr,
            _ => self.slave.elcr,
        }
    }

    /// Writes the edge/level register of the master (0) or slave (1).
    pub(crate) fn write_elcr(&mut self, port: u64, value: u8) {
        match port {
            0 => self.master.elcr = value & ELCR_MASK[0],
            _ => self.slave.elcr = value & ELCR_MASK[1],
        }
    }

    fn cascade(&self) -> u8 {
        u8::from(self.slave.pending(0).is_some()) << CASCADE
    }
}
