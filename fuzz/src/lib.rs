//! Fuzzing: everything that takes bytes from a guest, or from a file for a guest, fed with bytes that nobody meant.
//!
//! A target is a function of bytes that must neither panic nor hang, whatever they are. The [`runner`] makes inputs from
//! numbers, so that a failure is reproduced by its number alone, on a stable compiler and without tools:
//!
//! ```text
//! cargo run --release -p lodger-fuzz -- virtio_queue --seconds 60
//! cargo run --release -p lodger-fuzz -- virtio_queue --seed 4711 --runs 1
//! ```
//!
//! Limits: inputs are not guided by coverage. A target can be handed to such a fuzzer as it is.

mod agent;
mod disk;
mod loader;
pub mod lockstep;
mod net;
pub mod runner;
mod share;
mod virtio;
mod vsock;

pub use agent::{agent_files, agent_messages};
pub use disk::disk_image;
pub use loader::loader;
pub use net::user_net;
pub use share::share;
pub use virtio::{pci, virtio_balloon, virtio_blk, virtio_net, virtio_queue};
pub use vsock::virtio_vsock;

/// Something to fuzz.
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Must return, whatever the bytes are.
    pub run: fn(&[u8]),
    /// Inputs that get far, to be mutated; may be none.
    pub samples: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "virtio_queue",
        run: virtio_queue,
        samples: Vec::new,
    },
    Target {
        name: "virtio_blk",
        run: virtio_blk,
        samples: Vec::new,
    },
    Target {
        name: "virtio_net",
        run: virtio_net,
        samples: Vec::new,
    },
    Target {
        name: "virtio_vsock",
        run: virtio_vsock,
        samples: Vec::new,
    },
    Target {
        name: "agent_messages",
        run: agent_messages,
        samples: agent::message_samples,
    },
    Target {
        name: "agent_files",
        run: agent_files,
        samples: agent::file_samples,
    },
    Target {
        name: "share",
        run: share,
        samples: share::samples,
    },
    Target {
        name: "virtio_balloon",
        run: virtio_balloon,
        samples: Vec::new,
    },
    Target {
        name: "user_net",
        run: user_net,
        samples: net::samples,
    },
    Target {
        name: "pci",
        run: pci,
        samples: Vec::new,
    },
    Target {
        name: "disk_image",
        run: disk_image,
        samples: disk::samples,
    },
    Target {
        name: "loader",
        run: loader,
        samples: loader::samples,
    },
];
