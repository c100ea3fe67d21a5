//! Somebody on the host changes names while the guest looks them up.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use tempfile::tempdir;

use crate::client::{Client, ROOT, name, op};

/// `door` is by turns a folder with a file, and a link to a place outside where a file has the same name.
#[test]
fn nothing_outside_is_reached_however_names_are_swapped() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir_all(path("shared/door")).unwrap();
    fs::create_dir_all(path("outside")).unwrap();
    fs::write(path("shared/door/file"), b"inside").unwrap();
    fs::write(path("outside/file"), b"secret").unwrap();
    symlink(path("outside"), path("shared/link")).unwrap();
    // And the file itself.
    symlink(path("outside/file"), path("shared/door/other")).unwrap();
    let c = Client::new(&path("shared"));
    let stop = AtomicBool::new(false);
    let (mut reached, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let swap = |a: &str, b: &str| {
                // Both names are there all the time, whatever they are.
                let flags = RenameFlags::EXCHANGE;
                let _ = renameat_with(CWD, path(a), CWD, path(b), flags);
            };
            while !stop.load(Ordering::Relaxed) {
                swap("shared/door", "shared/link");
                swap("shared/door/file", "shared/door/other");
                swap("shared/link/file", "shared/link/other");
            }
        });
        for round in 0..20_000 {
            let attempt = || -> Result<(), i32> {
                let door = c.lookup(ROOT, "door")?;
                let file = c.lookup(door.node, "file")?;
                if round % 4 == 0 {
                    c.call(op::UNLINK, door.node, &name("new")).ok();
                    let (_, new) = c.create(door.node, "new", 2)?;
                    c.write(new, 0, b"made")?;
                    c.release(op::RELEASE, new)?;
                }
                let handle = c.open(file.node, 2)?;
                let bytes = c.read(handle, 0, 100);
                c.release(op::RELEASE, handle)?;
                assert_eq!(bytes?, b"inside");
                Ok(())
            };
            match attempt() {
                Ok(()) => reached += 1,
                Err(_) => refused += 1,
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reached > 0 && refused > 0, "{reached} {refused}");
    assert_eq!(fs::read(path("outside/file")).unwrap(), b"secret");
    let outside: Vec<_> = fs::read_dir(path("outside")).unwrap().collect();
    assert_eq!(outside.len(), 1, "nothing was made there");
}
