//! Disk images: what is written is read back, by us and, where it is installed, by QEMU.

mod manage;
mod qcow2;
mod sample;

use std::path::Path;
use std::process::Command;

/// Runs `qemu-img` with these arguments; its output and whether it succeeded. None if the host has no such program, which is said.
fn qemu_img(arguments: &[&str]) -> Option<(bool, String)> {
    match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).into_owned();
            Some((output.status.success(), text))
        }
        Err(error) => {
            eprintln!("left out: qemu-img {}: {error}", arguments.join(" "));
            None
        }
    }
}

/// Lets `qemu-img` do something that must succeed, if there is one; whether there is.
#[track_caller]
fn qemu_img_agrees(arguments: &[&str]) -> bool {
    let Some((success, text)) = qemu_img(arguments) else {
        return false;
    };
    assert!(success, "qemu-img {}:\n{text}", arguments.join(" "));
    true
}

fn text(path: &Path) -> &str {
    path.to_str().expect("ASCII")
}

/// A small generator of numbers, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1);
        (self.0 >> 33) as usize % n
    }
}
