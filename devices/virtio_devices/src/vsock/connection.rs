//! One connection: what has gone through it, and what its two ends have said.
//!
//! ```text
//!              request of the guest, or       the host ends, or
//!              answer to one of the host      both of the guest's directions do
//!  Requested ----------------------------> Open ----------------------------> (gone)
//!                                           |  the host ends first                ^
//!                                           +-------------------------> Closing --+ reset
//! ```

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{Header, NO_RECEIVE, NO_SEND, op};

/// Bytes that the guest may send and the host has not taken yet.
pub(super) const ROOM: u32 = 256 << 10;
/// The guest is told of this much new room without being asked.
const WORTH_TELLING: u32 = ROOM / 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The guest has been asked.
    Requested,
    /// Both have agreed.
    Open,
    /// The guest is told that the host has closed its end; there is nobody at the host any more.
    Closing,
    /// The guest has closed it, and has been told so; the host still takes what is left.
    Draining,
}

/// See the module documentation.
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) state: State,
    /// The stream has something to read, an end perhaps.
    pub(super) readable: bool,
    /// The host has closed its end altogether.
    pub(super) host_closed: bool,
    /// What the host sends has come to an end, which has been read.
    host_ended: bool,
    /// The host takes nothing more: what the guest still sends is lost.
    host_deaf: bool,
    /// Sent by the guest, not taken by the host.
    outbox: VecDeque<u8>,
    /// Bytes received of the guest, modulo 2^32 like all that follow; taken by the host; told to the guest of that.
    received: u32,
    forwarded: u32,
    told: u32,
    /// Bytes sent to the guest, the guest's room, and what it has dealt with.
    sent: u32,
    peer_room: u32,
    peer_forwarded: u32,
    /// What the guest has said in SHUTDOWN.
    guest_flags: u32,
    /// What the guest is to be told, but data.
    due: Due,
    /// It is in the list of those that have something for the guest.
    pub(super) listed: bool,
}

#[derive(Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    /// Flags of SHUTDOWN that have not been told.
    shutdown: u32,
    credit_update: bool,
    credit_request: bool,
    /// A credit request is without an answer.
    asked: bool,
}

/// What is to be sent to the guest.
pub(super) enum Outgoing {
    /// A packet without data: its operation and flags.
    Control(u16, u32),
    /// So many bytes at the start of the buffer.
    Data(usize),
    /// The host has broken the connection.
    Reset,
    /// Nothing now.
    Nothing,
}

/// The connection is over, at once.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Over;

impl Connection {
    /// A connection that the host asks for.
    pub(super) fn requested(stream: UnixStream) -> Connection {
        let due = Due {
            request: true,
            ..Due::default()
        };
        Connection::new(stream, State::Requested, due)
    }

    /// A connection that the guest has asked for.
    pub(super) fn accepted(stream: UnixStream) -> Connection {
        let due = Due {
            response: true,
            ..Due::default()
        };
        Connection::new(stream, State::Open, due)
    }

    fn new(stream: UnixStream, state: State, due: Due) -> Connection {
        Connection {
            stream,
            state,
            readable: false,
            host_closed: false,
            host_ended: false,
            host_deaf: false,
            outbox: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_room: 0,
            peer_forwarded: 0,
            guest_flags: 0,
            due,
            listed: false,
        }
    }

    /// Bytes that the guest has room for. A guest that says it has dealt with more than there was has none.
    fn credit(&self) -> u32 {
        let on_the_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_room.saturating_sub(on_the_way)
    }

    /// Notes what every packet tells.
    pub(super) fn note_credit(&mut self, header: &Header) {
        self.peer_room = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.due.asked = false;
        }
    }

    /// The guest has agreed to a request of the host's.
    pub(super) fn agreed(&mut self, local_port: u32) -> Result<(), Over> {
        if self.state != State::Requested || self.due.request {
            return Err(Over);
        }
        self.state = State::Open;
        // The first bytes that the program gets: there is room for them.
        let line = format!("OK {local_port}\n");
        (&self.stream).write_all(line.as_bytes()).map_err(|_| Over)
    }

    /// The guest sends data.
    pub(super) fn receive(&mut self, data: &[u8]) -> Result<(), Over> {
        let waiting = self.received.wrapping_sub(self.forwarded);
        let allowed = self.state == State::Open && self.guest_flags & NO_SEND == 0;
        if !allowed || data.len() as u64 > u64::from(ROOM - waiting) {
            return Err(Over);
        }
        self.received = self.received.wrapping_add(data.len() as u32);
        let taken = match self.outbox.is_empty() {
            true => self.write(data),
            false => 0,
        };
        self.outbox.extend(&data[taken..]);
        Ok(())
    }

    /// Writes to the host what it takes at once; returns how much that was.
    fn write(&mut self, data: &[u8]) -> usize {
        let mut taken = 0;
        while taken < data.len() && !self.host_deaf {
            match (&self.stream).write(&data[taken..]) {
                Ok(n) => taken += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => {
                    // What the host sent before still counts.
                    self.host_deaf = true;
                    self.due.shutdown |= NO_RECEIVE;
                }
            }
        }
        if self.host_deaf {
            taken = data.len();
        }
        self.forwarded = self.forwarded.wrapping_add(taken as u32);
        if self.forwarded.wrapping_sub(self.told) >= WORTH_TELLING {
            self.due.credit_update = true;
        }
        taken
    }

    /// The host takes more. `Err`: everything that the guest has sent before it closed the connection is there.
    pub(super) fn flush(&mut self) -> Result<(), Over> {
        while !self.outbox.is_empty() {
            let mut waiting = std::mem::take(&mut self.outbox);
            let (first, _) = waiting.as_slices();
            let (len, taken) = (first.len(), self.write(first));
            waiting.drain(..taken);
            self.outbox = waiting;
            if taken != len {
                return Ok(());
            }
        }
        // An idle connection takes no memory.
        self.outbox = VecDeque::new();
        self.pass_on_end()
    }

    /// The guest's end of its data is the host's, once the host has all of it.
    fn pass_on_end(&mut self) -> Result<(), Over> {
        if !self.outbox.is_empty() {
            return Ok(());
        }
        if self.state == State::Draining || self.guest_flags == NO_SEND | NO_RECEIVE {
            return Err(Over);
        }
        if self.guest_flags & NO_SEND != 0 {
            // Fails if the host has closed it.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// The guest sends or receives no more. `Err`: neither, and the host has got everything.
    pub(super) fn shut_down(&mut self, flags: u32) -> Result<(), Over> {
        if !matches!(self.state, State::Open | State::Closing) {
            return Err(Over);
        }
        self.guest_flags |= flags & (NO_SEND | NO_RECEIVE);
        if self.guest_flags & NO_RECEIVE != 0 {
            // Fails if the host has closed it.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if self.state == State::Closing {
            return match self.guest_flags == NO_SEND | NO_RECEIVE {
                true => Err(Over),
                false => Ok(()),
            };
        }
        self.pass_on_end()
    }

    /// The guest has forgotten the connection. False: the host is still to get what the guest sent before it closed it.
    pub(super) fn forget(&mut self) -> bool {
        let clean = self.guest_flags & NO_SEND != 0 && self.state == State::Open;
        let over = !clean || self.outbox.is_empty();
        if !over {
            self.state = State::Draining;
            self.due = Due::default();
        }
        over
    }

    /// The guest asks how much room there is.
    pub(super) fn tell_credit(&mut self) {
        self.due.credit_update = true;
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_something(&mut self) -> bool {
        let Due {
            request,
            response,
            shutdown,
            credit_update,
            credit_request,
            asked,
        } = self.due;
        if self.state == State::Requested {
            return request || self.host_closed;
        }
        if self.state == State::Draining {
            return false;
        }
        let nobody_reads = self.guest_flags & NO_RECEIVE != 0;
        let data = self.reads();
        if data && self.credit() == 0 && !asked {
            self.due.credit_request = true;
            self.due.asked = true;
            return true;
        }
        response
            || shutdown != 0
            || credit_update
            || credit_request
            || data && self.credit() > 0
            || self.host_closed && (self.host_ended || nobody_reads) && self.state == State::Open
    }

    /// Whether the host may have data for the guest.
    fn reads(&self) -> bool {
        self.state == State::Open
            && self.readable
            && !self.host_ended
            && self.guest_flags & NO_RECEIVE == 0
    }

    /// What the guest gets next; data is put into `buffer`.
    pub(super) fn next(&mut self, buffer: &mut [u8]) -> Outgoing {
        if self.state == State::Requested {
            return match std::mem::take(&mut self.due.request) {
                // A program that has gone before the guest has answered needs no answer.
                _ if self.host_closed => Outgoing::Reset,
                true => Outgoing::Control(op::REQUEST, 0),
                false => Outgoing::Nothing,
            };
        }
        if std::mem::take(&mut self.due.response) {
            return Outgoing::Control(op::RESPONSE, 0);
        }
        let room = buffer.len().min(self.credit() as usize);
        if self.reads() && room > 0 {
            match self.read(&mut buffer[..room]) {
                Ok(0) => {
                    self.host_ended = true;
                    self.due.shutdown |= NO_SEND;
                }
                Ok(n) => {
                    self.sent = self.sent.wrapping_add(n as u32);
                    return Outgoing::Data(n);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(_) => return Outgoing::Reset,
            }
        }
        let nobody_reads = self.guest_flags & NO_RECEIVE != 0;
        if self.host_closed && (self.host_ended || nobody_reads) && self.state == State::Open {
            self.due.shutdown |= NO_SEND | NO_RECEIVE;
            self.state = State::Closing;
            self.outbox = VecDeque::new();
        }
        let shutdown = std::mem::take(&mut self.due.shutdown);
        if shutdown != 0 {
            return Outgoing::Control(op::SHUTDOWN, shutdown);
        }
        if std::mem::take(&mut self.due.credit_request) {
            return Outgoing::Control(op::CREDIT_REQUEST, 0);
        }
        if std::mem::take(&mut self.due.credit_update) {
            return Outgoing::Control(op::CREDIT_UPDATE, 0);
        }
        Outgoing::Nothing
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match (&self.stream).read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// What every packet tells the guest: the room for its data, and how much has been dealt with.
    pub(super) fn told_credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.due.credit_update = false;
        (ROOM, self.forwarded)
    }
}
