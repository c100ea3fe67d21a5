//! The image `debian`: a Debian system on a root disk, with systemd, an SSH server,
//! Python and the kernel's modules.
//!
//! An ordinary user builds it. The packages are unpacked into a [`Tree`], which
//! remembers owners and permissions; the tree becomes an ext4 disk; a virtual
//! machine boots from it and runs the packages' scripts (`setup.sh`), as nobody
//! but root can; it hands back what they changed; and the tree with that becomes
//! the disk of the image. No time or random number of a build gets into it.
//!
//! It is made to boot fast on a slow processor: what a guest without a keyboard,
//! a real-time clock of its own or a physical disk does not need does not run.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::apt::{self, Archive};
use crate::archive;
use crate::cache::{BuildOptions, Workshop};
use crate::cpio;
use crate::deb::Deb;
use crate::dpkg::Database;
use crate::error::{Error, IoContext, Result};
use crate::ext4;
use crate::guest::{Guest, GuestJob};
use crate::kernel::{self, BUSYBOX_PACKAGE, Kernel};
use crate::manifest::Contents;
use crate::mini::MOUNT_SHARES;
use crate::progress::Progress;
use crate::settings;
use crate::tree::{Content, Kind, Node, Store, Tree};

pub(crate) const NAME: &str = "debian";
pub(crate) const DESCRIPTION: &str = "Debian with systemd, SSH server and Python, on a disk";

/// Beside what a minimal system has.
const PACKAGES: &[&str] = &[
    "usr-is-merged",
    "systemd-sysv",
    "systemd-resolved",
    "udev",
    "kmod",
    "openssh-server",
    "python3",
    "iproute2",
    "iputils-ping",
    "procps",
    "ca-certificates",
    "less",
    "nano",
];
/// For a user who is to do what root may.
const USER_PACKAGE: &str = "sudo";

/// Loaded before the root disk can be mounted. Those that are built in count as well.
const MODULES: &[&str] = &["virtio_pci", "virtio_blk", "ext4", "virtiofs"];

const DEFAULT_SIZE: u64 = 10 << 30;
const MOST_SIZE: u64 = 8 << 40;
const JOURNAL: u64 = 64 << 20;

/// Room that the packages' scripts have, beyond the unpacked files.
const SETUP_ROOM: u64 = 1 << 30;
const SETUP_MEMORY: u64 = 768 << 20;

const KERNEL_FILE: &str = "vmlinuz";
const INITRD_FILE: &str = "initrd.cpio";
const DISK_FILE: &str = "root.img";

const APPEND: &str = "console=ttyS0 quiet cryptomgr.notests";
const BOOT: &str = include_str!("boot.sh");
const SETUP: &str = include_str!("setup.sh");

/// How one Debian image is to be made.
pub(crate) struct Debian<'a> {
    name: &'a str,
    suite: Option<&'a str>,
    options: &'a BuildOptions,
}

impl<'a> Debian<'a> {
    /// `Err` if the options make no sense.
    pub(crate) fn new(
        name: &'a str,
        suite: Option<&'a str>,
        options: &'a BuildOptions,
    ) -> Result<Debian<'a>> {
        let debian = Debian {
            name,
            suite,
            options,
        };
        if let Some(package) = options.packages.iter().find(|name| !is_package_name(name)) {
            return Err(debian.bad_option(format!("'{package}' is not the name of a package")));
        }
        if let Some(user) = options.user.as_ref().filter(|name| !is_user_name(name)) {
            return Err(debian.bad_option(format!(
                "'{user}' cannot be a user: a name has at most 31 lower-case letters, digits, '-' and '_', \
                 begins with a letter, and is not that of one of the system's users"
            )));
        }
        if options.size.is_some_and(|size| size > MOST_SIZE) {
            return Err(debian.bad_option("the disk is too large, at most 8T are possible".into()));
        }
        Ok(debian)
    }

    fn bad_option(&self, problem: String) -> Error {
        Error::Option {
            image: self.name.to_owned(),
            problem,
        }
    }

    /// Makes the files of the image in `dir`.
    pub(crate) fn build(
        &self,
        workshop: &Workshop,
        dir: &Path,
        progress: &mut dyn Progress,
        guest: &mut dyn Guest,
    ) -> Result<Contents> {
        let (debs, kernel_names, sources_list) = self.fetch(workshop, progress)?;
        let is_kernel = |deb: &Deb| kernel_names.contains(&deb.package);

        // The kernel is for the host to load; the packages of it would want an initial RAM disk and a boot loader.
        let unpacked = workshop.scratch.join("kernel");
        for deb in debs
            .iter()
            .filter(|deb| is_kernel(deb) || deb.package == BUSYBOX_PACKAGE)
        {
            deb.unpack(&unpacked, workshop)?;
        }
        let kernel = Kernel::find(&unpacked, &debs)?;
        let initrd = initrd(&kernel, kernel::busybox(&unpacked, &debs)?)?;
        let initrd_path = dir.join(INITRD_FILE);
        let file = File::create(&initrd_path).while_trying("create", &initrd_path)?;
        let mut file = BufWriter::new(file);
        cpio::write(&initrd, &mut file)
            .and_then(|()| file.flush())
            .while_trying("write", &initrd_path)?;
        let kernel_path = dir.join(KERNEL_FILE);
        fs::rename(&kernel.image, &kernel_path).while_trying("create", &kernel_path)?;

        let mut store = Store::create(&workshop.scratch.join("files"))?;
        let (mut tree, packages) = unpack(workshop, &debs, is_kernel, &mut store, progress)?;
        let epoch = tree.iter().map(|(_, node)| node.mtime).max().unwrap_or(0);
        let job = GuestJob {
            kernel: kernel_path,
            initrd: initrd_path,
            append: format!("{APPEND} panic=-1 init=/lodger/setup"),
            disks: Vec::new(),
            memory: SETUP_MEMORY,
        };
        let setup = Setup {
            epoch,
            release: &kernel.release,
            user: self.options.user.as_deref(),
            packages: &packages,
        };
        setup.run(workshop, &mut tree, &mut store, job, progress, guest)?;

        progress.step("writing the disk", None);
        settings::apply(&mut tree, self.options, &sources_list);
        for (_, node) in tree.iter_mut() {
            // Zero is what was made here.
            if node.mtime == 0 || node.mtime > epoch {
                node.mtime = epoch;
            }
        }
        self.write_disk(&tree, &debs, epoch, &dir.join(DISK_FILE))?;
        Ok(Contents {
            kernel: Some(KERNEL_FILE),
            initrd: Some(INITRD_FILE),
            disk: Some(DISK_FILE),
            append: APPEND.into(),
            kernel_release: kernel.release,
            packages: debs
                .into_iter()
                .map(|deb| (deb.package, deb.version))
                .collect(),
            recipe: String::new(),
            pulled: None,
            imported: None,
        })
    }

    /// All packages in the order of their installation, the names of those that the kernel is of, and the package sources
    /// for the guest.
    fn fetch(
        &self,
        workshop: &Workshop,
        progress: &mut dyn Progress,
    ) -> Result<(Vec<Deb>, Vec<String>, String)> {
        let wanted: Vec<String> = PACKAGES
            .iter()
            .map(|name| name.to_string())
            .chain(self.options.user.iter().map(|_| USER_PACKAGE.to_owned()))
            .chain(self.options.packages.iter().cloned())
            .collect();
        let mut kernel_names = Vec::new();
        let mut sources_list = String::new();
        let debs = apt::fetch(workshop, Archive::Debian(self.suite), progress, |apt| {
            sources_list = apt.sources_list();
            kernel_names = kernel::packages(apt)?;
            let mut names = apt.resolve(&wanted)?;
            names.retain(|name| !kernel_names.contains(name));
            names.extend(kernel_names.iter().cloned());
            if !names.iter().any(|name| name == BUSYBOX_PACKAGE) {
                names.push(BUSYBOX_PACKAGE.to_owned());
            }
            Ok(names)
        })?;
        Ok((debs, kernel_names, sources_list))
    }

    fn write_disk(&self, tree: &Tree, debs: &[Deb], epoch: u32, path: &Path) -> Result<()> {
        let size = self.options.size.unwrap_or(DEFAULT_SIZE);
        // Different for different images, and the same for the same.
        let mut hash = Sha256::new();
        hash.update(format!("{:?}", self.options));
        for deb in debs {
            hash.update(deb.title());
            hash.update("\n");
        }
        let options = ext4::Options {
            size,
            uuid: ext4::uuid(hash),
            label: "lodger-root",
            time: epoch,
            journal: JOURNAL,
        };
        let disk = File::create(path).while_trying("create", path)?;
        ext4::write(tree, &options, &disk).map_err(|source| match source.kind() {
            io::ErrorKind::FileTooLarge => Error::DiskTooSmall {
                image: self.name.to_owned(),
                size,
                command: format!("build {}", self.name),
            },
            _ => Error::Io {
                action: "write",
                path: path.to_owned(),
                source,
            },
        })
    }
}

/// A tree with all packages, and how dpkg names them.
fn unpack(
    workshop: &Workshop,
    debs: &[Deb],
    is_kernel: impl Fn(&Deb) -> bool,
    store: &mut Store,
    progress: &mut dyn Progress,
) -> Result<(Tree, Vec<String>)> {
    let size = |deb: &Deb| fs::metadata(&deb.path).map_or(0, |file| file.len());
    let total = debs.iter().map(size).sum();
    progress.step("unpacking the packages", Some(total));
    let mut tree = Tree::default();
    for dir in ["bin", "lib", "lib64", "sbin"] {
        tree.dir(&format!("usr/{dir}"));
        tree.symlink(dir, &format!("usr/{dir}"));
    }
    for dir in ["dev", "proc", "run", "sys", "tmp"] {
        tree.dir(dir);
    }
    let mut database = Database::default();
    let mut done = 0;
    for deb in debs {
        if is_kernel(deb) {
            deb.files(workshop, store, |path, node| {
                if path.trim_start_matches("usr/").starts_with("lib/modules/") {
                    tree.insert(path, node);
                }
                Ok(())
            })?;
        } else {
            database.unpack(deb, workshop, store, &mut tree)?;
        }
        done += size(deb);
        progress.advance(done.min(total));
    }
    let packages = database.packages.clone();
    database.finish(&mut tree);
    Ok((tree, packages))
}

/// The initial RAM disk, which mounts the root disk.
fn initrd(kernel: &Kernel, busybox: Vec<u8>) -> Result<Tree> {
    let mut tree = Tree::default();
    for dir in ["dev", "proc", "root", "sys"] {
        tree.dir(dir);
    }
    tree.char_device("dev/console", 0o600, 5, 1);
    tree.file("bin/busybox", 0o755, busybox);
    tree.symlink("bin/sh", "busybox");
    tree.file("init", 0o755, BOOT.into());
    tree.file("bin/mount-shares", 0o755, MOUNT_SHARES.into());
    let mut order = String::new();
    for module in kernel.modules.closure(MODULES)? {
        let name = module.path.rsplit('/').next().unwrap_or(&module.path);
        order += &format!("{name}\n");
        tree.file(&format!("modules/{name}"), 0o644, module.data);
    }
    tree.file("modules/order", 0o644, order.into());
    Ok(tree)
}

/// The installation in a machine.
struct Setup<'a> {
    /// No file of the packages is newer.
    epoch: u32,
    release: &'a str,
    user: Option<&'a str>,
    packages: &'a [String],
}

impl Setup<'_> {
    /// Runs the packages' scripts over the tree.
    fn run(
        &self,
        workshop: &Workshop,
        tree: &mut Tree,
        store: &mut Store,
        job: GuestJob,
        progress: &mut dyn Progress,
        guest: &mut dyn Guest,
    ) -> Result<()> {
        progress.step("writing a disk for the setup", None);
        let mut before = tree.clone();
        before.file("lodger/setup", 0o755, SETUP.into());
        before.file("lodger/packages", 0o644, lines(self.packages).into());
        let settings = format!(
            "epoch={}\nrelease={}\nuser={}\n",
            self.epoch,
            self.release,
            self.user.unwrap_or_default()
        );
        before.file("lodger/settings", 0o644, settings.into());
        let contents: u64 = before.iter().map(|(_, node)| size(node)).sum();
        let options = ext4::Options {
            size: contents + contents / 2 + SETUP_ROOM,
            uuid: [0x11; 16],
            label: "lodger-setup",
            time: self.epoch,
            journal: JOURNAL,
        };
        let disk_path = workshop.scratch.join("setup.img");
        let disk = File::create(&disk_path).while_trying("create", &disk_path)?;
        ext4::write(&before, &options, &disk).while_trying("write", &disk_path)?;
        drop(before);
        let out_path = workshop.scratch.join("changes.tar");
        let out = File::create(&out_path).while_trying("create", &out_path)?;
        out.set_len(SETUP_ROOM).while_trying("write", &out_path)?;

        let job = GuestJob {
            disks: vec![disk_path.clone(), out_path.clone()],
            ..job
        };
        self.run_guest(&job, progress, guest)?;

        let out = File::open(&out_path).while_trying("open", &out_path)?;
        merge(tree, out, store).map_err(|error| Error::Setup {
            detail: format!("its archive cannot be read: {error}"),
        })?;
        for path in [disk_path, out_path] {
            fs::remove_file(&path).while_trying("remove", &path)?;
        }
        Ok(())
    }

    fn run_guest(
        &self,
        job: &GuestJob,
        progress: &mut dyn Progress,
        guest: &mut dyn Guest,
    ) -> Result<()> {
        let total = self.packages.len() as u64;
        progress.step("setting up the packages in a virtual machine", None);
        let mut configured = 0;
        let mut outcome = None;
        let mut last = Vec::new();
        let result = guest.run(job, &mut |line| {
            if let Some(package) = line.strip_prefix("processing: configure: ") {
                configured += 1;
                if configured == 1 || configured % 10 == 0 || configured == total {
                    progress.step(
                        &format!("setting up the packages in a virtual machine: {configured} of {total}, {package}"),
                        None,
                    );
                }
            } else if let Some(text) = line.strip_prefix("LODGER-SETUP ") {
                outcome = Some(text.trim().to_owned());
            } else if outcome.is_none()
                && !line.starts_with("status: ")
                && !line.trim().is_empty()
            {
                last.push(line.trim().to_owned());
                last.drain(..last.len().saturating_sub(3));
            }
        });
        let detail = match (result, outcome) {
            (Ok(()), Some(text)) if text == "ok" => return Ok(()),
            (Ok(()), Some(text)) => text,
            (Ok(()), None) => "it ended early".to_owned(),
            (Err(reason), _) => reason,
        };
        last.push(detail);
        Err(Error::Setup {
            detail: last.join("; "),
        })
    }
}

/// Brings a tree to the state that the machine has told of: its archive begins with a list of all
/// files that there are, then come those that have changed.
fn merge(tree: &mut Tree, archive: impl io::Read, store: &mut Store) -> io::Result<()> {
    let mut paths = None;
    archive::read(archive, store, |path, mut node| {
        // Access control lists are left to systemd-tmpfiles, which sets them at each start.
        node.xattrs.retain(|name, _| !name.starts_with("system."));
        match (&node.kind, &paths) {
            (Kind::File(content), None) if path == "lodger-paths" => {
                let text = String::from_utf8_lossy(&content.bytes()?).into_owned();
                paths = Some(text);
            }
            // What is mounted there is not of the disk.
            _ if ["dev", "proc", "run", "sys", "tmp"].contains(&path) => {}
            _ => tree.insert(path, node),
        }
        Ok(())
    })?;
    let paths = paths.ok_or_else(|| io::Error::other("it has no list of files"))?;
    let there: std::collections::HashSet<&str> = paths.lines().collect();
    tree.retain(|path| there.contains(path));
    Ok(())
}

fn size(node: &Node) -> u64 {
    match &node.kind {
        Kind::File(content) => Content::len(content).next_multiple_of(4096),
        _ => 0,
    }
}

fn lines(words: &[String]) -> String {
    words.iter().map(|word| format!("{word}\n")).collect()
}

/// Debian Policy 5.6.7. One that ends in `-` would mean a removal to apt.
fn is_package_name(name: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b);
    name.len() > 1
        && name.bytes().all(letter)
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && !name.ends_with('-')
}

/// What useradd takes, less what would be confusing.
fn is_user_name(name: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b);
    let system = [
        "root", "daemon", "bin", "sys", "sync", "games", "man", "lp", "mail", "news", "uucp",
        "proxy", "backup", "list", "irc", "nobody", "sshd",
    ];
    name.len() < 32
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(letter)
        && !system.contains(&name)
}

#[cfg(test)]
mod tests;
