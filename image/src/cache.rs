//! The directory where a user's images are.
//!
//! ```text
//! images/NAME/    a finished image: its files and image.json
//! pulled/NAME/    the same for images of a registry, whose names are escaped
//! imported/NAME/  the same for disk images of others
//! blobs/          what has been fetched from registries
//! downloads/      packages that are on their way, kept for the next try
//! work/           everything else that a build writes; worthless afterwards
//! lock            held (flock) by the one build that is at work
//! ```
//!
//! A build fills a directory below `work`, forces it to the disk and renames it
//! into its place: whatever interrupts it, what is there is whole. The lock
//! says that nobody is at work, so whoever gets it may delete all of `work`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::debian::{self, Debian};
use crate::error::{BUILD_SPACE, Error, IoContext, Result};
use crate::guest::Guest;
use crate::import;
use crate::manifest::{self, Contents, Manifest, Part};
use crate::mini;
use crate::oci::{self, Container, Pulled};
use crate::progress::Progress;

/// The image to run when none is named.
pub const DEFAULT_IMAGE: &str = "mini";

/// An image that can be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Recipe<'a> {
    Mini,
    /// Of this suite; `None`: the host's own.
    Debian(Option<&'a str>),
}

/// What an image is to be like. What is left out is as the image's recipe has it; `mini` takes none of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildOptions {
    /// Bytes of the root disk.
    pub size: Option<u64>,
    /// Packages beyond the usual ones.
    pub packages: Vec<String>,
    /// A user who logs in at the console instead of root.
    pub user: Option<String>,
    /// SSH public keys that may log in, as they are in `authorized_keys`.
    pub ssh_keys: Vec<String>,
}

/// The images of one user.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// What a machine boots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// The root disk, raw, which nobody may write to: a machine gets a copy of its own.
    pub disk: Option<PathBuf>,
    /// The kernel command line that suits them.
    pub append: String,
    /// What it runs, if it is from a registry: then `initrd` is still to be told that
    /// ([`Container::write_initrd`]).
    pub container: Option<Container>,
}

/// An image that is known, built or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// What to call it.
    pub name: String,
    /// What it is, in one line.
    pub description: String,
    /// Where its files are, or would be.
    pub dir: PathBuf,
    /// Whether it is there.
    pub state: ImageState,
}

/// Whether an image is in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageState {
    /// It has not been built.
    Absent,
    /// It is ready to run.
    Ready {
        /// Bytes on the disk.
        size: u64,
        /// The kernel's release, as `uname -r` says it; `None`: the kernel is that of `mini`, or not known.
        kernel_release: Option<String>,
    },
    /// Its files are not as they were built; the reason.
    Damaged(String),
}

/// What a recipe has to work with. It lives as long as the lock is held.
pub(crate) struct Workshop {
    /// A directory for anything; gone when the build is over.
    pub(crate) scratch: PathBuf,
    /// Where downloads go, and stay until an image is finished.
    pub(crate) downloads: PathBuf,
    /// The lock. Given to child processes as their standard input, it stays
    /// locked while one of them outlives this process.
    pub(crate) lock: File,
}

impl Cache {
    /// The cache in `dir`, or else in `$XDG_CACHE_HOME/lodger`, or else in
    /// `~/.cache/lodger`. Nothing is created before the first build.
    pub fn open(dir: Option<PathBuf>) -> Result<Cache> {
        let root = dir
            .or_else(|| default_dir(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")))
            .ok_or(Error::NoCacheDir)?;
        // Tools that run elsewhere get paths too.
        let root = std::path::absolute(&root).while_trying("find", &root)?;
        Ok(Cache { root })
    }

    /// Where the cache is.
    pub fn dir(&self) -> &Path {
        &self.root
    }

    /// All images that are known, built or not.
    pub fn list(&self) -> Vec<ImageInfo> {
        let mut names = vec![DEFAULT_IMAGE.to_owned(), debian::NAME.to_owned()];
        // Other suites are known when they are built.
        let built = fs::read_dir(self.root.join("images")).into_iter().flatten();
        let mut suites: Vec<String> = built
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|dir| Some(format!("{}:{}", debian::NAME, dir.strip_prefix("debian-")?)))
            .filter(|name| Recipe::find(name).is_some())
            .collect();
        suites.sort();
        names.append(&mut suites);
        let mut images: Vec<ImageInfo> = names
            .into_iter()
            .map(|name| {
                let description = match name == DEFAULT_IMAGE {
                    true => mini::DESCRIPTION,
                    false => debian::DESCRIPTION,
                };
                let dir = self.root.join("images").join(name.replace(':', "-"));
                info(name, description.to_owned(), dir)
            })
            .collect();
        let imported = fs::read_dir(self.root.join("imported"))
            .into_iter()
            .flatten();
        let mut imported: Vec<_> = imported
            .filter_map(|entry| {
                let dir = entry.ok()?.path();
                let from = Manifest::read(&dir).ok()?.imported?;
                Some((from, dir))
            })
            .collect();
        imported.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        for (from, dir) in imported {
            let description = format!("imported from {}", from.file.display());
            images.push(info(from.name, description, dir));
        }
        for pulled in self.pulled() {
            let runs = pulled.container.command_line(&Default::default());
            let dir = self.pulled_dir(&pulled.reference);
            images.push(info(
                pulled.reference,
                format!("runs {}", runs.join(" ")),
                dir,
            ));
        }
        images
    }

    /// The images that are from registries, by their names; damaged ones are not among them.
    pub(crate) fn pulled(&self) -> Vec<Pulled> {
        let dirs = fs::read_dir(self.root.join("pulled")).into_iter().flatten();
        let mut images: Vec<Pulled> = dirs
            .filter_map(|entry| Manifest::read(&entry.ok()?.path()).ok()?.pulled)
            .collect();
        images.sort_by(|a, b| a.reference.cmp(&b.reference));
        images
    }

    /// The image of that name; `None` if it has not been built. Checks that its
    /// files are there and have the right sizes; [`Cache::verify`] checks all.
    pub fn get(&self, name: &str) -> Result<Option<Image>> {
        self.find(name, |name| self.get(name))
    }

    /// The image of that name; builds it as its recipe has it if it is not there or damaged, or if it is small and what Lodger puts
    /// into it has changed since.
    pub fn get_or_build(
        &self,
        name: &str,
        progress: &mut dyn Progress,
        guest: &mut dyn Guest,
    ) -> Result<Image> {
        let found = self.find(name, |base| {
            self.get_or_build(base, progress, guest).map(Some)
        });
        match (found, Recipe::find(name)) {
            (Ok(Some(image)), _) if self.is_current(name) => Ok(image),
            (Ok(Some(old)), _) => {
                let built = self.build(name, &BuildOptions::default(), progress, guest);
                built.or_else(|error| {
                    let text = format!("the image {name} of an earlier Lodger is used: {error}");
                    progress.step(&text, None);
                    Ok(old)
                })
            }
            (Ok(None) | Err(Error::Damaged { .. }), Some(_)) => {
                self.build(name, &BuildOptions::default(), progress, guest)
            }
            (Ok(None), None) => Err(self.unknown(name)),
            (Err(error), _) => Err(error),
        }
    }

    /// Whether the image is as this program would make it, where that is worth a build.
    fn is_current(&self, name: &str) -> bool {
        match Recipe::find(name) {
            Some(Recipe::Mini) => (self.manifest(name).ok().flatten())
                .is_none_or(|manifest| manifest.recipe == mini::recipe()),
            _ => true,
        }
    }

    /// An image, with `base` to find the one whose kernel it uses.
    fn find(
        &self,
        name: &str,
        base: impl FnOnce(&str) -> Result<Option<Image>>,
    ) -> Result<Option<Image>> {
        let dir = self.image_dir(name)?;
        let manifest = read_manifest(&dir).map_err(|reason| self.damaged(name, reason))?;
        let Some(manifest) = manifest else {
            return match Recipe::find(name) {
                Some(_) => Ok(None),
                None => Err(self.unknown(name)),
            };
        };
        if manifest.kernel.is_some() {
            return Ok(Some(image(&dir, &manifest, None)));
        }
        let base = base(DEFAULT_IMAGE)?;
        Ok(base.map(|base| image(&dir, &manifest, Some(base))))
    }

    /// Checks every byte of an image against its checksum. `false` if the image
    /// has not been built.
    pub fn verify(&self, name: &str) -> Result<bool> {
        let dir = self.image_dir(name)?;
        let check = || match read_manifest(&dir)? {
            Some(manifest) => manifest.check_contents(&dir).map(|()| true),
            None => Ok(false),
        };
        check().map_err(|reason| self.damaged(name, reason))
    }

    /// Builds an image from the newest packages, in place of the one that may be
    /// there. Waits while another process builds one, and then takes that. `guest` finishes the
    /// installation of images that need it.
    pub fn build(
        &self,
        name: &str,
        options: &BuildOptions,
        progress: &mut dyn Progress,
        guest: &mut dyn Guest,
    ) -> Result<Image> {
        let recipe = Recipe::find(name).ok_or_else(|| self.unknown(name))?;
        let debian = match recipe {
            Recipe::Mini if *options != BuildOptions::default() => {
                return Err(Error::Option {
                    image: name.to_owned(),
                    problem: "it has no options; 'debian' has".to_owned(),
                });
            }
            Recipe::Mini => None,
            Recipe::Debian(suite) => Some(Debian::new(name, suite, options)?),
        };
        let fill = |workshop: &Workshop, dir: &Path, progress: &mut dyn Progress| match &debian {
            None => mini::build(workshop, dir, progress),
            Some(debian) => debian.build(workshop, dir, progress, guest),
        };
        self.build_with(name, progress, fill).map_err(|error| {
            let space = format!(
                "the build: it takes {} MB, of which it keeps 20 (debian: 1200 and 400)",
                BUILD_SPACE / 1_000_000
            );
            error.or_no_space(&self.root, &space)
        })
    }

    fn build_with(
        &self,
        name: &str,
        progress: &mut dyn Progress,
        fill: impl FnOnce(&Workshop, &Path, &mut dyn Progress) -> Result<Contents>,
    ) -> Result<Image> {
        let before = self.manifest(name).ok().flatten();
        let (workshop, waited) = self.enter(progress)?;
        if waited
            && let Ok(Some(manifest)) = self.manifest(name)
            && Some(&manifest) != before.as_ref()
        {
            return Ok(image(&self.image_dir(name)?, &manifest, None));
        }
        let (dir, manifest) =
            self.install(name, &workshop, |dir| fill(&workshop, dir, progress))?;
        Ok(image(&dir, &manifest, None))
    }

    /// Everything that is known of an image, as JSON: its manifest, and where it is. `None` if it has not been built.
    pub fn inspect(&self, name: &str) -> Result<Option<serde_json::Value>> {
        let dir = self.image_dir(name)?;
        let manifest = read_manifest(&dir).map_err(|reason| self.damaged(name, reason))?;
        let Some(manifest) = manifest else {
            return match Recipe::find(name) {
                Some(_) => Ok(None),
                None => Err(self.unknown(name)),
            };
        };
        let mut value = serde_json::to_value(&manifest)
            .map_err(io::Error::from)
            .while_trying("describe", &dir)?;
        value["name"] = name.into();
        value["directory"] = dir.to_string_lossy().into();
        value["takes"] = manifest.size(&dir).into();
        Ok(Some(value))
    }

    /// Removes an image, what had to be fetched for it alone, and what an interrupted build may have left. `false` if
    /// the image was not there.
    pub fn remove(&self, name: &str) -> Result<bool> {
        let dir = self.image_dir(name)?;
        if Recipe::find(name).is_none() && !dir.exists() {
            return Err(self.unknown(name));
        }
        if !self.root.exists() {
            return Ok(false);
        }
        let (workshop, _) = self.enter(&mut ())?;
        let removed = discard(&dir, &workshop)?;
        remove_dir(&workshop.downloads)?;
        self.prune_blobs()?;
        Ok(removed)
    }

    /// The manifest of an image in the cache, if there is one; `Err` says what is
    /// wrong with the image.
    pub(crate) fn manifest(&self, name: &str) -> Result<Option<Manifest>, String> {
        let dir = self.image_dir(name).map_err(|error| error.to_string())?;
        read_manifest(&dir)
    }

    /// Where an image is or would be; an error if nothing has such a name.
    fn image_dir(&self, name: &str) -> Result<PathBuf> {
        if Recipe::find(name).is_some() {
            return Ok(self.root.join("images").join(name.replace(':', "-")));
        }
        let imported = self.root.join("imported").join(name);
        if import::is_name(name) && imported.exists() {
            return Ok(imported);
        }
        let reference = oci::parse(name).ok_or_else(|| self.unknown(name))?;
        Ok(self.pulled_dir(&reference.to_string()))
    }

    fn pulled_dir(&self, reference: &str) -> PathBuf {
        let escaped: String = reference
            .chars()
            .map(|c| match c {
                '/' => "%2F".into(),
                ':' => "%3A".into(),
                c => String::from(c),
            })
            .collect();
        self.root.join("pulled").join(escaped)
    }

    fn unknown(&self, name: &str) -> Error {
        let recipes = format!("{DEFAULT_IMAGE}, {0}, {0}:SUITE", debian::NAME);
        let others = self.list().into_iter().map(|image| image.name);
        let others = others.filter(|name| Recipe::find(name).is_none());
        Error::UnknownImage {
            name: name.to_owned(),
            known: [recipes]
                .into_iter()
                .chain(others)
                .collect::<Vec<_>>()
                .join(", "),
        }
    }

    fn damaged(&self, name: &str, reason: String) -> Error {
        let again = match Recipe::find(name) {
            Some(_) => "Build it again: lodger image build",
            None => "Pull or import it again: lodger image rm",
        };
        Error::Damaged {
            name: name.to_owned(),
            dir: self.image_dir(name).unwrap_or_default(),
            reason,
            again: format!("{again} {name}"),
        }
    }

    /// Takes the lock, and clears away what a dead build has left. Also tells
    /// whether the lock was somebody else's at first.
    pub(crate) fn enter(&self, progress: &mut dyn Progress) -> Result<(Workshop, bool)> {
        let path = self.root.join("lock");
        let lock = fs::create_dir_all(&self.root)
            .and_then(|()| File::options().append(true).create(true).open(&path))
            .map_err(|source| Error::CacheDir {
                dir: self.root.clone(),
                source,
            })?;
        let waited = match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                progress.step(
                    &format!("waiting for another build in {}", self.root.display()),
                    None,
                );
                flock(&lock, FlockOperation::LockExclusive).while_trying("lock", &path)?;
                true
            }
            result => {
                result.while_trying("lock", &path)?;
                false
            }
        };
        let workshop = Workshop {
            scratch: self.root.join("work"),
            downloads: self.root.join("downloads"),
            lock,
        };
        remove_dir(&workshop.scratch)?;
        for dir in [&workshop.scratch, &workshop.downloads] {
            fs::create_dir_all(dir).while_trying("create", dir)?;
        }
        Ok((workshop, waited))
    }

    /// Lets `fill` make the files of an image, and puts them in place; says where, and what they are.
    pub(crate) fn install(
        &self,
        name: &str,
        workshop: &Workshop,
        fill: impl FnOnce(&Path) -> Result<Contents>,
    ) -> Result<(PathBuf, Manifest)> {
        let new = tempfile::tempdir_in(&workshop.scratch)
            .while_trying("create a directory in", &workshop.scratch)?;
        let contents = fill(new.path())?;
        let manifest = Manifest::create(new.path(), contents)?;

        let place = match manifest.imported {
            Some(_) => self.root.join("imported").join(name),
            None => self.image_dir(name)?,
        };
        let images = place.parent().unwrap_or(&self.root);
        fs::create_dir_all(images).while_trying("create", images)?;
        discard(&place, workshop)?;
        fs::rename(new.path(), &place).while_trying("create", &place)?;
        manifest::sync_dir(images)?;
        remove_dir(&workshop.downloads)?;
        Ok((place, manifest))
    }
}

/// An image in the list.
fn info(name: String, description: String, dir: PathBuf) -> ImageInfo {
    ImageInfo {
        name,
        description,
        state: match read_manifest(&dir) {
            Ok(None) => ImageState::Absent,
            Ok(Some(manifest)) => ImageState::Ready {
                size: manifest.size(&dir),
                kernel_release: Some(manifest.kernel_release).filter(|release| !release.is_empty()),
            },
            Err(reason) => ImageState::Damaged(reason),
        },
        dir,
    }
}

/// The image in `dir`, with the kernel of `base` if it has none of its own.
fn image(dir: &Path, manifest: &Manifest, base: Option<Image>) -> Image {
    let file = |part: &Option<Part>| part.as_ref().map(|part| dir.join(&part.file));
    let base = base.unwrap_or_default();
    Image {
        kernel: file(&manifest.kernel).unwrap_or(base.kernel),
        initrd: file(&manifest.initrd).unwrap_or(base.initrd),
        disk: file(&manifest.disk),
        append: format!("{} {}", base.append, manifest.append)
            .trim()
            .to_owned(),
        container: manifest
            .pulled
            .as_ref()
            .map(|pulled| pulled.container.clone()),
    }
}

fn read_manifest(dir: &Path) -> Result<Option<Manifest>, String> {
    if !dir.exists() {
        return Ok(None);
    }
    let manifest = Manifest::read(dir)?;
    manifest.check_sizes(dir)?;
    Ok(Some(manifest))
}

/// Takes an image out of the cache in one step; its files go with the rest
/// of the scratch directory. `false` if it was not there.
fn discard(place: &Path, workshop: &Workshop) -> Result<bool> {
    match fs::rename(place, workshop.scratch.join("discarded")) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).while_trying("remove", place),
    }
}

impl Drop for Workshop {
    /// Cleans up while the lock is still held. What cannot be deleted now, the
    /// next build reports.
    fn drop(&mut self) {
        let _ = remove_dir(&self.scratch);
    }
}

impl Recipe<'_> {
    /// How to make the image of that name: `mini`, `debian`, `debian:SUITE`.
    fn find(name: &str) -> Option<Recipe<'_>> {
        let suite = name
            .strip_prefix(debian::NAME)
            .and_then(|rest| rest.strip_prefix(':'));
        let proper = |suite: &str| {
            let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            suite.starts_with(|c: char| c.is_ascii_lowercase()) && suite.bytes().all(letter)
        };
        match (name, suite) {
            (DEFAULT_IMAGE, _) => Some(Recipe::Mini),
            (debian::NAME, _) => Some(Recipe::Debian(None)),
            (_, Some(suite)) if proper(suite) => Some(Recipe::Debian(Some(suite))),
            _ => None,
        }
    }
}

/// The cache's place by the XDG Base Directory Specification: a relative
/// `$XDG_CACHE_HOME` is to be ignored.
fn default_dir(xdg_cache_home: Option<OsString>, home: Option<OsString>) -> Option<PathBuf> {
    let xdg = xdg_cache_home
        .map(PathBuf::from)
        .filter(|dir| dir.is_absolute());
    let home = || home.filter(|dir| !dir.is_empty()).map(PathBuf::from);
    xdg.or_else(|| Some(home()?.join(".cache")))
        .map(|dir| dir.join("lodger"))
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).while_trying("remove", dir)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(dir.path().join("cache"))).unwrap();
        (dir, cache)
    }

    /// Installs an image whose kernel has these bytes.
    fn install(cache: &Cache, kernel: &[u8]) -> Result<Image> {
        let (workshop, _) = cache.enter(&mut ())?;
        let (dir, manifest) = cache.install(DEFAULT_IMAGE, &workshop, |dir| {
            fs::write(dir.join("kernel"), kernel).unwrap();
            fs::write(dir.join("initrd"), b"initrd").unwrap();
            Ok(contents())
        })?;
        Ok(image(&dir, &manifest, None))
    }

    fn contents() -> Contents {
        Contents {
            kernel: Some("kernel"),
            initrd: Some("initrd"),
            append: "quiet".into(),
            kernel_release: "6.1".into(),
            ..Contents::default()
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn default_place() {
        for (xdg, home, expected) in [
            (Some("/x"), Some("/home/u"), Some("/x/lodger")),
            (None, Some("/home/u"), Some("/home/u/.cache/lodger")),
            (Some(""), Some("/home/u"), Some("/home/u/.cache/lodger")),
            (Some("rel"), Some("/home/u"), Some("/home/u/.cache/lodger")),
            (None, Some(""), None),
            (None, None, None),
        ] {
            assert_eq!(
                default_dir(xdg.map(Into::into), home.map(Into::into)),
                expected.map(Into::into),
                "{xdg:?} {home:?}"
            );
        }
    }

    #[test]
    fn looking_creates_nothing() {
        let (_dir, cache) = cache();
        assert_eq!(cache.get("mini").unwrap(), None);
        assert!(!cache.verify("mini").unwrap());
        assert!(!cache.remove("mini").unwrap());
        assert_eq!(cache.list()[0].state, ImageState::Absent);
        assert!(!cache.dir().exists());
    }

    #[test]
    fn unknown_name_lists_the_known() {
        let (_dir, cache) = cache();
        for error in [
            cache.get("maxi").unwrap_err(),
            cache
                .build("maxi", &BuildOptions::default(), &mut (), &mut ())
                .unwrap_err(),
            cache.remove("../mini").unwrap_err(),
        ] {
            assert!(matches!(error, Error::UnknownImage { .. }));
            assert!(error.to_string().contains("known images: mini"), "{error}");
        }
        assert!(!cache.dir().exists());
    }

    #[test]
    fn install_replace_remove() {
        let (_dir, cache) = cache();
        for kernel in [&b"one"[..], b"another"] {
            let image = install(&cache, kernel).unwrap();
            assert_eq!(cache.get("mini").unwrap(), Some(image.clone()));
            assert_eq!(fs::read(&image.kernel).unwrap(), kernel);
            assert_eq!(image.append, "quiet");
            assert!(cache.verify("mini").unwrap());
            assert_eq!(names(cache.dir()), ["images", "lock"]);
        }
        assert!(cache.remove("mini").unwrap());
        assert_eq!(cache.get("mini").unwrap(), None);
        assert!(!cache.remove("mini").unwrap());
    }

    #[test]
    fn failed_build_leaves_the_old_image() {
        let (_dir, cache) = cache();
        let before = install(&cache, b"old").unwrap();
        let (workshop, _) = cache.enter(&mut ()).unwrap();
        let error = cache
            .install("mini", &workshop, |dir| {
                fs::write(dir.join("kernel"), b"new").unwrap();
                Err(Error::NoCacheDir)
            })
            .unwrap_err();
        assert!(matches!(error, Error::NoCacheDir));
        drop(workshop);
        assert_eq!(cache.get("mini").unwrap(), Some(before));
        assert!(cache.verify("mini").unwrap());
        assert_eq!(names(&cache.dir().join("images")), ["mini"]);
        assert!(!cache.dir().join("work").exists());
    }

    #[test]
    fn what_a_killed_build_left_is_no_image_and_goes() {
        let (_dir, cache) = cache();
        let (workshop, _) = cache.enter(&mut ()).unwrap();
        let half = workshop.scratch.join("half/deep");
        fs::create_dir_all(&half).unwrap();
        fs::write(half.join("kernel"), b"ker").unwrap();
        fs::write(workshop.downloads.join("a.deb"), b"part").unwrap();
        // A killed process runs no destructors, but the host unlocks its files.
        flock(&workshop.lock, FlockOperation::Unlock).unwrap();
        std::mem::forget(workshop);

        assert_eq!(cache.get("mini").unwrap(), None);
        let (workshop, waited) = cache.enter(&mut ()).unwrap();
        assert!(!waited);
        assert!(names(&workshop.scratch).is_empty());
        assert_eq!(names(&workshop.downloads), ["a.deb"]);
    }

    /// Calls back at each step.
    struct OnStep<F: FnMut(&str)>(F);

    impl<F: FnMut(&str)> Progress for OnStep<F> {
        fn step(&mut self, what: &str, _total: Option<u64>) {
            (self.0)(what);
        }
        fn advance(&mut self, _done: u64) {}
    }

    #[test]
    fn second_build_waits_and_takes_the_first_ones_image() {
        let (_dir, cache) = cache();
        let (workshop, waited) = cache.enter(&mut ()).unwrap();
        assert!(!waited);
        let (waiting, is_waiting) = mpsc::channel();
        thread::scope(|scope| {
            let second = scope.spawn(|| {
                let steps = RefCell::new(Vec::new());
                let mut progress = OnStep(|what| {
                    steps.borrow_mut().push(what.to_owned());
                    waiting.send(()).unwrap();
                });
                let image = cache.build("mini", &BuildOptions::default(), &mut progress, &mut ());
                (image, steps.take())
            });
            is_waiting.recv().unwrap();
            let first = cache
                .install("mini", &workshop, |dir| {
                    fs::write(dir.join("kernel"), b"first").unwrap();
                    fs::write(dir.join("initrd"), b"initrd").unwrap();
                    Ok(contents())
                })
                .unwrap();
            drop(workshop);
            let (second, steps) = second.join().unwrap();
            assert_eq!(second.unwrap().kernel, first.0.join("kernel"));
            assert_eq!(fs::read(first.0.join("kernel")).unwrap(), b"first");
            assert_eq!(steps.len(), 1, "{steps:?}");
            assert!(steps[0].starts_with("waiting for another build in "));
        });
    }

    #[test]
    fn damage_is_reported_with_the_way_out() {
        let (_dir, cache) = cache();
        let image = install(&cache, b"kernel").unwrap();

        fs::write(&image.kernel, b"kErnel").unwrap();
        assert!(cache.get("mini").unwrap().is_some());
        let error = cache.verify("mini").unwrap_err().to_string();
        assert!(error.contains("lodger image build mini"), "{error}");

        fs::write(&image.kernel, b"ker").unwrap();
        let error = cache.get("mini").unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }));
        assert!(matches!(cache.list()[0].state, ImageState::Damaged(_)));

        install(&cache, b"kernel").unwrap();
        assert!(cache.verify("mini").unwrap());
        fs::remove_file(cache.image_dir("mini").unwrap().join("image.json")).unwrap();
        assert!(matches!(cache.get("mini"), Err(Error::Damaged { .. })));
    }

    #[test]
    fn full_disk_is_told_plainly_whoever_met_it() {
        let full = io::ErrorKind::StorageFull;
        let tool = |detail: &str| Error::Tool {
            command: "dpkg-deb".into(),
            detail: detail.into(),
        };
        for (error, expected) in [
            (
                Err::<(), _>(full).while_trying("write", Path::new("/c/building/a")),
                true,
            ),
            (Err(tool("cannot copy: No space left on device")), true),
            (Err(tool("cannot copy: Input/output error")), false),
        ] {
            let error = error.unwrap_err().or_no_space(Path::new("/c"), "it");
            assert_eq!(matches!(error, Error::NoSpace { .. }), expected, "{error}");
            assert!(!expected || error.to_string().contains("XDG_CACHE_HOME"));
        }
    }

    #[test]
    fn place_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"").unwrap();
        let cache = Cache::open(Some(file.join("cache"))).unwrap();
        let error = cache
            .build("mini", &BuildOptions::default(), &mut (), &mut ())
            .unwrap_err()
            .to_string();
        assert!(error.contains("file/cache"), "{error}");
        assert!(error.contains("XDG_CACHE_HOME"), "{error}");
    }
}
