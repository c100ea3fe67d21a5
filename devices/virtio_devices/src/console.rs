//! The console device (section 5.3): port 0 with one queue in each direction.
//!
//! What the host has for the guest comes through [`InputPort`] and waits in a small buffer until the driver offers
//! room. That buffer outlives a reset of the device, so what was typed ahead of the driver is not lost.
//!
//! Limits: no further ports, no emergency write.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use lodger_clock::InputPort;
use lodger_device_model::{Payload, RestoreError};
use lodger_virtio::{
    Activation, ConfigChange, Queue, VirtioDevice, VirtioPci, Wiring, read_config,
};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use crate::workers::Workers;

const KIND: &str = "virtio-console";
/// Feature: the configuration structure has the size of the terminal.
const F_SIZE: u64 = 1 << 0;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Bytes of input that wait for the driver at most.
const WAITING: usize = 4 << 10;
/// Bytes that are written to the host at a time.
const CHUNK: usize = 4 << 10;

/// Takes what the guest prints. It may wait for the host, but not for ever.
pub type Output = Box<dyn Fn(&[u8]) + Send + Sync>;

/// A console beside the serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleSpec {
    /// Columns of the terminal at the start; 0 if unknown.
    #[serde(default)]
    pub columns: u16,
    /// Rows of the terminal at the start; 0 if unknown.
    #[serde(default)]
    pub rows: u16,
}

impl ConsoleSpec {
    /// Makes the device, and the handle by which the host gives it input and sizes. An error says that the host cannot start
    /// its threads.
    pub fn build(
        &self,
        name: &str,
        wiring: &Wiring,
        output: Output,
    ) -> std::io::Result<(Arc<VirtioPci>, Arc<Console>)> {
        let console = Console::new(name, self.columns, self.rows, output)?;
        let device = VirtioPci::new(name, console.clone(), wiring);
        Ok((device, console))
    }
}

/// See the module documentation.
pub struct Console {
    receiver: Workers,
    transmitter: Workers,
    shared: Arc<Shared>,
}

struct Shared {
    // Runtime glue.
    output: Output,
    active: Mutex<Option<Active>>,
    on_room: OnceLock<Box<dyn Fn() + Send + Sync>>,
    state: Mutex<State>,
}

#[derive(Clone)]
struct Active {
    queues: Vec<Arc<Queue>>,
    config_change: ConfigChange,
}

struct State {
    // Runtime glue.
    paused: bool,
    /// Input was refused since the last time there was room.
    refused: bool,
    // Volatile state.
    waiting: VecDeque<u8>,
    columns: u16,
    rows: u16,
    generation: u8,
}

impl Console {
    /// A console that prints to `output`.
    pub fn new(
        name: &str,
        columns: u16,
        rows: u16,
        output: Output,
    ) -> std::io::Result<Arc<Console>> {
        let shared = Arc::new(Shared {
            output,
            active: Mutex::new(None),
            on_room: OnceLock::new(),
            state: Mutex::new(State {
                paused: false,
                refused: false,
                waiting: VecDeque::new(),
                columns,
                rows,
                generation: 0,
            }),
        });
        let (receiving, transmitting) = (Arc::clone(&shared), Arc::clone(&shared));
        Ok(Arc::new(Console {
            receiver: Workers::start(name, 1, move |_, _| receiving.receive())?,
            transmitter: Workers::start(name, 1, move |_, buffer| transmitting.transmit(buffer))?,
            shared,
        }))
    }

    /// The terminal has another size now; the driver is told.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut state = self.shared.state();
        if (state.columns, state.rows) == (columns, rows) {
            return;
        }
        (state.columns, state.rows) = (columns, rows);
        state.generation = state.generation.wrapping_add(1);
        drop(state);
        if let Some(active) = self.shared.active() {
            active.config_change.notify();
        }
    }

    /// `callback` is called when there is room for input after some was refused. It may offer input
    /// itself. Only the first call counts.
    pub fn on_room(&self, callback: Box<dyn Fn() + Send + Sync>) {
        let _ = self.shared.on_room.set(callback);
    }
}

impl InputPort for Console {
    fn offer(&self, data: &[u8]) -> usize {
        let mut state = self.shared.state();
        let room = match state.paused {
            true => 0,
            false => WAITING - state.waiting.len().min(WAITING),
        };
        let taken = data.len().min(room);
        state.waiting.extend(&data[..taken]);
        state.refused |= taken < data.len();
        drop(state);
        if taken > 0 {
            self.receiver.kick();
        }
        taken
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under this lock")
    }

    fn active(&self) -> Option<Active> {
        let active = self.active.lock();
        active.expect("nothing panics under this lock").clone()
    }

    /// Moves waiting input into the driver's buffers.
    fn receive(&self) {
        let Some(active) = self.active() else { return };
        loop {
            // The chain is held before the input is taken: a pause that waits for the chain finds both moved.
            if self.state().waiting.is_empty() {
                break;
            }
            let Some(chain) = active.queues[RECEIVE].pop() else {
                break;
            };
            let input: Vec<u8> = {
                let mut state = self.state();
                let len = state.waiting.len().min(chain.writable_len() as usize);
                state.waiting.drain(..len).collect()
            };
            chain.write_at(0, &input);
            chain.complete(input.len() as u32);
        }
        self.tell_room();
    }

    /// Tells the host if input that was refused would be taken now.
    fn tell_room(&self) {
        let mut state = self.state();
        let room = !state.paused && state.waiting.len() < WAITING;
        let told = room && std::mem::take(&mut state.refused);
        drop(state);
        if let (true, Some(callback)) = (told, self.on_room.get()) {
            callback();
        }
    }

    /// Prints what the driver has for the host.
    fn transmit(&self, buffer: &mut Vec<u8>) {
        let Some(active) = self.active() else { return };
        buffer.resize(CHUNK, 0);
        while let Some(chain) = active.queues[TRANSMIT].pop() {
            let mut at = 0;
            while at < chain.readable_len() {
                let n = chain.read_at(at, buffer);
                (self.output)(&buffer[..n]);
                at += n as u64;
            }
            chain.complete(0);
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_CONSOLE as u16
    }

    fn pci_class(&self) -> u32 {
        0x07_80_00 // communication, other
    }

    fn features(&self) -> u64 {
        F_SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.state();
        let mut config = [0; 12];
        config[..2].copy_from_slice(&state.columns.to_le_bytes());
        config[2..4].copy_from_slice(&state.rows.to_le_bytes());
        config[4] = 1; // ports
        read_config(&config, offset, data);
    }

    fn config_generation(&self) -> u8 {
        self.shared.state().generation
    }

    fn activate(&self, activation: Activation) {
        let active = Active {
            queues: activation.queues,
            config_change: activation.config_change,
        };
        *(self.shared.active.lock()).expect("nothing panics under this lock") = Some(active);
    }

    fn notify(&self, queue: u16) {
        match usize::from(queue) {
            RECEIVE => self.receiver.kick(),
            _ => self.transmitter.kick(),
        }
    }

    fn reset(&self) {
        *(self.shared.active.lock()).expect("nothing panics under this lock") = None;
    }

    fn pause(&self) {
        self.shared.state().paused = true;
    }

    fn resume(&self) {
        self.shared.state().paused = false;
        self.shared.tell_room();
    }

    fn save(&self) -> Payload {
        let State {
            paused: _,
            refused: _,
            waiting,
            columns,
            rows,
            generation,
        } = &*self.shared.state();
        let state = saved::V1 {
            waiting: waiting.iter().copied().collect(),
            columns: *columns,
            rows: *rows,
            generation: *generation,
        };
        Payload::encode(KIND, 1, &state)
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved::V1 {
            waiting,
            columns,
            rows,
            generation,
        } = payload.decode(KIND, 1)?;
        let mut state = self.shared.state();
        state.waiting = waiting.into();
        (state.columns, state.rows) = (columns, rows);
        state.generation = generation;
        Ok(())
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub struct V1 {
        pub waiting: Vec<u8>,
        pub columns: u16,
        pub rows: u16,
        pub generation: u8,
    }
}
