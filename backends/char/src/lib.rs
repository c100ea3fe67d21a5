//! The host's terminal, or whatever standard input and output are, as the far end of a guest's console.
//!
//! * [`Output`] passes the guest's bytes on as they are, at once.
//! * [`Input`] is the thread that reads what is typed, the escape key and the signals, and offers the bytes to the guest.
//! * [`SharedConsole`] lets a log and several terminals share one; [`RotatingLog`] is the log.
//! * [`RawMode`] makes the terminal pass every key on, and puts it back however the program ends.
//!
//! When standard input and output are both a terminal it is put into raw mode: Ctrl-C and all other keys go to the
//! guest, except for the escape key Ctrl-A (see [`Escape`]). Otherwise bytes pass unchanged in both directions and
//! nothing is an escape. The end of input is not the end of the guest.
//!
//! A serial line does not carry the terminal's size; a guest asks the terminal itself (`resize`), and the answer passes
//! through, or the user has it typed (Ctrl-A s). [`Notice::Resized`] is for devices that do carry it.
//!
//! Specification: termios(3), POSIX.1-2017 chapter 11.

mod escape;
mod input;
mod log;
mod output;
mod raw_mode;
mod shared;

pub use escape::Escape;
pub use input::{Input, Notice, Room};
pub use log::RotatingLog;
pub use output::Output;
pub use raw_mode::RawMode;
pub use shared::{Attached, SharedConsole};

/// Whether standard input and output are both a terminal.
pub fn is_interactive() -> bool {
    rustix::termios::isatty(rustix::stdio::stdin())
        && rustix::termios::isatty(rustix::stdio::stdout())
}

/// Columns and rows of the terminal that is standard output, if it is one that knows.
pub fn window_size() -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}
