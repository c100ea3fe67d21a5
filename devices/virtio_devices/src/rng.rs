//! The entropy device (section 5.4): fills the driver's buffers with random bytes.
//!
//! The bytes come through the function that the machine gives, because entropy is host input like any other: it is recorded and
//! replayed there.

use std::sync::{Arc, Mutex, MutexGuard};

use lodger_clock::Entropy;
use lodger_device_model::{Payload, RestoreError};
use lodger_virtio::{Activation, Queue, VirtioDevice, VirtioPci, Wiring};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::workers::Workers;

const KIND: &str = "virtio-rng";
/// The most bytes that one buffer gets; the driver learns how many it got.
const MOST: u64 = 64 << 10;
/// Bytes that are asked of the host at a time.
const CHUNK: usize = 4 << 10;

/// A source of random numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngSpec {}

impl RngSpec {
    /// Makes the device. An error says that the host cannot start its thread.
    pub fn build(
        &self,
        name: &str,
        wiring: &Wiring,
        entropy: Entropy,
    ) -> std::io::Result<Arc<VirtioPci>> {
        Ok(VirtioPci::new(name, Rng::new(name, entropy)?, wiring))
    }
}

/// See the module documentation. It has no state of its own.
pub struct Rng {
    worker: Workers,
    active: Active,
}

/// The queue, while the device is active.
type Active = Arc<Mutex<Option<Arc<Queue>>>>;

impl Rng {
    /// A device that gives out what `entropy` fills in.
    pub fn new(name: &str, entropy: Entropy) -> std::io::Result<Arc<Rng>> {
        let active = Active::default();
        let served = Arc::clone(&active);
        let worker = Workers::start(name, 1, move |_, buffer| {
            let queue = lock(&served).clone();
            buffer.resize(CHUNK, 0);
            while let Some(chain) = queue.as_ref().and_then(Queue::pop) {
                let len = chain.writable_len().min(MOST);
                let mut at = 0;
                while at < len {
                    let bytes = &mut buffer[..(len - at).min(CHUNK as u64) as usize];
                    entropy(bytes);
                    chain.write_at(at, bytes);
                    at += bytes.len() as u64;
                }
                chain.complete(len as u32);
            }
        })?;
        Ok(Arc::new(Rng { worker, active }))
    }
}

fn lock(active: &Active) -> MutexGuard<'_, Option<Arc<Queue>>> {
    active.lock().expect("nothing panics under this lock")
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn pci_class(&self) -> u32 {
        0xff_00_00
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn config_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&self, mut activation: Activation) {
        *lock(&self.active) = activation.queues.pop();
    }

    fn notify(&self, _queue: u16) {
        self.worker.kick();
    }

    fn reset(&self) {
        *lock(&self.active) = None;
    }

    fn save(&self) -> Payload {
        Payload::encode(KIND, 1, &())
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        payload.decode(KIND, 1)
    }
}
