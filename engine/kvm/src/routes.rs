//! Which level-triggered vectors KVM reports the EOI of.
//!
//! With a split irqchip KVM leaves the guest at an EOI (KVM_EXIT_IOAPIC_EOI) only for vectors that it finds in its routing table as
//! level-triggered messages of the reserved IOAPIC pins. The table is therefore kept to hold the level-triggered messages that were
//! sent last, one in each pin's place.

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use lodger_vcpu::EngineError;

use crate::failure::host;

/// Pins of the IOAPIC that KVM leaves to user space.
pub(crate) const IOAPIC_PINS: usize = 24;

/// The trigger mode bit of a message's data.
const LEVEL: u32 = 1 << 15;

/// The level-triggered messages sent last.
#[derive(Default)]
pub(crate) struct Routes {
    messages: Vec<(u64, u32)>,
    oldest: usize,
}

impl Routes {
    /// Takes note of a message that is about to be sent; true if the table changed and must be told to KVM.
    fn note(&mut self, address: u64, data: u32) -> bool {
        let message = (address, data);
        if data & LEVEL == 0 || self.messages.contains(&message) {
            return false;
        }
        if self.messages.len() < IOAPIC_PINS {
            self.messages.push(message);
        } else {
            self.messages[self.oldest] = message;
            self.oldest = (self.oldest + 1) % IOAPIC_PINS;
        }
        true
    }

    /// Makes sure that the EOI of this message will be reported.
    pub fn prepare(&mut self, vm: &VmFd, address: u64, data: u32) -> Result<(), EngineError> {
        if !self.note(address, data) {
            return Ok(());
        }
        let entry = |(gsi, &(address, data)): (usize, &(u64, u32))| {
            let mut entry = kvm_irq_routing_entry {
                gsi: gsi as u32,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi = kvm_irq_routing_msi {
                address_lo: address as u32,
                address_hi: (address >> 32) as u32,
                data,
                ..Default::default()
            };
            entry
        };
        let entries: Vec<_> = self.messages.iter().enumerate().map(entry).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| EngineError::Internal(format!("KVM's routing table: {e:?}")))?;
        vm.set_gsi_routing(&table)
            .map_err(host("KVM does not take the interrupt routing table"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_holds_the_last_level_triggered_messages() {
        let mut routes = Routes::default();
        for (data, changed, held) in [(0x41, false, 0), (0x8041, true, 1), (0x8041, false, 1)] {
            assert_eq!(routes.note(0xfee0_0000, data), changed, "{data:#x}");
            assert_eq!(routes.messages.len(), held);
        }
        for data in 0x8042..0x8042 + IOAPIC_PINS as u32 {
            assert!(routes.note(0xfee0_0000, data));
        }
        assert_eq!(routes.messages.len(), IOAPIC_PINS);
        assert!(!routes.messages.contains(&(0xfee0_0000, 0x8041)));
        assert!(routes.messages.contains(&(0xfee0_0000, 0x8042)));
    }
}
