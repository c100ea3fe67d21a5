//! Lines on a connection: a message and the version of the protocol in one JSON object.

use std::io::{self, BufRead, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::message::{Answer, Request, VERSION};

/// Bytes that a line has at most, its end included.
pub const MAX_LINE: u64 = 64 << 10;

/// A message with its version.
#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    #[serde(flatten)]
    message: T,
}

/// Only the version, to tell a message of another version from a malformed one.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Why no message came.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The other side has closed the connection in the middle.
    #[error("the connection ends in the middle of a line")]
    Cut,
    /// A line longer than [`MAX_LINE`].
    #[error("a line has more than {MAX_LINE} bytes")]
    TooLong,
    /// Not a message.
    #[error("not a message of this protocol: {0}")]
    Malformed(serde_json::Error),
    /// A message of another version.
    #[error("the other side speaks version {0} of the control protocol, this one {VERSION}")]
    Version(u32),
}

/// The next request on a connection; `None` at its end.
pub fn read_request(from: &mut impl BufRead) -> Result<Option<Request>, WireError> {
    read(from)
}

/// Answers.
pub fn write_answer(to: &mut impl Write, answer: &Answer) -> io::Result<()> {
    write(to, answer)
}

pub(crate) fn read<T: DeserializeOwned>(from: &mut impl BufRead) -> Result<Option<T>, WireError> {
    let mut line = Vec::new();
    from.take(MAX_LINE).read_until(b'\n', &mut line)?;
    match line.last() {
        None => return Ok(None),
        Some(b'\n') => {}
        Some(_) if line.len() as u64 == MAX_LINE => return Err(WireError::TooLong),
        Some(_) => return Err(WireError::Cut),
    }
    let version: Version = serde_json::from_slice(&line).map_err(WireError::Malformed)?;
    if version.version != VERSION {
        return Err(WireError::Version(version.version));
    }
    let envelope: Envelope<T> = serde_json::from_slice(&line).map_err(WireError::Malformed)?;
    Ok(Some(envelope.message))
}

pub(crate) fn write<T: Serialize>(to: &mut impl Write, message: T) -> io::Result<()> {
    let envelope = Envelope {
        version: VERSION,
        message,
    };
    let mut line = serde_json::to_vec(&envelope)?;
    line.push(b'\n');
    to.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_or_refused() {
        let long = [b"{".repeat(MAX_LINE as usize), b"\n".to_vec()].concat();
        let cases: [(&[u8], &str); 9] = [
            (b"", "end"),
            (b"{\"version\":1,\"request\":\"kill\"}\n", "Kill"),
            (b"{\"version\":1,\"request\":\"kill\",\"new\":1}\n", "Kill"),
            (b"{\"version\":1,\"request\":\"kill\"}", "middle"),
            (b"{\"version\":2,\"request\":\"dance\"}\n", "version 2"),
            (b"{\"version\":1,\"request\":\"dance\"}\n", "not a message"),
            (b"{\"request\":\"kill\"}\n", "not a message"),
            (b"\xff\0\n", "not a message"),
            (&long, "more than"),
        ];
        for (line, expected) in cases {
            let found = match read_request(&mut &*line) {
                Ok(None) => "end".into(),
                Ok(Some(request)) => format!("{request:?}"),
                Err(error) => error.to_string(),
            };
            assert!(found.contains(expected), "{expected}: {found}");
        }
    }

    #[test]
    fn messages_come_back() {
        let mut line = Vec::new();
        let request = Request::Stop { seconds: 3 };
        write(&mut line, &request).unwrap();
        assert_eq!(
            line,
            b"{\"version\":1,\"request\":\"stop\",\"seconds\":3}\n"
        );
        assert_eq!(read_request(&mut &*line).unwrap(), Some(request));
    }
}
