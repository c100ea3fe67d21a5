//! Owning a VM.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use crate::record::{self, LOCK, Life, Record};
use crate::{Name, StoreError, at};

/// How often a taken lock is tried again, in case somebody has only had a look, and the time between two tries.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(5);

/// What removed directories are called until they are gone.
pub(crate) const REMOVED: &str = ".removed-";

/// The right to start, change and remove the VM of a name, which one process has at a time. It ends with this value, and
/// with the process; a child process that inherits the lock's descriptor has it as well.
#[derive(Debug)]
pub struct Claim {
    name: Name,
    dir: PathBuf,
    lock: File,
    record: Option<Record>,
}

impl Claim {
    /// Claims `name` in the directory of all VMs, whether there is such a VM or not.
    pub(crate) fn take(vms: &Path, name: &Name) -> Result<Claim, StoreError> {
        let dir = vms.join(name.as_str());
        let path = dir.join(LOCK);
        let mut tries = 0;
        loop {
            match fs::DirBuilder::new().mode(0o700).create(&dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(at(&dir)(error));
                }
                _ => {}
            }
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            let lock = match options.mode(0o600).open(&path) {
                Ok(lock) => lock,
                // Removed since.
                Err(error) if error.kind() == io::ErrorKind::NotFound && tries < TRIES => {
                    tries += 1;
                    continue;
                }
                Err(error) => return Err(at(&path)(error)),
            };
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                // The directory may have been removed or renamed before it was locked.
                Ok(()) if is_at(&lock, &path) => {
                    let record = record::read_record(&dir)?;
                    if record.is_none() {
                        clear(&dir)?;
                    }
                    return Ok(Claim {
                        name: name.clone(),
                        dir,
                        lock,
                        record,
                    });
                }
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) if tries >= TRIES => {
                    return Err(StoreError::InUse(name.clone()));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    tries += 1;
                    std::thread::sleep(PAUSE);
                }
                Err(error) => return Err(at(&path)(error.into())),
            }
        }
    }

    /// The claim that a parent process has handed down with the lock's descriptor.
    pub fn inherited(dir: &Path, lock: OwnedFd) -> Result<Claim, StoreError> {
        let lock = File::from(lock);
        let wrong = || at(dir)(io::Error::other("not the lock of a VM's directory"));
        let name = dir.file_name().and_then(|name| name.to_str()?.parse().ok());
        let name: Name = name.ok_or_else(wrong)?;
        if !is_at(&lock, &dir.join(LOCK)) {
            return Err(wrong());
        }
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| StoreError::InUse(name.clone()))?;
        Ok(Claim {
            name,
            dir: dir.into(),
            lock,
            record: record::read_record(dir)?,
        })
    }

    /// The name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The directory, where the owner may keep what belongs to the VM.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The VM that has the name; none if it is free.
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// Whether the VM has been started before.
    pub fn has_run(&self) -> bool {
        record::has_life(&self.dir)
    }

    /// Whether the VM's last monitor has died without a word.
    pub fn is_dead(&self) -> bool {
        let life = record::read_life(&self.dir);
        matches!(life, Ok(Some(Life { ending: None, .. })))
    }

    /// Writes down what the VM is. From now on there is one.
    pub fn set_record(&mut self, record: Record) -> Result<(), StoreError> {
        record::write_record(&self.dir, &record)?;
        self.record = Some(record);
        Ok(())
    }

    /// Writes down how it goes.
    pub fn set_life(&self, life: &Life) -> Result<(), StoreError> {
        record::write_life(&self.dir, life)
    }

    /// A descriptor to hand down to the process that is to own the VM.
    pub fn hand_down(&self) -> Result<OwnedFd, StoreError> {
        let lock = self.lock.try_clone().map_err(at(&self.dir))?;
        Ok(lock.into())
    }

    /// Removes the VM and everything in its directory. The name is free at once.
    pub fn remove(self) -> Result<(), StoreError> {
        let id = crate::new_id().map_err(at(&self.dir))?;
        let gone = self.dir.with_file_name(format!("{REMOVED}{id}"));
        fs::rename(&self.dir, &gone).map_err(at(&self.dir))?;
        // A monitor that was killed has left its socket in the runtime directory.
        if let Ok(Some(life)) = record::read_life(&gone)
            && life
                .socket
                .metadata()
                .is_ok_and(|found| found.file_type().is_socket())
        {
            let _ = fs::remove_file(&life.socket);
        }
        match fs::remove_dir_all(&gone) {
            // Somebody who looked around has taken the rest away.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(at(&gone)),
        }
    }

    /// Gives the VM another name, NAME-1 or the next that is free, so that its name is free for a new one.
    pub fn set_aside(self) -> Result<Name, StoreError> {
        for number in 1.. {
            let Ok(name) = format!("{}-{number}", self.name).parse::<Name>() else {
                break;
            };
            if self.move_to(&name)? {
                return Ok(name);
            }
        }
        Err(StoreError::InUse(self.name))
    }

    /// Gives the VM this name.
    pub fn rename(self, name: &Name) -> Result<(), StoreError> {
        match self.move_to(name)? {
            true => Ok(()),
            false => Err(StoreError::Taken(name.clone())),
        }
    }

    /// Renames the directory; false: the name is taken.
    fn move_to(&self, name: &Name) -> Result<bool, StoreError> {
        let path = self.dir.with_file_name(name.as_str());
        // An empty directory is the only thing that rename(2) replaces by a directory.
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
            Err(error) => return Err(at(&path)(error)),
        }
        match fs::rename(&self.dir, &path) {
            Ok(()) => Ok(true),
            Err(error) => Err(at(&path)(error)),
        }
    }
}

/// Removes what a start that was interrupted has left in a directory without a VM.
fn clear(dir: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(dir).map_err(at(dir))? {
        let path = entry.map_err(at(dir))?.path();
        if path.file_name() != Some(LOCK.as_ref()) {
            fs::remove_file(&path).map_err(at(&path))?;
        }
    }
    Ok(())
}

/// Whether the open file is the one at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    let same = |a: fs::Metadata, b: fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    match (file.metadata(), path.metadata()) {
        (Ok(a), Ok(b)) => same(a, b),
        _ => false,
    }
}
