//! DHCP, UDP, DNS, ICMP echo.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use std::sync::atomic::Ordering;

use lodger_net::UserNetSpec;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::dhcpv4::{Event, Socket as Dhcp};
use smoltcp::socket::icmp;
use smoltcp::socket::udp::{PacketBuffer, PacketMetadata, Socket};
use smoltcp::wire::{Icmpv4Packet, IpEndpoint};

use crate::card::{ALL, NONE, System};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

pub fn socket(system: &mut System, port: u16) -> SocketHandle {
    let buffer = || PacketBuffer::new(vec![PacketMetadata::EMPTY; 8], vec![0; 65536]);
    let mut socket = Socket::new(buffer(), buffer());
    socket.bind(port).unwrap();
    system.sockets.add(socket)
}

/// The next datagram that arrives.
pub fn receive(system: &mut System, handle: SocketHandle) -> (Vec<u8>, IpEndpoint) {
    system.run(|system| system.socket::<Socket>(handle).can_recv());
    let (data, from) = system.socket::<Socket>(handle).recv().unwrap();
    (data.to_vec(), from.endpoint)
}

/// The next datagram that arrives at a socket of the host's.
pub fn host_receive(system: &mut System, host: &UdpSocket) -> (Vec<u8>, SocketAddr) {
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

#[test]
fn the_name_server_passes_queries_on_and_tries_the_next_one() {
    let servers = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
    let spec = UserNetSpec {
        name_servers: servers.iter().map(|s| s.local_addr().unwrap()).collect(),
        ..UserNetSpec::default()
    };
    let mut system = System::start(&spec, ALL);
    let handle = socket(&mut system, 5000);
    let dns = IpEndpoint::new(Ipv4Addr::new(10, 0, 2, 3).into(), 53);
    let ask = |system: &mut System, query: &[u8], server: &UdpSocket| {
        system
            .socket::<Socket>(handle)
            .send_slice(query, dns)
            .unwrap();
        let (asked, from) = host_receive(system, server);
        assert_eq!(asked, query);
        from
    };
    // The first server does not answer.
    ask(&mut system, b"who?", &servers[0]);
    let from = ask(&mut system, b"who?", &servers[1]);
    servers[1].send_to(b"me", from).unwrap();
    assert_eq!(receive(&mut system, handle), (b"me".to_vec(), dns));
    // What seems to come from a name server must.
    let from = ask(&mut system, b"who else?", &servers[0]);
    servers[1].send_to(b"a lie", from).unwrap();
    servers[0].send_to(b"the truth", from).unwrap();
    assert_eq!(receive(&mut system, handle), (b"the truth".to_vec(), dns));
}

#[test]
fn long_datagrams_travel_in_fragments() {
    let mut system = System::start(&UserNetSpec::default(), ALL);
    let host = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = host.local_addr().unwrap().port();
    let handle = socket(&mut system, 5000);
    let long: Vec<u8> = (0..9000).map(|i| (i / 7) as u8).collect();
    system
        .socket::<Socket>(handle)
        .send_slice(&long, (HOST, port))
        .unwrap();
    let (got, from) = host_receive(&mut system, &host);
    assert!(got == long, "{} bytes", got.len());
    host.send_to(&long, from).unwrap();
    let (got, _) = receive(&mut system, handle);
    assert!(got == long, "{} bytes", got.len());
    let longest = system.wire.inbox.longest.load(Ordering::Relaxed);
    assert!(longest <= 1526, "{longest}");
}

#[test]
fn the_gateway_answers_pings() {
    let mut system = System::start(&UserNetSpec::default(), ALL);
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(77)).unwrap();
    let handle = system.sockets.add(socket);
    let request = [8, 0, 0, 0, 0, 77, 0, 1, 1, 2, 3];
    let mut bytes = request.to_vec();
    Icmpv4Packet::new_unchecked(&mut bytes[..]).fill_checksum();
    let socket = system.socket::<icmp::Socket>(handle);
    socket.send_slice(&bytes, HOST.into()).unwrap();
    system.run(|system| system.socket::<icmp::Socket>(handle).can_recv());
    let (reply, from) = system.socket::<icmp::Socket>(handle).recv().unwrap();
    assert_eq!((reply[0], &reply[4..]), (0, &request[4..]));
    assert_eq!(from, HOST.into());
}
