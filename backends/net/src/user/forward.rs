//! Published ports, as on the command line.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What travels to a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Connections.
    #[default]
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port of the host that leads to one of the card.
///
/// As text: `[ADDRESS:]HOST:CARD[/tcp|/udp]`, an IPv6 address in brackets. Without an address it is open on all of the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// Where the host listens. Port 0: the host chooses.
    pub host: SocketAddr,
    /// The card's port.
    pub port: u16,
    /// What travels.
    #[serde(default)]
    pub protocol: Protocol,
}

/// Text that is no [`Forward`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0}; ports are published as [ADDRESS:]HOST:GUEST[/tcp|/udp], like 8080:80 or 127.0.0.1:5353:53/udp"
)]
pub struct ForwardError(String);

impl FromStr for Forward {
    type Err = ForwardError;

    fn from_str(text: &str) -> Result<Forward, ForwardError> {
        let wrong = |what: &str, part: &str| ForwardError(format!("{what} '{part}'"));
        let (ports, protocol) = match text.split_once('/') {
            None => (text, Protocol::Tcp),
            Some((ports, "tcp")) => (ports, Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some((_, other)) => return Err(wrong("unknown protocol", other)),
        };
        let number = |part: &str| {
            let digits = part.bytes().all(|b| b.is_ascii_digit());
            let number = digits.then(|| part.parse::<u16>().ok()).flatten();
            number.ok_or_else(|| wrong("not a port:", part))
        };
        let (host, card) = (ports.rsplit_once(':')).ok_or_else(|| wrong("one port only:", text))?;
        let (address, host) = match host.rsplit_once(':') {
            None => (IpAddr::from(Ipv4Addr::UNSPECIFIED), host),
            Some((address, host)) => {
                let ipv6 = address.strip_prefix('[').and_then(|a| a.strip_suffix(']'));
                let parsed = match ipv6 {
                    Some(ipv6) => ipv6.parse().map(IpAddr::V6).ok(),
                    None => address.parse().map(IpAddr::V4).ok(),
                };
                (
                    parsed.ok_or_else(|| wrong("not an IP address:", address))?,
                    host,
                )
            }
        };
        match number(card)? {
            0 => Err(wrong("not a port of the guest:", card)),
            port => Ok(Forward {
                host: SocketAddr::new(address, number(host)?),
                port,
                protocol,
            }),
        }
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{}:{}/{protocol}", self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards() {
        let cases = [
            ("8080:80", Some("0.0.0.0:8080:80/tcp")),
            ("0:80/tcp", Some("0.0.0.0:0:80/tcp")),
            ("127.0.0.1:5353:53/udp", Some("127.0.0.1:5353:53/udp")),
            ("[::1]:8080:80", Some("[::1]:8080:80/tcp")),
            ("", None),
            ("80", None),
            ("8080:0", None),
            ("8080:", None),
            (":80", None),
            ("+1:80", None),
            ("65536:80", None),
            ("8080:80/sctp", None),
            ("localhost:8080:80", None),
            ("::1:8080:80", None),
            ("1.2.3:8080:80", None),
        ];
        for (text, expected) in cases {
            let parsed = text.parse::<Forward>();
            assert_eq!(parsed.is_ok(), expected.is_some(), "{text}: {parsed:?}");
            if let (Ok(forward), Some(expected)) = (parsed, expected) {
                assert_eq!(forward.to_string(), expected);
                assert_eq!(expected.parse(), Ok(forward));
            }
        }
    }
}
