//! The layers of an image, put one over the other.
//!
//! See the OCI Image Specification 1.1, "Image Layer Filesystem Changeset": a file `.wh.NAME`
//! takes away NAME of the layers below, `.wh..wh..opq` all that they have in its directory.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;

use sha2::{Digest, Sha256};

use crate::archive;
use crate::manifest::hexadecimal;
use crate::tree::{Kind, Node, Store, Tree, resolve};

const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";
/// Notes of one program to itself.
const INTERNAL: &str = ".wh..wh.";

/// Files that an image may have.
const MOST_FILES: usize = 4_000_000;
/// Bytes of a file's extended attributes; there is less room for them on the disk.
const MOST_XATTRS: usize = 4096;
/// Bytes of a path, as for Linux.
const MOST_PATH: usize = 4096;

/// The files of the layers so far. Names of one file share its node.
#[derive(Default)]
pub(crate) struct Layers {
    nodes: BTreeMap<String, Rc<Node>>,
}

impl Layers {
    /// Puts a layer (a tar archive; plain, or compressed with gzip or zstd) over those that are there. Contents go to
    /// `store`. The answer is the SHA-256 of the archive.
    pub(crate) fn apply(&mut self, layer: impl Read, store: &mut Store) -> io::Result<String> {
        let mut archive = Hashed {
            input: uncompressed(layer)?,
            hash: Sha256::new(),
        };
        let mut new = Vec::new();
        let mut gone = Vec::new();
        archive::read(&mut archive, store, |path, mut node| {
            // Others are notes of the file system that the image was built on.
            (node.xattrs)
                .retain(|name, _| name.starts_with("user.") || name.starts_with("security."));
            let link = match &node.kind {
                Kind::Symlink(target) | Kind::HardLink(target) => target.len(),
                _ => 0,
            };
            if path.len().max(link) > MOST_PATH || new.len() == MOST_FILES {
                return Err(invalid("too long a name, or too many files".into()));
            }
            let xattrs = node
                .xattrs
                .iter()
                .map(|(name, value)| name.len() + value.len());
            if xattrs.sum::<usize>() > MOST_XATTRS {
                return Err(invalid(format!("{path}: too many extended attributes")));
            }
            let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
            match name.strip_prefix(WHITEOUT) {
                Some(_) if name == OPAQUE => gone.push((dir.to_owned(), None)),
                Some(_) if name.starts_with(INTERNAL) => {}
                Some(name) => gone.push((dir.to_owned(), Some(name.to_owned()))),
                None => new.push((path.to_owned(), node)),
            }
            Ok(())
        })?;
        // Behind the end mark, but part of the layer.
        io::copy(&mut archive, &mut io::sink())?;
        // They mean the layers below only, wherever in the archive they are.
        for (dir, name) in gone {
            let path = self.real_path(&format!("{dir}/{}", name.as_deref().unwrap_or("x")));
            match name {
                Some(_) => self.remove(&path, true),
                None => self.remove(path.rsplit_once('/').map_or("", |(dir, _)| dir), false),
            }
        }
        for (path, node) in new {
            self.insert(&path, node)
                .map_err(|problem| invalid(format!("{path}: {problem}")))?;
        }
        Ok(hexadecimal(archive.hash))
    }

    /// The tree of all layers.
    pub(crate) fn into_tree(self) -> Tree {
        let mut tree = Tree::default();
        let mut names: HashMap<*const Node, String> = HashMap::new();
        for (path, node) in &self.nodes {
            let other = names.get(&Rc::as_ptr(node));
            let node = match other {
                Some(other) => Node::new(0, Kind::HardLink(other.clone())),
                None => Node::clone(node),
            };
            if other.is_none() {
                names.insert(Rc::as_ptr(&self.nodes[path]), path.clone());
            }
            tree.put(path, node);
        }
        tree
    }

    /// Puts a file at its place, instead of what is there. Directories stay, and get the new one's owner and permissions.
    fn insert(&mut self, path: &str, node: Node) -> Result<(), &'static str> {
        let path = self.real_path(path);
        if path.is_empty() {
            return Ok(());
        }
        let node = match &node.kind {
            Kind::HardLink(other) => {
                let other = self.nodes.get(&self.real_path(other));
                let other = other.filter(|other| !matches!(other.kind, Kind::Dir));
                Rc::clone(other.ok_or("a hard link to nothing")?)
            }
            _ => Rc::new(node),
        };
        let mut end = path.len();
        while let Some(at) = path[..end].rfind('/') {
            match self.nodes.get(&path[..at]).map(|node| &node.kind) {
                Some(Kind::Dir) => break,
                Some(_) => return Err("what it is in is no directory"),
                None => {
                    let dir = Rc::new(Node::new(0o755, Kind::Dir));
                    self.nodes.insert(path[..at].to_owned(), dir);
                }
            }
            end = at;
        }
        let is_dir = |node: &Node| matches!(node.kind, Kind::Dir);
        let replaces = self.nodes.get(&path).is_some_and(|old| is_dir(old)) && !is_dir(&node);
        if replaces {
            self.remove(&path, true);
        }
        self.nodes.insert(path, node);
        match self.nodes.len() > MOST_FILES {
            true => Err("too many files"),
            false => Ok(()),
        }
    }

    /// Removes what is below a path, and the file there, too, if `itself`.
    fn remove(&mut self, path: &str, itself: bool) {
        if itself {
            self.nodes.remove(path);
        }
        // All that begins with the path and a slash.
        let below = match path {
            "" => self.nodes.range::<str, _>(..),
            path => {
                let (from, to) = (format!("{path}/"), format!("{path}0"));
                self.nodes.range(from..to)
            }
        };
        let below: Vec<String> = below.map(|(path, _)| path.clone()).collect();
        for path in below {
            self.nodes.remove(&path);
        }
    }

    fn real_path(&self, path: &str) -> String {
        resolve(path, |path| match &self.nodes.get(path)?.kind {
            Kind::Symlink(target) => Some(target),
            _ => None,
        })
    }
}

/// A layer's archive, whatever it is compressed with.
fn uncompressed<'a>(layer: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut layer = BufReader::with_capacity(128 << 10, layer);
    Ok(match layer.fill_buf()? {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(layer)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::stream::read::Decoder::with_buffer(layer)?),
        _ => Box::new(layer),
    })
}

/// What is read, and its SHA-256.
struct Hashed<R> {
    input: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buffer)?;
        self.hash.update(&buffer[..n]);
        Ok(n)
    }
}

fn invalid(problem: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}
