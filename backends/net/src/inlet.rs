//! What comes to a card through a file: a thread reads packets and offers them to the card.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use lodger_clock::InputPort;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::{HEADER_LEN, Offloads};

/// The longest packet: header, Ethernet header with a VLAN tag, the longest IP packet.
const LONGEST: usize = HEADER_LEN + 18 + 65535;

/// What the card is to get of a packet.
pub(crate) enum Sorted {
    /// The packet as it is.
    AsItIs,
    /// These instead; none: nothing.
    Instead(Vec<Vec<u8>>),
}

/// Tells what to do with a packet that was read.
pub(crate) type Sort = fn(&[u8], Offloads) -> Sorted;

/// See the module documentation.
pub(crate) struct Inlet<F: AsFd + Send + Sync + 'static> {
    shared: Arc<Shared<F>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared<F> {
    /// Where packets are read, one at a time, without waiting.
    file: F,
    sort: Sort,
    card: Mutex<Option<Weak<dyn InputPort>>>,
    offloads: Mutex<Offloads>,
    /// The card takes packets.
    up: AtomicBool,
    ending: AtomicBool,
    /// Becomes readable when there is news for the thread.
    wake: OwnedFd,
}

impl<F: AsFd + Send + Sync + 'static> Inlet<F> {
    pub(crate) fn start(file: F, sort: Sort) -> io::Result<Inlet<F>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            file,
            sort,
            card: Mutex::new(None),
            offloads: Mutex::default(),
            up: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            wake: wake?,
        });
        let served = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("net".into());
        let thread = thread.spawn(move || served.serve())?;
        Ok(Inlet {
            shared,
            thread: Some(thread),
        })
    }

    pub(crate) fn file(&self) -> &F {
        &self.shared.file
    }

    pub(crate) fn connect(&self, card: Weak<dyn InputPort>) {
        let place = self.shared.card.lock();
        *place.expect("nothing panics under this lock") = Some(card);
    }

    pub(crate) fn up(&self, offloads: Offloads) {
        let place = self.shared.offloads.lock();
        *place.expect("nothing panics under this lock") = offloads;
        self.shared.up.store(true, Ordering::Release);
        self.wake();
    }

    pub(crate) fn down(&self) {
        self.shared.up.store(false, Ordering::Release);
        self.wake();
    }

    /// There is news: the card has room, for example.
    pub(crate) fn wake(&self) {
        // Fails only if the counter is full, and then the wait ends as well.
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
    }
}

impl<F: AsFd> Shared<F> {
    /// The thread that reads.
    fn serve(&self) {
        let mut buffer = vec![0; LONGEST];
        // Packets for which the card had no room: in the buffer, so many bytes, and others.
        let mut left = 0;
        let mut others = VecDeque::new();
        while !self.ending.load(Ordering::Acquire) {
            if left == 0 && others.is_empty() && self.up.load(Ordering::Acquire) {
                match rustix::io::read(&self.file, &mut buffer[..]) {
                    Ok(n) => {
                        let offloads = self.offloads.lock();
                        let offloads = *offloads.expect("nothing panics under this lock");
                        match (self.sort)(&buffer[..n], offloads) {
                            Sorted::AsItIs => left = n,
                            Sorted::Instead(packets) => others.extend(packets),
                        }
                    }
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
            if let Some(packet) = others.front()
                && self.offer(packet)
            {
                others.pop_front();
                continue;
            }
            let idle = left == 0 && others.is_empty();
            self.wait(idle && self.up.load(Ordering::Acquire));
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
            PollFd::new(&self.file, PollFlags::IN),
        ];
        let fds = &mut fds[..1 + usize::from(packets)];
        // An error is a signal: whatever it is, the caller looks again.
        let _ = poll(fds, None);
        let mut count = [0; 8];
        // Nothing to read is as good.
        let _ = rustix::io::read(&self.wake, &mut count);
    }
}

impl<F: AsFd + Send + Sync + 'static> Drop for Inlet<F> {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        self.wake();
        // The card may go while a packet is being offered to it, and take the network with it.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the network's thread has panicked");
        }
    }
}
