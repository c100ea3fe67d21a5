//! The reset control register of Intel chipsets (82371AB data sheet, section 4.1.7.8), which Linux and ACPI
//! tables use too.
//!
//! It lies amid the PCI configuration address register, which is accessed as a double word only; the host bridge hands
//! byte accesses on to this register. What kind of reset is asked for makes no difference here.

use std::sync::{Arc, Mutex, MutexGuard};

use lodger_address_space::BusTarget;
use lodger_device_model::{Device, MachineControl, MachineRequest, Payload, RestoreError};

/// The port: one byte. Also the RESET_REG of the FADT.
pub const RESET_CONTROL_PORT: u16 = 0xcf9;
/// The value that resets (hard reset): RESET_VALUE of the FADT.
pub const RESET_VALUE: u8 = 6;

/// Hard instead of soft reset; full reset with a power cycle.
const STORED: u8 = 2 | 8;
/// A change of this bit from 0 to 1 resets.
const RESET: u8 = 4;
const KIND: &str = "reset-control";

/// The register at port 0xcf9.
pub struct ResetControl {
    // Runtime glue.
    control: Arc<dyn MachineControl>,

    // Volatile state.
    value: Mutex<u8>,
}

mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) value: u8,
    }
}

impl ResetControl {
    /// Resets go to `control`.
    pub fn new(control: Arc<dyn MachineControl>) -> Arc<ResetControl> {
        Arc::new(ResetControl {
            control,
            value: Mutex::new(0),
        })
    }

    fn value(&self) -> MutexGuard<'_, u8> {
        self.value
            .lock()
            .expect("a user of the reset register panicked")
    }
}

impl BusTarget for ResetControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(*self.value());
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        for &new in data {
            let old = std::mem::replace(&mut *self.value(), new & (STORED | RESET));
            if new & !old & RESET != 0 {
                self.control.request(MachineRequest::Reset);
            }
        }
    }
}

impl Device for ResetControl {
    fn name(&self) -> &str {
        "reset-control"
    }

    fn reset(&self) {
        *self.value() = 0;
    }

    fn save(&self) -> Payload {
        let value = *self.value();
        Payload::encode(KIND, 1, &saved::V1 { value })
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved::V1 { value } = payload.decode(KIND, 1)?;
        *self.value() = value & (STORED | RESET);
        Ok(())
    }

    fn as_pio(&self) -> Option<&dyn BusTarget> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rig;
    use lodger_device_model::assert_round_trip;

    #[test]
    fn a_rise_of_the_reset_bit_resets() {
        let rig = Rig::new();
        let device = ResetControl::new(rig.records.clone());
        let ports = &rig.space.ports;
        ports
            .map(RESET_CONTROL_PORT.into(), 1, device.clone() as _)
            .unwrap();
        rig.run("w cf9 02; r cf9 = 02");
        assert_eq!(rig.take_requests(), []);
        rig.run("w cf9 06; w cf9 ff; r cf9 = 0e");
        assert_eq!(rig.take_requests(), [MachineRequest::Reset]);
        assert_round_trip(&*device);
        rig.run("r cf9 = 0e; w cf9 00; w cf9 04");
        assert_eq!(rig.take_requests(), [MachineRequest::Reset]);
    }
}
