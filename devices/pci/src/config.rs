//! The configuration space of one function, header type 0: a pure register file.
//!
//! Every byte has a mask of the bits that the guest may write; sizing a base address register by writing all ones to it
//! falls out of that. PCI Local Bus Specification 3.0, chapter 6.

use serde::{Deserialize, Serialize};

/// Offset of the command register.
pub const COMMAND: u16 = 0x04;
/// Command: the function answers in port space.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command: the function answers in memory space.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may access memory and send messages by itself.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: the function does not drive its interrupt line.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Offset of the first base address register.
pub const BAR0: u16 = 0x10;
/// Offset of the interrupt line register, a byte that firmware leaves for the driver.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Capability ID of vendor-specific capabilities.
pub const CAPABILITY_VENDOR: u8 = 0x09;
/// Capability ID of MSI-X.
pub const CAPABILITY_MSIX: u8 = 0x11;

const COMMAND_WRITABLE: u16 = COMMAND_IO
    | COMMAND_MEMORY
    | COMMAND_BUS_MASTER
    | COMMAND_INTX_DISABLE
    | 1 << 6  // parity error response
    | 1 << 8; // SERR# enable
const STATUS: usize = 0x06;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_PIN: usize = 0x3d;
/// Bytes of a configuration space.
pub const CONFIG_SIZE: usize = 256;

/// Who a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, subclass and programming interface, as 0xBBSSPP.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// The kind of a base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB, not prefetchable.
    Memory32,
    /// Memory anywhere, not prefetchable; takes this and the next register.
    Memory64,
}

/// An address space of the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Memory-mapped registers.
    Memory,
    /// I/O ports.
    Ports,
}

/// Where a base address register is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// In which address space.
    pub space: Space,
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// See the module documentation.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    // Fixed configuration.
    writable: [u8; CONFIG_SIZE],
    bars: [Option<Bar>; 6],
    next_capability: usize,
    last_pointer: usize,
    // Volatile state: the writable bits and the interrupt status.
    bytes: [u8; CONFIG_SIZE],
}

/// The bytes of a configuration space, as they are saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedConfig(Vec<u8>);

impl ConfigSpace {
    /// A function without base address registers, capabilities or interrupt pin.
    pub fn new(identity: Identity) -> ConfigSpace {
        let mut c = ConfigSpace {
            writable: [0; CONFIG_SIZE],
            bars: [None; 6],
            next_capability: 0x40,
            last_pointer: CAPABILITIES,
            bytes: [0; CONFIG_SIZE],
        };
        let Identity {
            vendor,
            device,
            revision,
            class,
            subsystem_vendor,
            subsystem,
        } = identity;
        c.put(0x00, &vendor.to_le_bytes());
        c.put(0x02, &device.to_le_bytes());
        c.put(0x08, &(class << 8 | u32::from(revision)).to_le_bytes());
        c.put(0x2c, &subsystem_vendor.to_le_bytes());
        c.put(0x2e, &subsystem.to_le_bytes());
        c.allow(COMMAND as usize, &COMMAND_WRITABLE.to_le_bytes());
        c.allow(INTERRUPT_LINE as usize, &[0xff]);
        c.allow(0x0c, &[0xff]); // cache line size
        c
    }

    /// Adds base address register `index` of `size` bytes.
    ///
    /// # Panics
    /// If the size is not a power of two of at least 16 (ports: at most 256), or the register is taken.
    pub fn with_bar(mut self, index: usize, kind: BarKind, size: u64) -> ConfigSpace {
        let most = match kind {
            BarKind::Io => 256,
            BarKind::Memory32 => 1 << 31,
            BarKind::Memory64 => 1 << 62,
        };
        assert!(size.is_power_of_two() && (16..=most).contains(&size));
        let registers = if kind == BarKind::Memory64 { 2 } else { 1 };
        let at = BAR0 as usize + index * 4;
        assert!(index + registers <= 6, "there is no such register");
        assert!(
            self.writable[at..at + registers * 4] == [0; 8][..registers * 4],
            "the register is taken"
        );
        self.bars[index] = Some(Bar { kind, size });
        self.allow(at, &(!(size - 1)).to_le_bytes()[..registers * 4]);
        self.bytes[at] = match kind {
            BarKind::Io => 0b001,
            BarKind::Memory32 => 0b000,
            BarKind::Memory64 => 0b100,
        };
        self
    }

    /// The function uses interrupt pin A.
    pub fn with_interrupt_pin(mut self) -> ConfigSpace {
        self.bytes[INTERRUPT_PIN] = 1;
        self
    }

    /// Appends a capability: `body` is what follows the ID and the next pointer, `writable` the bits of it that the guest may
    /// write. Returns the capability's offset.
    ///
    /// # Panics
    /// If there is no room left.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.next_capability;
        assert!(at + 2 + body.len() <= CONFIG_SIZE && writable.len() <= body.len());
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.bytes[self.last_pointer] = at as u8;
        self.last_pointer = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        at as u16
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Reads; bytes from 256 on are ones, as where nobody answers.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, d) in data.iter_mut().enumerate() {
            *d = *self.bytes.get(offset as usize + i).unwrap_or(&0xff);
        }
    }

    /// The guest's write: changes the writable bits.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, &d) in data.iter().enumerate() {
            let at = offset as usize + i;
            if let Some(byte) = self.bytes.get_mut(at) {
                *byte = *byte & !self.writable[at] | d & self.writable[at];
            }
        }
    }

    /// The word at `offset`, which must be below 255.
    pub fn word(&self, offset: u16) -> u16 {
        let at = offset as usize;
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// The double word at `offset`, which must be below 253.
    pub fn dword(&self, offset: u16) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.word(COMMAND)
    }

    /// Shows in the status register whether the function asserts its interrupt.
    pub fn set_interrupt_status(&mut self, asserted: bool) {
        self.bytes[STATUS] &= !STATUS_INTERRUPT;
        if asserted {
            self.bytes[STATUS] |= STATUS_INTERRUPT;
        }
    }

    /// Size and kind of base address register `index`, if there is one.
    pub fn bar(&self, index: usize) -> Option<(BarKind, u64)> {
        self.bars.get(index)?.map(|b| (b.kind, b.size))
    }

    /// Where base address register `index` is decoded now. Address 0 counts as unassigned, as guests expect.
    pub fn region(&self, index: usize) -> Option<Region> {
        let (kind, len) = self.bar(index)?;
        let low = self.dword(BAR0 + index as u16 * 4);
        let (space, enable, start) = match kind {
            BarKind::Io => (Space::Ports, COMMAND_IO, u64::from(low & !3)),
            BarKind::Memory32 => (Space::Memory, COMMAND_MEMORY, u64::from(low & !15)),
            BarKind::Memory64 => {
                let high = u64::from(self.dword(BAR0 + index as u16 * 4 + 4));
                (
                    Space::Memory,
                    COMMAND_MEMORY,
                    high << 32 | u64::from(low & !15),
                )
            }
        };
        let limit = match space {
            Space::Ports => 0x1_0000,
            Space::Memory => u64::MAX,
        };
        let fits = start.checked_add(len).is_some_and(|end| end <= limit);
        (self.command() & enable != 0 && start != 0 && fits).then_some(Region { space, start, len })
    }

    /// Power-on: every writable bit is 0.
    pub fn reset(&mut self) {
        for (byte, mask) in self.bytes.iter_mut().zip(&self.writable) {
            *byte &= !mask;
        }
        self.set_interrupt_status(false);
    }

    /// What `restore` takes.
    pub fn save(&self) -> SavedConfig {
        let ConfigSpace {
            bytes,
            writable: _,
            bars: _,
            next_capability: _,
            last_pointer: _,
        } = self;
        SavedConfig(bytes.to_vec())
    }

    /// Takes a saved state; false if it is another function's.
    pub fn restore(&mut self, saved: &SavedConfig) -> bool {
        let Ok(mut bytes) = <[u8; CONFIG_SIZE]>::try_from(saved.0.as_slice()) else {
            return false;
        };
        let own = STATUS_INTERRUPT;
        bytes[STATUS] &= !own;
        let same = (0..CONFIG_SIZE).all(|i| {
            let ignored = self.writable[i] | if i == STATUS { own } else { 0 };
            (bytes[i] ^ self.bytes[i]) & !ignored == 0
        });
        if same {
            self.bytes = bytes;
        }
        same
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function() -> ConfigSpace {
        let mut c = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        })
        .with_bar(0, BarKind::Memory64, 0x8000)
        .with_bar(2, BarKind::Memory32, 0x1000)
        .with_bar(3, BarKind::Io, 32)
        .with_interrupt_pin();
        assert_eq!(c.add_capability(CAPABILITY_VENDOR, &[1, 2, 3], &[]), 0x40);
        assert_eq!(
            c.add_capability(CAPABILITY_MSIX, &[0; 10], &[0, 0xc0]),
            0x48
        );
        c
    }

    #[test]
    fn registers_take_what_is_written_under_their_masks() {
        // offset, written, read back
        for (offset, written, read) in [
            (0x00, 0xffff_ffff, 0x1042_1af4),
            (0x04, 0xffff_ffff, 0x0010_0547),
            (0x08, 0xffff_ffff, 0x0100_0001),
            (0x0c, 0xffff_ffff, 0x0000_00ff),
            (0x10, 0xffff_ffff, 0xffff_8004),
            (0x14, 0xffff_ffff, 0xffff_ffff),
            (0x18, 0xffff_ffff, 0xffff_f000),
            (0x1c, 0xffff_ffff, 0xffff_ffe1),
            (0x1c, 0x0000_0000, 0x0000_0001),
            (0x20, 0xffff_ffff, 0x0000_0000),
            (0x2c, 0xffff_ffff, 0x1100_1af4),
            (0x30, 0xffff_ffff, 0x0000_0000),
            (0x34, 0xffff_ffff, 0x0000_0040),
            (0x3c, 0xffff_ffff, 0x0000_01ff),
            (0x40, 0xffff_ffff, 0x0201_4809),
            (0x48, 0xffff_ffff, 0xc000_0011),
            (0xfc, 0xffff_ffff, 0x0000_0000),
        ] {
            let mut c = function();
            c.write(offset, &u32::to_le_bytes(written));
            assert_eq!(c.dword(offset), read, "{offset:#x}");
            c.reset();
            assert_eq!(c.dword(offset), function().dword(offset), "{offset:#x}");
        }
    }

    #[test]
    fn accesses_over_the_end_are_harmless() {
        let mut c = function();
        c.write(0xfe, &[1; 8]);
        c.write(0xffff, &[1; 8]);
        let mut d = [0; 4];
        c.read(0xfe, &mut d);
        assert_eq!(d, [0, 0, 0xff, 0xff]);
    }

    #[test]
    fn regions_follow_the_command_register_and_the_addresses() {
        let mut c = function();
        c.write(0x10, &0xc000_0000_u32.to_le_bytes());
        c.write(0x14, &1_u32.to_le_bytes());
        c.write(0x1c, &0xc000_u32.to_le_bytes());
        assert_eq!((c.region(0), c.region(3)), (None, None), "not enabled");
        c.write(COMMAND, &[3, 0]);
        let region = |space, start, len| Some(Region { space, start, len });
        assert_eq!(c.region(0), region(Space::Memory, 0x1_c000_0000, 0x8000));
        assert_eq!(c.region(2), None, "address 0");
        assert_eq!(c.region(3), region(Space::Ports, 0xc000, 32));
        assert_eq!(c.region(1), None, "the upper half of another");
        c.write(0x10, &[0xff; 8]);
        assert_eq!(c.region(0), None, "would wrap");
        c.write(0x1c, &0x1_0000_u32.to_le_bytes());
        assert_eq!(c.region(3), None, "beyond the last port");
    }

    #[test]
    fn only_the_same_function_takes_a_state() {
        let mut c = function();
        c.write(COMMAND, &[7, 0]);
        c.set_interrupt_status(true);
        let saved = c.save();
        let mut same = function();
        assert!(same.restore(&saved));
        assert_eq!(same.command(), 7);
        let mut other = function().with_bar(5, BarKind::Io, 16);
        assert!(!other.restore(&saved));
        assert!(!function().restore(&SavedConfig(vec![0; 255])));
    }
}
