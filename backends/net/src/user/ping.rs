//! ICMP echo: the gateway answers itself; requests to others go through the host's ping sockets, where its users may have them
//! (`net.ipv4.ping_group_range`, icmp(7)), and are lost otherwise. RFC 792.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recvfrom, sendto,
    socket_with,
};
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, IpProtocol};

use super::addresses::{DNS, Destination, GATEWAY, destination};
use super::link::Link;
use super::poller::{Poller, Token, token};

/// Sockets at a time at most; the one that was used least recently makes room.
const MOST_FLOWS: usize = 64;
/// A socket that is not used for this long is closed.
const IDLE: Duration = Duration::from_secs(30);
/// Answers that are taken from a socket at a time.
const BURST: usize = 64;

/// All sockets: one for each address and identifier of the card's.
pub(crate) struct Ping {
    flows: HashMap<Token, Flow>,
    next_token: Token,
}

struct Flow {
    card: Ipv4Addr,
    ident: u16,
    socket: OwnedFd,
    used: Instant,
}

impl Ping {
    pub(crate) fn new() -> Ping {
        Ping {
            flows: HashMap::new(),
            next_token: token::PING,
        }
    }

    pub(crate) fn clear(&mut self) {
        self.flows.clear();
    }

    /// Takes an ICMP message of the card's.
    pub(crate) fn message(
        &mut self,
        link: &mut Link,
        poller: &Poller,
        (card, to): (Ipv4Addr, Ipv4Addr),
        message: &[u8],
    ) {
        let Ok(packet) = Icmpv4Packet::new_checked(message) else {
            return;
        };
        if packet.msg_type() != Icmpv4Message::EchoRequest {
            return;
        }
        if to == GATEWAY || to == DNS {
            let reply = echo(message, Icmpv4Message::EchoReply, packet.echo_ident());
            return link.send_ipv4(to, card, IpProtocol::Icmp, &reply);
        }
        let asked = self.ask(poller, (card, packet.echo_ident()), to, message);
        if let Err(error) = asked {
            tracing::debug!("ping {card} -> {to}: {error}");
        }
    }

    fn ask(
        &mut self,
        poller: &Poller,
        (card, ident): (Ipv4Addr, u16),
        to: Ipv4Addr,
        message: &[u8],
    ) -> io::Result<()> {
        // Any port is as good.
        let to = SocketAddr::from((to, 7));
        if destination(to) != Some(Destination::Host(to)) {
            return Err(io::ErrorKind::HostUnreachable.into());
        }
        let same = |(_, flow): &(&Token, &mut Flow)| flow.card == card && flow.ident == ident;
        if let Some((_, flow)) = self.flows.iter_mut().find(same) {
            flow.used = Instant::now();
            sendto(&flow.socket, message, SendFlags::empty(), &to)?;
            return Ok(());
        }
        if self.flows.len() >= MOST_FLOWS {
            let oldest = self.flows.iter().min_by_key(|(_, flow)| flow.used);
            let oldest = oldest.map(|(&token, _)| token);
            oldest.and_then(|token| self.flows.remove(&token));
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let protocol = Some(ipproto::ICMP);
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, protocol)?;
        poller.add_reader(&socket, self.next_token)?;
        sendto(&socket, message, SendFlags::empty(), &to)?;
        let flow = Flow {
            card,
            ident,
            socket,
            used: Instant::now(),
        };
        self.flows.insert(self.next_token, flow);
        self.next_token += 1;
        Ok(())
    }

    /// The socket has something to read.
    pub(crate) fn ready(&mut self, link: &mut Link, token: Token) {
        let Some(flow) = self.flows.get_mut(&token) else {
            return;
        };
        let mut buffer = [0; 1 << 16];
        for _ in 0..BURST {
            let Ok((n, _, from)) = recvfrom(&flow.socket, &mut buffer[..], RecvFlags::empty())
            else {
                break;
            };
            let from = from.and_then(|from| SocketAddrV4::try_from(from).ok());
            let (Some(from), Ok(packet)) = (from, Icmpv4Packet::new_checked(&buffer[..n])) else {
                continue;
            };
            // The host has put an identifier of its own there.
            let reply = echo(&buffer[..n], packet.msg_type(), flow.ident);
            flow.used = Instant::now();
            link.send_ipv4(*from.ip(), flow.card, IpProtocol::Icmp, &reply);
        }
    }

    /// Closes sockets that are not used any more; how long until the next one.
    pub(crate) fn expire(&mut self) -> Option<Duration> {
        let now = Instant::now();
        self.flows
            .retain(|_, flow| now.duration_since(flow.used) < IDLE);
        let left = |flow: &Flow| IDLE - now.duration_since(flow.used);
        self.flows.values().map(left).min()
    }
}

/// The echo message with another type and identifier.
fn echo(message: &[u8], kind: Icmpv4Message, ident: u16) -> Vec<u8> {
    let mut bytes = message.to_vec();
    let mut packet = Icmpv4Packet::new_unchecked(&mut bytes[..]);
    packet.set_msg_type(kind);
    packet.set_echo_ident(ident);
    packet.fill_checksum();
    bytes
}
