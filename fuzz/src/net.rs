//! The user-mode network, whose card sends what the input says.

use std::net::Ipv6Addr;
use std::sync::{Arc, Weak};

use lodger_clock::InputPort;
use lodger_net::addresses::{DNS6, GATEWAY6, ROUTER_LINK};
use lodger_net::{NetBackend, Offloads, UserNet, UserNetSpec};

/// Frames to a user-mode network without a way out.
pub fn user_net(data: &[u8]) {
    let spec = UserNetSpec {
        isolated: true,
        ipv6: Some(true),
        ..UserNetSpec::default()
    };
    let net = UserNet::start(&spec).expect("the host has threads");
    let card = Arc::new(Sink);
    let port: Weak<Sink> = Arc::downgrade(&card);
    net.connect(port);
    let mut rest = data;
    while let Some((&len, after)) = rest.split_first() {
        let len = (usize::from(len) * 8).min(after.len());
        let packet;
        (packet, rest) = after.split_at(len);
        match len % 16 {
            0 if len == 0 => net.stop(),
            8 => net.start(Offloads::default()),
            _ => net.start(Offloads {
                checksum: true,
                tso4: true,
            }),
        }
        net.send(packet);
        net.flush();
        net.room();
    }
}

/// Takes every other packet.
struct Sink;

impl InputPort for Sink {
    fn offer(&self, packet: &[u8]) -> usize {
        packet.len() * (packet.len() % 2)
    }
}

/// Frames that are understood: each behind its length in units of 8 bytes.
pub fn samples() -> Vec<Vec<u8>> {
    let ethernet = |kind: [u8; 2]| {
        let mut packet = vec![0; 12];
        packet.extend([0x52, 0x55, 0x0a, 0, 2, 2, 0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        packet.extend(kind);
        packet
    };
    let ip = |protocol: u8, to: [u8; 4], payload: &[u8]| {
        let len = (20 + payload.len()) as u16;
        let mut packet = ethernet([8, 0]);
        packet.extend([
            0x45,
            0,
            (len >> 8) as u8,
            len as u8,
            0,
            1,
            0x40,
            0,
            64,
            protocol,
            0,
            0,
        ]);
        packet.extend([10, 0, 2, 15]);
        packet.extend(to);
        packet.extend(payload);
        packet
    };
    let mut arp = ethernet([8, 6]);
    arp.extend([
        0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 10, 0, 2, 15,
    ]);
    arp.extend([0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    let syn = [
        0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x60, 2, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 5, 0xb4,
    ];
    let ping = [8, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3, 4];
    let query = [0x9c, 0x40, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4];
    let mut dhcp = vec![0, 68, 0, 67, 1, 0xc, 0, 0, 1, 1, 6, 0, 1, 2, 3, 4];
    dhcp.resize(8 + 236, 0);
    dhcp.extend([0x63, 0x82, 0x53, 0x63, 53, 1, 1, 55, 3, 1, 3, 6, 255]);
    dhcp.resize(8 + 260, 0);
    let ip6 = |protocol: u8, to: [u8; 16], payload: &[u8]| {
        let mut packet = ethernet([0x86, 0xdd]);
        packet.extend([0x60, 0, 0, 0, 0, payload.len() as u8, protocol, 255]);
        packet.extend(Ipv6Addr::new(0xfd4c, 0x6f64, 0x6765, 0, 0, 0, 0, 15).octets());
        packet.extend(to);
        packet.extend(payload);
        packet
    };
    let (gateway, dns) = (GATEWAY6.octets(), DNS6.octets());
    let solicits_router = [133, 0, 0, 0, 0, 0, 0, 0];
    let mut solicits = vec![135, 0, 0, 0, 0, 0, 0, 0];
    solicits.extend(gateway);
    let packets = [
        ip6(58, ROUTER_LINK.octets(), &solicits_router),
        ip6(58, gateway, &solicits),
        ip6(58, gateway, &[128, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3, 4]),
        ip6(6, gateway, &syn),
        ip6(17, dns, &query),
        arp,
        ip(6, [10, 0, 2, 2], &syn),
        ip(6, [192, 0, 2, 1], &syn),
        ip(17, [10, 0, 2, 3], &query),
        ip(1, [10, 0, 2, 2], &ping),
        ip(17, [255; 4], &dhcp),
    ];
    let framed = packets.map(|mut packet| {
        packet.resize(packet.len().next_multiple_of(8), 0);
        packet.insert(0, (packet.len() / 8) as u8);
        packet
    });
    let mut samples = framed.to_vec();
    samples.push(framed.concat());
    samples
}
