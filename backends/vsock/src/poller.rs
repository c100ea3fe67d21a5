//! The wait for the sockets. See epoll(7).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// Which connection an event is about: the caller's number for it.
pub type Token = u64;

/// Callers' tokens are below this one.
pub const FIRST_RESERVED: Token = (u32::MAX as Token) << 32;

pub(crate) mod token {
    use super::{FIRST_RESERVED, Token};

    pub(super) const WAKE: Token = FIRST_RESERVED;
    pub(crate) const LISTENER: Token = FIRST_RESERVED + 1;
    /// The first of those for requests that are not complete.
    pub(crate) const HANDSHAKES: Token = FIRST_RESERVED + 2;
}

/// Events that are taken at a time.
const BATCH: usize = 64;

pub(crate) struct Poller {
    epoll: OwnedFd,
    wake: OwnedFd,
}

/// What has happened to a socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready {
    pub(crate) token: Token,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) closed: bool,
}

fn edges() -> EventFlags {
    EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET
}

impl Poller {
    pub(crate) fn new() -> io::Result<Poller> {
        let poller = Poller {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        };
        let data = EventData::new_u64(token::WAKE);
        epoll::add(&poller.epoll, &poller.wake, data, EventFlags::IN)?;
        Ok(poller)
    }

    pub(crate) fn add_listener(&self, socket: impl AsFd) -> io::Result<()> {
        let data = EventData::new_u64(token::LISTENER);
        // By edges, because without descriptors left accepting fails for as long as that lasts.
        let flags = EventFlags::IN | EventFlags::ET;
        Ok(epoll::add(&self.epoll, socket, data, flags)?)
    }

    pub(crate) fn add(&self, socket: impl AsFd, token: Token) -> io::Result<()> {
        let data = EventData::new_u64(token);
        Ok(epoll::add(&self.epoll, socket, data, edges())?)
    }

    /// The same for a socket that has been added; what is there already is told again.
    pub(crate) fn change(&self, socket: impl AsFd, token: Token) -> io::Result<()> {
        let data = EventData::new_u64(token);
        Ok(epoll::modify(&self.epoll, socket, data, edges())?)
    }

    pub(crate) fn wake(&self) {
        // Fails only if the counter is full, and then the wait ends as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(crate) fn wait(&self) -> io::Result<Vec<Ready>> {
        let mut events = [const {
            Event {
                flags: EventFlags::empty(),
                data: EventData::new_u64(0),
            }
        }; BATCH];
        let count = match epoll::wait(&self.epoll, &mut events, None) {
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let mut ready = Vec::with_capacity(count);
        for event in &events[..count] {
            let (token, flags) = (event.data.u64(), event.flags);
            if token == token::WAKE {
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
                closed: broken,
            });
        }
        Ok(ready)
    }
}
