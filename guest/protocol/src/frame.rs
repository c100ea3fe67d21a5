//! Messages on a connection: each is a frame of one byte that says what it is, the length of the rest (32 bits, little-endian), and
//! the rest: bytes as they are, or a value in postcard's format.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::message::{FromGuest, Request, ToGuest, WindowSize};

/// Bytes after a frame's header, at most.
pub const MAX_PAYLOAD: usize = 1 << 20;

const REQUEST: u8 = 1;
const DATA: u8 = 2;
const END: u8 = 3;
const RESIZE: u8 = 4;
const SIGNAL: u8 = 5;
const ACCEPTED: u8 = 0x81;
const OUTPUT: u8 = 0x82;
const OUTPUT_END: u8 = 0x83;
const ERRORS: u8 = 0x84;
const TAKEN: u8 = 0x85;
const EXIT: u8 = 0x86;
const FAILURE: u8 = 0x87;

/// Why no message came.
#[derive(Debug)]
pub enum FrameError {
    /// The connection; its end in the middle of a message, too.
    Io(io::Error),
    /// What came is none.
    Malformed(&'static str),
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            FrameError::Io(error) => write!(f, "{error}"),
            FrameError::Malformed(what) => write!(f, "not a message of this protocol: {what}"),
        }
    }
}

impl std::error::Error for FrameError {}

impl From<io::Error> for FrameError {
    fn from(error: io::Error) -> FrameError {
        FrameError::Io(error)
    }
}

/// A message in either direction.
pub trait Message: Sized {
    /// The kind of frame, and the payload.
    fn encode(&self) -> (u8, Vec<u8>);
    /// From a frame.
    fn decode(kind: u8, payload: Vec<u8>) -> Result<Self, FrameError>;
    /// The kind of frame that its data has.
    const DATA: u8;
}

fn value<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("every message can be encoded")
}

fn parse<T: DeserializeOwned>(payload: &[u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(payload) {
        Ok((value, [])) => Ok(value),
        _ => Err(FrameError::Malformed("its contents")),
    }
}

impl Message for ToGuest {
    const DATA: u8 = DATA;

    fn encode(&self) -> (u8, Vec<u8>) {
        match self {
            ToGuest::Request(version, request) => {
                // The version comes first and keeps its form, so that any agent understands it.
                let mut bytes = version.to_le_bytes().to_vec();
                bytes.extend(value(request));
                (REQUEST, bytes)
            }
            ToGuest::Data(data) => (DATA, data.clone()),
            ToGuest::End => (END, Vec::new()),
            ToGuest::Resize(WindowSize { columns, rows }) => {
                (RESIZE, [columns.to_le_bytes(), rows.to_le_bytes()].concat())
            }
            ToGuest::Signal(number) => (SIGNAL, vec![*number]),
        }
    }

    fn decode(kind: u8, payload: Vec<u8>) -> Result<ToGuest, FrameError> {
        Ok(match (kind, &payload[..]) {
            (REQUEST, [a, b, c, d, rest @ ..]) => {
                let version = u32::from_le_bytes([*a, *b, *c, *d]);
                // What another version says is not looked at.
                let request = match version {
                    crate::VERSION => parse(rest)?,
                    _ => Request::Ping,
                };
                ToGuest::Request(version, request)
            }
            (DATA, _) => ToGuest::Data(payload),
            (END, []) => ToGuest::End,
            (RESIZE, [a, b, c, d]) => ToGuest::Resize(WindowSize {
                columns: u16::from_le_bytes([*a, *b]),
                rows: u16::from_le_bytes([*c, *d]),
            }),
            (SIGNAL, [number]) => ToGuest::Signal(*number),
            _ => return Err(FrameError::Malformed("its kind or length")),
        })
    }
}

impl Message for FromGuest {
    const DATA: u8 = OUTPUT;

    fn encode(&self) -> (u8, Vec<u8>) {
        match self {
            FromGuest::Accepted(answer) => (ACCEPTED, value(answer)),
            FromGuest::Data(data) => (OUTPUT, data.clone()),
            FromGuest::Errors(data) => (ERRORS, data.clone()),
            FromGuest::End => (OUTPUT_END, Vec::new()),
            FromGuest::Taken(count) => (TAKEN, count.to_le_bytes().into()),
            FromGuest::Exit(exit) => (EXIT, value(exit)),
            FromGuest::Failure(failure) => (FAILURE, value(failure)),
        }
    }

    fn decode(kind: u8, payload: Vec<u8>) -> Result<FromGuest, FrameError> {
        Ok(match (kind, &payload[..]) {
            (ACCEPTED, bytes) => FromGuest::Accepted(parse(bytes)?),
            (OUTPUT, _) => FromGuest::Data(payload),
            (ERRORS, _) => FromGuest::Errors(payload),
            (OUTPUT_END, []) => FromGuest::End,
            (TAKEN, [a, b, c, d]) => FromGuest::Taken(u32::from_le_bytes([*a, *b, *c, *d])),
            (EXIT, bytes) => FromGuest::Exit(parse(bytes)?),
            (FAILURE, bytes) => FromGuest::Failure(parse(bytes)?),
            _ => return Err(FrameError::Malformed("its kind or length")),
        })
    }
}

/// The next message; `None` at the end of the connection.
pub fn read<M: Message>(from: &mut impl Read) -> Result<Option<M>, FrameError> {
    let mut header = [0; 5];
    let mut got = 0;
    while got < header.len() {
        match from.read(&mut header[got..]) {
            Ok(0) if got == 0 => return Ok(None),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let [kind, len @ ..] = header;
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_PAYLOAD {
        return Err(FrameError::Malformed("its length"));
    }
    let mut payload = vec![0; len];
    from.read_exact(&mut payload)?;
    M::decode(kind, payload).map(Some)
}

/// Writes a message.
pub fn write<M: Message>(to: &mut impl Write, message: &M) -> io::Result<()> {
    let (kind, payload) = message.encode();
    frame(to, kind, &payload)
}

/// Writes a message of data, without a copy of it.
pub fn write_data<M: Message>(to: &mut impl Write, data: &[u8]) -> io::Result<()> {
    for part in data.chunks(MAX_PAYLOAD) {
        frame(to, M::DATA, part)?;
    }
    Ok(())
}

fn frame(to: &mut impl Write, kind: u8, payload: &[u8]) -> io::Result<()> {
    if payload.len() > MAX_PAYLOAD {
        let text = "a message of more than 1 MiB";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut header = [kind, 0, 0, 0, 0];
    header[1..].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    // In one piece, because each write becomes a packet.
    let mut bytes = Vec::with_capacity(header.len() + payload.len());
    bytes.extend(header);
    bytes.extend(payload);
    to.write_all(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Answer, Exec, Exit, Failure, FailureKind, FileKind};

    fn round<M: Message + PartialEq + std::fmt::Debug>(message: M) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(&mut bytes, &message).unwrap();
        assert_eq!(read::<M>(&mut &bytes[..]).unwrap(), Some(message));
        for len in 1..bytes.len() {
            assert!(read::<M>(&mut &bytes[..len]).is_err());
        }
        bytes
    }

    /// What is on the wire is promised to agents in guests that exist.
    #[test]
    fn messages_on_the_wire() {
        let exec = Exec {
            argv: vec![b"sh".to_vec(), vec![0xff]],
            env: vec![(b"A".to_vec(), b"1".to_vec())],
            dir: Some(b"/".to_vec()),
            user: Some("me".into()),
            terminal: Some(WindowSize {
                columns: 80,
                rows: 25,
            }),
            input: true,
        };
        let request = |request| ToGuest::Request(1, request);
        let bytes = round(request(Request::Exec(exec)));
        let expected = b"\x01\x1b\0\0\0\x01\0\0\0\x01\x02\x02sh\x01\xff\x01\x01A\x011\x01\x01/\x01\x02me\x01\x50\x19\x01";
        assert_eq!(bytes, expected);
        let bytes = round(request(Request::Dial { port: 22 }));
        assert_eq!(bytes, b"\x01\x06\0\0\0\x01\0\0\0\x05\x16");
        assert_eq!(round(ToGuest::Data(b"abc".to_vec())), b"\x02\x03\0\0\0abc");
        assert_eq!(round(ToGuest::End), b"\x03\0\0\0\0");
        assert_eq!(round(ToGuest::Signal(15)), b"\x05\x01\0\0\0\x0f");
        round(ToGuest::Resize(WindowSize {
            columns: 1,
            rows: 65535,
        }));
        let found = FromGuest::Accepted(Answer::Found(Some(FileKind::Directory)));
        assert_eq!(round(found), b"\x81\x03\0\0\0\x02\x01\x01");
        round(FromGuest::Accepted(Answer::Pong("0.1.0".into())));
        assert_eq!(round(FromGuest::Errors(b"e".to_vec())), b"\x84\x01\0\0\0e");
        assert_eq!(round(FromGuest::Taken(256)), b"\x85\x04\0\0\0\0\x01\0\0");
        assert_eq!(
            round(FromGuest::Exit(Exit::Code(3))),
            b"\x86\x02\0\0\0\0\x03"
        );
        let failure = Failure::new(FailureKind::NotFound, "no");
        assert_eq!(
            round(FromGuest::Failure(failure)),
            b"\x87\x04\0\0\0\x02\x02no"
        );
    }

    #[test]
    fn another_version_is_told_apart() {
        let bytes = b"\x01\x08\0\0\0\x09\0\0\0what";
        let read: Option<ToGuest> = read(&mut &bytes[..]).unwrap();
        assert_eq!(read, Some(ToGuest::Request(9, Request::Ping)));
    }

    #[test]
    fn nonsense() {
        for bytes in [
            &b"\x02\xff\xff\xff\xff"[..],
            b"\x02\x01\0\x10\0",
            b"\x99\0\0\0\0",
            b"\x03\x01\0\0\0x",
            b"\x04\x02\0\0\0xx",
            b"\x01\x03\0\0\0abc",
            b"\x01\x05\0\0\0\x01\0\0\0\xee",
            b"\x01\x06\0\0\0\x01\0\0\0\0x",
        ] {
            assert!(read::<ToGuest>(&mut &bytes[..]).is_err(), "{bytes:?}");
            assert!(read::<FromGuest>(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
        assert!(read::<ToGuest>(&mut &b""[..]).unwrap().is_none());
    }
}
