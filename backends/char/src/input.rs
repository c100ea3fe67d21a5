//! The thread that reads standard input and the signals.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use lodger_clock::InputPort;
use lodger_host_sys::signals::{Signals, WINDOW_CHANGED};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::escape::{Command, Escape};

/// Bytes that wait for the guest at most. A terminal's further ones are lost, as on a real serial line; a pipe is not read
/// on.
const WAITING: usize = 4096;

/// What the user or the host asks of the monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// The escape sequence to leave.
    Quit,
    /// The escape sequence for help.
    Help,
    /// The terminal has this many columns and rows now.
    Resized {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// A signal that asks the program to end, by its number.
    Signal(u8),
}

/// Tells the input thread that the guest has room for input again; the `on_room` of the guest's device.
#[derive(Debug, Clone)]
pub struct Room(Arc<OwnedFd>);

impl Room {
    /// There is room.
    pub fn tell(&self) {
        wake(&self.0);
    }
}

/// The thread. It ends when this is dropped.
#[derive(Debug)]
pub struct Input {
    wake: Arc<OwnedFd>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Input {
    /// Reads standard input and `signals` until dropped. Bytes go to `port`; with an `escape` key its sequences are
    /// taken out. `notice` is called on the thread and must not wait for the guest.
    pub fn start(
        port: Arc<dyn InputPort>,
        signals: Signals,
        escape: Option<Escape>,
        notice: impl Fn(Notice) + Send + 'static,
    ) -> io::Result<Input> {
        let from = rustix::io::dup(rustix::stdio::stdin())?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let reader = Reader {
            from: Some(from),
            signals: Some(signals),
            wake: Arc::clone(&wake),
            stop: Arc::clone(&stop),
            port,
            escape,
            waiting: VecDeque::new(),
            notice,
        };
        let thread = std::thread::Builder::new()
            .name("input".into())
            .spawn(move || reader.serve())?;
        Ok(Input {
            wake,
            stop,
            thread: Some(thread),
        })
    }

    /// The handle by which the guest's device says that it has room.
    pub fn room(&self) -> Room {
        Room(Arc::clone(&self.wake))
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        wake(&self.stop);
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// What tells a guest's shell how big the terminal is, as a serial line does not. Typed at a shell's prompt.
fn size_command() -> Vec<u8> {
    match crate::window_size() {
        Some((columns, rows)) => format!("stty rows {rows} cols {columns}\r").into(),
        None => Vec::new(),
    }
}

fn wake(eventfd: &OwnedFd) {
    // Fails only if the counter is full, and then it is readable.
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

struct Reader<N> {
    /// `None` after its end.
    from: Option<OwnedFd>,
    signals: Option<Signals>,
    wake: Arc<OwnedFd>,
    stop: Arc<OwnedFd>,
    port: Arc<dyn InputPort>,
    escape: Option<Escape>,
    waiting: VecDeque<u8>,
    notice: N,
}

/// Which of the descriptors are ready.
struct Ready {
    stop: bool,
    room: bool,
    signals: bool,
    input: bool,
}

impl<N: Fn(Notice)> Reader<N> {
    fn serve(mut self) {
        loop {
            let ready = self.wait();
            if ready.stop {
                return;
            }
            if ready.signals {
                self.take_signals();
            }
            if ready.input {
                self.read();
            }
            if ready.room {
                let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
            }
            self.offer();
        }
    }

    fn wait(&self) -> Ready {
        // With an escape key, standard input must be read even if the guest takes nothing.
        let reading = self.escape.is_some() || self.waiting.len() < WAITING;
        let mut fds = vec![
            PollFd::new(&*self.stop, PollFlags::IN),
            PollFd::new(&*self.wake, PollFlags::IN),
        ];
        fds.extend(self.signals.iter().map(|s| PollFd::new(s, PollFlags::IN)));
        let from = self.from.as_ref().filter(|_| reading);
        fds.extend(from.map(|f| PollFd::new(f, PollFlags::IN)));
        // An interrupted wait reports nothing ready.
        let polled = poll(&mut fds, None).is_ok();
        let mut ready = fds.iter().map(|fd| polled && !fd.revents().is_empty());
        let mut next = |present: bool| present && ready.next() == Some(true);
        Ready {
            stop: next(true),
            room: next(true),
            signals: next(self.signals.is_some()),
            input: next(from.is_some()),
        }
    }

    fn take_signals(&mut self) {
        while let Some(signal) = self.signals.as_ref().and_then(Signals::next) {
            if signal != WINDOW_CHANGED {
                (self.notice)(Notice::Signal(signal));
            } else if let Some((columns, rows)) = crate::window_size() {
                (self.notice)(Notice::Resized { columns, rows });
            }
        }
    }

    fn read(&mut self) {
        let Some(from) = &self.from else {
            return;
        };
        let mut buffer = [0; 512];
        let typed = match rustix::io::read(from, &mut buffer) {
            Ok(0) => {
                self.from = None;
                return;
            }
            Ok(n) => &buffer[..n],
            Err(Errno::INTR | Errno::AGAIN) => return,
            Err(error) => {
                tracing::debug!("standard input ends: {error}");
                self.from = None;
                return;
            }
        };
        match &mut self.escape {
            None => self.waiting.extend(typed),
            Some(escape) => {
                let mut data = Vec::new();
                for command in escape.filter(typed, &mut data) {
                    match command {
                        Command::Quit => (self.notice)(Notice::Quit),
                        Command::Help => (self.notice)(Notice::Help),
                        Command::Size => data.extend(size_command()),
                    }
                }
                let room = WAITING.saturating_sub(self.waiting.len());
                self.waiting.extend(data.into_iter().take(room));
            }
        }
    }

    fn offer(&mut self) {
        while !self.waiting.is_empty() {
            let (first, _) = self.waiting.as_slices();
            match self.port.offer(first) {
                0 => return,
                taken => drop(self.waiting.drain(..taken)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::pipe;
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};

    /// Takes `room` bytes, then none until told otherwise.
    struct Port {
        room: Mutex<usize>,
        taken: Mutex<Sender<Vec<u8>>>,
    }

    impl InputPort for Port {
        fn offer(&self, data: &[u8]) -> usize {
            let mut room = self.room.lock().unwrap();
            let n = data.len().min(*room);
            *room -= n;
            if n > 0 {
                self.taken.lock().unwrap().send(data[..n].to_vec()).unwrap();
            }
            n
        }
    }

    struct Rig {
        keyboard: Option<OwnedFd>,
        port: Arc<Port>,
        room: Room,
        stop: Arc<OwnedFd>,
        taken: std::sync::mpsc::Receiver<Vec<u8>>,
        notices: std::sync::mpsc::Receiver<Notice>,
        thread: JoinHandle<()>,
    }

    fn rig(escapes: bool, room: usize) -> Rig {
        let (from, keyboard) = pipe().unwrap();
        let event =
            || Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        let (wake, stop) = (event(), event());
        let (taken, taken_by_guest) = channel();
        let (notice, notices) = channel();
        let port = Arc::new(Port {
            room: Mutex::new(room),
            taken: Mutex::new(taken),
        });
        let reader = Reader {
            from: Some(from),
            signals: None,
            wake: Arc::clone(&wake),
            stop: Arc::clone(&stop),
            port: port.clone(),
            escape: escapes.then(Escape::default),
            waiting: VecDeque::new(),
            notice: move |n| notice.send(n).unwrap(),
        };
        Rig {
            keyboard: Some(keyboard),
            port,
            room: Room(wake),
            stop,
            taken: taken_by_guest,
            notices,
            thread: std::thread::spawn(move || reader.serve()),
        }
    }

    impl Rig {
        fn type_in(&self, bytes: &[u8]) {
            rustix::io::write(self.keyboard.as_ref().unwrap(), bytes).unwrap();
        }

        fn taken(&self, len: usize) -> Vec<u8> {
            let mut all = Vec::new();
            while all.len() < len {
                all.extend(self.taken.recv().unwrap());
            }
            all
        }

        fn end(self) {
            wake(&self.stop);
            self.thread.join().unwrap();
        }
    }

    #[test]
    fn input_waits_for_room_and_survives_its_end() {
        let mut rig = rig(false, 3);
        rig.type_in(b"he\x01xlo");
        rig.keyboard = None;
        assert_eq!(rig.taken(3), b"he\x01");
        *rig.port.room.lock().unwrap() = 100;
        rig.room.tell();
        assert_eq!(rig.taken(3), b"xlo");
        rig.end();
    }

    #[test]
    fn the_escape_key_works_when_the_guest_takes_nothing() {
        let rig = rig(true, 0);
        for _ in 0..2 * WAITING / 512 {
            rig.type_in(&[b'.'; 512]);
        }
        rig.type_in(b"\x01h\x01x");
        assert_eq!(rig.notices.recv().unwrap(), Notice::Help);
        assert_eq!(rig.notices.recv().unwrap(), Notice::Quit);
        rig.end();
    }
}
