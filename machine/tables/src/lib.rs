//! The tables by which a PC describes itself to its operating system: ACPI, and the files that hand the same
//! tables to firmware over `fw_cfg`.
//!
//! The board says what it has in an [`AcpiConfig`]; [`build`] turns it into bytes for guest memory. Nothing here
//! chooses an address or an interrupt. Specification: ACPI 6.5; the DSDT is in `dsdt`, everything else in `acpi`.
//!
//! Limits: one PCI segment, no hotplug, no sleep state but S5, no NUMA. With the 8259s (`noapic`) the INTx pins of
//! PCI have no route, because `_PRT` names GSIs only.

mod acpi;
mod config;
mod dsdt;
mod fw_cfg;

pub use acpi::{RSDP_LEN, Tables, build};
pub use config::{AcpiConfig, Ecam, Hpet, IoApic, PciHost, PmPorts, Sci, Serial};
pub use fw_cfg::{FwCfgFile, fw_cfg_files};

#[cfg(test)]
mod tests;
