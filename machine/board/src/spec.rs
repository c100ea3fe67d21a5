//! What a machine is made from.

use std::path::PathBuf;

use lodger_virtio_devices::{BlkSpec, ConsoleSpec, NetSpec};
use serde::{Deserialize, Serialize};

use crate::map;

/// A PC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// RAM in bytes, a multiple of 4096.
    pub memory: u64,
    /// Number of vCPUs, from 1.
    pub vcpus: u32,
    /// The CPU model's name, one of [`CpuModel::NAMES`](lodger_x86::CpuModel::NAMES).
    pub cpu: String,
    /// What it boots.
    pub boot: BootSpec,
    /// Its virtio devices.
    #[serde(default)]
    pub virtio: VirtioSpec,
    /// Whether it has the port by which a test ends the run with a status.
    #[serde(default)]
    pub debug_exit: bool,
}

/// What a machine boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSpec {
    /// The kernel; its format is found from the file.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// The kernel command line.
    #[serde(default)]
    pub append: String,
}

/// Virtio devices. There is always a source of entropy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioSpec {
    /// Disks in order: /dev/vda, /dev/vdb ...
    #[serde(default)]
    pub disks: Vec<BlkSpec>,
    /// A console beside the serial port.
    #[serde(default)]
    pub console: Option<ConsoleSpec>,
    /// Network cards in order: eth0, eth1 ...
    #[serde(default)]
    pub nets: Vec<NetSpec>,
}

/// A spec that no machine can be built from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Too little, too much or an odd amount of memory.
    #[error(
        "a machine cannot have {0} bytes of memory: it must be a multiple of 4096 from {min} MiB to {max} GiB",
        min = map::RAM_MIN >> 20,
        max = map::RAM_MAX >> 30
    )]
    Memory(u64),
    /// No vCPU, or more than the engine runs.
    #[error("a machine cannot have {vcpus} vCPUs: the {engine} engine runs 1 to {max}")]
    Vcpus {
        /// How many.
        vcpus: u32,
        /// The engine's name.
        engine: &'static str,
        /// How many it runs.
        max: u32,
    },
}

impl MachineSpec {
    /// Whether the memory can be laid out.
    pub(crate) fn check_memory(&self) -> Result<(), SpecError> {
        let legal = (map::RAM_MIN..=map::RAM_MAX).contains(&self.memory);
        match legal && self.memory.is_multiple_of(4096) {
            true => Ok(()),
            false => Err(SpecError::Memory(self.memory)),
        }
    }
}
