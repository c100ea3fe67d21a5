//! Ports for tests and firmware: one ends the run with a status, one prints bytes. Neither has state. (POST
//! codes, port 0x80, need no device: the bus swallows what nobody takes.)

use std::sync::Arc;

use lodger_address_space::BusTarget;
use lodger_device_model::{MachineControl, MachineRequest};

use crate::ByteSink;

/// Where test programs expect [`DebugExit`].
pub const DEBUG_EXIT_PORT: u16 = 0xf4;
/// Length of that block of ports.
pub const DEBUG_EXIT_LEN: u64 = 4;
/// Where Bochs, and many hobby kernels, expect [`DebugConsole`]; one port.
pub const DEBUG_CONSOLE_PORT: u16 = 0xe9;
/// Where SeaBIOS and OVMF expect [`DebugConsole`]; one port.
pub const FIRMWARE_CONSOLE_PORT: u16 = 0x402;

/// Ends the run: whatever is written, in one to four bytes, is the status ([`MachineRequest::DebugExit`]). Reads as 0.
pub struct DebugExit {
    control: Arc<dyn MachineControl>,
}

impl DebugExit {
    /// The request goes to `control`.
    pub fn new(control: Arc<dyn MachineControl>) -> Arc<DebugExit> {
        Arc::new(DebugExit { control })
    }
}

impl BusTarget for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        let len = data.len().min(4);
        value[..len].copy_from_slice(&data[..len]);
        let value = u32::from_le_bytes(value);
        self.control.request(MachineRequest::DebugExit(value));
    }
}

/// Prints the bytes that are written. Reads as 0xe9, by which software finds it.
pub struct DebugConsole {
    output: ByteSink,
}

impl DebugConsole {
    /// Prints to `output`.
    pub fn new(output: ByteSink) -> Arc<DebugConsole> {
        Arc::new(DebugConsole { output })
    }
}

impl BusTarget for DebugConsole {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xe9);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        (self.output)(data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rig;

    #[test]
    fn scripts() {
        let rig = Rig::new();
        let ports = &rig.space.ports;
        let exit = DebugExit::new(rig.records.clone());
        ports
            .map(DEBUG_EXIT_PORT.into(), DEBUG_EXIT_LEN, exit)
            .unwrap();
        let console = DebugConsole::new(rig.sink());
        for port in [DEBUG_CONSOLE_PORT, FIRMWARE_CONSOLE_PORT] {
            ports.map(port.into(), 1, console.clone() as _).unwrap();
        }
        rig.run("w f4 10; w f4 0010; w f4 12345678; r f4 = 00000000");
        let exits = [0x10, 0x10, 0x1234_5678].map(MachineRequest::DebugExit);
        assert_eq!(rig.take_requests(), exits);
        rig.run("r e9 = e9; w e9 68; w 402 69; r 402 = e9");
        assert_eq!(rig.take_output(), b"hi");
    }
}
