//! A TAP interface of the host's: what the card sends arrives there, and what the host sends to it arrives at the card.
//!
//! The host's administrator makes the interface and decides by addresses, bridges and routes what is reached through it. The header
//! in front of the frames is the same on both sides, so packets pass as they are.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use lodger_clock::InputPort;
use lodger_host_sys::tap;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::user::NetError;
use crate::{HEADER_LEN, NetBackend, Offloads};

const _: () = assert!(HEADER_LEN == tap::HEADER_LEN);

/// The longest packet: header, Ethernet header with a VLAN tag, the longest IP packet.
const LONGEST: usize = HEADER_LEN + 18 + 65535;

/// See the module documentation.
pub struct TapNet {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    tap: OwnedFd,
    card: Mutex<Option<Weak<dyn InputPort>>>,
    /// The card takes packets.
    up: AtomicBool,
    ending: AtomicBool,
    /// Becomes readable when there is news for the thread.
    wake: OwnedFd,
}

impl TapNet {
    /// Attaches to the interface `name`.
    pub fn start(name: &str) -> Result<TapNet, NetError> {
        let tap = tap::open(name).map_err(|source| NetError::Tap {
            name: name.into(),
            source,
        })?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            tap,
            card: Mutex::new(None),
            up: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            wake: wake.map_err(io::Error::from)?,
        });
        let served = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("net".into());
        let thread = thread.spawn(move || served.serve())?;
        Ok(TapNet {
            shared,
            thread: Some(thread),
        })
    }
}

impl Shared {
    /// The thread that reads from the interface.
    fn serve(&self) {
        let mut buffer = vec![0; LONGEST];
        // Bytes of a packet in the buffer that the card had no room for.
        let mut left = 0;
        while !self.ending.load(Ordering::Acquire) {
            if left == 0 && self.up.load(Ordering::Acquire) {
                match rustix::io::read(&self.tap, &mut buffer[..]) {
                    Ok(n) => left = n,
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(error) => {
                        tracing::error!("the network is down: {error}");
                        return;
                    }
                }
            }
            if left > 0 && self.offer(&buffer[..left]) {
                left = 0;
                continue;
            }
            self.wait(left == 0 && self.up.load(Ordering::Acquire));
        }
    }

    /// Whether the card has taken the packet, or will never.
    fn offer(&self, packet: &[u8]) -> bool {
        if !self.up.load(Ordering::Acquire) {
            return true;
        }
        let card = self.card.lock().expect("nothing panics under this lock");
        match card.clone().and_then(|card| card.upgrade()) {
            Some(port) => {
                drop(card);
                port.offer(packet) > 0
            }
            None => true,
        }
    }

    /// Waits for news, and for packets if they are wanted.
    fn wait(&self, packets: bool) {
        let mut fds = [
            PollFd::new(&self.wake, PollFlags::IN),
            PollFd::new(&self.tap, PollFlags::IN),
        ];
        let fds = &mut fds[..1 + usize::from(packets)];
        // An error is a signal: whatever it is, the caller looks again.
        let _ = poll(fds, None);
        let mut count = [0; 8];
        // Nothing to read is as good.
        let _ = rustix::io::read(&self.wake, &mut count);
    }

    fn wake(&self) {
        // Fails only if the counter is full, and then the wait ends as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl NetBackend for TapNet {
    fn connect(&self, card: Weak<dyn InputPort>) {
        let place = self.shared.card.lock();
        *place.expect("nothing panics under this lock") = Some(card);
    }

    fn start(&self, offloads: Offloads) {
        let Offloads { checksum, tso4 } = offloads;
        if let Err(error) = tap::set_offloads(&self.shared.tap, checksum, tso4) {
            tracing::warn!("the TAP interface does without offloads: {error}");
        }
        self.shared.up.store(true, Ordering::Release);
        self.shared.wake();
    }

    fn stop(&self) {
        self.shared.up.store(false, Ordering::Release);
        self.shared.wake();
    }

    fn send(&self, packet: &[u8]) {
        // What the host does not take is lost, as on any network.
        let _ = rustix::io::write(&self.shared.tap, packet);
    }

    fn flush(&self) {}

    fn room(&self) {
        self.shared.wake();
    }
}

impl Drop for TapNet {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        self.shared.wake();
        // The card may go while a packet is being offered to it, and take the network with it.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the network's thread has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_cannot_be_had_is_named() {
        for name in ["", "a-name-that-is-too-long", "a\0b"] {
            let error = TapNet::start(name).err().expect("no such interface");
            let text = error.to_string();
            assert!(text.contains("ip tuntap add"), "{text}");
        }
    }
}
