//! The user-mode network against the host's real sockets on loopback; the far side of the card is a stack of its own.

mod card;
mod datagrams;
mod ipv6;
mod streams;
