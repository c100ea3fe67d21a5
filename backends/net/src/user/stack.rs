//! The network's inside: what the card sends is sorted by protocol, what the host's sockets have is passed on.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{SocketFlags, accept_with};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Address,
    Ipv4Packet, Ipv6Packet, UdpPacket,
};

use super::addresses::{DNS, Destination, GATEWAY, GATEWAY_MAC, destination, is_local};
use super::dhcp;
use super::fragments::Fragments;
use super::link::Link;
use super::names::Names;
use super::neighbours;
use super::ping::Ping;
use super::poller::{Poller, Ready, token};
use super::resolver::Resolver;
use super::tcp::Tcp;
use super::udp::Udp;
use crate::header::PacketHeader;

const DHCP_SERVER_PORT: u16 = 67;
const DHCP_CLIENT_PORT: u16 = 68;
/// Connections that are taken from a published port at a time.
const BURST: usize = 64;

/// See the module documentation.
pub(crate) struct Stack {
    pub link: Link,
    /// Of the other cards, if there are any.
    pub names: Option<Names>,
    poller: Arc<Poller>,
    tcp: Tcp,
    udp: Udp,
    ping: Ping,
    fragments: Fragments,
    /// There is no way out.
    isolated: bool,
    /// There is IPv6.
    ipv6: bool,
    /// When the card was told of the router last.
    advertised: Instant,
    /// Published TCP ports: where the host listens, and the card's port.
    listeners: Vec<(OwnedFd, u16)>,
}

impl Stack {
    pub(crate) fn new(
        poller: Arc<Poller>,
        link: Link,
        resolver: Resolver,
        isolated: bool,
        ipv6: bool,
    ) -> Stack {
        Stack {
            link,
            names: None,
            poller,
            tcp: Tcp::new(),
            udp: Udp::new(resolver),
            ping: Ping::new(),
            fragments: Fragments::default(),
            isolated,
            ipv6,
            advertised: Instant::now(),
            listeners: Vec::new(),
        }
    }

    /// Passes on connections to a listening socket of the host.
    pub(crate) fn publish_tcp(&mut self, listener: OwnedFd, port: u16) -> io::Result<()> {
        let token = token::TCP_PUBLISHED + self.listeners.len() as u64;
        self.poller.add_reader(&listener, token)?;
        self.listeners.push((listener, port));
        Ok(())
    }

    /// Passes on datagrams to a socket of the host.
    pub(crate) fn publish_udp(&mut self, socket: OwnedFd, port: u16) -> io::Result<()> {
        let token = token::UDP_PUBLISHED + self.udp.published() as u64;
        self.poller.add_reader(&socket, token)?;
        self.udp.publish(socket, port);
        Ok(())
    }

    /// Forgets all connections.
    pub(crate) fn stop(&mut self) {
        self.link.stop();
        self.tcp.clear();
        self.udp.clear();
        self.ping.clear();
        self.fragments.clear();
    }

    /// Takes a packet of the card's.
    pub(crate) fn packet(&mut self, packet: &[u8]) {
        let Some((_, frame)) = PacketHeader::split(packet) else {
            return;
        };
        let Ok(frame) = EthernetFrame::new_checked(frame) else {
            return;
        };
        if frame.src_addr().is_unicast() {
            // A system may give its card another address.
            self.link.card_mac = frame.src_addr();
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => self.arp(frame.payload()),
            EthernetProtocol::Ipv4 => self.ipv4(frame.payload()),
            EthernetProtocol::Ipv6 if self.ipv6 => self.ipv6(frame.payload()),
            _ => {}
        }
    }

    /// Every address of the network but the card's own is at the gateway.
    fn arp(&mut self, packet: &[u8]) {
        let Ok(Ok(repr)) = ArpPacket::new_checked(packet).map(|p| ArpRepr::parse(&p)) else {
            return;
        };
        let ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        } = repr
        else {
            return;
        };
        if ![GATEWAY, DNS].contains(&target_protocol_addr) {
            return;
        }
        let reply = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: GATEWAY_MAC,
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        let (header, len) = (PacketHeader::default(), reply.buffer_len());
        self.link.send(EthernetProtocol::Arp, header, len, |bytes| {
            reply.emit(&mut ArpPacket::new_unchecked(bytes));
        });
    }

    fn ipv4(&mut self, bytes: &[u8]) {
        let Ok(packet) = Ipv4Packet::new_checked(bytes) else {
            return;
        };
        let (from, to) = (packet.src_addr(), packet.dst_addr());
        if packet.version() != 4 {
            return;
        }
        // Before it has an address a card asks DHCP.
        let asks = from.is_unspecified() && to.is_broadcast();
        if !asks && !is_local(from.into()) {
            return;
        }
        let protocol = packet.next_header();
        if packet.more_frags() || packet.frag_offset() != 0 {
            let whole = match protocol {
                // TCP cuts its data itself.
                IpProtocol::Udp | IpProtocol::Icmp => self.fragments.add(&packet, Instant::now()),
                _ => None,
            };
            if let Some(payload) = whole {
                self.message(protocol, from, to, &payload);
            }
            return;
        }
        match protocol {
            IpProtocol::Tcp => self.tcp(&bytes[..packet.total_len().into()]),
            _ => self.message(protocol, from, to, packet.payload()),
        }
    }

    fn ipv6(&mut self, bytes: &[u8]) {
        let Ok(packet) = Ipv6Packet::new_checked(bytes) else {
            return;
        };
        let (from, to, payload) = (packet.src_addr(), packet.dst_addr(), packet.payload());
        // Packets with further headers between are not understood.
        match packet.next_header() {
            IpProtocol::Icmpv6 => neighbours::message(&mut self.link, from, to, payload),
            _ if !is_local(from.into()) => {}
            IpProtocol::Tcp => self.tcp(&bytes[..packet.total_len()]),
            IpProtocol::Udp => self.udp(from.into(), to.into(), payload),
            _ => {}
        }
    }

    fn tcp(&mut self, packet: &[u8]) {
        let Stack {
            link, poller, tcp, ..
        } = self;
        let (udp, isolated) = (&mut self.udp, self.isolated);
        tcp.packet(link, poller, packet, |peer| match destination(peer)? {
            _ if isolated => None,
            Destination::Host(host) => Some(host),
            Destination::Resolver => Some(udp.resolver()),
        });
    }

    fn message(&mut self, kind: IpProtocol, from: Ipv4Address, to: Ipv4Address, message: &[u8]) {
        match kind {
            IpProtocol::Udp => self.udp(from.into(), to.into(), message),
            IpProtocol::Icmp if !self.isolated || is_local(to.into()) => {
                (self.ping).message(&mut self.link, &self.poller, (from, to), message);
            }
            _ => {}
        }
    }

    fn udp(&mut self, from: IpAddr, to: IpAddr, datagram: &[u8]) {
        let Ok(udp) = UdpPacket::new_checked(datagram) else {
            return;
        };
        let (port, data) = (udp.dst_port(), udp.payload());
        let to_server = to == Ipv4Address::BROADCAST || to == GATEWAY;
        if port == DHCP_SERVER_PORT && to_server {
            return self.dhcp(data);
        }
        let from = SocketAddr::new(from, udp.src_port());
        if to == GATEWAY && self.udp.answer(from, port, data) {
            return;
        }
        let to = SocketAddr::new(to, port);
        if destination(to) == Some(Destination::Resolver)
            && let Some(reply) = self.names.as_ref().and_then(|names| names.answer(data))
        {
            return self.link.send_udp(to, from, &reply);
        }
        if self.isolated {
            return;
        }
        self.udp.datagram(&self.poller, from, to, data);
    }

    fn dhcp(&mut self, message: &[u8]) {
        if let Some((reply, broadcast)) =
            dhcp::answer(message, self.link.guest, self.names.is_some())
        {
            let to = match broadcast {
                true => Ipv4Address::BROADCAST,
                false => self.link.guest,
            };
            let from = (GATEWAY, DHCP_SERVER_PORT).into();
            self.link
                .send_udp(from, (to, DHCP_CLIENT_PORT).into(), &reply);
        }
    }

    /// The card has sent all it had.
    pub(crate) fn flush(&mut self) {
        self.tcp.flush(&mut self.link);
        if self.tcp.due_sooner() {
            self.poller.wake();
        }
    }

    /// The card has room.
    pub(crate) fn room(&mut self) {
        if !self.link.has_room() && self.link.room() {
            self.tcp.drive_all(&mut self.link);
        }
    }

    /// A socket of the host's is ready.
    pub(crate) fn ready(&mut self, ready: Ready) {
        let number = ready.token & !token::kind(ready.token);
        match token::kind(ready.token) {
            token::TCP => self.tcp.ready(&mut self.link, ready),
            token::UDP => self.udp.ready(&mut self.link, ready.token),
            token::PING => self.ping.ready(&mut self.link, ready.token),
            token::TCP_PUBLISHED => self.accept(number as usize),
            token::UDP_PUBLISHED => self.udp.published_ready(&mut self.link, number as usize),
            _ => {}
        }
    }

    fn accept(&mut self, number: usize) {
        let Some((listener, port)) = self.listeners.get(number) else {
            return;
        };
        for _ in 0..BURST {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            // Errors are those of connections that ended before they were taken.
            let Ok(host) = accept_with(listener, flags) else {
                break;
            };
            if !self.link.is_up() {
                // Nobody is there: the connection is closed.
                continue;
            }
            let taken = (self.tcp).accepted(&mut self.link, &self.poller, host, *port);
            if let Err(error) = taken {
                tracing::debug!("a connection to published port {port}: {error}");
            }
        }
    }

    /// Does what is due; how long until there is more.
    pub(crate) fn tick(&mut self) -> Option<Duration> {
        let room = self.link.has_room();
        let mut waits = [self.udp.expire(), self.ping.expire(), None, None];
        if self.ipv6 && self.link.is_up() {
            if self.advertised.elapsed() >= neighbours::ADVERTISE {
                self.advertised = Instant::now();
                neighbours::advertise(&mut self.link);
            }
            waits[3] = neighbours::ADVERTISE.checked_sub(self.advertised.elapsed());
        }
        if room {
            waits[2] = self.tcp.due();
            if waits[2] == Some(Duration::ZERO) {
                self.tcp.drive_all(&mut self.link);
                waits[2] = match self.link.has_room() {
                    true => self.tcp.due(),
                    false => None,
                };
            }
        }
        waits.into_iter().flatten().min()
    }
}
