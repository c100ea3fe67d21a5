//! All connections, and what the guest's packets do to them.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;

use lodger_vsock::{FIRST_RESERVED, HostSockets, Token};

use super::connection::{Connection, Outgoing, Over, State};
use super::packet::{HEADER, Header, STREAM, op};

/// The host's address (section 5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// Connections at once.
const CONNECTIONS: usize = 256;
/// Resets that wait for room; meanwhile no packets are taken from the guest.
const RESETS: usize = 64;
/// The ports of the host's programs start here: what the guest connects to has smaller numbers by custom.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// Ports of host and guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    host: u32,
    guest: u32,
}

impl Key {
    /// None for ports that nobody can have.
    fn new(host: u32, guest: u32) -> Option<Key> {
        let key = Key { host, guest };
        (key.token() < FIRST_RESERVED).then_some(key)
    }

    fn token(self) -> Token {
        u64::from(self.host) << 32 | u64::from(self.guest)
    }

    fn of(token: Token) -> Key {
        Key {
            host: (token >> 32) as u32,
            guest: token as u32,
        }
    }
}

/// See the module documentation.
pub(super) struct Table {
    guest_cid: u64,
    connections: HashMap<Key, Connection>,
    /// Those that may have something for the guest, in the order in which they take turns.
    turns: VecDeque<Key>,
    /// Answers to what belongs to no connection.
    resets: VecDeque<Header>,
    next_port: u32,
}

/// A packet that makes no sense, in words.
pub(super) type Mistake = &'static str;

impl Table {
    pub(super) fn new(guest_cid: u64) -> Table {
        Table {
            guest_cid,
            connections: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
        }
    }

    /// Ends all connections.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.turns.clear();
        self.resets.clear();
    }

    /// Whether a packet of the guest's can be answered.
    pub(super) fn takes_packets(&self) -> bool {
        self.resets.len() < RESETS
    }

    /// A program of the host's wants to be connected to this port of the guest.
    pub(super) fn request(&mut self, hosts: &HostSockets, stream: UnixStream, port: u32) {
        if !self.has_room() {
            tracing::warn!("too many connections to the guest's sockets");
            return;
        }
        let free = (FIRST_PORT..=LAST_PORT).find_map(|_| {
            let host = self.next_port;
            self.next_port = match host {
                LAST_PORT => FIRST_PORT,
                _ => host + 1,
            };
            Key::new(host, port).filter(|key| !self.connections.contains_key(key))
        });
        if let Some(key) = free {
            self.insert(hosts, key, Connection::requested(stream));
        }
    }

    /// Makes room by forgetting a connection that nobody uses any more, if need be.
    fn has_room(&mut self) -> bool {
        if self.connections.len() < CONNECTIONS {
            return true;
        }
        let closing = self.connections.iter();
        let closing = closing.filter(|(_, c)| c.state == State::Closing);
        match closing.map(|(key, _)| *key).next() {
            Some(key) => {
                self.finish(key);
                true
            }
            None => false,
        }
    }

    fn insert(&mut self, hosts: &HostSockets, key: Key, connection: Connection) -> bool {
        if let Err(error) = hosts.watch(&connection.stream, key.token()) {
            tracing::warn!("a connection to the guest's sockets: {error}");
            return false;
        }
        self.connections.insert(key, connection);
        self.list(key);
        true
    }

    /// Lets the connection take its turn if it may have something for the guest.
    fn list(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key)
            && !connection.listed
            && connection.has_something()
        {
            connection.listed = true;
            self.turns.push_back(key);
        }
    }

    /// Something has happened at the host's end.
    pub(super) fn ready(&mut self, token: Token, readable: bool, writable: bool, closed: bool) {
        let key = Key::of(token);
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        connection.readable |= readable;
        connection.host_closed |= closed;
        if writable && let Err(Over) = connection.flush() {
            return self.finish(key);
        }
        self.list(key);
    }

    /// Ends a connection, and tells the guest if it does not know.
    fn finish(&mut self, key: Key) {
        if let Some(connection) = self.remove(key)
            && connection.state != State::Draining
        {
            self.resets.push_back(self.header(key, op::RST));
        }
    }

    fn remove(&mut self, key: Key) -> Option<Connection> {
        let connection = self.connections.remove(&key)?;
        if connection.listed {
            self.turns.retain(|other| *other != key);
        }
        Some(connection)
    }

    fn header(&self, key: Key, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host,
            dst_port: key.guest,
            kind: STREAM,
            op,
            ..Header::default()
        }
    }

    /// Takes a packet of the guest's. `data` is what came with it, at most as much as the header says.
    pub(super) fn packet(
        &mut self,
        hosts: &HostSockets,
        header: &Header,
        data: &[u8],
    ) -> Result<(), Mistake> {
        if header.src_cid != self.guest_cid {
            // There is nobody to answer.
            return Err("a packet of somebody else");
        }
        let key = Key::new(header.dst_port, header.src_port);
        let Some(key) = key.filter(|_| header.dst_cid == HOST_CID && header.kind == STREAM) else {
            if header.op != op::RST {
                self.resets.push_back(header.reset());
            }
            return Err("a packet to nobody");
        };
        let whole = data.len() == header.len as usize;
        let Some(connection) = self.connections.get_mut(&key) else {
            return match header.op {
                op::RST => Ok(()),
                op::REQUEST => {
                    self.accept(hosts, key, header);
                    Ok(())
                }
                // What was on its way when the connection ended, for example.
                _ => {
                    self.resets.push_back(header.reset());
                    Ok(())
                }
            };
        };
        connection.note_credit(header);
        let result = match header.op {
            _ if !whole => Err(Over),
            op::RESPONSE => connection.agreed(key.host),
            op::RW => connection.receive(data),
            op::SHUTDOWN => connection.shut_down(header.flags),
            op::CREDIT_UPDATE => Ok(()),
            op::CREDIT_REQUEST => {
                connection.tell_credit();
                Ok(())
            }
            op::RST => {
                if connection.forget() {
                    self.remove(key);
                }
                return Ok(());
            }
            _ => Err(Over),
        };
        match result {
            Ok(()) => self.list(key),
            Err(Over) => self.finish(key),
        }
        match whole {
            true => Ok(()),
            false => Err("a packet without all of its data"),
        }
    }

    /// The guest wants to be connected to a program of the host's.
    fn accept(&mut self, hosts: &HostSockets, key: Key, header: &Header) {
        let stream = match self.has_room() {
            true => hosts.connect(key.host).ok(),
            false => None,
        };
        let accepted = stream.is_some_and(|stream| {
            let mut connection = Connection::accepted(stream);
            connection.note_credit(header);
            self.insert(hosts, key, connection)
        });
        if !accepted {
            self.resets.push_back(header.reset());
        }
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_something(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// The next packet for the guest: header and data at the start of `buffer`, which has room for more than a header; its
    /// length, if there is one.
    pub(super) fn next(&mut self, buffer: &mut [u8]) -> Option<usize> {
        if let Some(reset) = self.resets.pop_front() {
            buffer[..HEADER].copy_from_slice(&reset.bytes());
            return Some(HEADER);
        }
        while let Some(key) = self.turns.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else {
                continue;
            };
            connection.listed = false;
            let (op, flags, len) = match connection.next(&mut buffer[HEADER..]) {
                Outgoing::Control(op, flags) => (op, flags, 0),
                Outgoing::Data(len) => (op::RW, 0, len),
                Outgoing::Reset => (op::RST, 0, 0),
                Outgoing::Nothing => {
                    // It may have found out something.
                    self.list(key);
                    continue;
                }
            };
            let (buf_alloc, fwd_cnt) = connection.told_credit();
            if op == op::RST {
                self.remove(key);
            }
            let header = Header {
                len: len as u32,
                flags,
                buf_alloc,
                fwd_cnt,
                ..self.header(key, op)
            };
            buffer[..HEADER].copy_from_slice(&header.bytes());
            self.list(key);
            return Some(HEADER + len);
        }
        None
    }
}
