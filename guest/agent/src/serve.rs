//! A connection: one request from its beginning to its end.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use lodger_guest_protocol::{
    Answer, Failure, FailureKind, FileKind, FromGuest, Request, ToGuest, UnpackOptions, VERSION,
    pack, read, unpack, write, write_data,
};

use crate::{exec, keys};

/// How long a port of the guest's own may take to answer.
const DIALLING: Duration = Duration::from_secs(10);
/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;

/// Serves a connection of the host's.
pub fn serve(connection: OwnedFd) {
    let connection = File::from(connection);
    // One that breaks has nobody to be told.
    let _ = answer(&connection);
    // The host closes first, so that nothing that is on its way is lost.
    let _ = io::copy(&mut &connection, &mut io::sink());
}

fn answer(connection: &File) -> io::Result<()> {
    let mut stream = connection;
    let failure = match read(&mut stream) {
        Ok(Some(ToGuest::Request(VERSION, request))) => match perform(request, connection) {
            Ok(()) => return Ok(()),
            Err(failure) => failure,
        },
        Ok(Some(ToGuest::Request(..))) => Failure::new(FailureKind::Version, VERSION),
        Ok(None) => return Ok(()),
        _ => Failure::new(FailureKind::Request, "this is no request"),
    };
    write(&mut stream, &FromGuest::Failure(failure))
}

fn other(error: impl ToString) -> Failure {
    Failure::new(FailureKind::Other, error)
}

fn perform(request: Request, connection: &File) -> Result<(), Failure> {
    let mut stream = connection;
    let mut accept = |answer| write(&mut stream, &FromGuest::Accepted(answer)).map_err(other);
    match request {
        Request::Ping => accept(Answer::Pong(env!("CARGO_PKG_VERSION").into())),
        Request::Exec(command) => exec::run(&command, connection),
        Request::Stat { path, follow } => {
            let path = Path::new(OsStr::from_bytes(&path));
            let found = match follow {
                true => fs::metadata(path),
                false => fs::symlink_metadata(path),
            };
            accept(Answer::Found(match found {
                Ok(found) => Some(FileKind::of(found.file_type())),
                Err(error) if is_absence(&error) => None,
                Err(error) => return Err(other(error)),
            }))
        }
        Request::Pack { path, name, follow } => {
            accept(Answer::Done)?;
            let (path, name) = (OsStr::from_bytes(&path), OsStr::from_bytes(&name));
            let to = BufWriter::with_capacity(CHUNK, Data(connection));
            pack(Path::new(path), Path::new(name), follow, to).map_err(other)?;
            write(&mut stream, &FromGuest::End).map_err(other)
        }
        Request::Unpack { dir } => {
            accept(Answer::Done)?;
            let mut from = Tar {
                connection,
                part: io::Cursor::default(),
                ended: false,
            };
            let options = UnpackOptions {
                only: None,
                keep_special: true,
            };
            let done = unpack(Path::new(OsStr::from_bytes(&dir)), &mut from, &options);
            // Whoever is still sending hears of it afterwards.
            io::copy(&mut from, &mut io::sink()).map_err(other)?;
            done.map_err(other)?;
            write(&mut stream, &FromGuest::End).map_err(other)
        }
        Request::Dial { port } => dial(port, connection),
        Request::AuthorizeKey { user, key } => {
            keys::authorize(&user, &key).map_err(other)?;
            accept(Answer::Done)
        }
    }
}

fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// What is written becomes messages of data.
struct Data<'a>(&'a File);

impl Write for Data<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        write_data::<FromGuest>(&mut self.0, data)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The data of messages, up to their end.
struct Tar<'a> {
    connection: &'a File,
    part: io::Cursor<Vec<u8>>,
    ended: bool,
}

impl Read for Tar<'_> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.part.read(data)?;
            if n > 0 || self.ended || data.is_empty() {
                return Ok(n);
            }
            match read(&mut self.connection).map_err(io::Error::other)? {
                Some(ToGuest::Data(part)) => self.part = io::Cursor::new(part),
                Some(ToGuest::End) => self.ended = true,
                _ => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }
}

/// Connects to a port of the guest itself, and passes on what goes through in both directions.
fn dial(port: u16, connection: &File) -> Result<(), Failure> {
    let addresses = [
        (std::net::Ipv4Addr::LOCALHOST, port).into(),
        (std::net::Ipv6Addr::LOCALHOST, port).into(),
    ];
    let mut dialled = Err(io::Error::from(io::ErrorKind::ConnectionRefused));
    for address in addresses {
        dialled = TcpStream::connect_timeout(&address, DIALLING);
        if dialled.is_ok() {
            break;
        }
    }
    let socket = dialled.map_err(|error| other(format!("port {port} of the guest: {error}")))?;
    let mut stream = connection;
    write(&mut stream, &FromGuest::Accepted(Answer::Done)).map_err(other)?;
    std::thread::scope(|scope| {
        let outward = || {
            let mut bytes = vec![0; CHUNK];
            while let Ok(n @ 1..) = (&socket).read(&mut bytes) {
                if write_data::<FromGuest>(&mut &*connection, &bytes[..n]).is_err() {
                    break;
                }
            }
            // A host that has gone needs no end.
            let _ = write(&mut &*connection, &FromGuest::End);
        };
        let started = std::thread::Builder::new().spawn_scoped(scope, outward);
        while let Ok(Some(ToGuest::Data(data))) = read(&mut &*connection) {
            if started.is_err() || (&socket).write_all(&data).is_err() {
                break;
            }
        }
        // After the end, or if the host has gone: the port hears of it, and answers with its own end.
        let _ = socket.shutdown(Shutdown::Write);
    });
    Ok(())
}

#[cfg(test)]
mod tests;
