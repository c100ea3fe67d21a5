//! What may be asked of a running VM, and how: one request, one answer, each a line of JSON on the Unix socket of the VM's
//! monitor.
//!
//! The monitor is the process that runs the VM; there is no daemon. `docs/formats/control.md` is the specification.
//!
//! | file | what |
//! |---|---|
//! | `message.rs` | the requests and answers |
//! | `wire.rs` | lines on a connection |
//! | `client.rs` | the side that asks |
//! | `socket.rs` | sockets at paths of any length |
//!
//! Limits: a line has at most [`MAX_LINE`] bytes; a connection that has become a console carries bytes from then on and
//! nothing else.

mod client;
mod message;
mod socket;
mod wire;

pub use client::{Client, ClientError, Console};
pub use message::{
    Answer, Ending, ErrorKind, GuestFigures, Memory, Phase, Request, Status, Stopped, VERSION,
};
pub use socket::{connect, listen};
pub use wire::{MAX_LINE, WireError, read_request, write_answer};
