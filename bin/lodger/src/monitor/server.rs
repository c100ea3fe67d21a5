//! The socket on which a monitor is asked things: a thread for each connection.

use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lodger_char::SharedConsole;
use lodger_control::{Answer, ErrorKind, Request, Stopped, WireError, read_request, write_answer};

use super::memory::{memory, set_memory};
use super::state::Shared;
use crate::status::{self, Error};

/// Connections at once.
const CONNECTIONS: usize = 64;
/// There is no machine.
const NOT_NOW: &str = "it does not run";
/// How long the last answers and the end of the console may take on their way.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The server. Its end is that of the process.
pub struct Server {
    /// Where it listens.
    paths: Vec<PathBuf>,
    /// What is yet to be answered, and the consoles.
    owed: Arc<Counter>,
}

/// How many of something there are.
#[derive(Default)]
struct Counter {
    count: Mutex<usize>,
    fewer: Condvar,
}

/// Counts as one.
struct Counted(Arc<Counter>);

impl Drop for Counted {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
        self.0.fewer.notify_all();
    }
}

impl Counter {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more, if there is room.
    fn one_of(self: &Arc<Counter>, max: usize) -> Option<Counted> {
        let mut count = self.lock();
        (*count < max).then(|| {
            *count += 1;
            Counted(Arc::clone(self))
        })
    }

    /// Waits until there are none.
    fn wait(&self, time: Duration) {
        let waited = self
            .fewer
            .wait_timeout_while(self.lock(), time, |count| *count > 0);
        drop(waited);
    }
}

impl Server {
    /// Answers from now on at those of the places where that works, which must be one at least.
    pub fn start(
        places: Vec<PathBuf>,
        shared: &Arc<Shared>,
        console: &Arc<SharedConsole>,
    ) -> Result<Server, Error> {
        let owed = Arc::new(Counter::default());
        let served = Served {
            shared: Arc::clone(shared),
            console: Arc::clone(console),
            connections: Arc::default(),
            owed: Arc::clone(&owed),
        };
        let mut paths = Vec::new();
        let mut problem = None;
        for path in places {
            match served.clone().listen(&path) {
                Ok(()) => paths.push(path),
                Err(error) => {
                    let what = format!("cannot listen there: {error}");
                    problem = Some(Error::File { path, what });
                }
            }
        }
        match (paths.is_empty(), problem) {
            (true, Some(problem)) => Err(problem),
            _ => Ok(Server { paths, owed }),
        }
    }

    /// The best place where it listens.
    pub fn path(&self) -> PathBuf {
        self.paths.first().cloned().unwrap_or_default()
    }

    /// Takes the sockets away: another monitor may listen there next.
    pub fn unlink(&self) {
        for path in &self.paths {
            // Somebody may have cleared the runtime directory.
            let _ = std::fs::remove_file(path);
        }
    }

    /// Lets the answers to the VM's end get out.
    pub fn finish(self) {
        self.owed.wait(LAST_WORDS);
    }
}

fn refuse_busy(mut stream: UnixStream) {
    let busy = error(ErrorKind::Busy, "too many connections to this VM");
    let _ = write_answer(&mut stream, &busy);
}

fn error(kind: ErrorKind, message: impl ToString) -> Answer {
    Answer::Error {
        kind,
        message: message.to_string(),
    }
}

/// What a connection is about.
#[derive(Clone)]
struct Served {
    shared: Arc<Shared>,
    console: Arc<SharedConsole>,
    connections: Arc<Counter>,
    owed: Arc<Counter>,
}

impl Served {
    /// Starts the thread that takes connections at `path`.
    fn listen(self, path: &Path) -> io::Result<()> {
        let listener = lodger_control::listen(path)?;
        let accept = move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else {
                    // No descriptors left, for example.
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                };
                let Some(counted) = self.connections.one_of(CONNECTIONS) else {
                    refuse_busy(stream);
                    continue;
                };
                let served = self.clone();
                let serve = move || {
                    let _counted = counted;
                    served.serve(&stream);
                };
                // Without a thread the connection is closed.
                let _ = std::thread::Builder::new()
                    .name("control".into())
                    .spawn(serve);
            }
        };
        std::thread::Builder::new()
            .name("server".into())
            .spawn(accept)
            .map(drop)
    }

    /// Answers on a connection until it ends.
    fn serve(&self, stream: &UnixStream) {
        let mut writer = stream;
        let mut reader = BufReader::new(stream);
        loop {
            let request = match read_request(&mut reader) {
                Ok(Some(request)) => request,
                Ok(None) | Err(WireError::Io(_) | WireError::Cut) => return,
                Err(problem) => {
                    let kind = match problem {
                        WireError::Version(_) => ErrorKind::Version,
                        _ => ErrorKind::Malformed,
                    };
                    // What follows cannot be trusted to be the beginning of a line.
                    let _ = write_answer(&mut writer, &error(kind, problem));
                    return;
                }
            };
            tracing::debug!("asked: {request:?}");
            let _owed = self.owed.one_of(usize::MAX);
            if request == Request::Console {
                return attach(stream, reader, &self.console);
            }
            if write_answer(&mut writer, &answer(&request, &self.shared)).is_err() {
                return;
            }
        }
    }
}

fn answer(request: &Request, shared: &Arc<Shared>) -> Answer {
    let done = |done: bool, otherwise: &str| match done {
        true => Answer::Done,
        false => error(ErrorKind::State, otherwise),
    };
    match request {
        Request::Status => Answer::Status(shared.status()),
        Request::Stop { seconds } => {
            let (how, ending) = shared.stop(Duration::from_secs((*seconds).into()));
            Answer::Stopped { how, ending }
        }
        Request::Kill => {
            shared.end_now(status::KILLED);
            let ending = shared.wait_for_end();
            let how = Stopped::Killed;
            Answer::Stopped { how, ending }
        }
        Request::PowerButton => {
            let heard = shared.press_power_button() == Some(true);
            done(heard, "the guest does not listen to the power button")
        }
        Request::Resize { columns, rows } => {
            let resized = shared.resize(*columns, *rows);
            done(
                resized,
                "its console is a serial line, which does not carry a size",
            )
        }
        Request::Pause => done(shared.pause(true), NOT_NOW),
        Request::Resume => done(shared.pause(false), "it is not paused"),
        Request::Memory => match shared.vm() {
            Some(vm) => Answer::Memory(memory(&vm.machine)),
            None => error(ErrorKind::State, NOT_NOW),
        },
        Request::SetMemory { bytes } => match shared.vm() {
            Some(vm) => match set_memory(&vm.machine, *bytes) {
                Ok(()) => Answer::Done,
                Err(why) => error(ErrorKind::State, why),
            },
            None => error(ErrorKind::State, NOT_NOW),
        },
        Request::Wait => Answer::Ended(shared.wait_for_end()),
        Request::Console => unreachable!("the connection becomes a console"),
    }
}

/// Makes the connection a console, until either side ends.
fn attach(stream: &UnixStream, mut typed: impl Read, console: &Arc<SharedConsole>) {
    let terminal = console.attach();
    let mut writer = stream;
    if write_answer(&mut writer, &Answer::Done).is_err() {
        terminal.close();
        return;
    }
    std::thread::scope(|scope| {
        let show = || {
            let mut writer = stream;
            while let Some(bytes) = terminal.next() {
                if writer.write_all(&bytes).is_err() {
                    break;
                }
            }
            // Ends the reading below.
            let _ = stream.shutdown(Shutdown::Both);
        };
        if std::thread::Builder::new()
            .spawn_scoped(scope, show)
            .is_ok()
        {
            let mut bytes = [0; 512];
            loop {
                match typed.read(&mut bytes) {
                    Ok(n @ 1..) if console.type_in(&bytes[..n]) => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    _ => break,
                }
            }
        }
        terminal.close();
    });
}
