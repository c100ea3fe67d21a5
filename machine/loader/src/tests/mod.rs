//! Loads images that are made here into guest memory and looks at it as their kernel would.

mod handover;
mod hostile;
mod images;

use std::sync::Arc;

use lodger_guest_memory::{GuestMemory, RamRange};
use lodger_tables::{AcpiConfig, Ecam, IoApic, PciHost, PmPorts, Sci};
use lodger_x86::bits::{cr0, cr4, efer};

use super::*;
use images::{ADDRESS, CODE, Header, bzimage, elf, gzip, multiboot_elf, multiboot_flat};

const MIB: u64 = 1 << 20;

fn acpi(vcpus: u32) -> AcpiConfig {
    AcpiConfig {
        vcpus,
        local_apic: 0xfee0_0000,
        ioapic: IoApic {
            id: 0,
            address: 0xfec0_0000,
        },
        hpet: None,
        pm: PmPorts {
            event: 0x600,
            control: 0x604,
            timer: 0x608,
            gpe0: 0,
            gpe0_len: 0,
        },
        sci: Sci {
            irq: 9,
            active_low: false,
        },
        ecam: Some(Ecam {
            base: 0xb000_0000,
            last_bus: 255,
        }),
        pci: PciHost {
            mmio32: 0xc000_0000..=0xdfff_ffff,
            mmio64: None,
            intx: [16, 17, 18, 19],
        },
        serial: vec![],
        i8042: false,
    }
}

fn memory(ranges: &[(u64, u64)]) -> GuestMemory {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|&(start, len)| RamRange { start, len })
        .collect();
    GuestMemory::new(&ranges).unwrap()
}

fn ram(mib: u64) -> GuestMemory {
    memory(&[(0, mib * MIB)])
}

fn payload(name: &str, bytes: &[u8]) -> Payload {
    Payload::Bytes {
        name: name.to_string(),
        bytes: Arc::from(bytes),
    }
}

fn source(kernel: &[u8]) -> BootSource {
    BootSource {
        kernel: payload("vmlinuz", kernel),
        initrd: None,
        append: "console=ttyS0".to_string(),
        protocol: BootProtocol::Auto,
    }
}

fn boot(kernel: &[u8]) -> Result<Boot, LoadError> {
    load(&ram(8), &source(kernel), &acpi(1))
}

fn read(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(address, &mut bytes).unwrap();
    bytes
}

fn string(memory: &GuestMemory, address: u64) -> String {
    let bytes = (address..).map(|at| read(memory, at, 1)[0]);
    String::from_utf8(bytes.take_while(|b| *b != 0).collect()).unwrap()
}

/// A name, the image, how it must be entered and where.
fn all_formats() -> Vec<(&'static str, Vec<u8>, BootKind, u64)> {
    let old = Header {
        xloadflags: 0,
        ..Header::default()
    };
    let before_xloadflags = Header {
        version: 0x20b,
        ..Header::default()
    };
    let high_half = 0xffff_ffff_8000_0000;
    let pvh = |wide| elf(wide, 0, Some(ADDRESS as u32));
    vec![
        (
            "64-bit bzImage",
            bzimage(b"?", Header::default()),
            BootKind::Bzimage64,
            0x10_0200,
        ),
        (
            "32-bit bzImage",
            bzimage(b"?", old),
            BootKind::Bzimage32,
            0x10_0000,
        ),
        (
            "protocol 2.11",
            bzimage(b"?", before_xloadflags),
            BootKind::Bzimage32,
            0x10_0000,
        ),
        ("PVH, 64-bit ELF", pvh(true), BootKind::Pvh, ADDRESS),
        ("PVH, 32-bit ELF", pvh(false), BootKind::Pvh, ADDRESS),
        ("64-bit ELF", elf(true, 0, None), BootKind::Elf64, ADDRESS),
        (
            "64-bit ELF, high",
            elf(true, high_half, None),
            BootKind::Elf64,
            ADDRESS,
        ),
        ("32-bit ELF", elf(false, 0, None), BootKind::Elf32, ADDRESS),
        (
            "32-bit ELF, high",
            elf(false, 0xc000_0000, None),
            BootKind::Elf32,
            ADDRESS,
        ),
        ("compressed ELF", gzip(&pvh(true)), BootKind::Pvh, ADDRESS),
        (
            "flat Multiboot",
            multiboot_flat(),
            BootKind::Multiboot1,
            ADDRESS + 32,
        ),
        (
            "Multiboot ELF",
            multiboot_elf(),
            BootKind::Multiboot1,
            ADDRESS,
        ),
        (
            "PVH in bzImage",
            bzimage(&gzip(&pvh(true)), Header::default()),
            BootKind::Pvh,
            ADDRESS,
        ),
        (
            "ELF in bzImage",
            bzimage(&gzip(&elf(true, 0, None)), Header::default()),
            BootKind::Elf64,
            ADDRESS,
        ),
    ]
}

/// The physical address of `linear` by 4-level page tables with 2 MiB pages.
fn translate(memory: &GuestMemory, cr3: u64, linear: u64) -> Option<u64> {
    let mut table = cr3;
    for shift in [39, 30, 21] {
        let entry = memory
            .read_u64(table + (linear >> shift & 0x1ff) * 8)
            .unwrap();
        if entry & 3 != 3 {
            return None;
        }
        table = entry & !0xfff;
    }
    Some(table + (linear & 0x1f_ffff))
}

#[test]
fn every_format_is_recognised_loaded_and_entered() {
    for (name, image, kind, entry) in all_formats() {
        let memory = ram(8);
        let boot = load(&memory, &source(&image), &acpi(1)).unwrap();
        assert_eq!((boot.kind, boot.entry), (kind, entry), "{name}");
        let s = &boot.state;
        assert_eq!(s.rip, entry, "{name}");
        assert_eq!(read(&memory, entry, CODE.len()), CODE, "{name}");

        let long = matches!(kind, BootKind::Bzimage64 | BootKind::Elf64);
        assert_eq!(s.segments[1].is_long(), long, "{name}");
        assert_eq!(s.segments[1].is_big(), !long, "{name}");
        assert_eq!(
            s.cr0 & (cr0::PE | cr0::PG) == cr0::PE | cr0::PG,
            long,
            "{name}"
        );
        assert_eq!(s.cr0 & cr0::PE, cr0::PE, "{name}");
        assert_eq!(s.efer & efer::LMA != 0, long, "{name}");
        assert_eq!(s.cr4 & cr4::PAE != 0, long, "{name}");
        assert_eq!(s.rflags, 2, "{name}: interrupts are off");
        for segment in s.segments {
            assert_eq!((segment.base, segment.limit), (0, u32::MAX), "{name}");
            // The registers hold what the GDT says.
            let at = s.gdtr.base + u64::from(segment.selector);
            let descriptor = memory.read_u64(at).unwrap();
            let loaded = lodger_x86::Segment::from_descriptor(segment.selector, descriptor);
            assert_eq!(loaded, segment, "{name}");
        }
        if long {
            for address in [0, entry, 0x1234_5678, 0xfee0_0000, 0xffff_ffff] {
                assert_eq!(translate(&memory, s.cr3, address), Some(address), "{name}");
            }
            assert_eq!(translate(&memory, s.cr3, 1 << 32), None, "{name}");
        }
    }
}

#[test]
fn what_follows_a_segment_is_zero_whatever_memory_held() {
    for (name, image, kind, _) in all_formats() {
        if matches!(kind, BootKind::Bzimage64 | BootKind::Bzimage32) {
            continue;
        }
        let memory = ram(8);
        memory.write(ADDRESS, &[0xcc; 0x3000]).unwrap();
        let first = load(&memory, &source(&image), &acpi(1)).unwrap();
        let tail = read(&memory, ADDRESS + 64, 0x2000 - 64);
        assert!(tail.iter().all(|b| *b == 0), "{name}");
        assert_eq!(read(&memory, ADDRESS + 0x2000, 1), [0xcc], "{name}");
        // A machine that is reset loads the same again.
        let again = load(&memory, &source(&image), &acpi(1)).unwrap();
        assert_eq!(first.state, again.state, "{name}");
    }
}

#[test]
fn a_bzimage_is_decompressed_here_only_if_that_works_and_is_wanted() {
    let kernel = elf(true, 0, Some(ADDRESS as u32));
    let good = gzip(&kernel);
    let mut damaged = good.clone();
    damaged[20] ^= 0xff;
    let elsewhere = {
        let mut kernel = kernel.clone();
        kernel[4] = 9;
        gzip(&kernel)
    };
    use BootProtocol::{Auto, Bzimage};
    let cases: [(&str, &[u8], u16, BootProtocol, BootKind); 7] = [
        ("as it should be", &good, 0x20f, Auto, BootKind::Pvh),
        ("not wanted", &good, 0x20f, Bzimage, BootKind::Bzimage64),
        ("damaged", &damaged, 0x20f, Auto, BootKind::Bzimage64),
        ("unknown", b"BZh9xxxx", 0x20f, Auto, BootKind::Bzimage64),
        ("nothing", b"", 0x20f, Auto, BootKind::Bzimage64),
        (
            "not an ELF kernel",
            &elsewhere,
            0x20f,
            Auto,
            BootKind::Bzimage64,
        ),
        (
            "no payload fields yet",
            &good,
            0x207,
            Auto,
            BootKind::Bzimage32,
        ),
    ];
    for (name, payload, version, protocol, kind) in cases {
        let header = Header {
            version,
            ..Header::default()
        };
        let mut source = source(&bzimage(payload, header));
        source.protocol = protocol;
        let boot = load(&ram(8), &source, &acpi(1)).unwrap();
        assert_eq!(boot.kind, kind, "{name}: {}", boot.description);
        assert!(boot.description.starts_with("Linux 6.1.0-test"), "{name}");
        let refused = protocol == Auto && kind != BootKind::Pvh;
        assert_eq!(boot.description.contains("as it is ("), refused, "{name}");
    }
}

#[test]
fn files_that_cannot_be_booted_are_refused_with_a_reason() {
    let good = bzimage(b"?", Header::default());
    let with = |change: fn(&mut Header)| {
        let mut header = Header::default();
        change(&mut header);
        bzimage(b"?", header)
    };
    let patched = |image: &[u8], at: usize, value: &[u8]| {
        let mut image = image.to_vec();
        if image.len() < at + value.len() {
            image.resize(at + value.len(), 0);
        }
        image[at..at + value.len()].copy_from_slice(value);
        image
    };
    let elf64 = elf(true, 0, None);
    let flat = multiboot_flat();
    let bad_multiboot = {
        let flags = 0x1_0008u32;
        let checksum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
        let words = [flags.to_le_bytes(), checksum.to_le_bytes()].concat();
        patched(&flat, 20, &words)
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "an empty file"),
        (vec![0; 100], "unknown kind"),
        (b"#!/bin/sh".to_vec(), "a script"),
        (b"070701".to_vec(), "an initial RAM disk"),
        (gzip(b"070701"), "an initial RAM disk"),
        (patched(b"MZ", 0x38, b"ARM\x64"), "an arm64 kernel"),
        (patched(b"MZ", 0x38, b"RSC\x05"), "a RISC-V kernel"),
        (patched(b"MZ", 4, b"zimg"), "zboot"),
        (patched(b"MZ", 0x80, b"PE\0\0"), "EFI application"),
        (patched(b"", 0x1fe, &[0x55, 0xaa]), "a boot sector"),
        (patched(b"", 0x8001, b"CD001"), "a CD image"),
        // bzImage
        (good[..0x204].to_vec(), "a boot sector"),
        (good[..0x220].to_vec(), "truncated: the header"),
        (good[..900].to_vec(), "truncated: the real-mode code"),
        (good[..1024].to_vec(), "truncated: the kernel"),
        (good[..good.len() - 16].to_vec(), "truncated: the kernel"),
        (patched(&good, 0x1fe, &[0]), "no signature"),
        (with(|h| h.version = 0x205), "boot protocol 2.05"),
        (with(|h| h.loadflags = 0), "zImage"),
        (with(|h| h.code32_start = 0), "16-bit entry only"),
        (
            with(|h| (h.xloadflags, h.code32_start) = (0, 0x8_0000)),
            "outside of the kernel",
        ),
        (with(|h| h.init_size = 0x80_0000), "does not fit"),
        // ELF
        (elf64[..40].to_vec(), "damaged"),
        (elf64[..180].to_vec(), "truncated: a segment"),
        (patched(&elf64, 4, &[7]), "unknown ELF class"),
        (patched(&elf64, 18, &[183]), "another processor"),
        (patched(&elf64, 16, &[1]), "not executable"),
        (patched(&elf64, 56, &[0]), "no loadable segment"),
        (patched(&elf64, 24, &[0; 8]), "entry point is in no segment"),
        (elf(true, 0, Some(0x9_0000)), "PVH entry is in no segment"),
        (
            patched(
                &elf(true, 0, Some(0x9_f010)),
                88,
                &0x9_f000u64.to_le_bytes(),
            ),
            "does not fit",
        ),
        (
            patched(&elf64, 104, &(8 * MIB).to_le_bytes()),
            "does not fit",
        ),
        (patched(&elf64, 104, &[0xff; 8]), "impossible sizes"),
        (
            patched(&elf64, 104, &0x7fff_ffff_0000_0000u64.to_le_bytes()),
            "too big",
        ),
        // Multiboot
        (bad_multiboot, "demands unknown features"),
        (patched(&flat, 28, &[0xff; 4]), "impossible addresses"),
        (patched(&flat, 44, &[0; 4]), "impossible addresses"),
        (flat[..40].to_vec(), "truncated: the Multiboot header"),
        (flat[..60].to_vec(), "truncated: the kernel"),
    ];
    for (image, reason) in cases {
        let error = match boot(&image) {
            Ok(boot) => panic!("{reason}: {}", boot.description),
            Err(error) => error.to_string(),
        };
        assert!(error.starts_with("vmlinuz: "), "{error}");
        assert!(error.contains(reason), "{reason}: {error}");
    }
}

#[test]
fn a_file_larger_than_memory_is_not_even_read() {
    let zeros = |len: u64| {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    };
    let kernel = elf(true, 0, Some(ADDRESS as u32));
    let huge = zeros(1 << 40);
    let memory = ram(8);
    let mut from_file = source(&kernel);
    from_file.initrd = Some(Payload::File(huge.path().to_path_buf()));
    let error = load(&memory, &from_file, &acpi(1)).unwrap_err();
    assert!(error.to_string().contains("initial RAM disk"), "{error}");
    assert_eq!(error.file, huge.path().display().to_string());

    for path in [huge.path().to_path_buf(), "/dev/zero".into()] {
        from_file.kernel = Payload::File(path);
        let error = load(&memory, &from_file, &acpi(1)).unwrap_err();
        assert!(error.to_string().contains("too big"), "{error}");
    }
    from_file.kernel = Payload::File("/nowhere/vmlinuz".into());
    let error = load(&memory, &from_file, &acpi(1)).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("/nowhere/vmlinuz: cannot be read")
    );
}

#[test]
fn the_initrd_lies_below_what_the_kernel_can_reach() {
    let contents: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &contents).unwrap();
    let cases = [
        (0x3f_ffff, 0x3f_e000),
        (0x7fff_ffff, 0x7f_e000),
        (0x3f_f3ff, 0x3f_e000),
        (0xffff_ffff, 0x7f_e000),
    ];
    for (initrd_addr_max, start) in cases {
        for initrd in [
            payload("initrd", &contents),
            file.path().to_path_buf().into(),
        ] {
            let header = Header {
                initrd_addr_max,
                ..Header::default()
            };
            let memory = ram(8);
            let mut source = source(&bzimage(b"?", header));
            source.initrd = Some(initrd);
            let boot = load(&memory, &source, &acpi(1)).unwrap();
            assert_eq!(boot.initrd, Some(start..start + 5000));
            assert_eq!(read(&memory, start, 5000), contents);
        }
    }
    let mut source = source(&bzimage(b"?", Header::default()));
    source.initrd = Some(payload("initrd", b""));
    let error = load(&ram(8), &source, &acpi(1)).unwrap_err();
    assert!(error.to_string().starts_with("initrd: "), "{error}");
}

#[test]
fn the_command_line_is_as_long_as_the_kernel_takes() {
    let pvh = elf(true, 0, Some(ADDRESS as u32));
    let cases = [
        (bzimage(b"?", Header::default()), 255),
        (bzimage(&gzip(&pvh), Header::default()), 255),
        (elf(true, 0, None), 2047),
        (pvh, 65535),
        (multiboot_flat(), 65535),
    ];
    for (image, limit) in cases {
        let mut source = source(&image);
        source.append = "x".repeat(limit);
        assert!(load(&ram(8), &source, &acpi(1)).is_ok(), "{limit}");
        source.append.push('x');
        let error = load(&ram(8), &source, &acpi(1)).unwrap_err();
        assert!(
            error.to_string().contains(&format!("takes {limit}")),
            "{error}"
        );
        source.append = "a\0b".to_string();
        assert!(load(&ram(8), &source, &acpi(1)).is_err());
    }
}

#[test]
fn long_tables_go_to_the_top_of_memory_and_the_rsdp_stays_where_it_is_searched() {
    let kernel = elf(true, 0, Some(ADDRESS as u32));
    for (ranges, vcpus, at) in [
        (&[(0, 8 * MIB)][..], 1, 0xe_0000),
        (&[(0, 8 * MIB)], 3000, 7 * MIB + 0xd_f000),
        (&[(0, 0xa_0000), (MIB, 7 * MIB)], 1, 8 * MIB - 0x1000),
    ] {
        let memory = memory(ranges);
        let boot = load(&memory, &source(&kernel), &acpi(vcpus)).unwrap();
        let rsdp = read(&memory, boot.rsdp_address, 36);
        assert!(rsdp.starts_with(b"RSD PTR "));
        if vcpus == 1 {
            assert_eq!(boot.rsdp_address, at);
        } else {
            assert_eq!(boot.rsdp_address & !0xf_ffff, at & !0xf_ffff);
        }
        if memory.contains(0xe_0000, 36) {
            assert_eq!(read(&memory, 0xe_0000, 36), rsdp);
        }
        if boot.rsdp_address > MIB {
            let map = handover::pvh_memory_map(&memory, &boot);
            let reserved = map.iter().find(|(start, _, _)| *start == boot.rsdp_address);
            assert_eq!(reserved.unwrap().2, 2, "{map:x?}");
        }
    }
}
