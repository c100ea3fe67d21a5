//! The tables as an operating system finds them: from the RSDP on, by address.

use super::*;

fn config(vcpus: u32) -> AcpiConfig {
    AcpiConfig {
        vcpus,
        local_apic: 0xfee0_0000,
        ioapic: IoApic {
            id: 0,
            address: 0xfec0_0000,
        },
        hpet: Some(Hpet {
            address: 0xfed0_0000,
            block_id: 0x8086_a201,
        }),
        pm: PmPorts {
            event: 0x600,
            control: 0x604,
            timer: 0x608,
            gpe0: 0x620,
            gpe0_len: 16,
        },
        sci: Sci {
            irq: 9,
            active_low: false,
        },
        ecam: Some(Ecam {
            base: 0xe000_0000,
            last_bus: 255,
        }),
        pci: PciHost {
            mmio32: 0xc000_0000..=0xdfff_ffff,
            mmio64: Some(0x80_0000_0000..=0xff_ffff_ffff),
            intx: [16, 17, 18, 19],
        },
        serial: vec![Serial {
            port: 0x3f8,
            irq: 4,
        }],
        i8042: false,
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Memory that holds nothing but tables, and the address of its first byte.
struct Memory<'a> {
    base: u64,
    bytes: &'a [u8],
}

impl<'a> Memory<'a> {
    /// The table at `address`, of which the length and (but for the FACS) the checksum are right.
    fn table(&self, address: u64) -> &'a [u8] {
        let at = usize::try_from(address.checked_sub(self.base).unwrap()).unwrap();
        let len = u32_at(self.bytes, at + 4) as usize;
        let table = &self.bytes[at..at + len];
        if !table.starts_with(b"FACS") {
            assert_eq!(sum(table), 0, "checksum of {:?}", signature(table));
        }
        table
    }

    /// Every table that is reachable from the XSDT.
    fn walk(&self, xsdt: u64) -> Vec<&'a [u8]> {
        let xsdt = self.table(xsdt);
        assert_eq!(signature(xsdt), "XSDT");
        let entries = xsdt[36..].chunks_exact(8);
        let mut tables: Vec<_> = entries.map(|e| self.table(u64_at(e, 0))).collect();
        let fadt = tables[0];
        assert_eq!(signature(fadt), "FACP");
        assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140));
        tables.push(self.table(u64_at(fadt, 140)));
        let facs = u64::from(u32_at(fadt, 36));
        assert_eq!(facs % 64, 0);
        tables.push(self.table(facs));
        tables
    }
}

fn signature(table: &[u8]) -> &str {
    std::str::from_utf8(&table[..4]).unwrap()
}

fn find<'a>(tables: &[&'a [u8]], name: &str) -> &'a [u8] {
    tables.iter().find(|t| signature(t) == name).unwrap()
}

fn walk(tables: &Tables) -> Vec<&[u8]> {
    let rsdp = tables.rsdp();
    assert!(rsdp.starts_with(b"RSD PTR "));
    assert_eq!((sum(&rsdp[..20]), sum(rsdp), rsdp[15]), (0, 0, 2));
    let memory = Memory {
        base: tables.base.into(),
        bytes: &tables.bytes,
    };
    memory.walk(u64_at(rsdp, 24))
}

#[test]
fn every_table_is_reached_from_the_rsdp() {
    for base in [0, 0xe0000, 0x3fff_0000] {
        let tables = build(&config(4), base);
        let names: Vec<_> = walk(&tables).iter().map(|t| signature(t)).collect();
        assert_eq!(names, ["FACP", "APIC", "HPET", "MCFG", "DSDT", "FACS"]);
    }
}

#[test]
fn what_the_board_has_not_is_not_described() {
    let bare = AcpiConfig {
        hpet: None,
        ecam: None,
        serial: vec![],
        ..config(1)
    };
    let tables = build(&bare, 0xe0000);
    let tables = walk(&tables);
    let names: Vec<_> = tables.iter().map(|t| signature(t)).collect();
    assert_eq!(names, ["FACP", "APIC", "DSDT", "FACS"]);
    let has = |needle: &[u8]| {
        let dsdt = find(&tables, "DSDT");
        dsdt.windows(needle.len()).any(|w| w == needle)
    };
    for absent in [b"HPET", b"COM1", b"KBD_", b"_OSC"] {
        assert!(!has(absent), "{absent:?}");
    }
    for present in [b"RTC_", b"TIMR", b"PIC_", b"_PRT", b"_S5_"] {
        assert!(has(present), "{present:?}");
    }
}

#[test]
fn the_fadt_names_the_fixed_hardware() {
    let tables = build(&config(1), 0);
    let tables = walk(&tables);
    let fadt = find(&tables, "FACP");
    assert_eq!((fadt.len(), fadt[8]), (276, 6));
    let dwords = [(48, 0), (56, 0x600), (64, 0x604), (76, 0x608), (80, 0x620)];
    for (at, value) in dwords {
        assert_eq!(u32_at(fadt, at), value, "offset {at}");
    }
    // SCI_INT; event, control, timer and GPE0 lengths; century; boot flags; reset value.
    let bytes = [
        (46, 9),
        (88, 4),
        (89, 2),
        (91, 4),
        (92, 16),
        (108, 0x32),
        (109, 0x15),
        (128, 6),
    ];
    for (at, value) in bytes {
        assert_eq!(fadt[at], value, "offset {at}");
    }
    // Generic addresses: I/O space, width, offset, access size, port.
    let registers: [(usize, [u8; 4], u64); 5] = [
        (116, [1, 8, 0, 1], 0xcf9),
        (148, [1, 32, 0, 2], 0x600),
        (172, [1, 16, 0, 2], 0x604),
        (208, [1, 32, 0, 3], 0x608),
        (220, [1, 128, 0, 1], 0x620),
    ];
    for (at, kind, port) in registers {
        assert_eq!((&fadt[at..at + 4], u64_at(fadt, at + 4)), (&kind[..], port));
    }
    assert_ne!(u32_at(fadt, 112) & 1 << 10, 0, "RESET_REG_SUP");
    assert_eq!(u32_at(fadt, 112) & 1 << 20, 0, "not hardware-reduced");
}

/// The entries of a MADT.
fn madt_entries(madt: &[u8]) -> Vec<&[u8]> {
    let mut rest = &madt[44..];
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (entry, after) = rest.split_at(rest[1].into());
        entries.push(entry);
        rest = after;
    }
    entries
}

#[test]
fn the_madt_lists_every_vcpu_once() {
    for vcpus in [1, 4, 255, 256, 300] {
        let tables = build(&config(vcpus), 0);
        let tables = walk(&tables);
        let entries = madt_entries(find(&tables, "APIC"));
        let ids = entries.iter().filter_map(|e| match e[0] {
            0 => Some((e[3].into(), e[2].into(), u32_at(e, 4))),
            9 => Some((u32_at(e, 4), u32_at(e, 12), u32_at(e, 8))),
            _ => None,
        });
        let expected = (0..vcpus).map(|id| (id, id, 1));
        assert!(ids.eq(expected), "{vcpus} vCPUs");
        let x2apic_nmi = entries.iter().filter(|e| e[0] == 10).count();
        assert_eq!(x2apic_nmi, usize::from(vcpus > 255));
    }
}

#[test]
fn the_madt_routes_the_isa_interrupts() {
    for (active_low, flags) in [(false, 0xd), (true, 0xf)] {
        let mut config = config(1);
        config.sci.active_low = active_low;
        let tables = build(&config, 0);
        let tables = walk(&tables);
        let entries = madt_entries(find(&tables, "APIC"));
        for expected in [
            &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0][..],
            &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
            &[2, 10, 0, 9, 9, 0, 0, 0, flags, 0],
            &[4, 6, 0xff, 0, 0, 1],
        ] {
            assert!(entries.contains(&expected), "{expected:?}");
        }
    }
}

#[test]
fn timers_and_configuration_space_are_where_the_board_says() {
    let tables = build(&config(1), 0);
    let tables = walk(&tables);
    let hpet = find(&tables, "HPET");
    assert_eq!(
        (u32_at(hpet, 36), u64_at(hpet, 44)),
        (0x8086_a201, 0xfed0_0000)
    );
    let mcfg = find(&tables, "MCFG");
    assert_eq!(
        (u64_at(mcfg, 44), mcfg[54], mcfg[55]),
        (0xe000_0000, 0, 255)
    );
}

#[test]
fn intx_pins_are_swizzled_over_four_gsis() {
    let config = config(1);
    for (device, pin, gsi) in [(0, 0, 16), (1, 0, 17), (3, 3, 18), (31, 1, 16)] {
        assert_eq!(config.intx_gsi(device, pin), gsi, "{device} {pin}");
    }
}

/// What firmware does with the three files.
fn link(files: &[FwCfgFile; 3], tables_at: u32) -> (Vec<u8>, Vec<u8>) {
    let [tables, rsdp, script] = files.clone();
    let mut contents = [tables, rsdp];
    let name = |field: &[u8]| {
        let end = field.iter().position(|b| *b == 0).unwrap();
        String::from_utf8(field[..end].to_vec()).unwrap()
    };
    let mut allocated = Vec::new();
    for command in script.bytes.chunks(128) {
        assert_eq!(command.len(), 128);
        let file = name(&command[4..60]);
        if u32_at(command, 0) == 1 {
            allocated.push((file, u32_at(command, 60), command[64]));
            continue;
        }
        let target = contents.iter_mut().find(|f| f.name == file).unwrap();
        match u32_at(command, 0) {
            2 => {
                assert_eq!(name(&command[60..116]), "etc/acpi/tables");
                let (at, size) = (u32_at(command, 116) as usize, command[120].into());
                let mut value = [0; 8];
                value[..size].copy_from_slice(&target.bytes[at..at + size]);
                let value = u64::from_le_bytes(value) + u64::from(tables_at);
                target.bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
            }
            3 => {
                let [at, start, len] = [60, 64, 68].map(|at| u32_at(command, at) as usize);
                let wrong = sum(&target.bytes[start..start + len]);
                target.bytes[at] = target.bytes[at].wrapping_sub(wrong);
            }
            kind => panic!("command {kind}"),
        }
    }
    assert_eq!(
        allocated,
        [
            ("etc/acpi/tables".to_string(), 64, 1),
            ("etc/acpi/rsdp".to_string(), 16, 2)
        ]
    );
    let [tables, rsdp] = contents;
    (tables.bytes, rsdp.bytes)
}

#[test]
fn firmware_links_the_tables_that_are_built_directly() {
    let config = config(2);
    let (bytes, rsdp) = link(&fw_cfg_files(&config), 0x7fe_0040);
    let direct = build(&config, 0x7fe_0000);
    assert_eq!(bytes, direct.bytes[64..]);
    assert_eq!(rsdp, direct.rsdp());
    let memory = Memory {
        base: 0x7fe_0040,
        bytes: &bytes,
    };
    assert_eq!(memory.walk(u64_at(&rsdp, 24)).len(), 6);
}
