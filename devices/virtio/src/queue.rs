//! One virtqueue, as a device uses it from any thread. Section 2.7 (split virtqueues).
//!
//! The ring arithmetic is the `virtio-queue` crate's. That crate ends a chain silently where it is broken (a loop, an index or an
//! indirect table out of range), reads an indirect table one descriptor at a time, and knows nothing of
//! VIRTQ_AVAIL_F_NO_INTERRUPT; so chains are followed here, and one is handed out only if all of its buffers are RAM.

use std::fmt::{Arguments, Display};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use lodger_guest_memory::{GuestMemory, Inner, Wait};
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

/// The most descriptors in one chain, indirect ones included.
const LONGEST_CHAIN: usize = 1024;

/// The transport, as its queues see it.
pub(crate) trait Host: Send + Sync {
    /// Whether the device may access memory: it is a bus master and not broken.
    fn running(&self) -> bool;
    /// Queue `index` has used buffers, and the driver wants to know.
    fn used(&self, index: u16);
    /// The configuration structure has changed.
    fn config_changed(&self);
    /// The driver has broken queue `index`: the device needs a reset.
    fn broken(&self, index: u16, why: Arguments);
}

/// A virtqueue of an active device.
pub struct Queue {
    index: u16,
    memory: GuestMemory,
    host: Arc<dyn Host>,
    state: Mutex<State>,
    /// Signalled when the last chain that was held is given back.
    released: Condvar,
}

struct State {
    ring: virtio_queue::Queue,
    started: bool,
    /// Chains that have been taken and not been given back.
    held: usize,
}

/// Positions in the rings: what the device has taken, and what it has given back.
pub(crate) type Positions = (u16, u16);

impl Queue {
    /// A queue that stands still. `ring` must have been checked to lie in RAM, or be not ready.
    pub(crate) fn new(
        index: u16,
        ring: virtio_queue::Queue,
        memory: GuestMemory,
        host: Arc<dyn Host>,
    ) -> Arc<Queue> {
        Arc::new(Queue {
            index,
            memory,
            host,
            state: Mutex::new(State {
                ring,
                started: false,
                held: 0,
            }),
            released: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the ring code panicked")
    }

    /// Takes the next chain that the driver has made available. None if there is none, or the device must not use its
    /// queues now; a notification follows as soon as that changes.
    pub fn pop(self: &Arc<Self>) -> Option<Chain> {
        let mut state = self.lock();
        if !state.started || !state.ring.ready() || !self.host.running() {
            return None;
        }
        match next(&mut state.ring, &self.memory) {
            Ok(None) => None,
            Ok(Some(found)) => {
                state.held += 1;
                Some(Chain {
                    queue: Arc::clone(self),
                    head: found.head,
                    readable: found.readable,
                    writable: found.writable,
                })
            }
            Err(why) => {
                // Still under the lock: after `stop` nobody reports what happened before it.
                self.host.broken(self.index, format_args!("{why}"));
                None
            }
        }
    }

    /// Whether the driver has made more chains available than were taken.
    pub fn has_more(&self) -> bool {
        let state = self.lock();
        let index = state.ring.avail_idx(self.memory.inner(), Ordering::Acquire);
        state.started && state.ring.ready() && index.is_ok_and(|i| i.0 != state.ring.next_avail())
    }

    /// Lets the queue run.
    pub(crate) fn start(&self) {
        self.lock().started = true;
    }

    /// Hands out no more chains; returns when all of them have been given back.
    pub(crate) fn stop(&self) {
        let mut state = self.lock();
        state.started = false;
        while state.held > 0 {
            state = self.released.wait(state).expect("the ring code panicked");
        }
    }

    pub(crate) fn positions(&self) -> Positions {
        let state = self.lock();
        (state.ring.next_avail(), state.ring.next_used())
    }

    /// Gives several chains back at once: the driver sees all of them or none. The number of each says how many bytes have been
    /// written to it.
    pub fn complete_all(&self, chains: Vec<(Chain, u32)>) {
        let used: Vec<_> = chains
            .iter()
            .map(|(c, written)| (c.head, *written))
            .collect();
        self.give_back(&used);
    }

    /// Undoes the latest `pop`s: the chains that they gave will be taken again, in the same order. Nothing else may take chains
    /// from this queue meanwhile.
    pub fn put_back(&self, chains: impl IntoIterator<Item = Chain>) {
        for chain in chains {
            self.lock().ring.go_to_previous_position();
            drop(chain);
        }
    }

    fn give_back(&self, used: &[(u16, u32)]) {
        let mut state = self.lock();
        if used.is_empty() || !self.host.running() {
            return;
        }
        let told = add_used(&mut state.ring, self.memory.inner(), used);
        drop(state);
        match told {
            Ok(true) => self.host.used(self.index),
            Ok(false) => {}
            Err(e) => self.host.broken(self.index, format_args!("{e}")),
        }
    }
}

/// Puts chains (head, bytes written) into the used ring; whether the driver wants to be told.
fn add_used(
    ring: &mut virtio_queue::Queue,
    memory: &Inner,
    used: &[(u16, u32)],
) -> Result<bool, virtio_queue::Error> {
    let failed = virtio_queue::Error::GuestMemory;
    let (first, size) = (ring.next_used(), ring.size());
    for (index, &(head, written)) in used.iter().enumerate() {
        let slot = first.wrapping_add(index as u16) % size;
        let element = [u32::from(head).to_le_bytes(), written.to_le_bytes()].concat();
        let at = ring.used_ring() + 4 + u64::from(slot) * 8;
        memory
            .write_slice(&element, GuestAddress(at))
            .map_err(failed)?;
    }
    let next = first.wrapping_add(used.len() as u16);
    ring.set_next_used(next);
    let index = GuestAddress(ring.used_ring() + 2);
    (memory.store(next.to_le(), index, Ordering::Release)).map_err(failed)?;
    // What the driver wants is looked at after it can see the chains (section 2.7.10).
    fence(Ordering::SeqCst);
    if ring.event_idx_enabled() {
        let event = GuestAddress(ring.avail_ring() + 4 + u64::from(size) * 2);
        let event: u16 = memory.load(event, Ordering::Relaxed).map_err(failed)?;
        let since = next.wrapping_sub(u16::from_le(event)).wrapping_sub(1);
        return Ok(since < next.wrapping_sub(first));
    }
    let flags = GuestAddress(ring.avail_ring());
    let flags: u16 = memory.load(flags, Ordering::Relaxed).map_err(failed)?;
    Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
}

struct Found {
    head: u16,
    readable: Buffers,
    writable: Buffers,
}

/// The next chain of the available ring. If there is none, the driver is asked to notify of what it adds from now on; as long as
/// there are some, the device does not sleep and need not be told.
fn next(ring: &mut virtio_queue::Queue, memory: &GuestMemory) -> Result<Option<Found>, String> {
    let text = |e: virtio_queue::Error| e.to_string();
    let m = memory.inner();
    let mut taken = ring.iter(m).map_err(text)?.next();
    if taken.is_none() && ring.enable_notification(m).map_err(text)? {
        // It came while notifications were off.
        taken = ring.iter(m).map_err(text)?.next();
    }
    let Some(chain) = taken else {
        return Ok(None);
    };
    let (head, size) = (chain.head_index(), ring.size());
    if head >= size {
        return Err(format!("descriptor {head} of {size}"));
    }
    let table = Table {
        memory,
        address: ring.desc_table(),
        entries: size,
        copy: Vec::new(),
    };
    walk(table, head).map(Some)
}

/// A table of descriptors.
struct Table<'a> {
    memory: &'a GuestMemory,
    address: u64,
    entries: u16,
    /// Its beginning, as far as it was read at once.
    copy: Vec<u8>,
}

/// A descriptor (section 2.7.5).
struct Descriptor {
    address: u64,
    len: u32,
    flags: u32,
    next: u16,
}

/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;

impl Table<'_> {
    fn get(&self, index: u16) -> Option<Descriptor> {
        let at = usize::from(index) * DESCRIPTOR;
        let mut read = [0; DESCRIPTOR];
        let bytes = match self.copy.get(at..at + DESCRIPTOR) {
            Some(bytes) => bytes,
            None => {
                let address = self.address.checked_add(at as u64)?;
                self.memory.read(address, &mut read).ok()?;
                &read
            }
        };
        Some(Descriptor {
            address: u64::from_le_bytes(bytes[..8].try_into().ok()?),
            len: u32::from_le_bytes(bytes[8..12].try_into().ok()?),
            flags: u16::from_le_bytes([bytes[12], bytes[13]]).into(),
            next: u16::from_le_bytes([bytes[14], bytes[15]]),
        })
    }

    /// The table to which a descriptor of this one refers.
    fn indirect(&self, descriptor: &Descriptor) -> Option<Table<'_>> {
        let entries = descriptor.len as usize / DESCRIPTOR;
        if !(descriptor.len as usize).is_multiple_of(DESCRIPTOR) {
            return None;
        }
        let mut copy = vec![0; entries.min(LONGEST_CHAIN) * DESCRIPTOR];
        // Where a part of it is not RAM, the rest is read one by one.
        if self.memory.read(descriptor.address, &mut copy).is_err() {
            copy.clear();
        }
        Some(Table {
            memory: self.memory,
            address: descriptor.address,
            entries: u16::try_from(entries).ok()?,
            copy,
        })
    }
}

/// Follows a chain from descriptor `head` on, and into an indirect table, which ends it.
fn walk(table: Table, head: u16) -> Result<Found, String> {
    const NOWHERE: &str = "a chain that loops or leads nowhere";
    let mut found = Found {
        head,
        readable: Buffers::default(),
        writable: Buffers::default(),
    };
    let memory = table.memory;
    let ring = table;
    let mut indirect = None;
    let (mut index, mut left) = (head, ring.entries);
    for n in 0.. {
        let table = indirect.as_ref().unwrap_or(&ring);
        let d = (left > 0 && index < table.entries).then(|| table.get(index));
        let d = d.flatten().ok_or(NOWHERE)?;
        if d.flags & VRING_DESC_F_INDIRECT != 0 {
            if indirect.is_some() {
                return Err("an indirect table in an indirect table".into());
            }
            let entered = ring.indirect(&d).ok_or("an indirect table of no size")?;
            (index, left) = (0, entered.entries);
            indirect = Some(entered);
            continue;
        }
        if n > LONGEST_CHAIN {
            return Err(format!("a chain of more than {LONGEST_CHAIN} descriptors"));
        }
        if d.len > 0 && !memory.contains(d.address, d.len as usize) {
            let (address, len) = (d.address, d.len);
            return Err(format!("a buffer outside RAM: {address:#x}+{len:#x}"));
        }
        if d.flags & VRING_DESC_F_WRITE != 0 {
            found.writable.push(d.address, d.len);
        } else if found.writable.len == 0 {
            found.readable.push(d.address, d.len);
        } else {
            return Err("a readable buffer after a writable one".into());
        }
        if found.readable.len + found.writable.len > u64::from(u32::MAX) {
            return Err("a chain of more than 4 GiB".into());
        }
        if d.flags & VRING_DESC_F_NEXT == 0 {
            return Ok(found);
        }
        (index, left) = (d.next, left - 1);
    }
    Err(NOWHERE.into())
}

/// Buffers of one direction, all of them RAM; one after the other they are a range of bytes from 0.
#[derive(Debug, Default)]
struct Buffers {
    parts: Vec<(u64, u32)>,
    len: u64,
}

impl Buffers {
    fn push(&mut self, address: u64, len: u32) {
        if len > 0 {
            self.parts.push((address, len));
            self.len += u64::from(len);
        }
    }

    /// Calls `f(address, range of the caller's bytes)` for the parts of `offset..offset + len`; returns how many of the
    /// bytes exist.
    fn each(
        &self,
        offset: u64,
        len: usize,
        mut f: impl FnMut(u64, std::ops::Range<usize>),
    ) -> usize {
        let (mut skip, mut done) = (offset, 0);
        for &(address, part) in &self.parts {
            let part = u64::from(part);
            if done == len {
                break;
            }
            if skip >= part {
                skip -= part;
                continue;
            }
            let n = (part - skip).min((len - done) as u64) as usize;
            f(address + skip, done..done + n);
            done += n;
            skip = 0;
        }
        done
    }

    /// The pieces of `offset..offset + len`.
    fn parts(&self, offset: u64, len: usize) -> Vec<(u64, usize)> {
        let mut parts = Vec::new();
        self.each(offset, len, |address, range| {
            parts.push((address, range.len()))
        });
        parts
    }
}

/// A chain of buffers that the driver has made available: first bytes that the device reads, then bytes that it writes.
///
/// It must be completed; one that is just dropped is lost for the driver until it resets the device.
pub struct Chain {
    queue: Arc<Queue>,
    head: u16,
    readable: Buffers,
    writable: Buffers,
}

impl Chain {
    /// How many bytes the device may read.
    pub fn readable_len(&self) -> u64 {
        self.readable.len
    }

    /// How many bytes the device may write.
    pub fn writable_len(&self) -> u64 {
        self.writable.len
    }

    /// The writable buffers: guest-physical address and length of each, all of them RAM.
    pub fn writable_ranges(&self) -> &[(u64, u32)] {
        &self.writable.parts
    }

    /// Copies from the readable bytes at `offset`; returns how many there were.
    pub fn read_at(&self, offset: u64, data: &mut [u8]) -> usize {
        let memory = &self.queue.memory;
        self.readable.each(offset, data.len(), |address, range| {
            let read = memory.read(address, &mut data[range]);
            read.expect("RAM stays where it is");
        })
    }

    /// Copies into the writable bytes at `offset`; returns how many there was room for.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> usize {
        let memory = &self.queue.memory;
        self.writable.each(offset, data.len(), |address, range| {
            let written = memory.write(address, &data[range]);
            written.expect("RAM stays where it is");
        })
    }

    /// Reads from byte `from` of a file into the writable bytes `offset..offset + len`, without a copy in between; returns how many
    /// there were.
    pub fn read_file(
        &self,
        offset: u64,
        len: usize,
        file: BorrowedFd,
        from: u64,
        wait: Wait,
    ) -> io::Result<usize> {
        let parts = self.writable.parts(offset, len);
        self.queue.memory.read_file(file, from, &parts, wait)
    }

    /// Writes the readable bytes `offset..offset + len` to byte `to` of a file, likewise.
    pub fn write_file(
        &self,
        offset: u64,
        len: usize,
        file: BorrowedFd,
        to: u64,
        wait: Wait,
    ) -> io::Result<usize> {
        let parts = self.readable.parts(offset, len);
        self.queue.memory.write_file(file, to, &parts, wait)
    }

    /// Gives the chain back to the driver. `written` bytes have been written, from the first writable one on.
    pub fn complete(self, written: u32) {
        self.queue.give_back(&[(self.head, written)]);
    }

    /// The chain cannot be answered, because it lacks what every request must have: the device needs a reset.
    pub fn reject(self, why: impl Display) {
        self.queue
            .host
            .broken(self.queue.index, format_args!("{why}"));
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.held -= 1;
        if state.held == 0 {
            self.queue.released.notify_all();
        }
    }
}
