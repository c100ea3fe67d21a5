//! The network device (section 5.1): one pair of queues, with the offloads on which throughput depends: checksums, large TCP segments in both
//! directions, received packets spread over several buffers.
//!
//! The driver's packets go to a [`NetBackend`] on the device's thread; the backend's come through [`InputPort`], a packet per offer,
//! and are written to the driver's buffers at once or refused until there are some.
//!
//! Limits: no control queue, so every packet of the network is received (the network has one card); one pair of queues; the
//! link never goes down.

use std::sync::{Arc, Mutex, MutexGuard, Weak};

use lodger_clock::InputPort;
use lodger_device_model::{Payload, RestoreError};
use lodger_net::{
    HEADER_LEN, NetBackend, NetError, Offloads, SwitchNet, SwitchSpec, TapNet, UserNet, UserNetSpec,
};
use lodger_virtio::{Activation, Chain, Queue, VirtioDevice, VirtioPci, Wiring, read_config};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

use crate::workers::Workers;

const KIND: &str = "virtio-net";
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// The longest packet: header, Ethernet header with a VLAN tag, and the longest IP packet.
const LONGEST: usize = HEADER_LEN + 18 + 65535;
/// Offset of the header's count of buffers.
const BUFFERS_AT: usize = 10;
/// Packets that are sent before the backend may do what it has put off.
const BATCH: usize = 64;

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Its address on the network.
    #[serde(default = "default_mac")]
    pub mac: [u8; 6],
    /// What it is connected to.
    pub network: NetworkSpec,
}

/// What a card is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkSpec {
    /// A network of its own, with a gateway to the host's sockets.
    User(UserNetSpec),
    /// A TAP interface of the host's.
    Tap {
        /// The interface.
        name: String,
    },
    /// A switch with the cards of other machines, which gives the card its address.
    Switch(SwitchSpec),
}

/// Locally administered, unicast.
fn default_mac() -> [u8; 6] {
    [0x52, 0x54, 0x00, 0x12, 0x34, 0x56]
}

impl NetSpec {
    /// A card with the default address on this network.
    pub fn new(network: NetworkSpec) -> NetSpec {
        NetSpec {
            mac: default_mac(),
            network,
        }
    }

    /// Makes the network and the card.
    pub fn build(&self, name: &str, wiring: &Wiring) -> Result<Arc<VirtioPci>, NetError> {
        let mut mac = self.mac;
        let backend: Arc<dyn NetBackend> = match &self.network {
            NetworkSpec::User(spec) => Arc::new(UserNet::start(spec)?),
            NetworkSpec::Tap { name } => Arc::new(TapNet::start(name)?),
            NetworkSpec::Switch(spec) => {
                let net = SwitchNet::start(spec)?;
                mac = net.mac();
                Arc::new(net)
            }
        };
        let net = Net::new(name, mac, backend)?;
        Ok(VirtioPci::new(name, net, wiring))
    }
}

/// See the module documentation. Its state is that of its queues, which the transport saves; connections through it do not survive.
pub struct Net {
    transmitter: Workers,
    receiver: Workers,
    shared: Arc<Shared>,
}

struct Shared {
    // Fixed configuration.
    mac: [u8; 6],
    // Runtime glue.
    backend: Arc<dyn NetBackend>,
    active: Mutex<Option<Active>>,
}

#[derive(Clone)]
struct Active {
    queues: Vec<Arc<Queue>>,
    /// A packet may take several buffers.
    mergeable: bool,
}

impl Net {
    /// A card with this address on the network of `backend`. An error says that the host cannot start its threads.
    pub fn new(
        name: &str,
        mac: [u8; 6],
        backend: Arc<dyn NetBackend>,
    ) -> std::io::Result<Arc<Net>> {
        let shared = Arc::new(Shared {
            mac,
            backend,
            active: Mutex::new(None),
        });
        let (sending, receiving) = (Arc::clone(&shared), Arc::clone(&shared));
        let net = Arc::new(Net {
            transmitter: Workers::start(name, 1, move |_, buffer| sending.transmit(buffer))?,
            receiver: Workers::start(name, 1, move |_, _| receiving.backend.room())?,
            shared,
        });
        let port: Weak<Shared> = Arc::downgrade(&net.shared);
        net.shared.backend.connect(port);
        Ok(net)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().expect("nothing panics under this lock")
    }

    /// Passes on what the driver has for the network.
    fn transmit(&self, buffer: &mut Vec<u8>) {
        let Some(active) = self.lock().clone() else {
            return;
        };
        buffer.resize(LONGEST, 0);
        let mut sent = 0;
        while let Some(chain) = active.queues[TRANSMIT].pop() {
            let len = chain.readable_len();
            let packet = (len <= LONGEST as u64).then(|| chain.read_at(0, buffer));
            // It is given back first, so that a reset need not wait for the network.
            chain.complete(0);
            if let Some(n) = packet {
                self.backend.send(&buffer[..n]);
            }
            sent += 1;
            if sent % BATCH == 0 {
                self.backend.flush();
            }
        }
        if sent > 0 {
            self.backend.flush();
        }
    }
}

impl InputPort for Shared {
    /// Takes one packet, or nothing if there are no buffers for it. One that no buffer could hold is lost.
    fn offer(&self, packet: &[u8]) -> usize {
        // Until the packet is there no other one takes buffers.
        let active = self.lock();
        let Some(Active { queues, mergeable }) = &*active else {
            return 0;
        };
        let queue = &queues[RECEIVE];
        let mut chains: Vec<(Chain, u32)> = Vec::new();
        let mut at = 0;
        while at < packet.len() {
            let Some(chain) = queue.pop() else {
                queue.put_back(chains.into_iter().map(|(chain, _)| chain));
                return 0;
            };
            let n = chain.write_at(0, &packet[at..]);
            at += n;
            chains.push((chain, n as u32));
            if at < packet.len() && !mergeable {
                queue.put_back(chains.into_iter().map(|(chain, _)| chain));
                return packet.len();
            }
        }
        let count = chains.len() as u16;
        if let Some((first, _)) = chains.first() {
            first.write_at(BUFFERS_AT as u64, &count.to_le_bytes());
        }
        queue.complete_all(chains);
        packet.len()
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn pci_class(&self) -> u32 {
        0x02_00_00 // network, Ethernet
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
        ]
        .iter()
        .fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.shared.mac);
        config[6..].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        read_config(&config, offset, data);
    }

    fn activate(&self, activation: Activation) {
        let has = |bit: u32| activation.features >> bit & 1 != 0;
        let offloads = Offloads {
            checksum: has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(VIRTIO_NET_F_GUEST_CSUM) && has(VIRTIO_NET_F_GUEST_TSO4),
        };
        *self.shared.lock() = Some(Active {
            queues: activation.queues,
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
        });
        self.shared.backend.start(offloads);
    }

    fn notify(&self, queue: u16) {
        match usize::from(queue) {
            RECEIVE => self.receiver.kick(),
            _ => self.transmitter.kick(),
        }
    }

    fn reset(&self) {
        *self.shared.lock() = None;
        self.shared.backend.stop();
    }

    fn save(&self) -> Payload {
        Payload::encode(KIND, 1, &())
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        payload.decode(KIND, 1)
    }
}
