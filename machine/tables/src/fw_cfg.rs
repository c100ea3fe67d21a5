//! The same tables for firmware: the three files from which it places and links them itself.
//!
//! `etc/acpi/tables` and `etc/acpi/rsdp` hold tables whose addresses count from the start of the former;
//! `etc/table-loader` is the script: commands of 128 bytes, as SeaBIOS's `romfile_loader.h` defines them.

use acpi_tables::rsdp::Rsdp;

use crate::acpi::{OEM_ID, TableSet, encode};
use crate::config::AcpiConfig;

/// A file to offer over `fw_cfg`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FwCfgFile {
    /// Its name.
    pub name: &'static str,
    /// Its contents.
    pub bytes: Vec<u8>,
}

const TABLES: &str = "etc/acpi/tables";
const RSDP: &str = "etc/acpi/rsdp";
const LOADER: &str = "etc/table-loader";

const COMMAND_LEN: usize = 128;
const NAME_LEN: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Zones of [`ALLOCATE`].
const HIGH_MEMORY: u8 = 1;
const F_SEGMENT: u8 = 2;

/// The files that describe `config` to firmware.
pub fn fw_cfg_files(config: &AcpiConfig) -> [FwCfgFile; 3] {
    let set = TableSet::new(config, 0);
    let mut script = Script::default();
    script.allocate(TABLES, 64, HIGH_MEMORY);
    script.allocate(RSDP, 16, F_SEGMENT);
    for &(offset, size) in &set.pointers {
        script.add_pointer(TABLES, offset, size);
    }
    for &(offset, len) in &set.tables {
        script.add_checksum(TABLES, offset + 9, offset, len);
    }
    // The RSDP: XSDT address; checksum of the first 20 bytes; checksum of all.
    script.add_pointer(RSDP, 24, 8);
    script.add_checksum(RSDP, 8, 0, 20);
    script.add_checksum(RSDP, 32, 0, 36);
    [
        (TABLES, set.bytes),
        (RSDP, encode(&Rsdp::new(OEM_ID, set.xsdt.into()))),
        (LOADER, script.0),
    ]
    .map(|(name, bytes)| FwCfgFile { name, bytes })
}

#[derive(Default)]
struct Script(Vec<u8>);

impl Script {
    /// Appends a command and pads it.
    fn command(&mut self, kind: u32, parts: &[&[u8]]) {
        let end = self.0.len() + COMMAND_LEN;
        self.0.extend(kind.to_le_bytes());
        for part in parts {
            self.0.extend_from_slice(part);
        }
        self.0.resize(end, 0);
    }

    fn allocate(&mut self, file: &str, alignment: u32, zone: u8) {
        self.command(ALLOCATE, &[&name(file), &alignment.to_le_bytes(), &[zone]]);
    }

    /// Adds the address of [`TABLES`] to the `size` bytes at `offset` of `file`.
    fn add_pointer(&mut self, file: &str, offset: usize, size: u8) {
        let offset = (offset as u32).to_le_bytes();
        self.command(ADD_POINTER, &[&name(file), &name(TABLES), &offset, &[size]]);
    }

    /// Sets the byte at `at` so that `len` bytes from `start` on add up to zero.
    fn add_checksum(&mut self, file: &str, at: usize, start: usize, len: usize) {
        let fields = [at, start, len].map(|field| (field as u32).to_le_bytes());
        self.command(
            ADD_CHECKSUM,
            &[&name(file), &fields[0], &fields[1], &fields[2]],
        );
    }
}

fn name(file: &str) -> [u8; NAME_LEN] {
    let mut field = [0; NAME_LEN];
    field[..file.len()].copy_from_slice(file.as_bytes());
    field
}
