//! The modules of an unpacked kernel package: find them by name, and all that
//! they depend on.
//!
//! A package holds no `modules.dep` (depmod writes it when a package is
//! installed), so dependencies come from the modules themselves: each is an ELF
//! file whose section `.modinfo` has an entry `depends=`. Names here are as the
//! kernel has them, with `_` where a file name may have `-`.
//!
//! Formats: System V ABI, chapter "Object Files"; modules.dep(5). Limits: 64-bit
//! little-endian modules, plain or compressed with xz; soft dependencies are not
//! followed.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Result};

/// The modules of one kernel.
pub(crate) struct Modules {
    /// The package they come from, for messages.
    package: String,
    /// `lib/modules/RELEASE` of the unpacked package.
    dir: PathBuf,
    /// Path below `dir` of each loadable module, by name.
    loadable: BTreeMap<String, String>,
    /// The file `modules.builtin`: those that are part of the kernel itself.
    pub(crate) builtin_list: String,
    /// Their names.
    builtin: HashSet<String>,
}

/// A loadable module, uncompressed.
#[derive(Debug)]
pub(crate) struct Module {
    name: String,
    /// Path below `lib/modules/RELEASE`, such as `kernel/drivers/virtio/virtio.ko`.
    pub(crate) path: String,
    /// The ELF file.
    pub(crate) data: Vec<u8>,
    /// Paths of the modules that must be loaded before this one, in that order.
    needs: Vec<String>,
}

impl Modules {
    /// Reads the index of the modules in `dir`, which came out of `package`.
    pub(crate) fn open(dir: &Path, package: &str) -> Result<Modules> {
        let list = dir.join("modules.builtin");
        let builtin_list = fs::read_to_string(&list).while_trying("read", &list)?;
        let mut modules = Modules {
            package: package.to_owned(),
            dir: dir.to_owned(),
            loadable: BTreeMap::new(),
            builtin: builtin_list.lines().filter_map(module_name).collect(),
            builtin_list,
        };
        modules.scan("kernel")?;
        Ok(modules)
    }

    fn scan(&mut self, below: &str) -> Result<()> {
        let dir = self.dir.join(below);
        for entry in fs::read_dir(&dir).while_trying("read", &dir)? {
            let entry = entry.while_trying("read", &dir)?;
            let kind = entry.file_type().while_trying("read", &dir)?;
            let path = format!("{below}/{}", entry.file_name().to_string_lossy());
            if kind.is_dir() {
                self.scan(&path)?;
            } else if kind.is_file()
                && let Some(name) = module_name(&path)
            {
                self.loadable.insert(name, path);
            }
        }
        Ok(())
    }

    /// These modules and all that they need, each after what it needs. Names of
    /// what is built into the kernel add nothing.
    pub(crate) fn closure(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut found = Closure {
            modules: self,
            seen: HashSet::new(),
            order: Vec::new(),
        };
        for name in names {
            found.add(name)?;
        }
        Ok(found.order)
    }

    /// Reads a module file and uncompresses it.
    fn read(&self, path: &str) -> Result<Vec<u8>> {
        let file = self.dir.join(path);
        let data = fs::read(&file).while_trying("read", &file)?;
        if path.ends_with(".ko") {
            return Ok(data);
        }
        let mut plain = Vec::new();
        liblzma::read::XzDecoder::new(&data[..])
            .read_to_end(&mut plain)
            .while_trying("uncompress", &file)?;
        Ok(plain)
    }

    fn unexpected(&self, reason: String) -> Error {
        Error::Package {
            package: self.package.clone(),
            reason,
        }
    }
}

/// A depth-first walk over dependencies, under way.
struct Closure<'a> {
    modules: &'a Modules,
    seen: HashSet<String>,
    order: Vec<Module>,
}

impl Closure<'_> {
    /// Adds a module after all that it needs.
    fn add(&mut self, name: &str) -> Result<()> {
        let modules = self.modules;
        if modules.builtin.contains(name) || !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = modules
            .loadable
            .get(name)
            .ok_or_else(|| modules.unexpected(format!("it has no kernel module '{name}'")))?;
        let data = modules.read(path)?;
        let depends = depends(&data)
            .ok_or_else(|| modules.unexpected(format!("{path} is not a kernel module")))?;

        let mut needs: Vec<String> = Vec::new();
        for dependency in &depends {
            self.add(dependency)?;
            // Not there if it is built in.
            let module = self.order.iter().find(|module| module.name == *dependency);
            for path in module.iter().flat_map(|m| m.needs.iter().chain([&m.path])) {
                if !needs.contains(path) {
                    needs.push(path.clone());
                }
            }
        }
        self.order.push(Module {
            name: name.to_owned(),
            path: plain_path(path).to_owned(),
            data,
            needs,
        });
        Ok(())
    }
}

/// The file `modules.dep` for these modules: one line each, with all that it
/// needs after the colon, the first to be loaded last.
pub(crate) fn modules_dep(modules: &[Module]) -> String {
    let mut text = String::new();
    for module in modules {
        text += &module.path;
        text.push(':');
        for need in module.needs.iter().rev() {
            text.push(' ');
            text += need;
        }
        text.push('\n');
    }
    text
}

/// The name of the module in this file; `None` if it is not a module file.
fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let name = plain_path(file).strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

/// The path without the ending that tells of a compression.
fn plain_path(path: &str) -> &str {
    path.strip_suffix(".xz").unwrap_or(path)
}

/// The names that the `depends=` entry of a module lists; `None` if the bytes are
/// not a module.
fn depends(elf: &[u8]) -> Option<Vec<String>> {
    let modinfo = section(elf, b".modinfo")?;
    let list = modinfo
        .split(|&byte| byte == 0)
        .find_map(|entry| entry.strip_prefix(b"depends="))?;
    let list = std::str::from_utf8(list).ok()?;
    Some(
        list.split(',')
            .filter(|name| !name.is_empty())
            .map(|name| name.replace('-', "_"))
            .collect(),
    )
}

/// The contents of a section of a 64-bit little-endian ELF file.
fn section<'a>(elf: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    const IDENT: &[u8] = b"\x7fELF\x02\x01";
    /// Size of a section header, and where in it the fields are.
    const HEADER: u64 = 64;
    const NAME: u64 = 0;
    const OFFSET: u64 = 24;
    const SIZE: u64 = 32;

    if !elf.starts_with(IDENT) {
        return None;
    }
    let table = read_u64(elf, 40)?; // e_shoff
    let count = read_u16(elf, 60)?; // e_shnum
    let names = read_u16(elf, 62)?; // e_shstrndx
    let header = |index: u16| table.checked_add(u64::from(index) * HEADER);
    let contents = |index: u16| {
        let header = header(index)?;
        let offset = read_u64(elf, header.checked_add(OFFSET)?)?;
        let size = read_u64(elf, header.checked_add(SIZE)?)?;
        bytes(elf, offset, size)
    };
    let names = contents(names)?;
    (0..count).find_map(|index| {
        let name = read_u32(elf, header(index)?.checked_add(NAME)?)?;
        let name = names.get(name as usize..)?;
        let end = name.iter().position(|&byte| byte == 0)?;
        (&name[..end] == wanted).then(|| contents(index))?
    })
}

fn bytes(data: &[u8], offset: u64, size: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = usize::try_from(offset.checked_add(size)?).ok()?;
    data.get(start..end)
}

fn read_u16(data: &[u8], offset: u64) -> Option<u16> {
    Some(u16::from_le_bytes(bytes(data, offset, 2)?.try_into().ok()?))
}

fn read_u32(data: &[u8], offset: u64) -> Option<u32> {
    Some(u32::from_le_bytes(bytes(data, offset, 4)?.try_into().ok()?))
}

fn read_u64(data: &[u8], offset: u64) -> Option<u64> {
    Some(u64::from_le_bytes(bytes(data, offset, 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// An ELF file with the sections null, `.modinfo` and `.shstrtab`.
    fn elf(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let names_at = 64 + modinfo.len() as u64;
        let table_at = names_at + names.len() as u64;
        let mut file = vec![0; 64];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[40..48].copy_from_slice(&table_at.to_le_bytes());
        file[60..62].copy_from_slice(&3u16.to_le_bytes());
        file[62..64].copy_from_slice(&2u16.to_le_bytes());
        file.extend(modinfo);
        file.extend(names);
        for (name, offset, size) in [
            (0u32, 0u64, 0),
            (1, 64, modinfo.len()),
            (10, names_at, names.len()),
        ] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[24..32].copy_from_slice(&offset.to_le_bytes());
            header[32..40].copy_from_slice(&size.to_le_bytes());
            file.extend(header);
        }
        file
    }

    #[test]
    fn depends_of_modinfo() {
        for (modinfo, expected) in [
            (&b"license=GPL\0depends=\0name=virtio\0"[..], Some(vec![])),
            (b"depends=virtio\0", Some(vec!["virtio"])),
            (
                b"x=1\0depends=virtio_ring,crc-t10dif\0",
                Some(vec!["virtio_ring", "crc_t10dif"]),
            ),
            (b"license=GPL\0softdepends=a\0", None),
            (b"depends=\xff\0", None),
        ] {
            let expected: Option<Vec<String>> =
                expected.map(|names| names.into_iter().map(String::from).collect());
            assert_eq!(depends(&elf(modinfo)), expected, "{modinfo:?}");
        }
    }

    #[test]
    fn no_byte_of_a_module_can_make_its_reader_fail() {
        let good = elf(b"license=GPL\0depends=virtio\0");
        for len in 0..good.len() {
            depends(&good[..len]);
        }
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                depends(&bad);
            }
        }
    }

    /// A directory like that of an unpacked package: `d` needs `b` and `c`, both
    /// need `a`; `x` is compressed; `ext4` is built in.
    fn package() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("kernel/drivers/deep")).unwrap();
        let write = |path: &str, data: &[u8]| fs::write(dir.path().join(path), data).unwrap();
        write("modules.builtin", b"kernel/fs/ext4/ext4.ko\n");
        write("kernel/drivers/a.ko", &elf(b"depends=\0"));
        write("kernel/drivers/b.ko", &elf(b"depends=a,ext4\0"));
        write("kernel/drivers/deep/c-c.ko", &elf(b"depends=a\0"));
        write("kernel/drivers/d.ko", &elf(b"depends=b,c_c\0"));
        write("kernel/drivers/loop.ko", &elf(b"depends=loop\0"));
        write("kernel/drivers/lost.ko", &elf(b"depends=nowhere\0"));
        write("kernel/drivers/text.ko", b"not ELF");
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 6);
        xz.write_all(&elf(b"depends=a\0")).unwrap();
        write("kernel/drivers/x.ko.xz", &xz.finish().unwrap());
        dir
    }

    #[test]
    fn closure_is_in_the_order_of_loading() {
        let dir = package();
        let modules = Modules::open(dir.path(), "linux 1").unwrap();
        for (names, expected) in [
            (&["a"][..], "kernel/drivers/a.ko:\n"),
            (&["ext4"], ""),
            (
                &["d", "a"],
                "kernel/drivers/a.ko:\n\
                 kernel/drivers/b.ko: kernel/drivers/a.ko\n\
                 kernel/drivers/deep/c-c.ko: kernel/drivers/a.ko\n\
                 kernel/drivers/d.ko: kernel/drivers/deep/c-c.ko kernel/drivers/b.ko kernel/drivers/a.ko\n",
            ),
            (
                &["x"],
                "kernel/drivers/a.ko:\nkernel/drivers/x.ko: kernel/drivers/a.ko\n",
            ),
            (&["loop"], "kernel/drivers/loop.ko:\n"),
        ] {
            let closure = modules.closure(names).unwrap();
            assert_eq!(modules_dep(&closure), expected, "{names:?}");
        }
        assert_eq!(
            modules.closure(&["x"]).unwrap()[1].data,
            elf(b"depends=a\0")
        );
    }

    #[test]
    fn what_is_wrong_with_a_package_is_said() {
        let dir = package();
        let modules = Modules::open(dir.path(), "linux 1").unwrap();
        for (name, expected) in [
            (
                "nothing",
                "linux 1 is not as expected: it has no kernel module 'nothing'",
            ),
            (
                "lost",
                "linux 1 is not as expected: it has no kernel module 'nowhere'",
            ),
            ("text", "kernel/drivers/text.ko is not a kernel module"),
        ] {
            let error = modules.closure(&[name]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
