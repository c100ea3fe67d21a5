//! The addresses of the user-mode network: those that QEMU's has as well.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

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
/// The IPv6 prefix, 64 bits: the card makes an address of it.
pub const PREFIX6: Ipv6Addr = Ipv6Addr::new(0xfd4c, 0x6f64, 0x6765, 0, 0, 0, 0, 0);
/// The gateway; as a destination, the host itself (its ::1).
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd4c, 0x6f64, 0x6765, 0, 0, 0, 0, 2);
/// The name server.
pub const DNS6: Ipv6Addr = Ipv6Addr::new(0xfd4c, 0x6f64, 0x6765, 0, 0, 0, 0, 3);
/// The gateway as a router on the link.
pub const ROUTER_LINK: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
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
    let host = match to.ip() {
        _ if to.port() == 0 => return None,
        IpAddr::V4(GATEWAY) => (Ipv4Addr::LOCALHOST, to.port()).into(),
        IpAddr::V6(GATEWAY6) => (Ipv6Addr::LOCALHOST, to.port()).into(),
        IpAddr::V4(DNS) | IpAddr::V6(DNS6) => {
            return (to.port() == DNS_PORT).then_some(Destination::Resolver);
        }
        ip if is_local(ip) || !is_one_host(ip) => return None,
        IpAddr::V4(ip) if ip.is_loopback() => return None,
        IpAddr::V6(ip) if is_of_a_link(ip) || ip.to_ipv4().is_some() => return None,
        _ => to,
    };
    Some(Destination::Host(host))
}

/// Whether the address can be that of one host.
pub(crate) fn is_one_host(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    !(ip.is_unspecified() || ip.is_multicast() || broadcast)
}

/// Whether the address is on the network itself.
pub(crate) fn is_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.to_bits() & MASK.to_bits() == GATEWAY.to_bits() & MASK.to_bits(),
        IpAddr::V6(ip) => ip.to_bits() >> 64 == PREFIX6.to_bits() >> 64,
    }
}

/// Whether the address means something on one link only.
fn is_of_a_link(ip: Ipv6Addr) -> bool {
    ip.segments()[0] & 0xffc0 == 0xfe80
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
            ("[fd4c:6f64:6765::2]:80", host("[::1]:80")),
            ("[fd4c:6f64:6765::3]:53", Some(Destination::Resolver)),
            ("[fd4c:6f64:6765::77]:80", None),
            ("[2001:db8::1]:443", host("[2001:db8::1]:443")),
            ("[::]:80", None),
            ("[::1]:80", None),
            ("[::ffff:127.0.0.1]:80", None),
            ("[fe80::1]:80", None),
            ("[ff02::1]:80", None),
        ];
        for (to, expected) in cases {
            assert_eq!(destination(to.parse().unwrap()), expected, "{to}");
        }
    }
}
