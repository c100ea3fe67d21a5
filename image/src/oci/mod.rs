//! Images from registries: OCI and Docker images as root disks.
//!
//! | file | what |
//! |---|---|
//! | `mod.rs` | a pull: from a reference to a root disk |
//! | `registry.rs`, `credentials.rs` | the registry, and who asks it |
//! | `blobs.rs` | what has been fetched, by its digest |
//! | `layers.rs` | layers put one over the other |
//! | `container.rs` | what the image runs, and how the guest is told |
//! | `init.sh`, `power.sh`, `status.rs` | the guest's first process, and how it tells its end |
//!
//! Formats: OCI Image Specification 1.1, Docker image manifest version 2, schema 2 and its lists.
//! Limits: images for linux/amd64; digests are SHA-256; names are UTF-8.

mod blobs;
mod container;
mod credentials;
mod layers;
mod registry;
mod status;

use std::fs::{self, File};
use std::io;
use std::path::Path;

use oci_spec::distribution::Reference;
use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Os};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cache::{Cache, Workshop};
use crate::error::{Error, IoContext, Result};
use crate::ext4;
use crate::manifest::{Contents, hexadecimal};
use crate::progress::Progress;
use crate::tree::{Store, Tree};
use blobs::Blobs;
pub(crate) use container::APPEND;
pub use container::{Container, Process};
use layers::Layers;
use registry::Registry;

/// Bytes of the root disk, if nothing else is said.
const DEFAULT_SIZE: u64 = 10 << 30;
const JOURNAL: u64 = 32 << 20;
const DISK_FILE: &str = "root.img";

/// Bytes of an image's configuration.
const MOST_CONFIGURATION: u64 = 8 << 20;
/// Layers of an image.
const MOST_LAYERS: usize = 1000;

/// Where an image came from, and what it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pulled {
    /// Its full name: `docker.io/library/nginx:latest`.
    pub(crate) reference: String,
    /// The SHA-256 of its manifest, with `sha256:` before it.
    pub(crate) digest: String,
    /// The SHA-256 of its configuration and of its layers.
    pub(crate) blobs: Vec<String>,
    /// Bytes of the root disk.
    pub(crate) size: u64,
    pub(crate) container: Container,
}

/// What a pull has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullOutcome {
    /// The image's full name.
    pub reference: String,
    /// The digest of what was pulled.
    pub digest: String,
    /// The image was here already.
    pub unchanged: bool,
}

/// A pull under way.
struct Pull<'a> {
    reference: &'a Reference,
    size: u64,
    registry: Registry,
    blobs: Blobs,
}

/// Reads a reference as Docker does: `nginx` is `docker.io/library/nginx:latest`.
pub(crate) fn parse(name: &str) -> Option<Reference> {
    name.parse().ok()
}

impl Cache {
    /// Fetches an image from a registry and makes a root disk of `size` bytes of it (10 GiB if `None`), in place of the one
    /// of that name that may be there. What has been fetched stays, for other images and the next try.
    pub fn pull(
        &self,
        name: &str,
        size: Option<u64>,
        progress: &mut dyn Progress,
    ) -> Result<PullOutcome> {
        let reference: Reference = name.parse().map_err(|error| Error::Reference {
            name: name.to_owned(),
            problem: format!("{error}"),
        })?;
        self.pull_reference(&reference, size, progress)
            .map_err(|error| error.or_no_space(self.dir(), "the image"))
    }

    fn pull_reference(
        &self,
        reference: &Reference,
        size: Option<u64>,
        progress: &mut dyn Progress,
    ) -> Result<PullOutcome> {
        let login = credentials::find(reference).map_err(|problem| failed(reference, problem))?;
        let mut pull = Pull {
            reference,
            size: size.unwrap_or(DEFAULT_SIZE),
            registry: Registry::new(reference, login),
            blobs: Blobs::new(self.dir()),
        };
        progress.step(
            &format!("asking {} for the image", reference.registry()),
            None,
        );
        let (digest, manifest) = pull.manifest()?;
        let name = reference.to_string();
        let (workshop, _) = self.enter(progress)?;
        let mut outcome = PullOutcome {
            reference: name.clone(),
            digest: digest.clone(),
            unchanged: true,
        };
        if let Ok(Some(here)) = self.manifest(&name)
            && (here.pulled.as_ref()).is_some_and(|here| {
                here.digest == digest && size.is_none_or(|size| size == here.size)
            })
        {
            return Ok(outcome);
        }
        self.install(&name, &workshop, |dir| {
            pull.build(&workshop, dir, digest, &manifest, progress)
        })?;
        outcome.unchanged = false;
        Ok(outcome)
    }

    /// Removes what has been fetched of images that are not here any more, or are not complete; the bytes that it took.
    pub fn prune(&self) -> Result<u64> {
        if !self.dir().exists() {
            return Ok(0);
        }
        let (_workshop, _) = self.enter(&mut ())?;
        self.prune_blobs()
    }

    /// The same, by somebody who has the lock.
    pub(crate) fn prune_blobs(&self) -> Result<u64> {
        let needed: Vec<String> = self
            .pulled()
            .into_iter()
            .flat_map(|image| image.blobs)
            .collect();
        Blobs::new(self.dir()).prune(|name| needed.iter().any(|blob| blob == name))
    }
}

impl Pull<'_> {
    /// The digest and the manifest of the image for this kind of machine.
    fn manifest(&mut self) -> Result<(String, ImageManifest)> {
        let fail = |problem: String| failed(self.reference, problem);
        let which = self.reference.digest().or(self.reference.tag());
        let which = which.unwrap_or_default();
        let mut bytes = self.registry.manifest(which).map_err(fail)?;
        let mut digest = digest_of(&bytes);
        if let Some(expected) = self.reference.digest() {
            check(&digest, expected).map_err(fail)?;
        }
        // A list names one manifest for each platform.
        if let Ok(list) = serde_json::from_slice::<ImageIndex>(&bytes) {
            let chosen = choose(&list).map_err(fail)?;
            digest = chosen.digest().to_string();
            bytes = self.registry.manifest(&digest).map_err(fail)?;
            check(&digest_of(&bytes), &digest).map_err(fail)?;
        }
        let manifest: ImageManifest = serde_json::from_slice(&bytes)
            .map_err(|error| fail(format!("its manifest cannot be understood: {error}")))?;
        if manifest.layers().len() > MOST_LAYERS {
            return Err(fail("it has too many layers".into()));
        }
        Ok((digest, manifest))
    }

    /// Makes the files of the image in `dir`.
    fn build(
        &mut self,
        workshop: &Workshop,
        dir: &Path,
        digest: String,
        manifest: &ImageManifest,
        progress: &mut dyn Progress,
    ) -> Result<Contents> {
        let reference = self.reference;
        let fail = |problem: String| failed(reference, problem);
        let configuration = self.configuration(manifest.config(), progress)?;
        let count = manifest.layers().len();
        let diff_ids = configuration.rootfs().diff_ids();
        if diff_ids.len() != count {
            return Err(fail(
                "its manifest and its configuration do not belong together".into(),
            ));
        }
        let mut fetched = Vec::new();
        for (i, layer) in manifest.layers().iter().enumerate() {
            let what = format!("fetching layer {} of {count} of {reference}", i + 1);
            progress.step(&what, Some(layer.size()));
            fetched.push(
                self.blobs
                    .fetch(layer, &mut self.registry, progress, &fail)?,
            );
        }
        let store = Store::create(&workshop.scratch.join("files"))?;
        let mut store = store.at_most(self.size);
        let mut layers = Layers::default();
        let total = manifest.layers().iter().map(Descriptor::size).sum();
        progress.step("unpacking the layers", Some(total));
        let mut done = 0;
        for ((path, layer), expected) in fetched.iter().zip(manifest.layers()).zip(diff_ids) {
            let file = File::open(path).while_trying("open", path)?;
            let found = layers
                .apply(file, &mut store)
                .map_err(|error| match error.kind() {
                    io::ErrorKind::FileTooLarge => self.too_small(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Io {
                        action: "unpack",
                        path: path.clone(),
                        source: error,
                    },
                    _ => fail(format!(
                        "its layer {} cannot be unpacked: {error}",
                        layer.digest()
                    )),
                })?;
            if format!("sha256:{found}") != *expected {
                // It may have been damaged since it was fetched.
                self.blobs.remove(path)?;
                return Err(fail(format!(
                    "its layer {} does not hold what its configuration says; try again",
                    layer.digest()
                )));
            }
            done += layer.size();
            progress.advance(done);
        }
        let mut root = layers.into_tree();
        let container = Container::new(&configuration, &root).map_err(fail)?;
        container::complete(&mut root, &container);
        progress.step("writing the disk", None);
        self.write_disk(&root, &digest, &dir.join(DISK_FILE))?;
        let blobs = manifest.layers().iter().chain([manifest.config()]);
        let blobs = blobs
            .map(|blob| blob.digest().digest().to_owned())
            .collect();
        Ok(Contents {
            disk: Some(DISK_FILE),
            append: APPEND.into(),
            pulled: Some(Pulled {
                reference: reference.to_string(),
                digest,
                blobs,
                size: self.size,
                container,
            }),
            ..Contents::default()
        })
    }

    fn configuration(
        &mut self,
        blob: &Descriptor,
        progress: &mut dyn Progress,
    ) -> Result<ImageConfiguration> {
        let fail = |problem: String| failed(self.reference, problem);
        if blob.size() > MOST_CONFIGURATION {
            return Err(fail("its configuration is too large".into()));
        }
        progress.step(
            &format!("fetching the configuration of {}", self.reference),
            None,
        );
        let path = self
            .blobs
            .fetch(blob, &mut self.registry, progress, &fail)?;
        let bytes = fs::read(&path).while_trying("read", &path)?;
        let configuration = serde_json::from_slice::<ImageConfiguration>(&bytes);
        let configuration = configuration.map_err(|error| {
            fail(format!(
                "it is no image that can be run; its configuration: {error}"
            ))
        })?;
        match (configuration.os(), configuration.architecture()) {
            (Os::Linux, Arch::Amd64) => Ok(configuration),
            (os, arch) => Err(fail(format!("it is for {os}/{arch}, not for linux/amd64"))),
        }
    }

    fn write_disk(&self, root: &Tree, digest: &str, path: &Path) -> Result<()> {
        let mut hash = Sha256::new();
        hash.update(digest);
        hash.update(self.size.to_le_bytes());
        let options = ext4::Options {
            size: self.size,
            uuid: ext4::uuid(hash),
            label: "lodger-root",
            time: root.iter().map(|(_, node)| node.mtime).max().unwrap_or(0),
            journal: JOURNAL,
        };
        let disk = File::create(path).while_trying("create", path)?;
        ext4::write(root, &options, &disk).map_err(|source| match source.kind() {
            io::ErrorKind::FileTooLarge => self.too_small(),
            io::ErrorKind::InvalidInput => failed(self.reference, source.to_string()),
            _ => Error::Io {
                action: "write",
                path: path.to_owned(),
                source,
            },
        })
    }

    fn too_small(&self) -> Error {
        Error::DiskTooSmall {
            image: self.reference.to_string(),
            size: self.size,
            command: format!("pull {}", self.reference),
        }
    }
}

/// The manifest for linux/amd64 in a list.
fn choose(list: &ImageIndex) -> Result<&Descriptor, String> {
    let platforms = list.manifests().iter().filter_map(|descriptor| {
        let platform = descriptor.platform().as_ref()?;
        Some((descriptor, platform))
    });
    let fits = |arch: &Arch, os: &Os| (os, arch) == (&Os::Linux, &Arch::Amd64);
    let mut fitting: Vec<_> = platforms
        .clone()
        .filter(|(_, platform)| fits(platform.architecture(), platform.os()))
        .collect();
    // One that every amd64 processor runs, if there are several.
    fitting.sort_by_key(|(_, platform)| platform.variant().clone());
    if let Some((descriptor, _)) = fitting.first() {
        return Ok(descriptor);
    }
    let names = platforms
        .map(|(_, platform)| format!("{}/{}", platform.os(), platform.architecture()))
        .filter(|name| name != "unknown/unknown");
    let names: Vec<String> = names.collect();
    Err(match names.is_empty() {
        true => "it is a list without images".into(),
        false => format!(
            "it is not there for linux/amd64, but for {}",
            names.join(", ")
        ),
    })
}

fn digest_of(bytes: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update(bytes);
    format!("sha256:{}", hexadecimal(hash))
}

fn check(found: &str, expected: &str) -> Result<(), String> {
    match found == expected {
        true => Ok(()),
        false => Err(format!(
            "the registry has sent the manifest {found} instead of {expected}"
        )),
    }
}

fn failed(reference: &Reference, problem: String) -> Error {
    Error::Pull {
        reference: reference.to_string(),
        problem,
    }
}
