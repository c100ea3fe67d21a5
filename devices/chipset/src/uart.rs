//! A serial port: the registers of [`uart16550`](crate::uart16550) joined to a byte sink, an input port, an
//! interrupt line and the clock.
//!
//! Written here rather than taken from `vm-superio`: that crate's serial port has neither trigger levels nor the
//! character time-out nor modem-status changes, and takes its own time, while a port here must be saved exactly and be
//! driven by guest time.
//!
//! Output: each byte goes to the sink at once, after the port's lock has been given back, so the sink may offer input.
//! Input: [`InputPort::offer`] takes what fits the receive FIFO; after it took less than everything, the callback of
//! [`Uart::on_room`] is called as soon as the guest has emptied the FIFO.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use lodger_address_space::BusTarget;
use lodger_clock::{InputPort, SharedClock};
use lodger_device_model::{Device, IrqLine, Payload, RestoreError};

use crate::alarm::Alarm;
use crate::uart16550::{Uart16550, saved};

/// I/O ports and interrupt lines of the PC's serial ports ttyS0 to ttyS3, in order.
pub const UART_PORTS: [(u16, u32); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];
/// Length of a serial port's block of I/O ports.
pub const UART_LEN: u64 = 8;

const KIND: &str = "uart16550";

/// Where a device's output goes. Called on a vCPU's thread for each piece, in order.
pub type ByteSink = Box<dyn Fn(&[u8]) + Send + Sync>;

/// How a [`Uart`] is made.
pub struct UartConfig {
    /// The device's name, such as `uart0`.
    pub name: String,
}

/// A serial port.
pub struct Uart {
    // Fixed configuration.
    name: String,

    // Runtime glue.
    clock: SharedClock,
    irq: IrqLine,
    alarm: Alarm,
    output: ByteSink,
    on_room: OnceLock<Box<dyn Fn() + Send + Sync>>,

    // Volatile state, and what of the glue needs the same lock.
    state: Mutex<State>,
}

struct State {
    registers: Uart16550,
    /// An offer was cut short: the backend wants to hear of room. Not saved, because `resume` asks anyway.
    starved: bool,
    paused: bool,
}

impl Uart {
    /// A port after power-on, which writes to `output` and interrupts through `irq`.
    pub fn new(
        config: UartConfig,
        clock: SharedClock,
        irq: IrqLine,
        output: ByteSink,
    ) -> Arc<Uart> {
        Arc::new_cyclic(|weak| Uart {
            name: config.name,
            alarm: Alarm::new(&clock, weak, Uart::ring),
            clock,
            irq,
            output,
            on_room: OnceLock::new(),
            state: Mutex::new(State {
                registers: Uart16550::new(),
                starved: false,
                paused: false,
            }),
        })
    }

    /// Sets what is called, without any lock, when the port can take input again after a short
    /// [`offer`](InputPort::offer). Only the first call counts.
    pub fn on_room(&self, callback: Box<dyn Fn() + Send + Sync>) {
        let _ = self.on_room.set(callback);
    }

    /// The other side sends a break (Linux: the attention key of the serial console).
    pub fn send_break(&self) {
        self.access(|registers, now| registers.receive_break(now));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a user of this port panicked")
    }

    fn ring(&self) {
        self.access(|_, _| self.alarm.rung());
    }

    /// Does one thing with the registers and lets lines, timer and backend know of the outcome.
    fn access<R>(&self, act: impl FnOnce(&mut Uart16550, u64) -> R) -> R {
        let mut state = self.lock();
        let now = self.clock.now();
        state.registers.catch_up(now);
        let result = act(&mut state.registers, now);
        self.irq.set(state.registers.interrupt());
        self.alarm.set(state.registers.deadline());
        let call = state.starved && !state.paused && state.registers.hungry();
        state.starved &= !call;
        drop(state);
        if call {
            self.tell_room();
        }
        result
    }

    fn tell_room(&self) {
        if let Some(callback) = self.on_room.get() {
            callback();
        }
    }

    fn install(&self, state: &mut State, registers: Uart16550) {
        self.irq.import(registers.interrupt());
        self.alarm.set(registers.deadline());
        state.registers = registers;
    }
}

impl BusTarget for Uart {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = self.access(|r, now| r.read(register, now));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (register, &byte) in (offset..).zip(data) {
            if let Some(sent) = self.access(|r, now| r.write(register, byte, now)) {
                (self.output)(&[sent]);
            }
        }
    }
}

impl InputPort for Uart {
    fn offer(&self, data: &[u8]) -> usize {
        let mut state = self.lock();
        let mut taken = 0;
        if !state.paused {
            let now = self.clock.now();
            state.registers.catch_up(now);
            taken = state.registers.receive(data, now);
            self.irq.set(state.registers.interrupt());
            self.alarm.set(state.registers.deadline());
        }
        state.starved = taken < data.len();
        taken
    }
}

impl Device for Uart {
    fn name(&self) -> &str {
        &self.name
    }

    fn reset(&self) {
        self.access(|registers, _| *registers = Uart16550::new());
    }

    fn save(&self) -> Payload {
        Payload::encode(KIND, 1, &self.lock().registers.save())
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved: saved::V1 = payload.decode(KIND, 1)?;
        let mut state = self.lock();
        self.install(&mut state, Uart16550::restore(saved));
        Ok(())
    }

    fn pause(&self) {
        self.lock().paused = true;
    }

    fn resume(&self) {
        self.lock().paused = false;
        self.tell_room();
    }

    fn as_pio(&self) -> Option<&dyn BusTarget> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rig;
    use lodger_device_model::assert_round_trip;

    fn rig() -> (Rig, Arc<Uart>) {
        let rig = Rig::new();
        let config = UartConfig {
            name: "uart0".into(),
        };
        let uart = Uart::new(config, rig.clock.clone(), rig.line(4), rig.sink());
        rig.space
            .ports
            .map(0x3f8, UART_LEN, uart.clone() as _)
            .unwrap();
        (rig, uart)
    }

    /// Runs a script with the words `type HEX..` (input; answers how many bytes were taken), `out` and `break`.
    fn run(rig: &Rig, uart: &Uart, script: &str) {
        rig.run_with(script, |words| match words[0] {
            "type" => {
                let bytes = words[1..].iter().map(|b| u8::from_str_radix(b, 16));
                let bytes: Vec<u8> = bytes.map(Result::unwrap).collect();
                uart.offer(&bytes).to_string()
            }
            "fill" => uart
                .offer(&vec![0x61; words[1].parse().unwrap()])
                .to_string(),
            "out" => String::from_utf8(rig.take_output()).unwrap(),
            "break" => {
                uart.send_break();
                String::new()
            }
            other => panic!("{other}"),
        });
    }

    #[test]
    fn register_scripts() {
        for (what, script) in [
            (
                "after power-on nothing waits and the transmitter is empty",
                "r 3f9 = 00; r 3fa = 01; r 3fb = 00; r 3fc = 00; r 3fd = 60; r 3fe = b0; irq 4 = 0",
            ),
            (
                "bytes go out at once, and a word access is two register accesses",
                "w 3f8 48; w 3f8 69; out = Hi; w 3ff 77; r 3fe = 77b0; w 3f8 0141; out = A; r 3f9 = 01",
            ),
            (
                "the divisor lies behind DLAB",
                "w 3fb 83; w 3f8 34; w 3f9 12; r 3f8 = 1234; w 3fb 03; r 3f8 = 0000; out =",
            ),
            (
                "FIFOs, their identification, and reserved bits that stay zero",
                "w 3fa c7; r 3fa = c1; w 3fa 00; r 3fa = 01; w 3f9 ff; r 3f9 = 0f; w 3fc ff; r 3fc = 1f",
            ),
            (
                "Linux's test of the transmitter-empty interrupt",
                "w 3fc 08; w 3f9 02; irq 4 = 1; r 3fa = 02; irq 4 = 0; r 3fa = 01; w 3f9 00; w 3f9 02;
                 r 3fa = 02; w 3f9 00; w 3f8 41; r 3fa = 01; w 3f9 02; irq 4 = 1; w 3f8 41; r 3fa = 02;
                 w 3f8 42; r 3fa = 02",
            ),
            (
                "OUT2 gates the line",
                "w 3f9 02; irq 4 = 0; w 3fc 08; irq 4 = 1; w 3fc 18; irq 4 = 0",
            ),
            (
                "Linux's loopback test, and delta bits",
                "w 3fc 1a; r 3fe = 92; w 3fc 15; r 3fe = 6b; r 3fe = 60; w 3fc 11; r 3fe = 24; w 3fc 00;
                 r 3fe = b9",
            ),
            (
                "the modem-status interrupt",
                "w 3f9 08; w 3fc 1d; w 3fc 0b; irq 4 = 1; r 3fa = 00; r 3fe = b5; irq 4 = 0",
            ),
            (
                "without FIFO a byte interrupts at once and the next must wait",
                "w 3fc 08; w 3f9 01; type 41 42 = 1; irq 4 = 1; r 3fa = 04; r 3fd = 61; r 3f8 = 41;
                 irq 4 = 0; r 3fd = 60",
            ),
            (
                "below the trigger level input interrupts after four character times",
                "w 3fb 83; w 3f8 01; w 3f9 00; w 3fb 03; w 3fa 81; w 3fc 08; w 3f9 01; type 31 32 = 2;
                 irq 4 = 0; t 347us; irq 4 = 0; r 3fd = 61; t 1us; irq 4 = 1; r 3fa = cc; r 3f8 = 31;
                 irq 4 = 0; t 1ms; irq 4 = 1; r 3f8 = 32; irq 4 = 0; t 1s; irq 4 = 0",
            ),
            (
                "at the trigger level input interrupts at once; the FIFO takes sixteen",
                "w 3fa 81; w 3fc 08; w 3f9 01; fill 7 = 7; irq 4 = 0; fill 1 = 1; r 3fa = c4; fill 20 = 8;
                 fill 1 = 0; r 3fd = 61; r 3f8 = 61; fill 20 = 1; w 3fa 83; irq 4 = 0; r 3fd = 60",
            ),
            (
                "overrun in loopback: line status has the highest priority",
                "w 3fc 18; w 3f9 07; w 3f8 01; w 3f8 02; r 3fa = 06; r 3fd = 63; r 3fa = 04; r 3f8 = 02;
                 r 3fa = 02; out =; type 33 = 0",
            ),
            (
                "a break is a zero byte with an error",
                "w 3fa 01; break; type 41 = 1; r 3fd = f1; r 3fd = 61; r 3f8 = 00; r 3f8 = 41",
            ),
            (
                "a divisor of zero does not put input off for ever",
                "w 3fb 80; w 3f8 00; w 3f9 00; w 3fb 00; w 3fa c1; w 3f9 01; w 3fc 08; type 41 = 1; t 40ms;
                 irq 4 = 1",
            ),
        ] {
            let (rig, uart) = rig();
            println!("{what}");
            run(&rig, &uart, script);
        }
    }

    #[test]
    fn the_backend_hears_of_room_once_the_guest_has_read_everything() {
        let (rig, uart) = rig();
        let calls = Arc::new(Mutex::new(0));
        let (counter, weak) = (Arc::clone(&calls), Arc::downgrade(&uart));
        uart.on_room(Box::new(move || {
            *counter.lock().unwrap() += 1;
            // The backend may offer from within the callback.
            weak.upgrade().unwrap().offer(b"cd");
        }));
        assert_eq!(uart.offer(b"ab"), 1);
        rig.run("r 3f8 = 61");
        assert_eq!(*calls.lock().unwrap(), 1);
        rig.run("w 3fc 10; r 3f8 = 63");
        assert_eq!(*calls.lock().unwrap(), 1, "not while in loopback");
        rig.run("w 3fc 00");
        assert_eq!(*calls.lock().unwrap(), 2);
        uart.pause();
        assert_eq!(uart.offer(b"x"), 0);
        uart.resume();
        assert_eq!(*calls.lock().unwrap(), 3);
    }

    #[test]
    fn state_survives() {
        let (rig, uart) = rig();
        run(
            &rig,
            &uart,
            "w 3fa c1; w 3fc 08; w 3f9 03; type 41 42 = 2; edges 4 = 1",
        );
        assert_round_trip(&*uart);
        // Neither the level nor the running time-out is lost, and restoring makes no edge.
        run(
            &rig,
            &uart,
            "edges 4 = 0; irq 4 = 1; r 3fa = c2; irq 4 = 0; t 1s; irq 4 = 1; r 3f8 = 41",
        );
    }

    #[test]
    fn hostile_accesses() {
        let (rig, uart) = rig();
        rig.hammer(&[(0x3f6, 12)], &[], &[&*uart]);
        uart.offer(&[0; 100]);
    }
}
