//! What is written down about a VM.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use lodger_control::Ending;
use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Name, StoreError, at};

/// The version of both files.
pub(crate) const VERSION: u32 = 1;
const RECORD: &str = "vm.json";
const LIFE: &str = "state.json";
pub(crate) const LOCK: &str = "lock";

/// What a VM is; `vm.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The format's version.
    pub version: u32,
    /// 12 hexadecimal digits.
    pub id: String,
    /// When it was made, in seconds since 1970-01-01T00:00:00Z.
    pub created: u64,
    /// What it boots, for people: an image's name, or a kernel's file.
    pub image: String,
    /// What the user has written on it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// It is removed when it ends.
    #[serde(default)]
    pub remove: bool,
    /// What it is started from. Nothing here looks into it.
    pub spec: serde_json::Value,
}

impl Record {
    /// A new VM of now, with an id of its own.
    pub fn new(image: String, spec: serde_json::Value) -> io::Result<Record> {
        Ok(Record {
            version: VERSION,
            id: crate::new_id()?,
            created: now(),
            image,
            labels: BTreeMap::new(),
            remove: false,
            spec,
        })
    }
}

/// A VM's last run; `state.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Life {
    /// The format's version.
    pub version: u32,
    /// The monitor's process.
    pub pid: u32,
    /// The monitor's socket.
    pub socket: PathBuf,
    /// The engine.
    pub engine: String,
    /// When the machine was started, in seconds since 1970-01-01T00:00:00Z.
    pub started: u64,
    /// How often the restart policy has started it again.
    pub restarts: u32,
    /// How it ended; none while it runs, and if the monitor died.
    pub ending: Option<Ending>,
}

impl Life {
    /// The beginning of a life in this process.
    pub fn begin(socket: PathBuf, engine: &str) -> Life {
        Life {
            version: VERSION,
            pid: std::process::id(),
            socket,
            engine: engine.into(),
            started: now(),
            restarts: 0,
            ending: None,
        }
    }
}

/// Seconds since 1970-01-01T00:00:00Z.
fn now() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed();
    since.map_or(0, |time| time.as_secs())
}

/// How a VM is, as far as its directory tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It has never run.
    Created,
    /// Its monitor lives, and has not yet said so.
    Starting,
    /// Its monitor lives.
    Running,
    /// It has ended.
    Exited,
    /// Its monitor has died without a word: killed, or with the host.
    Dead,
}

/// A VM as it was when its directory was read.
#[derive(Debug, Clone)]
pub struct Vm {
    /// Its name.
    pub name: Name,
    /// Its directory.
    pub dir: PathBuf,
    /// What it is.
    pub record: Record,
    /// Its last or present run.
    pub life: Option<Life>,
    /// How it is.
    pub state: State,
}

impl Vm {
    /// Reads a directory; `None`: there is no VM in it.
    pub(crate) fn read(name: Name, dir: PathBuf) -> Result<Option<Vm>, StoreError> {
        // Before the files: a monitor that begins meanwhile is seen as starting, one that ends as running.
        let owned = is_owned(&dir)?;
        let Some(record) = read_record(&dir)? else {
            return Ok(None);
        };
        let life = read_life(&dir)?;
        let state = match (&life, owned) {
            (None, false) => State::Created,
            (Some(Life { ending: None, .. }), false) => State::Dead,
            (Some(_), false) => State::Exited,
            (Some(Life { ending: None, .. }), true) => State::Running,
            (_, true) => State::Starting,
        };
        Ok(Some(Vm {
            name,
            dir,
            record,
            life,
            state,
        }))
    }

    /// Where its monitor listens, if it runs.
    pub fn sockets(&self) -> Vec<PathBuf> {
        let told = self.life.iter().map(|life| life.socket.clone());
        told.chain([self.dir.join(crate::SOCKET)]).collect()
    }

    /// Whether a process owns it.
    pub fn is_alive(&self) -> bool {
        matches!(self.state, State::Starting | State::Running)
    }
}

pub(crate) fn read_record(dir: &Path) -> Result<Option<Record>, StoreError> {
    read_json(&dir.join(RECORD))
}

pub(crate) fn write_record(dir: &Path, record: &Record) -> Result<(), StoreError> {
    write_json(&dir.join(RECORD), record)
}

pub(crate) fn write_life(dir: &Path, life: &Life) -> Result<(), StoreError> {
    write_json(&dir.join(LIFE), life)
}

pub(crate) fn read_life(dir: &Path) -> Result<Option<Life>, StoreError> {
    read_json(&dir.join(LIFE))
}

pub(crate) fn has_life(dir: &Path) -> bool {
    dir.join(LIFE).exists()
}

/// Whether somebody holds the directory's lock. A look takes it for a moment itself, shared; those who want it for good try
/// for longer than that.
fn is_owned(dir: &Path) -> Result<bool, StoreError> {
    let path = dir.join(LOCK);
    let file = match fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(at(&path)(error)),
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(at(&path)(error.into())),
    }
}

/// Only the version, which decides whether the rest is understood.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(path)(error)),
    };
    let damaged = |source| StoreError::Damaged {
        path: path.into(),
        source,
    };
    let Version { version } = serde_json::from_slice(&text).map_err(damaged)?;
    if version > VERSION {
        let path = path.into();
        return Err(StoreError::Newer { path, version });
    }
    serde_json::from_slice(&text).map(Some).map_err(damaged)
}

/// The file has its old or its new contents, also after a power failure. Only on a full disk it is written in place, which
/// takes no space: that a VM has ended is to be told all the same.
fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    let write = || -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(value)?;
        text.push(b'\n');
        let new = path.with_extension("json.new");
        let replaced = || -> io::Result<()> {
            fs::write(&new, &text)?;
            fs::File::open(&new)?.sync_all()?;
            fs::rename(&new, path)
        };
        match replaced() {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                // Fails if it is not there.
                let _ = fs::remove_file(&new);
                let file = fs::File::options().write(true).open(path);
                file.map_err(|_| error)
                    .and_then(|file| overwrite(&file, &text))
            }
            result => result,
        }
    };
    write().map_err(at(path))
}

/// Replaces a file's contents without freeing its space first.
fn overwrite(mut file: &fs::File, text: &[u8]) -> io::Result<()> {
    file.write_all(text)?;
    file.set_len(text.len() as u64)?;
    file.sync_all()
}
