//! User-mode networking: one card, a gateway, a name server, and behind them whatever the host's sockets reach.
//!
//! No privileges are needed, because every connection of the card becomes one of this process. The addresses are in
//! [`addresses`]. The gateway's address, as a destination, is the host itself: its services on 127.0.0.1.
//!
//! | file | what |
//! |---|---|
//! | `stack.rs` | what a packet is, and who takes it |
//! | `tcp.rs`, `udp.rs`, `ping.rs` | connections, datagrams, ICMP echo |
//! | `dhcp.rs`, `neighbours.rs` | the card's addresses |
//! | `resolver.rs`, `names.rs` | the host's name servers; names of a switch's members |
//! | `link.rs`, `fragments.rs` | frames to the card; packets that it sends in parts |
//! | `poller.rs` | the wait for the host's sockets |
//!
//! Threads: one waits for the host's sockets; what the card sends is dealt with on the card's thread. A lock around everything
//! makes them take turns. What has no room in the card stays in the host's sockets (TCP) or is lost (the rest).
//!
//! Limits: no ICMP errors to the card; published ports lead to its IPv4 address; IPv6 has no echo beyond the gateway, no fragments and no
//! large segments to the card; whether there is IPv6 is found out at the start.

pub mod addresses;
mod dhcp;
mod forward;
mod fragments;
mod link;
pub(crate) mod names;
mod neighbours;
mod ping;
mod poller;
mod resolver;
mod stack;
mod tcp;
mod udp;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;

use lodger_clock::InputPort;
use rustix::net::{
    AddressFamily, SocketAddrAny, SocketFlags, SocketType, bind, getsockname, listen, socket_with,
    sockopt,
};
use serde::{Deserialize, Serialize};
use smoltcp::wire::EthernetAddress;

pub use forward::{Forward, ForwardError, Protocol};

use self::link::Link;
use self::names::Names;
use self::poller::Poller;
use self::resolver::Resolver;
use self::stack::Stack;
use crate::{NetBackend, Offloads};

/// Connections to a published port that wait to be taken.
const BACKLOG: i32 = 128;

/// A user-mode network.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserNetSpec {
    /// Ports of the host that lead to the card.
    #[serde(default)]
    pub publish: Vec<Forward>,
    /// The card reaches nobody: there are DHCP and published ports only.
    #[serde(default)]
    pub isolated: bool,
    /// Whether there is IPv6; if nothing is said, when the host reaches others by it.
    #[serde(default)]
    pub ipv6: Option<bool>,
    /// Name servers to ask instead of those in the host's /etc/resolv.conf.
    #[serde(default)]
    pub name_servers: Vec<SocketAddr>,
}

/// Why a network could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A port cannot be published.
    #[error("cannot publish port {forward}: {source}")]
    Publish {
        /// Which.
        forward: Forward,
        /// The host's reason.
        source: io::Error,
    },
    /// A TAP interface cannot be had.
    #[error(
        "cannot attach to the TAP interface {name}: {source}; root makes one for you by: ip tuntap add {name} mode tap user YOU"
    )]
    Tap {
        /// Its name.
        name: String,
        /// The host's reason.
        source: io::Error,
    },
    /// There is no place at a switch.
    #[error("cannot join the switch {}: {source}", directory.display())]
    Switch {
        /// Its directory.
        directory: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The host lacks something else.
    #[error("cannot make a network: {0}")]
    Host(#[from] io::Error),
}

/// See the module documentation.
pub struct UserNet {
    shared: Arc<Shared>,
    published: Vec<SocketAddr>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    stack: Mutex<Stack>,
    poller: Arc<Poller>,
    ending: AtomicBool,
}

impl UserNet {
    /// Makes the network and opens the published ports.
    pub fn start(spec: &UserNetSpec) -> Result<UserNet, NetError> {
        UserNet::join(spec, addresses::GUEST, None)
    }

    /// The same for one of several cards, which has address `guest` and knows others by `names`.
    pub(crate) fn join(
        spec: &UserNetSpec,
        guest: Ipv4Addr,
        names: Option<Names>,
    ) -> Result<UserNet, NetError> {
        let poller = Arc::new(Poller::new()?);
        let resolver = match &spec.name_servers[..] {
            [] => Resolver::of_file("/etc/resolv.conf".into()),
            servers => Resolver::of(servers.to_vec()),
        };
        let ipv6 = spec.ipv6.unwrap_or_else(neighbours::host_has_ipv6);
        // Until the card sends something.
        let card = EthernetAddress::BROADCAST;
        let link = Link::new(card, guest);
        let mut stack = Stack::new(Arc::clone(&poller), link, resolver, spec.isolated, ipv6);
        stack.names = names;
        let mut published = Vec::new();
        for forward in &spec.publish {
            let address = publish(&mut stack, forward).map_err(|source| NetError::Publish {
                forward: forward.clone(),
                source,
            })?;
            published.push(address);
        }
        let shared = Arc::new(Shared {
            stack: Mutex::new(stack),
            poller,
            ending: AtomicBool::new(false),
        });
        let served = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("net".into());
        let thread = thread.spawn(move || served.serve())?;
        Ok(UserNet {
            shared,
            published,
            thread: Some(thread),
        })
    }

    /// Where the host listens for the published ports, in the spec's order.
    pub fn published(&self) -> &[SocketAddr] {
        &self.published
    }
}

/// Opens a published port; returns where.
fn publish(stack: &mut Stack, forward: &Forward) -> io::Result<SocketAddr> {
    let family = match forward.host {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let kind = match forward.protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = socket_with(family, kind, flags, None)?;
    if forward.host.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if forward.protocol == Protocol::Tcp {
        // Connections of an earlier run may still be in TIME-WAIT.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &forward.host)?;
    let address: SocketAddrAny = getsockname(&socket)?;
    let address = SocketAddr::try_from(address)?;
    match forward.protocol {
        Protocol::Tcp => {
            listen(&socket, BACKLOG)?;
            stack.publish_tcp(socket, forward.port)?;
        }
        Protocol::Udp => stack.publish_udp(socket, forward.port)?,
    }
    Ok(address)
}

impl Shared {
    fn stack(&self) -> MutexGuard<'_, Stack> {
        self.stack.lock().expect("nothing panics under this lock")
    }

    /// The thread that waits for the host's sockets.
    fn serve(&self) {
        let mut ready = Vec::new();
        while !self.ending.load(Ordering::Acquire) {
            let wait = self.stack().tick();
            if let Err(error) = self.poller.wait(wait, &mut ready) {
                tracing::error!("the network is down: {error}");
                return;
            }
            let mut stack = self.stack();
            ready.drain(..).for_each(|event| stack.ready(event));
        }
    }
}

impl NetBackend for UserNet {
    fn connect(&self, card: Weak<dyn InputPort>) {
        self.shared.stack().link.connect(card);
    }

    fn start(&self, offloads: Offloads) {
        self.shared.stack().link.start(offloads);
    }

    fn stop(&self) {
        self.shared.stack().stop();
    }

    fn send(&self, packet: &[u8]) {
        self.shared.stack().packet(packet);
    }

    fn flush(&self) {
        self.shared.stack().flush();
    }

    fn room(&self) {
        self.shared.stack().room();
    }
}

impl Drop for UserNet {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        self.shared.poller.wake();
        // The card may go while a packet is being offered to it, and take the network with it.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the network's thread has panicked");
        }
    }
}
