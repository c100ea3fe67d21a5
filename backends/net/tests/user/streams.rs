//! TCP.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use lodger_net::{NetBackend, Offloads, UserNetSpec};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};

use crate::card::{ALL, NONE, System};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

pub fn socket(system: &mut System) -> SocketHandle {
    let buffer = || SocketBuffer::new(vec![0; 128 << 10]);
    system.sockets.add(Socket::new(buffer(), buffer()))
}

/// Begins a connection to a port of the host.
fn connect(system: &mut System, port: u16, own_port: u16) -> SocketHandle {
    let handle = socket(system);
    let System { stack, sockets, .. } = system;
    let socket = sockets.get_mut::<Socket>(handle);
    socket
        .connect(stack.context(), (HOST, port), own_port)
        .unwrap();
    handle
}

/// Bytes that tell where they are.
pub fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// Sends `data`, ends its side, and returns all that comes back.
pub fn exchange(system: &mut System, handle: SocketHandle, data: &[u8]) -> Vec<u8> {
    let (mut sent, mut got, mut closed) = (0, Vec::new(), false);
    system.run(|system| {
        let socket = system.socket::<Socket>(handle);
        if sent < data.len() && socket.can_send() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        if sent == data.len() && !closed && socket.may_send() {
            socket.close();
            closed = true;
        }
        while socket.can_recv() {
            socket
                .recv(|bytes| (bytes.len(), got.extend_from_slice(bytes)))
                .unwrap();
        }
        closed && !socket.may_recv() && socket.state() != State::SynSent
    });
    got
}

/// A host that reads until the end, and then sends `answer`.
pub fn serve(listener: TcpListener, answer: Vec<u8>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        stream.write_all(&answer).unwrap();
        got
    })
}

#[test]
fn bytes_pass_both_ways_and_each_half_closes_alone() {
    for (offloads, room) in [(ALL, 0), (NONE, 0), (ALL, 3), (NONE, 2)] {
        let mut system = System::start(&UserNetSpec::default(), offloads);
        system.wire.inbox.room.store(room, Ordering::Relaxed);
        let (listener, port) = listener();
        let (there, back) = (pattern(3_000_001, 1), pattern(5_000_003, 2));
        let host = serve(listener, back.clone());
        let handle = connect(&mut system, port, 40_000);
        let got = exchange(&mut system, handle, &there);
        assert!(got == back, "{offloads:?}: {} bytes came back", got.len());
        assert!(host.join().unwrap() == there, "{offloads:?}");
        let longest = system.wire.inbox.longest.load(Ordering::Relaxed);
        assert_eq!(longest > 1526, offloads.tso4, "{offloads:?}: {longest}");
    }
}

#[test]
fn many_connections_at_once() {
    let mut system = System::start(&UserNetSpec::default(), ALL);
    let (listener, port) = listener();
    const COUNT: usize = 200;
    let host = std::thread::spawn(move || {
        let echo = |mut stream: TcpStream| {
            std::thread::spawn(move || {
                let mut reader = stream.try_clone().unwrap();
                std::io::copy(&mut reader, &mut stream).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            })
        };
        let echoes: Vec<_> = (0..COUNT)
            .map(|_| echo(listener.accept().unwrap().0))
            .collect();
        echoes.into_iter().for_each(|echo| echo.join().unwrap());
    });
    let buffer = || SocketBuffer::new(vec![0; 4096]);
    let mut connections: Vec<_> = (0..COUNT)
        .map(|i| {
            let handle = system.sockets.add(Socket::new(buffer(), buffer()));
            let System { stack, sockets, .. } = &mut system;
            let socket = sockets.get_mut::<Socket>(handle);
            socket
                .connect(stack.context(), (HOST, port), 20_000 + i as u16)
                .unwrap();
            (handle, pattern(20_000, i), 0, Vec::new(), false)
        })
        .collect();
    system.run(|system| {
        let mut done = true;
        for (handle, data, sent, got, closed) in &mut connections {
            let socket = system.socket::<Socket>(*handle);
            if *sent < data.len() && socket.can_send() {
                *sent += socket.send_slice(&data[*sent..]).unwrap();
            }
            if *sent == data.len() && !*closed {
                socket.close();
                *closed = true;
            }
            while socket.can_recv() {
                socket
                    .recv(|bytes| (bytes.len(), got.extend_from_slice(bytes)))
                    .unwrap();
            }
            done &= *closed && !socket.may_recv();
        }
        done
    });
    for (_, data, _, got, _) in &connections {
        assert!(data == got, "{} bytes of {}", got.len(), data.len());
    }
    host.join().unwrap();
}

#[test]
fn a_port_where_nobody_listens_refuses() {
    let mut system = System::start(&UserNetSpec::default(), ALL);
    let (listener, port) = listener();
    drop(listener);
    let handle = connect(&mut system, port, 40_000);
    system.run(|system| system.socket::<Socket>(handle).state() == State::Closed);
}

#[test]
fn resets_pass_from_the_host() {
    let mut system = System::start(&UserNetSpec::default(), ALL);
    let (listener, port) = listener();
    let handle = connect(&mut system, port, 40_000);
    system.run(|system| system.socket::<Socket>(handle).may_send());
    let (stream, _) = listener.accept().unwrap();
    system
        .socket::<Socket>(handle)
        .send_slice(b"not read")
        .unwrap();
    system.run(|system| system.socket::<Socket>(handle).send_queue() == 0);
    let mut byte = [0];
    // It has arrived; closing without reading it resets.
    while stream.peek(&mut byte).unwrap() == 0 {}
    drop(stream);
    system.run(|system| system.socket::<Socket>(handle).state() == State::Closed);
}

#[test]
fn resets_pass_to_the_host() {
    let mut system = System::start(&UserNetSpec::default(), ALL);
    let (listener, port) = listener();
    let handle = connect(&mut system, port, 40_000);
    system.run(|system| system.socket::<Socket>(handle).may_send());
    let (mut stream, _) = listener.accept().unwrap();
    system.socket::<Socket>(handle).abort();
    let host = std::thread::spawn(move || stream.read(&mut [0]).unwrap_err().kind());
    system.run(|_| host.is_finished());
    assert_eq!(host.join().unwrap(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn a_card_that_goes_down_ends_its_connections() {
    let mut system = System::start(&UserNetSpec::default(), ALL);
    let (listener, port) = listener();
    let handle = connect(&mut system, port, 40_000);
    system.run(|system| system.socket::<Socket>(handle).may_send());
    let (mut stream, _) = listener.accept().unwrap();
    system.wire.net.stop();
    assert!(stream.read(&mut [0]).is_err());
    // Up again, it works as before, and the old connection is unknown.
    system.wire.net.start(Offloads::default());
    system
        .socket::<Socket>(handle)
        .send_slice(b"is anybody there?")
        .unwrap();
    system.run(|system| system.socket::<Socket>(handle).state() == State::Closed);
    let again = connect(&mut system, port, 40_001);
    system.run(|system| system.socket::<Socket>(again).may_send());
}

#[test]
fn published_ports_lead_to_the_card() {
    let spec = UserNetSpec {
        publish: vec!["127.0.0.1:0:80".parse().unwrap()],
        ..UserNetSpec::default()
    };
    let mut system = System::start(&spec, ALL);
    let address: SocketAddr = system.wire.net.published()[0];
    let handle = socket(&mut system);
    system.socket::<Socket>(handle).listen(80).unwrap();
    let client = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let mut request = Vec::new();
    system.run(|system| {
        let socket = system.socket::<Socket>(handle);
        while socket.can_recv() {
            socket
                .recv(|bytes| (bytes.len(), request.extend_from_slice(bytes)))
                .unwrap();
        }
        request.ends_with(b"\r\n\r\n")
    });
    let socket = system.socket::<Socket>(handle);
    assert_eq!(socket.remote_endpoint().unwrap().addr, HOST.into());
    socket.send_slice(b"HTTP/1.0 200 OK\r\n\r\nhello").unwrap();
    socket.close();
    system.run(|_| client.is_finished());
    assert_eq!(client.join().unwrap(), "HTTP/1.0 200 OK\r\n\r\nhello");
    // Nobody listens now: the next one is refused.
    let client = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.read(&mut [0])
    });
    system.run(|_| client.is_finished());
    assert!(client.join().unwrap().is_err());
}

#[test]
fn a_port_in_use_is_named() {
    let (_listener, port) = listener();
    let spec = UserNetSpec {
        publish: vec![format!("127.0.0.1:{port}:80").parse().unwrap()],
        ..UserNetSpec::default()
    };
    let error = lodger_net::UserNet::start(&spec).err().unwrap().to_string();
    assert!(
        error.contains(&format!("127.0.0.1:{port}:80/tcp")),
        "{error}"
    );
}

#[test]
fn an_isolated_card_reaches_nobody_but_can_be_reached() {
    let spec = UserNetSpec {
        publish: vec!["127.0.0.1:0:80".parse().unwrap()],
        isolated: true,
        ..UserNetSpec::default()
    };
    let mut system = System::start(&spec, ALL);
    let (_listener, port) = listener();
    let handle = connect(&mut system, port, 40_000);
    system.run(|system| system.socket::<Socket>(handle).state() == State::Closed);
    let handle = socket(&mut system);
    system.socket::<Socket>(handle).listen(80).unwrap();
    let _client = TcpStream::connect(system.wire.net.published()[0]).unwrap();
    system.run(|system| system.socket::<Socket>(handle).may_send());
}

#[test]
fn names_are_asked_for_over_connections_too() {
    let (listener, port) = listener();
    let spec = UserNetSpec {
        name_servers: vec![([127, 0, 0, 1], port).into()],
        ..UserNetSpec::default()
    };
    let mut system = System::start(&spec, ALL);
    let host = serve(listener, b"answer".to_vec());
    let handle = socket(&mut system);
    let System { stack, sockets, .. } = &mut system;
    let dns = (Ipv4Addr::new(10, 0, 2, 3), 53);
    let socket = sockets.get_mut::<Socket>(handle);
    socket.connect(stack.context(), dns, 40_000).unwrap();
    assert_eq!(exchange(&mut system, handle, b"query"), b"answer");
    assert_eq!(host.join().unwrap(), b"query");
}
