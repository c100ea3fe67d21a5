//! The addresses of the user-mode network: those that QEMU's has as well.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use smoltcp::wire::EthernetAddress;

/// The card's address, as DHCP gives it; published ports lead there.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The gateway; as a destination, the host itself (its 127.0.0.1).
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server: passes queries on to the host's.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// Bits of the network's prefix.
pub const PREFIX: u8 = 24;
/// The network mask of `PREFIX`.
pub const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// The link-layer address of everything on the network that is not the card.
pub const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 0x0a, 0x00, 0x02, 0x02]);
/// Bytes of an IP packet on the network.
pub const MTU: usize = 1500;

/// The port of name servers.
pub(crate) const DNS_PORT: u16 = 53;

/// What a destination means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Destination {
    /// The host's name server.
    Resolver,
    /// This address, as the host sees it.
    Host(SocketAddr),
}

/// Where a packet for `to` goes; none if nowhere.
pub(crate) fn destination(to: SocketAddr) -> Option<Destination> {
    let IpAddr::V4(ip) = to.ip() else { return None };
    if ip == GATEWAY {
        let host = SocketAddr::from((Ipv4Addr::LOCALHOST, to.port()));
        return Some(Destination::Host(host));
    }
    if ip == DNS {
        return (to.port() == DNS_PORT).then_some(Destination::Resolver);
    }
    let nowhere = ip.is_unspecified()
        || ip.is_loopback()
        || ip.is_multicast()
        || ip.is_broadcast()
        || is_local(ip)
        || to.port() == 0;
    (!nowhere).then_some(Destination::Host(to))
}

/// Whether the address is on the network itself.
pub(crate) fn is_local(ip: Ipv4Addr) -> bool {
    ip.to_bits() & MASK.to_bits() == GATEWAY.to_bits() & MASK.to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations() {
        let host = |text: &str| Some(Destination::Host(text.parse().unwrap()));
        let cases = [
            ("10.0.2.2:80", host("127.0.0.1:80")),
            ("10.0.2.3:53", Some(Destination::Resolver)),
            ("10.0.2.3:80", None),
            ("10.0.2.77:80", None),
            ("192.0.2.1:443", host("192.0.2.1:443")),
            ("192.0.2.1:0", None),
            ("0.0.0.0:80", None),
            ("127.0.0.1:80", None),
            ("224.0.0.251:5353", None),
            ("255.255.255.255:9", None),
        ];
        for (to, expected) in cases {
            assert_eq!(destination(to.parse().unwrap()), expected, "{to}");
        }
    }
}
