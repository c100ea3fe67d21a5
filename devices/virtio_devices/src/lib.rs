//! The virtio devices: balloon, block, console, entropy, file system, network, sockets. Virtual I/O Device (VIRTIO) Version 1.2, section 5.
//!
//! Each device serves its queues on threads of its own, so that a guest's register access never waits for the host. (A disk
//! answers at once what is in the host's memory.) Beside each
//! device is its spec, plain data from which a machine builds it.

mod balloon;
mod blk;
mod console;
mod fs;
mod net;
mod rate;
mod rng;
mod vsock;
mod workers;

pub use balloon::{Balloon, BalloonSpec, BalloonStatus, GuestStats, NoDriver};
pub use blk::{Blk, BlkError, BlkSpec};
pub use console::{Console, ConsoleSpec, Output};
pub use fs::{Fs, FsError, FsSpec};
pub use net::{Net, NetSpec, NetworkSpec};
pub use rate::{Limits, Rate};
pub use rng::{Rng, RngSpec};
pub use vsock::{DEFAULT_CID, Vsock, VsockError, VsockSpec};
