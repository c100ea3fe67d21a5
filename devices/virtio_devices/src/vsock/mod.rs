//! The socket device (section 5.10): stream sockets between the guest and programs of the host, which are the host's
//! [`HostSockets`].
//!
//! | file | what |
//! |---|---|
//! | `packet.rs` | the header of a packet |
//! | `connection.rs` | one connection: data, credit, ends |
//! | `table.rs` | all of them, and what the guest's packets do |
//!
//! One thread waits for the host's sockets and for notifications, and does everything. What the guest has no room for stays in the
//! host's sockets; what the host does not take is kept, up to a bound that the guest knows. A packet that breaks the rules is answered
//! by RST; the number of connections is bounded.
//!
//! Connections do not survive a restored state: the driver is told so by a transport reset event (section 5.10.6.7).
//!
//! Limits: no SEQPACKET sockets, no other guests' addresses.

mod connection;
mod packet;
mod table;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use lodger_device_model::{GuestMistakes, Payload, RestoreError};
use lodger_virtio::{Activation, Queue, VirtioDevice, VirtioPci, Wiring, read_config};
use lodger_vsock::{Event, HostSockets, ListenError};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use packet::{HEADER, Header};
use table::Table;

const KIND: &str = "virtio-vsock";
/// Feature: stream sockets.
const F_STREAM: u64 = 1 << 0;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Event: all connections are gone, the guest's address may be another.
const TRANSPORT_RESET: u32 = 0;
/// Bytes of data in one packet at most: what the guest may have on its way.
const LONGEST: usize = connection::ROOM as usize;
/// Packets of one direction before it is the other one's turn.
const BATCH: usize = 64;
/// Bytes of the thread's stack.
const STACK: usize = 256 << 10;

/// The guest's address where nothing else is said; 0 to 2 have other meanings.
pub const DEFAULT_CID: u32 = 3;

/// Sockets between guest and host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's address (CID), from 3.
    #[serde(default = "default_cid")]
    pub cid: u32,
    /// The Unix socket that leads to the guest's ports; with `_N` behind it, those that the guest's connections to the host's
    /// port N lead to.
    pub path: PathBuf,
}

fn default_cid() -> u32 {
    DEFAULT_CID
}

/// Why there can be no socket device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// An address with another meaning.
    #[error("a guest cannot have the socket address (CID) {0}; they begin at 3")]
    Cid(u32),
    /// The Unix socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The thread.
    #[error("the host cannot start a thread: {0}")]
    Thread(#[from] io::Error),
}

impl VsockSpec {
    /// A device with the default address and its socket at `path`.
    pub fn new(path: impl Into<PathBuf>) -> VsockSpec {
        VsockSpec {
            cid: DEFAULT_CID,
            path: path.into(),
        }
    }

    /// Listens at the path and makes the device.
    pub fn build(&self, name: &str, wiring: &Wiring) -> Result<Arc<VirtioPci>, VsockError> {
        if !(3..u32::MAX).contains(&self.cid) {
            return Err(VsockError::Cid(self.cid));
        }
        let hosts = HostSockets::listen(&self.path)?;
        let device = Vsock::new(name, self.cid, hosts)?;
        Ok(VirtioPci::new(name, device, wiring))
    }
}

/// See the module documentation.
pub struct Vsock {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    // Fixed configuration.
    name: String,
    cid: u32,
    // Runtime glue.
    hosts: HostSockets,
    mistakes: GuestMistakes,
    ending: AtomicBool,
    state: Mutex<State>,
    resumed: Condvar,
}

struct State {
    // Runtime glue.
    paused: bool,
    active: Option<Vec<Arc<Queue>>>,
    table: Table,
    /// The driver has not been told yet that its connections are gone. Every restored state has this.
    announce_reset: bool,
}

impl Vsock {
    /// A device of the guest with address `cid`. An error says that the host cannot start its thread.
    pub fn new(name: &str, cid: u32, hosts: HostSockets) -> io::Result<Arc<Vsock>> {
        let shared = Arc::new(Shared {
            name: name.into(),
            cid,
            hosts,
            mistakes: GuestMistakes::default(),
            ending: AtomicBool::new(false),
            state: Mutex::new(State {
                paused: false,
                active: None,
                table: Table::new(cid.into()),
                announce_reset: false,
            }),
            resumed: Condvar::new(),
        });
        let served = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(name.into())
            .stack_size(STACK);
        let thread = Some(thread.spawn(move || served.serve())?);
        Ok(Arc::new(Vsock { shared, thread }))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under this lock")
    }

    /// The thread.
    fn serve(&self) {
        let mut events = Vec::new();
        let mut buffer = vec![0; HEADER + LONGEST];
        loop {
            if let Err(error) = self.hosts.wait(&mut events) {
                tracing::error!("{}: no more connections: {error}", self.name);
                return;
            }
            let state = self.lock();
            let waited = self.resumed.wait_while(state, |state| {
                state.paused && !self.ending.load(Ordering::Acquire)
            });
            let mut state = waited.expect("nothing panics under this lock");
            if self.ending.load(Ordering::Acquire) {
                return;
            }
            for event in events.drain(..) {
                match event {
                    // Without a driver nobody listens in the guest.
                    Event::Request { .. } if state.active.is_none() => {}
                    Event::Request { stream, port } => {
                        state.table.request(&self.hosts, stream, port);
                    }
                    Event::Ready {
                        token,
                        readable,
                        writable,
                        closed,
                    } => state.table.ready(token, readable, writable, closed),
                }
            }
            self.run(&mut state, &mut buffer);
        }
    }

    /// Does all that there is to do.
    fn run(&self, state: &mut State, buffer: &mut [u8]) {
        let State {
            paused: _,
            active,
            table,
            announce_reset,
        } = state;
        let Some(queues) = active else { return };
        if *announce_reset && let Some(chain) = queues[EVENT].pop() {
            let written = chain.write_at(0, &TRANSPORT_RESET.to_le_bytes());
            chain.complete(written as u32);
            *announce_reset = false;
        }
        loop {
            let taken = self.transmit(&queues[TRANSMIT], table, buffer);
            let given = receive(&queues[RECEIVE], table, buffer);
            if !taken && !given {
                break;
            }
        }
    }

    /// Takes packets from the guest; whether there were any.
    fn transmit(&self, queue: &Arc<Queue>, table: &mut Table, buffer: &mut [u8]) -> bool {
        for n in 0..BATCH {
            let chain = match table.takes_packets() {
                true => queue.pop(),
                false => None,
            };
            let Some(chain) = chain else { return n > 0 };
            let mut bytes = [0; HEADER];
            let whole = chain.read_at(0, &mut bytes) == HEADER;
            let header = Header::parse(&bytes);
            let len = (header.len as usize).min(LONGEST);
            let len = chain.read_at(HEADER as u64, &mut buffer[..len]);
            chain.complete(0);
            let result = match whole {
                true => table.packet(&self.hosts, &header, &buffer[..len]),
                false => Err("a packet without a whole header"),
            };
            if let Err(mistake) = result {
                self.mistakes.note(&self.name, format_args!("{mistake}"));
            }
        }
        true
    }
}

/// Gives packets to the guest; whether there were any.
fn receive(queue: &Arc<Queue>, table: &mut Table, buffer: &mut [u8]) -> bool {
    let mut done = Vec::new();
    while done.len() < BATCH && table.has_something() {
        let Some(chain) = queue.pop() else { break };
        let room = chain.writable_len().min(buffer.len() as u64) as usize;
        if room <= HEADER {
            chain.reject("a buffer without room for a packet");
            break;
        }
        let Some(len) = table.next(&mut buffer[..room]) else {
            queue.put_back([chain]);
            break;
        };
        chain.write_at(0, &buffer[..len]);
        done.push((chain, len as u32));
    }
    let any = !done.is_empty();
    queue.complete_all(done);
    any
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        drop(self.shared.lock());
        self.shared.resumed.notify_all();
        self.shared.hosts.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a device's thread has panicked");
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_VSOCK as u16
    }

    fn pci_class(&self) -> u32 {
        0x07_80_00 // communication, other
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_config(&u64::from(self.shared.cid).to_le_bytes(), offset, data);
    }

    fn activate(&self, activation: Activation) {
        self.shared.lock().active = Some(activation.queues);
    }

    fn notify(&self, _queue: u16) {
        self.shared.hosts.wake();
    }

    fn reset(&self) {
        let mut state = self.shared.lock();
        state.active = None;
        state.table.clear();
        state.announce_reset = false;
    }

    fn pause(&self) {
        self.shared.lock().paused = true;
    }

    fn resume(&self) {
        self.shared.lock().paused = false;
        self.shared.resumed.notify_all();
    }

    fn save(&self) -> Payload {
        // Whatever there is of it, a restored device has no connections and says so.
        let State {
            paused: _,
            active: _,
            table: _,
            announce_reset: _,
        } = &*self.shared.lock();
        Payload::encode(KIND, 1, &())
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        payload.decode::<()>(KIND, 1)?;
        let mut state = self.shared.lock();
        state.table.clear();
        state.announce_reset = true;
        Ok(())
    }
}
