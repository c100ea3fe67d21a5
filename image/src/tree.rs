//! A tree of files as a guest will see it: names, owners, permissions, times and
//! contents, whoever builds it.
//!
//! What is in a tree is data, not files of the host, so an ordinary user can give
//! a guest files of root, set-user-ID programs and device nodes. Large contents
//! lie in a [`Store`], one file of the host however many are in it.
//!
//! Limits: names are UTF-8; times are whole seconds.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{IoContext, Result};

/// Symbolic links that one path may lead through.
const MOST_LINKS: usize = 16;

/// The bits of a mode that are not its type.
const PERMISSIONS: u32 = 0o7777;

/// Files by their paths: relative, with `/` between components, without `.` and
/// `..`. The root directory is there without a path. Directories on the way to a
/// file come by themselves, with mode 755.
#[derive(Debug, Default, Clone)]
pub(crate) struct Tree {
    nodes: BTreeMap<String, Node>,
}

/// One file.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    /// Permission bits, with set-user-ID, set-group-ID and sticky.
    pub(crate) permissions: u32,
    /// Owner and group, by number.
    pub(crate) owner: (u32, u32),
    /// The last change, in seconds since 1970.
    pub(crate) mtime: u32,
    /// Extended attributes by their full names.
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
    pub(crate) kind: Kind,
}

/// What a file is.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Dir,
    File(Content),
    /// A symbolic link, and where it leads.
    Symlink(String),
    /// A character device: major and minor number.
    CharDevice(u32, u32),
    /// A block device: major and minor number.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// One more name of the file at this path.
    HardLink(String),
}

/// The bytes of a file.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    Bytes(Vec<u8>),
    Stored {
        store: Arc<File>,
        offset: u64,
        len: u64,
    },
}

/// A host file with the contents of many.
#[derive(Debug)]
pub(crate) struct Store {
    file: Arc<File>,
    len: u64,
    most: u64,
}

impl Node {
    /// A file of root's, from the beginning of time.
    pub(crate) fn new(permissions: u32, kind: Kind) -> Node {
        Node {
            permissions: permissions & PERMISSIONS,
            owner: (0, 0),
            mtime: 0,
            xattrs: BTreeMap::new(),
            kind,
        }
    }
}

impl Content {
    /// Its size in bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Stored { len, .. } => *len,
        }
    }

    /// All of it, piece by piece.
    pub(crate) fn for_each(&self, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        match self {
            Content::Bytes(bytes) => take(bytes),
            Content::Stored { store, offset, len } => {
                let mut buffer = vec![0; (*len).min(1 << 20) as usize];
                let mut done = 0;
                while done < *len {
                    let piece = &mut buffer[..(len - done).min(1 << 20) as usize];
                    store.read_exact_at(piece, offset + done)?;
                    take(piece)?;
                    done += piece.len() as u64;
                }
                Ok(())
            }
        }
    }

    /// All of it at once, for what is known to be small.
    pub(crate) fn bytes(&self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        self.for_each(|piece| all.write_all(piece))?;
        Ok(all)
    }
}

impl Store {
    /// An empty store in a new file.
    pub(crate) fn create(path: &Path) -> Result<Store> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .while_trying("create", path)?;
        Ok(Store {
            file: Arc::new(file),
            len: 0,
            most: u64::MAX,
        })
    }

    /// Keeps so many bytes in all, and refuses more as [`io::ErrorKind::FileTooLarge`].
    pub(crate) fn at_most(self, most: u64) -> Store {
        Store { most, ..self }
    }

    /// Keeps all that can be read from `input`.
    pub(crate) fn keep(&mut self, input: &mut impl Read) -> io::Result<Content> {
        let offset = self.len;
        let copied = io::copy(input, &mut Appender(self))?;
        Ok(Content::Stored {
            store: Arc::clone(&self.file),
            offset,
            len: copied,
        })
    }
}

struct Appender<'a>(&'a mut Store);

impl Write for Appender<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.len() as u64 > self.0.most - self.0.len {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let written = self.0.file.write_at(data, self.0.len)?;
        self.0.len += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Tree {
    pub(crate) fn dir(&mut self, path: &str) {
        self.insert(path, Node::new(0o755, Kind::Dir));
    }

    /// A regular file with these permission bits.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, data: Vec<u8>) {
        let kind = Kind::File(Content::Bytes(data));
        self.insert(path, Node::new(permissions, kind));
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        self.insert(path, Node::new(0o777, Kind::Symlink(target.into())));
    }

    pub(crate) fn char_device(&mut self, path: &str, permissions: u32, major: u32, minor: u32) {
        self.insert(path, Node::new(permissions, Kind::CharDevice(major, minor)));
    }

    /// Puts a file at `path`, in place of what is there. A directory does not take the
    /// place of a symbolic link to one, as with tar and dpkg.
    pub(crate) fn insert(&mut self, path: &str, mut node: Node) {
        let path = self.real_path(path);
        if let Kind::HardLink(other) = &mut node.kind {
            *other = self.real_path(other);
        }
        if path.is_empty() {
            return;
        }
        if matches!(node.kind, Kind::Dir) && self.leads_to_dir(&path) {
            return;
        }
        if let Some((parent, _)) = path.rsplit_once('/')
            && !self.nodes.contains_key(parent)
        {
            self.dir(parent);
        }
        self.nodes.insert(path, node);
    }

    /// Puts a file at this very path, whose directory is there.
    pub(crate) fn put(&mut self, path: &str, node: Node) {
        self.nodes.insert(path.to_owned(), node);
    }

    /// The file at a path, through symbolic links on the way but not at its end.
    pub(crate) fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(&self.real_path(path))
    }

    pub(crate) fn get_mut(&mut self, path: &str) -> Option<&mut Node> {
        let path = self.real_path(path);
        self.nodes.get_mut(&path)
    }

    /// The contents of the regular file at a path.
    pub(crate) fn content(&self, path: &str) -> Option<&Content> {
        match &self.get(path)?.kind {
            Kind::File(content) => Some(content),
            Kind::HardLink(other) => self.content(other),
            _ => None,
        }
    }

    /// Takes away all files for which `keep` is false.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.nodes.retain(|path, _| keep(path));
    }

    /// All files in the order of their paths: a directory comes before what is in it.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Node)> {
        self.nodes
            .iter_mut()
            .map(|(path, node)| (path.as_str(), node))
    }

    /// How many files there are, without the root directory.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The path without symbolic links before its last component.
    pub(crate) fn real_path(&self, path: &str) -> String {
        resolve(path, |path| match &self.nodes.get(path)?.kind {
            Kind::Symlink(target) => Some(target),
            _ => None,
        })
    }

    fn leads_to_dir(&self, path: &str) -> bool {
        let below = self.real_path(&format!("{path}/x"));
        let target = below.rsplit_once('/').map_or("", |(dir, _)| dir);
        target != path
            && matches!(
                self.nodes.get(target).map(|node| &node.kind),
                Some(Kind::Dir)
            )
    }
}

/// The path without symbolic links before its last component, where `link` knows where the link at a path leads. A link
/// that leads nowhere, or in a circle, stays as it is.
pub(crate) fn resolve<'a>(path: &str, link: impl Fn(&str) -> Option<&'a String>) -> String {
    let mut real = String::new();
    let mut rest: Vec<String> = components(path).rev().map(str::to_owned).collect();
    let mut links = 0;
    while let Some(name) = rest.pop() {
        if name == ".." {
            real.truncate(real.rfind('/').unwrap_or(0));
            continue;
        }
        let mut next = real.clone();
        if !next.is_empty() {
            next.push('/');
        }
        next += &name;
        match link(&next) {
            Some(target) if !rest.is_empty() && links < MOST_LINKS => {
                links += 1;
                if target.starts_with('/') {
                    real.clear();
                }
                rest.extend(components(target).rev().map(str::to_owned));
            }
            _ => real = next,
        }
    }
    real
}

/// The names that a path is made of.
fn components(path: &str) -> impl DoubleEndedIterator<Item = &str> {
    path.split('/')
        .filter(|name| !name.is_empty() && *name != ".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(tree: &Tree) -> Vec<&str> {
        tree.iter().map(|(path, _)| path).collect()
    }

    #[test]
    fn paths_go_through_links_to_directories() {
        let mut tree = Tree::default();
        tree.dir("usr/lib");
        tree.symlink("lib", "usr/lib");
        tree.symlink("usr/deep", "/lib/..");
        tree.symlink("loop", "loop");
        tree.dir("lib");
        tree.file("./lib/a", 0o644, vec![]);
        tree.file("/usr/deep/b", 0o644, vec![]);
        tree.symlink("lib/a", "b");
        let link = Kind::HardLink("lib/a".into());
        tree.insert("c", Node::new(0o644, link));
        assert!(matches!(&tree.get("c").unwrap().kind, Kind::HardLink(to) if to == "usr/lib/a"));
        assert_eq!(
            paths(&tree),
            [
                "c",
                "lib",
                "loop",
                "usr",
                "usr/b",
                "usr/deep",
                "usr/lib",
                "usr/lib/a"
            ]
        );
        assert!(matches!(tree.get("lib").unwrap().kind, Kind::Symlink(_)));
        assert!(matches!(tree.get("lib/a").unwrap().kind, Kind::Symlink(_)));
        assert!(tree.get("loop/a/b").is_none());
    }

    #[test]
    fn contents_are_found_by_every_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::create(&dir.path().join("store")).unwrap();
        let mut tree = Tree::default();
        let long = vec![7; (1 << 20) + 5];
        for (path, data) in [("a", &b"one"[..]), ("b", &long), ("c", b"")] {
            let content = store.keep(&mut &*data).unwrap();
            tree.insert(path, Node::new(0o644, Kind::File(content)));
        }
        tree.insert("d", Node::new(0o644, Kind::HardLink("b".into())));
        for (path, expected) in [("a", &b"one"[..]), ("b", &long), ("c", b""), ("d", &long)] {
            let content = tree.content(path).unwrap();
            assert_eq!(content.len(), expected.len() as u64);
            assert_eq!(content.bytes().unwrap(), expected);
        }
        assert!(tree.content("e").is_none());
    }
}
