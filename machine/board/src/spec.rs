//! What a machine is made from.

use std::path::PathBuf;

use lodger_pci::SLOTS;
use lodger_vcpu::Engine;
use lodger_virtio_devices::{BalloonSpec, BlkSpec, ConsoleSpec, FsSpec, NetSpec, VsockSpec};
use lodger_x86::CpuModel;
use lodger_x86::cpu_model::UnknownModel;
use serde::{Deserialize, Serialize};

use crate::build::BuildError;
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
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Sockets between guest and host.
    #[serde(default)]
    pub vsock: Option<VsockSpec>,
    /// The memory balloon.
    #[serde(default)]
    pub balloon: Option<BalloonSpec>,
    /// Shared folders.
    #[serde(default)]
    pub shares: Vec<FsSpec>,
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
    /// More memory at the start than in all, or none.
    #[error("a machine with at most {max} MiB of memory cannot start with {start} MiB", max = max >> 20, start = start >> 20)]
    Balloon {
        /// At the start, in bytes.
        start: u64,
        /// In all, in bytes.
        max: u64,
    },
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
    /// More disks, cards and the like than slots.
    #[error(
        "a machine cannot have {devices} disks, network cards and other devices: it has room for {max}"
    )]
    Devices {
        /// How many.
        devices: usize,
        /// How many there is room for.
        max: usize,
    },
}

impl MachineSpec {
    /// Whether the machine can be built on `engine`, as far as can be told without building it, and whatever it boots: for
    /// those who have to make that first.
    pub fn check(&self, engine: &dyn Engine) -> Result<(), BuildError> {
        self.check_hardware(engine)?;
        for disk in &self.virtio.disks {
            disk.check()?;
        }
        for share in &self.virtio.shares {
            share.check()?;
        }
        Ok(())
    }

    /// The same, without a look at files.
    pub(crate) fn check_hardware(&self, engine: &dyn Engine) -> Result<(), BuildError> {
        let legal = (map::RAM_MIN..=map::RAM_MAX).contains(&self.memory);
        if !legal || !self.memory.is_multiple_of(4096) {
            return Err(SpecError::Memory(self.memory).into());
        }
        if let Some(start) = self.virtio.balloon.as_ref().and_then(|b| b.start)
            && !(map::RAM_MIN..=self.memory).contains(&start)
        {
            let max = self.memory;
            return Err(SpecError::Balloon { start, max }.into());
        }
        let max = engine.probe()?.max_vcpus;
        if !(1..=max).contains(&self.vcpus) {
            return Err(BuildError::Spec(SpecError::Vcpus {
                vcpus: self.vcpus,
                engine: engine.name(),
                max,
            }));
        }
        if !CpuModel::NAMES.contains(&self.cpu.as_str()) {
            return Err(UnknownModel(self.cpu.clone()).into());
        }
        let VirtioSpec {
            disks,
            console,
            nets,
            vsock,
            balloon,
            shares,
        } = &self.virtio;
        // One is the source of entropy.
        let others = console.iter().len() + vsock.iter().len() + balloon.iter().len();
        let devices = disks.len() + nets.len() + shares.len() + others + 1;
        let max = usize::from(SLOTS) - 1;
        match devices > max {
            true => Err(SpecError::Devices { devices, max }.into()),
            false => Ok(()),
        }
    }
}
