//! QEMU's firmware configuration device, from which firmware and test guests read what the machine is like
//! (QEMU documentation, "QEMU Firmware Configuration (fw_cfg) Device"): the port interface and the DMA
//! interface, read-only.
//!
//! An item is bytes under a 16-bit key; files are items with a name in the directory. Reads beyond an item's
//! end give zeros. The items are configuration: the board adds them before the guest runs, and they are not
//! saved.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use lodger_address_space::BusTarget;
use lodger_device_model::{Device, GuestMistakes, Payload, RestoreError};
use lodger_guest_memory::GuestMemory;

/// The block of I/O ports: selector, data, and the DMA address at offset 4.
pub const FW_CFG_PORT: u16 = 0x510;
/// Length of the block.
pub const FW_CFG_LEN: u64 = 12;

/// Keys of items that have a fixed one. Numbers are little-endian.
pub mod fw_cfg_keys {
    /// `QEMU`.
    pub const SIGNATURE: u16 = 0;
    /// Interface features, 4 bytes: bit 0 ports, bit 1 DMA.
    pub const ID: u16 = 1;
    /// The machine's UUID, 16 bytes.
    pub const UUID: u16 = 2;
    /// RAM in bytes, 8 bytes.
    pub const RAM_SIZE: u16 = 3;
    /// 2 bytes, 1 if there is no display.
    pub const NO_GRAPHIC: u16 = 4;
    /// Number of CPUs that run at the start, 2 bytes.
    pub const CPUS: u16 = 5;
    /// Where to load the kernel's protected-mode part, 4 bytes.
    pub const KERNEL_ADDRESS: u16 = 7;
    /// Size of the kernel's protected-mode part, 4 bytes.
    pub const KERNEL_SIZE: u16 = 8;
    /// Where to load the initrd, 4 bytes.
    pub const INITRD_ADDRESS: u16 = 0xa;
    /// Size of the initrd, 4 bytes.
    pub const INITRD_SIZE: u16 = 0xb;
    /// Whether firmware shows a boot menu, 2 bytes.
    pub const BOOT_MENU: u16 = 0xe;
    /// Number of CPUs that there can be, or the highest APIC ID + 1; 2 bytes.
    pub const MAX_CPUS: u16 = 0xf;
    /// The kernel's protected-mode part.
    pub const KERNEL_DATA: u16 = 0x11;
    /// The initrd.
    pub const INITRD_DATA: u16 = 0x12;
    /// Where to load the command line, 4 bytes.
    pub const COMMAND_LINE_ADDRESS: u16 = 0x13;
    /// Size of the command line with its final zero, 4 bytes.
    pub const COMMAND_LINE_SIZE: u16 = 0x14;
    /// The command line, with its final zero.
    pub const COMMAND_LINE_DATA: u16 = 0x15;
    /// Where to load the kernel's real-mode part, 4 bytes.
    pub const SETUP_ADDRESS: u16 = 0x16;
    /// Size of the kernel's real-mode part, 4 bytes.
    pub const SETUP_SIZE: u16 = 0x17;
    /// The kernel's real-mode part.
    pub const SETUP_DATA: u16 = 0x18;
    /// The directory of files.
    pub const FILE_DIRECTORY: u16 = 0x19;
    /// The first file's key.
    pub const FIRST_FILE: u16 = 0x20;
}

use fw_cfg_keys as keys;

/// Selector bits that do not choose another item: "write mode", which has no effect.
const WRITE_MODE: u16 = 0x4000;
/// Keys below this are the general ones, of which files take the upper part.
const KEYS_END: u16 = 0x4000;
const NAME_LEN: usize = 56;
const FEATURES: u32 = 3;
/// What the DMA address register reads as, big-endian.
const DMA_SIGNATURE: &[u8; 8] = b"QEMU CFG";

const DMA_ERROR: u32 = 1;
const DMA_READ: u32 = 2;
const DMA_SKIP: u32 = 4;
const DMA_SELECT: u32 = 8;
const DMA_WRITE: u32 = 0x10;
/// How much is copied at a time.
const CHUNK: usize = 1 << 16;

const KIND: &str = "fw-cfg";

/// How a [`FwCfg`] is made.
pub struct FwCfgConfig {
    /// RAM in bytes.
    pub ram_size: u64,
    /// CPUs that run at the start.
    pub cpus: u16,
    /// CPUs that there can be.
    pub max_cpus: u16,
}

/// Why a file was not added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FwCfgError {
    /// The name is empty, longer than 55 bytes, or has a zero byte.
    #[error("{0:?} cannot be the name of a firmware configuration file")]
    Name(String),
    /// There is such a file already.
    #[error("there is a firmware configuration file {0:?} already")]
    Duplicate(String),
    /// No key is left, or the file is 4 GiB or longer.
    #[error("no room for the firmware configuration file {0:?}")]
    Full(String),
}

/// A firmware configuration device.
pub struct FwCfg {
    // Fixed configuration; the board fills it while it builds the machine.
    items: RwLock<Items>,

    // Runtime glue.
    memory: GuestMemory,
    mistakes: GuestMistakes,

    // Volatile state.
    registers: Mutex<Registers>,
}

struct Items {
    by_key: BTreeMap<u16, Arc<[u8]>>,
    /// Names and keys of the files, in the order of adding.
    files: Vec<(String, u16)>,
}

#[derive(Default)]
struct Registers {
    selected: u16,
    offset: u64,
    /// The upper half of the DMA address, until the lower half comes.
    dma_high: u32,
}

mod saved {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    pub(super) struct V1 {
        pub(super) selected: u16,
        pub(super) offset: u64,
        pub(super) dma_high: u32,
    }
}

impl FwCfg {
    /// A device with the items that `config` gives; DMA goes to `memory`.
    pub fn new(config: FwCfgConfig, memory: GuestMemory) -> Arc<FwCfg> {
        let device = FwCfg {
            items: RwLock::new(Items {
                by_key: BTreeMap::new(),
                files: Vec::new(),
            }),
            memory,
            mistakes: GuestMistakes::default(),
            registers: Mutex::default(),
        };
        device.set_item(keys::SIGNATURE, *b"QEMU");
        device.set_item(keys::ID, FEATURES.to_le_bytes());
        device.set_item(keys::RAM_SIZE, config.ram_size.to_le_bytes());
        device.set_item(keys::NO_GRAPHIC, 1_u16.to_le_bytes());
        device.set_item(keys::CPUS, config.cpus.to_le_bytes());
        device.set_item(keys::MAX_CPUS, config.max_cpus.to_le_bytes());
        device.set_item(keys::FILE_DIRECTORY, 0_u32.to_be_bytes());
        Arc::new(device)
    }

    /// Sets the item under `key`, one of [`fw_cfg_keys`] or (from 0x8000) of the architecture's own.
    pub fn set_item(&self, key: u16, data: impl Into<Arc<[u8]>>) {
        self.items().by_key.insert(key, data.into());
    }

    /// Adds a file, such as `etc/e820`.
    pub fn add_file(&self, name: &str, data: impl Into<Arc<[u8]>>) -> Result<(), FwCfgError> {
        let data = data.into();
        if name.is_empty() || name.len() >= NAME_LEN || name.contains('\0') {
            return Err(FwCfgError::Name(name.into()));
        }
        let mut items = self.items();
        if items.files.iter().any(|(other, _)| other == name) {
            return Err(FwCfgError::Duplicate(name.into()));
        }
        let full = || FwCfgError::Full(name.into());
        let next = keys::FIRST_FILE as usize + items.files.len();
        let key = u16::try_from(next).map_err(|_| full())?;
        if key >= KEYS_END || u32::try_from(data.len()).is_err() {
            return Err(full());
        }
        items.by_key.insert(key, data);
        items.files.push((name.into(), key));
        let directory = items.directory();
        items.by_key.insert(keys::FILE_DIRECTORY, directory.into());
        Ok(())
    }

    fn items(&self) -> std::sync::RwLockWriteGuard<'_, Items> {
        // Every change leaves the items whole, so a panic elsewhere does not matter.
        self.items.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn item(&self, selected: u16) -> Arc<[u8]> {
        let items = self.items.read().unwrap_or_else(PoisonError::into_inner);
        let item = items.by_key.get(&(selected & !WRITE_MODE));
        item.cloned().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .expect("a user of the firmware configuration panicked")
    }

    /// Carries out the transfer that the structure at `address` describes, and writes the outcome into it.
    fn transfer(&self, registers: &mut Registers, address: u64) {
        let mut request = [0; 16];
        let done = match self.memory.read(address, &mut request) {
            Ok(()) => self.run_request(registers, &request),
            Err(_) => false,
        };
        let outcome = if done { 0 } else { DMA_ERROR };
        let told = self.memory.write(address, &outcome.to_be_bytes());
        if !done || told.is_err() {
            let what = format_args!("bad DMA request at {address:#x}: {request:02x?}");
            self.mistakes.note(self.name(), what);
        }
    }

    fn run_request(&self, registers: &mut Registers, request: &[u8; 16]) -> bool {
        let [control, length, high, low] = [0, 4, 8, 12].map(|at| {
            let bytes = [0, 1, 2, 3].map(|i| request[at + i]);
            u32::from_be_bytes(bytes)
        });
        let address = u64::from(high) << 32 | u64::from(low);
        if control & DMA_SELECT != 0 {
            registers.select((control >> 16) as u16);
        }
        if control & DMA_READ != 0 {
            self.copy(registers, address, length as usize)
        } else if control & DMA_WRITE != 0 {
            // There are no items that can be written.
            false
        } else {
            if control & DMA_SKIP != 0 {
                registers.skip(length.into());
            }
            true
        }
    }

    /// Copies the next `length` bytes of the selected item to guest memory. All of the destination must be RAM.
    fn copy(&self, registers: &mut Registers, address: u64, length: usize) -> bool {
        if length == 0 {
            return true;
        }
        if !self.memory.contains(address, length) {
            return false;
        }
        let item = self.item(registers.selected);
        let mut chunk = vec![0; length.min(CHUNK)];
        for start in (0..length).step_by(CHUNK) {
            let part = &mut chunk[..CHUNK.min(length - start)];
            registers.take(&item, part);
            if self.memory.write(address + start as u64, part).is_err() {
                return false;
            }
        }
        true
    }
}

impl Items {
    /// The directory: the number of files; for each its size, key, two reserved bytes and its name; big-endian.
    fn directory(&self) -> Vec<u8> {
        let mut bytes = (self.files.len() as u32).to_be_bytes().to_vec();
        for (name, key) in &self.files {
            let size = self.by_key[key].len() as u32;
            bytes.extend(size.to_be_bytes());
            bytes.extend(key.to_be_bytes());
            bytes.extend([0, 0]);
            let mut padded = [0; NAME_LEN];
            padded[..name.len()].copy_from_slice(name.as_bytes());
            bytes.extend(padded);
        }
        bytes
    }
}

impl Registers {
    fn select(&mut self, key: u16) {
        self.selected = key;
        self.offset = 0;
    }

    fn skip(&mut self, count: u64) {
        self.offset = self.offset.saturating_add(count);
    }

    /// Fills `data` with the next bytes of `item`.
    fn take(&mut self, item: &[u8], data: &mut [u8]) {
        let start = usize::try_from(self.offset).unwrap_or(usize::MAX);
        let rest = item.get(start..).unwrap_or_default();
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
        data[len..].fill(0);
        self.skip(data.len() as u64);
    }
}

impl BusTarget for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut registers = self.lock();
        match offset {
            1 => {
                let item = self.item(registers.selected);
                registers.take(&item, data);
            }
            _ => {
                for (at, byte) in (offset..).zip(data) {
                    *byte = match at {
                        4..12 => DMA_SIGNATURE[(at - 4) as usize],
                        _ => 0,
                    };
                }
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.lock();
        match (offset, data) {
            (0, &[low, high]) => registers.select(u16::from_le_bytes([low, high])),
            (4, &[a, b, c, d]) => registers.dma_high = u32::from_be_bytes([a, b, c, d]),
            (8, &[a, b, c, d]) => {
                let low = u32::from_be_bytes([a, b, c, d]);
                let high = std::mem::take(&mut registers.dma_high);
                self.transfer(&mut registers, u64::from(high) << 32 | u64::from(low));
            }
            _ => {}
        }
    }
}

impl Device for FwCfg {
    fn name(&self) -> &str {
        "fw-cfg"
    }

    fn reset(&self) {
        *self.lock() = Registers::default();
    }

    fn save(&self) -> Payload {
        let Registers {
            selected,
            offset,
            dma_high,
        } = *self.lock();
        let state = saved::V1 {
            selected,
            offset,
            dma_high,
        };
        Payload::encode(KIND, 1, &state)
    }

    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved::V1 {
            selected,
            offset,
            dma_high,
        } = payload.decode(KIND, 1)?;
        *self.lock() = Registers {
            selected,
            offset,
            dma_high,
        };
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
    use lodger_guest_memory::RamRange;

    fn rig() -> (Rig, Arc<FwCfg>, GuestMemory) {
        let rig = Rig::new();
        let ram = RamRange {
            start: 0,
            len: 0x10_0000,
        };
        let memory = GuestMemory::new(&[ram]).unwrap();
        let config = FwCfgConfig {
            ram_size: 0x2000_0000,
            cpus: 3,
            max_cpus: 7,
        };
        let device = FwCfg::new(config, memory.clone());
        device.add_file("etc/e820", *b"map").unwrap();
        device.add_file("opt/big", vec![0x5a; 200_000]).unwrap();
        device.set_item(fw_cfg_keys::KERNEL_DATA, *b"kernel");
        let ports = &rig.space.ports;
        ports
            .map(FW_CFG_PORT.into(), FW_CFG_LEN, device.clone() as _)
            .unwrap();
        (rig, device, memory)
    }

    /// Words: `mem ADDRESS LEN` (memory), `dma AT CONTROL LENGTH ADDRESS` (puts a request at AT and starts
    /// it; answers the control field afterwards).
    fn run(rig: &Rig, memory: &GuestMemory, script: &str) {
        let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
        rig.run_with(script, |words| match words[0] {
            "mem" => {
                let mut data = vec![0; number(words[2]) as usize];
                memory.read(number(words[1]), &mut data).unwrap();
                data.iter().map(|b| format!("{b:02x}")).collect()
            }
            "dma" => {
                let at = number(words[1]);
                let mut request = vec![];
                request.extend((number(words[2]) as u32).to_be_bytes());
                request.extend((number(words[3]) as u32).to_be_bytes());
                request.extend(number(words[4]).to_be_bytes());
                memory.write(at, &request).unwrap();
                let ports = &rig.space.ports;
                ports.write(0x514, &((at >> 32) as u32).to_be_bytes());
                ports.write(0x518, &(at as u32).to_be_bytes());
                format!("{:x}", memory.read_u32(at).unwrap().swap_bytes())
            }
            other => panic!("{other}"),
        });
    }

    #[test]
    fn register_scripts() {
        for (what, script) in [
            (
                "signature, features, machine",
                "r 511 = 51; r 511 = 45; r 511 = 4d; r 511 = 55; r 511 = 00; w 510 0001; r 511 = 03;
                 r 511 = 00; w 510 0003; r 511 = 20000000; w 510 0005; r 511 = 0003; w 510 000f;
                 r 511 = 0007; w 510 400f; r 511 = 0007; w 510 1234; r 511 = 0000; w 510 ffff; r 511 = 00",
            ),
            (
                "the directory and a file",
                "w 510 0019; r 511 = 02000000; r 511 = 03000000; r 511 = 00002000; r 511 = 2f637465;
                 r 511 = 30323865; r 511 = 00; w 510 0020; r 511 = 6d; r 511 = 00007061; w 510 0020;
                 r 511 = 6d",
            ),
            (
                "ports without meaning",
                "r 510 = 00; r 512 = 0000; w 510 55; w 511 55; w 512 1234; r 514 = 554d4551;
                 r 518 = 47464320; r 51b = 47",
            ),
            (
                "DMA: select and read, read on, skip, beyond the end",
                "dma 1000 0011000a 3 2000 = 0; mem 2000 4 = 6b657200; dma 1000 4 1 0 = 0;
                 dma 1000 2 4 2010 = 0; mem 2010 4 = 656c0000; dma 1000 00200008 0 0 = 0; r 511 = 6d;
                 dma 1000 2 0 ffffffff00000000 = 0; dma 1000 0 5 0 = 0",
            ),
            (
                "DMA of much",
                "dma 1000 0021000a 30d50 10000 = 0; mem 40d3e 4 = 5a5a0000; mem 40d60 1 = 00;
                 dma 1000 00210004 ffffffff 0 = 0",
            ),
            (
                "DMA that goes nowhere changes nothing but the error bit",
                "dma 1000 0021000a ffffffff 2000 = 1; mem 2000 1 = 00;
                 dma 1000 0021000a 1 fffffffffffffff0 = 1; dma 1000 0021000a 100 fff01 = 1;
                 mem fff01 1 = 00; dma 1000 00200018 1 2000 = 1; dma ffff0 0020000a 10 fffc8 = 0;
                 w 514 ffffffff; w 518 ffffffff; w 518 0000ffff; w 514 1234",
            ),
        ] {
            let (rig, _device, memory) = rig();
            println!("{what}");
            run(&rig, &memory, script);
        }
    }

    #[test]
    fn files_that_cannot_be_are_refused() {
        let (_rig, device, _memory) = rig();
        let long = "x".repeat(56);
        let add = |name: &str| device.add_file(name, *b"x");
        for name in ["", "a\0b", &long] {
            assert_eq!(add(name), Err(FwCfgError::Name(name.into())));
        }
        assert_eq!(
            add("etc/e820"),
            Err(FwCfgError::Duplicate("etc/e820".into()))
        );
        assert_eq!(add(&long[1..]), Ok(()));
    }

    #[test]
    fn state_survives() {
        let (rig, device, memory) = rig();
        run(&rig, &memory, "w 510 0011; r 511 = 6b; w 514 01000000");
        assert_round_trip(&*device);
        run(
            &rig,
            &memory,
            "r 511 = 65; w 518 00000000; mem 0 4 = 00000000",
        );
    }

    #[test]
    fn hostile_accesses() {
        let (rig, device, memory) = rig();
        let mut random = crate::testing::Random(7);
        let noise: Vec<u8> = (0..0x10_0000).map(|_| random.next() as u8).collect();
        memory.write(0, &noise).unwrap();
        rig.hammer(&[(FW_CFG_PORT.into(), FW_CFG_LEN)], &[], &[&*device]);
    }
}
