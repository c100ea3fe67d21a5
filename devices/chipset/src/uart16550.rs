//! The registers of a 16550A UART (National Semiconductor PC16550D data sheet, June 1995), without time or lines.
//!
//! A byte that is written is on the wire at once, so the transmitter is always empty and its FIFO is never
//! seen; the transmitter-empty *interrupt* still follows the data sheet (raised when the holding register
//! becomes empty or the interrupt is enabled while it is, cleared by reading it from IIR), because drivers
//! test for that. Reception keeps its FIFO, trigger levels and character time-out. Characters have eight bits
//! whatever LCR says, so that a guest that never sets it still has a console. The modem inputs say
//! "connected" for ever.

use std::collections::VecDeque;

use lodger_clock::Nanos;

/// Depth of the receive FIFO in bytes.
pub(crate) const FIFO: usize = 16;

/// Frequency at the baud-rate generator, in Hz; 115200 baud is divisor 1.
const CLOCK_HZ: u64 = 1_843_200;
/// An unprogrammed divisor must not let the character time-out take half a minute.
const MAX_TIMEOUT: Nanos = 40_000_000;

const IER_RECEIVED: u8 = 1;
const IER_TRANSMIT_EMPTY: u8 = 2;
const IER_LINE_STATUS: u8 = 4;
const IER_MODEM_STATUS: u8 = 8;

const IIR_MODEM_STATUS: u8 = 0x0;
const IIR_NONE: u8 = 0x1;
const IIR_TRANSMIT_EMPTY: u8 = 0x2;
const IIR_RECEIVED: u8 = 0x4;
const IIR_LINE_STATUS: u8 = 0x6;
const IIR_TIMEOUT: u8 = 0xc;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 1;
const FCR_RESET_RECEIVER: u8 = 2;

const LCR_BREAK: u8 = 0x40;
const LCR_DLAB: u8 = 0x80;

const MCR_OUT2: u8 = 8;
const MCR_LOOP: u8 = 0x10;

const LSR_DATA_READY: u8 = 1;
const LSR_OVERRUN: u8 = 2;
const LSR_BREAK: u8 = 0x10;
/// Holding register and shift register empty.
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;
const LSR_FIFO_ERROR: u8 = 0x80;

/// CTS, DSR and DCD asserted, no ring.
const CONNECTED: u8 = 0xb0;
const MSR_RING: u8 = 0x40;

/// A received character and the line-status errors that came with it.
type Received = (u8, u8);

/// See the module documentation.
pub(crate) struct Uart16550 {
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    /// Changes of the modem inputs since MSR was read.
    modem_changes: u8,
    overrun: bool,
    transmit_empty_pending: bool,
    receiver: VecDeque<Received>,
    /// When what waits in the FIFO below the trigger level becomes an interrupt.
    timeout_at: Option<Nanos>,
    timed_out: bool,
}

/// Saved forms.
pub(crate) mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub(crate) struct V1 {
        pub(super) divisor: u16,
        pub(super) ier: u8,
        pub(super) fcr: u8,
        pub(super) lcr: u8,
        pub(super) mcr: u8,
        pub(super) scratch: u8,
        pub(super) modem_changes: u8,
        pub(super) overrun: bool,
        pub(super) transmit_empty_pending: bool,
        pub(super) receiver: Vec<(u8, u8)>,
        pub(super) timeout_at: Option<u64>,
        pub(super) timed_out: bool,
    }
}

impl Uart16550 {
    /// After power-on: 9600 baud, everything off.
    pub(crate) fn new() -> Uart16550 {
        Uart16550 {
            divisor: 12,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scratch: 0,
            modem_changes: 0,
            overrun: false,
            transmit_empty_pending: false,
            receiver: VecDeque::with_capacity(FIFO),
            timeout_at: None,
            timed_out: false,
        }
    }

    pub(crate) fn save(&self) -> saved::V1 {
        let Uart16550 {
            divisor,
            ier,
            fcr,
            lcr,
            mcr,
            scratch,
            modem_changes,
            overrun,
            transmit_empty_pending,
            receiver,
            timeout_at,
            timed_out,
        } = self;
        saved::V1 {
            divisor: *divisor,
            ier: *ier,
            fcr: *fcr,
            lcr: *lcr,
            mcr: *mcr,
            scratch: *scratch,
            modem_changes: *modem_changes,
            overrun: *overrun,
            transmit_empty_pending: *transmit_empty_pending,
            receiver: receiver.iter().copied().collect(),
            timeout_at: *timeout_at,
            timed_out: *timed_out,
        }
    }

    pub(crate) fn restore(state: saved::V1) -> Uart16550 {
        let mut receiver = VecDeque::from(state.receiver);
        receiver.truncate(FIFO);
        Uart16550 {
            divisor: state.divisor,
            ier: state.ier,
            fcr: state.fcr,
            lcr: state.lcr,
            mcr: state.mcr,
            scratch: state.scratch,
            modem_changes: state.modem_changes,
            overrun: state.overrun,
            transmit_empty_pending: state.transmit_empty_pending,
            receiver,
            timeout_at: state.timeout_at,
            timed_out: state.timed_out,
        }
    }

    /// Lets the time go on to `now`; precedes every other call.
    pub(crate) fn catch_up(&mut self, now: Nanos) {
        if self.timeout_at.is_some_and(|at| at <= now) {
            self.timeout_at = None;
            self.timed_out = true;
        }
    }

    /// When `catch_up` will change something.
    pub(crate) fn deadline(&self) -> Option<Nanos> {
        self.timeout_at
    }

    /// Reads register `offset` (0..8) at time `now`.
    pub(crate) fn read(&mut self, offset: u64, now: Nanos) -> u8 {
        let dlab = self.lcr & LCR_DLAB != 0;
        match offset {
            0 if dlab => self.divisor as u8,
            1 if dlab => (self.divisor >> 8) as u8,
            0 => {
                let byte = self.receiver.pop_front().map_or(0, |(byte, _)| byte);
                self.restart_timeout(now);
                byte
            }
            1 => self.ier,
            2 => {
                let source = self.source();
                if source == IIR_TRANSMIT_EMPTY {
                    self.transmit_empty_pending = false;
                }
                source | if self.fifo_enabled() { IIR_FIFO } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let status = self.line_status();
                self.overrun = false;
                if let Some((_, errors)) = self.receiver.front_mut() {
                    *errors = 0;
                }
                status
            }
            6 => self.modem_inputs() | std::mem::take(&mut self.modem_changes),
            _ => self.scratch,
        }
    }

    /// Writes register `offset` (0..8) at time `now`; returns the byte that goes out on the wire, if any.
    pub(crate) fn write(&mut self, offset: u64, value: u8, now: Nanos) -> Option<u8> {
        let dlab = self.lcr & LCR_DLAB != 0;
        match offset {
            0 if dlab => self.divisor = self.divisor & 0xff00 | u16::from(value),
            1 if dlab => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            0 => {
                self.transmit_empty_pending = true;
                if self.mcr & MCR_LOOP == 0 {
                    return Some(value);
                }
                self.push((value, 0), now);
            }
            1 => {
                let changed = (self.ier ^ value) & IER_TRANSMIT_EMPTY;
                self.ier = value & 0xf;
                if changed != 0 {
                    self.transmit_empty_pending = value & IER_TRANSMIT_EMPTY != 0;
                }
            }
            2 => {
                let toggled = (self.fcr ^ value) & FCR_ENABLE != 0;
                self.fcr = if value & FCR_ENABLE != 0 {
                    value & 0xc1
                } else {
                    0
                };
                if toggled || value & FCR_RESET_RECEIVER != 0 {
                    self.receiver.clear();
                    self.restart_timeout(now);
                }
            }
            3 => {
                let begins = value & !self.lcr & LCR_BREAK != 0;
                self.lcr = value;
                if begins && self.mcr & MCR_LOOP != 0 {
                    self.push((0, LSR_BREAK), now);
                }
            }
            4 => {
                let before = self.modem_inputs();
                self.mcr = value & 0x1f;
                let after = self.modem_inputs();
                // The ring indicator counts only when it ends.
                let changes = (before ^ after) & !MSR_RING | before & !after & MSR_RING;
                self.modem_changes |= changes >> 4;
            }
            5 | 6 => {}
            _ => self.scratch = value,
        }
        None
    }

    /// Takes characters from the wire, as many as fit; returns how many.
    pub(crate) fn receive(&mut self, data: &[u8], now: Nanos) -> usize {
        let count = data.len().min(self.room());
        for &byte in &data[..count] {
            self.push((byte, 0), now);
        }
        count
    }

    /// A break condition comes in from the wire.
    pub(crate) fn receive_break(&mut self, now: Nanos) {
        if self.mcr & MCR_LOOP == 0 {
            self.push((0, LSR_BREAK), now);
        }
    }

    /// How many characters can be received without loss.
    pub(crate) fn room(&self) -> usize {
        match self.mcr & MCR_LOOP {
            0 => self.capacity().saturating_sub(self.receiver.len()),
            _ => 0,
        }
    }

    /// Whether nothing waits to be read by the guest, and the receiver is connected.
    pub(crate) fn hungry(&self) -> bool {
        self.receiver.is_empty() && self.room() > 0
    }

    /// The level of the interrupt line: OUT2 gates it, as on a PC.
    pub(crate) fn interrupt(&self) -> bool {
        self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 && self.source() != IIR_NONE
    }

    fn fifo_enabled(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifo_enabled() { FIFO } else { 1 }
    }

    fn trigger_level(&self) -> usize {
        match (self.fifo_enabled(), self.fcr >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        }
    }

    /// The enabled interrupt of the highest priority (data sheet, table III).
    fn source(&self) -> u8 {
        let errors = self.overrun || self.receiver.front().is_some_and(|&(_, e)| e != 0);
        if errors && self.ier & IER_LINE_STATUS != 0 {
            IIR_LINE_STATUS
        } else if self.receiver.len() >= self.trigger_level() && self.ier & IER_RECEIVED != 0 {
            IIR_RECEIVED
        } else if self.timed_out && self.ier & IER_RECEIVED != 0 {
            IIR_TIMEOUT
        } else if self.transmit_empty_pending && self.ier & IER_TRANSMIT_EMPTY != 0 {
            IIR_TRANSMIT_EMPTY
        } else if self.modem_changes != 0 && self.ier & IER_MODEM_STATUS != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    fn line_status(&self) -> u8 {
        let mut status = LSR_TRANSMITTER_EMPTY;
        if let Some((_, errors)) = self.receiver.front() {
            status |= LSR_DATA_READY | errors;
        }
        if self.overrun {
            status |= LSR_OVERRUN;
        }
        if self.fifo_enabled() && self.receiver.iter().any(|&(_, e)| e != 0) {
            status |= LSR_FIFO_ERROR;
        }
        status
    }

    /// CTS, DSR, RI, DCD in the upper half of MSR; in loopback they are RTS, DTR, OUT1, OUT2.
    fn modem_inputs(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return CONNECTED;
        }
        let (dtr, rts) = (self.mcr & 1, self.mcr >> 1 & 1);
        let (out1, out2) = (self.mcr >> 2 & 1, self.mcr >> 3 & 1);
        rts << 4 | dtr << 5 | out1 << 6 | out2 << 7
    }

    fn push(&mut self, character: Received, now: Nanos) {
        if self.receiver.len() >= self.capacity() {
            self.overrun = true;
            // Without FIFO the new character takes the place of the old one; with it, it is lost.
            if self.fifo_enabled() {
                return;
            }
            self.receiver.clear();
        }
        self.receiver.push_back(character);
        self.restart_timeout(now);
    }

    /// The FIFO was touched: what is left in it times out four character times from now.
    fn restart_timeout(&mut self, now: Nanos) {
        self.timed_out = false;
        self.timeout_at = (self.fifo_enabled() && !self.receiver.is_empty()).then(|| {
            let parity = u64::from(self.lcr >> 3 & 1);
            let stop = 1 + u64::from(self.lcr >> 2 & 1);
            let bits = 1 + 5 + u64::from(self.lcr & 3) + parity + stop;
            let divisor = match self.divisor {
                0 => 0x1_0000,
                d => u64::from(d),
            };
            let wait = 4 * bits * divisor * 16 * 1_000_000_000 / CLOCK_HZ;
            now.saturating_add(wait.min(MAX_TIMEOUT))
        });
    }
}
