//! Raw mode, undone however the program ends: by leaving it normally, by a panic in any thread, by a signal (which
//! [`Input`](crate::Input) turns into a [`Notice`](crate::Notice) and a normal end).

use std::io;
use std::sync::{Mutex, Once, PoisonError};

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The settings to go back to; `Some` while in raw mode.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal is in raw mode as long as this lives.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Puts the terminal that is standard input into raw mode: every byte is passed on as it is, in both directions.
    pub fn enter() -> io::Result<RawMode> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                // Also for those panics that abort the process; and the message is readable.
                restore();
                next(panic);
            }));
        });
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        let mut saved = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
        tcsetattr(stdin(), OptionalActions::Drain, &raw)?;
        saved.get_or_insert(before);
        Ok(RawMode(()))
    }

    /// Puts the terminal back at once, before the program exits without unwinding.
    pub fn leave() {
        restore();
    }

    /// Whether some `RawMode` lives: lines then need a carriage return.
    pub fn is_on() -> bool {
        let saved = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
        saved.is_some()
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let mut saved = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(before) = saved.take() {
        // Not waiting for output to drain: nobody may be reading it. Nothing can be done about an error.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}
