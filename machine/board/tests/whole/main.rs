//! The whole machine, from the vCPUs' side: ports and memory in, interrupts and messages out.

mod rig;

use lodger_board::{BootSpec, MachineSpec, map};
use lodger_device_model::{MachineRequest, assert_round_trip};
use lodger_vcpu::{Entry, Exit};

use rig::{Event, Recorder, Rig, files, rig, spec};

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Does `count` random accesses, mostly where devices are.
fn hammer(rig: &Rig, seed: u64, count: u32) {
    let mut random = Random(seed);
    let ports: &[(u64, u64)] = &[
        (0x20, 2),
        (0x40, 4),
        (0x60, 5),
        (0x70, 2),
        (0x92, 1),
        (0xa0, 2),
        (0xf4, 4),
        (0x3f8, 8),
        (0x4d0, 2),
        (0x510, 12),
        (0x600, 0x24),
        (0xcf8, 8),
        (0, 0x1_0000),
    ];
    let memory: &[(u64, u64)] = &[
        (map::IOAPIC_BASE, 0x40),
        (map::HPET_BASE, map::HPET_LEN),
        (map::ECAM.base.into(), 8 << 15),
        (map::PCI_MMIO32.start, 0x2_0000),
        (map::PCI_MMIO64.start, 0x1000),
        (map::LOCAL_APIC, 0x1000),
        (0, u64::MAX),
    ];
    for _ in 0..count {
        let r = random.next();
        let table = if r & 1 == 0 { ports } else { memory };
        let (start, len) = table[random.below(table.len() as u64) as usize];
        // A little before and after, too.
        let address = (start + random.below(len))
            .wrapping_add(random.below(5))
            .wrapping_sub(2);
        let value = match r >> 8 & 3 {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << random.below(64),
            _ => random.next(),
        };
        let sizes = if r & 1 == 0 { 3 } else { 4 };
        let size = 1u8 << random.below(sizes);
        let port = address as u16;
        let exit = match (r & 1 == 0, r & 2 == 0) {
            (true, true) => Exit::PortRead { port, size },
            (true, false) => Exit::PortWrite {
                port,
                size,
                value: value as u32,
            },
            (false, true) => Exit::MmioRead { address, size },
            (false, false) => Exit::MmioWrite {
                address,
                size,
                value,
            },
        };
        rig.machine.answer(exit);
        match r >> 16 & 0xff {
            0 => drop(rig.machine.answer(Exit::InterruptAcknowledge)),
            1 => drop(rig.machine.answer(Exit::Eoi(random.next() as u8))),
            2 => rig.clock.advance(random.below(1_000_000)),
            _ => {}
        }
    }
}

#[test]
fn every_device_reproduces_its_state() {
    let rig = rig();
    rig.machine.power_on().unwrap();
    for seed in 1..20 {
        hammer(&rig, seed, 2_000);
        rig.machine.pause();
        for device in rig.machine.devices() {
            assert_round_trip(&**device);
        }
        rig.machine.resume();
    }
}

#[test]
fn another_machine_takes_the_whole_state() {
    let (one, other) = (rig(), rig());
    one.machine.power_on().unwrap();
    hammer(&one, 99, 50_000);
    hammer(&other, 7, 1_000);
    one.machine.pause();
    other.machine.pause();
    let saved = one.machine.save();
    other.machine.restore(&saved).unwrap();
    assert_eq!(other.machine.save(), saved);

    let mut short = saved.clone();
    let (name, _) = short.remove(3);
    let error = other.machine.restore(&short).unwrap_err().to_string();
    assert!(error.contains(&name), "{error}");
    let mut long = saved;
    long.push(("toaster0".into(), long[0].1.clone()));
    let error = other.machine.restore(&long).unwrap_err().to_string();
    assert!(error.contains("toaster0"), "{error}");
}

/// Wrong in every way that needs no machine to be found; what it boots does not matter yet.
#[test]
fn wrong_specs_are_found_before_anything_is_built() {
    let files = files();
    let right = MachineSpec {
        boot: BootSpec::default(),
        ..spec(&files)
    };
    let check = |change: &dyn Fn(&mut MachineSpec)| {
        let mut spec = right.clone();
        change(&mut spec);
        let checked = spec.check(&Recorder::default());
        checked.map_or_else(|error| error.to_string(), |()| "right".into())
    };
    let disk = &right.virtio.disks[1];
    type Change<'a> = &'a dyn Fn(&mut MachineSpec);
    let cases: [(Change, &str); 10] = [
        (&|_| (), "right"),
        (&|s| s.memory = 4096, "4096 bytes of memory"),
        (&|s| s.memory += 1, "a multiple of 4096"),
        (&|s| s.memory = !4095, "bytes of memory"),
        (&|s| s.vcpus = 0, "0 vCPUs"),
        (&|s| s.vcpus = 9, "the recorder engine runs 1 to 8"),
        (&|s| s.cpu = "486".into(), "no CPU model '486'"),
        (
            &|s| s.virtio.disks[0].path = "/no/such/disk".into(),
            "/no/such/disk",
        ),
        (
            &|s| s.virtio.shares[0].folder = "/no/such/folder".into(),
            "/no/such/folder",
        ),
        (&|s| s.virtio.disks = vec![disk.clone(); 26], "room for 31"),
    ];
    for (change, says) in cases {
        let got = check(change);
        assert!(got.contains(says), "{got:?} does not say {says:?}");
    }
    // As many as there is room for.
    assert_eq!(check(&|s| s.virtio.disks = vec![disk.clone(); 25]), "right");
}

#[test]
fn names_of_devices_are_unique() {
    let rig = rig();
    let mut names: Vec<_> = rig.machine.devices().iter().map(|d| d.name()).collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all);
}

#[test]
fn a_reset_leaves_nothing_of_the_past() {
    let (used, fresh) = (rig(), rig());
    used.machine.power_on().unwrap();
    hammer(&used, 3, 100_000);
    // Registers that tell the time since the reset must agree.
    fresh.clock.advance(lodger_clock::Clock::now(&*used.clock));
    let vcpus = used.machine.power_on().unwrap().vcpus;
    assert_eq!(fresh.machine.power_on().unwrap().vcpus, vcpus);
    used.machine.pause();
    fresh.machine.pause();
    for (a, b) in used.machine.save().iter().zip(&fresh.machine.save()) {
        // The clock's battery keeps what the guest has set.
        assert!(a == b || a.0 == "rtc", "{}", a.0);
    }
}

/// Programs the I/O APIC's `pin`: edge-triggered, this vector, to APIC 0.
fn program_pin(rig: &Rig, pin: u32, vector: u32) {
    for (index, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, vector)] {
        rig.store(map::IOAPIC_BASE, index);
        rig.store(map::IOAPIC_BASE + 0x10, value);
    }
}

/// Programs the 8259s: vectors from 0x20 on, all inputs open.
fn program_pics(rig: &Rig) {
    for (port, base, cascade) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
        rig.out(port, &[0x11]);
        for value in [base, cascade, 1, 0] {
            rig.out(port + 1, &[value]);
        }
    }
}

#[test]
fn isa_interrupts_reach_both_controllers() {
    // The interrupt gate (OUT2) is open, and the transmitter is empty.
    let serial = |rig: &Rig| {
        rig.out(0x3fc, &[8]);
        rig.out(0x3f9, &[2]);
    };
    // Channel 0 in mode 0, 2 ticks.
    let timer = |rig: &Rig| {
        rig.out(0x43, &[0x30]);
        rig.out(0x40, &[2]);
        rig.out(0x40, &[0]);
        rig.clock.advance(10_000);
    };
    // Name, what raises the interrupt, the pin, the 8259s' vector.
    type Case<'a> = (&'a str, &'a dyn Fn(&Rig), u32, u8);
    let cases: [Case; 2] = [("serial", &serial, 4, 0x24), ("timer", &timer, 2, 0x20)];
    for (name, act, pin, vector) in cases {
        let rig = rig();
        rig.machine.power_on().unwrap();
        program_pics(&rig);
        program_pin(&rig, pin, 0x50);
        rig.inputs.take();
        act(&rig);
        let events = rig.inputs.take();
        assert!(events.contains(&Event::Intr(true)), "{name}: {events:?}");
        let message = |e: &Event| matches!(e, Event::Msi(0xfee0_0000, data) if data & 0xff == 0x50);
        assert!(events.iter().any(message), "{name}: {events:?}");
        let taken = rig.machine.answer(Exit::InterruptAcknowledge);
        assert_eq!(taken, Entry::Interrupt(Some(vector)), "{name}");
        assert_eq!(rig.inputs.take(), [Event::Intr(false)], "{name}");
        let none = rig.machine.answer(Exit::InterruptAcknowledge);
        assert_eq!(none, Entry::Interrupt(None), "{name}");
    }
}

#[test]
fn pci_interrupts_are_level_triggered_in_the_8259s() {
    let rig = rig();
    rig.machine.power_on().unwrap();
    assert_eq!(u16::from_le_bytes(rig.input(0x4d0)), map::ELCR);
}

#[test]
fn the_guest_can_end_and_reset_the_machine() {
    use MachineRequest::{DebugExit, PowerOff, Reset};
    let cases: [(u64, &[u8], MachineRequest); 5] = [
        (0xf4, &[0x21], DebugExit(0x21)),
        (0x604, &0x3400u16.to_le_bytes(), PowerOff),
        (0xcf9, &[6], Reset),
        (0x64, &[0xfe], Reset),
        (0x92, &[1], Reset),
    ];
    for (port, data, request) in cases {
        let rig = rig();
        rig.machine.power_on().unwrap();
        rig.out(port, data);
        assert_eq!(*rig.inputs.requests.lock().unwrap(), [request], "{port:#x}");
    }
}

#[test]
fn the_tables_tell_the_truth() {
    let rig = rig();
    rig.machine.power_on().unwrap();
    assert_eq!(rig.load(map::HPET_BASE), map::HPET_BLOCK_ID);
    assert_eq!(rig.load(map::ECAM.base.into()), 0x0008_1b36, "host bridge");
    assert_eq!(
        rig.load(u64::from(map::ECAM.base) + (1 << 15)),
        0x1042_1af4,
        "first disk"
    );
    assert_eq!(
        rig.load(u64::from(map::ECAM.base) + (2 << 15)),
        0x1042_1af4,
        "second disk"
    );
    // fw_cfg: the number of CPUs.
    rig.out(0x510, &5u16.to_le_bytes());
    assert_eq!([rig.input::<1>(0x511), rig.input::<1>(0x511)], [[2], [0]]);
}

#[test]
fn what_the_guest_prints_comes_out() {
    let rig = rig();
    rig.machine.power_on().unwrap();
    for byte in b"ok" {
        rig.out(0x3f8, &[*byte]);
    }
    assert_eq!(*rig.inputs.printed.lock().unwrap(), b"ok");
}
