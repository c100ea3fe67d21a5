//! The fixed-layout tables and how they lie in memory: RSDP, XSDT, FADT, FACS, MADT, HPET, MCFG (ACPI 6.5,
//! chapter 5; HPET specification 3.2.4; PCI Firmware specification 4.1.2).
//!
//! The `acpi_tables` crate gives the structures. Its MADT knows neither interrupt source overrides nor x2APICs, so
//! MADT entries are written here.

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::{GenericAddress, Sdt};
use acpi_tables::xsdt::XSDT;

use crate::config::AcpiConfig;
use crate::dsdt;

pub(crate) const OEM_ID: [u8; 6] = *b"LODGER";
pub(crate) const OEM_TABLE_ID: [u8; 8] = *b"LODGERVM";
pub(crate) const OEM_REVISION: u32 = 1;

/// Bytes in an RSDP.
pub const RSDP_LEN: usize = 36;
/// The strictest alignment of a table: the FACS's.
const ALIGNMENT: usize = 64;

/// ACPI tables ready to be copied into guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// Guest-physical address of the first byte. The RSDP is there.
    pub base: u32,
    /// The RSDP and the tables.
    pub bytes: Vec<u8>,
}

impl Tables {
    /// Guest-physical address of the RSDP.
    pub fn rsdp_address(&self) -> u32 {
        self.base
    }

    /// A copy of the RSDP. Its place does not matter: firmware puts it where the operating system searches, which
    /// on a PC is at a multiple of 16 from 0xe0000 to 0xfffff.
    pub fn rsdp(&self) -> &[u8] {
        &self.bytes[..RSDP_LEN]
    }
}

/// Builds the tables that describe `config`, to be copied to guest-physical `base`, a multiple of 64. Their size
/// does not depend on `base`.
///
/// # Panics
/// If `base` is not aligned or the tables would cross 4 GiB.
pub fn build(config: &AcpiConfig, base: u32) -> Tables {
    assert!(
        (base as usize).is_multiple_of(ALIGNMENT),
        "ACPI tables at {base:#x}"
    );
    let tables = TableSet::new(config, base + ALIGNMENT as u32);
    let mut bytes = encode(&Rsdp::new(OEM_ID, tables.xsdt.into()));
    bytes.resize(ALIGNMENT, 0);
    bytes.extend_from_slice(&tables.bytes);
    Tables { base, bytes }
}

/// All tables but the RSDP, one after the other.
pub(crate) struct TableSet {
    base: u32,
    pub(crate) bytes: Vec<u8>,
    /// Offset and length of each table that has a checksum.
    pub(crate) tables: Vec<(usize, usize)>,
    /// Offset and size of each field that holds the address of a table.
    pub(crate) pointers: Vec<(usize, u8)>,
    /// Address of the XSDT.
    pub(crate) xsdt: u32,
}

impl TableSet {
    pub(crate) fn new(config: &AcpiConfig, base: u32) -> TableSet {
        let mut set = TableSet {
            base,
            bytes: Vec::new(),
            tables: Vec::new(),
            pointers: Vec::new(),
            xsdt: 0,
        };
        // The FACS alone has no checksum.
        let facs = set.append(&encode(&FACS::new()));
        let dsdt = set.add(&dsdt::build(config));
        let fadt_offset = set.next_offset();
        let mut entries = vec![set.add(&fadt(config, facs, dsdt))];
        // FIRMWARE_CTRL, DSDT and X_DSDT.
        set.pointers
            .extend([(36, 4), (40, 4), (140, 8)].map(|(at, size)| (fadt_offset + at, size)));
        entries.push(set.add(&madt(config)));
        if let Some(hpet) = &config.hpet {
            let mut table = Sdt::new(*b"HPET", 56, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
            table.write_u32(36, hpet.block_id);
            let address = GenericAddress::mmio_address::<u64>(hpet.address.into());
            table.write_bytes(40, &encode_address(&address));
            entries.push(set.add(table.as_slice()));
        }
        if let Some(ecam) = &config.ecam {
            let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
            table.add_ecam(ecam.base.into(), 0, 0, ecam.last_bus);
            entries.push(set.add(&encode(&table)));
        }
        let xsdt_offset = set.next_offset();
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        for (i, entry) in entries.into_iter().enumerate() {
            xsdt.add_entry(entry.into());
            set.pointers.push((xsdt_offset + 36 + 8 * i, 8));
        }
        set.xsdt = set.add(&encode(&xsdt));
        set
    }

    fn next_offset(&self) -> usize {
        self.bytes.len().next_multiple_of(ALIGNMENT)
    }

    fn append(&mut self, table: &[u8]) -> u32 {
        let offset = self.next_offset();
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(table);
        let end = u32::try_from(self.bytes.len()).ok();
        let end = end.and_then(|len| self.base.checked_add(len));
        assert!(end.is_some(), "ACPI tables cross 4 GiB");
        self.base + offset as u32
    }

    fn add(&mut self, table: &[u8]) -> u32 {
        self.tables.push((self.next_offset(), table.len()));
        self.append(table)
    }
}

/// The bytes of `object`.
pub(crate) fn encode(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

fn encode_address(address: &GenericAddress) -> Vec<u8> {
    let mut bytes = vec![
        address.address_space_id,
        address.register_bit_width,
        address.register_bit_offset,
        address.access_size,
    ];
    bytes.extend_from_slice(&{ address.address }.to_le_bytes());
    bytes
}

fn fadt(config: &AcpiConfig, facs: u32, dsdt: u32) -> Vec<u8> {
    /// IAPC_BOOT_ARCH (ACPI 6.5, 5.2.9.3).
    const LEGACY_DEVICES: u16 = 1;
    const HAS_8042: u16 = 1 << 1;
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    const NO_ASPM: u16 = 1 << 4;
    /// Index of the century in CMOS.
    const CENTURY: u8 = 0x32;

    let pm = &config.pm;
    let port = |address: u16, bytes: u8, access| {
        let address = u64::from(address);
        GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, address)
    };
    let mut f = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::Unspecified)
        .firmware_ctrl_32(facs)
        .dsdt_64(dsdt.into())
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // No sleep button; a power button as fixed hardware.
        .flag(Flags::SlpButton)
        // The RTC's alarm does not wake through the fixed hardware.
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    f.dsdt = dsdt.into();
    f.sci_int = u16::from(config.sci.irq).into();
    f.pm1a_evt_blk = u32::from(pm.event).into();
    f.pm1_evt_len = 4;
    f.x_pm1a_evt_blk = port(pm.event, 4, AccessSize::WordAccess);
    f.pm1a_cnt_blk = u32::from(pm.control).into();
    f.pm1_cnt_len = 2;
    f.x_pm1a_cnt_blk = port(pm.control, 2, AccessSize::WordAccess);
    f.pm_tmr_blk = u32::from(pm.timer).into();
    f.pm_tmr_len = 4;
    f.x_pm_tmr_blk = port(pm.timer, 4, AccessSize::DwordAccess);
    if pm.gpe0_len > 0 {
        f = f.gpe_info(pm.gpe0.into(), 0, pm.gpe0_len, 0, 0);
        f.x_gpe0_blk = port(pm.gpe0, pm.gpe0_len, AccessSize::ByteAccess);
    }
    // Beyond 100 and 1000: there is no C2 and no C3.
    f.p_lvl2_lat = 0xfff.into();
    f.p_lvl3_lat = 0xfff.into();
    f.century = CENTURY;
    let keyboard = if config.i8042 { HAS_8042 } else { 0 };
    f.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT | NO_ASPM | keyboard).into();
    f.reset_reg = port(0xcf9, 1, AccessSize::ByteAccess);
    f.reset_value = 6;
    debug_assert_eq!(FADT::len(), 276);
    encode(&f.finalize())
}

fn madt(config: &AcpiConfig) -> Vec<u8> {
    /// The machine also has 8259s.
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    /// MPS INTI flags: polarity and trigger mode.
    const HIGH: u8 = 1;
    const LOW: u8 = 3;
    const LEVEL: u8 = 3 << 2;
    /// The largest ID of a local APIC entry; 255 means all processors.
    const LAST_XAPIC: u32 = 254;

    let mut table = Sdt::new(*b"APIC", 44, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.write_u32(36, config.local_apic);
    table.write_u32(40, PCAT_COMPAT);
    let mut entries = Vec::new();
    for id in 0..config.vcpus {
        if id <= LAST_XAPIC {
            entries.extend([0, 8, id as u8, id as u8]);
            entries.extend(ENABLED.to_le_bytes());
        } else {
            entries.extend([9, 16, 0, 0]);
            for field in [id, ENABLED, id] {
                entries.extend(field.to_le_bytes());
            }
        }
    }
    entries.extend([1, 12, config.ioapic.id, 0]);
    entries.extend(config.ioapic.address.to_le_bytes());
    entries.extend(0u32.to_le_bytes());
    // Interrupt source overrides: bus 0 (ISA), source, GSI, flags.
    entries.extend([2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    let polarity = if config.sci.active_low { LOW } else { HIGH };
    let irq = config.sci.irq;
    entries.extend([2, 10, 0, irq, irq, 0, 0, 0, polarity | LEVEL, 0]);
    // NMI is LINT1 of every local APIC.
    entries.extend([4, 6, 0xff, 0, 0, 1]);
    if config.vcpus > LAST_XAPIC + 1 {
        entries.extend([0xa, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    table.append_slice(&entries);
    table.as_slice().to_vec()
}
