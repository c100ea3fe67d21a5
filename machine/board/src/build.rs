//! From the spec to the wired machine.

use std::io;
use std::sync::Arc;

use lodger_address_space::{AddressSpace, BusTarget, Overlap};
use lodger_chipset::{
    AcpiPm, AcpiPmConfig, ByteSink, DebugExit, FwCfg, FwCfgConfig, FwCfgError, HPET_PIT_LINE,
    HPET_RTC_LINE, Hpet, HpetConfig, HpetLines, I8042, Ioapic, IoapicConfig, PM_PORT, Pic, Pit,
    ResetControl, Rtc, RtcConfig, Uart, UartConfig,
};
use lodger_clock::{Entropy, SharedClock};
use lodger_device_model::{Device, IrqLine, IrqSink, MachineControl};
use lodger_guest_memory::GuestMemory;
use lodger_loader::{BootProtocol, BootSource, Payload};
use lodger_net::NetError;
use lodger_pci::{AddError, CONFIG_PORTS, CONFIG_PORTS_LEN, HostBridge, PciBus};
use lodger_tables::{AcpiConfig, fw_cfg_files};
use lodger_vcpu::{Engine, EngineError, VmConfig};
use lodger_virtio::{VirtioPci, Wiring};
use lodger_virtio_devices::{BlkError, FsError, Output, RngSpec, VsockError};
use lodger_x86::cpu_model::UnknownModel;
use lodger_x86::{CpuModel, HostFeatures};

use crate::machine::{Machine, Parts};
use crate::map;
use crate::routing::{IsaLines, PciLines, VcpuInputs};
use crate::spec::{MachineSpec, SpecError};

/// What a machine has of its host.
pub struct Host<'a> {
    /// Runs the vCPUs.
    pub engine: &'a dyn Engine,
    /// What the CPU model may use of the host's processor.
    pub features: HostFeatures,
    /// The vCPUs' time-stamp counter frequency in kHz.
    pub tsc_khz: u32,
    /// Guest time.
    pub clock: SharedClock,
    /// Takes the guest's requests to power off and the like.
    pub control: Arc<dyn MachineControl>,
    /// Takes what the guest writes to the serial port.
    pub serial: ByteSink,
    /// Takes what the guest writes to the virtio console, if the spec asks for one.
    pub console: Output,
    /// Gives random bytes.
    pub entropy: Entropy,
}

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The spec asks for what cannot be.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The spec names a CPU model that there is not.
    #[error(transparent)]
    Cpu(#[from] UnknownModel),
    /// RAM.
    #[error(transparent)]
    Memory(#[from] lodger_guest_memory::Error),
    /// The engine cannot run it.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] BlkError),
    /// A shared folder.
    #[error(transparent)]
    Share(#[from] FsError),
    /// A network.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The sockets.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// There are more devices than places for them.
    #[error(transparent)]
    Pci(#[from] AddError),
    /// The host refused something that a device needs.
    #[error("{device}: the host cannot start a thread: {source}")]
    Thread {
        /// The device.
        device: &'static str,
        /// The host's reason.
        source: io::Error,
    },
    /// Two devices at one address: the board's own mistake.
    #[error("the board's map is wrong: {0}")]
    Map(#[from] Overlap),
    /// A file for firmware: the board's own mistake.
    #[error("the board's firmware configuration is wrong: {0}")]
    FwCfg(#[from] FwCfgError),
}

impl Machine {
    /// Builds the machine. Its state is undefined until the first [`Machine::power_on`] or [`Machine::restore`].
    pub fn build(spec: &MachineSpec, host: Host) -> Result<Machine, BuildError> {
        spec.check_hardware(host.engine)?;
        let model = CpuModel::named(&spec.cpu, spec.vcpus, &host.features, host.tsc_khz)?;
        let model = Arc::new(model);
        let memory = GuestMemory::new(&map::ram(spec.memory))?;
        let vm = host.engine.create_vm(VmConfig {
            memory: memory.clone(),
            clock: host.clock.clone(),
            entropy: host.entropy.clone(),
            model: Arc::clone(&model),
            vcpus: spec.vcpus,
        })?;
        let acpi = map::acpi(spec.vcpus);
        let inputs = Arc::new(VcpuInputs(Arc::clone(&vm)));
        let mut board = Board::new(inputs, host.clock);
        let (serial, pm) = board.add_chipset(spec, &memory, &acpi, host.serial, &host.control)?;
        let wiring = Wiring {
            memory: memory.clone(),
            msi: board.inputs.clone(),
        };
        let cf9 = ResetControl::new(Arc::clone(&host.control));
        board.devices.push(cf9.clone());
        let pci = board.add_pci(cf9)?;
        for (i, disk) in spec.virtio.disks.iter().enumerate() {
            let disk = disk.build(&format!("virtio-blk{i}"), &wiring)?;
            board.add_virtio(&pci, disk)?;
        }
        let no_thread = |device| move |source| BuildError::Thread { device, source };
        let rng = RngSpec {}.build("virtio-rng0", &wiring, host.entropy);
        board.add_virtio(&pci, rng.map_err(no_thread("virtio-rng0"))?)?;
        let mut console = None;
        if let Some(spec) = &spec.virtio.console {
            let name = "virtio-console0";
            let built = spec.build(name, &wiring, host.console);
            let (device, handle) = built.map_err(no_thread(name))?;
            board.add_virtio(&pci, device)?;
            console = Some(handle);
        }
        for (i, net) in spec.virtio.nets.iter().enumerate() {
            let net = net.build(&format!("virtio-net{i}"), &wiring)?;
            board.add_virtio(&pci, net)?;
        }
        if let Some(vsock) = &spec.virtio.vsock {
            board.add_virtio(&pci, vsock.build("virtio-vsock0", &wiring)?)?;
        }
        let mut balloon = None;
        if let Some(spec) = &spec.virtio.balloon {
            let name = "virtio-balloon0";
            let built = spec.build(name, &wiring).map_err(no_thread(name))?;
            board.add_virtio(&pci, built.0)?;
            balloon = Some(built.1);
        }
        let shares = &spec.virtio.shares;
        // Half of what there may be in all.
        let files = match shares.len() {
            0 => 0,
            count => lodger_share::raise_file_limit() / 2 / count,
        };
        for (i, share) in shares.iter().enumerate() {
            let share = share.build(&format!("virtio-fs{i}"), &wiring, files)?;
            board.add_virtio(&pci, share)?;
        }
        // Last, so that at a reset they forget what the others did to their lines.
        board.devices.push(board.ioapic.clone());
        board.devices.push(board.pic.clone());
        Ok(Machine::new(Parts {
            boot: boot_source(spec),
            acpi,
            memory,
            model,
            vm,
            clock: board.clock,
            space: board.space,
            pic: board.pic,
            ioapic: board.ioapic,
            pci,
            devices: board.devices,
            pm,
            serial,
            console,
            balloon,
            spec: spec.clone(),
        }))
    }
}

fn boot_source(spec: &MachineSpec) -> BootSource {
    BootSource {
        kernel: Payload::File(spec.boot.kernel.clone()),
        initrd: spec.boot.initrd.clone().map(Payload::File),
        append: spec.boot.append.clone(),
        protocol: BootProtocol::Auto,
    }
}

/// The board while devices are put on it.
struct Board {
    clock: SharedClock,
    space: Arc<AddressSpace>,
    inputs: Arc<VcpuInputs>,
    pic: Arc<Pic>,
    ioapic: Arc<Ioapic>,
    isa: Arc<dyn IrqSink>,
    devices: Vec<Arc<dyn Device>>,
}

impl Board {
    fn new(inputs: Arc<VcpuInputs>, clock: SharedClock) -> Board {
        let pic = Pic::new(IrqLine::new(inputs.clone(), 0));
        let ioapic = Ioapic::new(IoapicConfig { id: map::IOAPIC_ID }, inputs.clone());
        let isa = Arc::new(IsaLines {
            pic: Arc::clone(&pic),
            ioapic: Arc::clone(&ioapic),
        });
        Board {
            clock,
            space: Arc::default(),
            inputs,
            pic,
            ioapic,
            isa,
            devices: Vec::new(),
        }
    }

    fn isa_line(&self, irq: u32) -> IrqLine {
        IrqLine::new(Arc::clone(&self.isa), irq)
    }

    fn clock(&self) -> SharedClock {
        Arc::clone(&self.clock)
    }

    fn ports(&self, start: u16, len: u64, target: Arc<dyn BusTarget>) -> Result<(), Overlap> {
        self.space.ports.map(start.into(), len, target)
    }

    fn memory(&self, start: u64, len: u64, target: Arc<dyn BusTarget>) -> Result<(), Overlap> {
        self.space.mmio.map(start, len, target)
    }

    /// Puts a device with one block of ports at `port`.
    fn add_ports<D>(&mut self, port: u16, len: u64, device: &Arc<D>) -> Result<(), Overlap>
    where
        D: Device + BusTarget + 'static,
    {
        self.devices.push(device.clone());
        self.ports(port, len, device.clone())
    }

    /// All that is not on the PCI bus; returns the serial port and power management.
    fn add_chipset(
        &mut self,
        spec: &MachineSpec,
        memory: &GuestMemory,
        acpi: &AcpiConfig,
        output: ByteSink,
        control: &Arc<dyn MachineControl>,
    ) -> Result<(Arc<Uart>, Arc<AcpiPm>), BuildError> {
        let pic = Arc::clone(&self.pic);
        self.ports(map::PIC_MASTER_PORT, map::PIC_LEN, pic.master_ports())?;
        self.ports(map::PIC_SLAVE_PORT, map::PIC_LEN, pic.slave_ports())?;
        self.ports(map::PIC_ELCR_PORT, map::PIC_LEN, pic.elcr_ports())?;
        let ioapic = self.ioapic.clone();
        self.memory(map::IOAPIC_BASE, map::IOAPIC_LEN, ioapic)?;

        // The timer's and the clock's lines run through the HPET, which can take their place.
        let route = |gsi| (gsi, IrqLine::new(self.ioapic.clone(), gsi));
        let lines = HpetLines {
            pit: self.isa_line(map::PIT_IRQ),
            rtc: self.isa_line(map::RTC_IRQ),
            routes: map::HPET_GSIS.map(route).into(),
        };
        let config = HpetConfig {
            messages: Some(self.inputs.clone()),
        };
        let hpet = Hpet::new(config, self.clock(), lines);
        self.devices.push(hpet.clone());
        self.memory(map::HPET_BASE, map::HPET_LEN, hpet.clone())?;

        let pit = Pit::new(self.clock(), IrqLine::new(hpet.clone(), HPET_PIT_LINE));
        self.add_ports(map::PIT_PORT, map::PIT_LEN, &pit)?;
        self.ports(map::PORT_B, 1, pit.port_b())?;

        let ranges = memory.ranges();
        let rtc = RtcConfig {
            ram_below_4g: ranges[0].len,
            ram_above_4g: ranges[1..].iter().map(|r| r.len).sum(),
            memory: Vec::new(),
        };
        let rtc = Rtc::new(rtc, self.clock(), IrqLine::new(hpet, HPET_RTC_LINE));
        self.add_ports(map::RTC_PORT, map::RTC_LEN, &rtc)?;

        let (port, irq) = map::SERIAL;
        let name = "uart0".into();
        let uart = Uart::new(
            UartConfig { name },
            self.clock(),
            self.isa_line(irq),
            output,
        );
        self.add_ports(port, map::UART_LEN, &uart)?;

        let i8042 = I8042::new(self.isa_line(map::I8042_IRQ), Arc::clone(control));
        self.devices.push(i8042.clone());
        self.ports(map::I8042_DATA_PORT, 1, i8042.data_port())?;
        self.ports(map::I8042_COMMAND_PORT, 1, i8042.command_port())?;
        self.ports(map::FAST_A20_PORT, 1, i8042.fast_a20_port())?;

        let sci = self.isa_line(acpi.sci.irq.into());
        let config = AcpiPmConfig { wide_timer: false };
        let pm = AcpiPm::new(config, self.clock(), sci, Arc::clone(control));
        self.add_ports(PM_PORT, map::PM_LEN, &pm)?;

        let vcpus = spec.vcpus as u16;
        let config = FwCfgConfig {
            ram_size: memory.size(),
            cpus: vcpus,
            max_cpus: vcpus,
        };
        let fw_cfg = FwCfg::new(config, memory.clone());
        for file in fw_cfg_files(acpi) {
            fw_cfg.add_file(file.name, file.bytes)?;
        }
        self.add_ports(map::FW_CFG_PORT, map::FW_CFG_LEN, &fw_cfg)?;

        if spec.debug_exit {
            let target = DebugExit::new(Arc::clone(control));
            self.ports(map::DEBUG_EXIT_PORT, map::DEBUG_EXIT_LEN, target)?;
        }
        Ok((uart, pm))
    }

    fn add_pci(&mut self, cf9: Arc<ResetControl>) -> Result<Arc<PciBus>, BuildError> {
        let lines = Arc::new(PciLines {
            pic: Arc::clone(&self.pic),
            ioapic: Arc::clone(&self.ioapic),
        });
        let intx = [0, 1, 2, 3].map(|line| IrqLine::new(lines.clone(), line));
        let pci = PciBus::new(&self.space, intx);
        let bridge = HostBridge::add_to(&pci, "pci-host", Some(cf9))?;
        self.devices.push(bridge.clone());
        let ports = Arc::new(Registers::Ports(bridge.clone()));
        self.ports(CONFIG_PORTS as u16, CONFIG_PORTS_LEN, ports)?;
        let (base, len) = (map::ECAM.base.into(), map::ECAM.len().into());
        self.memory(base, len, Arc::new(Registers::Memory(bridge)))?;
        Ok(pci)
    }

    fn add_virtio(&mut self, pci: &PciBus, device: Arc<VirtioPci>) -> Result<(), BuildError> {
        pci.add(None, device.clone())?;
        self.devices.push(device);
        Ok(())
    }
}

/// One of the two sides of a device that has registers on both buses.
enum Registers {
    Ports(Arc<dyn Device>),
    Memory(Arc<dyn Device>),
}

impl Registers {
    fn side(&self) -> Option<&dyn BusTarget> {
        match self {
            Registers::Ports(device) => device.as_pio(),
            Registers::Memory(device) => device.as_mmio(),
        }
    }
}

impl BusTarget for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.side() {
            Some(side) => side.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(side) = self.side() {
            side.write(offset, data);
        }
    }
}
