//! The DHCP server: one address for one card, and the names' domain if other cards have names. RFC 2131, RFC 2132.

use std::net::Ipv4Addr;

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr};

use super::addresses::{DNS, GATEWAY, MASK};
use super::names::DOMAIN;

/// Seconds that the address is given for. It never becomes another one.
const LEASE: u32 = 24 * 3600;
const OPTION_DOMAIN: u8 = 15;

/// The answer to a client's message, if there is one, and whether it must be broadcast.
pub(crate) fn answer(message: &[u8], guest: Ipv4Addr, names: bool) -> Option<(Vec<u8>, bool)> {
    let packet = DhcpPacket::new_checked(message).ok()?;
    let request = DhcpRepr::parse(&packet).ok()?;
    let for_another = request.server_identifier.is_some_and(|id| id != GATEWAY);
    let asked = match request.requested_ip {
        Some(ip) => ip,
        None if request.client_ip.is_unspecified() => guest,
        None => request.client_ip,
    };
    let message_type = match request.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request if for_another => return None,
        DhcpMessageType::Request if asked != guest => DhcpMessageType::Nak,
        DhcpMessageType::Request | DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return None,
    };
    let gives = message_type != DhcpMessageType::Nak;
    let informs = request.message_type == DhcpMessageType::Inform;
    let none = Ipv4Addr::UNSPECIFIED;
    let lease = (gives && !informs).then_some(LEASE);
    let domain = [DhcpOption {
        kind: OPTION_DOMAIN,
        data: DOMAIN.as_bytes(),
    }];
    let reply = DhcpRepr {
        message_type,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if informs { request.client_ip } else { none },
        your_ip: if gives && !informs { guest } else { none },
        server_ip: none,
        router: gives.then_some(GATEWAY),
        subnet_mask: gives.then_some(MASK),
        relay_agent_ip: none,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(GATEWAY),
        parameter_request_list: None,
        dns_servers: gives.then(|| [DNS].into_iter().collect()),
        max_size: None,
        lease_duration: lease,
        renew_duration: None,
        rebind_duration: None,
        additional_options: if gives && names { &domain } else { &[] },
    };
    let mut bytes = vec![0; reply.buffer_len()];
    reply
        .emit(&mut DhcpPacket::new_unchecked(&mut bytes[..]))
        .ok()?;
    Some((bytes, request.broadcast || !gives))
}
