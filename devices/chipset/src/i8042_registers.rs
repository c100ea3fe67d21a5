//! The registers of the PC/AT keyboard controller (8042; IBM PC/AT Technical Reference, 1985, section 4),
//! without a keyboard or a mouse.
//!
//! Drivers wait up to half a second for a controller that does not answer, so this one answers everything at
//! once: its own commands properly, a byte for the missing keyboard with a time-out error, and the tests of
//! the missing auxiliary port with "clock line stuck", from which a driver concludes that there is no such
//! port.

/// Output buffer full.
const STATUS_FULL: u8 = 1;
const STATUS_SYSTEM: u8 = 4;
/// The last write went to the command port.
const STATUS_COMMAND: u8 = 8;
const STATUS_NOT_LOCKED: u8 = 0x10;
const STATUS_TIMEOUT: u8 = 0x40;

const MODE_INTERRUPT: u8 = 1;
const MODE_SYSTEM: u8 = 4;
const MODE_KEYBOARD_OFF: u8 = 0x10;
const MODE_AUX_OFF: u8 = 0x20;
const MODE_TRANSLATE: u8 = 0x40;

const OUTPUT_NO_RESET: u8 = 1;
const OUTPUT_A20: u8 = 2;
const OUTPUT_FULL: u8 = 0x10;

const SELF_TEST_PASSED: u8 = 0x55;
const CLOCK_STUCK: u8 = 2;
const RESEND: u8 = 0xfe;

const READ_MODE: u8 = 0x20;
const WRITE_MODE: u8 = 0x60;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const WRITE_KEYBOARD_BUFFER: u8 = 0xd2;
const WRITE_AUX_BUFFER: u8 = 0xd3;
const WRITE_AUX: u8 = 0xd4;

/// See the module documentation.
pub(crate) struct I8042Registers {
    /// The controller's command byte.
    mode: u8,
    /// The output buffer, and the status bits that belong to its byte.
    output: u8,
    output_status: u8,
    /// The command that awaits a byte at the data port.
    awaiting: Option<u8>,
    last_was_command: bool,
    /// The A20 gate. It is remembered, but all engines have it open for good.
    a20: bool,
}

/// Saved forms.
pub(crate) mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub(crate) struct V1 {
        pub(super) mode: u8,
        pub(super) output: u8,
        pub(super) output_status: u8,
        pub(super) awaiting: Option<u8>,
        pub(super) last_was_command: bool,
        pub(super) a20: bool,
    }
}

/// The guest asks for a reset of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ResetAsked;

impl I8042Registers {
    /// As a BIOS leaves it.
    pub(crate) fn new() -> I8042Registers {
        I8042Registers {
            mode: MODE_INTERRUPT | MODE_SYSTEM | MODE_AUX_OFF | MODE_TRANSLATE,
            output: 0,
            output_status: 0,
            awaiting: None,
            last_was_command: false,
            a20: true,
        }
    }

    pub(crate) fn save(&self) -> saved::V1 {
        let I8042Registers {
            mode,
            output,
            output_status,
            awaiting,
            last_was_command,
            a20,
        } = self;
        saved::V1 {
            mode: *mode,
            output: *output,
            output_status: *output_status,
            awaiting: *awaiting,
            last_was_command: *last_was_command,
            a20: *a20,
        }
    }

    pub(crate) fn restore(state: saved::V1) -> I8042Registers {
        I8042Registers {
            mode: state.mode,
            output: state.output,
            output_status: state.output_status & (STATUS_FULL | STATUS_TIMEOUT),
            awaiting: state.awaiting,
            last_was_command: state.last_was_command,
            a20: state.a20,
        }
    }

    /// The level of the keyboard's interrupt line.
    pub(crate) fn irq(&self) -> bool {
        self.output_status & STATUS_FULL != 0 && self.mode & MODE_INTERRUPT != 0
    }

    /// Reads the data port.
    pub(crate) fn read_data(&mut self) -> u8 {
        self.output_status = 0;
        self.output
    }

    /// Reads the status port.
    pub(crate) fn read_status(&self) -> u8 {
        let system = match self.mode & MODE_SYSTEM {
            0 => 0,
            _ => STATUS_SYSTEM,
        };
        let command = match self.last_was_command {
            true => STATUS_COMMAND,
            false => 0,
        };
        self.output_status | system | command | STATUS_NOT_LOCKED
    }

    /// Writes the data port.
    pub(crate) fn write_data(&mut self, value: u8) -> Option<ResetAsked> {
        self.last_was_command = false;
        match self.awaiting.take() {
            Some(WRITE_MODE) => self.mode = value,
            Some(WRITE_OUTPUT_PORT) => {
                self.a20 = value & OUTPUT_A20 != 0;
                return (value & OUTPUT_NO_RESET == 0).then_some(ResetAsked);
            }
            // The byte comes back, and not as one of the auxiliary port.
            Some(WRITE_KEYBOARD_BUFFER | WRITE_AUX_BUFFER) => self.answer(value),
            Some(_) => self.answer_for_nobody(),
            None => {
                self.mode &= !MODE_KEYBOARD_OFF;
                self.answer_for_nobody();
            }
        }
        None
    }

    /// Writes the command port.
    pub(crate) fn write_command(&mut self, command: u8) -> Option<ResetAsked> {
        self.last_was_command = true;
        self.awaiting = None;
        match command {
            READ_MODE => self.answer(self.mode),
            WRITE_MODE | WRITE_OUTPUT_PORT..=WRITE_AUX => self.awaiting = Some(command),
            0xa7 => self.mode |= MODE_AUX_OFF,
            0xa8 => self.mode &= !MODE_AUX_OFF,
            0xa9 => self.answer(CLOCK_STUCK),
            0xaa => {
                self.mode |= MODE_SYSTEM;
                self.answer(SELF_TEST_PASSED);
            }
            0xab => self.answer(0),
            0xad => self.mode |= MODE_KEYBOARD_OFF,
            0xae => self.mode &= !MODE_KEYBOARD_OFF,
            // The input port: not locked.
            0xc0 => self.answer(0x80),
            0xd0 => {
                let full = match self.output_status & STATUS_FULL {
                    0 => 0,
                    _ => OUTPUT_FULL,
                };
                let a20 = if self.a20 { OUTPUT_A20 } else { 0 };
                self.answer(OUTPUT_NO_RESET | a20 | full);
            }
            0xdd => self.a20 = false,
            0xdf => self.a20 = true,
            0xe0 => self.answer(0),
            // Pulses the lines of the output port whose bits are 0.
            0xf0.. => return (command & OUTPUT_NO_RESET == 0).then_some(ResetAsked),
            _ => {}
        }
        None
    }

    /// Reads the fast A20 port.
    pub(crate) fn read_fast_a20(&self) -> u8 {
        if self.a20 { OUTPUT_A20 } else { 0 }
    }

    /// Writes the fast A20 port, whose bit 0 resets.
    pub(crate) fn write_fast_a20(&mut self, value: u8) -> Option<ResetAsked> {
        self.a20 = value & OUTPUT_A20 != 0;
        (value & 1 != 0).then_some(ResetAsked)
    }

    fn answer(&mut self, byte: u8) {
        self.output = byte;
        self.output_status = STATUS_FULL;
    }

    fn answer_for_nobody(&mut self) {
        self.answer(RESEND);
        self.output_status |= STATUS_TIMEOUT;
    }
}
