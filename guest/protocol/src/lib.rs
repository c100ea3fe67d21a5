//! What Lodger and its agent in a guest say to each other: `docs/formats/agent.md` is the specification.
//!
//! The agent listens at a port of the guest's stream sockets (AF_VSOCK). A connection is for one request: to run a command, to copy
//! files, to reach a port of the guest's network.
//!
//! | file | what |
//! |---|---|
//! | `message.rs` | the requests and what is said afterwards |
//! | `frame.rs` | messages on a connection |
//! | `copy.rs` | where a copy goes |
//! | `pack.rs`, `unpack.rs` | files as a tar stream, and back, whoever made the stream |
//!
//! Each side takes the other for hostile: sizes are bounded, and a stream from a guest makes files only where it is told to.

mod copy;
mod frame;
mod message;
mod pack;
mod unpack;

pub use copy::{CopyError, Source, Target, target};
pub use frame::{FrameError, MAX_PAYLOAD, read, write, write_data};
pub use message::{
    Answer, Bytes, Exec, Exit, Failure, FailureKind, FileKind, FromGuest, Request, ToGuest,
    WindowSize,
};
pub use pack::pack;
pub use unpack::{UnpackOptions, unpack};

/// The version of the protocol that this crate speaks.
pub const VERSION: u32 = 1;

/// The port at which the agent listens.
pub const PORT: u32 = 1024;

/// Bytes of standard input that may be on their way: the client sends no more until the agent has told that some were taken.
pub const INPUT_WINDOW: u32 = 1 << 20;
