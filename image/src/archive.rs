//! Reads tar archives into nodes of a [`Tree`](crate::tree::Tree).
//!
//! Formats: POSIX.1-2008, pax (extended attributes as `SCHILY.xattr.NAME`, which GNU
//! tar writes), GNU. Limits: no sockets.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use tar::{Archive, Entry, EntryType};

use crate::tree::{Kind, Node, Store};

const XATTR: &str = "SCHILY.xattr.";
/// Bytes of the headers of one file.
const MOST_HEADERS: u64 = 1 << 20;

/// Passes the files of an archive to `take`, with their paths as they are there but
/// for `./` before and `/` after them. Contents go to `store`.
pub(crate) fn read<R: Read>(
    input: R,
    store: &mut Store,
    mut take: impl FnMut(&str, Node) -> io::Result<()>,
) -> io::Result<()> {
    let left = Rc::new(Cell::new(None));
    let mut archive = Archive::new(Limited {
        input,
        left: Rc::clone(&left),
    });
    let mut entries = archive.entries()?;
    loop {
        left.set(Some(MOST_HEADERS));
        let Some(entry) = entries.next() else {
            return Ok(());
        };
        left.set(None);
        let mut entry = entry?;
        // A comment on the whole archive.
        if entry.header().entry_type() == EntryType::XGlobalHeader {
            continue;
        }
        let path = text(entry.path_bytes().into_owned())?;
        let path = path.strip_prefix("./").unwrap_or(&path);
        let node = node(&mut entry, store)
            .map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
        take(path.trim_end_matches('/'), node)?;
    }
}

/// What is read of an archive. Headers, which are kept in memory, come to an end.
struct Limited<R> {
    input: R,
    /// Bytes that may still come before the contents of a file; `None`: these are contents.
    left: Rc<Cell<Option<u64>>>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buffer)?;
        if let Some(left) = self.left.get() {
            let left = left.checked_sub(n as u64);
            self.left
                .set(Some(left.ok_or_else(|| invalid("headers without an end"))?));
        }
        Ok(n)
    }
}

fn node<R: Read>(entry: &mut Entry<R>, store: &mut Store) -> io::Result<Node> {
    let mut xattrs = Vec::new();
    if let Some(extensions) = entry.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            if let Some(name) = extension.key().ok().and_then(|key| key.strip_prefix(XATTR)) {
                xattrs.push((name.to_owned(), extension.value_bytes().to_vec()));
            }
        }
    }
    let link = entry.link_name_bytes().map(|name| name.into_owned());
    let link = text(link.unwrap_or_default())?;
    let header = entry.header();
    let kind = match header.entry_type() {
        EntryType::Directory => Kind::Dir,
        EntryType::Symlink => Kind::Symlink(link),
        EntryType::Link => Kind::HardLink(link.strip_prefix("./").unwrap_or(&link).to_owned()),
        kind @ (EntryType::Char | EntryType::Block) => {
            let major = header.device_major()?.unwrap_or(0);
            let minor = header.device_minor()?.unwrap_or(0);
            match kind {
                EntryType::Char => Kind::CharDevice(major, minor),
                _ => Kind::BlockDevice(major, minor),
            }
        }
        EntryType::Fifo => Kind::Fifo,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            Kind::File(store.keep(entry)?)
        }
        other => {
            let problem = format!("a file of type {:?}", other.as_byte() as char);
            return Err(io::Error::new(io::ErrorKind::Unsupported, problem));
        }
    };
    let header = entry.header();
    let number = |n: u64| u32::try_from(n).map_err(|_| invalid("an owner out of range"));
    Ok(Node {
        owner: (number(header.uid()?)?, number(header.gid()?)?),
        mtime: header.mtime()?.try_into().unwrap_or(u32::MAX),
        xattrs: xattrs.into_iter().collect(),
        ..Node::new(header.mode()?, kind)
    })
}

fn text(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(|_| invalid("a name that is not UTF-8"))
}

fn invalid(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::tree::Tree;

    #[test]
    fn headers_come_to_an_end() {
        for kind in [
            EntryType::XHeader,
            EntryType::GNULongName,
            EntryType::Directory,
        ] {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(kind);
            header.set_size(1 << 40);
            header.set_cksum();
            let endless = header.as_bytes().chain(io::repeat(b'1'));
            let dir = tempfile::tempdir().unwrap();
            let mut store = Store::create(&dir.path().join("store")).unwrap();
            assert!(
                read(endless, &mut store, |_, _| Ok(())).is_err(),
                "{kind:?}"
            );
        }
    }

    #[test]
    fn what_gnu_tar_writes() {
        let dir = tempfile::tempdir().unwrap();
        let long = "long/".repeat(40);
        let script = format!(
            "umask 022; mkdir -p d {long} && echo hello >d/a && ln d/a d/b && ln -s ../x d/l && \
             echo deep >{long}f && chmod 4711 d/a && \
             tar --format=pax --sort=name --owner=1 --group=70000 --mtime=@1600000000 -cf tar ./d ./long"
        );
        let done = Command::new("sh")
            .args(["-ec", &script])
            .current_dir(dir.path())
            .status();
        assert!(done.unwrap().success());
        let mut store = Store::create(&dir.path().join("store")).unwrap();
        let mut tree = Tree::default();
        let tar = std::fs::File::open(dir.path().join("tar")).unwrap();
        read(tar, &mut store, |path, node| {
            tree.insert(path, node);
            Ok(())
        })
        .unwrap();
        for (path, data) in [
            ("d/a", "hello\n"),
            ("d/b", "hello\n"),
            (&format!("{long}f"), "deep\n"),
        ] {
            assert_eq!(
                tree.content(path).unwrap().bytes().unwrap(),
                data.as_bytes()
            );
        }
        let a = tree.get("d/a").unwrap();
        assert_eq!(
            (a.permissions, a.owner, a.mtime),
            (0o4711, (1, 70_000), 1_600_000_000)
        );
        assert!(matches!(&tree.get("d/l").unwrap().kind, Kind::Symlink(to) if to == "../x"));
    }
}
