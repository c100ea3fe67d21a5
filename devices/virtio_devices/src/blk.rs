//! The block device (section 5.2): several queues, served by a few threads, so that several requests are under way at once.
//!
//! Where the bytes of the disk are those of a file they pass between it and RAM without a copy; otherwise they go through a
//! buffer of bounded size that each thread keeps. A small request that need not wait for the host's disk is answered by the vCPU's
//! thread that notifies of it: that takes less time than to wake another one. A write is durable after the next flush; if
//! the driver did not accept VIRTIO_BLK_F_FLUSH, or has switched the cache to write-through, every write is flushed.
//!
//! Limits: no geometry, no lifetime, no secure erase, no zoned storage.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use lodger_block::{BlockBackend, Format, OpenError, Overlay, SECTOR_SIZE};
use lodger_device_model::{Payload, RestoreError};
use lodger_virtio::{Activation, Chain, Queue, VirtioDevice, VirtioPci, Wait, Wiring, read_config};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::rate::{Limiter, Limits};
use crate::workers::{Kick, Workers};

const KIND: &str = "virtio-blk";
/// Requests of 1 MiB in pages of their own fit into a chain.
const QUEUE_SIZE: u16 = 512;
/// A guest uses as many as it has vCPUs.
const QUEUES: [u16; 4] = [QUEUE_SIZE; 4];
/// The most threads.
const MOST_WORKERS: u8 = 16;
/// The most requests that a notification answers at once, and the most bytes of each.
const MOST_AT_ONCE: usize = 32;
const MOST_BYTES_AT_ONCE: u64 = 64 << 10;
/// Data buffers of a request: the queue's descriptors without those of header and status.
const MOST_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes that a thread copies at a time.
const CHUNK: usize = 128 << 10;
/// Bytes that pass between a file and RAM at a time.
const DIRECT_CHUNK: u64 = 1 << 20;
/// Bytes of a request's header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of a range to discard or to zero: sector, sectors, flags.
const RANGE: usize = 16;
/// The most ranges of one request.
const MOST_RANGES: u32 = 16;
/// The most sectors of one range to discard: 1 GiB.
const MOST_DISCARD: u32 = 1 << 21;
/// The most sectors of one range to zero: 64 MiB, because the host may have to write them.
const MOST_ZEROES: u32 = 1 << 17;
/// Offset of the cache mode in the configuration structure.
const CONFIG_WRITEBACK: u64 = 32;

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkSpec {
    /// The image: a file or a block device. It is locked while the machine runs.
    pub path: PathBuf,
    /// Its format. Without it the first bytes tell, and a qcow2 image may not name other files.
    #[serde(default)]
    pub format: Option<Format>,
    /// The guest cannot write to it; other readers may share the image.
    #[serde(default)]
    pub read_only: bool,
    /// The disk begins with the contents of the image, which is only read, and is forgotten at the end of the machine.
    #[serde(default)]
    pub temporary: bool,
    /// The serial number that the guest sees, at most 20 bytes.
    #[serde(default)]
    pub serial: String,
    /// How many requests are executed at once, 1 to 16.
    #[serde(default = "default_workers")]
    pub workers: u8,
    /// How much the guest may do with it.
    #[serde(default)]
    pub limits: Limits,
}

fn default_workers() -> u8 {
    4
}

/// Why a disk could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The image cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The spec is out of range.
    #[error("disk {name}: {what}")]
    Spec {
        /// The device.
        name: String,
        /// What is wrong.
        what: &'static str,
    },
    /// The host cannot start the device's threads.
    #[error("disk {name}: cannot start its threads: {source}")]
    Threads {
        /// The device.
        name: String,
        /// The host's reason.
        source: std::io::Error,
    },
}

/// Where what a guest writes to temporary disks goes: to a disk, as `/tmp` need not be.
fn temporary_dir() -> PathBuf {
    std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

impl BlkSpec {
    /// The disk at `path` with the defaults.
    pub fn new(path: impl Into<PathBuf>, read_only: bool) -> BlkSpec {
        BlkSpec {
            path: path.into(),
            format: None,
            read_only,
            temporary: false,
            serial: String::new(),
            workers: default_workers(),
            limits: Limits::default(),
        }
    }

    /// Whether the image can be opened now.
    pub fn check(&self) -> Result<(), BlkError> {
        lodger_block::open(&self.path, self.read_only || self.temporary, self.format)?;
        Ok(())
    }

    /// Opens the image and makes the device.
    pub fn build(&self, name: &str, wiring: &Wiring) -> Result<Arc<VirtioPci>, BlkError> {
        let backend: Arc<dyn BlockBackend> = match self.temporary {
            false => lodger_block::open(&self.path, self.read_only, self.format)?,
            true => Arc::new(Overlay::open(&self.path, self.format, &temporary_dir())?),
        };
        let blk = Blk::new(name, backend, &self.serial, self.workers, self.limits)?;
        Ok(VirtioPci::new(name, blk, wiring))
    }
}

/// See the module documentation.
pub struct Blk {
    workers: Workers,
    disk: Arc<Disk>,
}

/// What the threads share.
struct Disk {
    // Fixed configuration.
    name: String,
    backend: Arc<dyn BlockBackend>,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    // Runtime glue.
    host_errors: AtomicU64,
    limiter: Option<Limiter>,
    active: Mutex<Option<Arc<Active>>>,
    /// What a notification could not answer at once.
    later: Mutex<VecDeque<(Arc<Active>, Chain)>>,
    /// The queue from which a thread takes next.
    turn: AtomicUsize,
    // Volatile state.
    /// The cache mode that the driver can choose: write-back, else write-through.
    writeback: AtomicBool,
}

struct Active {
    features: u64,
    queues: Vec<Arc<Queue>>,
}

/// How a request failed.
enum Failure {
    /// VIRTIO_BLK_S_IOERR: the request is wrong, or the host failed.
    Io,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

impl Blk {
    /// A disk with the contents of `backend`.
    pub fn new(
        name: &str,
        backend: Arc<dyn BlockBackend>,
        serial: &str,
        workers: u8,
        limits: Limits,
    ) -> Result<Arc<Blk>, BlkError> {
        let wrong = |what| BlkError::Spec {
            name: name.into(),
            what,
        };
        if !(1..=MOST_WORKERS).contains(&workers) {
            return Err(wrong("it can have 1 to 16 workers"));
        }
        if !limits.are_sensible() {
            return Err(wrong("a limit and its burst are more than 0"));
        }
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        match id.get_mut(..serial.len()) {
            Some(start) => start.copy_from_slice(serial.as_bytes()),
            None => return Err(wrong("its serial number is longer than 20 bytes")),
        }
        let disk = Arc::new(Disk {
            name: name.into(),
            backend,
            serial: id,
            host_errors: AtomicU64::new(0),
            limiter: Limiter::new(limits, Instant::now()),
            active: Mutex::new(None),
            later: Mutex::default(),
            turn: AtomicUsize::new(0),
            writeback: AtomicBool::new(true),
        });
        let served = Arc::clone(&disk);
        let job = move |kick: &Kick, buffer: &mut Vec<u8>| served.serve(kick, buffer);
        let workers = Workers::start(name, workers.into(), job);
        let workers = workers.map_err(|source| BlkError::Threads {
            name: name.into(),
            source,
        })?;
        Ok(Arc::new(Blk { workers, disk }))
    }
}

impl Disk {
    fn active(&self) -> MutexGuard<'_, Option<Arc<Active>>> {
        self.active.lock().expect("nothing panics under this lock")
    }

    fn later(&self) -> MutexGuard<'_, VecDeque<(Arc<Active>, Chain)>> {
        self.later.lock().expect("nothing panics under this lock")
    }

    /// Takes requests until there are none; wakes another thread as long as there are more.
    fn serve(&self, kick: &Kick, buffer: &mut Vec<u8>) {
        loop {
            // Before a request is taken, because whoever stops the queues waits for those that are.
            if let Some(then) = self.limiter.as_ref().and_then(|l| l.ready(Instant::now())) {
                match kick.sleep_until(then) {
                    true => continue,
                    false => return,
                }
            }
            let Some((active, chain)) = self.take() else {
                return;
            };
            if !self.later().is_empty() || active.queues.iter().any(|q| q.has_more()) {
                kick.kick();
            }
            if let Some((chain, written)) = self.answer(&active, chain, buffer) {
                chain.complete(written);
            }
        }
    }

    /// The next request, from each queue in turn.
    fn take(&self) -> Option<(Arc<Active>, Chain)> {
        if let Some(first) = self.later().pop_front() {
            return Some(first);
        }
        let active = self.active().clone()?;
        let count = active.queues.len();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let mut queues = (0..count).map(|n| &active.queues[turn.wrapping_add(n) % count]);
        let chain = queues.find_map(Queue::pop)?;
        Some((active, chain))
    }

    /// Executes a request; how many bytes have been written to its chain. None if it could not be answered.
    fn answer(&self, active: &Active, chain: Chain, buffer: &mut Vec<u8>) -> Option<(Chain, u32)> {
        let Some(status_at) = chain.writable_len().checked_sub(1) else {
            chain.reject("a request without a status byte");
            return None;
        };
        let status = match self.execute(active, &chain, status_at, buffer) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Io) => VIRTIO_BLK_S_IOERR,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
        };
        chain.write_at(status_at, &[status as u8]);
        let written = u32::try_from(status_at + 1).unwrap_or(u32::MAX);
        Some((chain, written))
    }

    /// Answers what need not wait for the host's disk. True: there are requests for the other threads.
    fn answer_at_once(&self, queue: u16) -> bool {
        if self.limiter.is_some() {
            return true;
        }
        let Some(active) = self.active().clone() else {
            return false;
        };
        let Some(queue) = active.queues.get(usize::from(queue)) else {
            return false;
        };
        let mut done = Vec::new();
        let mut rest = true;
        while done.len() < MOST_AT_ONCE {
            let Some(chain) = queue.pop() else {
                rest = false;
                break;
            };
            match self.execute_at_once(&active, &chain) {
                Some(written) => done.push((chain, written)),
                None => {
                    self.later().push_back((Arc::clone(&active), chain));
                    break;
                }
            }
        }
        queue.complete_all(done);
        rest
    }

    /// Executes a request if it is a small read or write that need not wait for the host's disk; how many bytes it has written to
    /// the chain.
    fn execute_at_once(&self, active: &Active, chain: &Chain) -> Option<u32> {
        let room = chain.writable_len().checked_sub(1)?;
        let (kind, sector) = header(chain)?;
        let given = chain.readable_len() - HEADER as u64;
        let (len, write) = match kind {
            VIRTIO_BLK_T_IN => (room, false),
            VIRTIO_BLK_T_OUT if self.is_writeback(active) => (given, true),
            _ => return None,
        };
        if !(1..=MOST_BYTES_AT_ONCE).contains(&len) {
            return None;
        }
        let start = self.range(sector, len).ok()?;
        let direct = self.backend.direct(start, len, write)?;
        let wait = match direct.in_memory {
            true => Wait::Allowed,
            false => Wait::Never,
        };
        let done = match write {
            false => chain.read_file(0, len as usize, direct.file, direct.offset, wait),
            true => chain.write_file(
                HEADER as u64,
                len as usize,
                direct.file,
                direct.offset,
                wait,
            ),
        };
        if done.ok()? as u64 != len {
            return None;
        }
        chain.write_at(room, &[VIRTIO_BLK_S_OK as u8]);
        u32::try_from(room + 1).ok()
    }

    /// Reads `room` bytes of the disk from byte `start` on.
    fn read(
        &self,
        chain: &Chain,
        start: u64,
        room: u64,
        buffer: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        each_direct(room, |at, len| {
            if let Some(direct) = self.backend.direct(start + at, len, false) {
                let mut done = 0;
                while done < len {
                    let (to, left) = (at + done, (len - done) as usize);
                    let from = direct.offset + done;
                    let n = chain.read_file(to, left, direct.file, from, Wait::Allowed);
                    let n = self.host(n)?;
                    if n == 0 {
                        // Somebody else has cut the file short.
                        self.host(Err::<(), _>(io::ErrorKind::UnexpectedEof.into()))?;
                    }
                    done += n as u64;
                }
                return Ok(());
            }
            each_chunk(len, buffer, |from, buffer| {
                self.host(self.backend.read_at(start + at + from, buffer))?;
                chain.write_at(at + from, buffer);
                Ok(())
            })
        })
    }

    /// Writes `given` bytes behind the header to byte `start` of the disk.
    fn write(
        &self,
        chain: &Chain,
        start: u64,
        given: u64,
        buffer: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        const BEHIND: u64 = HEADER as u64;
        each_direct(given, |at, len| {
            if let Some(direct) = self.backend.direct(start + at, len, true) {
                let mut done = 0;
                while done < len {
                    let (from, left) = (at + done, (len - done) as usize);
                    let to = direct.offset + done;
                    let n = chain.write_file(BEHIND + from, left, direct.file, to, Wait::Allowed);
                    match self.host(n)? {
                        0 => self.host(Err::<(), _>(io::ErrorKind::WriteZero.into()))?,
                        n => done += n as u64,
                    }
                }
                return Ok(());
            }
            each_chunk(len, buffer, |from, buffer| {
                chain.read_at(BEHIND + at + from, buffer);
                self.host(self.backend.write_at(start + at + from, buffer))
            })
        })
    }

    /// Executes the request of `chain`, whose first `room` writable bytes are for data.
    fn execute(
        &self,
        active: &Active,
        chain: &Chain,
        room: u64,
        buffer: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        let (kind, sector) = header(chain).ok_or(Failure::Io)?;
        let given = chain.readable_len() - HEADER as u64;
        if let Some(limiter) = &self.limiter {
            limiter.pay(match kind {
                VIRTIO_BLK_T_IN => room,
                VIRTIO_BLK_T_OUT => given,
                _ => 0,
            });
        }
        match kind {
            VIRTIO_BLK_T_IN => {
                let start = self.range(sector, room)?;
                self.read(chain, start, room, buffer)
            }
            VIRTIO_BLK_T_OUT => {
                let start = self.range(sector, given)?;
                self.write(chain, start, given, buffer)?;
                self.written(active)
            }
            VIRTIO_BLK_T_FLUSH => self.host(self.backend.flush()),
            VIRTIO_BLK_T_GET_ID => {
                chain.write_at(0, &self.serial[..self.serial.len().min(room as usize)]);
                Ok(())
            }
            VIRTIO_BLK_T_DISCARD if has(active.features, VIRTIO_BLK_F_DISCARD) => self.each_range(
                chain,
                given,
                MOST_DISCARD,
                |start, len, flags| match flags {
                    0 => self.host(self.backend.discard(start, len)),
                    _ => Err(Failure::Unsupported),
                },
            ),
            VIRTIO_BLK_T_WRITE_ZEROES if has(active.features, VIRTIO_BLK_F_WRITE_ZEROES) => {
                self.each_range(chain, given, MOST_ZEROES, |start, len, flags| {
                    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                        return Err(Failure::Unsupported);
                    }
                    self.host(self.backend.write_zeroes(start, len, flags != 0))
                })?;
                self.written(active)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// The byte at which `len` bytes from `sector` on start, if they are whole sectors of the disk.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let start = sector.checked_mul(SECTOR_SIZE).ok_or(Failure::Io)?;
        let end = start.checked_add(len).ok_or(Failure::Io)?;
        match len.is_multiple_of(SECTOR_SIZE) && end <= self.backend.size_bytes() {
            true => Ok(start),
            false => Err(Failure::Io),
        }
    }

    /// Calls `f(start, length, flags)` for the ranges in the `given` bytes behind the header, once all of them are known to be legal.
    fn each_range(
        &self,
        chain: &Chain,
        given: u64,
        most: u32,
        f: impl Fn(u64, u64, u32) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut ranges = [0; RANGE * MOST_RANGES as usize];
        let ranges = ranges.get_mut(..given as usize).ok_or(Failure::Io)?;
        if ranges.is_empty() || ranges.len() % RANGE != 0 {
            return Err(Failure::Io);
        }
        chain.read_at(HEADER as u64, ranges);
        let mut legal = Vec::new();
        for r in ranges.chunks(RANGE) {
            let (sector, sectors, flags) = (u64_at(r, 0), u32_at(r, 8), u32_at(r, 12));
            let len = u64::from(sectors) * SECTOR_SIZE;
            if sectors > most {
                return Err(Failure::Io);
            }
            legal.push((self.range(sector, len)?, len, flags));
        }
        let mut legal = legal.into_iter();
        legal.try_for_each(|(start, len, flags)| f(start, len, flags))
    }

    /// A write is complete: durable, if the cache is write-through.
    fn written(&self, active: &Active) -> Result<(), Failure> {
        match self.is_writeback(active) {
            true => Ok(()),
            false => self.host(self.backend.flush()),
        }
    }

    /// Whether a write may be complete before it is durable.
    fn is_writeback(&self, active: &Active) -> bool {
        match has(active.features, VIRTIO_BLK_F_CONFIG_WCE) {
            true => self.writeback.load(Ordering::Relaxed),
            false => has(active.features, VIRTIO_BLK_F_FLUSH),
        }
    }

    /// What the host says of an access. Its failures are logged ever more rarely.
    fn host<T>(&self, result: io::Result<T>) -> Result<T, Failure> {
        result.map_err(|e| {
            let count = self.host_errors.fetch_add(1, Ordering::Relaxed) + 1;
            if count.is_power_of_two() {
                tracing::warn!("{}: host error {count}: {e}", self.name);
            }
            Failure::Io
        })
    }

    /// The configuration structure (section 5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut c = [0; 60];
        let mut put = |at: usize, value: &[u8]| c[at..at + value.len()].copy_from_slice(value);
        let sectors = self.backend.size_bytes() / SECTOR_SIZE;
        put(0, &sectors.to_le_bytes());
        put(12, &MOST_SEGMENTS.to_le_bytes());
        put(20, &(SECTOR_SIZE as u32).to_le_bytes());
        // Topology: physical blocks of 2^3 sectors, the first one aligned, 8 sectors at least and 256 best.
        put(24, &[3, 0, 8, 0, 0, 1, 0, 0]);
        put(32, &[self.writeback.load(Ordering::Relaxed).into()]);
        put(34, &(QUEUES.len() as u16).to_le_bytes());
        put(36, &MOST_DISCARD.to_le_bytes());
        put(40, &MOST_RANGES.to_le_bytes());
        put(44, &8_u32.to_le_bytes());
        put(48, &MOST_ZEROES.to_le_bytes());
        put(52, &MOST_RANGES.to_le_bytes());
        put(56, &[1]);
        c
    }
}

fn has(features: u64, bit: u32) -> bool {
    features >> bit & 1 != 0
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut b = [0; 4];
    b.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(b)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// Type and sector of a request.
fn header(chain: &Chain) -> Option<(u32, u64)> {
    let mut header = [0; HEADER];
    let there = chain.read_at(0, &mut header) == HEADER;
    there.then(|| (u32_at(&header, 0), u64_at(&header, 8)))
}

/// Calls `f(offset, length)` for parts of `len` bytes.
fn each_direct(
    len: u64,
    mut f: impl FnMut(u64, u64) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut at = 0;
    while at < len {
        let n = (len - at).min(DIRECT_CHUNK);
        f(at, n)?;
        at += n;
    }
    Ok(())
}

/// Calls `f(offset, chunk)` for the chunks of `len` bytes; `buffer` is their place.
fn each_chunk(
    len: u64,
    buffer: &mut Vec<u8>,
    mut f: impl FnMut(u64, &mut [u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let most = len.min(CHUNK as u64) as usize;
    if buffer.len() < most {
        buffer.resize(most, 0);
    }
    let mut at = 0;
    while at < len {
        let n = (len - at).min(CHUNK as u64) as usize;
        f(at, &mut buffer[..n])?;
        at += n as u64;
    }
    Ok(())
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn pci_class(&self) -> u32 {
        0x01_00_00 // mass storage
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        bits.extend(match self.disk.backend.read_only() {
            true => &[VIRTIO_BLK_F_RO][..],
            false => &[
                VIRTIO_BLK_F_CONFIG_WCE,
                VIRTIO_BLK_F_DISCARD,
                VIRTIO_BLK_F_WRITE_ZEROES,
            ],
        });
        bits.iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.disk.config(), offset, data);
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        if let (CONFIG_WRITEBACK, &[value]) = (offset, data) {
            let active = self.disk.active();
            if (active.as_ref()).is_some_and(|a| has(a.features, VIRTIO_BLK_F_CONFIG_WCE)) {
                self.disk.writeback.store(value & 1 != 0, Ordering::Relaxed);
            }
        }
    }

    fn activate(&self, activation: Activation) {
        *self.disk.active() = Some(Arc::new(Active {
            features: activation.features,
            queues: activation.queues,
        }));
    }

    fn notify(&self, queue: u16) {
        if self.disk.answer_at_once(queue) {
            self.workers.kick();
        }
    }

    fn reset(&self) {
        *self.disk.active() = None;
        self.disk.writeback.store(true, Ordering::Relaxed);
    }

    fn save(&self) -> Payload {
        let Disk {
            name: _,
            backend: _,
            serial: _,
            host_errors: _,
            limiter: _,
            active: _, // the transport's
            later: _,
            turn: _,
            writeback,
        } = &*self.disk;
        let state = saved::V1 {
            writeback: writeback.load(Ordering::Relaxed),
        };
        Payload::encode(KIND, 1, &state)
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved::V1 { writeback } = payload.decode(KIND, 1)?;
        self.disk.writeback.store(writeback, Ordering::Relaxed);
        Ok(())
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub struct V1 {
        pub writeback: bool,
    }
}
