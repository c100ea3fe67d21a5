//! Keys for SSH: a line in a user's `authorized_keys`.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown, fchown};

use rustix::fs::OFlags;

use crate::users;

/// Lets whoever has `key` log in as `user`.
pub fn authorize(user: &str, key: &str) -> io::Result<()> {
    let key = key.trim();
    if key.is_empty() || key.contains(['\n', '\r', '\0']) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "this is no key",
        ));
    }
    let user = users::find(Some(user)).map_err(io::Error::other)?;
    let dir = user.home.join(".ssh");
    match DirBuilder::new().mode(0o700).create(&dir) {
        Ok(()) => chown(&dir, Some(user.uid), Some(user.gid))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(io::Error::other(format!("{}: {error}", dir.display()))),
    }
    let path = dir.join("authorized_keys");
    let lines = match fs::read_to_string(&path) {
        Ok(lines) => lines,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    if lines.lines().any(|line| line.trim() == key) {
        return Ok(());
    }
    let mut options = File::options();
    // Not through a link, which the user may have put there.
    let flags = OFlags::NOFOLLOW.bits() as i32;
    let options = options.append(true).create(true).mode(0o600);
    let mut file = options.custom_flags(flags).open(&path)?;
    if lines.is_empty() {
        fchown(&file, Some(user.uid), Some(user.gid))?;
    }
    let start = match lines.is_empty() || lines.ends_with('\n') {
        true => "",
        false => "\n",
    };
    file.write_all(format!("{start}{key}\n").as_bytes())
}
