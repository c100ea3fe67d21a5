//! `lodger exec`: a command in a guest, with this terminal or these pipes.
//!
//! The main thread shows what comes; one thread passes standard input on, as far as the agent has room, another one signals and
//! the terminal's size.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use lodger_guest_protocol::{
    Exec, Exit, FromGuest, INPUT_WINDOW, Request, ToGuest, WindowSize, write, write_data,
};
use lodger_host_sys::signals::{self, Signals};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::isatty;

use super::{Agent, Guest};
use crate::cli::ExecArgs;
use crate::monitor::terminal::{catch_signals, raw_mode};
use crate::status::{self, Error, host_error};

/// The status of a program that nobody listens to any more, as of SIGPIPE.
const BROKEN_PIPE: u8 = 128 + 13;
/// So many signals end this program, too, whatever the command does.
const PATIENCE: u32 = 3;
/// The size of a terminal that does not know its own.
const USUAL: (u16, u16) = (80, 24);
/// Bytes of standard input that are read at a time.
const CHUNK: usize = 64 << 10;

/// Runs a command in a guest; the status is the command's.
pub fn exec(args: &ExecArgs, quiet: bool) -> Result<ExitCode, Error> {
    let request = request(args)?;
    let guest = Guest::find(&args.vm, quiet)?;
    let (agent, _) = guest.ask(Request::Exec(request))?;
    let cannot = host_error("cannot use the connection");
    let stream = agent.stream.try_clone().map_err(&cannot)?;
    let link = Arc::new(Link {
        stream: Mutex::new(stream),
        window: Mutex::new(INPUT_WINDOW),
        wider: Condvar::new(),
    });
    let raw = raw_mode(args.tty && args.interactive)?;
    let caught = catch_signals()?;
    let spawn = |name: &str, job: Box<dyn FnOnce() + Send>| {
        let thread = std::thread::Builder::new().name(name.into());
        thread.spawn(job).map(drop)
    };
    let signalled = Arc::clone(&link);
    let started = spawn("signals", Box::new(move || signalled.pass_signals(&caught)));
    let started = started.and_then(|()| {
        let fed = Arc::clone(&link);
        match args.interactive {
            true => spawn("input", Box::new(move || fed.pass_input())),
            false => Ok(()),
        }
    });
    started.map_err(host_error("cannot start a thread"))?;
    let status = show(agent, &link);
    drop(raw);
    status.map(ExitCode::from)
}

fn request(args: &ExecArgs) -> Result<Exec, Error> {
    if args.tty && args.interactive && !isatty(rustix::stdio::stdin()) {
        let text = "--tty: standard input is not a terminal; leave -t out";
        return Err(Error::Usage(text.into()));
    }
    let mut env = Vec::new();
    if args.tty
        && let Some(term) = std::env::var_os("TERM")
    {
        env.push((b"TERM".to_vec(), term.into_vec()));
    }
    for variable in &args.env {
        let bytes = variable.as_bytes();
        match bytes.iter().position(|&b| b == b'=') {
            Some(0) => return Err(Error::Usage("--env: variables are KEY=VALUE or KEY".into())),
            Some(at) => env.push((bytes[..at].into(), bytes[at + 1..].into())),
            // This program's own, if it has it.
            None => env.extend(std::env::var_os(variable).map(|v| (bytes.into(), v.into_vec()))),
        }
    }
    let terminal = args.tty.then(|| {
        let (columns, rows) = lodger_char::window_size().unwrap_or(USUAL);
        WindowSize { columns, rows }
    });
    Ok(Exec {
        argv: args
            .command
            .iter()
            .cloned()
            .map(OsString::into_vec)
            .collect(),
        env,
        dir: args
            .workdir
            .clone()
            .map(|dir| dir.into_os_string().into_vec()),
        user: args.user.clone(),
        terminal,
        input: args.interactive,
    })
}

/// What the threads share.
struct Link {
    stream: Mutex<UnixStream>,
    /// Bytes of input that the agent has room for.
    window: Mutex<u32>,
    wider: Condvar,
}

impl Link {
    /// Fails if the command has ended, which the main thread sees as well.
    fn say(&self, message: &ToGuest) -> io::Result<()> {
        let stream = self.stream.lock();
        write(
            &mut *stream.unwrap_or_else(PoisonError::into_inner),
            message,
        )
    }

    fn pass_input(&self) {
        let mut bytes = vec![0; CHUNK];
        loop {
            let n = match io::stdin().lock().read(&mut bytes) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => 0,
            };
            if n == 0 {
                let _ = self.say(&ToGuest::End);
                return;
            }
            let mut rest = &bytes[..n];
            while !rest.is_empty() {
                let part;
                (part, rest) = rest.split_at(self.take_room(rest.len()));
                let stream = self.stream.lock();
                let mut stream = stream.unwrap_or_else(PoisonError::into_inner);
                if write_data::<ToGuest>(&mut *stream, part).is_err() {
                    return;
                }
            }
        }
    }

    /// Waits for room; takes as much of it as is there, `most` at most.
    fn take_room(&self, most: usize) -> usize {
        let window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let window = self.wider.wait_while(window, |window| *window == 0);
        let mut window = window.unwrap_or_else(PoisonError::into_inner);
        let taken = most.min(*window as usize);
        *window -= taken as u32;
        taken
    }

    fn widen(&self, taken: u32) {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        *window = window.saturating_add(taken).min(INPUT_WINDOW);
        self.wider.notify_all();
    }

    fn pass_signals(&self, caught: &Signals) {
        let mut count = 0;
        loop {
            let mut fds = [PollFd::from_borrowed_fd(caught.as_fd(), PollFlags::IN)];
            // Interrupted by the very signals.
            let _ = poll(&mut fds, None);
            while let Some(number) = caught.next() {
                if number == signals::WINDOW_CHANGED {
                    if let Some((columns, rows)) = lodger_char::window_size() {
                        let _ = self.say(&ToGuest::Resize(WindowSize { columns, rows }));
                    }
                    continue;
                }
                count += 1;
                if count >= PATIENCE || self.say(&ToGuest::Signal(number)).is_err() {
                    lodger_char::RawMode::leave();
                    std::process::exit(status::signal(number).into());
                }
            }
        }
    }
}

/// Shows what the command writes until its end; its status.
fn show(mut agent: Agent, link: &Link) -> Result<u8, Error> {
    let duplicate = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().map(File::from);
    let cannot = host_error("cannot use standard output");
    let mut output = duplicate(&rustix::stdio::stdout()).map_err(&cannot)?;
    let mut errors = duplicate(&rustix::stdio::stderr()).map_err(&cannot)?;
    loop {
        let (to, data) = match agent.next()? {
            FromGuest::Data(data) => (&mut output, data),
            FromGuest::Errors(data) => (&mut errors, data),
            FromGuest::Taken(count) => {
                link.widen(count);
                continue;
            }
            FromGuest::End => continue,
            FromGuest::Exit(Exit::Code(code)) => return Ok(code),
            FromGuest::Exit(Exit::Signal(number)) => return Ok(status::signal(number)),
            other => return Err(agent.unexpected(&other)),
        };
        match to.write_all(&data) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(BROKEN_PIPE),
            Err(source) => return Err(cannot(source)),
        }
    }
}
