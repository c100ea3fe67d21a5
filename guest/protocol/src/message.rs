//! The requests and what is said afterwards.

use serde::{Deserialize, Serialize};

/// Text or a path, as the guest has it: any bytes.
pub type Bytes = Vec<u8>;

/// The first message of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Is anybody there? Answer: [`Answer::Pong`].
    Ping,
    /// Run a command.
    Exec(Exec),
    /// What is at this path? Answer: [`Answer::Found`].
    Stat {
        /// The path.
        path: Bytes,
        /// Whether a symbolic link stands for what it leads to.
        follow: bool,
    },
    /// Send these files as a tar stream.
    Pack {
        /// The file or directory.
        path: Bytes,
        /// What it is called in the stream.
        name: Bytes,
        /// Whether `path` itself, if it is a symbolic link, stands for what it leads to.
        follow: bool,
    },
    /// Take files from a tar stream.
    Unpack {
        /// The directory to put them into.
        dir: Bytes,
    },
    /// Connect to this TCP port of the guest itself.
    Dial {
        /// The port.
        port: u16,
    },
    /// Let whoever has the key log in by SSH as this user.
    AuthorizeKey {
        /// The user's name.
        user: String,
        /// A line for `authorized_keys`.
        key: String,
    },
}

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Exec {
    /// The program, looked for in `PATH`, and its arguments.
    pub argv: Vec<Bytes>,
    /// Variables beyond those of a login.
    pub env: Vec<(Bytes, Bytes)>,
    /// Where it starts; otherwise in the user's home directory.
    pub dir: Option<Bytes>,
    /// `USER[:GROUP]`, names or numbers; otherwise the user who runs the agent, root mostly.
    pub user: Option<String>,
    /// It gets a terminal of this size.
    pub terminal: Option<WindowSize>,
    /// It gets standard input; otherwise that is empty.
    pub input: bool,
}

/// The size of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// Said to the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToGuest {
    /// What is wanted, and the version of the protocol.
    Request(u32, Request),
    /// Standard input, a part of a tar stream, what the port gets.
    Data(Bytes),
    /// The end of that.
    End,
    /// The terminal has this size now.
    Resize(WindowSize),
    /// A signal for the command and its children.
    Signal(u8),
}

/// Said by the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromGuest {
    /// The request is being served.
    Accepted(Answer),
    /// Standard output, a part of a tar stream, what the port sends.
    Data(Bytes),
    /// Standard error.
    Errors(Bytes),
    /// The end of the data; for Unpack: everything is in its place.
    End,
    /// So many bytes of the standard input have been taken.
    Taken(u32),
    /// The command has ended. The last message.
    Exit(Exit),
    /// It cannot be done. The last message.
    Failure(Failure),
}

/// The beginning of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It goes on.
    Done,
    /// To [`Request::Ping`]: the version of Lodger that the agent is of.
    Pong(String),
    /// To [`Request::Stat`]; `None`: there is nothing.
    Found(Option<FileKind>),
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// Something else.
    Other,
}

impl FileKind {
    /// The kind of a file on this side.
    pub fn of(kind: std::fs::FileType) -> FileKind {
        if kind.is_file() {
            FileKind::File
        } else if kind.is_dir() {
            FileKind::Directory
        } else if kind.is_symlink() {
            FileKind::Link
        } else {
            FileKind::Other
        }
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself, with this status.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

/// Why something cannot be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For programs.
    pub kind: FailureKind,
    /// For people.
    pub message: String,
}

/// See [`Failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The agent does not speak this version of the protocol; the message is the one that it speaks.
    Version,
    /// The request makes no sense.
    Request,
    /// There is no such program.
    NotFound,
    /// The program cannot be run.
    NotRunnable,
    /// Anything else.
    Other,
}

impl Failure {
    /// A failure.
    pub fn new(kind: FailureKind, message: impl ToString) -> Failure {
        Failure {
            kind,
            message: message.to_string(),
        }
    }
}
