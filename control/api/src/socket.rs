//! Unix sockets at paths of any length: the address of a socket has room for 107 bytes (unix(7)), the directory's entry
//! in /proc/self/fd is shorter.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};

/// Bytes of a path that an address has room for.
const ROOM: usize = 107;

/// The path to use, and what must stay open meanwhile.
fn short(path: &Path) -> io::Result<(PathBuf, Option<File>)> {
    if path.as_os_str().len() <= ROOM {
        return Ok((path.into(), None));
    }
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = File::from(open(dir, flags, Mode::empty())?);
    let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    Ok((path, Some(dir)))
}

/// Connects to the socket at `path`.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let (path, _dir) = short(path)?;
    UnixStream::connect(path)
}

/// Listens at `path`, for this user alone. What is there already is replaced: the caller knows that nobody listens there.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (address, _dir) = short(path)?;
    let listener = UnixListener::bind(address)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_paths_and_stale_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        for path in [dir.path().join("sock"), deep.join("sock")] {
            drop(listen(&path).unwrap());
            assert!(connect(&path).is_err());
            let listener = listen(&path).unwrap();
            connect(&path).unwrap();
            listener.accept().unwrap();
            let mode = path.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }
}
