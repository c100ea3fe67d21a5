//! Kernels as files that nobody built.

use std::io::Write;
use std::sync::Arc;

use lodger_guest_memory::{GuestMemory, RamRange};
use lodger_loader::{BootProtocol, BootSource, Payload, load};
use lodger_tables::{AcpiConfig, Ecam, Hpet, IoApic, PciHost, PmPorts, Sci, Serial};

/// RAM of the machine that is booted, in bytes.
const RAM: u64 = 32 << 20;

/// The file is the kernel, and its tail the initial RAM disk.
pub fn loader(data: &[u8]) {
    let memory = GuestMemory::new(&[RamRange { start: 0, len: RAM }]).expect("the host has memory");
    let file = |name: &str, bytes: &[u8]| Payload::Bytes {
        name: name.into(),
        bytes: Arc::from(bytes),
    };
    let tail = &data[data.len() - data.len().min(100)..];
    for protocol in [BootProtocol::Auto, BootProtocol::Bzimage] {
        let source = BootSource {
            kernel: file("kernel", data),
            initrd: Some(file("initrd", tail)),
            append: "console=ttyS0".into(),
            protocol,
        };
        if let Err(e) = load(&memory, &source, &acpi()) {
            assert!(!e.to_string().is_empty());
        }
    }
}

fn acpi() -> AcpiConfig {
    AcpiConfig {
        vcpus: 2,
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
            last_bus: 0,
        }),
        pci: PciHost {
            mmio32: 0xc000_0000..=0xdfff_ffff,
            mmio64: None,
            intx: [16, 17, 18, 19],
        },
        serial: vec![Serial {
            port: 0x3f8,
            irq: 4,
        }],
        i8042: false,
    }
}

/// A small file of each format.
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let (elf64, elf32) = (elf(true), elf(false));
    vec![
        gzip(&elf64),
        bzimage(&gzip(&elf64)),
        bzimage(&elf32),
        multiboot(),
        elf64,
        elf32,
    ]
}

/// Writes little-endian numbers of `len` bytes one after the other at `at`.
fn put(file: &mut [u8], at: usize, len: usize, values: &[u64]) {
    for (n, value) in values.iter().enumerate() {
        file[at + n * len..][..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }
}

/// An ELF file with one segment at 1 MiB and a PVH note.
fn elf(wide: bool) -> Vec<u8> {
    let mut file = vec![0x90; 0x200];
    file[..0x100].fill(0);
    let entry = 0x10_0000;
    file[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', if wide { 2 } else { 1 }, 1, 1]);
    let machine = if wide { 62 } else { 3 };
    put(&mut file, 16, 2, &[2, machine, 1]);
    if wide {
        put(&mut file, 24, 8, &[entry, 64, 0]);
        put(&mut file, 52, 2, &[64, 56, 2]);
        put(&mut file, 64, 4, &[1, 5]);
        put(
            &mut file,
            72,
            8,
            &[0x100, entry, entry, 0x100, 0x1000, 0x1000],
        );
        put(&mut file, 120, 4, &[4, 4]);
        put(&mut file, 128, 8, &[0xc0, 0, 0, 20, 20, 4]);
    } else {
        put(&mut file, 24, 4, &[entry, 52, 0]);
        put(&mut file, 40, 2, &[52, 32, 2]);
        put(
            &mut file,
            52,
            4,
            &[1, 0x100, entry, entry, 0x100, 0x1000, 5, 0x1000],
        );
        put(&mut file, 84, 4, &[4, 0xc0, 0, 0, 20, 20, 4, 4]);
    }
    // Name and descriptor of 4 bytes, type 18: the 32-bit entry.
    put(&mut file, 0xc0, 4, &[4, 4, 18]);
    file[0xcc..0xd0].copy_from_slice(b"Xen\0");
    put(&mut file, 0xd0, 4, &[entry]);
    file
}

/// A bzImage with one sector of set-up code, whose kernel is `payload`.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file.extend(payload);
    // The 64-bit entry is at 0x200 of the code.
    file.resize((file.len() + 0x200).next_multiple_of(16), 0);
    let code = (file.len() - 1024) as u64;
    put(&mut file, 0x1f1, 1, &[1]);
    put(&mut file, 0x1f4, 4, &[code / 16]);
    put(&mut file, 0x1fe, 2, &[0xaa55, 0x6aeb]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    put(&mut file, 0x206, 2, &[0x20f]);
    put(&mut file, 0x211, 1, &[1]);
    put(&mut file, 0x214, 4, &[0x10_0000]);
    put(&mut file, 0x22c, 4, &[0x7fff_ffff, 0x20_0000]);
    put(&mut file, 0x234, 1, &[1, 21, 1]);
    put(&mut file, 0x238, 4, &[2047]);
    put(&mut file, 0x248, 4, &[0, payload.len() as u64]);
    put(&mut file, 0x258, 8, &[0x10_0000]);
    put(&mut file, 0x260, 4, &[0x1_0000]);
    file
}

/// A flat Multiboot 1 image at 1 MiB.
fn multiboot() -> Vec<u8> {
    let mut file = vec![0x90; 256];
    let (magic, flags) = (0x1bad_b002_u64, 0x1_0003_u64);
    let checksum = (1 << 33) - magic - flags;
    let start = 0x10_0000;
    let addresses = [start, start, start + 256, start + 512, start + 64];
    put(&mut file, 0, 4, &[magic, flags, checksum]);
    put(&mut file, 12, 4, &addresses);
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("a vector takes everything");
    encoder.finish().expect("a vector takes everything")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_samples_boot() {
        let memory = GuestMemory::new(&[RamRange { start: 0, len: RAM }]).unwrap();
        for (n, bytes) in samples().into_iter().enumerate() {
            let source = BootSource {
                kernel: Payload::Bytes {
                    name: "sample".into(),
                    bytes: bytes.into(),
                },
                initrd: None,
                append: String::new(),
                protocol: BootProtocol::Auto,
            };
            let boot = load(&memory, &source, &acpi());
            assert!(boot.is_ok(), "sample {n}: {}", boot.unwrap_err());
        }
    }
}
