//! What a program says first: `CONNECT <port>\n`.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use crate::poller::{Token, token};

/// Requests that are not complete, at most.
const MOST: usize = 64;
/// Bytes of the longest request.
const LINE: usize = "CONNECT 0x12345678\n".len() + 13;

#[derive(Default)]
pub(crate) struct Handshakes {
    /// In the order in which they came.
    begun: VecDeque<(Token, UnixStream)>,
    count: u32,
}

impl Handshakes {
    /// A token that was not used lately.
    pub(crate) fn next_token(&mut self) -> Token {
        self.count = self.count.wrapping_add(1) % (u32::MAX - 2);
        token::HANDSHAKES + Token::from(self.count)
    }

    /// Waits for the request of this connection.
    pub(crate) fn begin(&mut self, token: Token, stream: UnixStream) {
        if self.begun.len() == MOST {
            self.begun.pop_front();
        }
        self.begun.push_back((token, stream));
    }

    /// Looks at what has been written; if that is a request, gives the connection and the port. One that cannot become
    /// a request is closed.
    pub(crate) fn go_on(&mut self, token: Token, closed: bool) -> Option<(UnixStream, u32)> {
        let at = self.begun.iter().position(|(t, _)| *t == token)?;
        let said = look(&self.begun[at].1);
        if matches!(said, Said::Nothing) && !closed {
            return None;
        }
        let (_, stream) = self.begun.remove(at)?;
        match said {
            Said::Connect(port) => Some((stream, port)),
            Said::Nothing | Said::Nonsense => None,
        }
    }
}

/// What a program has said so far.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    /// It may go on.
    Nothing,
    /// A request, which has been taken from the socket.
    Connect(u32),
    /// No request.
    Nonsense,
}

/// Takes no more than the line from the socket: what follows is for the other side.
fn look(stream: &UnixStream) -> Said {
    let mut bytes = [0; LINE];
    let seen = match recv(stream, &mut bytes[..], RecvFlags::PEEK) {
        Ok((0, _)) => return Said::Nonsense,
        Ok((n, _)) => n,
        Err(Errno::AGAIN | Errno::INTR) => return Said::Nothing,
        Err(_) => return Said::Nonsense,
    };
    let Some(end) = bytes[..seen].iter().position(|&b| b == b'\n') else {
        return match seen < LINE {
            true => Said::Nothing,
            false => Said::Nonsense,
        };
    };
    let port = parse(&bytes[..end]);
    let taken = recv(stream, &mut bytes[..=end], RecvFlags::empty());
    match (port, taken) {
        (Some(port), Ok((n, _))) if n == end + 1 => Said::Connect(port),
        _ => Said::Nonsense,
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let (word, port) = text.trim_end_matches('\r').split_once(' ')?;
    let plain = port.bytes().all(|b| b.is_ascii_digit());
    (plain && word.eq_ignore_ascii_case("connect"))
        .then(|| port.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn requests() {
        for (text, expected) in [
            ("CONNECT 52\n", Said::Connect(52)),
            ("connect 52\r\n", Said::Connect(52)),
            ("CONNECT 4294967295\nrest", Said::Connect(u32::MAX)),
            ("CONNECT 52", Said::Nothing),
            ("CON", Said::Nothing),
            ("CONNECT 4294967296\n", Said::Nonsense),
            ("CONNECT -1\n", Said::Nonsense),
            ("CONNECT +1\n", Said::Nonsense),
            ("CONNECT \n", Said::Nonsense),
            ("CONNECT\n", Said::Nonsense),
            ("\n", Said::Nonsense),
            ("GET / HTTP/1.0\r\n", Said::Nonsense),
            ("\u{fffd}\u{fffd}\n", Said::Nonsense),
            ("CONNECT 00000000000000000000000000000000", Said::Nonsense),
        ] {
            let (mut program, mut stream) = UnixStream::pair().unwrap();
            stream.set_nonblocking(true).unwrap();
            assert_eq!(look(&stream), Said::Nothing);
            program.write_all(text.as_bytes()).unwrap();
            assert_eq!(look(&stream), expected, "{text}");
            if let (Said::Connect(_), Some((_, rest))) = (expected, text.split_once('\n')) {
                drop(program);
                let mut left = String::new();
                stream.read_to_string(&mut left).unwrap();
                assert_eq!(left, rest);
            }
        }
    }

    #[test]
    fn the_oldest_of_too_many_goes() {
        let mut handshakes = Handshakes::default();
        let mut programs = Vec::new();
        for _ in 0..MOST + 1 {
            let (program, stream) = UnixStream::pair().unwrap();
            stream.set_nonblocking(true).unwrap();
            let token = handshakes.next_token();
            handshakes.begin(token, stream);
            programs.push((token, program));
        }
        for (n, (token, program)) in programs.iter_mut().enumerate() {
            let written = program.write_all(b"CONNECT 7\n");
            assert_eq!(written.is_ok(), n > 0);
            assert_eq!(handshakes.go_on(*token, false).is_some(), n > 0);
        }
    }
}
