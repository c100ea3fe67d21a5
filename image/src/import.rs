//! Disk images of other makers, such as the cloud images of distributions.
//!
//! There is no firmware that would start their boot loader. So the kernel and its RAM disk are
//! taken out of the image, as its boot loader's configuration names them, and kept beside it.
//!
//! Formats: UEFI specification 2.10, 5.3 (GPT); the master boot record; GRUB's `grub.cfg`; the Boot
//! Loader Specification's entries. Limits: sectors of 512 bytes, primary partitions; kernels on ext2, ext3 and
//! ext4; no encryption.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ext4_view::{Ext4, Ext4Read};
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::error::{Error, IoContext, Result};
use crate::manifest::Contents;
use crate::progress::Progress;

const KERNEL_FILE: &str = "vmlinuz";
const INITRD_FILE: &str = "initrd.img";
const DISK_FILE: &str = "root.img";

const SECTOR: u64 = 512;
/// Partitions that are looked at.
const MOST_PARTITIONS: u32 = 128;
/// Bytes of a boot loader's configuration, of a kernel and of a RAM disk.
const MOST_TEXT: u64 = 4 << 20;
const MOST_BOOT: u64 = 2 << 30;

/// Where a boot loader's configuration is on the file system that has the kernels, which may be mounted at /boot.
const GRUB: &[&str] = &[
    "/boot/grub/grub.cfg",
    "/boot/grub2/grub.cfg",
    "/grub/grub.cfg",
    "/grub2/grub.cfg",
];
const ENTRIES: &[&str] = &["/boot/loader/entries", "/loader/entries"];
/// Where kernels are, if no configuration names one.
const KERNELS: &[&str] = &["/boot", "/"];

/// Where an image came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Imported {
    /// What it is called.
    pub(crate) name: String,
    /// The file, as it was then.
    pub(crate) file: PathBuf,
}

/// What an imported disk boots, where that is not to be found on it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImportOptions {
    /// The kernel, and its RAM disk.
    pub kernel: Option<PathBuf>,
    /// The RAM disk of that kernel.
    pub initrd: Option<PathBuf>,
    /// The kernel command line, in place of the disk's own.
    pub append: Option<String>,
    /// Bytes of the disk, if it is to be larger.
    pub size: Option<u64>,
}

/// A kernel as a boot loader's configuration names it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Entry {
    kernel: String,
    initrd: Option<String>,
    append: String,
}

/// What lies between two bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Partition {
    /// As Linux counts them; 0 is the whole disk.
    number: u32,
    start: u64,
}

impl Cache {
    /// Makes an image called `name` of a disk: `fill` writes it, raw, into a new file, and `source` is its name for people.
    pub fn import(
        &self,
        name: &str,
        source: &Path,
        options: &ImportOptions,
        progress: &mut dyn Progress,
        fill: &mut dyn FnMut(&Path) -> io::Result<()>,
    ) -> Result<()> {
        if !is_name(name) {
            return Err(Error::Option {
                image: name.to_owned(),
                problem: "names of imported images are of a-z, 0-9, '.', '_' and '-', and not those of Lodger's own".into(),
            });
        }
        let (workshop, _) = self.enter(progress)?;
        let done = self.install(name, &workshop, |dir| {
            build(dir, name, source, options, progress, fill)
        });
        done.map(drop)
            .map_err(|error| error.or_no_space(self.dir(), "the image"))
    }
}

/// Whether an imported image may be called so.
pub(crate) fn is_name(name: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
    let first = name.as_bytes().first();
    first.is_some_and(u8::is_ascii_alphanumeric)
        && name.bytes().all(letter)
        && name.len() <= 100
        && !["mini", "debian"].contains(&name)
}

fn build(
    dir: &Path,
    name: &str,
    source: &Path,
    options: &ImportOptions,
    progress: &mut dyn Progress,
    fill: &mut dyn FnMut(&Path) -> io::Result<()>,
) -> Result<Contents> {
    progress.step(&format!("copying {}", source.display()), None);
    let disk_path = dir.join(DISK_FILE);
    fill(&disk_path).while_trying("import", source)?;
    let disk = File::options()
        .read(true)
        .write(true)
        .open(&disk_path)
        .while_trying("open", &disk_path)?;
    let len = disk.metadata().while_trying("read", &disk_path)?.len();
    match options.size {
        Some(size) if size < len => {
            return Err(Error::Option {
                image: name.to_owned(),
                problem: format!("the disk has {len} bytes and cannot be made smaller"),
            });
        }
        Some(size) => disk.set_len(size).while_trying("write", &disk_path)?,
        None => {}
    }
    progress.step("looking for a kernel on the disk", None);
    let mut append = match (&options.kernel, &options.initrd) {
        (Some(kernel), Some(initrd)) => {
            for (from, to) in [(kernel, KERNEL_FILE), (initrd, INITRD_FILE)] {
                std::fs::copy(from, dir.join(to)).while_trying("copy", from)?;
            }
            String::new()
        }
        _ => extract(&disk, dir).map_err(|problem| Error::Import {
            file: source.to_owned(),
            problem,
        })?,
    };
    if let Some(own) = &options.append {
        append.clone_from(own);
    }
    Ok(Contents {
        kernel: Some(KERNEL_FILE),
        initrd: Some(INITRD_FILE),
        disk: Some(DISK_FILE),
        append: with_console(&append),
        imported: Some(Imported {
            name: name.to_owned(),
            file: source.to_owned(),
        }),
        ..Contents::default()
    })
}

/// Puts the kernel and the RAM disk of the disk into `dir`; their command line.
fn extract(disk: &File, dir: &Path) -> Result<String, String> {
    let mut tried = Vec::new();
    for partition in partitions(disk).map_err(|error| error.to_string())? {
        let view = View {
            disk: disk.try_clone().map_err(|error| error.to_string())?,
            start: partition.start,
        };
        let Ok(files) = Ext4::load(Box::new(view)) else {
            continue;
        };
        tried.push(match partition.number {
            0 => "the whole disk".to_owned(),
            number => format!("partition {number}"),
        });
        let Some((entry, base)) = find(&files) else {
            continue;
        };
        let path = |path: &str| format!("{base}/{}", path.trim_start_matches('/'));
        let initrd = entry.initrd.as_deref();
        let initrd = initrd
            .ok_or_else(|| format!("{} is there without an initial RAM disk", entry.kernel))?;
        for (from, to) in [(entry.kernel.as_str(), KERNEL_FILE), (initrd, INITRD_FILE)] {
            copy_out(&files, &path(from), &dir.join(to))?;
        }
        let mut append = entry.append;
        if !append.split(' ').any(|word| word.starts_with("root=")) {
            let root = match partition.number {
                0 => "/dev/vda".to_owned(),
                number => format!("/dev/vda{number}"),
            };
            append = format!("root={root} ro {append}");
        }
        return Ok(append.trim().to_owned());
    }
    Err(match tried.is_empty() {
        true => "no ext4 file system is on it".into(),
        false => format!(
            "no kernel with an initial RAM disk is on it (looked at {})",
            tried.join(", ")
        ),
    })
}

/// The kernel to boot, and the directory of the file system that its paths are relative to.
fn find(files: &Ext4) -> Option<(Entry, &'static str)> {
    let text = |path: &str| {
        let small = files
            .metadata(path)
            .is_ok_and(|file| file.len() <= MOST_TEXT);
        small.then(|| files.read(path).ok()).flatten()
    };
    let text = |path: &str| Some(String::from_utf8_lossy(&text(path)?).into_owned());
    let is_there = |base: &str, entry: &Entry| {
        let path = format!("{base}/{}", entry.kernel.trim_start_matches('/'));
        files.exists(path.as_str()).unwrap_or(false)
    };
    for path in GRUB {
        if let Some(entry) = text(path).and_then(|text| grub_entry(&text)) {
            // On a file system of its own, or in /boot of the root file system.
            for base in ["", "/boot"] {
                if is_there(base, &entry) {
                    return Some((entry, base));
                }
            }
        }
    }
    for dir in ENTRIES {
        let mut names = names(files, dir);
        names.retain(|name| name.ends_with(".conf") && !name.contains("rescue"));
        names.sort_by_key(|name| std::cmp::Reverse(version(name)));
        for name in names {
            let Some(entry) = text(&format!("{dir}/{name}")).and_then(|text| loader_entry(&text))
            else {
                continue;
            };
            for base in ["", "/boot"] {
                if is_there(base, &entry) {
                    return Some((entry, base));
                }
            }
        }
    }
    for dir in KERNELS {
        let names = names(files, dir);
        let mut kernels: Vec<_> = names
            .iter()
            .filter(|name| name.starts_with("vmlinuz-"))
            .collect();
        kernels.sort_by_key(|name| std::cmp::Reverse(version(name)));
        for kernel in kernels {
            let release = &kernel["vmlinuz-".len()..];
            let forms = ["initrd.img-R", "initramfs-R.img", "initrd-R", "initramfs-R"];
            let forms = forms.map(|form| form.replace('R', release));
            let initrd = forms.into_iter().find(|form| names.contains(form));
            if initrd.is_some() {
                let entry = Entry {
                    kernel: kernel.clone(),
                    initrd,
                    append: String::new(),
                };
                return Some((entry, if *dir == "/" { "" } else { dir }));
            }
        }
    }
    None
}

fn names(files: &Ext4, dir: &str) -> Vec<String> {
    let entries = files.read_dir(dir).into_iter().flatten();
    entries
        .filter_map(|entry| Some(entry.ok()?.file_name().as_str().ok()?.to_owned()))
        .collect()
}

/// The numbers in a name, by which versions are in order.
fn version(name: &str) -> Vec<u64> {
    let numbers = name.split(|c: char| !c.is_ascii_digit());
    numbers.filter_map(|number| number.parse().ok()).collect()
}

/// The first kernel that a grub.cfg starts. Words with variables of GRUB's are left out.
fn grub_entry(text: &str) -> Option<Entry> {
    let mut entry = Entry::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("linux" | "linux16" | "linuxefi") if entry.kernel.is_empty() => {
                let path = words.next().filter(|path| path.starts_with('/'));
                let Some(path) = path else {
                    continue;
                };
                entry.kernel = path.to_owned();
                let words: Vec<_> = words.filter(|word| !word.contains('$')).collect();
                entry.append = words.join(" ");
            }
            Some("initrd" | "initrd16" | "initrdefi") if !entry.kernel.is_empty() => {
                // The last one is the system's, others before it are for the processor.
                entry.initrd = words.next_back().map(str::to_owned);
                break;
            }
            Some("menuentry") if !entry.kernel.is_empty() => break,
            _ => {}
        }
    }
    (!entry.kernel.is_empty()).then_some(entry)
}

/// An entry of the Boot Loader Specification.
fn loader_entry(text: &str) -> Option<Entry> {
    let mut entry = Entry::default();
    for line in text.lines() {
        let Some((key, value)) = line.trim().split_once(char::is_whitespace) else {
            continue;
        };
        let first = || value.split_whitespace().next().map(str::to_owned);
        match key {
            "linux" => entry.kernel = first()?,
            "initrd" => entry.initrd = first(),
            "options" => {
                let words: Vec<_> = value
                    .split_whitespace()
                    .filter(|word| !word.contains('$'))
                    .collect();
                entry.append = words.join(" ");
            }
            _ => {}
        }
    }
    (!entry.kernel.is_empty()).then_some(entry)
}

/// The last console is the one that programs write to; the first serial port is ours.
fn with_console(append: &str) -> String {
    let has = |word: &str| word == "console=ttyS0" || word.starts_with("console=ttyS0,");
    match append.split(' ').any(has) {
        true => append.to_owned(),
        false => format!("{append} console=ttyS0").trim().to_owned(),
    }
}

fn copy_out(files: &Ext4, from: &str, to: &Path) -> Result<(), String> {
    let wrong = |error: String| format!("{from}: {error}");
    let mut file = files.open(from).map_err(|error| wrong(error.to_string()))?;
    if file.metadata().len() > MOST_BOOT {
        return Err(wrong("too large to be loaded".into()));
    }
    let mut out = File::create(to).map_err(|error| wrong(error.to_string()))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file
            .read_bytes(&mut buffer)
            .map_err(|error| wrong(error.to_string()))?
        {
            0 => return Ok(()),
            n => out
                .write_all(&buffer[..n])
                .map_err(|error| wrong(error.to_string()))?,
        }
    }
}

/// A disk from some byte on.
struct View {
    disk: File,
    start: u64,
}

impl Ext4Read for View {
    fn read(
        &mut self,
        at: u64,
        buffer: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let at = self.start.checked_add(at).ok_or("beyond the end")?;
        Ok(self.disk.read_exact_at(buffer, at)?)
    }
}

/// The partitions of a disk, or the whole if there are none.
fn partitions(disk: &File) -> io::Result<Vec<Partition>> {
    let mut first = [0; 2 * SECTOR as usize];
    disk.read_exact_at(&mut first, 0)?;
    let (mbr, gpt) = first.split_at(SECTOR as usize);
    let u32_at = |bytes: &[u8], at: usize| {
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    let u64_at = |bytes: &[u8], at: usize| {
        u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
    };
    let mut found = Vec::new();
    if gpt.starts_with(b"EFI PART") {
        let (table, count, size) = (u64_at(gpt, 72), u32_at(gpt, 80), u64::from(u32_at(gpt, 84)));
        if !(128..=4096).contains(&size) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a damaged partition table",
            ));
        }
        for number in 1..=count.min(MOST_PARTITIONS) {
            let mut entry = [0; 128];
            let at = table
                .checked_mul(SECTOR)
                .and_then(|at| at.checked_add(u64::from(number - 1) * size));
            let Some(at) = at else {
                break;
            };
            disk.read_exact_at(&mut entry, at)?;
            // An entry without a type is not in use.
            if let (true, Some(start)) = (
                entry[..16] != [0; 16],
                u64_at(&entry, 32).checked_mul(SECTOR),
            ) {
                found.push(Partition { number, start });
            }
        }
    } else if mbr[510..] == [0x55, 0xaa] {
        for number in 1..=4 {
            let entry = &mbr[446 + (number as usize - 1) * 16..][..16];
            let start = u64::from(u32_at(entry, 8)) * SECTOR;
            if entry[4] != 0 && start > 0 {
                found.push(Partition { number, start });
            }
        }
    }
    if found.is_empty() {
        found.push(Partition {
            number: 0,
            start: 0,
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_of_boot_loaders() {
        let entry = |kernel: &str, initrd: &str, append: &str| {
            Some(Entry {
                kernel: kernel.into(),
                initrd: (!initrd.is_empty()).then(|| initrd.into()),
                append: append.into(),
            })
        };
        let debian = "set default=0\nif x; then\n  menuentry 'Debian' --class gnu {\n\tinsmod ext2\n\
            \tlinux\t/boot/vmlinuz-6.1.0-1 root=PARTUUID=ab ro  console=tty0 console=ttyS0,115200 $extra\n\
            \tinitrd\t/boot/initrd.img-6.1.0-1\n}\nmenuentry 'old' {\n\tlinux /boot/old\n\tinitrd /boot/oldrd\n}\n";
        for (text, expected) in [
            (
                debian,
                entry(
                    "/boot/vmlinuz-6.1.0-1",
                    "/boot/initrd.img-6.1.0-1",
                    "root=PARTUUID=ab ro console=tty0 console=ttyS0,115200",
                ),
            ),
            (
                "linux16 /k a\ninitrd16 /microcode.img /rd\n",
                entry("/k", "/rd", "a"),
            ),
            (
                "linux /k\nmenuentry x {\ninitrd /other\n",
                entry("/k", "", ""),
            ),
            ("linux ${kernel} root=1\n", None),
            ("", None),
        ] {
            assert_eq!(grub_entry(text), expected, "{text}");
        }
        let fedora = "title Fedora\nversion 6.5\nlinux /vmlinuz-6.5\ninitrd /initramfs-6.5.img $tuned_initrd\n\
            options root=UUID=1 ro rootflags=subvol=root $kernelopts\n";
        let expected = entry(
            "/vmlinuz-6.5",
            "/initramfs-6.5.img",
            "root=UUID=1 ro rootflags=subvol=root",
        );
        assert_eq!(loader_entry(fedora), expected);
        assert_eq!(loader_entry("title none\n"), None);
    }

    #[test]
    fn consoles() {
        for (append, expected) in [
            ("", "console=ttyS0"),
            ("ro quiet", "ro quiet console=ttyS0"),
            ("console=tty0", "console=tty0 console=ttyS0"),
            ("console=ttyS0,115200 ro", "console=ttyS0,115200 ro"),
        ] {
            assert_eq!(with_console(append), expected);
        }
    }

    #[test]
    fn names_of_images() {
        for (name, expected) in [
            ("cloud", true),
            ("ubuntu-24.04", true),
            ("debian", false),
            ("mini", false),
            ("-x", false),
            ("", false),
            ("A", false),
            ("a/b", false),
            ("a:b", false),
            ("..", false),
        ] {
            assert_eq!(is_name(name), expected, "{name}");
        }
    }

    #[test]
    fn versions_are_in_order() {
        let mut names = ["vmlinuz-6.1.0-9", "vmlinuz-6.10.1", "vmlinuz-6.1.0-13"];
        names.sort_by_key(|name| version(name));
        assert_eq!(
            names,
            ["vmlinuz-6.1.0-9", "vmlinuz-6.1.0-13", "vmlinuz-6.10.1"]
        );
    }

    fn disk(bytes: &[(u64, &[u8])]) -> File {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(1 << 20).unwrap();
        for (at, bytes) in bytes {
            disk.write_all_at(bytes, *at).unwrap();
        }
        disk
    }

    #[test]
    fn partition_tables() {
        let starts = |disk: &File| {
            let found = partitions(disk).unwrap();
            found
                .iter()
                .map(|p| (p.number, p.start))
                .collect::<Vec<_>>()
        };
        assert_eq!(starts(&disk(&[])), [(0, 0)]);
        let entry = |kind: u8, start: u32| {
            let mut entry = [0; 16];
            entry[4] = kind;
            entry[8..12].copy_from_slice(&start.to_le_bytes());
            entry
        };
        let mbr = disk(&[
            (446, &entry(0x83, 2048)),
            (478, &entry(0x83, 4096)),
            (510, &[0x55, 0xaa]),
        ]);
        assert_eq!(starts(&mbr), [(1, 2048 * 512), (3, 4096 * 512)]);
        let mut header = [0; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[72] = 2;
        header[80] = 128;
        header[84] = 128;
        let mut second = [0; 128];
        second[0] = 1;
        second[32] = 34;
        let gpt = disk(&[(512, &header), (1024 + 128, &second)]);
        assert_eq!(starts(&gpt), [(2, 34 * 512)]);
        // No byte of it can do harm.
        for at in 0..92 {
            for byte in [0, 1, 0x7f, 0xff] {
                let mut bad = header;
                bad[at] = byte;
                let bad = disk(&[(512, &bad), (1024 + 128, &second)]);
                let dir = tempfile::tempdir().unwrap();
                let _ = partitions(&bad);
                assert!(extract(&bad, dir.path()).is_err());
            }
        }
    }
}
