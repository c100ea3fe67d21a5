//! The image `mini`: the newest cloud kernel, and an initial RAM disk with
//! busybox, the drivers that the board needs, and `init.sh`.
//!
//! It is made to boot fast on a slow processor. The RAM disk is not compressed,
//! because the host copies bytes faster than the guest uncompresses them, and
//! holds nothing but what is needed: each file costs the kernel tens of thousands
//! of instructions before the first output.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::apt::{self, Apt, Deb};
use crate::cache::Workshop;
use crate::cpio::Tree;
use crate::error::{Error, IoContext, Result};
use crate::manifest::Contents;
use crate::modules::{Modules, modules_dep};
use crate::progress::Progress;

pub(crate) const DESCRIPTION: &str = "Debian cloud kernel and busybox, in memory";

/// Depends on the newest kernel package.
const KERNEL_META_PACKAGE: &str = "linux-image-cloud-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";

/// Drivers of the virtio devices that `init.sh` knows, and the file system of
/// most disks. Those that a kernel has built in count as well.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    "ext4",
];

/// Each console byte is an exit, and there are many of them without `quiet`. The
/// kernel's self-tests of its cryptography would be half of all instructions up to
/// the first output (0.87 of 1.57 thousand million).
const APPEND: &str = "console=ttyS0 quiet cryptomgr.notests";

const INIT: &str = include_str!("init.sh");
/// Called by busybox's DHCP client.
const UDHCPC: &str = include_str!("udhcpc.sh");
const PROFILE: &str = "PS1='mini:\\w# '\n";

const KERNEL_FILE: &str = "vmlinuz";
const INITRD_FILE: &str = "initrd.cpio";

/// Makes the files of the image in `dir`.
pub(crate) fn build(
    workshop: &Workshop,
    dir: &Path,
    progress: &mut dyn Progress,
) -> Result<Contents> {
    let debs = apt::fetch(workshop, progress, choose_packages)?;

    progress.step("unpacking the packages", None);
    let root = workshop.scratch.join("unpacked");
    for deb in &debs {
        deb.unpack(&root, workshop)?;
    }
    let kernel = Kernel::find(&root, &debs)?;
    let busybox = find(&root, "bin/busybox").ok_or_else(|| Error::Package {
        package: title(&debs, BUSYBOX_PACKAGE),
        reason: "it has no bin/busybox".to_owned(),
    })?;
    let busybox = fs::read(&busybox).while_trying("read", &busybox)?;

    progress.step("packing the initial RAM disk", None);
    let tree = initrd(&kernel, busybox)?;
    let path = dir.join(INITRD_FILE);
    let mut file = BufWriter::new(File::create(&path).while_trying("create", &path)?);
    tree.write(&mut file)
        .and_then(|()| file.flush())
        .while_trying("write", &path)?;
    let path = dir.join(KERNEL_FILE);
    fs::rename(&kernel.image, &path).while_trying("create", &path)?;

    Ok(Contents {
        kernel: KERNEL_FILE,
        initrd: INITRD_FILE,
        append: APPEND,
        kernel_release: kernel.release,
        packages: debs
            .into_iter()
            .map(|deb| (deb.package, deb.version))
            .collect(),
    })
}

/// The names of all packages that the image is made of.
fn choose_packages(apt: &Apt) -> Result<Vec<String>> {
    let kernel = apt
        .dependencies(KERNEL_META_PACKAGE)?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| Error::Package {
            package: KERNEL_META_PACKAGE.to_owned(),
            reason: "it does not depend on a kernel".to_owned(),
        })?;
    // Newer releases split a kernel into several packages: linux-PART-RELEASE.
    let release = kernel.trim_start_matches("linux-image");
    let mut packages: Vec<String> = apt
        .dependencies(&kernel)?
        .into_iter()
        .filter(|name| name.starts_with("linux-") && name.ends_with(release))
        .collect();
    packages.push(kernel);
    packages.push(BUSYBOX_PACKAGE.to_owned());
    Ok(packages)
}

/// An unpacked kernel.
struct Kernel {
    image: PathBuf,
    release: String,
    modules: Modules,
}

impl Kernel {
    fn find(root: &Path, debs: &[Deb]) -> Result<Kernel> {
        let package = title(debs, "linux-image-");
        let missing = |what: &str| Error::Package {
            package: package.clone(),
            reason: format!("it has no {what}"),
        };
        let all = find(root, "lib/modules").ok_or_else(|| missing("lib/modules"))?;
        let release = fs::read_dir(&all)
            .while_trying("read", &all)?
            .find_map(|entry| entry.ok()?.file_name().into_string().ok())
            .ok_or_else(|| missing("lib/modules/*"))?;
        let modules = all.join(&release);
        let image = [
            root.join(format!("boot/vmlinuz-{release}")),
            modules.join("vmlinuz"),
        ]
        .into_iter()
        .find(|path| path.exists())
        .ok_or_else(|| missing("vmlinuz"))?;
        Ok(Kernel {
            image,
            modules: Modules::open(&modules, &package)?,
            release,
        })
    }
}

/// A path below `root`, which newer releases have below `usr`.
fn find(root: &Path, path: &str) -> Option<PathBuf> {
    [root.join(path), root.join("usr").join(path)]
        .into_iter()
        .find(|path| path.exists())
}

fn title(debs: &[Deb], prefix: &str) -> String {
    debs.iter()
        .find(|deb| deb.package.starts_with(prefix))
        .map_or(prefix.to_owned(), Deb::title)
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

    tree.file("init", 0o755, INIT.into());
    tree.file("etc/udhcpc/default.script", 0o755, UDHCPC.into());
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

    /// A directory like the one that packages are unpacked into.
    fn unpacked(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, data) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, data).unwrap();
        }
        root
    }

    #[test]
    fn kernels_of_older_and_newer_releases_are_found() {
        for (image, modules) in [
            ("boot/vmlinuz-6.1-cloud", "lib/modules/6.1-cloud"),
            ("boot/vmlinuz-6.1-cloud", "usr/lib/modules/6.1-cloud"),
            (
                "usr/lib/modules/6.1-cloud/vmlinuz",
                "usr/lib/modules/6.1-cloud",
            ),
        ] {
            let root = unpacked(&[
                (image, b"kernel"),
                (&format!("{modules}/modules.builtin"), b""),
                (&format!("{modules}/kernel/a.ko"), b""),
            ]);
            let kernel = Kernel::find(root.path(), &[]).unwrap();
            assert_eq!(kernel.release, "6.1-cloud");
            assert_eq!(kernel.image, root.path().join(image));
        }
    }

    #[test]
    fn what_a_kernel_package_lacks_is_named() {
        for (files, expected) in [
            (&[][..], "it has no lib/modules."),
            (
                &[("lib/modules/6.1/modules.builtin", &b""[..])],
                "it has no vmlinuz.",
            ),
        ] {
            let root = unpacked(files);
            let error = Kernel::find(root.path(), &[]).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn scripts_are_shell_scripts() {
        for script in [INIT, UDHCPC] {
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
