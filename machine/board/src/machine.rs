//! The machine: power-on, the answers to vCPUs' exits, pause, save and restore.

use std::sync::Arc;

use lodger_address_space::AddressSpace;
use lodger_chipset::{AcpiPm, Ioapic, Pic, Uart};
use lodger_clock::SharedClock;
use lodger_device_model::{Device, Payload, RestoreError};
use lodger_guest_memory::GuestMemory;
use lodger_loader::{Boot, BootSource, LoadError};
use lodger_pci::{NoRoom, PciBus, Resources};
use lodger_tables::AcpiConfig;
use lodger_vcpu::{EngineVm, Entry, Exit};
use lodger_virtio_devices::{Balloon, Console};
use lodger_x86::{CpuModel, CpuState};

use crate::map;
use crate::spec::MachineSpec;

/// What a machine consists of.
pub(crate) struct Parts {
    pub(crate) spec: MachineSpec,
    pub(crate) boot: BootSource,
    pub(crate) acpi: AcpiConfig,
    pub(crate) memory: GuestMemory,
    pub(crate) model: Arc<CpuModel>,
    pub(crate) vm: Arc<dyn EngineVm>,
    pub(crate) clock: SharedClock,
    pub(crate) space: Arc<AddressSpace>,
    pub(crate) pic: Arc<Pic>,
    pub(crate) ioapic: Arc<Ioapic>,
    pub(crate) pci: Arc<PciBus>,
    /// In the order in which they are reset.
    pub(crate) devices: Vec<Arc<dyn Device>>,
    pub(crate) pm: Arc<AcpiPm>,
    pub(crate) serial: Arc<Uart>,
    pub(crate) console: Option<Arc<Console>>,
    pub(crate) balloon: Option<Arc<Balloon>>,
}

/// A wired machine. Its vCPUs are run by others: they ask [`Machine::answer`] what to do at each exit.
pub struct Machine {
    parts: Parts,
}

/// A machine after power-on.
#[derive(Debug, Clone)]
pub struct PowerOn {
    /// The states of the vCPUs.
    pub vcpus: Vec<CpuState>,
    /// The kernel that vCPU 0 is about to enter.
    pub boot: Boot,
}

/// Why a machine cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum PowerOnError {
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The devices need more addresses than there are.
    #[error(transparent)]
    Resources(#[from] NoRoom),
}

/// The states of all devices: names and payloads.
pub type SavedDevices = Vec<(String, Payload)>;

/// Why a saved state was not taken.
#[derive(Debug, thiserror::Error)]
pub enum RestoreMachineError {
    /// A device refused its state.
    #[error("{device}: {source}")]
    Device {
        /// The device.
        device: String,
        /// Its reason.
        source: RestoreError,
    },
    /// The state lacks a device of this machine, or has one that this machine lacks.
    #[error("the saved state is of another machine: {0} is only in one of them")]
    Devices(String),
}

impl Machine {
    pub(crate) fn new(parts: Parts) -> Machine {
        Machine { parts }
    }

    /// What it was built from.
    pub fn spec(&self) -> &MachineSpec {
        &self.parts.spec
    }

    /// Guest time.
    pub fn clock(&self) -> &SharedClock {
        &self.parts.clock
    }

    /// RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.parts.memory
    }

    /// The CPU model of its vCPUs.
    pub fn model(&self) -> &CpuModel {
        &self.parts.model
    }

    /// What its vCPUs are made from.
    pub fn vm(&self) -> &Arc<dyn EngineVm> {
        &self.parts.vm
    }

    /// Its memory-mapped registers and ports.
    pub fn space(&self) -> &AddressSpace {
        &self.parts.space
    }

    /// Its devices.
    pub fn devices(&self) -> &[Arc<dyn Device>] {
        &self.parts.devices
    }

    /// The first serial port.
    pub fn serial(&self) -> &Arc<Uart> {
        &self.parts.serial
    }

    /// The virtio console, if it has one.
    pub fn console(&self) -> Option<&Arc<Console>> {
        self.parts.console.as_ref()
    }

    /// The memory balloon, if it has one.
    pub fn balloon(&self) -> Option<&Arc<Balloon>> {
        self.parts.balloon.as_ref()
    }

    /// Presses the power button, upon which most guests shut down. False: the guest does not listen to it (yet).
    pub fn press_power_button(&self) -> bool {
        self.parts.pm.press_power_button()
    }

    /// Resets the devices, does what firmware would, and loads the kernel. The vCPUs must stand still; they go on from
    /// the states returned. RAM that the kernel does not take keeps its contents.
    pub fn power_on(&self) -> Result<PowerOn, PowerOnError> {
        let p = &self.parts;
        for device in &p.devices {
            device.reset();
        }
        p.pic.elcr_ports().write(0, &map::ELCR.to_le_bytes());
        p.pci.assign_resources(&Resources {
            memory: map::PCI_MMIO32,
            ports: map::PCI_PORTS,
            interrupts: map::PCI_IRQS,
        })?;
        let boot = lodger_loader::load(&p.memory, &p.boot, &p.acpi)?;
        let others = (1..p.spec.vcpus).map(|id| CpuState::reset(id, p.model.signature()));
        let vcpus = [boot.state.clone()].into_iter().chain(others).collect();
        Ok(PowerOn { vcpus, boot })
    }

    /// Does what a vCPU stopped for; it goes on with the entry. Exits that are not about devices need none of the
    /// machine: the vCPU just goes on.
    pub fn answer(&self, exit: Exit) -> Entry {
        let p = &self.parts;
        let mut data = [0; 8];
        match exit {
            Exit::PortRead { port, size } => {
                p.space.ports.read(port.into(), &mut data[..size.into()]);
                Entry::Data(u64::from_le_bytes(data))
            }
            Exit::PortWrite { port, size, value } => {
                let data = &value.to_le_bytes()[..size.into()];
                p.space.ports.write(port.into(), data);
                Entry::Written
            }
            Exit::MmioRead { address, size } => {
                p.space.mmio.read(address, &mut data[..size.into()]);
                Entry::Data(u64::from_le_bytes(data))
            }
            Exit::MmioWrite {
                address,
                size,
                value,
            } => {
                let data = &value.to_le_bytes()[..size.into()];
                p.space.mmio.write(address, data);
                Entry::Written
            }
            Exit::InterruptAcknowledge => {
                let vector = p.pic.pending().then(|| p.pic.acknowledge());
                Entry::Interrupt(vector)
            }
            Exit::Eoi(vector) => {
                p.ioapic.eoi(vector);
                Entry::Resume
            }
            Exit::Kicked | Exit::TickLimit | Exit::Shutdown => Entry::Resume,
        }
    }

    /// Stops guest time, host input and DMA. The vCPUs must stand still.
    pub fn pause(&self) {
        self.parts.clock.pause();
        for device in &self.parts.devices {
            device.pause();
        }
    }

    /// Undoes [`Machine::pause`].
    pub fn resume(&self) {
        for device in &self.parts.devices {
            device.resume();
        }
        self.parts.clock.resume();
    }

    /// The states of the devices; only while paused.
    pub fn save(&self) -> SavedDevices {
        let devices = self.parts.devices.iter();
        devices.map(|d| (d.name().into(), d.save())).collect()
    }

    /// Takes what [`Machine::save`] gave, here or at a machine of the same spec; only while paused.
    pub fn restore(&self, saved: &SavedDevices) -> Result<(), RestoreMachineError> {
        let names = |name: &str| self.parts.devices.iter().any(|d| d.name() == name);
        if let Some((stranger, _)) = saved.iter().find(|(name, _)| !names(name)) {
            return Err(RestoreMachineError::Devices(stranger.clone()));
        }
        for device in &self.parts.devices {
            let name = device.name();
            let payload = saved.iter().find(|(n, _)| n == name);
            let (_, payload) = payload.ok_or_else(|| RestoreMachineError::Devices(name.into()))?;
            let refused = |source| RestoreMachineError::Device {
                device: name.into(),
                source,
            };
            device.restore(payload).map_err(refused)?;
        }
        Ok(())
    }
}
