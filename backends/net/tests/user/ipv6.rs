//! IPv6, on hosts that have it on loopback.

use std::net::{Ipv6Addr, TcpListener, UdpSocket};

use lodger_net::UserNetSpec;
use lodger_net::addresses::{DNS6, GATEWAY6, PREFIX6, ROUTER_LINK};
use smoltcp::socket::tcp;
use smoltcp::socket::udp::Socket;
use smoltcp::wire::{IpAddress, IpEndpoint};

use crate::card::{ALL, NONE, System};
use crate::{datagrams, streams};

fn spec() -> UserNetSpec {
    UserNetSpec {
        ipv6: Some(true),
        ..UserNetSpec::default()
    }
}

/// A system that has found its address.
fn system(spec: &UserNetSpec, offloads: lodger_net::Offloads) -> System {
    let mut system = System::without_address(spec, offloads);
    let in_prefix = |ip: Ipv6Addr| ip.octets()[..8] == PREFIX6.octets()[..8];
    system.run(|system| {
        let mut addresses = system.stack.ip_addrs().iter().map(|cidr| cidr.address());
        addresses.any(|ip| matches!(ip, IpAddress::Ipv6(ip) if in_prefix(ip)))
    });
    system
}

fn host_has_it() -> bool {
    UdpSocket::bind("[::1]:0").is_ok()
}

#[test]
fn the_router_gives_prefix_and_way_out() {
    let mut system = system(&spec(), NONE);
    system.run(|system| {
        let route = system.stack.routes().get_default_ipv6_route();
        route.is_some_and(|route| route.via_router == ROUTER_LINK.into())
    });
}

#[test]
fn connections() {
    if !host_has_it() {
        return;
    }
    for offloads in [ALL, NONE] {
        let mut system = system(&spec(), offloads);
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (there, back) = (
            streams::pattern(1_000_001, 1),
            streams::pattern(1_000_003, 2),
        );
        let host = streams::serve(listener, back.clone());
        let handle = streams::socket(&mut system);
        let System { stack, sockets, .. } = &mut system;
        let socket = sockets.get_mut::<tcp::Socket>(handle);
        socket
            .connect(stack.context(), (GATEWAY6, port), 40_000)
            .unwrap();
        assert!(streams::exchange(&mut system, handle, &there) == back);
        assert!(host.join().unwrap() == there);
    }
}

#[test]
fn datagrams_to_the_host_and_the_name_server() {
    if !host_has_it() {
        return;
    }
    let host = UdpSocket::bind("[::1]:0").unwrap();
    let port = host.local_addr().unwrap().port();
    let spec = UserNetSpec {
        name_servers: vec![host.local_addr().unwrap()],
        ..spec()
    };
    let mut system = system(&spec, ALL);
    let handle = datagrams::socket(&mut system, 5000);
    for to in [(GATEWAY6, port), (DNS6, 53)] {
        let socket = system.socket::<Socket>(handle);
        socket.send_slice(b"there", to).unwrap();
        let (there, from) = datagrams::host_receive(&mut system, &host);
        assert_eq!(there, b"there");
        host.send_to(b"back", from).unwrap();
        let back = datagrams::receive(&mut system, handle);
        assert_eq!(back, (b"back".to_vec(), IpEndpoint::from(to)));
    }
}
