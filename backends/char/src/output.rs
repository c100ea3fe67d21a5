//! The guest's output on its way to standard output.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

/// What a pipe that is ready for writing takes without blocking (PIPE_BUF).
const CHUNK: usize = 4096;

/// Where the guest's output goes: byte for byte, at once. When nobody can take it any more (a closed pipe, a full
/// disk), what follows is dropped and the guest goes on.
#[derive(Debug)]
pub struct Output {
    to: OwnedFd,
    /// Becomes readable, and stays so, when the output is closed.
    closed: OwnedFd,
    gone: AtomicBool,
}

impl Output {
    /// To standard output.
    pub fn stdout() -> io::Result<Output> {
        Output::to(rustix::io::dup(rustix::stdio::stdout())?)
    }

    fn to(to: OwnedFd) -> io::Result<Output> {
        Ok(Output {
            to,
            closed: eventfd(0, EventfdFlags::CLOEXEC)?,
            gone: AtomicBool::new(false),
        })
    }

    /// Writes all of `data`, waiting for the reader as long as the output is not closed.
    pub fn write(&self, data: &[u8]) {
        let mut rest = data;
        while !rest.is_empty() && !self.gone.load(Ordering::Relaxed) {
            // The reader may be slow for ever: a plain write could not be called off.
            let mut fds = [
                PollFd::new(&self.to, PollFlags::OUT),
                PollFd::new(&self.closed, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return self.lose(error),
            }
            if !fds[1].revents().is_empty() {
                self.gone.store(true, Ordering::Relaxed);
                return;
            }
            if fds[0].revents().is_empty() {
                continue;
            }
            match rustix::io::write(&self.to, &rest[..rest.len().min(CHUNK)]) {
                Ok(n) => rest = &rest[n..],
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return self.lose(error),
            }
        }
    }

    /// Ends all writes, also those that wait for the reader.
    pub fn close(&self) {
        // Fails only if the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.closed, &1u64.to_ne_bytes());
    }

    fn lose(&self, error: Errno) {
        if !self.gone.swap(true, Ordering::Relaxed) {
            tracing::warn!("the guest's output is dropped from here on: standard output: {error}");
        }
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.to.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::pipe;
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn bytes_pass_unchanged() {
        let (reader, writer) = pipe().unwrap();
        let output = Output::to(writer).unwrap();
        let all: Vec<u8> = (0..=255).collect();
        output.write(&all);
        drop(output);
        let mut got = Vec::new();
        File::from(reader).read_to_end(&mut got).unwrap();
        assert_eq!(got, all);
    }

    #[test]
    fn a_closed_reader_does_not_end_the_guest() {
        let (reader, writer) = pipe().unwrap();
        let output = Output::to(writer).unwrap();
        drop(reader);
        output.write(b"lost");
        output.write(b"lost too");
    }

    #[test]
    fn closing_ends_a_write_that_waits() {
        let (_reader, writer) = pipe().unwrap();
        let output = Output::to(writer).unwrap();
        std::thread::scope(|s| {
            let waiting = s.spawn(|| output.write(&vec![0; 1 << 20]));
            output.close();
            waiting.join().unwrap();
        });
    }
}
