//! `image.json`: what an image is made of, with a checksum of each file.
//!
//! It is written last and lies beside the files that it names, so an image is
//! whole when its manifest is there and agrees with them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{IoContext, Result};
use crate::import::Imported;
use crate::oci::Pulled;

/// The name of the manifest in an image's directory.
pub(crate) const FILE: &str = "image.json";

/// The version of the format below, and of what images hold beside their packages. A reader takes no other.
const FORMAT: u32 = 4;

/// The parts of one image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    format: u32,
    /// Kernel and RAM disk; those of `mini` if the image has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kernel: Option<Part>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) initrd: Option<Part>,
    /// The root disk, if the image has one. Its checksum is that of [`sha256_of_disk`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) disk: Option<Part>,
    /// The kernel command line that suits the image.
    pub(crate) append: String,
    /// The kernel's release, as `uname -r` says it.
    pub(crate) kernel_release: String,
    /// Version of each package that the image was made of.
    pub(crate) packages: BTreeMap<String, String>,
    /// What Lodger added to the packages, if the recipe tells.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) recipe: String,
    /// Of an image from a registry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pulled: Option<Pulled>,
    /// Of a disk image of somebody else's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) imported: Option<Imported>,
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Part {
    /// Its name in the directory of the image.
    pub(crate) file: String,
    /// Its size in bytes.
    pub(crate) size: u64,
    /// Its SHA-256, in hexadecimal.
    pub(crate) sha256: String,
}

/// What a recipe leaves in an image's directory.
#[derive(Default)]
pub(crate) struct Contents {
    /// File names in that directory.
    pub(crate) kernel: Option<&'static str>,
    pub(crate) initrd: Option<&'static str>,
    pub(crate) disk: Option<&'static str>,
    pub(crate) append: String,
    pub(crate) kernel_release: String,
    pub(crate) packages: BTreeMap<String, String>,
    /// See [`Manifest::recipe`].
    pub(crate) recipe: String,
    pub(crate) pulled: Option<Pulled>,
    pub(crate) imported: Option<Imported>,
}

impl Manifest {
    /// Measures what lies in `dir`, forces it to the disk, and writes the manifest
    /// beside it.
    pub(crate) fn create(dir: &Path, contents: Contents) -> Result<Manifest> {
        let part = |name: Option<&str>, hash: fn(File) -> io::Result<String>| {
            name.map(|name| Part::measure(dir, name, hash)).transpose()
        };
        let manifest = Manifest {
            format: FORMAT,
            kernel: part(contents.kernel, sha256_of)?,
            initrd: part(contents.initrd, sha256_of)?,
            disk: part(contents.disk, sha256_of_disk)?,
            append: contents.append,
            kernel_release: contents.kernel_release,
            packages: contents.packages,
            recipe: contents.recipe,
            pulled: contents.pulled,
            imported: contents.imported,
        };
        let path = dir.join(FILE);
        let mut json = serde_json::to_vec_pretty(&manifest)
            .map_err(io::Error::from)
            .while_trying("write", &path)?;
        json.push(b'\n');
        let mut file = File::create(&path).while_trying("create", &path)?;
        file.write_all(&json).while_trying("write", &path)?;
        file.sync_all().while_trying("write", &path)?;
        sync_dir(dir)?;
        Ok(manifest)
    }

    /// Reads the manifest in `dir`. `Err` is the reason why it cannot be trusted.
    pub(crate) fn read(dir: &Path) -> Result<Manifest, String> {
        let text = std::fs::read(dir.join(FILE)).map_err(|error| format!("{FILE}: {error}"))?;
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|error| format!("{FILE}: {error}"))?;
        if manifest.format != FORMAT {
            return Err(format!(
                "{FILE} has format {}, this program knows {FORMAT}",
                manifest.format
            ));
        }
        for part in manifest.parts() {
            if part.file.contains('/') || part.file.starts_with('.') {
                return Err(format!("{FILE} names a file outside: {:?}", part.file));
            }
        }
        Ok(manifest)
    }

    /// Checks the sizes of the files, which costs next to nothing.
    pub(crate) fn check_sizes(&self, dir: &Path) -> Result<(), String> {
        for Part { file, size, .. } in self.parts() {
            let found = std::fs::metadata(dir.join(file))
                .map_err(|error| format!("{file}: {error}"))?
                .len();
            if found != *size {
                return Err(format!("{file} has {found} bytes instead of {size}"));
            }
        }
        Ok(())
    }

    /// Checks every byte of the files.
    pub(crate) fn check_contents(&self, dir: &Path) -> Result<(), String> {
        self.check_sizes(dir)?;
        for part in self.parts() {
            let Part { file, sha256, .. } = part;
            let hash = |file: File| match Some(part) == self.disk.as_ref() {
                true => sha256_of_disk(file),
                false => sha256_of(file),
            };
            let found = File::open(dir.join(file))
                .and_then(hash)
                .map_err(|error| format!("{file}: {error}"))?;
            if found != *sha256 {
                return Err(format!(
                    "{file} has the SHA-256 {found} instead of {sha256}"
                ));
            }
        }
        Ok(())
    }

    /// Bytes that all files in `dir` together take of the host: a disk has holes.
    pub(crate) fn size(&self, dir: &Path) -> u64 {
        let taken = |part: &Part| {
            let file = std::fs::metadata(dir.join(&part.file));
            file.map_or(0, |file| (file.blocks() * 512).min(file.len()))
        };
        self.parts().map(taken).sum()
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        let Manifest {
            kernel,
            initrd,
            disk,
            ..
        } = self;
        kernel.iter().chain(initrd).chain(disk)
    }
}

impl Part {
    fn measure(
        dir: &Path,
        name: &str,
        hash: impl FnOnce(File) -> io::Result<String>,
    ) -> Result<Part> {
        let path = dir.join(name);
        let file = File::open(&path).while_trying("open", &path)?;
        file.sync_all().while_trying("write", &path)?;
        let size = file.metadata().while_trying("read", &path)?.len();
        Ok(Part {
            file: name.to_owned(),
            size,
            sha256: hash(file).while_trying("read", &path)?,
        })
    }
}

/// Forces the names in a directory to the disk.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .while_trying("write", dir)
}

/// The SHA-256 of all that can be read, in hexadecimal.
pub(crate) fn sha256_of(mut input: impl Read) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 128 << 10];
    loop {
        match input.read(&mut buffer)? {
            0 => break,
            len => hash.update(&buffer[..len]),
        }
    }
    Ok(hexadecimal(hash))
}

/// The SHA-256 of what is not zero on a disk: of each such block of 4096 bytes, its offset (little-endian, 64 bits) and
/// its contents. A disk of gigabytes that is nearly empty takes no longer than what is on it.
pub(crate) fn sha256_of_disk(file: File) -> io::Result<String> {
    const BLOCK: usize = 4096;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 * BLOCK];
    let len = file.metadata()?.len();
    let mut offset = 0;
    while offset < len {
        offset = match seek(&file, SeekFrom::Data(offset)) {
            Ok(data) => data - data % BLOCK as u64,
            Err(Errno::NXIO) => break,
            // The file system does not know of holes.
            Err(Errno::INVAL) => offset,
            Err(error) => return Err(error.into()),
        };
        let piece = &mut buffer[..(len - offset).min(256 * BLOCK as u64) as usize];
        file.read_exact_at(piece, offset)?;
        for block in piece.chunks(BLOCK) {
            if block.iter().any(|&byte| byte != 0) {
                hash.update(offset.to_le_bytes());
                hash.update(block);
            }
            offset += block.len() as u64;
        }
    }
    Ok(hexadecimal(hash))
}

/// The result of a hash.
pub(crate) fn hexadecimal(hash: Sha256) -> String {
    let bytes = hash.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_known_answer() {
        // FIPS 180-2, appendix B.1.
        assert_eq!(
            sha256_of(&b"abc"[..]).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    fn image() -> (tempfile::TempDir, Manifest) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("vmlinuz"), b"kernel").unwrap();
        std::fs::write(dir.path().join("initrd"), b"initrd").unwrap();
        let disk = File::create(dir.path().join("disk")).unwrap();
        disk.write_all_at(b"disk", 5 << 20).unwrap();
        disk.set_len(1 << 30).unwrap();
        let contents = Contents {
            kernel: Some("vmlinuz"),
            initrd: Some("initrd"),
            disk: Some("disk"),
            append: "console=ttyS0".into(),
            kernel_release: "6.1".into(),
            packages: [("linux".into(), "6.1-1".into())].into(),
            recipe: "r".into(),
            pulled: None,
            imported: None,
        };
        let manifest = Manifest::create(dir.path(), contents).unwrap();
        (dir, manifest)
    }

    #[test]
    fn what_is_written_is_read() {
        let (dir, manifest) = image();
        assert_eq!(Manifest::read(dir.path()), Ok(manifest.clone()));
        assert_eq!(manifest.check_contents(dir.path()), Ok(()));
        let size = manifest.size(dir.path());
        assert!((16..1 << 20).contains(&size), "{size}");
    }

    #[test]
    fn damage_to_the_manifest_is_seen() {
        for (from, to, expected) in [
            ("{", "", "image.json: "),
            ("\"format\": 4", "\"format\": 1", "format 1"),
            ("\"vmlinuz\"", "\"../vmlinuz\"", "outside"),
            ("\"vmlinuz\"", "\"/etc/passwd\"", "outside"),
            ("\"file\": \"initrd\"", "\"file\": \"..\"", "outside"),
            ("\"size\": 6", "\"size\": -6", "image.json: "),
        ] {
            let (dir, _) = image();
            let path = dir.path().join(FILE);
            let good = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, good.replacen(from, to, 1)).unwrap();
            let reason = Manifest::read(dir.path()).unwrap_err();
            assert!(reason.contains(expected), "{from} -> {to}: {reason}");
        }
    }

    #[test]
    fn damage_to_a_disk_is_seen_but_holes_may_be_filled() {
        let (dir, manifest) = image();
        let disk = File::options().write(true).open(dir.path().join("disk"));
        let disk = disk.unwrap();
        disk.write_all_at(&[0; 8192], 9 << 20).unwrap();
        assert_eq!(manifest.check_contents(dir.path()), Ok(()));
        for (offset, byte) in [(5 << 20, b'D'), (9 << 20, 1), ((1 << 30) - 1, 1)] {
            disk.write_all_at(&[byte], offset).unwrap();
            let reason = manifest.check_contents(dir.path()).unwrap_err();
            assert!(reason.starts_with("disk has the SHA-256 "), "{reason}");
            disk.write_all_at(if byte == 1 { b"\0" } else { b"d" }, offset)
                .unwrap();
            assert_eq!(manifest.check_contents(dir.path()), Ok(()));
        }
    }

    #[test]
    fn damage_to_a_file_is_seen() {
        let (dir, manifest) = image();
        let kernel = dir.path().join("vmlinuz");

        std::fs::write(&kernel, b"kernEl").unwrap();
        assert_eq!(manifest.check_sizes(dir.path()), Ok(()));
        let reason = manifest.check_contents(dir.path()).unwrap_err();
        assert!(reason.starts_with("vmlinuz has the SHA-256 "), "{reason}");

        std::fs::write(&kernel, b"kern").unwrap();
        let reason = manifest.check_sizes(dir.path()).unwrap_err();
        assert_eq!(reason, "vmlinuz has 4 bytes instead of 6");

        std::fs::remove_file(&kernel).unwrap();
        assert!(manifest.check_sizes(dir.path()).is_err());
    }
}
