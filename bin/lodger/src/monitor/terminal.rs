//! The terminal while the guest has it, and the signals; in the background the signals alone.

use std::sync::Arc;
use std::time::Duration;

use lodger_char::{Escape, Input, Notice, RawMode, SharedConsole};
use lodger_host_sys::signals::{self, Signals};

use super::state::Shared;
use crate::messages;
use crate::status::{self, Error, host_error};

/// What a guest in the background has to power off when its monitor is told to end by a signal, as at the host's shutdown.
const TIME_TO_STOP: Duration = Duration::from_secs(10);

/// See the module documentation.
pub struct Terminal {
    // The input thread ends before the terminal is put back.
    _input: Input,
    _raw: Option<RawMode>,
}

impl Terminal {
    /// Lets the user type at the console, in raw mode if `interactive`. Without an output standard input is /dev/null.
    pub fn start(
        interactive: bool,
        shared: &Arc<Shared>,
        console: &Arc<SharedConsole>,
    ) -> Result<Terminal, Error> {
        let caught = catch_signals()?;
        let raw = raw_mode(interactive)?;
        let asked = Arc::clone(shared);
        let notice = move |notice| match notice {
            Notice::Help => messages::say(Escape::HELP),
            Notice::Quit => asked.end_now(status::POWERED_OFF),
            Notice::Signal(number) if asked.is_attended() => asked.end_now(status::signal(number)),
            Notice::Signal(number) => signal_in_background(&asked, number),
            Notice::Resized { columns, rows } => drop(asked.resize(columns, rows)),
        };
        let escape = interactive.then(Escape::default);
        let input = Input::start(console.clone(), caught, escape, notice);
        let input = input.map_err(host_error("cannot read standard input"))?;
        console.set_room(input.room());
        // What was refused before the console knew whom to tell.
        input.room().tell();
        Ok(Terminal {
            _input: input,
            _raw: raw,
        })
    }
}

/// Catches the signals that a program at a terminal gets.
pub fn catch_signals() -> Result<Signals, Error> {
    Signals::catch(&[
        signals::HANGUP,
        signals::INTERRUPT,
        signals::QUIT,
        signals::TERMINATE,
        signals::WINDOW_CHANGED,
    ])
    .map_err(host_error("cannot catch signals"))
}

/// Puts the terminal into raw mode, if somebody is there to type, until the result is dropped.
pub fn raw_mode(interactive: bool) -> Result<Option<RawMode>, Error> {
    let raw = interactive.then(RawMode::enter).transpose();
    raw.map_err(host_error("cannot put the terminal into raw mode"))
}

/// The first signal is a request, the second an order.
fn signal_in_background(shared: &Arc<Shared>, number: u8) {
    if shared.is_asked() {
        return shared.end_now(status::signal(number));
    }
    tracing::warn!("signal {number}: the guest is asked to power off");
    let stopping = Arc::clone(shared);
    let stop = move || drop(stopping.stop(TIME_TO_STOP));
    if std::thread::Builder::new().spawn(stop).is_err() {
        shared.end_now(status::signal(number));
    }
}
