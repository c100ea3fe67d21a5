//! A card with a small system behind it: a `smoltcp` stack.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant as HostInstant};

use lodger_clock::InputPort;
use lodger_net::{HEADER_LEN, NetBackend, Offloads, PacketHeader, UserNet, UserNetSpec};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{
    Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken,
};
use smoltcp::socket::AnySocket;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};

pub const MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);
/// Nothing here takes longer unless it hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// Packets on their way to the system.
#[derive(Default)]
pub struct Inbox {
    packets: Mutex<VecDeque<Vec<u8>>>,
    arrived: Condvar,
    /// How many packets there is room for; 0: as many as come.
    pub room: AtomicUsize,
    refused: AtomicBool,
    /// The longest frame that has arrived.
    pub longest: AtomicUsize,
}

impl InputPort for Inbox {
    fn offer(&self, packet: &[u8]) -> usize {
        let mut packets = self.packets.lock().unwrap();
        let room = self.room.load(Ordering::Relaxed);
        if room > 0 && packets.len() >= room {
            self.refused.store(true, Ordering::Relaxed);
            return 0;
        }
        packets.push_back(packet.to_vec());
        self.longest.fetch_max(packet.len(), Ordering::Relaxed);
        self.arrived.notify_all();
        packet.len()
    }
}

/// The card's device for the system's stack.
pub struct Wire {
    pub net: UserNet,
    pub inbox: Arc<Inbox>,
    offloads: Offloads,
}

pub struct FromNet(Vec<u8>);
pub struct ToNet<'a>(&'a UserNet);

impl Device for Wire {
    type RxToken<'a> = FromNet;
    type TxToken<'a> = ToNet<'a>;

    fn receive(&mut self, _: Instant) -> Option<(FromNet, ToNet<'_>)> {
        let packet = self.inbox.packets.lock().unwrap().pop_front()?;
        let (header, frame) = PacketHeader::split(&packet).expect("a header");
        assert!(!header.needs_checksum || self.offloads.checksum);
        Some((FromNet(frame.to_vec()), ToNet(&self.net)))
    }

    fn transmit(&mut self, _: Instant) -> Option<ToNet<'_>> {
        Some(ToNet(&self.net))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        if self.offloads.checksum {
            let mut checksum = ChecksumCapabilities::ignored();
            checksum.ipv4 = Checksum::Both;
            capabilities.checksum = checksum;
        }
        capabilities
    }
}

impl RxToken for FromNet {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for ToNet<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; HEADER_LEN + len];
        let result = f(&mut packet[HEADER_LEN..]);
        self.0.send(&packet);
        result
    }
}

/// The system.
pub struct System {
    pub wire: Wire,
    pub stack: Interface,
    pub sockets: SocketSet<'static>,
    epoch: HostInstant,
}

pub const ALL: Offloads = Offloads {
    checksum: true,
    tso4: true,
};
pub const NONE: Offloads = Offloads {
    checksum: false,
    tso4: false,
};

impl System {
    /// A system with the address that DHCP would give it.
    pub fn start(spec: &UserNetSpec, offloads: Offloads) -> System {
        let mut system = System::without_address(spec, offloads);
        system.stack.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::new(Ipv4Addr::new(10, 0, 2, 15).into(), 24))
                .unwrap();
        });
        let routes = system.stack.routes_mut();
        routes
            .add_default_ipv4_route(Ipv4Addr::new(10, 0, 2, 2))
            .unwrap();
        system
    }

    pub fn without_address(spec: &UserNetSpec, offloads: Offloads) -> System {
        let net = UserNet::start(spec).unwrap();
        let inbox = Arc::new(Inbox::default());
        let card: Weak<Inbox> = Arc::downgrade(&inbox);
        net.connect(card);
        net.start(offloads);
        let mut wire = Wire {
            net,
            inbox,
            offloads,
        };
        let mut config = Config::new(HardwareAddress::Ethernet(MAC));
        config.random_seed = 4711;
        let ipv6 = spec.ipv6 == Some(true);
        config.slaac = ipv6;
        let mut stack = Interface::new(config, &mut wire, Instant::ZERO);
        if ipv6 {
            let own = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0xff, 0xfe00, 1);
            stack.update_ip_addrs(|addresses| {
                addresses.push(IpCidr::new(own.into(), 64)).unwrap();
            });
        }
        System {
            wire,
            stack,
            sockets: SocketSet::new(Vec::new()),
            epoch: HostInstant::now(),
        }
    }

    pub fn socket<T: AnySocket<'static>>(&mut self, handle: SocketHandle) -> &mut T {
        self.sockets.get_mut(handle)
    }

    /// Lets the system run for a moment.
    pub fn poll(&mut self) {
        let now = Instant::from_micros(self.epoch.elapsed().as_micros() as i64);
        self.stack.poll(now, &mut self.wire, &mut self.sockets);
        self.wire.net.flush();
        if self.wire.inbox.refused.swap(false, Ordering::Relaxed) {
            self.wire.net.room();
        }
        let packets = self.wire.inbox.packets.lock().unwrap();
        if packets.is_empty() {
            let wait = Duration::from_millis(1);
            drop(self.wire.inbox.arrived.wait_timeout(packets, wait).unwrap());
        }
    }

    /// Runs until `step` says that it is done.
    #[track_caller]
    pub fn run(&mut self, mut step: impl FnMut(&mut System) -> bool) {
        let start = HostInstant::now();
        while !step(self) {
            assert!(start.elapsed() < PATIENCE, "it hangs");
            self.poll();
        }
    }
}
