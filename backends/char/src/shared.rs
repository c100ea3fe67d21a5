//! A guest's console that several share: a log, and terminals that come and go.
//!
//! All see what the guest prints; the guest sees what any of them types, in the order in which it comes. A terminal that
//! does not keep up loses output instead of holding the guest up; one that types more than the guest takes has to wait.
//! The machine behind the console may be replaced by another one, at a restart.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use lodger_clock::InputPort;

use crate::input::Room;
use crate::log::RotatingLog;

/// Bytes of output that wait for a slow terminal at most.
const BEHIND: usize = 1 << 20;
/// Bytes of the guest's present line that a new terminal is shown at most.
const LINE: usize = 512;
/// Bytes typed that wait for the guest at most.
const TYPED: usize = 4096;
/// Bytes that are offered to the guest at once.
const PIECE: usize = 256;

/// See the module documentation.
#[derive(Debug)]
pub struct SharedConsole {
    output: Mutex<Shown>,
    input: Mutex<Typed>,
    /// Something in `input` has changed.
    changed: Condvar,
}

#[derive(Debug)]
struct Shown {
    log: Option<RotatingLog>,
    /// The guest's present line, a prompt mostly.
    line: Vec<u8>,
    attached: Vec<Arc<Attached>>,
    closed: bool,
}

#[derive(Default)]
struct Typed {
    port: Option<Arc<dyn InputPort>>,
    /// The guest may have room.
    room: bool,
    waiting: VecDeque<u8>,
    /// To be told when there is room here again.
    starved: Option<Room>,
    closed: bool,
}

impl std::fmt::Debug for Typed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Typed")
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

/// What a terminal has yet to show.
#[derive(Debug, Default)]
pub struct Attached {
    queue: Mutex<Queue>,
    filled: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: VecDeque<u8>,
    closed: bool,
}

impl Attached {
    /// Waits for output, and takes all there is; `None`: there will be none any more.
    pub fn next(&self) -> Option<Vec<u8>> {
        let mut queue = lock(&self.queue);
        while queue.bytes.is_empty() && !queue.closed {
            let waited = self.filled.wait(queue);
            queue = waited.unwrap_or_else(PoisonError::into_inner);
        }
        (!queue.bytes.is_empty()).then(|| queue.bytes.drain(..).collect())
    }

    /// The terminal has gone: no more output after what is there.
    pub fn close(&self) {
        lock(&self.queue).closed = true;
        self.filled.notify_all();
    }

    fn push(&self, data: &[u8]) {
        let mut queue = lock(&self.queue);
        queue.bytes.extend(data);
        let excess = queue.bytes.len().saturating_sub(BEHIND);
        queue.bytes.drain(..excess);
        self.filled.notify_all();
    }

    fn is_closed(&self) -> bool {
        lock(&self.queue).closed
    }
}

/// What is shown again must not ask the terminal anything: the guest does not expect the answer any more. Questions are
/// control sequences that end with `n` or `c` (ECMA-48: DSR, DA).
fn without_queries(line: &[u8]) -> Vec<u8> {
    let mut shown = Vec::new();
    let mut rest = line;
    while let Some(start) = rest.windows(2).position(|two| two == b"\x1b[") {
        let (text, sequence) = rest.split_at(start);
        shown.extend(text);
        // Parameters, then the final byte.
        let end = sequence[2..]
            .iter()
            .position(|byte| (0x40..0x7f).contains(byte));
        let Some(end) = end.map(|end| end + 3) else {
            // Not all of it has come yet.
            rest = sequence;
            break;
        };
        if !matches!(sequence[end - 1], b'n' | b'c') {
            shown.extend(&sequence[..end]);
        }
        rest = &sequence[end..];
    }
    shown.extend(rest);
    shown
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere leaves bytes too many or too few at worst.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SharedConsole {
    /// A console without a machine yet, and the thread that brings what is typed to the guest.
    pub fn start(log: Option<RotatingLog>) -> io::Result<Arc<SharedConsole>> {
        let console = Arc::new(SharedConsole {
            output: Mutex::new(Shown {
                log,
                line: Vec::new(),
                attached: Vec::new(),
                closed: false,
            }),
            input: Mutex::default(),
            changed: Condvar::new(),
        });
        let typing = Arc::clone(&console);
        std::thread::Builder::new()
            .name("typing".into())
            .spawn(move || typing.bring())?;
        Ok(console)
    }

    /// The guest prints.
    pub fn print(&self, data: &[u8]) {
        let mut shown = lock(&self.output);
        if let Some(log) = &mut shown.log {
            log.write(data);
        }
        let line = match data.iter().rposition(|&b| b == b'\n') {
            Some(end) => {
                shown.line.clear();
                &data[end + 1..]
            }
            None => data,
        };
        shown.line.extend(line);
        let excess = shown.line.len().saturating_sub(LINE);
        shown.line.drain(..excess);
        shown.attached.retain(|terminal| !terminal.is_closed());
        shown
            .attached
            .iter()
            .for_each(|terminal| terminal.push(data));
    }

    /// A terminal comes. It is shown the guest's present line first.
    pub fn attach(&self) -> Arc<Attached> {
        let mut shown = lock(&self.output);
        let terminal = Arc::new(Attached::default());
        terminal.push(&without_queries(&shown.line));
        match shown.closed {
            true => terminal.close(),
            false => shown.attached.push(Arc::clone(&terminal)),
        }
        terminal
    }

    /// A terminal types; waits until everything is on its way to the guest. False: there will be no guest any more.
    pub fn type_in(&self, data: &[u8]) -> bool {
        let mut rest = data;
        let mut typed = lock(&self.input);
        while !rest.is_empty() && !typed.closed {
            let n = rest.len().min(TYPED.saturating_sub(typed.waiting.len()));
            typed.waiting.extend(&rest[..n]);
            rest = &rest[n..];
            match n {
                0 => {
                    let waited = self.changed.wait(typed);
                    typed = waited.unwrap_or_else(PoisonError::into_inner);
                }
                _ => self.changed.notify_all(),
            }
        }
        !typed.closed
    }

    /// From now on this machine's device gets what is typed. What the one before did not take is dropped.
    pub fn connect(&self, port: Arc<dyn InputPort>) {
        let mut typed = lock(&self.input);
        typed.port = Some(port);
        typed.room = true;
        typed.waiting.clear();
        self.changed.notify_all();
    }

    /// The guest's device has room for input again; its `on_room`.
    pub fn has_room(&self) {
        lock(&self.input).room = true;
        self.changed.notify_all();
    }

    /// Tells `room` when there is room after an [`offer`](InputPort::offer) that was cut short.
    pub fn set_room(&self, room: Room) {
        lock(&self.input).starved = Some(room);
    }

    /// There will be no guest any more: terminals are let go after what they have yet to show.
    pub fn close(&self) {
        let mut shown = lock(&self.output);
        shown.closed = true;
        shown
            .attached
            .drain(..)
            .for_each(|terminal| terminal.close());
        drop(shown);
        lock(&self.input).closed = true;
        self.changed.notify_all();
    }

    /// The thread that offers what is typed to the guest, without a lock that the guest's device could wait for.
    fn bring(&self) {
        let mut typed = lock(&self.input);
        while !typed.closed {
            let port = match &typed.port {
                Some(port) if typed.room && !typed.waiting.is_empty() => Arc::clone(port),
                _ => {
                    let waited = self.changed.wait(typed);
                    typed = waited.unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            };
            let piece: Vec<u8> = typed.waiting.iter().copied().take(PIECE).collect();
            typed.room = false;
            drop(typed);
            let taken = port.offer(&piece);
            typed = lock(&self.input);
            // Another machine may have come meanwhile; it has nothing to do with these bytes.
            let same = typed
                .port
                .as_ref()
                .is_some_and(|now| Arc::ptr_eq(now, &port));
            if same {
                let taken = taken.min(typed.waiting.len());
                typed.waiting.drain(..taken);
                typed.room |= taken == piece.len();
                self.changed.notify_all();
                if let Some(starved) = &typed.starved {
                    starved.tell();
                }
            }
        }
    }
}

impl InputPort for SharedConsole {
    fn offer(&self, data: &[u8]) -> usize {
        let mut typed = lock(&self.input);
        let n = data.len().min(TYPED.saturating_sub(typed.waiting.len()));
        typed.waiting.extend(&data[..n]);
        self.changed.notify_all();
        n
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    /// Takes `room` bytes, then none until told otherwise.
    struct Port {
        room: Mutex<usize>,
        taken: Mutex<Sender<u8>>,
    }

    impl InputPort for Port {
        fn offer(&self, data: &[u8]) -> usize {
            let mut room = lock(&self.room);
            let n = data.len().min(*room);
            *room -= n;
            let taken = lock(&self.taken);
            data[..n].iter().for_each(|&byte| taken.send(byte).unwrap());
            n
        }
    }

    #[test]
    fn all_see_what_is_printed_and_the_present_line() {
        let console = SharedConsole::start(None).unwrap();
        console.print(b"booting\nlog");
        let first = console.attach();
        console.print(b"in: ");
        let second = console.attach();
        console.print(b"x\n");
        console.close();
        let all = |terminal: Arc<Attached>| {
            let pieces = std::iter::from_fn(|| terminal.next());
            String::from_utf8(pieces.flatten().collect()).unwrap()
        };
        assert_eq!(all(first), "login: x\n");
        assert_eq!(all(second), "login: x\n");
        assert_eq!(all(console.attach()), "");
    }

    #[test]
    fn nothing_is_asked_again() {
        for (line, shown) in [
            ("mini:/# \x1b[6n", "mini:/# "),
            ("\x1b[?2004h$ \x1b[0;1mx\x1b[>c", "\x1b[?2004h$ \x1b[0;1mx"),
            ("\x1b[6n\x1b[6nx\x1b[6", "x\x1b[6"),
            ("plain", "plain"),
        ] {
            let found = without_queries(line.as_bytes());
            assert_eq!(String::from_utf8(found).unwrap(), shown);
        }
    }

    #[test]
    fn a_terminal_that_does_not_read_loses_the_oldest() {
        let console = SharedConsole::start(None).unwrap();
        let terminal = console.attach();
        console.print(&[b'a'; BEHIND]);
        console.print(b"the end");
        let seen = terminal.next().unwrap();
        assert_eq!(seen.len(), BEHIND);
        assert!(seen.ends_with(b"athe end"));
        terminal.close();
        console.print(b"unseen");
        assert_eq!(terminal.next(), None);
        console.close();
    }

    #[test]
    fn what_is_typed_waits_for_the_guest() {
        let console = SharedConsole::start(None).unwrap();
        let (send, taken) = channel();
        let port = Arc::new(Port {
            room: Mutex::new(3),
            taken: Mutex::new(send),
        });
        let text: Vec<u8> = (0..3 * TYPED).map(|i| i as u8).collect();
        std::thread::scope(|scope| {
            console.connect(port.clone());
            scope.spawn(|| assert!(console.type_in(&text)));
            let mut got: Vec<u8> = taken.iter().take(3).collect();
            *lock(&port.room) = usize::MAX;
            console.has_room();
            got.extend(taken.iter().take(text.len() - 3));
            assert!(got == text);
        });
        console.close();
        assert!(!console.type_in(b"x"));
    }
}
