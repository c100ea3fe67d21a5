//! The file system device (section 5.11): a queue for what goes before everything else, and one for requests, which a few
//! threads answer by means of `backends/share`.
//!
//! Limits: one request queue, no notification queue, no DAX window.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use lodger_device_model::{Payload, RestoreError};
use lodger_share::{Message, Options, Share, ShareError};
use lodger_virtio::{Activation, Chain, Queue, VirtioDevice, VirtioPci, Wait, Wiring, read_config};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use crate::workers::{Kick, Workers};

const KIND: &str = "virtio-fs";
/// hiprio (FORGET), then the requests: one of 1 MiB in pages of their own fits into a chain.
const QUEUES: [u16; 2] = [128, 512];
/// Threads that answer.
const WORKERS: usize = 4;
/// Bytes of a tag in the configuration structure.
const TAG: usize = 36;

/// A shared folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsSpec {
    /// The folder of the host.
    pub folder: PathBuf,
    /// The name by which the guest mounts it, at most 36 bytes.
    pub tag: String,
    /// The guest can change nothing in it.
    #[serde(default)]
    pub read_only: bool,
    /// The guest's user and group to whom belongs what belongs to the user who runs the machine.
    #[serde(default)]
    pub owner: (u32, u32),
}

/// Why a shared folder could not be built.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The folder cannot be shared.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The tag is empty or too long.
    #[error("the tag of a shared folder has 1 to 36 bytes: '{0}'")]
    Tag(String),
    /// The host cannot start the device's threads.
    #[error("shared folder {tag}: cannot start its threads: {source}")]
    Threads {
        /// The folder's tag.
        tag: String,
        /// The host's reason.
        source: io::Error,
    },
}

impl FsSpec {
    /// Whether the folder can be shared now.
    pub fn check(&self) -> Result<(), FsError> {
        if !(1..=TAG).contains(&self.tag.len()) {
            return Err(FsError::Tag(self.tag.clone()));
        }
        Ok(lodger_share::check(&self.folder)?)
    }

    /// Opens the folder and makes the device, which takes at most so many of the host's file descriptors.
    pub fn build(
        &self,
        name: &str,
        wiring: &Wiring,
        files: usize,
    ) -> Result<Arc<VirtioPci>, FsError> {
        self.check()?;
        let share = Share::open(Options {
            folder: self.folder.clone(),
            read_only: self.read_only,
            owner: self.owner,
            files,
        })?;
        let fs = Fs::new(name, &self.tag, share)?;
        Ok(VirtioPci::new(name, fs, wiring))
    }
}

/// See the module documentation.
pub struct Fs {
    workers: Workers,
    shared: Arc<Shared>,
}

struct Shared {
    // Fixed configuration.
    tag: [u8; TAG],
    share: Share,
    // Runtime glue.
    active: Mutex<Option<Arc<[Arc<Queue>]>>>,
}

impl Fs {
    /// A device for a folder, under a tag of at most 36 bytes.
    pub fn new(name: &str, tag: &str, share: Share) -> Result<Arc<Fs>, FsError> {
        let mut bytes = [0; TAG];
        let place = bytes.get_mut(..tag.len());
        let place = place.ok_or_else(|| FsError::Tag(tag.into()))?;
        place.copy_from_slice(tag.as_bytes());
        let shared = Arc::new(Shared {
            tag: bytes,
            share,
            active: Mutex::new(None),
        });
        let served = Arc::clone(&shared);
        let job = move |kick: &Kick, buffer: &mut Vec<u8>| served.serve(kick, buffer);
        let workers = Workers::start(name, WORKERS, job).map_err(|source| FsError::Threads {
            tag: tag.into(),
            source,
        })?;
        Ok(Arc::new(Fs { workers, shared }))
    }
}

impl Shared {
    fn active(&self) -> MutexGuard<'_, Option<Arc<[Arc<Queue>]>>> {
        self.active.lock().expect("nothing panics under this lock")
    }

    /// Answers requests until there are none; wakes another thread as long as there are more.
    fn serve(&self, kick: &Kick, buffer: &mut Vec<u8>) {
        let Some(queues) = self.active().clone() else {
            return;
        };
        while let Some(chain) = queues.iter().find_map(Queue::pop) {
            if queues.iter().any(|q| q.has_more()) {
                kick.kick();
            }
            match self.share.answer(&Request(&chain), buffer) {
                Ok(written) => chain.complete(written),
                Err(why) => chain.reject(why),
            }
        }
    }
}

/// A chain as the share sees it.
struct Request<'a>(&'a Chain);

impl Message for Request<'_> {
    fn given(&self) -> u64 {
        self.0.readable_len()
    }

    fn room(&self) -> u64 {
        self.0.writable_len()
    }

    fn take(&self, offset: u64, bytes: &mut [u8]) -> usize {
        self.0.read_at(offset, bytes)
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> usize {
        self.0.write_at(offset, bytes)
    }

    fn read_file(&self, offset: u64, len: usize, file: BorrowedFd, from: u64) -> io::Result<usize> {
        self.0.read_file(offset, len, file, from, Wait::Allowed)
    }

    fn write_file(&self, offset: u64, len: usize, file: BorrowedFd, to: u64) -> io::Result<usize> {
        self.0.write_file(offset, len, file, to, Wait::Allowed)
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_FS as u16
    }

    fn pci_class(&self) -> u32 {
        0x01_80_00 // mass storage, other
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG + 4];
        config[..TAG].copy_from_slice(&self.shared.tag);
        config[TAG..].copy_from_slice(&1_u32.to_le_bytes());
        read_config(&config, offset, data);
    }

    fn activate(&self, activation: Activation) {
        *self.shared.active() = Some(activation.queues.into());
    }

    fn notify(&self, _queue: u16) {
        self.workers.kick();
    }

    fn reset(&self) {
        *self.shared.active() = None;
        self.shared.share.reset();
    }

    fn save(&self) -> Payload {
        Payload::encode(KIND, 1, &())
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        payload.decode(KIND, 1)
    }
}
