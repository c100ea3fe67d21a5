//! The wires between devices, interrupt controllers and vCPUs.
//!
//! ```text
//! ISA lines ----+--> 8259s -------> INTR of vCPU 0 (LINT0)
//!               +--> I/O APIC --+
//! PCI INTx -----+--> I/O APIC --+-> messages -> local APICs
//!               +--> 8259s      |
//! MSI-X ------------------------+
//! ```

use std::sync::Arc;

use lodger_chipset::{Ioapic, Pic};
use lodger_device_model::{IrqSink, Msi, MsiTarget};
use lodger_vcpu::EngineVm;

use crate::map::{PCI_GSIS, PCI_IRQS, PIT_GSI, PIT_IRQ};

/// The 16 ISA lines.
pub(crate) struct IsaLines {
    pub(crate) pic: Arc<Pic>,
    pub(crate) ioapic: Arc<Ioapic>,
}

fn isa_gsi(irq: u32) -> u32 {
    if irq == PIT_IRQ { PIT_GSI } else { irq }
}

impl IrqSink for IsaLines {
    fn set(&self, line: u32, level: bool) {
        self.pic.set(line, level);
        self.ioapic.set(isa_gsi(line), level);
    }

    fn import(&self, line: u32, level: bool) {
        self.pic.import(line, level);
        self.ioapic.import(isa_gsi(line), level);
    }
}

/// PCI INTA to INTD, lines 0 to 3.
pub(crate) struct PciLines {
    pub(crate) pic: Arc<Pic>,
    pub(crate) ioapic: Arc<Ioapic>,
}

impl IrqSink for PciLines {
    fn set(&self, line: u32, level: bool) {
        self.pic.set(PCI_IRQS[line as usize].into(), level);
        self.ioapic.set(PCI_GSIS[line as usize], level);
    }

    fn import(&self, line: u32, level: bool) {
        self.pic.import(PCI_IRQS[line as usize].into(), level);
        self.ioapic.import(PCI_GSIS[line as usize], level);
    }
}

/// The vCPUs' inputs: the 8259s' INTR as line 0, and messages.
pub(crate) struct VcpuInputs(pub(crate) Arc<dyn EngineVm>);

impl IrqSink for VcpuInputs {
    fn set(&self, _line: u32, level: bool) {
        self.0.set_intr(level);
    }

    fn import(&self, _line: u32, level: bool) {
        self.0.set_intr(level);
    }
}

impl MsiTarget for VcpuInputs {
    fn send(&self, msi: Msi) {
        self.0.send_msi(msi.address, msi.data);
    }
}
