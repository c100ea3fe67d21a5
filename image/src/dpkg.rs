//! The database of dpkg, for a tree into which packages were unpacked without it.
//!
//! Every package is entered as unpacked, so that `dpkg --configure -a` in a guest
//! does the rest of its installation.
//!
//! See dpkg(1), deb-triggers(5), deb-conffiles(5).

use std::collections::BTreeMap;

use crate::cache::Workshop;
use crate::deb::{ControlFile, Deb};
use crate::error::Result;
use crate::tree::{Node, Store, Tree};

const DIR: &str = "var/lib/dpkg";

/// The database while packages come in.
#[derive(Default)]
pub(crate) struct Database {
    status: String,
    /// Who waits for what: the lines of each file in `triggers`.
    triggers: BTreeMap<String, String>,
    /// The packages as they are named in `info`, in the order they came.
    pub(crate) packages: Vec<String>,
}

impl Database {
    /// Unpacks a package into `tree` and enters it.
    pub(crate) fn unpack(
        &mut self,
        deb: &Deb,
        workshop: &Workshop,
        store: &mut Store,
        tree: &mut Tree,
    ) -> Result<()> {
        let control = deb.control(workshop, store)?;
        let entry =
            Entry::new(&control).ok_or_else(|| deb.unexpected("it has no proper control file"))?;
        let mut list = String::new();
        deb.files(workshop, store, |path, node| {
            list += &format!("/{}\n", if path.is_empty() { "." } else { path });
            // dpkg takes the file by this name when it configures the package; scripts
            // that run before may need the other.
            if entry.conffiles.iter().any(|conffile| conffile == path) {
                tree.insert(&format!("{path}.dpkg-new"), Node::clone(&node));
            }
            tree.insert(path, node);
            Ok(())
        })?;
        self.enter(&entry, &control, list, tree);
        Ok(())
    }

    fn enter(&mut self, entry: &Entry, control: &[ControlFile], list: String, tree: &mut Tree) {
        let name = &entry.name;
        let info = |kind: &str| format!("{DIR}/info/{name}.{kind}");
        tree.file(&info("list"), 0o644, list.into());
        for file in control.iter().filter(|file| file.name != "control") {
            tree.file(&info(&file.name), file.permissions, file.data.clone());
        }
        for (trigger, line) in &entry.interests {
            *self.triggers.entry(trigger.clone()).or_default() += line;
        }
        self.status += &entry.stanza;
        self.packages.push(name.clone());
    }

    /// Writes the database.
    pub(crate) fn finish(self, tree: &mut Tree) {
        tree.file(&format!("{DIR}/status"), 0o644, self.status.into());
        tree.file(&format!("{DIR}/available"), 0o644, Vec::new());
        tree.file(&format!("{DIR}/info/format"), 0o644, b"1\n".to_vec());
        tree.dir(&format!("{DIR}/updates"));
        for (trigger, lines) in self.triggers {
            tree.file(&format!("{DIR}/triggers/{trigger}"), 0o644, lines.into());
        }
    }
}

/// A package as dpkg has it in mind.
struct Entry {
    /// With the architecture, if the package can be installed for several.
    name: String,
    /// Of the file `status`, with the empty line that ends it.
    stanza: String,
    /// Paths in the tree.
    conffiles: Vec<String>,
    /// Files in `triggers`, and a line for each.
    interests: Vec<(String, String)>,
}

impl Entry {
    fn new(control: &[ControlFile]) -> Option<Entry> {
        let text = |name: &str| {
            let file = control.iter().find(|file| file.name == name)?;
            std::str::from_utf8(&file.data).ok()
        };
        let fields = text("control")?;
        let field = |name: &str| {
            let mut lines = fields.lines();
            lines.find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
        };
        let package = field("Package").filter(|name| !name.contains('/'))?;
        let name = match field("Multi-Arch") {
            Some("same") => format!("{package}:{}", field("Architecture")?),
            _ => package.to_owned(),
        };
        let conffiles: Vec<String> = text("conffiles")
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.trim().strip_prefix('/').map(str::to_owned))
            .collect();

        let mut stanza = String::new();
        for line in fields.lines().filter(|line| !line.trim().is_empty()) {
            stanza += line;
            stanza.push('\n');
            if line.starts_with("Package:") {
                stanza += "Status: install ok unpacked\n";
            }
        }
        if !conffiles.is_empty() {
            stanza += "Conffiles:\n";
            for path in &conffiles {
                stanza += &format!(" /{path} newconffile\n");
            }
        }
        stanza.push('\n');

        let mut interests = Vec::new();
        for line in text("triggers").unwrap_or_default().lines() {
            let mut words = line.split_whitespace();
            let after = match words.next() {
                Some("interest" | "interest-await") => "",
                Some("interest-noawait") => "/noawait",
                _ => continue,
            };
            let Some(trigger) = words.next() else {
                continue;
            };
            interests.push(match trigger.starts_with('/') {
                true => ("File".into(), format!("{trigger} {package}{after}\n")),
                false => (trigger.into(), format!("{package}{after}\n")),
            });
        }
        Some(Entry {
            name,
            stanza,
            conffiles,
            interests,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(files: &[(&str, &str)]) -> Vec<ControlFile> {
        let file = |&(name, data): &(&str, &str)| ControlFile {
            name: name.into(),
            permissions: 0o644,
            data: data.into(),
        };
        files.iter().map(file).collect()
    }

    #[test]
    fn package_with_everything() {
        let control = control(&[
            (
                "control",
                "Package: a\nArchitecture: amd64\nMulti-Arch: same\nDescription: x\n more\n\n",
            ),
            ("conffiles", "/etc/a\nremove-on-upgrade /etc/b\n"),
            (
                "triggers",
                "# c\ninterest-noawait /usr/x\ninterest y\nactivate-noawait z\n",
            ),
            ("postinst", "#!/bin/sh\n"),
        ]);
        let mut database = Database::default();
        let mut tree = Tree::default();
        let entry = Entry::new(&control).unwrap();
        assert_eq!(entry.conffiles, ["etc/a"]);
        database.enter(&entry, &control, "/.\n".into(), &mut tree);
        assert_eq!(database.packages, ["a:amd64"]);
        database.finish(&mut tree);
        for (path, expected) in [
            (
                "status",
                "Package: a\nStatus: install ok unpacked\nArchitecture: amd64\nMulti-Arch: same\n\
                 Description: x\n more\nConffiles:\n /etc/a newconffile\n\n",
            ),
            ("info/a:amd64.list", "/.\n"),
            ("info/a:amd64.postinst", "#!/bin/sh\n"),
            ("triggers/File", "/usr/x a/noawait\n"),
            ("triggers/y", "a\n"),
        ] {
            let content = tree.content(&format!("{DIR}/{path}")).unwrap();
            let found = String::from_utf8(content.bytes().unwrap()).unwrap();
            assert_eq!(found, expected, "{path}");
        }
        assert!(tree.get(&format!("{DIR}/info/a:amd64.control")).is_none());
    }

    #[test]
    fn control_files_that_are_none() {
        for fields in [
            "",
            "Version: 1\n",
            "Package: ../x\n",
            "Package: a\nMulti-Arch: same\n",
        ] {
            assert!(
                Entry::new(&control(&[("control", fields)])).is_none(),
                "{fields}"
            );
        }
        assert!(Entry::new(&[]).is_none());
    }
}
