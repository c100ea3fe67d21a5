//! Packages from the sources that the host's apt is set up with.
//!
//! Everything goes through apt's own programs, so that its sources, keys, proxy
//! and pins apply, and through an apt state of our own, so that an ordinary user
//! can do it and nothing on the host changes. Package lists are the host's, as
//! long as they lead to the packages; when they do not (there are none yet, or
//! they are too old), fresh ones are fetched into the cache.
//!
//! See apt.conf(5), apt-get(8), apt-cache(8); `apt-helper` is what apt offers to
//! programs that download: it resumes partial files and checks hashes, which
//! `apt-get download` does not do or does not tell.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use crate::cache::Workshop;
use crate::deb::Deb;
use crate::error::{Error, IoContext, Result};
use crate::manifest::sha256_of;
use crate::progress::Progress;
use crate::sources::{self, Sources};
use crate::tool::{Tool, complaints};

/// Not in anybody's PATH, and at the same place on every Debian.
const APT_HELPER: &str = "/usr/lib/apt/apt-helper";

/// What a build runs.
const PROGRAMS: [&str; 4] = ["apt-get", "apt-cache", APT_HELPER, "dpkg-deb"];

/// The architecture of the guests.
const ARCHITECTURE: &str = "amd64";

/// Settings that an ordinary user's private run needs, whatever the host's are.
const CONFIG: &str = r#"
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
Dir::Cache::pkgcache "pkgcache.bin";
"#;

/// What the host has for building images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackageTools {
    /// Programs that a build needs and that are not there.
    pub missing: Vec<&'static str>,
    /// When the host's package lists were last changed; `None`: there are none, and a build fetches its own.
    pub lists: Option<SystemTime>,
}

impl PackageTools {
    /// Looks at the host. Nothing is changed.
    pub fn examine() -> PackageTools {
        let there = |program: &&str| match program.contains('/') {
            true => Path::new(program).exists(),
            false => std::env::var_os("PATH").is_some_and(|path| {
                std::env::split_paths(&path).any(|dir| dir.join(program).exists())
            }),
        };
        let mut missing = PROGRAMS.to_vec();
        missing.retain(|program| !there(program));
        // It tells those that are there.
        let targets = Command::new("apt-get")
            .args(["indextargets", "--format", "$(FILENAME)"])
            .arg("Identifier: Packages")
            .stdin(Stdio::null())
            .output();
        let names = targets.map(|output| output.stdout).unwrap_or_default();
        let names = String::from_utf8_lossy(&names);
        let changed = |name| fs::metadata(name).and_then(|file| file.modified()).ok();
        PackageTools {
            missing,
            lists: names.lines().filter_map(changed).max(),
        }
    }
}

/// Where a package is to be had.
#[derive(Debug, PartialEq, Eq)]
struct Remote {
    package: String,
    version: String,
    uri: String,
    /// The name that apt gives the file.
    file: String,
    size: u64,
    /// In hexadecimal, from the authenticated lists.
    sha256: String,
}

/// The host's apt, with a state of our own.
pub(crate) struct Apt<'a> {
    workshop: &'a Workshop,
    config: PathBuf,
    cache: PathBuf,
    status: PathBuf,
    /// Our own package lists, when the host's would not do.
    lists: Option<PathBuf>,
    /// Our own package sources, if the host's are not to count.
    sources: Option<(PathBuf, Sources)>,
}

/// Which of the host's package sources count.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Archive<'a> {
    /// All of them, as they are.
    Host,
    /// Debian's own, for this suite; `None`: the one that the host has.
    Debian(Option<&'a str>),
}

/// Fetches the packages that `choose` names after asking apt.
pub(crate) fn fetch(
    workshop: &Workshop,
    archive: Archive,
    progress: &mut dyn Progress,
    mut choose: impl FnMut(&Apt) -> Result<Vec<String>>,
) -> Result<Vec<Deb>> {
    let mut apt = Apt::new(workshop)?;
    let mut suite = None;
    let mut try_first = true;
    if let Archive::Debian(wanted) = archive {
        let sources = match apt.debian(wanted)? {
            Some(sources) => sources,
            None => {
                progress.step("fetching package lists", None);
                let detail = apt.update()?;
                apt.debian(wanted)?.ok_or(Error::NoArchive { detail })?
            }
        };
        try_first = sources.has_lists;
        suite = Some(sources.suite.clone());
        apt.use_sources(sources)?;
    }
    let mut attempt = |apt: &Apt, progress: &mut dyn Progress| {
        progress.step("looking for the packages", None);
        let names = choose(apt)?;
        let remotes = apt.locate(&names)?;
        let mut debs = apt.download(&remotes, progress)?;
        debs.sort_by_key(|deb| names.iter().position(|name| *name == deb.package));
        Ok(debs)
    };
    if try_first {
        match attempt(&apt, progress) {
            Err(Error::NoPackage { .. }) => {}
            // A mirror forgets a version soon after there is a newer one.
            Err(Error::Download { detail, .. }) if detail.contains("404") => {}
            result => return result,
        }
    }
    progress.step("fetching package lists", None);
    let complaints = apt.update()?;
    match attempt(&apt, progress) {
        Err(Error::NoPackage { .. })
            if suite.is_some() && complaints.contains("does not have a Release file") =>
        {
            Err(Error::UnknownSuite {
                suite: suite.unwrap_or_default(),
                detail: complaints,
            })
        }
        Err(Error::NoPackage { package }) if !complaints.is_empty() => Err(Error::NoLists {
            package,
            dir: workshop.downloads.clone(),
            detail: complaints,
        }),
        result => result,
    }
}

impl Apt<'_> {
    fn new(workshop: &Workshop) -> Result<Apt<'_>> {
        let apt = Apt {
            workshop,
            config: workshop.scratch.join("apt.conf"),
            cache: workshop.scratch.join("apt"),
            status: workshop.scratch.join("status"),
            lists: None,
            sources: None,
        };
        if !Path::new(APT_HELPER).exists() {
            return Err(Error::NoApt { program: "apt-get" });
        }
        fs::write(&apt.config, CONFIG).while_trying("write", &apt.config)?;
        // What is installed on the host does not matter: an empty list of it.
        fs::write(&apt.status, "").while_trying("write", &apt.status)?;
        let partial = apt.cache.join("archives/partial");
        fs::create_dir_all(&partial).while_trying("create", &partial)?;
        Ok(apt)
    }

    /// One of apt's programs, set up to work on our state.
    fn command(&self, program: &'static str) -> Result<Tool> {
        let mut tool = Tool::new(program, self.workshop)?;
        tool.command.arg("-c").arg(&self.config).arg("-q");
        let mut option = |name: &str, value: &Path| {
            let mut setting = std::ffi::OsString::from(name);
            setting.push("=");
            setting.push(value);
            tool.command.arg("-o").arg(setting);
        };
        option("Dir::Cache", &self.cache);
        option("Dir::State::status", &self.status);
        if let Some(lists) = &self.lists {
            option("Dir::State::lists", lists);
        }
        if let Some((sources, _)) = &self.sources {
            option("Dir::Etc::SourceList", sources);
            option("Dir::Etc::SourceParts", Path::new("/dev/null"));
            option("APT::Architecture", Path::new(ARCHITECTURE));
            option("APT::Architectures", Path::new(ARCHITECTURE));
        }
        Ok(tool)
    }

    /// What the host's apt has of Debian's archive, made to serve `suite`. `None` if it has nothing of it.
    fn debian(&self, suite: Option<&str>) -> Result<Option<Sources>> {
        let mut tool = self.command("apt-get")?;
        tool.command
            .args(["indextargets", "--format", sources::FORMAT])
            .args(["Created-By: Packages", "Identifier: Packages"])
            .arg(format!("Architecture: {ARCHITECTURE}"));
        Ok(Sources::choose(&tool.output()?, suite))
    }

    /// Lets nothing but these sources count from now on.
    fn use_sources(&mut self, sources: Sources) -> Result<()> {
        let path = self.workshop.scratch.join("sources.list");
        let keyring = Path::new(sources::KEYRING).exists();
        fs::write(&path, sources.list(keyring)).while_trying("write", &path)?;
        self.sources = Some((path, sources));
        Ok(())
    }

    /// The file `sources.list` that suits a guest.
    pub(crate) fn sources_list(&self) -> String {
        self.sources
            .as_ref()
            .map(|(_, sources)| sources.list(true))
            .unwrap_or_default()
    }

    /// The names of these packages, of all that a minimal system has, and of all that they depend on, in an order that
    /// suits their installation.
    pub(crate) fn resolve(&self, packages: &[String]) -> Result<Vec<String>> {
        let mut tool = self.command("apt-get")?;
        tool.command
            .args([
                "install",
                "--print-uris",
                "--yes",
                "--no-install-recommends",
            ])
            .args(["?essential", "?priority(required)"])
            .args(packages);
        let output = tool.run()?;
        if !output.status.success() {
            return Err(match unknown_package(&output.stderr) {
                Some(package) => Error::NoPackage { package },
                None => tool.failed(&output.stderr, output.status),
            });
        }
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter_map(package_of_uri).collect())
    }

    /// Fetches fresh package lists, to be used from now on. Sources that fail are
    /// left out, as apt does it: what apt complained of is the answer.
    fn update(&mut self) -> Result<String> {
        let lists = self.workshop.downloads.join("lists");
        let partial = lists.join("partial");
        fs::create_dir_all(&partial).while_trying("create", &partial)?;
        self.lists = Some(lists);

        // Of all the indexes that the host may want, only those of packages.
        let mut tool = self.command("apt-get")?;
        tool.command
            .args(["indextargets", "--format", "$(TARGET_OF)::$(IDENTIFIER)"]);
        let targets = tool.output()?;
        let targets: BTreeSet<&str> = targets.lines().collect();

        let mut tool = self.command("apt-get")?;
        tool.command.arg("update");
        for target in targets {
            if target != "deb::Packages" {
                tool.command.arg("-o").arg(format!(
                    "Acquire::IndexTargets::{target}::DefaultEnabled=false"
                ));
            }
        }
        let output = tool.run()?;
        Ok(complaints(&output.stderr))
    }

    /// The names in the field Depends of a package (of alternatives, the first).
    pub(crate) fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let mut tool = self.command("apt-cache")?;
        tool.command
            .args(["show", "--no-all-versions"])
            .arg(format!("{package}:{ARCHITECTURE}"));
        let output = tool.run()?;
        let record = String::from_utf8_lossy(&output.stdout);
        if record.trim().is_empty() {
            return Err(
                if output.status.success() || says_no_package(&output.stderr) {
                    Error::NoPackage {
                        package: package.to_owned(),
                    }
                } else {
                    tool.failed(&output.stderr, output.status)
                },
            );
        }
        Ok(depends(&record))
    }

    /// Asks apt where the packages are.
    fn locate(&self, packages: &[String]) -> Result<Vec<Remote>> {
        let mut tool = self.command("apt-get")?;
        tool.command.args(["download", "--print-uris"]);
        for package in packages {
            tool.command.arg(format!("{package}:{ARCHITECTURE}"));
        }
        let output = tool.run()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let mut remotes: Vec<Remote> = text.lines().filter_map(Remote::parse).collect();
        for package in packages {
            if !remotes.iter().any(|remote| remote.package == *package) {
                return Err(
                    if output.status.success() || says_no_package(&output.stderr) {
                        Error::NoPackage {
                            package: package.clone(),
                        }
                    } else {
                        tool.failed(&output.stderr, output.status)
                    },
                );
            }
        }
        remotes.retain(|remote| packages.contains(&remote.package));
        Ok(remotes)
    }

    /// Fetches the packages that are not there yet.
    fn download(&self, remotes: &[Remote], progress: &mut dyn Progress) -> Result<Vec<Deb>> {
        self.drop_others(remotes)?;
        self.download_together(remotes, progress)?;
        remotes
            .iter()
            .map(|remote| {
                let path = self.workshop.downloads.join(&remote.file);
                self.download_one(remote, &path, progress)?;
                Ok(Deb {
                    package: remote.package.clone(),
                    version: remote.version.clone(),
                    path,
                })
            })
            .collect()
    }

    /// Deletes downloads of versions that are wanted no more.
    fn drop_others(&self, remotes: &[Remote]) -> Result<()> {
        let dir = &self.workshop.downloads;
        for entry in fs::read_dir(dir).while_trying("read", dir)? {
            let entry = entry.while_trying("read", dir)?;
            let wanted = |remote: &Remote| entry.file_name() == remote.file.as_str();
            if !entry.path().is_dir() && !remotes.iter().any(wanted) {
                fs::remove_file(entry.path()).while_trying("remove", &entry.path())?;
            }
        }
        Ok(())
    }

    /// Fetches in one go what there is nothing of yet. What fails is left to [`Apt::download_one`].
    fn download_together(&self, remotes: &[Remote], progress: &mut dyn Progress) -> Result<()> {
        let path = |remote: &Remote| self.workshop.downloads.join(&remote.file);
        let missing: Vec<&Remote> = remotes
            .iter()
            .filter(|remote| !path(remote).exists())
            .collect();
        if missing.len() < 2 {
            return Ok(());
        }
        let total = missing.iter().map(|remote| remote.size).sum();
        let what = format!("downloading {} packages", missing.len());
        progress.step(&what, Some(total));
        let log = self.workshop.scratch.join("download.log");
        let done = || {
            let len = |remote: &&Remote| fs::metadata(path(remote)).map_or(0, |file| file.len());
            missing.iter().map(len).sum::<u64>().min(total)
        };
        self.run_helper(&missing, &log, &mut || progress.advance(done()))?;
        Ok(())
    }

    fn download_one(
        &self,
        remote: &Remote,
        path: &Path,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        if remote.is_at(path)? {
            return Ok(());
        }
        let what = format!("downloading {} {}", remote.package, remote.version);
        progress.step(&what, Some(remote.size));
        let log = self.workshop.scratch.join("download.log");
        // What an earlier try left may be damaged: then once more, from nothing.
        loop {
            let resumed = match fs::metadata(path) {
                Ok(metadata) if metadata.len() < remote.size => metadata.len() > 0,
                Ok(_) if remote.matches(path)? => return Ok(()),
                Ok(_) => {
                    fs::remove_file(path).while_trying("remove", path)?;
                    false
                }
                Err(_) => false,
            };
            let status = self.run_helper(&[remote], &log, &mut || {
                if let Ok(metadata) = fs::metadata(path) {
                    progress.advance(metadata.len().min(remote.size));
                }
            })?;
            if status.success() && remote.matches(path)? {
                return Ok(());
            }
            let detail = match complaints(&fs::read(&log).while_trying("read", &log)?) {
                text if text.is_empty() => format!("the file is not as announced ({status})"),
                text => text,
            };
            if !(resumed && (status.success() || detail.contains("Hash Sum mismatch"))) {
                return Err(Error::Download {
                    package: remote.package.clone(),
                    dir: self.workshop.downloads.clone(),
                    detail,
                });
            }
        }
    }

    /// Lets apt-helper fetch files, and calls `watch` while they grow. It writes its
    /// output to a file, not to us: if we are killed, it finishes its work for the
    /// next build, which waits for it because it holds the lock.
    fn run_helper(
        &self,
        remotes: &[&Remote],
        log: &Path,
        watch: &mut dyn FnMut(),
    ) -> Result<ExitStatus> {
        let mut tool = self.command(APT_HELPER)?;
        let output = File::create(log).while_trying("create", log)?;
        tool.command.arg("download-file");
        for remote in remotes {
            tool.command
                .arg(&remote.uri)
                .arg(self.workshop.downloads.join(&remote.file))
                .arg(format!("SHA256:{}", remote.sha256));
        }
        tool.command
            .stderr(output.try_clone().while_trying("write", log)?)
            .stdout(output);
        let mut child = tool.command.spawn().map_err(|error| tool.no_start(error))?;
        loop {
            let status = child.try_wait().map_err(|error| tool.no_start(error))?;
            watch();
            match status {
                Some(status) => return Ok(status),
                None => sleep(Duration::from_millis(50)),
            }
        }
    }
}

impl Remote {
    /// Reads a line of `apt-get download --print-uris`:
    /// `'URI' PACKAGE_VERSION_ARCHITECTURE.deb SIZE SHA256:HASH`.
    fn parse(line: &str) -> Option<Remote> {
        let (uri, rest) = line.strip_prefix('\'')?.split_once("' ")?;
        let mut words = rest.split_whitespace();
        let file = words.next().filter(|file| !file.contains('/'))?;
        let size = words.next()?.parse().ok()?;
        let sha256 = words.find_map(|word| word.strip_prefix("SHA256:"))?;
        let mut parts = file.split('_');
        Some(Remote {
            package: parts.next()?.to_owned(),
            version: parts.next()?.replace("%3a", ":"),
            uri: uri.to_owned(),
            file: file.to_owned(),
            size,
            sha256: sha256.to_owned(),
        })
    }

    /// Whether all of the package is there.
    fn is_at(&self, path: &Path) -> Result<bool> {
        let len = fs::metadata(path).map_or(0, |file| file.len());
        Ok(len == self.size && self.matches(path)?)
    }

    /// Whether the file is the package, byte by byte.
    fn matches(&self, path: &Path) -> Result<bool> {
        let hash = File::open(path)
            .and_then(sha256_of)
            .while_trying("read", path)?;
        Ok(hash == self.sha256)
    }
}

/// The packages named in the field Depends of a record in deb822 format.
fn depends(record: &str) -> Vec<String> {
    record
        .lines()
        .find_map(|line| line.strip_prefix("Depends:"))
        .unwrap_or_default()
        .split(',')
        .filter_map(|dependency| dependency.split_whitespace().next())
        .map(|name| name.split(':').next().unwrap_or(name).to_owned())
        .collect()
}

/// The package of a line of `apt-get install --print-uris`: `'URI' PACKAGE_VERSION_ARCHITECTURE.deb SIZE HASH`.
fn package_of_uri(line: &str) -> Option<String> {
    let (_, rest) = line.strip_prefix('\'')?.split_once("' ")?;
    rest.split_once('_').map(|(package, _)| package.to_owned())
}

/// The package that apt-get does not know.
fn unknown_package(stderr: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(stderr);
    text.lines().find_map(|line| {
        let line = line.strip_prefix("E: ")?;
        let name = line
            .strip_prefix("Unable to locate package ")
            .or_else(|| Some(line.strip_prefix("Package '")?.split_once('\'')?.0))?;
        Some(name.trim().to_owned())
    })
}

fn says_no_package(stderr: &[u8]) -> bool {
    let text = String::from_utf8_lossy(stderr);
    [
        "No packages found",
        "Unable to locate package",
        "Can't find a source",
    ]
    .iter()
    .any(|phrase| text.contains(phrase))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_print_uris() {
        let line = "'http://mirror.example/pool/b/busybox-static_1.35.0-4%2bb1_amd64.deb' \
                    busybox-static_1%3a1.35.0-4+b1_amd64.deb 928188 SHA256:3d3f";
        let remote = Remote {
            package: "busybox-static".into(),
            version: "1:1.35.0-4+b1".into(),
            uri: "http://mirror.example/pool/b/busybox-static_1.35.0-4%2bb1_amd64.deb".into(),
            file: "busybox-static_1%3a1.35.0-4+b1_amd64.deb".into(),
            size: 928188,
            sha256: "3d3f".into(),
        };
        assert_eq!(Remote::parse(line), Some(remote));
        for bad in [
            "",
            "Get:1 http://mirror.example/",
            "'http://mirror.example/a.deb' a_1_amd64.deb 5 MD5Sum:00",
            "'http://mirror.example/a.deb' ../a_1_amd64.deb 5 SHA256:00",
            "'http://mirror.example/a.deb' a_1_amd64.deb five SHA256:00",
        ] {
            assert_eq!(Remote::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn lines_of_apt_get_install() {
        for (line, package) in [
            (
                "'http://mirror.example/pool/a/a_1%3a2_all.deb' a_1%3a2_all.deb 5 MD5Sum:00",
                Some("a"),
            ),
            ("Reading package lists...", None),
            ("'http://mirror.example/a.deb' a", None),
        ] {
            assert_eq!(package_of_uri(line).as_deref(), package, "{line}");
        }
        for (line, package) in [
            ("E: Unable to locate package nonesuch\n", Some("nonesuch")),
            (
                "W: x\nE: Package 'exim' has no installation candidate\n",
                Some("exim"),
            ),
            ("E: Unable to correct problems\n", None),
        ] {
            assert_eq!(
                unknown_package(line.as_bytes()).as_deref(),
                package,
                "{line}"
            );
        }
    }

    #[test]
    fn field_depends() {
        for (record, expected) in [
            ("Package: a\nVersion: 1\n", &[][..]),
            ("Package: a\nDepends: b\n", &["b"]),
            (
                "Depends: linux-image-6.1 (= 6.1-1), c:any (>= 2) | d, e\nPre-Depends: f\n",
                &["linux-image-6.1", "c", "e"],
            ),
        ] {
            assert_eq!(depends(record), expected, "{record}");
        }
    }
}
