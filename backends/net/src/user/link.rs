//! The wire to the card: frames are built here, and wait while the card has no room.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Weak;

use lodger_clock::InputPort;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ETHERNET_HEADER_LEN, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    IPV4_HEADER_LEN, IPV6_HEADER_LEN, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr,
    UDP_HEADER_LEN, UdpPacket, UdpRepr,
};

use super::addresses::{GATEWAY_MAC, MTU};
use crate::Offloads;
use crate::header::{HEADER_LEN, PacketHeader};

/// Packets that wait for the card at most; what comes then is lost, as on any network.
const MOST_WAITING: usize = 256;
/// Of IP packets that do not say otherwise.
const HOPS: u8 = 64;

/// See the module documentation.
pub(crate) struct Link {
    card: Option<Weak<dyn InputPort>>,
    /// None: the card is down.
    offloads: Option<Offloads>,
    /// The card's address.
    pub card_mac: EthernetAddress,
    /// As DHCP gives it.
    pub guest: Ipv4Addr,
    waiting: VecDeque<Vec<u8>>,
    packet: Vec<u8>,
    /// Of the latest packet that may have been cut.
    ident: u16,
}

impl Link {
    pub(crate) fn new(card_mac: EthernetAddress, guest: Ipv4Addr) -> Link {
        Link {
            card: None,
            offloads: None,
            card_mac,
            guest,
            waiting: VecDeque::new(),
            packet: Vec::new(),
            ident: 0,
        }
    }

    pub(crate) fn connect(&mut self, card: Weak<dyn InputPort>) {
        self.card = Some(card);
    }

    pub(crate) fn start(&mut self, offloads: Offloads) {
        self.offloads = Some(offloads);
    }

    pub(crate) fn stop(&mut self) {
        self.offloads = None;
        self.waiting.clear();
    }

    pub(crate) fn is_up(&self) -> bool {
        self.offloads.is_some()
    }

    pub(crate) fn offloads(&self) -> Offloads {
        self.offloads.unwrap_or_default()
    }

    /// Whether a packet would not have to wait. Those who can produce their packets later ask first.
    pub(crate) fn has_room(&self) -> bool {
        self.is_up() && self.waiting.is_empty()
    }

    /// The card may have room again; whether all that waited has gone.
    pub(crate) fn room(&mut self) -> bool {
        while let Some(packet) = self.waiting.front() {
            if !offer(&self.card, packet) {
                return false;
            }
            self.waiting.pop_front();
        }
        true
    }

    /// Sends an Ethernet frame of `len` bytes behind its header, which `fill` writes.
    pub(crate) fn send<R>(
        &mut self,
        kind: EthernetProtocol,
        header: PacketHeader,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let start = HEADER_LEN + ETHERNET_HEADER_LEN;
        // What was there is written over.
        self.packet.resize(start + len, 0);
        self.packet[..HEADER_LEN].copy_from_slice(&header.to_bytes());
        let repr = EthernetRepr {
            src_addr: GATEWAY_MAC,
            dst_addr: self.card_mac,
            ethertype: kind,
        };
        repr.emit(&mut EthernetFrame::new_unchecked(
            &mut self.packet[HEADER_LEN..],
        ));
        let result = fill(&mut self.packet[start..]);
        if self.is_up() {
            let at_once = self.waiting.is_empty() && offer(&self.card, &self.packet);
            if !at_once && self.waiting.len() < MOST_WAITING {
                self.waiting.push_back(self.packet.clone());
            }
        }
        result
    }

    /// Sends an IPv4 packet, or several fragments of it if it is longer than the MTU.
    pub(crate) fn send_ipv4(
        &mut self,
        source: Ipv4Addr,
        to: Ipv4Addr,
        protocol: IpProtocol,
        payload: &[u8],
    ) {
        // In fragments all but the last one have a multiple of 8 bytes (RFC 791).
        const PART: usize = (MTU - IPV4_HEADER_LEN) & !7;
        self.ident = self.ident.wrapping_add(1);
        let parts = payload.len().div_ceil(PART).max(1);
        for n in 0..parts {
            let start = n * PART;
            let part = &payload[start..payload.len().min(start + PART)];
            let repr = Ipv4Repr {
                src_addr: source,
                dst_addr: to,
                next_header: protocol,
                payload_len: part.len(),
                hop_limit: HOPS,
            };
            let ident = self.ident;
            let whole = IPV4_HEADER_LEN + part.len();
            let header = PacketHeader::default();
            self.send(EthernetProtocol::Ipv4, header, whole, |bytes| {
                let mut packet = Ipv4Packet::new_unchecked(bytes);
                repr.emit(&mut packet, &ChecksumCapabilities::ignored());
                if parts > 1 {
                    packet.set_dont_frag(false);
                    packet.set_ident(ident);
                    packet.set_more_frags(n + 1 < parts);
                    packet.set_frag_offset(start as u16);
                }
                packet.fill_checksum();
                packet.payload_mut().copy_from_slice(part);
            });
        }
    }

    /// Sends an IPv6 packet; one that is longer than the MTU is lost.
    fn send_ipv6(
        &mut self,
        (source, to): (Ipv6Addr, Ipv6Addr),
        protocol: IpProtocol,
        hop_limit: u8,
        payload: &[u8],
    ) {
        let repr = Ipv6Repr {
            src_addr: source,
            dst_addr: to,
            next_header: protocol,
            payload_len: payload.len(),
            hop_limit,
        };
        let whole = IPV6_HEADER_LEN + payload.len();
        if whole <= MTU {
            let header = PacketHeader::default();
            self.send(EthernetProtocol::Ipv6, header, whole, |bytes| {
                let mut packet = Ipv6Packet::new_unchecked(bytes);
                repr.emit(&mut packet);
                packet.payload_mut().copy_from_slice(payload);
            });
        }
    }

    /// Sends an ICMPv6 message, with the hop limit that those of the link must have (RFC 4861).
    pub(crate) fn send_icmp6(&mut self, source: Ipv6Addr, to: Ipv6Addr, message: &[u8]) {
        self.send_ipv6((source, to), IpProtocol::Icmpv6, 255, message);
    }

    /// Sends a UDP datagram; both addresses are of the same kind.
    pub(crate) fn send_udp(&mut self, source: SocketAddr, to: SocketAddr, data: &[u8]) {
        let repr = UdpRepr {
            src_port: source.port(),
            dst_port: to.port(),
        };
        let mut bytes = vec![0; UDP_HEADER_LEN + data.len()];
        repr.emit(
            &mut UdpPacket::new_unchecked(&mut bytes[..]),
            &source.ip().into(),
            &to.ip().into(),
            data.len(),
            |payload| payload.copy_from_slice(data),
            &ChecksumCapabilities::default(),
        );
        match (source.ip(), to.ip()) {
            (IpAddr::V4(source), IpAddr::V4(to)) => {
                self.send_ipv4(source, to, IpProtocol::Udp, &bytes);
            }
            (IpAddr::V6(source), IpAddr::V6(to)) => {
                self.send_ipv6((source, to), IpProtocol::Udp, HOPS, &bytes);
            }
            _ => unreachable!("a datagram from {source} to {to}"),
        }
    }
}

/// Whether the card has taken the packet; a card that is gone takes everything.
fn offer(card: &Option<Weak<dyn InputPort>>, packet: &[u8]) -> bool {
    match card.as_ref().and_then(Weak::upgrade) {
        Some(card) => card.offer(packet) > 0,
        None => true,
    }
}
