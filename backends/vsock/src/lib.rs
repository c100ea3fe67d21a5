//! Sockets of two worlds as Unix sockets: what stands behind a socket device, without a word about guests.
//!
//! Numbered ports of the other side are reached through one Unix stream socket at a path, in the way that Firecracker and Cloud
//! Hypervisor have made common:
//!
//! * A program that connects to `PATH` writes `CONNECT <port>\n`. If somebody listens at that port of the other side, it reads
//!   `OK <port>\n`, with the port that it has there, and the connection carries bytes from then on. Otherwise it is closed.
//! * The other side's connection to port N of this one becomes a connection to the Unix socket `PATH_N`, if there is one.
//!
//! [`HostSockets`] has the sockets and the wait for them; what goes through is the caller's.
//!
//! Limits: stream sockets; a request that is not complete is given up when many newer ones come.

mod handshake;
mod poller;

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use handshake::Handshakes;
use poller::{Poller, Ready, token};

pub use poller::{FIRST_RESERVED, Token};

/// Bytes of a path that a socket's address has room for (unix(7)).
const ROOM: usize = 107;

/// Why nobody can be listened to.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody listens there, or it is no socket.
    #[error("cannot listen at {}: it is in use", .0.display())]
    InUse(PathBuf),
    /// The host refused it.
    #[error("cannot listen at {}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
}

/// What has happened.
#[derive(Debug)]
pub enum Event {
    /// A program wants to be connected to this port of the other side.
    Request {
        /// The connection, which does not block.
        stream: UnixStream,
        /// The port.
        port: u32,
    },
    /// Something has changed about a connection that is being watched.
    Ready {
        /// Which one.
        token: Token,
        /// Reading will not block, be it for an end or an error.
        readable: bool,
        /// Writing will not block, be it for an error.
        writable: bool,
        /// The program has closed its end altogether: what can be read is the last.
        closed: bool,
    },
}

/// See the module documentation. Dropping it takes the socket away.
pub struct HostSockets {
    path: PathBuf,
    listener: UnixListener,
    /// Device and inode of the socket: what was put there since is not ours.
    identity: (u64, u64),
    poller: Poller,
    handshakes: Mutex<Handshakes>,
}

impl HostSockets {
    /// Listens at `path`, for this user alone. A socket that is there already is replaced if nobody listens at it.
    pub fn listen(path: &Path) -> Result<HostSockets, ListenError> {
        let failed = |source: io::Error| ListenError::Io {
            path: path.into(),
            source,
        };
        clear(path)?;
        let listener = bind(path).map_err(failed)?;
        let start = || -> io::Result<_> {
            fs::set_permissions(path, Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            let poller = Poller::new()?;
            poller.add_listener(&listener)?;
            Ok((identity(path)?, poller))
        };
        let (identity, poller) = start().map_err(failed)?;
        Ok(HostSockets {
            path: path.into(),
            listener,
            identity,
            poller,
            handshakes: Mutex::default(),
        })
    }

    fn handshakes(&self) -> MutexGuard<'_, Handshakes> {
        self.handshakes
            .lock()
            .expect("nothing panics under this lock")
    }

    /// Waits until something has happened, or for [`HostSockets::wake`]; adds what it was to `events`. One thread waits at a
    /// time.
    pub fn wait(&self, events: &mut Vec<Event>) -> io::Result<()> {
        for ready in self.poller.wait()? {
            match ready.token {
                token::LISTENER => self.accept(),
                other if other >= FIRST_RESERVED => {
                    let request = self.handshakes().go_on(other, ready.closed);
                    events.extend(request.map(|(stream, port)| Event::Request { stream, port }));
                }
                token => {
                    let Ready {
                        readable,
                        writable,
                        closed,
                        ..
                    } = ready;
                    events.push(Event::Ready {
                        token,
                        readable,
                        writable,
                        closed,
                    });
                }
            }
        }
        Ok(())
    }

    /// Ends the wait that is under way, or the next one.
    pub fn wake(&self) {
        self.poller.wake();
    }

    fn accept(&self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let mut handshakes = self.handshakes();
            let token = handshakes.next_token();
            let watched = stream
                .set_nonblocking(true)
                .and_then(|()| self.poller.add(&stream, token));
            match watched {
                Ok(()) => handshakes.begin(token, stream),
                Err(error) => tracing::warn!("{}: {error}", self.path.display()),
            }
        }
    }

    /// Connects to the program that listens at port `port` of this side, without waiting.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let (path, _dir) = short(Path::new(&path))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket: OwnedFd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(UnixStream::from(socket))
    }

    /// Tells from now on what happens to `stream`, which must not block, once each time (edge-triggered). `token` is below
    /// [`FIRST_RESERVED`]. Closing the stream ends it.
    pub fn watch(&self, stream: &UnixStream, token: Token) -> io::Result<()> {
        // It may be one of a request, which was watched until that was complete.
        match self.poller.change(stream, token) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.poller.add(stream, token),
            result => result,
        }
    }
}

impl Drop for HostSockets {
    fn drop(&mut self) {
        if identity(&self.path).ok() == Some(self.identity) {
            // Somebody may be faster.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = path.symlink_metadata()?;
    Ok((found.dev(), found.ino()))
}

/// Takes away a socket at which nobody listens any more.
fn clear(path: &Path) -> Result<(), ListenError> {
    let failed = |source: io::Error| ListenError::Io {
        path: path.into(),
        source,
    };
    let in_use = || ListenError::InUse(path.into());
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(in_use()),
        Ok(_) => {}
    }
    let (address, _dir) = short(path).map_err(failed)?;
    match UnixStream::connect(address) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        _ => Err(in_use()),
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let (address, _dir) = short(path)?;
    UnixListener::bind(address)
}

/// A path that has room in a socket's address, and what must stay open meanwhile: the directory's entry in /proc/self/fd
/// is short.
fn short(path: &Path) -> io::Result<(PathBuf, Option<OwnedFd>)> {
    if path.as_os_str().len() <= ROOM {
        return Ok((path.into(), None));
    }
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::INVAL.into());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = open(dir, flags, Mode::empty())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    Ok((path, Some(dir)))
}

#[cfg(test)]
mod tests;
