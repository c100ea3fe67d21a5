//! The host's name servers, as resolv.conf(5) has them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::SystemTime;

use super::addresses::DNS_PORT;

/// Whom to ask.
pub(crate) struct Resolver {
    /// Followed, because it changes when the host moves to another network.
    file: Option<PathBuf>,
    read: Option<SystemTime>,
    servers: Vec<SocketAddr>,
}

impl Resolver {
    /// These name servers; there must be one.
    pub(crate) fn of(servers: Vec<SocketAddr>) -> Resolver {
        Resolver {
            file: None,
            read: None,
            servers,
        }
    }

    /// The name servers that `file` has.
    pub(crate) fn of_file(file: PathBuf) -> Resolver {
        Resolver {
            file: Some(file),
            ..Resolver::of(Vec::new())
        }
    }

    /// The server for a query that has been sent `attempt` times already.
    pub(crate) fn server(&mut self, attempt: usize) -> SocketAddr {
        if let Some(file) = &self.file {
            let changed = fs::metadata(file).and_then(|m| m.modified()).ok();
            if self.servers.is_empty() || self.read != changed {
                self.read = changed;
                let text = fs::read_to_string(file).unwrap_or_default();
                self.servers = servers(&text);
            }
        }
        self.servers[attempt % self.servers.len()]
    }
}

/// The servers that a file names. A host without any has one of its own, as the C library sees it.
fn servers(text: &str) -> Vec<SocketAddr> {
    let named = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let server = (words.next() == Some("nameserver")).then(|| words.next())??;
        // An address of one link only needs its scope, which does not parse: such servers are left out.
        server.parse::<IpAddr>().ok()
    });
    let mut servers: Vec<_> = named.map(|ip| SocketAddr::from((ip, DNS_PORT))).collect();
    if servers.is_empty() {
        servers.push(SocketAddr::from((Ipv4Addr::LOCALHOST, DNS_PORT)));
    }
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_of_a_file() {
        let cases: &[(&str, &[&str])] = &[
            ("", &["127.0.0.1:53"]),
            ("nameserver 192.0.2.1\n", &["192.0.2.1:53"]),
            (
                "# nameserver 192.0.2.9\nsearch a b\nnameserver\t192.0.2.1 \nnameserver 2001:db8::1\noptions x",
                &["192.0.2.1:53", "[2001:db8::1]:53"],
            ),
            (
                "nameserver fe80::1%eth0\nnameserver x\nnameserver\n",
                &["127.0.0.1:53"],
            ),
        ];
        for (text, expected) in cases {
            let expected: Vec<SocketAddr> = expected.iter().map(|s| s.parse().unwrap()).collect();
            assert_eq!(servers(text), expected, "{text}");
        }
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "nameserver 192.0.2.1\nnameserver 192.0.2.2\n").unwrap();
        let mut resolver = Resolver::of_file(file.path().into());
        let two = SocketAddr::from(([192, 0, 2, 2], 53));
        assert_eq!([resolver.server(1), resolver.server(3)], [two, two]);
        std::fs::write(file.path(), "nameserver 192.0.2.3\n").unwrap();
        let later = SystemTime::now() + std::time::Duration::from_secs(5);
        file.as_file().set_modified(later).unwrap();
        assert_eq!(resolver.server(1), SocketAddr::from(([192, 0, 2, 3], 53)));
    }
}
