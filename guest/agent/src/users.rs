//! Who is who, from /etc/passwd and /etc/group: passwd(5), group(5). A static program has no other name services.

use std::fs;
use std::path::PathBuf;

/// A user, and the groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The name; the number for one without.
    pub name: String,
    /// The number.
    pub uid: u32,
    /// The main group.
    pub gid: u32,
    /// All groups.
    pub groups: Vec<u32>,
    /// The home directory.
    pub home: PathBuf,
    /// The shell.
    pub shell: String,
}

/// The user `USER[:GROUP]`, names or numbers; otherwise the one who runs the agent.
pub fn find(text: Option<&str>) -> Result<User, String> {
    let file = |path| fs::read_to_string(path).unwrap_or_default();
    let me = rustix::process::getuid().as_raw();
    look_up(text, me, &file("/etc/passwd"), &file("/etc/group"))
}

fn look_up(text: Option<&str>, me: u32, passwd: &str, group: &str) -> Result<User, String> {
    let own = me.to_string();
    let (user, wanted) = match text.unwrap_or(&own).split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text.unwrap_or(&own), None),
    };
    let number: Option<u32> = user.parse().ok();
    let found = passwd.lines().find_map(|line| {
        let [name, _, uid, gid, _, home, shell] = fields(line)?;
        let uid = uid.parse().ok()?;
        (name == user || Some(uid) == number).then_some(())?;
        Some(User {
            name: name.into(),
            uid,
            gid: gid.parse().ok()?,
            groups: Vec::new(),
            home: home.into(),
            shell: shell.into(),
        })
    });
    let nameless = |uid| User {
        name: user.into(),
        uid,
        gid: if uid == me {
            rustix::process::getgid().as_raw()
        } else {
            0
        },
        groups: Vec::new(),
        home: "/".into(),
        shell: String::new(),
    };
    let mut found = found
        .or_else(|| number.map(nameless))
        .ok_or_else(|| format!("there is no user {user} in the guest"))?;
    let groups = group.lines().filter_map(|line| {
        let [name, _, gid, members] = fields(line)?;
        Some((name, gid.parse::<u32>().ok()?, members))
    });
    if let Some(wanted) = wanted {
        let number: Option<u32> = wanted.parse().ok();
        let gid = groups.clone().find(|(name, _, _)| *name == wanted);
        found.gid = gid
            .map(|(_, gid, _)| gid)
            .or(number)
            .ok_or_else(|| format!("there is no group {wanted} in the guest"))?;
        found.groups = vec![found.gid];
    } else {
        let mine = groups.filter(|(_, _, members)| members.split(',').any(|m| m == found.name));
        let mut all: Vec<u32> = mine.map(|(_, gid, _)| gid).collect();
        all.insert(0, found.gid);
        found.groups = all;
    }
    Ok(found)
}

/// The fields of a line, if it has at least as many.
fn fields<const N: usize>(line: &str) -> Option<[&str; N]> {
    let fields: Vec<&str> = line.splitn(N, ':').collect();
    fields.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n# no user\nme:x:1000:1001:Me,,,:/home/me:/bin/sh\nbad:x:y:z\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:you,me\nme:x:1001:\nadm:x:4:men\n";

    #[test]
    fn users() {
        for (text, expected) in [
            (None, "root 0 0 [0] /root"),
            (Some("root"), "root 0 0 [0] /root"),
            (Some("me"), "me 1000 1001 [1001, 27] /home/me"),
            (Some("1000"), "me 1000 1001 [1001, 27] /home/me"),
            (Some("me:adm"), "me 1000 4 [4] /home/me"),
            (Some("me:77"), "me 1000 77 [77] /home/me"),
            (Some("12345"), "12345 12345 0 [0] /"),
            (Some("bad"), "there is no user bad in the guest"),
            (Some("nobody"), "there is no user nobody in the guest"),
            (Some("me:none"), "there is no group none in the guest"),
            (Some(""), "there is no user  in the guest"),
        ] {
            let got = match look_up(text, 0, PASSWD, GROUP) {
                Ok(user) => {
                    let User {
                        name,
                        uid,
                        gid,
                        groups,
                        home,
                        shell: _,
                    } = user;
                    format!("{name} {uid} {gid} {groups:?} {}", home.display())
                }
                Err(text) => text,
            };
            assert_eq!(got, expected, "{text:?}");
        }
        // A guest without these files.
        let user = look_up(None, 5, "", "").unwrap();
        assert_eq!((user.uid, user.home), (5, "/".into()));
    }
}
