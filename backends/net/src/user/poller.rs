//! Waits for the host's sockets.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

/// Which socket an event is about.
pub(crate) type Token = u64;

/// Where the tokens of the sockets of each kind start.
pub(crate) mod token {
    use super::Token;

    pub(crate) const TCP: Token = 0;
    pub(crate) const UDP: Token = 1 << 60;
    pub(crate) const PING: Token = 2 << 60;
    /// Of published ports, by number.
    pub(crate) const TCP_PUBLISHED: Token = 3 << 60;
    /// Of published ports, by number.
    pub(crate) const UDP_PUBLISHED: Token = 4 << 60;

    /// The start of the kind that `token` is of.
    pub(crate) fn kind(token: Token) -> Token {
        token & 0xf << 60
    }
}

/// The token of [`Poller::wake`].
const WAKE: Token = u64::MAX;

/// A set of sockets, and a way to interrupt the wait for them. See epoll(7).
pub(crate) struct Poller {
    epoll: OwnedFd,
    wake: OwnedFd,
}

/// What has happened to a socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready {
    pub token: Token,
    /// Reading will not block, be it for an error.
    pub readable: bool,
    /// Writing will not block, be it for an error.
    pub writable: bool,
}

impl Poller {
    pub(crate) fn new() -> io::Result<Poller> {
        let poller = Poller {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        };
        let data = EventData::new_u64(WAKE);
        epoll::add(&poller.epoll, &poller.wake, data, EventFlags::IN)?;
        Ok(poller)
    }

    /// Tells once whenever the socket becomes readable or writable (edge-triggered). Closing the socket takes it out.
    pub(crate) fn add(&self, socket: impl AsFd, token: Token) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::add(
            &self.epoll,
            socket,
            EventData::new_u64(token),
            flags,
        )?)
    }

    /// Tells as long as the socket is readable.
    pub(crate) fn add_reader(&self, socket: impl AsFd, token: Token) -> io::Result<()> {
        let data = EventData::new_u64(token);
        Ok(epoll::add(&self.epoll, socket, data, EventFlags::IN)?)
    }

    /// Ends the wait that is under way, or the next one.
    pub(crate) fn wake(&self) {
        // Fails only if the counter is full, and then the wait ends as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Waits for events, or until `timeout`; `ready` holds them afterwards.
    pub(crate) fn wait(&self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> io::Result<()> {
        let mut events = [const {
            Event {
                flags: EventFlags::empty(),
                data: EventData::new_u64(0),
            }
        }; 64];
        let timeout = timeout.map(|t| Timespec {
            tv_sec: t.as_secs() as i64,
            tv_nsec: t.subsec_nanos().into(),
        });
        ready.clear();
        let count = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        for event in &events[..count] {
            let (token, flags) = (event.data.u64(), event.flags);
            if token == WAKE {
                let mut count = [0; 8];
                // Nothing to read is as good.
                let _ = rustix::io::read(&self.wake, &mut count);
                continue;
            }
            let broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
            ready.push(Ready {
                token,
                readable: broken || flags.intersects(EventFlags::IN | EventFlags::RDHUP),
                writable: broken || flags.contains(EventFlags::OUT),
            });
        }
        Ok(())
    }
}
