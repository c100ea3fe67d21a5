//! The commands that do something inside of a guest, through the agent there (`guest/agent`): a connection for each request, through
//! the VM's Unix socket.
//!
//! | file | what |
//! |---|---|
//! | `mod.rs` | the way to the agent |
//! | `exec.rs` | `lodger exec` |
//! | `copy.rs` | `lodger cp` |
//! | `ssh.rs` | `lodger ssh` |

mod copy;
mod exec;
mod ssh;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use lodger_control::{Answer, Phase, Request as Ask};
use lodger_guest_protocol::{
    Answer as Accepted, Failure, FailureKind, FromGuest, PORT, Request, ToGuest, VERSION, read,
    write,
};
use lodger_store::{Name, Store};

pub use copy::copy;
pub use exec::exec;
pub use ssh::{proxy, ssh};

use crate::messages;
use crate::spec::VmSpec;
use crate::status::{Error, host_error};
use crate::vms;

/// How long after the start of a machine its agent may come up.
const BOOT: Duration = Duration::from_secs(120);
/// How long the agent of a machine that has long been running may take to answer.
const AWAKE: Duration = Duration::from_secs(5);
/// Nobody is told before that something is waited for.
const SHORT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(100);

/// A VM's guest.
#[derive(Debug, Clone)]
pub struct Guest {
    name: Name,
    /// The Unix socket that leads to the guest's.
    socket: PathBuf,
    /// Until when its agent is waited for.
    deadline: Instant,
    quiet: bool,
}

/// A connection to the agent, with its request made.
pub struct Agent {
    stream: UnixStream,
    name: Name,
}

impl Guest {
    /// The guest of a running VM.
    pub fn find(text: &str, quiet: bool) -> Result<Guest, Error> {
        let store = Store::open()?;
        let (vm, answer) = vms::ask(&store, text, &Ask::Status)?;
        let vm = store.find(vm.as_str())?;
        let named = |what: &str| Error::Named {
            name: vm.name.to_string(),
            what: what.into(),
        };
        let Answer::Status(status) = answer else {
            return Err(named("its monitor says nothing about it"));
        };
        if status.phase == Phase::Paused {
            let text = format!("it is paused; `lodger unpause {}` lets it go on", vm.name);
            return Err(named(&text));
        }
        let spec: Option<VmSpec> = serde_json::from_value(vm.record.spec.clone()).ok();
        let vsock = spec.and_then(|spec| spec.machine.virtio.vsock);
        let Some(vsock) = vsock else {
            return Err(named(
                "it has no sockets to its guest: it was made with --vsock none, or by an earlier Lodger",
            ));
        };
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        let up = now.saturating_sub(Duration::from_secs(status.started));
        Ok(Guest {
            socket: vm.dir.join(vsock.path),
            name: vm.name,
            deadline: Instant::now() + BOOT.saturating_sub(up).max(AWAKE),
            // A program that looks at standard error looks for what the command says.
            quiet: quiet || !rustix::termios::isatty(rustix::stdio::stderr()),
        })
    }

    fn error(&self, what: impl ToString) -> Error {
        Error::Named {
            name: self.name.to_string(),
            what: what.to_string(),
        }
    }

    /// Asks the agent, and waits until it is there if the guest has not been up for long; what it answers first comes back, too.
    pub fn ask(&self, request: Request) -> Result<(Agent, Accepted), Error> {
        let stream = self.connect()?;
        let mut agent = Agent {
            stream,
            name: self.name.clone(),
        };
        agent.say(&ToGuest::Request(VERSION, request))?;
        match agent.next()? {
            FromGuest::Accepted(answer) => Ok((agent, answer)),
            other => Err(agent.unexpected(&other)),
        }
    }

    fn connect(&self) -> Result<UnixStream, Error> {
        let start = Instant::now();
        let mut told = self.quiet;
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let result = try_connect(&self.socket, left.max(AWAKE));
            match result {
                Ok(Some(stream)) => return Ok(stream),
                Ok(None) => {}
                Err(error) if self.is_gone() => {
                    tracing::debug!("{error}");
                    return Err(self.error("it has ended"));
                }
                Err(error) => {
                    return Err(self.error(format!("its guest cannot be reached: {error}")));
                }
            }
            if self.is_gone() {
                return Err(self.error("it has ended"));
            }
            if left.is_zero() {
                let name = &self.name;
                return Err(self.error(format!(
                    "no agent answers in its guest. The images that Lodger builds have one (`lodger image build debian` makes a new \
                    one; machines keep the disk they have); for other guests, `lodger agent FILE` writes the program, which is to run \
                    there as root. `lodger console {name}` shows what the guest is doing"
                )));
            }
            if !told && start.elapsed() >= SHORT {
                messages::say(format_args!(
                    "waiting for the agent in the guest of {}",
                    self.name
                ));
                told = true;
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn is_gone(&self) -> bool {
        let found = Store::open().and_then(|store| store.find_name(&self.name));
        !matches!(found, Ok(Some(vm)) if vm.is_alive())
    }
}

/// Connects to the agent. `None`: nobody listens there (yet).
fn try_connect(socket: &Path, patience: Duration) -> io::Result<Option<UnixStream>> {
    let mut stream = match lodger_control::connect(socket) {
        Ok(stream) => stream,
        // The machine is about to listen, or to be started again.
        Err(error)
            if [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused]
                .contains(&error.kind()) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    stream.set_read_timeout(Some(patience))?;
    let asked = stream.write_all(format!("CONNECT {PORT}\n").as_bytes());
    let mut line = Vec::new();
    // What follows is the agent's.
    while asked.is_ok() && line.len() < 32 && line.last() != Some(&b'\n') {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1..) => line.push(byte[0]),
            // A guest without a driver, or one whose driver sleeps.
            _ => return Ok(None),
        }
    }
    if !line.starts_with(b"OK ") {
        return Ok(None);
    }
    stream.set_read_timeout(None)?;
    Ok(Some(stream))
}

impl Agent {
    /// What is wrong, with the VM's name.
    fn error(&self, what: impl ToString) -> Error {
        Error::Named {
            name: self.name.to_string(),
            what: what.to_string(),
        }
    }

    fn say(&mut self, message: &ToGuest) -> Result<(), Error> {
        let said = write(&mut self.stream, message);
        said.map_err(|error| self.error(format!("the connection to its agent has broken: {error}")))
    }

    /// The next message. The end of the connection is an error, because all ends are announced.
    fn next(&mut self) -> Result<FromGuest, Error> {
        match read(&mut self.stream) {
            Ok(Some(message)) => Ok(message),
            Ok(None) => Err(self.error("the connection to its agent has broken")),
            Err(error) => {
                Err(self.error(format!("the connection to its agent has broken: {error}")))
            }
        }
    }

    /// A message that does not belong here, a failure mostly.
    fn unexpected(&self, message: &FromGuest) -> Error {
        match message {
            FromGuest::Failure(Failure { kind, message }) => {
                let status = match kind {
                    FailureKind::NotFound => 127,
                    FailureKind::NotRunnable => 126,
                    FailureKind::Version => {
                        return self.error(format!(
                            "the agent in its guest speaks version {message} of the protocol, this lodger {VERSION}; `lodger agent FILE` \
                            writes a newer one"
                        ));
                    }
                    FailureKind::Request | FailureKind::Other => return self.error(message),
                };
                Error::Relayed {
                    status,
                    message: format!("{}: {message}", self.name),
                }
            }
            other => self.error(format!(
                "its agent has not said what was expected, but {other:?}"
            )),
        }
    }
}

/// `lodger agent`: the program for guests that have been made by others.
pub fn write_agent(file: Option<&Path>) -> Result<ExitCode, Error> {
    let program = lodger_image::AGENT;
    let Some(path) = file else {
        if rustix::termios::isatty(rustix::stdio::stdout()) {
            let text = "the agent is a program, which is not for a terminal; name a file";
            return Err(Error::Usage(text.into()));
        }
        let written = io::stdout().write_all(program);
        written.map_err(host_error("cannot write to standard output"))?;
        return Ok(ExitCode::SUCCESS);
    };
    let write = || -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        std::fs::write(path, program)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
    };
    write().map_err(|error| Error::File {
        path: path.into(),
        what: error.to_string(),
    })?;
    Ok(ExitCode::SUCCESS)
}
