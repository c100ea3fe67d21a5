//! The files that the guest knows, by the numbers under which it knows them.
//!
//! A node is remembered by its name in the node of its directory, and by what the file is, so that a guest that knows a
//! hundred thousand files costs no file descriptors. A directory is opened when it is needed, one step down from the one
//! above it, and stays open as long as there is room. What has another identity than before is not the file any more (ESTALE);
//! the guest looks its name up again then.

use std::collections::{HashMap, VecDeque};
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::wire::ROOT;

/// The most nodes, some 80 MiB.
pub const MOST_NODES: usize = 1 << 19;
/// The most directories above another.
const DEEPEST: usize = 4096;

/// What a file is, whatever its name. An inode number that is used again has another time of birth, where there are any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    device: (u32, u32),
    inode: u64,
    born: (i64, u32),
}

impl Identity {
    pub fn of(stat: &Statx) -> Identity {
        Identity {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            born: (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec),
        }
    }

    pub fn device(&self) -> (u32, u32) {
        self.device
    }
}

/// A file that the guest knows.
#[derive(Debug, Clone)]
pub struct Node {
    /// The directory that it is in.
    pub parent: u64,
    /// Its name there.
    pub name: CString,
    pub identity: Identity,
    pub kind: FileType,
    /// How often the guest has been told of it, and has not forgotten it.
    pub lookups: u64,
}

/// See the module documentation.
pub struct Nodes {
    map: HashMap<u64, Node>,
    known: HashMap<Identity, u64>,
    next: u64,
    open: HashMap<u64, Open>,
    /// Those of `open`, the one to be closed next first.
    order: VecDeque<u64>,
    most_open: usize,
}

/// An open directory.
struct Open {
    fd: Arc<OwnedFd>,
    used: bool,
}

/// A directory that has to be opened: its node, name and identity.
pub type Step = (u64, CString, Identity);

impl Nodes {
    /// At most `most_open` directories stay open.
    pub fn new(most_open: usize) -> Nodes {
        Nodes {
            map: HashMap::new(),
            known: HashMap::new(),
            next: ROOT + 1,
            open: HashMap::new(),
            order: VecDeque::new(),
            most_open,
        }
    }

    pub fn get(&self, id: u64) -> Result<&Node, Errno> {
        self.map.get(&id).ok_or(Errno::STALE)
    }

    /// The guest is told of a file: the number of its node.
    pub fn enter(&mut self, parent: u64, name: &[u8], stat: &Statx) -> Result<u64, Errno> {
        let identity = Identity::of(stat);
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        if let Some(&id) = self.known.get(&identity)
            && let Some(node) = self.map.get_mut(&id)
            && node.kind == kind
        {
            node.lookups += 1;
            if node.parent != parent || node.name.as_bytes() != name {
                node.parent = parent;
                node.name = text(name)?;
            }
            return Ok(id);
        }
        if self.map.len() >= MOST_NODES {
            return Err(Errno::NFILE);
        }
        let id = self.next;
        self.next += 1;
        let node = Node {
            parent,
            name: text(name)?,
            identity,
            kind,
            lookups: 1,
        };
        self.map.insert(id, node);
        self.known.insert(identity, id);
        Ok(id)
    }

    /// A file has another name now.
    pub fn moved(&mut self, parent: u64, name: &[u8], stat: &Statx) -> Result<(), Errno> {
        let id = self.known.get(&Identity::of(stat));
        if let Some(node) = id.and_then(|id| self.map.get_mut(id)) {
            node.parent = parent;
            node.name = text(name)?;
        }
        Ok(())
    }

    /// The guest forgets `times` of the times that it was told of a node.
    pub fn forget(&mut self, id: u64, times: u64) {
        let Some(node) = self.map.get_mut(&id) else {
            return;
        };
        node.lookups = node.lookups.saturating_sub(times);
        if node.lookups == 0 {
            if self.known.get(&node.identity) == Some(&id) {
                self.known.remove(&node.identity);
            }
            self.map.remove(&id);
            self.open.remove(&id);
        }
    }

    /// The way to a directory: the nearest open one above it, none: the root; and those below it that have to be opened, the
    /// last one first.
    pub fn way(&mut self, id: u64) -> Result<(Option<Arc<OwnedFd>>, Vec<Step>), Errno> {
        let mut steps = Vec::new();
        let mut at = id;
        loop {
            if at == ROOT {
                return Ok((None, steps));
            }
            if let Some(open) = self.open.get_mut(&at) {
                open.used = true;
                return Ok((Some(Arc::clone(&open.fd)), steps));
            }
            let node = self.get(at)?;
            if node.kind != FileType::Directory {
                return Err(Errno::NOTDIR);
            }
            if steps.len() == DEEPEST {
                return Err(Errno::STALE);
            }
            steps.push((at, node.name.clone(), node.identity));
            at = node.parent;
        }
    }

    /// Keeps a directory open.
    pub fn keep(&mut self, id: u64, fd: &Arc<OwnedFd>) {
        if self.open.contains_key(&id) || !self.map.contains_key(&id) {
            return;
        }
        while self.open.len() >= self.most_open {
            let Some(oldest) = self.order.pop_front() else {
                break;
            };
            match self.open.get_mut(&oldest) {
                Some(open) if open.used => {
                    open.used = false;
                    self.order.push_back(oldest);
                }
                _ => {
                    self.open.remove(&oldest);
                }
            }
        }
        // Those that were forgotten leave their numbers behind.
        if self.order.len() > 2 * self.most_open {
            self.order.retain(|id| self.open.contains_key(id));
        }
        let open = Open {
            fd: Arc::clone(fd),
            used: false,
        };
        self.open.insert(id, open);
        self.order.push_back(id);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Nodes {
            next: self.next,
            ..Nodes::new(self.most_open)
        };
    }
}

fn text(name: &[u8]) -> Result<CString, Errno> {
    CString::new(name).map_err(|_| Errno::INVAL)
}
