//! The kernel that guests boot: Debian's for virtual machines, unmodified, and the
//! busybox of its initial RAM disks.

use std::fs;
use std::path::{Path, PathBuf};

use crate::apt::Apt;
use crate::deb::Deb;
use crate::error::{Error, IoContext, Result};
use crate::modules::Modules;

/// Depends on the newest kernel package.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
pub(crate) const BUSYBOX_PACKAGE: &str = "busybox-static";

/// The names of all packages that the newest kernel is made of.
pub(crate) fn packages(apt: &Apt) -> Result<Vec<String>> {
    let kernel = apt
        .dependencies(META_PACKAGE)?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| Error::Package {
            package: META_PACKAGE.to_owned(),
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
    Ok(packages)
}

/// An unpacked kernel.
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    pub(crate) release: String,
    pub(crate) modules: Modules,
}

impl Kernel {
    pub(crate) fn find(root: &Path, debs: &[Deb]) -> Result<Kernel> {
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

/// The program of an unpacked busybox.
pub(crate) fn busybox(root: &Path, debs: &[Deb]) -> Result<Vec<u8>> {
    let busybox = find(root, "bin/busybox").ok_or_else(|| Error::Package {
        package: title(debs, BUSYBOX_PACKAGE),
        reason: "it has no bin/busybox".to_owned(),
    })?;
    fs::read(&busybox).while_trying("read", &busybox)
}

#[cfg(test)]
mod tests {
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
}
