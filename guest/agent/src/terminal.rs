//! A terminal for a command: pty(7).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use lodger_guest_protocol::WindowSize;
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, mount};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// A new terminal of this size: the agent's end, and the command's.
pub fn open_terminal(size: WindowSize) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).or_else(|error| match mount_terminals() {
        Ok(()) => openpt(flags),
        Err(_) => Err(error),
    });
    let master = master.map_err(|error| {
        let error = io::Error::from(error);
        io::Error::new(error.kind(), format!("the guest has no terminals: {error}"))
    })?;
    grantpt(&master)?;
    unlockpt(&master)?;
    // By its name only where the kernel is too old (before 4.13).
    let terminal = ioctl_tiocgptpeer(&master, flags).or_else(|_| {
        let name = ptsname(&master, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        open(&name, flags, Mode::empty())
    })?;
    resize(&master, size)?;
    Ok((master, terminal))
}

/// A guest without much of a user space has no file system of terminals.
fn mount_terminals() -> io::Result<()> {
    match std::fs::create_dir("/dev/pts") {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    let options = c"mode=620,ptmxmode=666,gid=5";
    Ok(mount("devpts", "/dev/pts", "devpts", flags, options)?)
}

/// The terminal has this size now.
pub fn resize(master: impl AsFd, size: WindowSize) -> io::Result<()> {
    Ok(tcsetwinsize(
        master,
        Winsize {
            ws_row: size.rows,
            ws_col: size.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )?)
}
