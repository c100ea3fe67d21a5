//! The side that asks.

use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::message::{Answer, ErrorKind, Request};
use crate::socket;
use crate::wire::{self, WireError};

/// A connection to a VM's monitor.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

/// A guest's console: what it prints can be read, what is written is typed.
#[derive(Debug)]
pub struct Console {
    /// What the guest prints; the end of the stream is the end of the VM.
    pub reader: BufReader<UnixStream>,
    /// What it is sent.
    pub writer: UnixStream,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The VM's monitor cannot be reached.
    #[error("cannot reach its monitor: {0}")]
    Connect(io::Error),
    /// The monitor has gone, or does not speak the protocol.
    #[error("talking to its monitor failed: {0}")]
    Wire(#[from] WireError),
    /// The monitor has gone before it answered.
    #[error("its monitor has gone without an answer")]
    Gone,
    /// It was refused.
    #[error("{message}")]
    Refused {
        /// Why.
        kind: ErrorKind,
        /// The same in words.
        message: String,
    },
}

impl Client {
    /// Connects to the monitor whose socket is at `path`.
    pub fn connect(path: &Path) -> Result<Client, ClientError> {
        let stream = socket::connect(path).map_err(ClientError::Connect)?;
        let writer = stream.try_clone().map_err(ClientError::Connect)?;
        Ok(Client {
            reader: BufReader::new(stream),
            writer,
        })
    }

    /// Asks, and waits for the answer. An [`Answer::Error`] is a [`ClientError::Refused`].
    pub fn ask(&mut self, request: &Request) -> Result<Answer, ClientError> {
        let written = wire::write(&mut self.writer, request);
        // A monitor that closes at once may have said why.
        match (wire::read(&mut self.reader), written) {
            (Ok(Some(Answer::Error { kind, message })), _) => {
                Err(ClientError::Refused { kind, message })
            }
            (Ok(Some(answer)), _) => Ok(answer),
            (_, Err(error)) => Err(WireError::Io(error).into()),
            (Ok(None), _) => Err(ClientError::Gone),
            (Err(error), _) => Err(error.into()),
        }
    }

    /// Attaches to the guest's console.
    pub fn console(mut self) -> Result<Console, ClientError> {
        self.ask(&Request::Console)?;
        Ok(Console {
            reader: self.reader,
            writer: self.writer,
        })
    }
}
