//! The DSDT: the devices that no bus can enumerate, and the PCI root bridge (ACPI 6.5, chapters 6 and 19; PCI
//! Firmware specification 4.5 for `_OSC`).

use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else,
    Equal, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, Or, Package, Path,
    ResourceTemplate, Return, Scope, Store, Uuid,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use crate::acpi::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, encode};
use crate::config::{AcpiConfig, PmPorts};

/// AML that is already encoded.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Children of an AML object, of any kind.
#[derive(Default)]
struct Children(Vec<Encoded>);

impl Children {
    fn push(&mut self, child: &dyn Aml) {
        self.0.push(Encoded(encode(child)));
    }

    fn refs(&self) -> Vec<&dyn Aml> {
        self.0.iter().map(|child| child as &dyn Aml).collect()
    }
}

/// The whole table.
pub(crate) fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut system_bus = Children::default();
    // Names have room for three digits; the MADT alone suffices for the others.
    for id in 0..config.vcpus.min(0x1000) {
        system_bus.push(&processor(id));
    }
    system_bus.push(&pci_root(config));
    system_bus.push(&motherboard(config));
    legacy(config, &mut system_bus);
    table.append_slice(&encode(&Scope::new("\\_SB_".into(), system_bus.refs())));
    // SLP_TYPa and SLP_TYPb of S5, two reserved elements.
    let s5 = Package::new(vec![&5u8, &5u8, &aml::ZERO, &aml::ZERO]);
    table.append_slice(&encode(&Name::new("\\_S5_".into(), &s5)));
    table.as_slice().to_vec()
}

fn processor(id: u32) -> Encoded {
    let hex = format!("C{id:03X}");
    Encoded(encode(&Device::new(
        Path::new(&hex),
        vec![
            &Name::new("_HID".into(), &"ACPI0007"),
            &Name::new("_UID".into(), &id),
        ],
    )))
}

/// A device with a Plug and Play ID and fixed resources.
fn device(name: &str, id: &str, uid: u8, resources: Vec<&dyn Aml>) -> Encoded {
    Encoded(encode(&Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(id)),
            &Name::new("_UID".into(), &uid),
            &Name::new("_STA".into(), &0xfu8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    )))
}

/// `len` I/O ports from `first` on.
fn ports(first: u16, len: u8) -> IO {
    IO::new(first, first, 1, len)
}

/// An ISA interrupt: edge-triggered, active high, not shared.
fn irq(number: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, number.into())
}

fn legacy(config: &AcpiConfig, bus: &mut Children) {
    let pic = [ports(0x20, 2), ports(0xa0, 2), ports(0x4d0, 2)];
    let cascade = irq(2);
    let pic: Vec<&dyn Aml> = vec![&pic[0], &pic[1], &pic[2], &cascade];
    bus.push(&device("PIC_", "PNP0000", 0, pic));
    let pit = ports(0x40, 4);
    bus.push(&device("TIMR", "PNP0100", 0, vec![&pit, &irq(0)]));
    let rtc = ports(0x70, 2);
    bus.push(&device("RTC_", "PNP0B00", 0, vec![&rtc, &irq(8)]));
    for (i, serial) in config.serial.iter().take(4).enumerate() {
        let uid = i as u8 + 1;
        let (ports, irq) = (ports(serial.port, 8), irq(serial.irq));
        let name = format!("COM{uid}");
        bus.push(&device(&name, "PNP0501", uid, vec![&ports, &irq]));
    }
    if config.i8042 {
        let (data, command, irq1) = (ports(0x60, 1), ports(0x64, 1), irq(1));
        let keyboard: Vec<&dyn Aml> = vec![&data, &command, &irq1];
        bus.push(&device("KBD_", "PNP0303", 0, keyboard));
        bus.push(&device("MOU_", "PNP0F13", 0, vec![&irq(12)]));
    }
    if let Some(hpet) = &config.hpet {
        let registers = Memory32Fixed::new(true, hpet.address, 0x400);
        bus.push(&device("HPET", "PNP0103", 0, vec![&registers]));
    }
}

/// Addresses that belong to the board itself. An operating system uses the memory-mapped configuration space only
/// if it is found reserved here.
fn motherboard(config: &AcpiConfig) -> Encoded {
    let PmPorts {
        event,
        control,
        timer,
        gpe0,
        gpe0_len,
    } = config.pm;
    let mut resources = Children::default();
    resources.push(&ports(event, 4));
    resources.push(&ports(control, 2));
    resources.push(&ports(timer, 4));
    if gpe0_len > 0 {
        resources.push(&ports(gpe0, gpe0_len));
    }
    if let Some(ecam) = &config.ecam {
        resources.push(&Memory32Fixed::new(true, ecam.base, ecam.len()));
    }
    device("MBRD", "PNP0C02", 0, resources.refs())
}

fn pci_root(config: &AcpiConfig) -> Encoded {
    let express = config.ecam.is_some();
    let mut children = Children::default();
    let id = if express { "PNP0A08" } else { "PNP0A03" };
    children.push(&Name::new("_HID".into(), &EISAName::new(id)));
    children.push(&Name::new("_CID".into(), &EISAName::new("PNP0A03")));
    for name in ["_UID", "_SEG", "_BBN"] {
        children.push(&Name::new(name.into(), &aml::ZERO));
    }
    children.push(&Name::new("_CRS".into(), &pci_resources(config)));
    children.push(&Name::new("_PRT".into(), &interrupt_routing(config)));
    if express {
        children.push(&osc());
    }
    Encoded(encode(&Device::new("PCI0".into(), children.refs())))
}

fn pci_resources(config: &AcpiConfig) -> Encoded {
    let last_bus = config.ecam.map_or(0xff, |ecam| ecam.last_bus);
    let mut windows = Children::default();
    windows.push(&AddressSpace::new_bus_number(0u16, last_bus.into()));
    windows.push(&ports(0xcf8, 8));
    windows.push(&AddressSpace::new_io(0u16, 0xcf7, None));
    windows.push(&AddressSpace::new_io(0xd00u16, 0xffff, None));
    let not_cacheable = AddressSpaceCacheable::NotCacheable;
    let (low, high) = config.pci.mmio32.clone().into_inner();
    windows.push(&AddressSpace::new_memory(
        not_cacheable,
        true,
        low,
        high,
        None,
    ));
    if let Some(window) = &config.pci.mmio64 {
        let (low, high) = window.clone().into_inner();
        let cacheable = AddressSpaceCacheable::Cacheable;
        windows.push(&AddressSpace::new_memory(cacheable, true, low, high, None));
    }
    Encoded(encode(&ResourceTemplate::new(windows.refs())))
}

/// `_PRT`: address (device, any function), pin, no link device, GSI.
fn interrupt_routing(config: &AcpiConfig) -> Encoded {
    let mut routes = aml::PackageBuilder::new();
    let mut all = Children::default();
    for device in 0..32u8 {
        for pin in 0..4u8 {
            let address = u32::from(device) << 16 | 0xffff;
            let gsi = config.intx_gsi(device, pin);
            all.push(&Package::new(vec![&address, &pin, &aml::ZERO, &gsi]));
        }
    }
    for route in all.refs() {
        routes.add_element(route);
    }
    Encoded(encode(&routes))
}

/// `_OSC`: the operating system gets hot-plug, power management events, error reporting and the capability
/// structure of PCI Express; the standard hot-plug controller stays out, as there is none.
fn osc() -> Encoded {
    const GRANTED: u8 = 0x1d;
    const UNKNOWN_UUID: u8 = 4;
    const UNKNOWN_REVISION: u8 = 8;
    const MASKED: u8 = 0x10;

    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let host_bridge = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
    let known = Equal::new(&Arg(0), &host_bridge);
    let save = Store::new(&Local(0), &control);
    let grant = And::new(&control, &Local(0), &GRANTED);
    let masked = NotEqual::new(&Local(0), &control);
    let say_masked = Or::new(&status, &status, &MASKED);
    let if_masked = If::new(&masked, vec![&say_masked]);
    let other_revision = NotEqual::new(&Arg(1), &aml::ONE);
    let say_revision = Or::new(&status, &status, &UNKNOWN_REVISION);
    let if_revision = If::new(&other_revision, vec![&say_revision]);
    let say_unknown = Or::new(&status, &status, &UNKNOWN_UUID);
    Encoded(encode(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &Arg(3), &aml::ZERO),
            &CreateDWordField::new(&control, &Arg(3), &8u8),
            &If::new(&known, vec![&save, &grant, &if_masked, &if_revision]),
            &Else::new(vec![&say_unknown]),
            &Return::new(&Arg(3)),
        ],
    )))
}
