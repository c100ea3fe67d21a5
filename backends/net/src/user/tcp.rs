//! TCP: each connection of the card ends here, in a socket of the `smoltcp` stack, and another one of the host's goes on from there.
//!
//! A connection has a stack ([`Interface`]) to itself, whose only address is the one that the card talks to. So the stack need not
//! know of the network, and finding the connection of a packet is one look-up however many there are.
//!
//! What the card sends is acknowledged when the stack has it; the stack's window closes when the host's socket takes no more. A
//! connection of the card is answered once the host's is there, and refused if it is.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::time::Instant as HostInstant;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, send, shutdown,
    socket_with, sockopt,
};
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{
    ETHERNET_HEADER_LEN, EthernetProtocol, HardwareAddress, IPV4_HEADER_LEN, IPV6_HEADER_LEN,
    IpCidr, IpProtocol, IpVersion, Ipv4Packet, Ipv6Packet, TCP_HEADER_LEN, TcpPacket, checksum,
};

use super::addresses::{GATEWAY, MTU, is_one_host};
use super::link::Link;
use super::poller::{Poller, Ready, Token, token};
use crate::header::{Gso, PacketHeader};

/// Bytes that a connection holds in each direction at most, beside what the host's socket holds.
const BUFFER: usize = 256 << 10;
/// Connections at a time at most.
const MOST_FLOWS: usize = 4096;
/// How long the card may take to answer a connection from outside.
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// How long a small segment waits for an answer that its acknowledgement can travel with: a packet less for the card.
const ACK_DELAY: Duration = Duration::from_millis(2);
/// The largest IP packet.
const LARGEST: usize = 65535;
/// Offset of the checksum in a TCP header.
const CHECKSUM_OFFSET: u16 = 16;

/// The two ends of a connection as the card sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// The card's.
    card: SocketAddr,
    /// The other.
    peer: SocketAddr,
}

/// All connections.
pub(crate) struct Tcp {
    flows: HashMap<Token, Flow>,
    tokens: HashMap<Key, Token>,
    /// Of the next connection.
    next_token: Token,
    /// Of the next connection from outside.
    next_port: u16,
    /// Connections that wait for [`Tcp::flush`].
    touched: Vec<Token>,
    epoch: HostInstant,
    /// What [`Tcp::due`] said.
    soonest: Option<Instant>,
    sooner: bool,
}

struct Flow {
    key: Key,
    stack: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    host: OwnedFd,
    /// The card's first packet, while the host's connection is being made.
    first: Option<Vec<u8>>,
    /// The host's socket may have something to read, or to tell.
    readable: bool,
    /// The host's socket may take something.
    writable: bool,
    /// The host's side has been told that the card sends no more.
    shut: bool,
    /// The card sends no more.
    card_ended: bool,
    /// The host's side sends no more.
    host_ended: bool,
    /// The host's socket has failed.
    broken: bool,
    /// It waits for [`Tcp::flush`].
    touched: bool,
}

impl Tcp {
    pub(crate) fn new() -> Tcp {
        Tcp {
            flows: HashMap::new(),
            tokens: HashMap::new(),
            next_token: token::TCP,
            next_port: 1024,
            touched: Vec::new(),
            epoch: HostInstant::now(),
            soonest: None,
            sooner: false,
        }
    }

    fn now(&self) -> Instant {
        Instant::from_micros(self.epoch.elapsed().as_micros() as i64)
    }

    /// Ends all connections; the host's sides see a reset.
    pub(crate) fn clear(&mut self) {
        for flow in self.flows.values() {
            flow.reset_host();
        }
        self.flows.clear();
        self.tokens.clear();
        self.touched.clear();
    }

    /// Takes an IP packet with a segment of the card. `connect` tells where a new connection goes, if it goes anywhere.
    pub(crate) fn packet(
        &mut self,
        link: &mut Link,
        poller: &Poller,
        packet: &[u8],
        connect: impl FnOnce(SocketAddr) -> Option<SocketAddr>,
    ) {
        let Some((key, opens)) = parse(packet) else {
            return;
        };
        let now = self.now();
        if let Some(&token) = self.tokens.get(&key) {
            let Some(flow) = self.flows.get_mut(&token) else {
                return;
            };
            if flow.first.is_some() {
                // It is sent again if need be.
                return;
            }
            if !(opens && flow.socket().state() == State::TimeWait) {
                flow.take(link, packet, now);
                flow.feed_host();
                if !std::mem::replace(&mut flow.touched, true) {
                    self.touched.push(token);
                }
                return;
            }
            self.remove(token);
        }
        let made = match (opens, connect(key.peer)) {
            (true, Some(to)) => self.open(link, poller, key, packet, to),
            _ => Err(Errno::CONNREFUSED.into()),
        };
        if let Err(error) = made {
            tracing::debug!("{} -> {}: {error}", key.card, key.peer);
            refuse(link, packet, key.peer, now);
        }
    }

    /// Begins a connection of the card's.
    fn open(
        &mut self,
        link: &mut Link,
        poller: &Poller,
        key: Key,
        packet: &[u8],
        to: SocketAddr,
    ) -> io::Result<()> {
        self.check_room()?;
        let host = connect(to)?;
        let mut flow = Flow::new(link, key, host, self.now());
        let listening = flow.socket().listen(key.peer);
        listening.map_err(|e| io::Error::other(e.to_string()))?;
        flow.first = Some(packet.to_vec());
        self.insert(poller, flow)
    }

    /// Takes a connection from outside to a port of the card.
    pub(crate) fn accepted(
        &mut self,
        link: &mut Link,
        poller: &Poller,
        host: OwnedFd,
        port: u16,
    ) -> io::Result<()> {
        self.check_room()?;
        let card = SocketAddr::from((link.guest, port));
        let peer = loop {
            self.next_port = self.next_port.checked_add(1).unwrap_or(1024);
            let peer = SocketAddr::from((GATEWAY, self.next_port));
            if !self.tokens.contains_key(&Key { card, peer }) {
                break peer;
            }
        };
        // Small writes go out at once; whoever wants to gather them has done so.
        sockopt::set_tcp_nodelay(&host, true)?;
        let mut flow = Flow::new(link, Key { card, peer }, host, self.now());
        let Flow {
            stack,
            sockets,
            handle,
            ..
        } = &mut flow;
        let socket = sockets.get_mut::<Socket>(*handle);
        socket.set_timeout(Some(ANSWER_TIME));
        let connected = socket.connect(stack.context(), card, peer);
        connected.map_err(|e| io::Error::other(e.to_string()))?;
        let token = self.next_token;
        self.insert(poller, flow)?;
        self.drive(link, token);
        Ok(())
    }

    fn check_room(&self) -> io::Result<()> {
        match self.flows.len() < MOST_FLOWS {
            true => Ok(()),
            false => Err(io::Error::other("too many connections")),
        }
    }

    fn insert(&mut self, poller: &Poller, flow: Flow) -> io::Result<()> {
        let token = self.next_token;
        poller.add(&flow.host, token)?;
        self.next_token += 1;
        self.tokens.insert(flow.key, token);
        self.flows.insert(token, flow);
        Ok(())
    }

    fn remove(&mut self, token: Token) {
        if let Some(flow) = self.flows.remove(&token) {
            self.tokens.remove(&flow.key);
        }
    }

    /// Something has happened to the host's side of a connection.
    pub(crate) fn ready(&mut self, link: &mut Link, ready: Ready) {
        let now = self.now();
        let Some(flow) = self.flows.get_mut(&ready.token) else {
            return;
        };
        if ready.writable
            && let Some(first) = flow.first.take()
        {
            match sockopt::socket_error(&flow.host) {
                Ok(Ok(())) => flow.take(link, &first, now),
                Ok(Err(error)) | Err(error) => {
                    tracing::debug!("{} -> {}: {error}", flow.key.card, flow.key.peer);
                    refuse(link, &first, flow.key.peer, now);
                    return self.remove(ready.token);
                }
            }
        }
        flow.readable |= ready.readable;
        flow.writable |= ready.writable;
        self.drive(link, ready.token);
    }

    /// Sends what was put off.
    pub(crate) fn flush(&mut self, link: &mut Link) {
        let mut touched = std::mem::take(&mut self.touched);
        for token in touched.drain(..) {
            if let Some(flow) = self.flows.get_mut(&token) {
                flow.touched = false;
                self.drive(link, token);
            }
        }
        self.touched = touched;
    }

    /// Goes on with all connections: timers have run out, or the card has room.
    pub(crate) fn drive_all(&mut self, link: &mut Link) {
        let tokens: Vec<Token> = self.flows.keys().copied().collect();
        tokens.into_iter().for_each(|token| self.drive(link, token));
    }

    /// How long until some connection has something to do by itself.
    pub(crate) fn due(&mut self) -> Option<std::time::Duration> {
        let now = self.now();
        self.soonest = self.flows.values_mut().filter_map(|f| f.due(now)).min();
        self.sooner = false;
        (self.soonest).map(|at| if at > now { at - now } else { Duration::ZERO }.into())
    }

    /// Whether some connection has something to do earlier than [`Tcp::due`] said.
    pub(crate) fn due_sooner(&mut self) -> bool {
        std::mem::take(&mut self.sooner)
    }

    /// Moves what can be moved.
    fn drive(&mut self, link: &mut Link, token: Token) {
        let now = self.now();
        let Some(flow) = self.flows.get_mut(&token) else {
            return;
        };
        if flow.first.is_some() {
            return;
        }
        flow.feed_host();
        flow.feed_card();
        flow.transmit(link, now);
        if flow.is_over(now) {
            return self.remove(token);
        }
        let due = flow.due(now);
        if due.is_some_and(|due| self.soonest.is_none_or(|soonest| due < soonest)) {
            self.soonest = due;
            self.sooner = true;
        }
    }
}

impl Flow {
    fn new(link: &mut Link, key: Key, host: OwnedFd, now: Instant) -> Flow {
        let buffer = || SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(Some(ACK_DELAY));
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Flow {
            key,
            stack: stack(link, key.peer, now),
            sockets,
            handle,
            host,
            first: None,
            readable: false,
            writable: false,
            shut: false,
            card_ended: false,
            host_ended: false,
            broken: false,
            touched: false,
        }
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// Takes a packet of the card's. Only what must be answered at once is.
    fn take(&mut self, link: &mut Link, packet: &[u8], now: Instant) {
        let mut wire = Wire {
            link,
            ipv6: self.key.peer.is_ipv6(),
            packet: Some(packet),
        };
        (self.stack).poll_ingress_single(now, &mut wire, &mut self.sockets);
    }

    /// Passes on to the host what the card has sent.
    fn feed_host(&mut self) {
        let socket = self.sockets.get_mut::<Socket>(self.handle);
        while self.writable && socket.can_recv() {
            let sent = socket.recv(|data| match send(&self.host, data, SendFlags::NOSIGNAL) {
                Ok(n) => (n, Ok(())),
                Err(error) => (0, Err(error)),
            });
            match sent {
                Ok(Ok(()) | Err(Errno::INTR)) => {}
                Ok(Err(Errno::AGAIN)) => self.writable = false,
                _ => return self.fail(),
            }
        }
        self.card_ended |= card_has_ended(socket);
        if self.card_ended && !self.shut && socket.recv_queue() == 0 {
            self.shut = true;
            // If it fails the connection is broken, and reading tells.
            let _ = shutdown(&self.host, Shutdown::Write);
        }
    }

    /// Takes from the host what fits.
    fn feed_card(&mut self) {
        let socket = self.sockets.get_mut::<Socket>(self.handle);
        while self.readable && !self.host_ended && socket.can_send() {
            let got = socket.send(|room| match recv(&self.host, room, RecvFlags::empty()) {
                Ok((n, _)) => (n, Ok(n)),
                Err(error) => (0, Err(error)),
            });
            match got {
                Ok(Ok(0)) => self.host_ended = true,
                Ok(Ok(_) | Err(Errno::INTR)) => {}
                Ok(Err(Errno::AGAIN)) => self.readable = false,
                _ => return self.fail(),
            }
        }
        // Not before the card has everything: the stack ignores window updates in LAST-ACK (smoltcp 0.14).
        if self.host_ended && socket.send_queue() == 0 && socket.may_send() {
            socket.close();
        }
    }

    /// Sends the card what it is to know.
    fn transmit(&mut self, link: &mut Link, now: Instant) {
        let mut wire = Wire {
            link,
            ipv6: self.key.peer.is_ipv6(),
            packet: None,
        };
        while self.stack.poll_egress(now, &mut wire, &mut self.sockets) != PollResult::None {}
        let socket = self.socket();
        if socket.state() == State::Established {
            socket.set_timeout(None);
        }
    }

    /// Whether nothing is left to do; a connection that did not end in order is broken off on the host's side too.
    fn is_over(&mut self, now: Instant) -> bool {
        let (state, left) = (self.socket().state(), self.socket().recv_queue());
        if !matches!(state, State::Closed | State::TimeWait | State::Listen) {
            return false;
        }
        if self.card_ended && self.host_ended && !self.broken {
            // The last acknowledgement may still be waiting.
            let soon = now + ACK_DELAY * 2;
            return left == 0 && self.due(now).is_none_or(|due| due > soon);
        }
        self.reset_host();
        true
    }

    /// The host's socket has failed: the card's connection is reset.
    fn fail(&mut self) {
        self.broken = true;
        self.socket().abort();
    }

    /// When the stack wants to be called, if nothing happens before.
    fn due(&mut self, now: Instant) -> Option<Instant> {
        self.stack.poll_at(now, &self.sockets)
    }

    /// Closing the host's socket will reset its connection.
    fn reset_host(&self) {
        // If it fails the connection is gone already.
        let _ = sockopt::set_socket_linger(&self.host, Some(std::time::Duration::ZERO));
    }
}

/// Whether the card has said that it sends no more.
fn card_has_ended(socket: &Socket) -> bool {
    matches!(
        socket.state(),
        State::CloseWait | State::Closing | State::LastAck | State::TimeWait
    )
}

/// A stack whose address is `address`.
fn stack(link: &mut Link, address: SocketAddr, now: Instant) -> Interface {
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = RandomState::new().build_hasher().finish();
    let mut wire = Wire {
        link,
        ipv6: address.is_ipv6(),
        packet: None,
    };
    let mut stack = Interface::new(config, &mut wire, now);
    stack.update_ip_addrs(|addresses| {
        // With this prefix everything is near. There is room for more than one.
        let _ = addresses.push(IpCidr::new(address.ip().into(), 0));
    });
    stack
}

/// Answers a packet that belongs to no connection: with a reset, unless it is one.
fn refuse(link: &mut Link, packet: &[u8], address: SocketAddr, now: Instant) {
    let mut stack = stack(link, address, now);
    let mut wire = Wire {
        link,
        ipv6: address.is_ipv6(),
        packet: Some(packet),
    };
    let mut nobody = SocketSet::new(Vec::new());
    stack.poll_ingress_single(now, &mut wire, &mut nobody);
}

/// The ends of a packet from the card, and whether it opens a connection.
fn parse(packet: &[u8]) -> Option<(Key, bool)> {
    let (from, to, segment) = match IpVersion::of_packet(packet).ok()? {
        IpVersion::Ipv4 => {
            let ip = Ipv4Packet::new_checked(packet).ok()?;
            let (from, to): (IpAddr, IpAddr) = (ip.src_addr().into(), ip.dst_addr().into());
            (from, to, ip.payload())
        }
        IpVersion::Ipv6 => {
            let ip = Ipv6Packet::new_checked(packet).ok()?;
            let (from, to): (IpAddr, IpAddr) = (ip.src_addr().into(), ip.dst_addr().into());
            (from, to, ip.payload())
        }
    };
    let tcp = TcpPacket::new_checked(segment).ok()?;
    // The stack takes such an address, or port, as a mistake of ours.
    if !is_one_host(to) || tcp.dst_port() == 0 {
        return None;
    }
    let key = Key {
        card: SocketAddr::new(from, tcp.src_port()),
        peer: SocketAddr::new(to, tcp.dst_port()),
    };
    Some((key, tcp.syn() && !tcp.ack() && !tcp.rst()))
}

/// Begins a connection of the host's.
fn connect(to: SocketAddr) -> io::Result<OwnedFd> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    // Small writes go out at once; whoever wants to gather them has done so.
    sockopt::set_tcp_nodelay(&socket, true)?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// The link, as a stack uses it: with at most one packet from the card.
struct Wire<'a> {
    link: &'a mut Link,
    ipv6: bool,
    packet: Option<&'a [u8]>,
}

struct FromCard<'a>(&'a [u8]);

struct ToCard<'a> {
    link: &'a mut Link,
    ipv6: bool,
    segment_len: u16,
}

impl Wire<'_> {
    fn answer(&mut self) -> ToCard<'_> {
        ToCard {
            link: self.link,
            ipv6: self.ipv6,
            segment_len: 0,
        }
    }
}

impl Device for Wire<'_> {
    type RxToken<'a>
        = FromCard<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = ToCard<'a>
    where
        Self: 'a;

    fn receive(&mut self, _now: Instant) -> Option<(FromCard<'_>, ToCard<'_>)> {
        let packet = FromCard(self.packet.take()?);
        Some((packet, self.answer()))
    }

    fn transmit(&mut self, _now: Instant) -> Option<ToCard<'_>> {
        self.link.has_room().then(|| self.answer())
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let offloads = self.link.offloads();
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // What the card sends has not left this computer.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = match offloads.checksum {
            true => Checksum::None,
            false => Checksum::Tx,
        };
        if offloads.checksum && offloads.tso4 {
            capabilities.segmentation.tcpv4 = NonZeroUsize::new(LARGEST);
        }
        capabilities
    }
}

impl RxToken for FromCard<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for ToCard<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let checksum = self.link.offloads().checksum;
        let ipv6 = self.ipv6;
        let kind = match ipv6 {
            true => EthernetProtocol::Ipv6,
            false => EthernetProtocol::Ipv4,
        };
        let ip_len = match ipv6 {
            true => IPV6_HEADER_LEN,
            false => IPV4_HEADER_LEN,
        };
        let start = (ETHERNET_HEADER_LEN + ip_len) as u16;
        let mut header = PacketHeader::default();
        if checksum {
            header.needs_checksum = true;
            header.checksum_start = start;
            header.checksum_offset = CHECKSUM_OFFSET;
        }
        if self.segment_len > 0 {
            header.gso = Gso::Tcp4;
            header.segment_len = self.segment_len;
            header.headers_len = start + TCP_HEADER_LEN as u16;
        }
        self.link.send(kind, header, len, |bytes| {
            let result = f(bytes);
            if checksum {
                begin_checksum(bytes, ipv6);
            }
            result
        })
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment_len = meta.segmentation_offload_size.map_or(0, Into::into);
    }
}

/// Puts the sum of the pseudo-header where the checksum will be.
fn begin_checksum(packet: &mut [u8], ipv6: bool) {
    let (sum, segment) = match ipv6 {
        true => {
            let mut ip = Ipv6Packet::new_unchecked(packet);
            let (from, to) = (ip.src_addr(), ip.dst_addr());
            let len = ip.payload_mut().len() as u32;
            let sum = checksum::pseudo_header_v6(&from, &to, IpProtocol::Tcp, len);
            (sum, &mut ip.into_inner()[IPV6_HEADER_LEN..])
        }
        false => {
            let mut ip = Ipv4Packet::new_unchecked(packet);
            let (from, to) = (ip.src_addr(), ip.dst_addr());
            let len = ip.payload_mut().len() as u32;
            let sum = checksum::pseudo_header_v4(&from, &to, IpProtocol::Tcp, len);
            (sum, &mut ip.into_inner()[IPV4_HEADER_LEN..])
        }
    };
    TcpPacket::new_unchecked(segment).set_checksum(sum);
}
