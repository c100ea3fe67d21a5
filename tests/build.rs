//! Builds the bare-metal guests in `guests/` with the system's C compiler: every `*.c` there is one, with the files of
//! `guests/runtime/`. A name that ends in `32` makes a 32-bit guest.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Freestanding code that an interrupt may interrupt anywhere, without position-independent, SSE or hardening extras.
const FLAGS: &str = "-O1 -g0 -ffreestanding -nostdlib -static -fno-pic -no-pie -mno-red-zone -mgeneral-regs-only \
    -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables -fno-strict-aliasing \
    -Wall -Wextra -Werror -Wl,--build-id=none -Wl,--no-warn-rwx-segments";

fn main() {
    println!("cargo::rerun-if-changed=guests");
    println!("cargo::rerun-if-env-changed=CC");
    let guests = Path::new("guests");
    let out: PathBuf = std::env::var_os("OUT_DIR").expect("cargo sets it").into();
    for entry in guests.read_dir().expect("the guests' folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|e| e == "c") {
            build(&path, &guests.join("runtime"), &out);
        }
    }
}

fn build(source: &Path, runtime: &Path, out: &Path) {
    let name = source.file_stem().expect("a file").to_str().expect("ASCII");
    let (start, mode) = match name.ends_with("32") {
        true => ("rt32.S", "-m32"),
        false => ("rt64.S", "-m64"),
    };
    let image = out.join(name);
    let linked = out.join(format!("{name}.elf"));
    let mut gcc = Command::new(std::env::var_os("CC").unwrap_or("gcc".into()));
    gcc.arg(mode).args(FLAGS.split_whitespace());
    gcc.arg("-I")
        .arg(runtime)
        .arg("-T")
        .arg(runtime.join("link.ld"));
    gcc.arg("-o").arg(&linked).arg(runtime.join(start));
    gcc.args(["rt.c", "chips.c", "virtio.c"].map(|file| runtime.join(file)));
    gcc.arg(source);
    run(gcc);
    // Multiboot loaders take 32-bit ELF files, whatever the code.
    let mut objcopy = Command::new("objcopy");
    run({
        objcopy.args(["-O", "elf32-i386"]).arg(&linked).arg(&image);
        objcopy
    });
}

fn run(mut command: Command) {
    let status = command.status();
    let status = status.unwrap_or_else(|e| panic!("{:?}: {e}", command.get_program()));
    assert!(status.success(), "{command:?} failed");
}
