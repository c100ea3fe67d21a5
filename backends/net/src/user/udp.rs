//! UDP: each port of the card has a socket of the host's, through which it sends to anybody.
//!
//! A port has another socket for the host itself and for the name server, because what comes back over these seems to come from
//! the gateway and the name server of the network.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recvfrom, sendto, socket_with,
};

use super::addresses::{DNS, DNS_PORT, DNS6, Destination, GATEWAY, GATEWAY6, destination};
use super::link::Link;
use super::poller::{Poller, Token, token};
use super::resolver::Resolver;

/// Sockets at a time at most; the one that was used least recently makes room.
const MOST_FLOWS: usize = 512;
/// A socket that is not used for this long is closed.
const IDLE: Duration = Duration::from_secs(180);
/// Datagrams that are taken from a socket at a time.
const BURST: usize = 64;
/// Published ports remember as many peers at most.
const MOST_PEERS: usize = 256;
/// The first port of the gateway that stands for a peer.
const FIRST_PEER_PORT: u16 = 61_000;

/// What a socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Via {
    /// Anybody, with the card's kind of addresses.
    Net,
    /// The host itself, with the card's kind of addresses.
    Gateway,
    /// The name server, over IPv6 or not.
    Resolver { ipv6: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    card: SocketAddr,
    via: Via,
}

struct Flow {
    key: Key,
    socket: OwnedFd,
    used: Instant,
    /// Queries to the name server since it answered last, and the server that got the last one.
    asked: usize,
    server: Option<SocketAddr>,
}

/// A published port.
struct Published {
    socket: OwnedFd,
    card_port: u16,
    /// Who has sent to it, and the port of the gateway that stands for them.
    peers: Vec<(SocketAddr, u16)>,
    next: usize,
}

/// All sockets.
pub(crate) struct Udp {
    flows: HashMap<Token, Flow>,
    tokens: HashMap<Key, Token>,
    next_token: Token,
    published: Vec<Published>,
    resolver: Resolver,
    buffer: Vec<u8>,
}

impl Udp {
    pub(crate) fn new(resolver: Resolver) -> Udp {
        Udp {
            flows: HashMap::new(),
            tokens: HashMap::new(),
            next_token: token::UDP,
            published: Vec::new(),
            resolver,
            buffer: vec![0; 1 << 16],
        }
    }

    /// The name server for connections.
    pub(crate) fn resolver(&mut self) -> SocketAddr {
        self.resolver.server(0)
    }

    /// How many ports are published.
    pub(crate) fn published(&self) -> usize {
        self.published.len()
    }

    /// Passes on what comes to `socket` to a port of the card.
    pub(crate) fn publish(&mut self, socket: OwnedFd, card_port: u16) {
        self.published.push(Published {
            socket,
            card_port,
            peers: Vec::new(),
            next: 0,
        });
    }

    /// Closes the card's sockets.
    pub(crate) fn clear(&mut self) {
        self.flows.clear();
        self.tokens.clear();
        for published in &mut self.published {
            published.peers.clear();
        }
    }

    /// Takes a datagram of the card's.
    pub(crate) fn datagram(
        &mut self,
        poller: &Poller,
        card: SocketAddr,
        to: SocketAddr,
        data: &[u8],
    ) {
        let sent = self.send(poller, card, to, data);
        if let Err(error) = sent {
            tracing::debug!("UDP {card} -> {to}: {error}");
        }
    }

    /// Sends a datagram of a published port to whom that port of the gateway stands for, if it does.
    pub(crate) fn answer(&self, card: SocketAddr, gateway_port: u16, data: &[u8]) -> bool {
        let from = |p: &&Published| p.card_port == card.port();
        let published = self.published.iter().filter(from);
        let found = published.flat_map(|p| p.peers.iter().map(move |peer| (p, peer)));
        for (published, (peer, port)) in found {
            if *port == gateway_port {
                // What the host does not take is lost, as on any network.
                let _ = sendto(&published.socket, data, SendFlags::empty(), peer);
                return true;
            }
        }
        false
    }

    fn send(
        &mut self,
        poller: &Poller,
        card: SocketAddr,
        to: SocketAddr,
        data: &[u8],
    ) -> io::Result<()> {
        let Some(destination) = destination(to) else {
            return Err(io::ErrorKind::HostUnreachable.into());
        };
        let (via, host) = match destination {
            Destination::Host(host) if host != to => (Via::Gateway, host),
            Destination::Host(host) => (Via::Net, host),
            Destination::Resolver => {
                let server = self.resolver.server(self.asked(card));
                let ipv6 = server.is_ipv6();
                (Via::Resolver { ipv6 }, server)
            }
        };
        let flow = self.flow(poller, Key { card, via }, host)?;
        flow.used = Instant::now();
        if destination == Destination::Resolver {
            flow.asked += 1;
            flow.server = Some(host);
        }
        sendto(&flow.socket, data, SendFlags::empty(), &host)?;
        Ok(())
    }

    /// How many queries of a port of the card's no name server has answered.
    fn asked(&self, card: SocketAddr) -> usize {
        let token = |ipv6| {
            let via = Via::Resolver { ipv6 };
            self.tokens.get(&Key { card, via })
        };
        let flow = |ipv6| token(ipv6).and_then(|token| self.flows.get(token));
        let asked = |ipv6| flow(ipv6).map_or(0, |flow| flow.asked);
        asked(false) + asked(true)
    }

    /// The socket of `key`, which is made if need be.
    fn flow(&mut self, poller: &Poller, key: Key, host: SocketAddr) -> io::Result<&mut Flow> {
        let token = match self.tokens.get(&key) {
            Some(&token) => token,
            None => self.add(poller, key, host)?,
        };
        let flow = self.flows.get_mut(&token);
        Ok(flow.expect("every key in `tokens` has its flow"))
    }

    fn add(&mut self, poller: &Poller, key: Key, host: SocketAddr) -> io::Result<Token> {
        if self.flows.len() >= MOST_FLOWS {
            let oldest = self.flows.iter().min_by_key(|(_, flow)| flow.used);
            let oldest = oldest.map(|(&token, _)| token);
            oldest.into_iter().for_each(|token| self.remove(token));
        }
        let family = match host {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::DGRAM, flags, None)?;
        let token = self.next_token;
        poller.add_reader(&socket, token)?;
        self.next_token += 1;
        let flow = Flow {
            key,
            socket,
            used: Instant::now(),
            asked: 0,
            server: None,
        };
        self.flows.insert(token, flow);
        self.tokens.insert(key, token);
        Ok(token)
    }

    /// The socket has something to read.
    pub(crate) fn ready(&mut self, link: &mut Link, token: Token) {
        let Some(flow) = self.flows.get_mut(&token) else {
            return;
        };
        for _ in 0..BURST {
            let Some((from, data)) = receive(&flow.socket, &mut self.buffer) else {
                break;
            };
            let ipv6 = flow.key.card.is_ipv6();
            let from = match flow.key.via {
                Via::Resolver { .. } if flow.server == Some(from) => {
                    flow.asked = 0;
                    of_kind(ipv6, (DNS, DNS6), DNS_PORT)
                }
                Via::Gateway if from.ip().is_loopback() => {
                    of_kind(ipv6, (GATEWAY, GATEWAY6), from.port())
                }
                Via::Net => from,
                _ => continue,
            };
            flow.used = Instant::now();
            link.send_udp(from, flow.key.card, data);
        }
    }

    /// Published port `number` has something to read.
    pub(crate) fn published_ready(&mut self, link: &mut Link, number: usize) {
        let Some(published) = self.published.get_mut(number) else {
            return;
        };
        let card = (link.guest, published.card_port).into();
        for _ in 0..BURST {
            let Some((peer, data)) = receive(&published.socket, &mut self.buffer) else {
                break;
            };
            let port = gateway_port(&mut published.peers, &mut published.next, peer);
            link.send_udp((GATEWAY, port).into(), card, data);
        }
    }

    /// Closes sockets that are not used any more; how long until the next one.
    pub(crate) fn expire(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let idle = |flow: &Flow| now.duration_since(flow.used);
        let old: Vec<Token> = (self.flows.iter())
            .filter_map(|(&token, flow)| (idle(flow) >= IDLE).then_some(token))
            .collect();
        old.into_iter().for_each(|token| self.remove(token));
        self.flows.values().map(|flow| IDLE - idle(flow)).min()
    }

    fn remove(&mut self, token: Token) {
        if let Some(flow) = self.flows.remove(&token) {
            self.tokens.remove(&flow.key);
        }
    }
}

/// One of the network's own addresses, of the kind that is wanted.
fn of_kind(ipv6: bool, (ip4, ip6): (Ipv4Addr, Ipv6Addr), port: u16) -> SocketAddr {
    match ipv6 {
        true => (ip6, port).into(),
        false => (ip4, port).into(),
    }
}

/// The next datagram of a socket. Errors are those of earlier datagrams, which are lost then, as on any network.
fn receive<'a>(socket: &OwnedFd, buffer: &'a mut [u8]) -> Option<(SocketAddr, &'a [u8])> {
    let (n, _, from) = recvfrom(socket, &mut *buffer, RecvFlags::empty()).ok()?;
    let from = SocketAddr::try_from(from?).ok()?;
    Some((from, &buffer[..n]))
}

/// The port of the gateway that stands for `peer`. Those of ephemeral ports are used in turn.
fn gateway_port(peers: &mut Vec<(SocketAddr, u16)>, next: &mut usize, peer: SocketAddr) -> u16 {
    if let Some((_, port)) = peers.iter().find(|(known, _)| *known == peer) {
        return *port;
    }
    let place = *next % MOST_PEERS;
    *next += 1;
    let port = FIRST_PEER_PORT + place as u16;
    let entry = (peer, port);
    match peers.get_mut(place) {
        Some(old) => *old = entry,
        None => peers.push(entry),
    }
    port
}
