//! A device on the bus, seen as the guest sees it: through ports, the memory-mapped window and its BARs.

use std::sync::{Arc, Mutex};

use lodger_address_space::{AddressSpace, BusTarget};
use lodger_device_model::{
    Device, IrqLine, IrqSink, Msi, MsiTarget, Payload, RestoreError, assert_round_trip,
};
use lodger_pci::{
    AddError, BarKind, ConfigSpace, Endpoint, HostBridge, Identity, MsixPlace, PciBus, PciDevice,
    Resources,
};

const ECAM: u64 = 0xb000_0000;
const MSIX_TABLE: u64 = 0x800;
const MSIX_PENDING: u64 = 0xc00;

/// BAR 0: 4 KiB of memory, BAR 2: 16 ports, BAR 4: 64-bit memory. A BAR reads as its number plus the offset.
struct Probe {
    name: String,
    endpoint: Endpoint,
    written: Mutex<Vec<(usize, u64, Vec<u8>)>>,
}

impl Probe {
    fn new(name: &str, msi: Arc<dyn MsiTarget>) -> Arc<Probe> {
        let config = ConfigSpace::new(Identity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 9,
            class: 0xff_00_00,
            subsystem_vendor: 1,
            subsystem: 2,
        })
        .with_bar(0, BarKind::Memory32, 0x1000)
        .with_bar(2, BarKind::Io, 16)
        .with_bar(4, BarKind::Memory64, 0x4000)
        .with_interrupt_pin();
        let place = MsixPlace {
            vectors: 4,
            bar: 0,
            table: MSIX_TABLE as u32,
            pending: MSIX_PENDING as u32,
        };
        Arc::new(Probe {
            name: name.into(),
            endpoint: Endpoint::with_msix(config, place, msi),
            written: Mutex::default(),
        })
    }
}

impl Device for Probe {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&self) {
        self.endpoint.reset();
    }
    fn save(&self) -> Payload {
        Payload::encode("probe", 1, &self.endpoint.save())
    }
    fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        let saved = payload.decode("probe", 1)?;
        self.endpoint.restore(&saved).unwrap();
        Ok(())
    }
}

impl PciDevice for Probe {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        for (i, d) in data.iter_mut().enumerate() {
            *d = bar as u8 + offset as u8 + i as u8;
        }
    }
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        let mut written = self.written.lock().unwrap();
        written.push((bar, offset, data.to_vec()));
    }
}

#[derive(Default)]
struct Sink {
    messages: Mutex<Vec<Msi>>,
    levels: Mutex<[bool; 4]>,
    edges: Mutex<usize>,
}

impl MsiTarget for Sink {
    fn send(&self, msi: Msi) {
        self.messages.lock().unwrap().push(msi);
    }
}

impl IrqSink for Sink {
    fn set(&self, line: u32, level: bool) {
        self.levels.lock().unwrap()[line as usize] = level;
        *self.edges.lock().unwrap() += 1;
    }
    fn import(&self, line: u32, level: bool) {
        self.levels.lock().unwrap()[line as usize] = level;
    }
}

struct Machine {
    space: Arc<AddressSpace>,
    bus: Arc<PciBus>,
    bridge: Arc<HostBridge>,
    sink: Arc<Sink>,
    probes: Vec<Arc<Probe>>,
}

/// Hands a device's registers to a bus.
struct Pio(Arc<HostBridge>);
impl BusTarget for Pio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.as_pio().unwrap().read(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.as_pio().unwrap().write(offset, data);
    }
}
struct Mmio(Arc<HostBridge>);
impl BusTarget for Mmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.as_mmio().unwrap().read(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.as_mmio().unwrap().write(offset, data);
    }
}
/// The reset register at 0xcf9: remembers the last byte.
#[derive(Default)]
struct Cf9(Mutex<u8>);
impl BusTarget for Cf9 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        assert_eq!((offset, data.len()), (0, 1));
        data[0] = *self.0.lock().unwrap();
    }
    fn write(&self, offset: u64, data: &[u8]) {
        assert_eq!((offset, data.len()), (0, 1));
        *self.0.lock().unwrap() = data[0];
    }
}

impl Machine {
    /// Probes at 0:1.0, 0:2.0 and so on.
    fn new(probes: usize) -> Machine {
        let space = Arc::new(AddressSpace::default());
        let sink = Arc::new(Sink::default());
        let lines = [0, 1, 2, 3].map(|l| IrqLine::new(sink.clone(), l));
        let bus = PciBus::new(&space, lines);
        let bridge = HostBridge::add_to(&bus, "pci", Some(Arc::new(Cf9::default()))).unwrap();
        let pio = Arc::new(Pio(bridge.clone()));
        space.ports.map(0xcf8, 8, pio).unwrap();
        let mmio = Arc::new(Mmio(bridge.clone()));
        space.mmio.map(ECAM, 2 << 20, mmio).unwrap();
        let probes: Vec<_> = (1..=probes)
            .map(|n| {
                let probe = Probe::new(&format!("probe{n}"), sink.clone());
                assert_eq!(bus.add(None, probe.clone()), Ok(n as u8));
                probe
            })
            .collect();
        Machine {
            space,
            bus,
            bridge,
            sink,
            probes,
        }
    }

    fn assigned(probes: usize) -> Machine {
        let m = Machine::new(probes);
        let resources = Resources {
            memory: 0xc000_0000..0xd000_0000,
            ports: 0xc000..0xd000,
            interrupts: [10, 11, 5, 9],
        };
        m.bus.assign_resources(&resources).unwrap();
        m
    }

    fn inl(&self, port: u64) -> u32 {
        let mut d = [0; 4];
        self.space.ports.read(port, &mut d);
        u32::from_le_bytes(d)
    }
    fn inb(&self, port: u64) -> u8 {
        let mut d = [0];
        self.space.ports.read(port, &mut d);
        d[0]
    }
    fn outl(&self, port: u64, value: u32) {
        self.space.ports.write(port, &value.to_le_bytes());
    }
    fn readl(&self, address: u64) -> u32 {
        let mut d = [0; 4];
        self.space.mmio.read(address, &mut d);
        u32::from_le_bytes(d)
    }
    fn writel(&self, address: u64, value: u32) {
        self.space.mmio.write(address, &value.to_le_bytes());
    }
    fn config(&self, slot: u64, register: u64) -> u32 {
        self.readl(ECAM + (slot << 15) + register)
    }
    fn set_config(&self, slot: u64, register: u64, value: u32) {
        self.writel(ECAM + (slot << 15) + register, value);
    }
}

#[test]
fn both_ways_lead_to_the_same_registers() {
    let m = Machine::assigned(2);
    for slot in 0..32 {
        for register in (0..256).step_by(4) {
            m.outl(0xcf8, 0x8000_0000 | slot << 11 | register);
            let by_port = m.inl(0xcfc);
            assert_eq!(by_port, m.config(slot.into(), register.into()));
            let byte = m.inb(0xcfe);
            assert_eq!(u32::from(byte), by_port >> 16 & 0xff);
        }
    }
    assert_eq!(m.config(0, 0), 0x0008_1b36);
    assert_eq!(m.config(1, 0), 0x5678_1234);
    assert_eq!(m.config(3, 0), 0xffff_ffff);
    assert_eq!(m.readl(ECAM + (1 << 20) + (1 << 15)), 0xffff_ffff, "bus 1");
    assert_eq!(
        m.readl(ECAM + (1 << 15) + (1 << 12)),
        0xffff_ffff,
        "function 1"
    );
    assert_eq!(m.config(1, 0x100), 0xffff_ffff, "extended space");
    let mut eight = [0; 8];
    m.space.mmio.read(ECAM + (1 << 15), &mut eight);
    assert_eq!(eight, [0x34, 0x12, 0x78, 0x56, 3, 0, 0x10, 0]);
}

#[test]
fn the_address_register_takes_double_words_only() {
    let m = Machine::new(1);
    m.outl(0xcf8, 0xffff_ffff);
    assert_eq!(m.inl(0xcf8), 0x80ff_fffc);
    m.space.ports.write(0xcfb, &[1]);
    m.space.ports.write(0xcf8, &[1, 2]);
    assert_eq!(m.inl(0xcf8), 0x80ff_fffc);
    assert_eq!(m.inb(0xcf8), 0xff);
    m.outl(0xcf8, 0x0000_0800);
    assert_eq!(m.inl(0xcfc), 0xffff_ffff, "not enabled");
    m.space.ports.write(0xcf9, &[6]);
    assert_eq!(m.inb(0xcf9), 6, "the reset register");
}

#[test]
fn bars_are_where_they_are_programmed() {
    let m = Machine::assigned(1);
    // 64-bit first (16 KiB), then 4 KiB
    assert_eq!(
        (m.config(1, 0x10), m.config(1, 0x18), m.config(1, 0x20)),
        (0xc000_4000, 0xc001, 0xc000_0004)
    );
    assert_eq!(m.config(1, 0x3c) & 0xff, 11, "line B");
    assert_eq!(m.readl(0xc000_4010), 0x1312_1110);
    assert_eq!(m.inl(0xc004), 0x0908_0706);
    m.set_config(1, 0x10, 0xc800_0000);
    assert_eq!(m.readl(0xc000_4010), 0xffff_ffff);
    assert_eq!(m.readl(0xc800_0010), 0x1312_1110);
    m.set_config(1, 0x24, 2);
    m.writel(0x2_c000_3ffc, 7);
    let written = m.probes[0].written.lock().unwrap().clone();
    assert_eq!(written, [(4, 0x3ffc, vec![7, 0, 0, 0])]);
    m.set_config(1, 0x04, 1);
    assert_eq!(m.readl(0xc800_0010), 0xffff_ffff, "memory decoding is off");
    assert_eq!(m.inl(0xc004), 0x0908_0706);
    m.probes[0].reset();
    assert_eq!(m.inl(0xc004), 0xffff_ffff);
}

#[test]
fn of_two_in_one_place_the_first_is_there_until_it_moves() {
    let m = Machine::assigned(2);
    let first = m.config(1, 0x10);
    m.set_config(2, 0x10, first);
    m.writel(first.into(), 1);
    assert_eq!(m.probes[0].written.lock().unwrap().len(), 1);
    m.set_config(1, 0x10, 0xcf00_0000);
    m.writel(first.into(), 1);
    assert_eq!(m.probes[1].written.lock().unwrap().len(), 1);
    m.set_config(2, 0x10, ECAM as u32);
    assert_eq!(
        m.config(1, 0),
        0x5678_1234,
        "a BAR does not displace the window"
    );
}

#[test]
fn a_shared_line_is_high_while_anybody_asserts_it() {
    let m = Machine::assigned(5); // 1 and 5 share line B
    let levels = || *m.sink.levels.lock().unwrap();
    m.probes[0].endpoint.set_interrupt(true);
    m.probes[4].endpoint.set_interrupt(true);
    m.probes[2].endpoint.set_interrupt(true);
    assert_eq!(levels(), [false, true, false, true]);
    assert_eq!(m.config(1, 4) >> 16 & 8, 8, "the status register tells");
    m.probes[0].endpoint.set_interrupt(false);
    assert_eq!(levels(), [false, true, false, true]);
    m.set_config(5, 4, 0x400);
    assert_eq!(levels(), [false, false, false, true], "disabled");
    m.set_config(5, 4, 0);
    m.probes[2].reset();
    assert_eq!(levels(), [false, true, false, false]);
    m.set_config(5, 0x40, 0x8000 << 16);
    assert_eq!(levels(), [false; 4], "MSI-X silences the pin");
}

#[test]
fn msix_is_programmed_through_its_bar() {
    let m = Machine::assigned(1);
    let bar = u64::from(m.config(1, 0x10));
    m.set_config(1, 4, 7);
    m.set_config(1, 0x40, 0xc000 << 16);
    for (offset, value) in [(0, 0xfee0_1000), (4, 0), (8, 0x41), (12, 0)] {
        m.writel(bar + MSIX_TABLE + 16 + offset, value);
    }
    m.probes[0].endpoint.raise(1);
    m.probes[0].endpoint.raise(2);
    assert_eq!(m.readl(bar + MSIX_PENDING), 6);
    m.writel(bar + MSIX_PENDING, 0);
    let messages = || m.sink.messages.lock().unwrap().clone();
    assert_eq!(messages(), []);
    m.set_config(1, 0x40, 0x8000 << 16);
    let message = Msi {
        address: 0xfee0_1000,
        data: 0x41,
    };
    assert_eq!(messages(), [message]);
    assert_eq!(m.readl(bar + MSIX_PENDING), 4, "vector 2 is masked");
    m.set_config(1, 4, 3);
    m.probes[0].endpoint.raise(1);
    assert_eq!(messages(), [message], "not a bus master");
    assert!(m.probes[0].written.lock().unwrap().is_empty());
}

#[test]
fn slots_are_taken_once() {
    let m = Machine::new(1);
    let another = Probe::new("x", m.sink.clone());
    let slot = |slot| {
        Err(AddError::Slot {
            name: "x".into(),
            slot,
        })
    };
    assert_eq!(m.bus.add(Some(1), another.clone()), slot(1));
    assert_eq!(m.bus.add(Some(32), another.clone()), slot(32));
    assert_eq!(m.bus.add(Some(31), another.clone()), Ok(31));
    assert!(matches!(
        m.bus.add(None, another),
        Err(AddError::Twice { .. })
    ));
    for n in 2..31 {
        assert_eq!(m.bus.add(None, Probe::new("y", m.sink.clone())), Ok(n));
    }
    let one_more = m.bus.add(None, Probe::new("z", m.sink.clone()));
    assert!(matches!(one_more, Err(AddError::Full { .. })));
}

#[test]
fn a_window_too_small_is_an_error() {
    let m = Machine::new(2);
    let resources = Resources {
        memory: 0xc000_0000..0xc000_9000,
        ports: 0xc000..0xc020,
        interrupts: [0; 4],
    };
    let e = m.bus.assign_resources(&resources).unwrap_err();
    assert_eq!((e.name.as_str(), e.bar, e.len), ("probe2", 0, 0x1000));
}

#[test]
fn state_is_reproduced_without_an_edge() {
    let m = Machine::assigned(2);
    m.outl(0xcf8, 0x8000_0810);
    m.set_config(1, 0x10, 0xc900_0000);
    m.probes[0].endpoint.set_interrupt(true);
    let saved = m.probes[0].save();
    m.probes[0].reset();
    let edges = *m.sink.edges.lock().unwrap();
    m.probes[0].restore(&saved).unwrap();
    assert_eq!(*m.sink.edges.lock().unwrap(), edges);
    assert!(m.sink.levels.lock().unwrap()[1]);
    assert_eq!(m.readl(0xc900_0010), 0x1312_1110, "decoded again");
    assert_round_trip(&*m.probes[0]);
    assert_round_trip(&*m.bridge);
}

#[test]
fn random_accesses_do_no_harm() {
    let m = Machine::assigned(3);
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..200_000 {
        let r = random();
        let address = match r % 4 {
            0 => ECAM + random() % 0x2_0000,
            1 => ECAM + (r >> 8) % 4 * 0x8000 + random() % 0x60,
            2 => 0xc000_0000 + random() % 0x10000,
            _ => random(),
        };
        let len = 1 << ((r >> 4) % 4);
        let mut data = random().to_le_bytes();
        let bus = if r & 1 << 20 == 0 {
            &m.space.mmio
        } else {
            &m.space.ports
        };
        match r >> 21 & 3 {
            0 => bus.read(address, &mut data[..len]),
            1 => m.outl(0xcf8, 0x8000_0000 | random() as u32 & 0x1ffc),
            2 => m.outl(0xcfc, random() as u32),
            _ => bus.write(address, &data[..len]),
        }
        let probe = &m.probes[(r >> 24) as usize % 3];
        probe.endpoint.raise((r >> 26) as u16 % 6);
        probe.endpoint.set_interrupt(r >> 30 & 1 != 0);
        if r >> 32 & 0xfff == 0 {
            probe.reset();
        }
    }
    for probe in &m.probes {
        assert_round_trip(&**probe);
        probe.endpoint.set_interrupt(false);
    }
    assert_eq!(*m.sink.levels.lock().unwrap(), [false; 4]);
}
