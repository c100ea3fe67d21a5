//! Which address, which port, which interrupt: everything that the devices, the ACPI tables and the wiring must agree on.
//!
//! ```text
//! guest-physical memory                        interrupts (GSI = I/O APIC pin)
//! 0           RAM (0xa0000-0xfffff as well)     0      nothing (8259s only)
//! 0xc000_0000 PCI window, 32-bit               1      8042          4  serial port
//! 0xe000_0000 PCI configuration, bus 0         2      8254 (IRQ 0)  8  RTC     9  ACPI
//! 0xfec0_0000 I/O APIC                         16-19  PCI INTA-INTD (8259s: IRQs 5, 6, 10, 11)
//! 0xfed0_0000 HPET                             20-23  HPET
//! 0xfee0_0000 local APICs
//! 1 << 32     RAM above 3 GiB
//! 1 << 39     PCI window, 64-bit
//! ```

use std::ops::Range;

use lodger_chipset::{
    GPE0_LEN, GPE0_OFFSET, PM_PORT, PM_TMR_OFFSET, PM1A_CNT_OFFSET, PM1A_EVT_OFFSET, SCI_IRQ,
    UART_PORTS,
};
use lodger_guest_memory::RamRange;
use lodger_tables::{AcpiConfig, Ecam, Hpet, IoApic, PciHost, PmPorts, Sci, Serial};

pub use lodger_chipset::{
    DEBUG_EXIT_LEN, DEBUG_EXIT_PORT, FAST_A20_PORT, FW_CFG_LEN, FW_CFG_PORT, HPET_BASE, HPET_LEN,
    I8042_COMMAND_PORT, I8042_DATA_PORT, I8042_IRQ, IOAPIC_BASE, IOAPIC_LEN, PIC_ELCR_PORT,
    PIC_LEN, PIC_MASTER_PORT, PIC_SLAVE_PORT, PIT_IRQ, PIT_LEN, PIT_PORT, PM_LEN, PORT_B, RTC_IRQ,
    RTC_LEN, RTC_PORT, UART_LEN,
};

const GIB: u64 = 1 << 30;

/// The least memory that a machine can have, in bytes.
pub const RAM_MIN: u64 = 1 << 20;
/// The most.
pub const RAM_MAX: u64 = 256 * GIB;
/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_END: u64 = 3 * GIB;
/// The rest of RAM starts here.
pub const HIGH_RAM: u64 = 4 * GIB;

/// Window for PCI devices' registers below 4 GiB.
pub const PCI_MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// Window for 64-bit registers.
pub const PCI_MMIO64: Range<u64> = 512 * GIB..768 * GIB;
/// I/O ports for PCI devices.
pub const PCI_PORTS: Range<u16> = 0x1000..0xf000;
/// Memory-mapped PCI configuration space; there is bus 0 only.
pub const ECAM: Ecam = Ecam {
    base: 0xe000_0000,
    last_bus: 0,
};

/// The local APICs' page.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// The I/O APIC's ID. It is on no APIC bus, so a local APIC may have the same.
pub const IOAPIC_ID: u8 = 0;
/// The I/O APIC's pin for the 8254, whose IRQ 0 would be the 8259s' own output there.
pub const PIT_GSI: u32 = 2;
/// The I/O APIC's pins for PCI INTA to INTD.
pub const PCI_GSIS: [u32; 4] = [16, 17, 18, 19];
/// The 8259s' inputs for PCI INTA to INTD, level-triggered.
pub const PCI_IRQS: [u8; 4] = [5, 6, 10, 11];
/// Edge/level control: the 8259s' level-triggered inputs are PCI's and the ACPI interrupt.
pub const ELCR: u16 =
    1 << PCI_IRQS[0] | 1 << PCI_IRQS[1] | 1 << PCI_IRQS[2] | 1 << PCI_IRQS[3] | 1 << SCI_IRQ;

/// The I/O APIC's pins that the HPET's timers can be routed to.
pub const HPET_GSIS: [u32; 4] = [20, 21, 22, 23];
/// The low half of the HPET's capabilities: revision 1, three 64-bit timers, legacy replacement, vendor Intel.
pub const HPET_BLOCK_ID: u32 = 0x8086_a201;

/// The first serial port, ttyS0: port and interrupt line.
pub const SERIAL: (u16, u32) = UART_PORTS[0];

/// Where `bytes` of RAM are.
pub fn ram(bytes: u64) -> Vec<RamRange> {
    let low = bytes.min(LOW_RAM_END);
    let mut ranges = vec![RamRange { start: 0, len: low }];
    if bytes > low {
        ranges.push(RamRange {
            start: HIGH_RAM,
            len: bytes - low,
        });
    }
    ranges
}

/// The board as ACPI describes it.
pub fn acpi(vcpus: u32) -> AcpiConfig {
    AcpiConfig {
        vcpus,
        local_apic: LOCAL_APIC as u32,
        ioapic: IoApic {
            id: IOAPIC_ID,
            address: IOAPIC_BASE as u32,
        },
        hpet: Some(Hpet {
            address: HPET_BASE as u32,
            block_id: HPET_BLOCK_ID,
        }),
        pm: PmPorts {
            event: PM_PORT + PM1A_EVT_OFFSET,
            control: PM_PORT + PM1A_CNT_OFFSET,
            timer: PM_PORT + PM_TMR_OFFSET,
            gpe0: PM_PORT + GPE0_OFFSET,
            gpe0_len: GPE0_LEN,
        },
        sci: Sci {
            irq: SCI_IRQ as u8,
            active_low: false,
        },
        ecam: Some(ECAM),
        pci: PciHost {
            mmio32: PCI_MMIO32.start as u32..=(PCI_MMIO32.end - 1) as u32,
            mmio64: Some(PCI_MMIO64.start..=PCI_MMIO64.end - 1),
            intx: PCI_GSIS,
        },
        serial: vec![Serial {
            port: SERIAL.0,
            irq: SERIAL.1 as u8,
        }],
        i8042: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_laid_out_around_the_hole() {
        let layout = |bytes| -> Vec<_> { ram(bytes).iter().map(|r| (r.start, r.len)).collect() };
        assert_eq!(layout(512 << 20), [(0, 512 << 20)]);
        assert_eq!(layout(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(layout(3 * GIB + 4096), [(0, 3 * GIB), (4 * GIB, 4096)]);
        const { assert!(HIGH_RAM + RAM_MAX <= PCI_MMIO64.start) };
    }
}
