//! Bare-metal guests on whole machines: the same guests, with the same results, on every engine that this host can use.
//!
//! A guest checks by itself what the processor and the board do (see `guests/`), prints a line for each check, and ends the
//! run with a status. The engines on which each guest ran are told on standard error.

mod engines;
mod runner;

use runner::{End, Guest};

#[test]
fn paging() {
    Guest::new("paging").runs();
}

#[test]
fn paging_of_32_bits() {
    Guest::new("paging32").runs();
}

#[test]
fn interrupts() {
    Guest::new("interrupts").runs();
}

#[test]
fn faults() {
    Guest::new("faults").runs();
}

#[test]
fn devices() {
    let disk = tempfile::NamedTempFile::new().expect("a file");
    let sector = |n: u32| [n.to_le_bytes().as_slice(), &[0; 508]].concat();
    let image: Vec<u8> = (0..2048).flat_map(sector).collect();
    std::fs::write(disk.path(), &image).expect("a disk");
    Guest::new("devices")
        .append("disk")
        .disk(disk.path())
        .runs();
    let after = std::fs::read(disk.path()).expect("the disk");
    assert_eq!(after[5 * 512..6 * 512], [0x5a; 512]);
    let unchanged = |range: std::ops::Range<usize>| after[range.clone()] == image[range];
    assert!(unchanged(0..5 * 512) && unchanged(6 * 512..image.len()));
}

#[test]
fn power_off() {
    let guest = Guest::new("ends").append("power-off");
    guest.ends(End::PoweredOff).runs();
}

#[test]
fn triple_fault() {
    let guest = Guest::new("ends").append("triple-fault");
    guest.ends(End::Crashed).runs();
}

#[test]
fn resets() {
    for way in ["keyboard-controller", "cf9", "port-92"] {
        Guest::new("ends").append(way).ends(End::Reset).runs();
    }
}

#[test]
fn starts_again_after_resets() {
    Guest::new("ends").append("again").reboots().runs();
}

#[test]
fn clocks() {
    Guest::new("clocks").runs();
}

#[test]
fn smp() {
    for cpus in [1, 2, 4] {
        Guest::new("smp").cpus(cpus).runs();
    }
}

#[test]
fn self_modifying_code() {
    let disk = tempfile::NamedTempFile::new().expect("a file");
    disk.as_file().set_len(1 << 20).expect("a disk");
    Guest::new("smc").append("disk").disk(disk.path()).runs();
}

#[test]
fn virtual_8086_mode() {
    Guest::new("v86_32").runs();
}

#[test]
fn gates() {
    Guest::new("gates32").runs();
}

#[test]
fn tasks() {
    Guest::new("tasks32").runs();
}

#[test]
fn modes() {
    Guest::new("modes").runs();
}
