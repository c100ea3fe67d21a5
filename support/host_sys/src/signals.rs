//! Signals as bytes in a pipe: a thread reads them when it has time, instead of being interrupted.
//!
//! The pipe rather than a signalfd, because that would need the signals blocked in every thread, also in those that
//! libraries start, and in child processes. Specification: POSIX.1-2017, 2.4 Signal Concepts; signal-safety(7).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::pipe::{PipeFlags, pipe_with};

/// Somebody closed the terminal (SIGHUP).
pub const HANGUP: u8 = libc::SIGHUP as u8;
/// Interrupted from the keyboard (SIGINT).
pub const INTERRUPT: u8 = libc::SIGINT as u8;
/// Quit from the keyboard (SIGQUIT).
pub const QUIT: u8 = libc::SIGQUIT as u8;
/// Asked to end (SIGTERM).
pub const TERMINATE: u8 = libc::SIGTERM as u8;
/// The terminal has another size (SIGWINCH).
pub const WINDOW_CHANGED: u8 = libc::SIGWINCH as u8;

/// The pipe's writing end; -1: nobody catches signals.
static WRITER: AtomicI32 = AtomicI32::new(-1);

/// The signals caught, in order of arrival.
#[derive(Debug)]
pub struct Signals {
    reader: OwnedFd,
}

/// Writes the signal's number into the pipe; a full pipe has enough of them.
extern "C" fn note(signal: libc::c_int) {
    let byte = signal as u8;
    let writer = WRITER.load(Ordering::Relaxed);
    // SAFETY: only async-signal-safe calls; errno, which the interrupted code may be about to read, is put back.
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        libc::write(writer, (&raw const byte).cast(), 1);
        *errno = saved;
    }
}

impl Signals {
    /// From now on these signals are caught, in the whole process and for good. A process has one `Signals`.
    ///
    /// # Panics
    /// At the second call.
    pub fn catch(signals: &[u8]) -> io::Result<Signals> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let before = WRITER.swap(writer.into_raw_fd(), Ordering::Relaxed);
        assert!(before < 0, "signals are caught twice");
        for &signal in signals {
            // SAFETY: zero is a valid `sigaction`; the handler has the right type and is async-signal-safe.
            let failed = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = note as extern "C" fn(libc::c_int) as usize;
                action.sa_flags = libc::SA_RESTART;
                libc::sigaction(signal.into(), &action, std::ptr::null_mut()) < 0
            };
            if failed {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Signals { reader })
    }

    /// The next signal that has arrived, if any. Does not wait: poll [`Signals::as_fd`] for reading.
    pub fn next(&self) -> Option<u8> {
        let mut byte = [0];
        match rustix::io::read(&self.reader, &mut byte) {
            Ok(1) => Some(byte[0]),
            _ => None,
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_arrive_in_order() {
        let signals = Signals::catch(&[WINDOW_CHANGED, HANGUP]).unwrap();
        assert_eq!(signals.next(), None);
        for signal in [WINDOW_CHANGED, HANGUP, WINDOW_CHANGED] {
            // SAFETY: the handler is installed; raising waits until it has run.
            assert_eq!(unsafe { libc::raise(signal.into()) }, 0);
            assert_eq!(signals.next(), Some(signal));
        }
        assert_eq!(signals.next(), None);
    }
}
