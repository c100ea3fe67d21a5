//! A TAP interface of the host's: what the card sends arrives there, and what the host sends to it arrives at the card.
//!
//! The host's administrator makes the interface and decides by addresses, bridges and routes what is reached through it. The header
//! in front of the frames is the same on both sides, so packets pass as they are.

use std::os::fd::OwnedFd;
use std::sync::Weak;

use lodger_clock::InputPort;
use lodger_host_sys::tap;

use crate::inlet::{Inlet, Sorted};
use crate::user::NetError;
use crate::{HEADER_LEN, NetBackend, Offloads};

const _: () = assert!(HEADER_LEN == tap::HEADER_LEN);

/// See the module documentation.
pub struct TapNet {
    inlet: Inlet<OwnedFd>,
}

impl TapNet {
    /// Attaches to the interface `name`.
    pub fn start(name: &str) -> Result<TapNet, NetError> {
        let tap = tap::open(name).map_err(|source| NetError::Tap {
            name: name.into(),
            source,
        })?;
        // The host's kernel knows what the card takes.
        let inlet = Inlet::start(tap, |_, _| Sorted::AsItIs)?;
        Ok(TapNet { inlet })
    }
}

impl NetBackend for TapNet {
    fn connect(&self, card: Weak<dyn InputPort>) {
        self.inlet.connect(card);
    }

    fn start(&self, offloads: Offloads) {
        let Offloads { checksum, tso4 } = offloads;
        if let Err(error) = tap::set_offloads(self.inlet.file(), checksum, tso4) {
            tracing::warn!("the TAP interface does without offloads: {error}");
        }
        self.inlet.up(offloads);
    }

    fn stop(&self) {
        self.inlet.down();
    }

    fn send(&self, packet: &[u8]) {
        // What the host does not take is lost, as on any network.
        let _ = rustix::io::write(self.inlet.file(), packet);
    }

    fn flush(&self) {}

    fn room(&self) {
        self.inlet.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_cannot_be_had_is_named() {
        for name in ["", "a-name-that-is-too-long", "a\0b"] {
            let error = TapNet::start(name).err().expect("no such interface");
            let text = error.to_string();
            assert!(text.contains("ip tuntap add"), "{text}");
        }
    }
}
