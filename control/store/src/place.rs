//! The directory of all VMs.

use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::claim::{Claim, REMOVED};
use crate::record::{State, Vm};
use crate::{Name, SOCKET, StoreError, at};

/// Where the user's data is that belongs to Lodger, as the environment says (XDG Base Directory Specification 0.8).
pub fn data_dir() -> Result<PathBuf, StoreError> {
    let absolute = |name| {
        let path = env::var_os(name).map(PathBuf::from);
        path.filter(|path| path.is_absolute())
    };
    let data = absolute("XDG_DATA_HOME")
        .or_else(|| Some(absolute("HOME")?.join(".local/share")))
        .ok_or(StoreError::NoHome)?;
    Ok(data.join("lodger"))
}

/// A user's VMs.
#[derive(Debug, Clone)]
pub struct Store {
    vms: PathBuf,
}

impl Store {
    /// Where the environment says (XDG Base Directory Specification 0.8).
    pub fn open() -> Result<Store, StoreError> {
        Ok(Store::at(&data_dir()?))
    }

    /// In this directory, which is made when it is needed.
    pub fn at(dir: &Path) -> Store {
        Store {
            vms: dir.join("vms"),
        }
    }

    /// The right to the VM of this name, or to a new one.
    pub fn claim(&self, name: &Name) -> Result<Claim, StoreError> {
        make_dir(&self.vms)?;
        Claim::take(&self.vms, name)
    }

    /// The right to a new VM with a name by chance.
    pub fn claim_any(&self) -> Result<Claim, StoreError> {
        loop {
            let name = Name::random().map_err(at(&self.vms))?;
            match self.claim(&name) {
                Ok(claim) if claim.record().is_none() => return Ok(claim),
                Ok(_) | Err(StoreError::InUse(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// All VMs by name. Those that were to be removed at their end, but whose monitors died first, are removed now.
    pub fn list(&self) -> Result<Vec<Vm>, StoreError> {
        let entries = match fs::read_dir(&self.vms) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(at(&self.vms)(error)),
        };
        let mut vms = Vec::new();
        for entry in entries {
            let path = entry.map_err(at(&self.vms))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if name.is_some_and(|name| name.starts_with(REMOVED)) {
                // Its removal was interrupted. Another process may be at it.
                let _ = fs::remove_dir_all(&path);
                continue;
            }
            let Some(name) = name.and_then(|name| name.parse::<Name>().ok()) else {
                continue;
            };
            match Vm::read(name, path) {
                Ok(Some(vm)) if vm.record.remove && vm.state == State::Dead => {
                    self.sweep(&vm);
                }
                Ok(Some(vm)) => vms.push(vm),
                Ok(None) => {}
                // One that cannot be read must not hide the others.
                Err(error) => tracing::warn!("{error}"),
            }
        }
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(vms)
    }

    fn sweep(&self, vm: &Vm) {
        let removed = self.claim(&vm.name).and_then(Claim::remove);
        if let Err(error) = removed {
            tracing::debug!("{error}");
        }
    }

    /// The VM of this name.
    pub fn find_name(&self, name: &Name) -> Result<Option<Vm>, StoreError> {
        Vm::read(name.clone(), self.vms.join(name.as_str()))
    }

    /// The VM of this name, or whose id begins so.
    pub fn find(&self, text: &str) -> Result<Vm, StoreError> {
        if let Ok(name) = text.parse::<Name>()
            && let Some(vm) = self.find_name(&name)?
        {
            return Ok(vm);
        }
        let unknown = || StoreError::Unknown(text.into());
        let mut found = self.list()?;
        found.retain(|vm| !text.is_empty() && vm.record.id.starts_with(text));
        match found.len() {
            0 | 1 => found.pop().ok_or_else(unknown),
            _ => Err(StoreError::Ambiguous {
                text: text.into(),
                names: found
                    .iter()
                    .map(|vm| vm.name.as_str())
                    .collect::<Vec<_>>()
                    .join(", "),
            }),
        }
    }
}

/// Where the monitor of the VM with this id and directory listens, the best place first: in the user's runtime directory if
/// there is one, and in the VM's own, because the runtime directory may go with the user's session. Both are closed to other
/// users.
pub fn sockets(id: &str, dir: &Path) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    if let Some(sockets) = runtime_dir() {
        match make_dir(&sockets) {
            Ok(()) => paths.push(sockets.join(format!("{id}.sock"))),
            Err(error) => tracing::info!("{error}; the socket is in the VM's directory only"),
        }
    }
    paths.push(dir.join(SOCKET));
    paths
}

/// Where what does not outlive the user's session is, if there is such a place.
fn runtime_dir() -> Option<PathBuf> {
    let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let ours = |path: &PathBuf| {
        let owner = path.metadata().map(|found| found.uid());
        path.is_absolute() && owner.is_ok_and(|uid| uid == rustix::process::geteuid().as_raw())
    };
    Some(runtime.filter(ours)?.join("lodger"))
}

/// The directory of the switch of this name.
pub fn switch_dir(name: &Name) -> Result<PathBuf, StoreError> {
    let base = runtime_dir().map_or_else(data_dir, Ok)?;
    Ok(base.join("switch").join(name.as_str()))
}

/// Makes a directory, and those above it, for this user alone.
fn make_dir(dir: &Path) -> Result<(), StoreError> {
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir);
    made.map_err(at(dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Life, Record};
    use lodger_control::Ending;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        (dir, store)
    }

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn record() -> Record {
        Record::new("mini".into(), serde_json::Value::Null).unwrap()
    }

    fn states(store: &Store) -> Vec<(String, State)> {
        let vms = store.list().unwrap();
        vms.iter()
            .map(|vm| (vm.name.to_string(), vm.state))
            .collect()
    }

    #[test]
    fn a_vm_from_its_name_to_its_removal() {
        let (dir, store) = store();
        assert!(matches!(store.find("web"), Err(StoreError::Unknown(_))));
        let claim = store.claim(&name("web")).unwrap();
        assert!(matches!(
            store.claim(&name("web")),
            Err(StoreError::InUse(_))
        ));
        // Without a record there is no VM yet.
        assert_eq!(states(&store), []);
        fs::write(claim.dir().join("half"), "made").unwrap();
        drop(claim);
        let mut claim = store.claim(&name("web")).unwrap();
        assert!(!claim.dir().join("half").exists());
        claim.set_record(record()).unwrap();
        assert_eq!(states(&store), [("web".into(), State::Starting)]);
        let mut life = Life::begin("/run/x".into(), "interp");
        claim.set_life(&life).unwrap();
        assert_eq!(states(&store), [("web".into(), State::Running)]);
        let id = claim.record().unwrap().id.clone();
        assert_eq!(store.find(&id[..5]).unwrap().name, name("web"));
        // The monitor dies.
        drop(claim);
        assert_eq!(states(&store), [("web".into(), State::Dead)]);
        let claim = store.claim(&name("web")).unwrap();
        assert_eq!(claim.record().unwrap().id, id);
        life.ending = Some(Ending {
            status: 0,
            reason: "done".into(),
            time: 1,
        });
        claim.set_life(&life).unwrap();
        assert_eq!(states(&store), [("web".into(), State::Starting)]);
        drop(claim);
        assert_eq!(states(&store), [("web".into(), State::Exited)]);
        store.claim(&name("web")).unwrap().remove().unwrap();
        assert_eq!(states(&store), []);
        assert_eq!(fs::read_dir(dir.path().join("vms")).unwrap().count(), 0);
    }

    #[test]
    fn one_of_many_gets_a_name() {
        let (_dir, store) = store();
        let winners = std::thread::scope(|scope| {
            let starters: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| store.claim(&name("web")).ok()))
                .collect();
            let claims = starters.into_iter().map(|starter| starter.join().unwrap());
            // Kept until all have tried.
            claims.collect::<Vec<_>>().iter().flatten().count()
        });
        assert_eq!(winners, 1);
    }

    #[test]
    fn a_look_does_not_take_a_name_away() {
        let (_dir, store) = store();
        store
            .claim(&name("web"))
            .unwrap()
            .set_record(record())
            .unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    store.list().unwrap();
                }
            });
            for _ in 0..200 {
                drop(store.claim(&name("web")).unwrap());
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn a_claim_is_handed_down() {
        let (_dir, store) = store();
        let claim = store.claim(&name("web")).unwrap();
        let (dir, lock) = (claim.dir().to_owned(), claim.hand_down().unwrap());
        drop(claim);
        assert!(matches!(
            store.claim(&name("web")),
            Err(StoreError::InUse(_))
        ));
        let claim = Claim::inherited(&dir, lock).unwrap();
        assert_eq!(claim.name(), &name("web"));
        let other = fs::File::open("/dev/null").unwrap();
        assert!(Claim::inherited(&dir, other.into()).is_err());
    }

    #[test]
    fn setting_aside_frees_the_name_and_loses_nothing() {
        let (_dir, store) = store();
        for expected in ["web-1", "web-2"] {
            let mut claim = store.claim(&name("web")).unwrap();
            assert!(claim.record().is_none());
            claim.set_record(record()).unwrap();
            fs::write(claim.dir().join("disk"), expected).unwrap();
            assert_eq!(claim.set_aside().unwrap(), name(expected));
        }
        let names: Vec<_> = states(&store).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["web-1", "web-2"]);
        let kept = store.find("web-2").unwrap().dir.join("disk");
        assert_eq!(fs::read_to_string(kept).unwrap(), "web-2");
    }

    #[test]
    fn what_a_crash_leaves_is_cleared_or_told() {
        let (dir, store) = store();
        let vms = dir.path().join("vms");
        let mut claim = store.claim(&name("temporary")).unwrap();
        let mut temporary = record();
        temporary.remove = true;
        claim.set_record(temporary).unwrap();
        let socket = dir.path().join("sock");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        claim.set_life(&Life::begin(socket.clone(), "dbt")).unwrap();
        drop(claim);
        fs::create_dir(vms.join(".removed-0")).unwrap();
        let damaged = store.claim(&name("damaged")).unwrap();
        fs::write(damaged.dir().join("vm.json"), "{").unwrap();
        drop(damaged);
        assert_eq!(states(&store), []);
        assert!(!socket.exists());
        let error = store.find("damaged").unwrap_err().to_string();
        assert!(error.contains("damaged/vm.json"), "{error}");
        fs::write(vms.join("damaged/vm.json"), "{\"version\":99}").unwrap();
        assert!(matches!(
            store.find("damaged"),
            Err(StoreError::Newer { .. })
        ));
        let left = fs::read_dir(vms).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["damaged"]);
    }
}
