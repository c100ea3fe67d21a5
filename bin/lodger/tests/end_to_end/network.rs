//! The guest's network: DHCP, the host and published ports, with an unmodified kernel and busybox.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use crate::process::{Finished, Lodger};

/// Two machines on a switch, which end with it.
struct Pair(tempfile::TempDir);

impl Pair {
    #[track_caller]
    fn lodger(&self, arguments: &[&str]) -> Finished {
        let (data, runtime) = (self.0.path().join("data"), self.0.path());
        let environment = [("XDG_DATA_HOME", &*data), ("XDG_RUNTIME_DIR", runtime)];
        Lodger::start_in(&environment, arguments).finish()
    }

    /// What a command in a machine says.
    #[track_caller]
    fn sh(&self, vm: &str, script: &str) -> String {
        self.lodger(&["exec", vm, "sh", "-c", script])
            .expect(0)
            .text()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.lodger(&["rm", "-f", "one", "other"]);
    }
}

#[test]
fn machines_on_a_switch_reach_each_other_by_name() {
    let pair = Pair(tempfile::tempdir().expect("a folder"));
    for name in ["one", "other"] {
        pair.lodger(&["run", "-d", "--name", name, "--net", "switch=lan", "mini"])
            .expect(0);
    }
    let address = |vm: &str| pair.sh(vm, "ip address show dev eth0");
    let (one, other) = (address("one"), address("other"));
    assert!(one.contains("10.0.2.15/24"), "{one}");
    assert!(other.contains("10.0.2.16/24"), "{other}");
    let ping = pair.sh("one", "ping -c 3 other");
    assert!(ping.contains("(10.0.2.16)"), "{ping}");
    // More than a packet. An end of nc's input would end the connection, so the receiver's has none.
    pair.sh("one", "head -c 20000000 /dev/urandom > /tmp/x");
    let sum = pair.sh("one", "md5sum < /tmp/x");
    pair.sh(
        "other",
        "mkfifo /tmp/none; (exec 3<>/tmp/none; nc -l -p 7000 <&3 | md5sum > /tmp/sum; touch /tmp/done) > /dev/null 2>&1 &",
    );
    pair.sh(
        "one",
        "for n in 1 2 3 4 5; do nc other.lodger.internal 7000 < /tmp/x && break; sleep 1; done",
    );
    let got = pair.sh(
        "other",
        "while [ ! -e /tmp/done ]; do sleep 0.1; done; cat /tmp/sum",
    );
    assert_eq!(got, sum);
    // The name goes with the machine.
    pair.lodger(&["kill", "other"]).expect(0);
    let gone = pair.lodger(&[
        "exec",
        "one",
        "ping",
        "-c",
        "1",
        "-W",
        "1",
        "other.lodger.internal",
    ]);
    assert!(!gone.status.success(), "{}", gone.text());
}

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
