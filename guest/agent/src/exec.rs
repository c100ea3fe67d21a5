//! A command: its start, what goes in and out of it, its end.
//!
//! One thread waits for everything; another one waits for the command's end. What the host does not read stays in the command's
//! pipes; what the command does not read is bounded by the window of the protocol, so that signals are always heard.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;

use lodger_guest_protocol::{
    Answer, Exec, Exit, Failure, FailureKind, FromGuest, INPUT_WINDOW, MAX_PAYLOAD, ToGuest,
    WindowSize, read, write, write_data,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{Shutdown, shutdown};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, ioctl_tiocsctty, kill_process_group, setsid, waitid,
};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

use crate::terminal::{open_terminal, resize};
use crate::users::{self, User};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;
/// Bytes for the host beyond which nothing more is taken from the command.
const OUTBOX: usize = 256 << 10;
/// What a terminal takes for the end of the input (Ctrl-D).
const END_OF_INPUT: u8 = 4;

/// What commands have unless the host says otherwise.
#[derive(Debug, Default)]
pub struct Defaults {
    /// Variables.
    pub environment: Vec<(OsString, OsString)>,
    /// Where they start.
    pub directory: Option<PathBuf>,
    /// Who runs them.
    pub user: Option<String>,
}

static DEFAULTS: OnceLock<Defaults> = OnceLock::new();

/// Before the first command.
pub fn set_defaults(defaults: Defaults) {
    // Only the first ones count.
    let _ = DEFAULTS.set(defaults);
}

/// Runs a command to its end.
pub fn run(exec: &Exec, connection: &File) -> Result<(), Failure> {
    let other = |error: io::Error| Failure::new(FailureKind::Other, error);
    let defaults = DEFAULTS.get_or_init(Defaults::default);
    let user = exec.user.as_ref().or(defaults.user.as_ref());
    let user = users::find(user.map(String::as_str));
    let user = user.map_err(|text| Failure::new(FailureKind::Other, text))?;
    let (child, ends) = start(exec, &user, defaults)?;
    let mut session = Session::new(connection, child, ends).map_err(other)?;
    session.say(&FromGuest::Accepted(Answer::Done));
    if session.serve().is_err() {
        // It has broken, or the host breaks the rules: nobody is there to be told. Fails if it has gone.
        let _ = shutdown(connection, Shutdown::Both);
    }
    session.end();
    Ok(())
}

/// The agent's ends of a command's standard input and output.
struct Ends {
    /// Standard input; with a terminal it is the terminal.
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    errors: Option<OwnedFd>,
    terminal: bool,
}

fn start(exec: &Exec, user: &User, defaults: &Defaults) -> Result<(Child, Ends), Failure> {
    let refused = |kind, text: String| Failure::new(kind, text);
    let other = |error: io::Error| Failure::new(FailureKind::Other, error);
    let Some((program, arguments)) = exec.argv.split_first().filter(|(p, _)| !p.is_empty()) else {
        return Err(refused(FailureKind::Request, "there is no command".into()));
    };
    let program = OsStr::from_bytes(program);
    let dir = match &exec.dir {
        Some(dir) => PathBuf::from(OsStr::from_bytes(dir)),
        // A home that is not there is no reason not to run.
        None => (defaults.directory.clone())
            .or(Some(user.home.clone()))
            .filter(|home| home.is_dir())
            .unwrap_or("/".into()),
    };
    if !dir.is_dir() {
        let text = format!("{} is not a directory of the guest", dir.display());
        return Err(refused(FailureKind::Other, text));
    }
    let mut command = Command::new(program);
    command
        .args(arguments.iter().map(|argument| OsStr::from_bytes(argument)))
        .env_clear()
        .env("PATH", PATH)
        .envs(defaults.environment.iter().map(|(key, value)| (key, value)))
        .env("HOME", &user.home)
        .env("USER", &user.name)
        .env("LOGNAME", &user.name)
        .current_dir(&dir);
    if !user.shell.is_empty() {
        command.env("SHELL", &user.shell);
    }
    if exec.terminal.is_some() {
        command.env("TERM", "xterm");
    }
    for (key, value) in &exec.env {
        if key.is_empty() || key.contains(&b'=') || [key, value].iter().any(|t| t.contains(&0)) {
            let text = format!("{} cannot be a variable", String::from_utf8_lossy(key));
            return Err(refused(FailureKind::Request, text));
        }
        command.env(OsStr::from_bytes(key), OsStr::from_bytes(value));
    }
    let terminal = exec.terminal.is_some();
    let mut ends = match exec.terminal {
        Some(size) => attach_terminal(&mut command, size).map_err(other)?,
        None => {
            let input = match exec.input {
                true => Stdio::piped(),
                false => Stdio::null(),
            };
            command
                .stdin(input)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            Ends {
                input: None,
                output: None,
                errors: None,
                terminal,
            }
        }
    };
    let mut become_user = identity(user).map_err(other)?;
    let prepare = move || {
        default_signals();
        setsid()?;
        if terminal {
            ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        become_user()
    };
    // SAFETY: it makes system calls and nothing else; it neither allocates nor takes locks.
    unsafe { command.pre_exec(prepare) };
    let mut child = command.spawn().map_err(|error| {
        let name = program.display();
        match error.kind() {
            io::ErrorKind::NotFound => {
                let text = match Path::new(program).exists() {
                    true => format!("{name}: its interpreter is not in the guest"),
                    false => format!("{name}: there is no such program in the guest"),
                };
                refused(FailureKind::NotFound, text)
            }
            _ => refused(FailureKind::NotRunnable, format!("{name}: {error}")),
        }
    })?;
    if !terminal {
        ends.input = child.stdin.take().map(Into::into);
        ends.output = child.stdout.take().map(Into::into);
        ends.errors = child.stderr.take().map(Into::into);
    }
    Ok((child, ends))
}

/// Whoever started the agent may have had it ignore some.
fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: the default is a valid action, and this may be called between fork and exec. It fails for those that have
        // no other one.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Gives the command a terminal.
fn attach_terminal(command: &mut Command, size: WindowSize) -> io::Result<Ends> {
    let (master, terminal) = open_terminal(size)?;
    command
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal);
    Ok(Ends {
        input: Some(master.try_clone()?),
        output: Some(master),
        errors: None,
        terminal: true,
    })
}

/// What makes a process this user's.
fn identity(user: &User) -> io::Result<impl FnMut() -> io::Result<()> + use<>> {
    use rustix::process::{Gid, Uid};
    let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
    let number = |id: u32| (id != u32::MAX).then_some(id).ok_or_else(wrong);
    let uid = Uid::from_raw(number(user.uid)?);
    let gid = Gid::from_raw(number(user.gid)?);
    let groups: io::Result<Vec<Gid>> = (user.groups.iter())
        .map(|&gid| Ok(Gid::from_raw(number(gid)?)))
        .collect();
    let groups = groups?;
    let change = uid != rustix::process::getuid() || rustix::process::getuid().is_root();
    Ok(move || {
        // Who is not root stays who they are.
        if change {
            set_thread_groups(&groups)?;
            set_thread_gid(gid)?;
            set_thread_uid(uid)?;
        }
        Ok(())
    })
}

/// A running command and its connection.
struct Session<'a> {
    connection: &'a File,
    child: Child,
    ends: Ends,
    /// Readable when the command has ended.
    ended: OwnedFd,
    /// Of the host, not a whole message yet.
    inbox: Vec<u8>,
    /// For the host.
    outbox: VecDeque<u8>,
    /// For the command.
    input: VecDeque<u8>,
    /// No more is to come after that.
    input_ends: bool,
    /// Taken by the command, and not told yet.
    taken: usize,
}

/// What is to be done after a look at the connection.
#[derive(PartialEq, Eq)]
enum Host {
    There,
    Gone,
}

impl Session<'_> {
    fn new(connection: &File, child: Child, ends: Ends) -> io::Result<Session<'_>> {
        let pid = Pid::from_child(&child);
        let (ended, signal) = pipe_with(PipeFlags::CLOEXEC)?;
        let wait = move || {
            // It stays a zombie until the session takes it, so its number is not another's meanwhile.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            while let Err(Errno::INTR) = waitid(WaitId::Pid(pid), options) {}
            drop(signal);
        };
        std::thread::Builder::new()
            .stack_size(crate::STACK)
            .spawn(wait)?;
        for end in [&ends.input, &ends.output, &ends.errors]
            .into_iter()
            .flatten()
        {
            ioctl_fionbio(end, true)?;
        }
        ioctl_fionbio(connection, true)?;
        Ok(Session {
            connection,
            child,
            ends,
            ended,
            inbox: Vec::new(),
            outbox: VecDeque::new(),
            input: VecDeque::new(),
            input_ends: false,
            taken: 0,
        })
    }

    fn say(&mut self, message: &FromGuest) {
        write(&mut self.outbox, message).expect("memory can be written to");
    }

    /// Until the command has ended and everything has been said, or the host has gone.
    fn serve(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        let mut exit: Option<ExitStatus> = None;
        loop {
            let [host, input, output, errors, ended] = self.wait(exit.is_some())?;
            if host.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR)
                && self.hear(&mut buffer)? == Host::Gone
            {
                return Ok(());
            }
            if !input.is_empty() {
                self.feed();
            }
            let readable = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
            if output.intersects(readable) {
                self.collect(false, &mut buffer);
            }
            if errors.intersects(readable) {
                self.collect(true, &mut buffer);
            }
            if !ended.is_empty() && exit.is_none() {
                exit = Some(self.child.wait()?);
            }
            self.send()?;
            if let Some(status) = exit {
                let nothing_left = self.ends.output.is_none() && self.ends.errors.is_none();
                // A child that goes on in the background may keep them open.
                if nothing_left || self.is_quiet()? {
                    return self.conclude(status);
                }
            }
        }
    }

    /// Waits until something can be done.
    fn wait(&self, ended: bool) -> io::Result<[PollFlags; 5]> {
        let room = self.outbox.len() < OUTBOX;
        let mut host = PollFlags::IN;
        if !self.outbox.is_empty() {
            host |= PollFlags::OUT;
        }
        let when = |condition: bool, flags| match condition {
            true => flags,
            false => PollFlags::empty(),
        };
        let wanted = [
            (Some(self.connection.as_fd()), host),
            (
                self.ends
                    .input
                    .as_ref()
                    .map(AsFd::as_fd)
                    .filter(|_| !self.input.is_empty()),
                PollFlags::OUT,
            ),
            (
                self.ends.output.as_ref().map(AsFd::as_fd).filter(|_| room),
                when(room, PollFlags::IN),
            ),
            (
                self.ends.errors.as_ref().map(AsFd::as_fd).filter(|_| room),
                when(room, PollFlags::IN),
            ),
            (Some(self.ended.as_fd()).filter(|_| !ended), PollFlags::IN),
        ];
        let mut places = Vec::new();
        let mut fds = Vec::new();
        for (place, (fd, flags)) in wanted.iter().enumerate() {
            if let Some(fd) = fd {
                places.push(place);
                fds.push(PollFd::from_borrowed_fd(*fd, *flags));
            }
        }
        // After the end, whatever is left is there already.
        let at_once = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let timeout = (ended && self.outbox.is_empty()).then_some(&at_once);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut found = [PollFlags::empty(); 5];
        for (place, fd) in places.into_iter().zip(&fds) {
            found[place] = fd.revents();
        }
        Ok(found)
    }

    /// Whether the command has nothing more to be read now.
    fn is_quiet(&self) -> io::Result<bool> {
        let ends = [&self.ends.output, &self.ends.errors];
        let mut fds: Vec<_> = ends
            .into_iter()
            .flatten()
            .map(|end| PollFd::new(end, PollFlags::IN))
            .collect();
        let at_once = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match poll(&mut fds, Some(&at_once)) {
            Ok(count) => Ok(count == 0),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes what the host has said.
    fn hear(&mut self, buffer: &mut [u8]) -> io::Result<Host> {
        match self.connection.read(buffer) {
            Ok(0) => return Ok(Host::Gone),
            Ok(n) => self.inbox.extend(&buffer[..n]),
            Err(error) if is_later(&error) => return Ok(Host::There),
            Err(error) => return Err(error),
        }
        let inbox = std::mem::take(&mut self.inbox);
        let mut rest = &inbox[..];
        while whole_message(rest)? {
            match read(&mut rest).map_err(io::Error::other)? {
                Some(ToGuest::Data(data)) => self.take_input(&data)?,
                Some(ToGuest::End) => self.input_ends = true,
                Some(ToGuest::Resize(size)) => {
                    if let (true, Some(master)) = (self.ends.terminal, &self.ends.output) {
                        // Fails if the command has closed it.
                        let _ = resize(master, size);
                    }
                }
                Some(ToGuest::Signal(number)) => self.signal(number),
                Some(ToGuest::Request(..)) | None => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
        self.inbox = rest.into();
        self.feed();
        Ok(Host::There)
    }

    fn take_input(&mut self, data: &[u8]) -> io::Result<()> {
        if self.input.len() + data.len() > INPUT_WINDOW as usize || self.input_ends {
            return Err(io::ErrorKind::InvalidData.into());
        }
        match self.ends.input {
            Some(_) => self.input.extend(data),
            // Nobody reads it any more.
            None => self.taken += data.len(),
        }
        Ok(())
    }

    fn signal(&self, number: u8) {
        let Some(signal) = Signal::from_named_raw(number.into()) else {
            return;
        };
        // Fails if all of them have ended.
        let _ = kill_process_group(Pid::from_child(&self.child), signal);
    }

    /// Gives the command what it takes of its input.
    fn feed(&mut self) {
        if let Some(end) = &self.ends.input {
            while !self.input.is_empty() {
                let (first, _) = self.input.as_slices();
                match rustix::io::write(end, first) {
                    Ok(n) => {
                        self.input.drain(..n);
                        self.taken += n;
                    }
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break,
                    Err(_) => {
                        self.taken += self.input.len();
                        self.input.clear();
                        self.ends.input = None;
                        break;
                    }
                }
            }
        }
        let worth_telling = self.input.is_empty() || self.taken >= INPUT_WINDOW as usize / 4;
        if self.taken > 0 && worth_telling {
            let taken = std::mem::take(&mut self.taken);
            self.say(&FromGuest::Taken(taken as u32));
        }
        if self.input_ends
            && self.input.is_empty()
            && let Some(end) = self.ends.input.take()
            && self.ends.terminal
        {
            // A terminal has no end but this.
            let _ = rustix::io::write(&end, &[END_OF_INPUT]);
        }
    }

    /// Takes what the command has written.
    fn collect(&mut self, errors: bool, buffer: &mut [u8]) {
        let end = match errors {
            true => &mut self.ends.errors,
            false => &mut self.ends.output,
        };
        let Some(fd) = end else { return };
        match rustix::io::read(&*fd, &mut *buffer) {
            Ok(n @ 1..) => {
                let data = &buffer[..n];
                let said = match errors {
                    true => write(&mut self.outbox, &FromGuest::Errors(data.into())),
                    false => write_data::<FromGuest>(&mut self.outbox, data),
                };
                said.expect("memory can be written to");
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            // The end; of a terminal it is an error.
            Ok(0) | Err(_) => *end = None,
        }
    }

    /// Sends what the host takes.
    fn send(&mut self) -> io::Result<()> {
        while !self.outbox.is_empty() {
            let (first, _) = self.outbox.as_slices();
            match rustix::io::write(self.connection, first) {
                Ok(n) => drop(self.outbox.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The last words.
    fn conclude(&mut self, status: ExitStatus) -> io::Result<()> {
        let exit = match (status.code(), status.signal()) {
            (Some(code), _) => Exit::Code(code as u8),
            (None, signal) => Exit::Signal(signal.unwrap_or(0) as u8),
        };
        self.say(&FromGuest::End);
        self.say(&FromGuest::Exit(exit));
        ioctl_fionbio(self.connection, false)?;
        self.send()
    }

    /// If the command still runs the host has gone: it hears what it would hear if its terminal had.
    fn end(mut self) {
        // Whoever reads on needs a connection that waits; fails if that is broken.
        let _ = ioctl_fionbio(self.connection, false);
        if let Ok(None) = self.child.try_wait() {
            self.signal(Signal::HUP.as_raw() as u8);
            drop(self.ends);
            // It may take its time.
            let mut child = self.child;
            let _ = child.wait();
        }
    }
}

fn is_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// Whether all of the first message is there.
fn whole_message(inbox: &[u8]) -> io::Result<bool> {
    let [_, a, b, c, d, rest @ ..] = inbox else {
        return Ok(false);
    };
    let len = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
    if len > MAX_PAYLOAD {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(rest.len() >= len)
}
