//! The memory balloon (section 5.5): the guest gives pages back to the host, because it is asked for some (inflate), or because they
//! are free anyway (free page reporting). What it gives back costs the host nothing until the guest touches it again.
//!
//! The driver numbers the queues as Linux and other monitors do: those of features that were not agreed on are left out.
//!
//! Limits: no hints for migration, no poison value; pages are of 4 KiB (an inflated page that belongs to a larger one of the host's
//! is given back as soon as all of that is).

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use lodger_device_model::{GuestMistakes, Payload, RestoreError};
use lodger_guest_memory::GuestMemory;
use lodger_virtio::{
    Activation, Chain, ConfigChange, Queue, VirtioDevice, VirtioPci, Wiring, read_config,
};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use crate::workers::Workers;

const KIND: &str = "virtio-balloon";
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;
const QUEUES: [u16; 4] = [128; 4];
const INFLATE: usize = 0;
const STATS: usize = 2;
/// Bytes of a page, whatever the guest's are.
const PAGE: u64 = 4096;
/// The most page numbers that are taken of a buffer. Linux sends 256.
const MOST_PAGES: usize = 1 << 14;
/// The most bytes of statistics, and of each of them.
const MOST_STATS: usize = 1000;
const STAT: usize = 10;
/// Offset of the pages that the driver has given up, in the configuration structure.
const CONFIG_ACTUAL: u64 = 4;

/// The balloon of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonSpec {
    /// Bytes of RAM that the guest is to have at its start, if that is not all.
    #[serde(default)]
    pub start: Option<u64>,
}

impl BalloonSpec {
    /// Makes the device, and what adjusts it. An error says that the host cannot start its thread.
    pub fn build(&self, name: &str, wiring: &Wiring) -> io::Result<(Arc<VirtioPci>, Arc<Balloon>)> {
        let balloon = Balloon::new(name, wiring.memory.clone(), self.start)?;
        let device = VirtioPci::new(name, balloon.clone(), wiring);
        Ok((device, balloon))
    }
}

/// See the module documentation.
pub struct Balloon {
    worker: Workers,
    shared: Arc<Shared>,
}

struct Shared {
    // Fixed configuration.
    name: String,
    memory: GuestMemory,
    /// Pages to be in the balloon at the start.
    start: u32,
    // Runtime glue.
    active: Mutex<Option<Active>>,
    mistakes: GuestMistakes,
    /// What the guest has told last, and how often it has.
    told: Mutex<(u64, GuestStats)>,
    news: Condvar,
    /// Bytes that it has reported as free.
    reported: AtomicU64,
    // Volatile state.
    /// Pages that are to be in the balloon.
    asked: AtomicU32,
    /// Pages that are.
    actual: AtomicU32,
}

struct Active {
    inflate: Arc<Queue>,
    deflate: Arc<Queue>,
    stats: Option<Arc<Queue>>,
    reporting: Option<Arc<Queue>>,
    config_change: ConfigChange,
}

/// What a guest tells of its memory, in bytes; only what it knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuestStats {
    /// All that it has.
    pub total: Option<u64>,
    /// What is not used.
    pub free: Option<u64>,
    /// What programs can have without swapping.
    pub available: Option<u64>,
    /// What is in its caches of files.
    pub caches: Option<u64>,
}

/// How a balloon is, in bytes of RAM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BalloonStatus {
    /// What the guest was asked to do with.
    pub asked: u64,
    /// What it does with.
    pub actual: u64,
    /// What it has reported as free, in all.
    pub reported: u64,
    /// Its own figures, if it tells any.
    pub guest: Option<GuestStats>,
}

/// The guest has no driver for the balloon, or not yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest has no driver for the memory balloon (virtio_balloon), or has not loaded it yet; its memory cannot be changed while it runs"
)]
pub struct NoDriver;

impl Balloon {
    /// A balloon of a machine with this RAM, of which the guest is to have `start` bytes at first.
    pub fn new(name: &str, memory: GuestMemory, start: Option<u64>) -> io::Result<Arc<Balloon>> {
        let start = pages_without(&memory, start.unwrap_or(u64::MAX));
        let shared = Arc::new(Shared {
            name: name.into(),
            memory,
            start,
            active: Mutex::new(None),
            mistakes: GuestMistakes::default(),
            told: Mutex::default(),
            news: Condvar::new(),
            reported: AtomicU64::new(0),
            asked: AtomicU32::new(start),
            actual: AtomicU32::new(0),
        });
        let served = Arc::clone(&shared);
        let worker = Workers::start(name, 1, move |_, buffer| served.serve(buffer))?;
        Ok(Arc::new(Balloon { worker, shared }))
    }

    /// Asks the guest to do with so many bytes of RAM; it takes its time.
    pub fn ask(&self, bytes: u64) -> Result<(), NoDriver> {
        let shared = &self.shared;
        let change = match &*shared.active() {
            Some(active) => active.config_change.clone(),
            None => return Err(NoDriver),
        };
        let pages = pages_without(&shared.memory, bytes);
        shared.asked.store(pages, Ordering::Relaxed);
        change.notify();
        Ok(())
    }

    /// How it is. The guest is asked for its figures, and has so much time to tell.
    pub fn status(&self, patience: Duration) -> BalloonStatus {
        let shared = &self.shared;
        let guest = shared.fresh_stats(patience);
        let size = shared.memory.size();
        let bytes =
            |pages: &AtomicU32| size - size.min(u64::from(pages.load(Ordering::Relaxed)) * PAGE);
        BalloonStatus {
            asked: bytes(&shared.asked),
            actual: bytes(&shared.actual),
            reported: shared.reported.load(Ordering::Relaxed),
            guest,
        }
    }
}

/// The pages that a balloon holds when the guest has `bytes`.
fn pages_without(memory: &GuestMemory, bytes: u64) -> u32 {
    let pages = memory.size().saturating_sub(bytes) / PAGE;
    u32::try_from(pages).unwrap_or(u32::MAX)
}

impl Shared {
    fn active(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().expect("nothing panics under this lock")
    }

    fn told(&self) -> MutexGuard<'_, (u64, GuestStats)> {
        self.told.lock().expect("nothing panics under this lock")
    }

    /// Does what the driver has put into the queues.
    fn serve(&self, buffer: &mut Vec<u8>) {
        let (inflate, deflate, stats, reporting) = match &*self.active() {
            Some(a) => (
                Arc::clone(&a.inflate),
                Arc::clone(&a.deflate),
                a.stats.clone(),
                a.reporting.clone(),
            ),
            None => return,
        };
        while let Some(chain) = inflate.pop() {
            self.inflate(&chain, buffer);
            chain.complete(0);
        }
        // A page that is used again is there as soon as it is touched.
        while let Some(chain) = deflate.pop() {
            chain.complete(0);
        }
        while let Some(chain) = reporting.as_ref().and_then(Queue::pop) {
            for &(address, len) in chain.writable_ranges() {
                self.reported.fetch_add(len.into(), Ordering::Relaxed);
                self.discard(address, len.into());
            }
            chain.complete(0);
        }
        // Under the lock, because nobody else may take a chain until it is put back.
        let mut told = self.told();
        if let Some(queue) = stats
            && let Some(chain) = queue.pop()
        {
            let mut bytes = [0; MOST_STATS];
            let len = chain.read_at(0, &mut bytes);
            // The driver gets it back when it is to tell more.
            queue.put_back([chain]);
            *told = (told.0 + 1, GuestStats::parse(&bytes[..len]));
            self.news.notify_all();
        }
    }

    /// The pages of these numbers are given up.
    fn inflate(&self, chain: &Chain, buffer: &mut Vec<u8>) {
        let len = chain.readable_len().min(4 * MOST_PAGES as u64) as usize;
        buffer.resize(len, 0);
        chain.read_at(0, buffer);
        let numbers = buffer.chunks_exact(4);
        let mut pages: Vec<u64> = numbers
            .map(|n| u64::from(u32::from_le_bytes([n[0], n[1], n[2], n[3]])))
            .collect();
        pages.sort_unstable();
        pages.dedup();
        for run in pages.chunk_by(|a, b| a + 1 == *b) {
            let (address, len) = (run[0] * PAGE, run.len() as u64 * PAGE);
            let given = self.discard(address, len);
            if given != Some(len) {
                let what = format_args!("it gives up {address:#x}+{len:#x}, which is not RAM");
                self.mistakes.note(&self.name, what);
            }
        }
    }

    /// How much was given back. None: the host failed, which costs memory and nothing else.
    fn discard(&self, address: u64, len: u64) -> Option<u64> {
        let given = self.memory.discard(address, len);
        if let Err(error) = &given {
            tracing::warn!("{}: cannot give memory back: {error}", self.name);
        }
        given.ok()
    }

    /// Asks the guest for its figures.
    fn fresh_stats(&self, patience: Duration) -> Option<GuestStats> {
        let queue = match &*self.active() {
            Some(active) => active.stats.clone()?,
            None => return None,
        };
        let deadline = Instant::now() + patience;
        let mut told = self.told();
        let before = told.0;
        // Without one the driver is about to tell.
        if let Some(chain) = queue.pop() {
            chain.complete(0);
        }
        while told.0 == before {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let woken = self.news.wait_timeout(told, left);
            told = woken.expect("nothing panics under this lock").0;
        }
        (told.0 > 0).then_some(told.1)
    }
}

impl GuestStats {
    fn parse(bytes: &[u8]) -> GuestStats {
        let mut stats = GuestStats::default();
        for stat in bytes.chunks_exact(STAT) {
            let mut value = [0; 8];
            value.copy_from_slice(&stat[2..]);
            let value = Some(u64::from_le_bytes(value));
            match u16::from_le_bytes([stat[0], stat[1]]) {
                4 => stats.free = value,
                5 => stats.total = value,
                6 => stats.available = value,
                7 => stats.caches = value,
                _ => {}
            }
        }
        stats
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_BALLOON as u16
    }

    fn pci_class(&self) -> u32 {
        0x00_ff_00 // none of the classes
    }

    fn features(&self) -> u64 {
        F_STATS_VQ | F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        let pages = |pages: &AtomicU32| pages.load(Ordering::Relaxed).to_le_bytes();
        config[..4].copy_from_slice(&pages(&self.shared.asked));
        config[4..8].copy_from_slice(&pages(&self.shared.actual));
        read_config(&config, offset, data);
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        if let (CONFIG_ACTUAL, &[a, b, c, d]) = (offset, data) {
            let pages = u32::from_le_bytes([a, b, c, d]);
            self.shared.actual.store(pages, Ordering::Relaxed);
        }
    }

    fn activate(&self, activation: Activation) {
        let has = |bit: u64| activation.features & bit != 0;
        let mut others = activation.queues.iter().skip(STATS).cloned();
        *self.shared.active() = Some(Active {
            inflate: Arc::clone(&activation.queues[INFLATE]),
            deflate: Arc::clone(&activation.queues[INFLATE + 1]),
            stats: has(F_STATS_VQ).then(|| others.next()).flatten(),
            reporting: has(F_REPORTING).then(|| others.next()).flatten(),
            config_change: activation.config_change,
        });
    }

    fn notify(&self, _queue: u16) {
        self.worker.kick();
    }

    fn reset(&self) {
        let s = &self.shared;
        *s.active() = None;
        *s.told() = Default::default();
        s.reported.store(0, Ordering::Relaxed);
        s.asked.store(s.start, Ordering::Relaxed);
        s.actual.store(0, Ordering::Relaxed);
    }

    fn save(&self) -> Payload {
        let Shared {
            name: _,
            memory: _,
            start: _,
            active: _,   // the transport's
            mistakes: _, // told
            told: _,     // the guest tells again
            news: _,
            reported: _, // what this host was given
            asked,
            actual,
        } = &*self.shared;
        let state = saved::V1 {
            asked: asked.load(Ordering::Relaxed),
            actual: actual.load(Ordering::Relaxed),
        };
        Payload::encode(KIND, 1, &state)
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved::V1 { asked, actual } = payload.decode(KIND, 1)?;
        self.shared.asked.store(asked, Ordering::Relaxed);
        self.shared.actual.store(actual, Ordering::Relaxed);
        Ok(())
    }
}

mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub struct V1 {
        pub asked: u32,
        pub actual: u32,
    }
}
