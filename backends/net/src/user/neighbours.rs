//! IPv6 on the network: who is there, and which addresses the card may take (RFC 4861, RFC 4862, RFC 8106). ICMPv6 echo of the gateway.

use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration as HostDuration;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Duration;
use smoltcp::wire::{
    Icmpv6Packet, Icmpv6Repr, Ipv6Address, NdiscNeighborFlags, NdiscPrefixInfoFlags,
    NdiscPrefixInformation, NdiscRepr, NdiscRouterFlags,
};

use super::addresses::{DNS6, GATEWAY_MAC, GATEWAY6, MTU, PREFIX6, ROUTER_LINK};
use super::link::Link;

/// How often the router tells of itself without being asked.
pub(crate) const ADVERTISE: HostDuration = HostDuration::from_secs(600);
/// How long the card may believe what it has been told.
const LIFETIME: Duration = Duration::from_secs(3600);
/// The option with name servers, which the stack's crate does not know: type, length in units of 8 bytes.
const NAME_SERVERS: [u8; 4] = [25, 3, 0, 0];

/// Whether the host reaches addresses beyond its own networks.
pub(crate) fn host_has_ipv6() -> bool {
    // Nothing is sent: connecting a UDP socket looks for a route.
    let somewhere = SocketAddr::from(([0x2600, 0, 0, 0, 0, 0, 0, 1], 9));
    UdpSocket::bind("[::]:0")
        .and_then(|s| s.connect(somewhere))
        .is_ok()
}

/// Takes an ICMPv6 message of the card's.
pub(crate) fn message(link: &mut Link, from: Ipv6Addr, to: Ipv6Addr, bytes: &[u8]) {
    let Ok(packet) = Icmpv6Packet::new_checked(bytes) else {
        return;
    };
    let Ok(repr) = Icmpv6Repr::parse(&from, &to, &packet, &ChecksumCapabilities::ignored()) else {
        return;
    };
    match repr {
        Icmpv6Repr::EchoRequest {
            ident,
            seq_no,
            data,
        } if is_ours(to) => {
            let reply = Icmpv6Repr::EchoReply {
                ident,
                seq_no,
                data,
            };
            send(link, to, from, &reply, &[]);
        }
        Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, .. })
            if is_ours(target_addr) && !from.is_unspecified() =>
        {
            let reply = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
                flags: NdiscNeighborFlags::ROUTER
                    | NdiscNeighborFlags::SOLICITED
                    | NdiscNeighborFlags::OVERRIDE,
                target_addr,
                lladdr: Some(GATEWAY_MAC.into()),
            });
            send(link, target_addr, from, &reply, &[]);
        }
        Icmpv6Repr::Ndisc(NdiscRepr::RouterSolicit { .. }) => advertise(link),
        _ => {}
    }
}

/// Tells the card of the router, the prefix and the name server.
pub(crate) fn advertise(link: &mut Link) {
    let advert = Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert {
        hop_limit: 64,
        flags: NdiscRouterFlags::empty(),
        router_lifetime: LIFETIME,
        reachable_time: Duration::ZERO,
        retrans_time: Duration::ZERO,
        lladdr: Some(GATEWAY_MAC.into()),
        mtu: Some(MTU as u32),
        prefix_info: Some(NdiscPrefixInformation {
            prefix_len: 64,
            flags: NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF,
            valid_lifetime: LIFETIME,
            preferred_lifetime: LIFETIME,
            prefix: PREFIX6,
        }),
    });
    let mut servers = NAME_SERVERS.to_vec();
    servers.extend((LIFETIME.secs() as u32).to_be_bytes());
    servers.extend(DNS6.octets());
    let everybody = Ipv6Address::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    send(link, ROUTER_LINK, everybody, &advert, &servers);
}

fn is_ours(address: Ipv6Addr) -> bool {
    [GATEWAY6, DNS6, ROUTER_LINK].contains(&address)
}

/// Sends a message, with these bytes behind it.
fn send(link: &mut Link, from: Ipv6Addr, to: Ipv6Addr, message: &Icmpv6Repr, rest: &[u8]) {
    let len = message.buffer_len();
    let mut bytes = vec![0; len + rest.len()];
    let none = ChecksumCapabilities::ignored();
    let mut start = Icmpv6Packet::new_unchecked(&mut bytes[..len]);
    message.emit(&from, &to, &mut start, &none);
    bytes[len..].copy_from_slice(rest);
    Icmpv6Packet::new_unchecked(&mut bytes[..]).fill_checksum(&from, &to);
    link.send_icmp6(from, to, &bytes);
}
