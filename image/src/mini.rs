//! The image `mini`: the newest cloud kernel, and an initial RAM disk with
//! busybox, the drivers that the board needs, and `init.sh`.
//!
//! It is made to boot fast on a slow processor. The RAM disk is not compressed,
//! because the host copies bytes faster than the guest uncompresses them, and
//! holds nothing but what is needed: each file costs the kernel tens of thousands
//! of instructions before the first output.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::agent;
use crate::apt::{self, Apt, Archive};
use crate::cache::Workshop;
use crate::cpio;
use crate::error::{IoContext, Result};
use crate::kernel::{self, BUSYBOX_PACKAGE, Kernel};
use crate::manifest::Contents;
use crate::modules::modules_dep;
use crate::progress::Progress;
use crate::tree::Tree;

pub(crate) const DESCRIPTION: &str = "Debian cloud kernel and busybox, in memory";

/// Drivers of the virtio devices that `init.sh` knows, the file system of most
/// disks, and the power button as an input device. Those that a kernel has built in count as well.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    agent::MODULE,
    "virtiofs",
    "virtio_balloon",
    "ext4",
    "button",
    "evdev",
];

/// Each console byte is an exit, and there are many of them without `quiet`. The
/// kernel's self-tests of its cryptography would be half of all instructions up to
/// the first output (0.87 of 1.57 thousand million).
const APPEND: &str = "console=ttyS0 quiet cryptomgr.notests";

const INIT: &str = include_str!("init.sh");
/// Called by busybox's DHCP client.
const UDHCPC: &str = include_str!("udhcpc.sh");
/// Also for images with a root disk.
pub(crate) const MOUNT_SHARES: &str = include_str!("mount-shares.sh");
const POWER: &str = include_str!("power.sh");
const PROFILE: &str = "PS1='mini:\\w# '\n";

const KERNEL_FILE: &str = "vmlinuz";
const INITRD_FILE: &str = "initrd.cpio";

/// Makes the files of the image in `dir`.
pub(crate) fn build(
    workshop: &Workshop,
    dir: &Path,
    progress: &mut dyn Progress,
) -> Result<Contents> {
    let debs = apt::fetch(workshop, Archive::Host, progress, choose_packages)?;

    progress.step("unpacking the packages", None);
    let root = workshop.scratch.join("unpacked");
    for deb in &debs {
        deb.unpack(&root, workshop)?;
    }
    let kernel = Kernel::find(&root, &debs)?;
    let busybox = kernel::busybox(&root, &debs)?;

    progress.step("packing the initial RAM disk", None);
    let tree = initrd(&kernel, busybox)?;
    let path = dir.join(INITRD_FILE);
    let mut file = BufWriter::new(File::create(&path).while_trying("create", &path)?);
    cpio::write(&tree, &mut file)
        .and_then(|()| file.flush())
        .while_trying("write", &path)?;
    let path = dir.join(KERNEL_FILE);
    fs::rename(&kernel.image, &path).while_trying("create", &path)?;

    Ok(Contents {
        kernel: Some(KERNEL_FILE),
        initrd: Some(INITRD_FILE),
        disk: None,
        append: APPEND.into(),
        kernel_release: kernel.release,
        packages: debs
            .into_iter()
            .map(|deb| (deb.package, deb.version))
            .collect(),
        recipe: recipe(),
        pulled: None,
        imported: None,
    })
}

/// The names of all packages that the image is made of.
fn choose_packages(apt: &Apt) -> Result<Vec<String>> {
    let mut packages = kernel::packages(apt)?;
    packages.push(BUSYBOX_PACKAGE.to_owned());
    Ok(packages)
}

/// Changes with whatever this program puts into the image.
pub(crate) fn recipe() -> String {
    let mut hash = Sha256::new();
    for part in [INIT, UDHCPC, POWER, PROFILE, APPEND] {
        hash.update(part);
    }
    MODULES.iter().for_each(|module| hash.update(module));
    hash.update(agent::PROGRAM);
    let digest = hash.finalize();
    digest.iter().take(8).map(|b| format!("{b:02x}")).collect()
}

fn initrd(kernel: &Kernel, busybox: Vec<u8>) -> Result<Tree> {
    let mut tree = Tree::default();
    for dir in ["dev", "mnt", "proc", "root", "run", "sys", "tmp"] {
        tree.dir(dir);
    }
    // What PID 1 starts with as its standard input and output.
    tree.char_device("dev/console", 0o600, 5, 1);

    // The other names of busybox are left to `init.sh`.
    tree.file("bin/busybox", 0o755, busybox);
    tree.symlink("bin/sh", "busybox");
    tree.symlink("sbin", "bin");
    tree.symlink("usr/bin", "../bin");
    tree.symlink("usr/sbin", "../bin");

    agent::add(&mut tree);
    tree.file("init", 0o755, INIT.into());
    tree.file("bin/mount-shares", 0o755, MOUNT_SHARES.into());
    tree.file("etc/udhcpc/default.script", 0o755, UDHCPC.into());
    // Named by the event and its value.
    tree.file("etc/acpi/PWRF/00000080", 0o755, POWER.into());
    tree.file("etc/group", 0o644, "root:x:0:\n".into());
    tree.file("etc/passwd", 0o644, "root::0:0:root:/root:/bin/sh\n".into());
    tree.file("etc/profile", 0o644, PROFILE.into());

    let dir = format!("lib/modules/{}", kernel.release);
    let modules = kernel.modules.closure(MODULES)?;
    tree.file(
        &format!("{dir}/modules.dep"),
        0o644,
        modules_dep(&modules).into(),
    );
    // So that modprobe is content with names of what is built in.
    tree.file(
        &format!("{dir}/modules.builtin"),
        0o644,
        kernel.modules.builtin_list.as_str().into(),
    );
    for module in modules {
        tree.file(&format!("{dir}/{}", module.path), 0o644, module.data);
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn scripts_are_shell_scripts() {
        for script in [INIT, UDHCPC, POWER, MOUNT_SHARES] {
            let mut shell = Command::new("sh")
                .arg("-n")
                .stdin(Stdio::piped())
                .spawn()
                .unwrap();
            let mut input = shell.stdin.take().unwrap();
            input.write_all(script.as_bytes()).unwrap();
            drop(input);
            assert!(shell.wait().unwrap().success());
        }
    }
}
