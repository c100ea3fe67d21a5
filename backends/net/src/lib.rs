//! Networks on the host: what stands behind a network card, without a word about guests.
//!
//! A [`NetBackend`] takes Ethernet frames from a card and gives it others. A frame travels with a [`PacketHeader`] in front, by
//! which either side leaves checksums and the cutting of large TCP segments to the other: that is where the speed is.
//!
//! [`UserNet`] is a network of one card with a gateway to the host's sockets; it needs no privileges. [`TapNet`] is an interface of the
//! host's, which somebody with privileges has made. [`SwitchNet`] connects the cards of several processes.
//!
//! Threads: `send`, `flush` and `room` are called on the card's threads, one at a time or several; the backend offers frames to
//! the card on any thread, also inside of these calls. The card must not hold a lock then that it takes when a frame is
//! offered.

mod cut;
mod header;
mod inlet;
mod switch;
mod tap;
mod user;

use std::sync::Weak;

use lodger_clock::InputPort;

pub use header::{Gso, HEADER_LEN, PacketHeader};
pub use switch::{SwitchNet, SwitchSpec};
pub use tap::TapNet;
pub use user::{Forward, ForwardError, NetError, Protocol, UserNet, UserNetSpec, addresses};

/// What a card leaves to, or takes over from, the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// It takes TCP and UDP packets whose checksum is only begun (over the pseudo-header).
    pub checksum: bool,
    /// It takes TCP segments over IPv4 that are longer than its MTU. Needs `checksum`.
    pub tso4: bool,
}

/// The network behind a card.
///
/// Packets are a [`PacketHeader`] and an Ethernet frame without its checksum, in one slice.
pub trait NetBackend: Send + Sync {
    /// Where packets for the card go, called once before the rest: a packet per [`InputPort::offer`], which takes all of it or
    /// nothing (0). After nothing was taken, it is offered again when the card calls [`NetBackend::room`].
    fn connect(&self, card: Weak<dyn InputPort>);

    /// The card is up and takes packets.
    fn start(&self, offloads: Offloads);

    /// The card is down: whatever was under way through it ends.
    fn stop(&self);

    /// Takes a packet from the card. One that makes no sense is dropped, as networks do.
    fn send(&self, packet: &[u8]);

    /// No more packets for now: what was put off for several of them (acknowledgements) is done.
    fn flush(&self);

    /// The card has room for packets again.
    fn room(&self);
}
