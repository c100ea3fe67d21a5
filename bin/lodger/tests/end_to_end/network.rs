//! The guest's network: DHCP, the host and published ports, with an unmodified kernel and busybox.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use crate::process::Lodger;

#[test]
fn the_guest_reaches_the_host_and_the_host_the_guest() {
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = server.local_addr().expect("it is bound");
    let host = std::thread::spawn(move || {
        let (mut stream, _) = server.accept().expect("the guest comes");
        let mut request = [0; 4096];
        let n = stream.read(&mut request).expect("a request");
        let body = "from the host\n".repeat(20_000);
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).expect("it listens");
        stream.write_all(body.as_bytes()).expect("it listens");
        String::from_utf8_lossy(&request[..n]).into_owned()
    });
    // Free a moment ago.
    let published = TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .expect("a port");
    let command = format!(
        "cat /etc/resolv.conf; wget -q -O - http://10.0.2.2:{}/it | sort | uniq -c; \
        echo listening; echo from the guest | nc -l -p 80",
        address.port()
    );
    let append = format!("lodger.run=\"{command}\"");
    let publish = format!("{published}:80");
    let mut run = Lodger::start(&[
        "run", "mini", "--engine", "interp", "-p", &publish, "--append", &append,
    ]);
    run.wait_for("nameserver 10.0.2.3");
    run.wait_for("20000 from the host");
    assert!(
        host.join()
            .expect("a request")
            .starts_with("GET /it HTTP/1")
    );
    run.wait_for("listening");
    let mut got = String::new();
    while got.is_empty() {
        // Refused, in one way or the other, until the guest listens.
        if let Ok(mut stream) = TcpStream::connect(published) {
            let _ = stream.read_to_string(&mut got);
        }
    }
    assert_eq!(got, "from the guest\n");
    run.finish().expect(0);
}
