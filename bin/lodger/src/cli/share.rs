//! `--share`: a shared folder, as on the command line.

use std::path::PathBuf;
use std::str::FromStr;

use lodger_virtio_devices::FsSpec;

/// A folder of the host, and where it is in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The folder.
    pub folder: PathBuf,
    /// Where images mount it.
    pub guest: String,
    /// The guest can change nothing in it.
    pub read_only: bool,
    /// The guest's user and group to whom the host user's files belong.
    pub owner: (u32, u32),
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Share, String> {
        const FORM: &str = "shared folders are HOST:GUEST[:OPTION...], where GUEST begins with /";
        // The last one, because a folder's name may have colons.
        let (folder, rest) = text.rsplit_once(":/").ok_or(FORM)?;
        let mut options = rest.split(':');
        let guest = format!("/{}", options.next().unwrap_or_default());
        let mut share = Share {
            folder: folder.into(),
            guest,
            read_only: false,
            owner: (0, 0),
        };
        for option in options.flat_map(|options| options.split(',')) {
            let number = |text: &str| {
                (text.parse()).map_err(|_| format!("'{text}' is not the number of a user or group"))
            };
            match option.split_once('=') {
                None if option == "ro" => share.read_only = true,
                Some(("uid", uid)) => share.owner.0 = number(uid)?,
                Some(("gid", gid)) => share.owner.1 = number(gid)?,
                _ => {
                    return Err(format!(
                        "unknown option '{option}'; ro, uid=NUMBER and gid=NUMBER are known"
                    ));
                }
            }
        }
        if folder.is_empty() {
            return Err(FORM.into());
        }
        let guest = &share.guest;
        // It goes through the kernel's command line and a shell.
        let strange = |c: char| c.is_whitespace() || c.is_control() || "\"'\\*?[$`".contains(c);
        if guest.contains(strange) || guest.len() > 200 {
            return Err(format!(
                "'{guest}' in the guest: at most 200 letters, no blanks, quotes, wildcards"
            ));
        }
        let mut parts = guest.split('/').skip(1);
        if parts.any(|part| matches!(part, "" | "." | "..")) {
            return Err(format!(
                "'{guest}' is not a plain path below / in the guest"
            ));
        }
        Ok(share)
    }
}

impl Share {
    /// The device, the one of number `index`.
    pub fn spec(&self, index: usize) -> FsSpec {
        FsSpec {
            folder: self.folder.clone(),
            tag: tag(index),
            read_only: self.read_only,
            owner: self.owner,
        }
    }

    /// What the kernel's command line tells of it.
    pub fn append(&self, index: usize) -> String {
        let mode = if self.read_only { ":ro" } else { "" };
        format!("lodger.share={}:{}{mode}", tag(index), self.guest)
    }
}

/// By which the guest mounts it.
fn tag(index: usize) -> String {
    format!("share{index}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares() {
        let told = |text: &str| {
            let share = text.parse::<Share>().ok()?;
            let (uid, gid) = share.owner;
            let (folder, append) = (share.folder.display(), share.append(3));
            Some(format!("{folder} {append} {uid} {gid}"))
        };
        for (text, expected) in [
            ("site:/srv", Some("site lodger.share=share3:/srv 0 0")),
            ("/a:b:/c/d:ro", Some("/a:b lodger.share=share3:/c/d:ro 0 0")),
            ("/a:/b:/c", Some("/a:/b lodger.share=share3:/c 0 0")),
            (".:/x:uid=7,gid=8", Some(". lodger.share=share3:/x 7 8")),
            (".:/x:ro:uid=7", Some(". lodger.share=share3:/x:ro 7 0")),
            ("", None),
            ("site", None),
            ("site:", None),
            ("site:srv", None),
            (":/srv", None),
            ("site:/", None),
            ("site:/srv/", None),
            ("site:/a/../b", None),
            ("site:/a b", None),
            ("site:/a\"", None),
            ("site:/srv:rw", None),
            ("site:/srv:uid=me", None),
        ] {
            assert_eq!(told(text).as_deref(), expected, "{text}");
        }
    }
}
