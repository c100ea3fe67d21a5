//! DHCP, UDP, DNS, ICMP echo.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use lodger_net::UserNetSpec;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::dhcpv4::{Event, Socket as Dhcp};
use smoltcp::socket::udp::{PacketBuffer, PacketMetadata, Socket};
use smoltcp::wire::IpEndpoint;

use crate::card::{ALL, NONE, System};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

fn socket(system: &mut System, port: u16) -> SocketHandle {
    let buffer = || PacketBuffer::new(vec![PacketMetadata::EMPTY; 8], vec![0; 65536]);
    let mut socket = Socket::new(buffer(), buffer());
    socket.bind(port).unwrap();
    system.sockets.add(socket)
}

/// The next datagram that arrives.
fn receive(system: &mut System, handle: SocketHandle) -> (Vec<u8>, IpEndpoint) {
    system.run(|system| system.socket::<Socket>(handle).can_recv());
    let (data, from) = system.socket::<Socket>(handle).recv().unwrap();
    (data.to_vec(), from.endpoint)
}

/// The next datagram that arrives at a socket of the host's.
fn host_receive(system: &mut System, host: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    host.set_nonblocking(true).unwrap();
    let mut buffer = vec![0; 65536];
    let mut got = None;
    system.run(|_| {
        got = host.recv_from(&mut buffer).ok();
        got.is_some()
    });
    let (n, from) = got.unwrap();
    (buffer[..n].to_vec(), from)
}

#[test]
fn dhcp_gives_the_address_the_gateway_and_the_name_server() {
    let mut system = System::without_address(&UserNetSpec::default(), NONE);
    let handle = system.sockets.add(Dhcp::new());
    let mut got = None;
    system.run(|system| {
        if let Some(Event::Configured(config)) = system.socket::<Dhcp>(handle).poll() {
            let servers: Vec<_> = config.dns_servers.iter().map(|s| s.to_string()).collect();
            got = Some((config.address.to_string(), config.router, servers));
        }
        got.is_some()
    });
    let expected = (
        "10.0.2.15/24".into(),
        Some(HOST),
        vec!["10.0.2.3".to_string()],
    );
    assert_eq!(got, Some(expected));
}

#[test]
fn datagrams_pass_both_ways() {
    let mut system = System::start(&UserNetSpec::default(), ALL);
    let host = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = host.local_addr().unwrap().port();
    let handle = socket(&mut system, 5000);
    for data in [&b"hello"[..], b"", &[7; 1400]] {
        system
            .socket::<Socket>(handle)
            .send_slice(data, (HOST, port))
            .unwrap();
        let (there, from) = host_receive(&mut system, &host);
        assert_eq!(there, data);
        host.send_to(&[data, b"!"].concat(), from).unwrap();
        let (back, from) = receive(&mut system, handle);
        assert_eq!(back, [data, b"!"].concat());
        assert_eq!(from, (HOST, port).into());
    }
}

#[test]
fn published_ports_lead_to_the_card() {
    let spec = UserNetSpec {
        publish: vec!["127.0.0.1:0:7/udp".parse().unwrap()],
        ..UserNetSpec::default()
    };
    let mut system = System::start(&spec, ALL);
    let handle = socket(&mut system, 7);
    let clients = [(); 3].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
    for (n, client) in clients.iter().enumerate() {
        client
            .send_to(&[n as u8], system.wire.net.published()[0])
            .unwrap();
    }
    for _ in &clients {
        let (data, from) = receive(&mut system, handle);
        let answer = [data[0], 100];
        system
            .socket::<Socket>(handle)
            .send_slice(&answer, from)
            .unwrap();
    }
    for (n, client) in clients.iter().enumerate() {
        let (answer, from) = host_receive(&mut system, client);
        assert_eq!(answer, [n as u8, 100]);
        assert_eq!(from, system.wire.net.published()[0]);
    }
}
