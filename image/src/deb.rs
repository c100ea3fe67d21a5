//! Package files, unpacked by the host's dpkg-deb.
//!
//! See deb(5) and deb-control(5).

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::archive;
use crate::cache::Workshop;
use crate::error::{Error, Result};
use crate::tool::Tool;
use crate::tree::{Content, Kind, Node, Store};

/// A package that has been fetched and verified.
#[derive(Debug)]
pub(crate) struct Deb {
    pub(crate) package: String,
    pub(crate) version: String,
    pub(crate) path: PathBuf,
}

/// A member of a package's control archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ControlFile {
    /// `control`, `conffiles`, `postinst` ...
    pub(crate) name: String,
    pub(crate) permissions: u32,
    pub(crate) data: Vec<u8>,
}

impl Deb {
    /// Unpacks the files of the package below `dir`.
    pub(crate) fn unpack(&self, dir: &Path, workshop: &Workshop) -> Result<()> {
        let mut tool = Tool::new("dpkg-deb", workshop)?;
        tool.command.arg("-x").arg(&self.path).arg(dir);
        tool.output().map(drop)
    }

    /// Passes the files of the package to `take`, with their owners.
    pub(crate) fn files(
        &self,
        workshop: &Workshop,
        store: &mut Store,
        take: impl FnMut(&str, Node) -> io::Result<()>,
    ) -> Result<()> {
        self.read("--fsys-tarfile", workshop, |tar| {
            archive::read(tar, store, take)
        })
    }

    /// What the package tells dpkg.
    pub(crate) fn control(
        &self,
        workshop: &Workshop,
        store: &mut Store,
    ) -> Result<Vec<ControlFile>> {
        let mut files = Vec::new();
        self.read("--ctrl-tarfile", workshop, |tar| {
            archive::read(tar, store, |path, node| {
                if let Kind::File(content) = &node.kind {
                    files.push(ControlFile {
                        name: path.to_owned(),
                        permissions: node.permissions,
                        data: Content::bytes(content)?,
                    });
                }
                Ok(())
            })
        })?;
        Ok(files)
    }

    fn read(
        &self,
        archive: &str,
        workshop: &Workshop,
        take: impl FnOnce(&mut dyn Read) -> io::Result<()>,
    ) -> Result<()> {
        let mut tool = Tool::new("dpkg-deb", workshop)?;
        tool.command.arg(archive).arg(&self.path);
        tool.read(take)
    }

    /// Name and version.
    pub(crate) fn title(&self) -> String {
        format!("{} {}", self.package, self.version)
    }

    /// The package is not as expected.
    pub(crate) fn unexpected(&self, reason: &str) -> Error {
        Error::Package {
            package: self.title(),
            reason: reason.to_owned(),
        }
    }
}
