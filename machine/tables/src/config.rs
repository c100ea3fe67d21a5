//! What a board tells about itself.

use std::ops::RangeInclusive;

/// The machine as the tables describe it. Local APIC IDs and processor UIDs are 0 to `vcpus - 1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Address of the local APICs' page.
    pub local_apic: u32,
    /// The I/O APIC; its first pin is GSI 0, ISA IRQ 0 is wired to GSI 2 and the other ISA IRQs to the GSI of the
    /// same number.
    pub ioapic: IoApic,
    /// The HPET, if there is one.
    pub hpet: Option<Hpet>,
    /// The ACPI fixed hardware.
    pub pm: PmPorts,
    /// The system control interrupt.
    pub sci: Sci,
    /// Memory-mapped PCI configuration space, if there is one. Without it the root bridge is conventional PCI.
    pub ecam: Option<Ecam>,
    /// The PCI root bridge.
    pub pci: PciHost,
    /// 16550 serial ports, COM1 first; at most four.
    pub serial: Vec<Serial>,
    /// Whether there is an 8042 with a keyboard and a mouse. Without it the tables say that there is none, which
    /// spares the guest the search.
    pub i8042: bool,
}

/// An I/O APIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoApic {
    /// Its ID.
    pub id: u8,
    /// Guest-physical address of its registers.
    pub address: u32,
}

/// A high precision event timer block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hpet {
    /// Guest-physical address of its 1 KiB of registers.
    pub address: u32,
    /// The low half of its capabilities register: revision, number of comparators, 64-bit, legacy, vendor.
    pub block_id: u32,
}

/// I/O ports of the ACPI fixed hardware (ACPI 6.5, 4.8). ACPI mode is always on: SCI_EN reads as 1. Writing 6 to
/// port 0xcf9 resets; SLP_TYP 5 with SLP_EN powers off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PmPorts {
    /// PM1a status (2 bytes) and enable (2 bytes).
    pub event: u16,
    /// PM1a control, 2 bytes.
    pub control: u16,
    /// The PM timer, 4 bytes, of which 24 bits are said to count.
    pub timer: u16,
    /// General-purpose event block 0.
    pub gpe0: u16,
    /// Its length in bytes, status and enable together; 0: there is none.
    pub gpe0_len: u8,
}

/// The system control interrupt, level-triggered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sci {
    /// The ISA IRQ; the GSI has the same number.
    pub irq: u8,
    /// Polarity at the I/O APIC.
    pub active_low: bool,
}

/// Memory-mapped PCI configuration space (PCI Express enhanced configuration access).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ecam {
    /// Guest-physical address of bus 0; below 4 GiB.
    pub base: u32,
    /// The last bus; 1 MiB each from bus 0 on.
    pub last_bus: u8,
}

impl Ecam {
    /// Its size in bytes.
    pub fn len(&self) -> u32 {
        (u32::from(self.last_bus) + 1) << 20
    }

    /// Never: there is a bus 0.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// The PCI root bridge: what it passes on to bus 0. I/O ports are all its own but for 0xcf8-0xcff.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciHost {
    /// Window for BARs below 4 GiB.
    pub mmio32: RangeInclusive<u32>,
    /// Window for 64-bit BARs.
    pub mmio64: Option<RangeInclusive<u64>>,
    /// The GSIs that the INTx pins reach; see [`AcpiConfig::intx_gsi`].
    pub intx: [u32; 4],
}

/// A 16550.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Serial {
    /// The first of its eight I/O ports.
    pub port: u16,
    /// ISA IRQ.
    pub irq: u8,
}

impl AcpiConfig {
    /// The GSI that `_PRT` names for `pin` (0: INTA) of `device` on bus 0: the usual swizzle over
    /// [`PciHost::intx`]. The interrupt is level-triggered and active low, as PCI has it.
    pub fn intx_gsi(&self, device: u8, pin: u8) -> u32 {
        self.pci.intx[(usize::from(device) + usize::from(pin)) % 4]
    }
}
