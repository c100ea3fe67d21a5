//! What an image of a registry runs, and how it is told to the guest.
//!
//! See the OCI Image Specification 1.1, "Image Configuration". The guest boots the kernel and
//! the RAM disk of `mini`; what is told to it is a second archive behind that one, which the kernel
//! unpacks over it: `init.sh` as `/lodger/init`, and two small shell scripts for it.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use crate::agent;
use crate::cpio;
use crate::error::{IoContext, Result};
use crate::tree::{Kind, Node, Tree};

const INIT: &str = include_str!("init.sh");
const POWER: &str = include_str!("power.sh");
/// Called by busybox's DHCP client.
const UDHCPC: &str = include_str!("../udhcpc.sh");
/// What makes the kernel start it.
pub(crate) const APPEND: &str = "rdinit=/lodger/init";

/// Where the guest has the root disk, before the program runs in it.
const ROOT: &str = "/mnt";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const STOP: &str = "TERM";
/// Bytes of /etc/passwd or /etc/group that are read.
const MOST_USERS: u64 = 8 << 20;

/// What an image runs if nothing else is said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// The beginning of the command line, which stays if a command is given.
    pub entrypoint: Vec<String>,
    /// The rest of the command line, which a given command replaces.
    pub command: Vec<String>,
    /// `NAME=VALUE`.
    pub environment: Vec<String>,
    /// The working directory.
    pub directory: String,
    /// User and group, by number.
    pub user: (u32, u32),
    /// The user's home.
    pub home: String,
    /// The signal that asks the program to end, without `SIG`.
    pub stop_signal: String,
    /// The ports on which it listens: `80/tcp`.
    #[serde(default)]
    pub ports: Vec<String>,
}

/// What is run, where it differs from what the image says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    /// The command, in place of the image's.
    pub command: Vec<String>,
    /// The entry point, in place of the image's; then the image's command does not count. An empty one: none.
    pub entrypoint: Option<String>,
    /// `NAME=VALUE`, over the image's.
    pub environment: Vec<String>,
    /// The working directory, made if it is not there.
    pub directory: Option<String>,
    /// What the machine calls itself.
    pub hostname: Option<String>,
}

impl Container {
    /// Reads an image's configuration. `root` has its files: users and groups are looked up there.
    pub(crate) fn new(
        configuration: &ImageConfiguration,
        root: &Tree,
    ) -> Result<Container, String> {
        let config = configuration.config().clone().unwrap_or_default();
        let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
        let user = config.user().clone().unwrap_or_default();
        let (user, home) = find_user(&user, root)?;
        let mut directory = config.working_dir().clone().unwrap_or_default();
        if !directory.starts_with('/') {
            directory.insert(0, '/');
        }
        let stop = config.stop_signal().clone().unwrap_or_default();
        let stop = stop.strip_prefix("SIG").unwrap_or(&stop);
        let known = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+');
        if !known(stop) {
            return Err(format!("its stop signal is {stop:?}"));
        }
        let container = Container {
            entrypoint: list(config.entrypoint()),
            command: list(config.cmd()),
            environment: list(config.env()),
            directory,
            user,
            home,
            stop_signal: if stop.is_empty() { STOP } else { stop }.to_owned(),
            ports: list(config.exposed_ports()),
        };
        let strings = [
            &container.entrypoint,
            &container.command,
            &container.environment,
        ];
        let strings = strings.into_iter().flatten();
        let has_zero = strings
            .chain([&container.directory])
            .any(|text| text.contains('\0'));
        match has_zero {
            true => Err("its configuration has a zero byte in it".into()),
            false => Ok(container),
        }
    }

    /// The command line of a process.
    pub fn command_line(&self, process: &Process) -> Vec<String> {
        let (entrypoint, command) = match &process.entrypoint {
            Some(entrypoint) if entrypoint.is_empty() => (vec![], &process.command),
            Some(entrypoint) => (vec![entrypoint.clone()], &process.command),
            None if process.command.is_empty() => (self.entrypoint.clone(), &self.command),
            None => (self.entrypoint.clone(), &process.command),
        };
        entrypoint
            .into_iter()
            .chain(command.iter().cloned())
            .collect()
    }

    /// Writes the RAM disk of a machine that runs the process: `base`, which is that of `mini`, with what this one
    /// needs behind it.
    pub fn write_initrd(&self, process: &Process, base: &Path, out: &mut File) -> Result<()> {
        let mut base_file = File::open(base).while_trying("open", base)?;
        let written = io::copy(&mut base_file, out).and_then(|_| {
            let mut archive = Vec::new();
            cpio::write(&self.tree(process), &mut archive)?;
            out.write_all(&archive)?;
            out.flush()
        });
        written.while_trying("write a RAM disk from", base)
    }

    fn tree(&self, process: &Process) -> Tree {
        let command = self.command_line(process);
        // A system's first process is started as the machine's.
        let program = command.first().map_or("", |program| program.as_str());
        let is_init = ["init", "systemd"].contains(&program.rsplit('/').next().unwrap_or(""));
        let hostname = process.hostname.as_deref().unwrap_or("lodger");
        let directory = process.directory.as_ref().unwrap_or(&self.directory);
        let mut settings = String::new();
        for (name, value) in [
            ("hostname", hostname),
            ("stop", &self.stop_signal),
            ("directory", directory),
            ("user", &self.user.0.to_string()),
        ] {
            settings += &format!("{name}={}\n", quoted(value));
        }
        let mut run = format!(
            "#!/bin/sh\necho $$ >/run/main\nexec {}/bin/busybox env -i",
            if is_init { "" } else { "setsid cttyhack " }
        );
        let words = self.environment(process, hostname);
        for word in words.iter() {
            run += &format!(" \\\n\t{}", quoted(word));
        }
        run += &match is_init {
            true => format!(" \\\n\t/bin/busybox switch_root {ROOT}"),
            false => format!(
                " \\\n\t/bin/busybox nsenter --root={ROOT} --wd={} --setgid={} --setuid={}",
                quoted(&format!("{ROOT}{directory}")),
                self.user.1,
                self.user.0
            ),
        };
        for word in &command {
            run += &format!(" \\\n\t{}", quoted(word));
        }
        run.push('\n');
        // Commands of the host's have what the image's program has.
        let mut agent = "#!/bin/sh\nexec /bin/busybox env -i".to_owned();
        for word in words.iter() {
            agent += &format!(" \\\n\t{}", quoted(word));
        }
        agent += &format!(
            " \\\n\t/{} --root {ROOT} --environment --workdir {} --user {}:{}\n",
            agent::PATH,
            quoted(directory),
            self.user.0,
            self.user.1
        );
        let mut tree = Tree::default();
        tree.file("lodger/agent", 0o755, agent.into());
        tree.file("lodger/init", 0o755, INIT.into());
        tree.file("lodger/udhcpc", 0o755, UDHCPC.into());
        tree.file("lodger/status", 0o755, super::status::program());
        // Named by the event and its value.
        tree.file("lodger/acpi/PWRF/00000080", 0o755, POWER.into());
        tree.file("lodger/settings", 0o644, settings.into());
        tree.file(
            if is_init {
                "lodger/become"
            } else {
                "lodger/run"
            },
            0o755,
            run.into(),
        );
        tree
    }

    /// What is set for a process: what every one has, the image's, and the process's own; of a name, the last counts.
    fn environment(&self, process: &Process, hostname: &str) -> Vec<String> {
        let usual = [
            format!("PATH={PATH}"),
            format!("HOSTNAME={hostname}"),
            "TERM=xterm".into(),
            format!("HOME={}", self.home),
        ];
        let mut all: Vec<String> = Vec::new();
        let given = self.environment.iter().chain(&process.environment);
        for word in usual.iter().chain(given) {
            let Some((name, _)) = word.split_once('=').filter(|(name, _)| !name.is_empty()) else {
                continue;
            };
            let same = |other: &String| other.split_once('=').is_some_and(|(n, _)| n == name);
            all.retain(|other| !same(other));
            all.push(word.clone());
        }
        all
    }
}

/// Adds to an image's files what its program needs of a machine: places for file systems, and its directory.
pub(crate) fn complete(root: &mut Tree, container: &Container) {
    for (path, permissions) in [
        ("dev", 0o755),
        ("etc", 0o755),
        ("proc", 0o555),
        ("sys", 0o555),
    ] {
        if root.get(path).is_none() {
            root.insert(path, Node::new(permissions, Kind::Dir));
        }
    }
    let mut directory = String::new();
    for name in container
        .directory
        .split('/')
        .filter(|name| !name.is_empty())
    {
        directory = format!("{directory}/{name}");
        let real = root.real_path(&directory);
        if root.get(&real).is_none() {
            root.dir(&real);
        }
    }
}

/// The numbers of a user `USER[:GROUP]`, each a name or a number, and the user's home.
fn find_user(text: &str, root: &Tree) -> Result<((u32, u32), String), String> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let passwd = lines(root, "etc/passwd")?;
    let number: Option<u32> = user.parse().ok();
    // name:password:uid:gid:comment:home:shell
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>());
    let mut entry = entry.filter(|fields| fields.len() >= 6);
    let entry = entry
        .find(|fields| fields[0] == user || number.is_some() && fields[2].parse().ok() == number);
    let found = entry
        .as_ref()
        .and_then(|fields| Some((fields[2].parse().ok()?, fields[3].parse().ok()?)));
    let (uid, gid) = match (found, number) {
        (Some(found), _) => found,
        (None, Some(number)) => (number, 0),
        (None, None) => return Err(format!("its user '{user}' is not in its /etc/passwd")),
    };
    let home = match &entry {
        Some(fields) if !fields[5].is_empty() => fields[5].to_owned(),
        _ if uid == 0 => "/root".into(),
        _ => "/".into(),
    };
    let gid = match group {
        None | Some("") => gid,
        Some(group) => match group.parse() {
            Ok(number) => number,
            Err(_) => {
                let groups = lines(root, "etc/group")?;
                let groups = groups
                    .lines()
                    .map(|line| line.split(':').collect::<Vec<_>>());
                let mut groups = groups.filter(|fields| fields.first() == Some(&group));
                let number = groups.find_map(|fields| fields.get(2)?.parse().ok());
                number.ok_or_else(|| format!("its group '{group}' is not in its /etc/group"))?
            }
        },
    };
    Ok(((uid, gid), home))
}

fn lines(root: &Tree, path: &str) -> Result<String, String> {
    match root.content(path) {
        Some(content) if content.len() <= MOST_USERS => {
            let bytes = content
                .bytes()
                .map_err(|error| format!("{path}: {error}"))?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
        _ => Ok(String::new()),
    }
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
