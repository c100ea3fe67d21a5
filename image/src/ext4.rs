//! Writes a tree of files as an ext4 file system, ready to be mounted.
//!
//! The same tree gives the same bytes. What is zero is not written, so the file
//! is as large as the disk and takes as much of the host as there is in it. No
//! program of the host and no privilege is needed.
//!
//! The format is that of the kernel's Documentation/filesystems/ext4. Layout:
//! each block group begins with its copy of the superblock and the group
//! descriptors (where `sparse_super` has one), its bitmaps and its part of the
//! inode table; the rest is for data. Data is given out from the front in one
//! sweep: directories, then files, then the journal.
//!
//! Limits: 4 KiB blocks, at most 2^32 of them; no checksums of metadata; directories
//! are plain lists (the kernel indexes them when they grow); extended attributes
//! must fit into their inode.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};

use crate::tree::{Content, Kind, Node, Tree};

/// Bytes of a block, and its base-2 logarithm above 1024.
const BLOCK: u64 = 4096;
const LOG_BLOCK: u32 = 2;
/// Blocks of a group: what one block of bitmap can tell of.
const GROUP: u64 = BLOCK * 8;
/// Bytes of an inode, of its part that all ext file systems have, and of what
/// follows that (`i_extra_isize`).
const INODE: u64 = 256;
const OLD_INODE: usize = 128;
const EXTRA: usize = 32;
/// Disk bytes for which there is one inode, as mke2fs does it.
const BYTES_PER_INODE: u64 = 16384;
/// Bytes of a group descriptor.
const DESCRIPTOR: u64 = 32;

const ROOT_INODE: u32 = 2;
const JOURNAL_INODE: u32 = 8;
/// The first one for a user's files.
const FIRST_INODE: u32 = 11;

/// Most names of one file.
const MOST_LINKS: u32 = 65000;
/// Extents that fit into an inode, and into a block.
const INODE_EXTENTS: usize = 4;
const BLOCK_EXTENTS: usize = (BLOCK as usize - 12) / 12;
/// Blocks of one extent.
const MOST_EXTENT: u64 = 32768;

// i_mode
const REGULAR: u32 = 0o100000;
const DIRECTORY: u32 = 0o040000;
const SYMLINK: u32 = 0o120000;
const CHAR_DEVICE: u32 = 0o020000;
const BLOCK_DEVICE: u32 = 0o060000;
const FIFO: u32 = 0o010000;

const EXTENTS_FL: u32 = 0x80000;

// s_feature_compat, s_feature_incompat, s_feature_ro_compat
const COMPAT: u32 = 0x4 | 0x8 | 0x20; // has_journal, ext_attr, dir_index
const INCOMPAT: u32 = 0x2 | 0x40; // filetype, extents
const RO_COMPAT: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40; // sparse_super, large_file, huge_file, dir_nlink, extra_isize

/// What a file system is like, beside its files.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// Bytes of the disk; rounded down to blocks.
    pub(crate) size: u64,
    pub(crate) uuid: [u8; 16],
    /// At most 16 bytes.
    pub(crate) label: &'static str,
    /// When it was made, in seconds since 1970.
    pub(crate) time: u32,
    /// Owner, group and mode of the root directory are 0, 0 and 755. Bytes of the journal.
    pub(crate) journal: u64,
}

/// A UUID of what is hashed: different for different file systems, and the same for the same. RFC 9562, version 8: made
/// in a way of one's own.
pub(crate) fn uuid(hash: Sha256) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hash.finalize()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// Writes the file system to `disk`, which is empty.
pub(crate) fn write(tree: &Tree, options: &Options, disk: &File) -> io::Result<()> {
    let mut writer = Writer::new(tree, options, disk)?;
    disk.set_len(writer.layout.blocks * BLOCK)?;
    writer.add_all(tree)?;
    writer.finish()
}

/// Where the parts of the file system are.
struct Layout {
    blocks: u64,
    groups: u64,
    descriptor_blocks: u64,
    inodes_per_group: u32,
}

impl Layout {
    fn new(size: u64, nodes: usize) -> io::Result<Layout> {
        let mut layout = Layout {
            blocks: (size / BLOCK).min(u64::from(u32::MAX)),
            groups: 0,
            descriptor_blocks: 0,
            inodes_per_group: 0,
        };
        layout.groups = layout.blocks.div_ceil(GROUP);
        layout.descriptor_blocks = (layout.groups * DESCRIPTOR).div_ceil(BLOCK);
        let wanted = (layout.blocks * BLOCK / BYTES_PER_INODE)
            .max(nodes as u64 + u64::from(FIRST_INODE) + 1);
        let per_block = BLOCK / INODE;
        let per_group = wanted
            .div_ceil(layout.groups.max(1))
            .next_multiple_of(per_block);
        if per_group > BLOCK * 8 {
            return Err(too_small());
        }
        layout.inodes_per_group = per_group as u32;
        // A last group that is hardly more than its own administration is left away.
        let last = layout.groups.saturating_sub(1);
        if layout.blocks - last * GROUP < layout.overhead(last) + 64 {
            layout.groups = last;
            layout.blocks = last * GROUP;
        }
        match layout.groups {
            0 => Err(too_small()),
            _ => Ok(layout),
        }
    }

    /// Whether the group has a copy of superblock and descriptors.
    fn has_super(&self, group: u64) -> bool {
        let power = |base: u64| {
            let mut n = base;
            while n < group {
                n *= base;
            }
            n == group
        };
        group <= 1 || power(3) || power(5) || power(7)
    }

    fn table_blocks(&self) -> u64 {
        u64::from(self.inodes_per_group) * INODE / BLOCK
    }

    /// Blocks at the beginning of a group that hold no data.
    fn overhead(&self, group: u64) -> u64 {
        self.block_bitmap(group) - group * GROUP + 2 + self.table_blocks()
    }

    fn block_bitmap(&self, group: u64) -> u64 {
        let copy = match self.has_super(group) {
            true => 1 + self.descriptor_blocks,
            false => 0,
        };
        group * GROUP + copy
    }

    fn inode_bitmap(&self, group: u64) -> u64 {
        self.block_bitmap(group) + 1
    }

    fn inode_table(&self, group: u64) -> u64 {
        self.block_bitmap(group) + 2
    }

    /// Blocks of a group: the last one may be short.
    fn group_blocks(&self, group: u64) -> u64 {
        (self.blocks - group * GROUP).min(GROUP)
    }

    fn inodes(&self) -> u64 {
        u64::from(self.inodes_per_group) * self.groups
    }

    /// The byte where an inode is.
    fn inode_offset(&self, inode: u32) -> u64 {
        let group = u64::from((inode - 1) / self.inodes_per_group);
        let index = u64::from((inode - 1) % self.inodes_per_group);
        self.inode_table(group) * BLOCK + index * INODE
    }
}

/// Blocks one after the other: the first, and how many.
type Run = (u64, u64);

struct Writer<'a> {
    disk: &'a File,
    options: &'a Options,
    layout: Layout,
    /// Every data block before this one is in use, and none from it on.
    next_block: u64,
    next_inode: u32,
    /// Directories in each group of inodes.
    dirs: Vec<u16>,
    /// `i_block` of the journal, of which the superblock has a copy.
    journal: [u8; 60],
}

/// What is to be known of an inode.
#[derive(Default)]
struct Inode<'a> {
    mode: u32,
    owner: (u32, u32),
    mtime: u32,
    links: u32,
    size: u64,
    /// Blocks of data and of the extent tree.
    blocks: u64,
    flags: u32,
    block: Option<[u8; 60]>,
    xattrs: Option<&'a BTreeMap<String, Vec<u8>>>,
}

impl<'a> Writer<'a> {
    fn new(tree: &Tree, options: &'a Options, disk: &'a File) -> io::Result<Writer<'a>> {
        let layout = Layout::new(options.size, tree.len())?;
        Ok(Writer {
            disk,
            options,
            next_block: layout.overhead(0),
            next_inode: FIRST_INODE,
            dirs: vec![0; layout.groups as usize],
            journal: [0; 60],
            layout,
        })
    }

    fn add_all(&mut self, tree: &Tree) -> io::Result<()> {
        let lost_found = self.inode_number();
        let mut numbers: HashMap<&str, u32> = [("", ROOT_INODE)].into();
        for (path, node) in tree.iter() {
            if !matches!(node.kind, Kind::HardLink(_)) {
                let number = self.inode_number();
                numbers.insert(path, number);
            }
        }
        if u64::from(self.next_inode) > self.layout.inodes() {
            return Err(too_small());
        }
        let mut names: HashMap<&str, u32> = HashMap::new();
        let mut children: HashMap<&str, Vec<Entry>> = HashMap::new();
        for (path, node) in tree.iter() {
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            let file = match &node.kind {
                Kind::HardLink(other) => other.as_str(),
                _ => path,
            };
            let (Some(&inode), Some(target)) = (numbers.get(file), tree.get(file)) else {
                return Err(invalid(format!("{path}: a hard link to nothing")));
            };
            *names.entry(file).or_default() += 1;
            let kind = &target.kind;
            let entry = Entry { inode, name, kind };
            children.entry(parent).or_default().push(entry);
        }
        let root = Node::new(0o755, Kind::Dir);
        let mut dir = |path: &str, node: &Node, writer: &mut Self| {
            let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
            let mut entries = children.remove(path).unwrap_or_default();
            if path.is_empty() {
                entries.push(Entry {
                    inode: lost_found,
                    name: "lost+found",
                    kind: &Kind::Dir,
                });
            }
            writer.add_dir(numbers[path], numbers[parent], node, &entries)
        };
        dir("", &root, self)?;
        self.add_dir(lost_found, ROOT_INODE, &Node::new(0o700, Kind::Dir), &[])?;
        for (path, node) in tree.iter() {
            if matches!(node.kind, Kind::Dir) {
                dir(path, node, self)?;
            }
        }
        if let Some(path) = children.keys().next() {
            return Err(invalid(format!(
                "{path} has files in it and is no directory"
            )));
        }
        for (path, node) in tree.iter() {
            let links = names.get(path).copied().unwrap_or(0);
            if links > MOST_LINKS {
                return Err(invalid(format!("{path}: too many names")));
            }
            if let Some(&number) = numbers.get(path) {
                self.add_file(number, node, links)
                    .map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
            }
        }
        self.add_journal()
    }

    fn inode_number(&mut self) -> u32 {
        self.next_inode += 1;
        self.next_inode - 1
    }

    fn add_dir(
        &mut self,
        number: u32,
        parent: u32,
        node: &Node,
        entries: &[Entry],
    ) -> io::Result<()> {
        let entry = |inode, name| Entry {
            inode,
            name,
            kind: &Kind::Dir,
        };
        let mut list = DirBlocks::default();
        for entry in [entry(number, "."), entry(parent, "..")]
            .iter()
            .chain(entries)
        {
            list.add(entry)?;
        }
        let data = list.finish();
        let subdirs = entries
            .iter()
            .filter(|entry| matches!(entry.kind, Kind::Dir))
            .count() as u32;
        let (block, blocks) = self.store(data.len() as u64, |write| write(&data))?;
        let group = ((number - 1) / self.layout.inodes_per_group) as usize;
        self.dirs[group] += 1;
        self.put(
            number,
            node,
            Inode {
                mode: DIRECTORY,
                // More than there can be is told as 1 (dir_nlink).
                links: match subdirs + 2 {
                    links if links > MOST_LINKS => 1,
                    links => links,
                },
                size: data.len() as u64,
                blocks,
                flags: EXTENTS_FL,
                block: Some(block),
                ..Inode::default()
            },
        )
    }

    fn add_file(&mut self, number: u32, node: &Node, links: u32) -> io::Result<()> {
        let mut inode = Inode {
            links,
            ..Inode::default()
        };
        match &node.kind {
            Kind::Dir | Kind::HardLink(_) => return Ok(()),
            Kind::File(content) => {
                inode.mode = REGULAR;
                self.fill(&mut inode, content)?;
            }
            Kind::Symlink(target) if target.len() < 60 => {
                let mut block = [0; 60];
                block[..target.len()].copy_from_slice(target.as_bytes());
                inode.mode = SYMLINK;
                inode.size = target.len() as u64;
                inode.block = Some(block);
            }
            Kind::Symlink(target) => {
                inode.mode = SYMLINK;
                self.fill(&mut inode, &Content::Bytes(target.clone().into()))?;
            }
            Kind::Fifo => inode.mode = FIFO,
            Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) => {
                // The form that has 12 bits of major and 20 of minor.
                let device = minor & 0xff | major << 8 | (minor & !0xff) << 12;
                let mut block = [0; 60];
                block[4..8].copy_from_slice(&device.to_le_bytes());
                inode.mode = match node.kind {
                    Kind::CharDevice(..) => CHAR_DEVICE,
                    _ => BLOCK_DEVICE,
                };
                inode.block = Some(block);
            }
        }
        self.put(number, node, inode)
    }

    fn fill(&mut self, inode: &mut Inode, content: &Content) -> io::Result<()> {
        inode.size = content.len();
        inode.flags = EXTENTS_FL;
        let (block, blocks) = self.store(content.len(), |write| content.for_each(write))?;
        inode.block = Some(block);
        inode.blocks = blocks;
        Ok(())
    }

    /// Journal superblock, version 2 (big-endian); the rest is zero.
    fn add_journal(&mut self) -> io::Result<()> {
        let size = self.options.journal / BLOCK * BLOCK;
        let mut header = vec![0; 1024];
        let mut field = |offset: usize, value: u32| {
            header[offset..offset + 4].copy_from_slice(&value.to_be_bytes());
        };
        field(0, 0xc03b_3998); // h_magic
        field(4, 4); // h_blocktype: superblock, version 2
        field(12, BLOCK as u32); // s_blocksize
        field(16, (size / BLOCK) as u32); // s_maxlen
        field(20, 1); // s_first
        field(24, 1); // s_sequence
        field(64, 1); // s_nr_users
        header[48..64].copy_from_slice(&self.options.uuid);
        let (block, blocks) = self.store(size, |write| write(&header))?;
        self.journal = block;
        let node = Node {
            mtime: self.options.time,
            ..Node::new(0o600, Kind::Dir)
        };
        let inode = Inode {
            mode: REGULAR,
            links: 1,
            size,
            blocks,
            flags: EXTENTS_FL,
            block: Some(block),
            ..Inode::default()
        };
        self.put(JOURNAL_INODE, &node, inode)
    }

    /// Gives out blocks for `len` bytes and lets `fill` write them; what it does not write stays zero. The
    /// answer is `i_block` with the extents, and the number of blocks.
    fn store(
        &mut self,
        len: u64,
        fill: impl FnOnce(&mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()>,
    ) -> io::Result<([u8; 60], u64)> {
        let mut blocks = len.div_ceil(BLOCK);
        let runs = self.allocate(blocks)?;
        let mut at = Cursor {
            disk: self.disk,
            runs: &runs,
            done: 0,
        };
        fill(&mut |data| at.write(data))?;

        let mut root = [0; 60];
        if runs.len() <= INODE_EXTENTS {
            extents(&mut root, &runs);
            return Ok((root, blocks));
        }
        if runs.len() > BLOCK_EXTENTS {
            return Err(invalid("a file in too many pieces".into()));
        }
        let leaf = self.allocate(1)?[0].0;
        blocks += 1;
        let mut block = [0; BLOCK as usize];
        extents(&mut block, &runs);
        self.disk.write_all_at(&block, leaf * BLOCK)?;
        extent_header(&mut root, 1, 1);
        // ei_block is 0; ei_leaf_lo
        root[16..20].copy_from_slice(&(leaf as u32).to_le_bytes());
        Ok((root, blocks))
    }

    /// The next `count` free blocks.
    fn allocate(&mut self, mut count: u64) -> io::Result<Vec<Run>> {
        let mut runs = Vec::new();
        while count > 0 {
            let group = self.next_block / GROUP;
            if group >= self.layout.groups {
                return Err(too_small());
            }
            let end = group * GROUP + self.layout.group_blocks(group);
            let len = count.min(end - self.next_block).min(MOST_EXTENT);
            if len > 0 {
                runs.push((self.next_block, len));
            }
            self.next_block += len;
            count -= len;
            if self.next_block == end && group + 1 < self.layout.groups {
                self.next_block = end + self.layout.overhead(group + 1);
            } else if self.next_block == end && count > 0 {
                return Err(too_small());
            }
        }
        Ok(runs)
    }

    fn put(&mut self, number: u32, node: &Node, inode: Inode) -> io::Result<()> {
        let inode = Inode {
            owner: node.owner,
            mtime: node.mtime,
            mode: inode.mode | node.permissions,
            xattrs: Some(&node.xattrs),
            ..inode
        };
        let bytes = inode.encode(self.options.time)?;
        self.disk
            .write_all_at(&bytes, self.layout.inode_offset(number))
    }

    /// Writes what tells which blocks and inodes are in use.
    fn finish(self) -> io::Result<()> {
        let layout = &self.layout;
        let used_inodes = u64::from(self.next_inode) - 1;
        let mut descriptors = vec![0; (layout.descriptor_blocks * BLOCK) as usize];
        let mut free_blocks = 0;
        for group in 0..layout.groups {
            let start = group * GROUP;
            let size = layout.group_blocks(group);
            let used =
                (self.next_block.clamp(start, start + size) - start).max(layout.overhead(group));
            let bitmap = bitmap(used, size);
            self.disk
                .write_all_at(&bitmap, layout.block_bitmap(group) * BLOCK)?;

            let inodes = u64::from(layout.inodes_per_group);
            let in_use = used_inodes.saturating_sub(group * inodes).min(inodes);
            let bitmap = self::bitmap(in_use, inodes);
            self.disk
                .write_all_at(&bitmap, layout.inode_bitmap(group) * BLOCK)?;

            let d = &mut descriptors[(group * DESCRIPTOR) as usize..][..DESCRIPTOR as usize];
            put32(d, 0, layout.block_bitmap(group) as u32);
            put32(d, 4, layout.inode_bitmap(group) as u32);
            put32(d, 8, layout.inode_table(group) as u32);
            put16(d, 12, (size - used) as u16);
            put16(d, 14, (inodes - in_use) as u16);
            put16(d, 16, self.dirs[group as usize]);
            free_blocks += size - used;
        }
        for group in (0..layout.groups).filter(|&group| layout.has_super(group)) {
            let superblock = self.superblock(group, free_blocks, layout.inodes() - used_inodes);
            // The first block of the disk begins with room for a boot loader.
            let offset = if group == 0 {
                1024
            } else {
                group * GROUP * BLOCK
            };
            self.disk.write_all_at(&superblock, offset)?;
            self.disk
                .write_all_at(&descriptors, (group * GROUP + 1) * BLOCK)?;
        }
        Ok(())
    }

    /// struct ext4_super_block
    fn superblock(&self, group: u64, free_blocks: u64, free_inodes: u64) -> [u8; 1024] {
        let layout = &self.layout;
        let time = self.options.time;
        let mut s = [0; 1024];
        put32(&mut s, 0x00, layout.inodes() as u32);
        put32(&mut s, 0x04, layout.blocks as u32);
        put32(&mut s, 0x08, (layout.blocks / 100) as u32); // for root only
        put32(&mut s, 0x0c, free_blocks as u32);
        put32(&mut s, 0x10, free_inodes as u32);
        put32(&mut s, 0x18, LOG_BLOCK);
        put32(&mut s, 0x1c, LOG_BLOCK); // clusters
        put32(&mut s, 0x20, GROUP as u32);
        put32(&mut s, 0x24, GROUP as u32);
        put32(&mut s, 0x28, layout.inodes_per_group);
        put32(&mut s, 0x30, time); // last write
        put16(&mut s, 0x36, 0xffff); // no check after so many mounts
        put16(&mut s, 0x38, 0xef53); // magic
        put16(&mut s, 0x3a, 1); // clean
        put16(&mut s, 0x3c, 1); // on errors: continue
        put32(&mut s, 0x40, time); // last check
        put32(&mut s, 0x4c, 1); // revision with what follows
        put32(&mut s, 0x54, FIRST_INODE);
        put16(&mut s, 0x58, INODE as u16);
        put16(&mut s, 0x5a, group as u16);
        put32(&mut s, 0x5c, COMPAT);
        put32(&mut s, 0x60, INCOMPAT);
        put32(&mut s, 0x64, RO_COMPAT);
        s[0x68..0x78].copy_from_slice(&self.options.uuid);
        let label = self.options.label.as_bytes();
        s[0x78..0x78 + label.len()].copy_from_slice(label);
        put32(&mut s, 0xe0, JOURNAL_INODE);
        s[0xec..0xfc].copy_from_slice(&self.options.uuid); // seed of the directory hash
        s[0xfc] = 1; // half MD4
        s[0xfd] = 1; // s_jnl_blocks is in use
        put32(&mut s, 0x100, 0xc); // default mount options: user_xattr, acl
        put32(&mut s, 0x108, time); // made
        s[0x10c..0x148].copy_from_slice(&self.journal);
        put32(&mut s, 0x14c, (self.options.journal / BLOCK * BLOCK) as u32);
        put16(&mut s, 0x15c, EXTRA as u16);
        put16(&mut s, 0x15e, EXTRA as u16);
        put32(&mut s, 0x160, 1); // signed directory hash
        s
    }
}

impl Inode<'_> {
    /// struct ext4_inode
    fn encode(&self, created: u32) -> io::Result<[u8; INODE as usize]> {
        let mut i = [0; INODE as usize];
        let (uid, gid) = self.owner;
        put16(&mut i, 0x00, self.mode as u16);
        put16(&mut i, 0x02, uid as u16);
        put32(&mut i, 0x04, self.size as u32);
        for time in [0x08, 0x0c, 0x10] {
            put32(&mut i, time, self.mtime); // access, change, modification
        }
        put16(&mut i, 0x18, gid as u16);
        put16(&mut i, 0x1a, self.links as u16);
        put32(&mut i, 0x1c, (self.blocks * (BLOCK / 512)) as u32);
        put32(&mut i, 0x20, self.flags);
        if let Some(block) = &self.block {
            i[0x28..0x64].copy_from_slice(block);
        }
        put32(&mut i, 0x6c, (self.size >> 32) as u32);
        put16(&mut i, 0x78, (uid >> 16) as u16);
        put16(&mut i, 0x7a, (gid >> 16) as u16);
        put16(&mut i, 0x80, EXTRA as u16);
        put32(&mut i, 0x90, created);
        if let Some(xattrs) = self.xattrs.filter(|xattrs| !xattrs.is_empty()) {
            put_xattrs(&mut i[OLD_INODE + EXTRA..], xattrs)?;
        }
        Ok(i)
    }
}

/// Extended attributes after the fields of an inode: a magic number, the list of
/// entries, and the values from the end on.
fn put_xattrs(room: &mut [u8], xattrs: &BTreeMap<String, Vec<u8>>) -> io::Result<()> {
    const MAGIC: u32 = 0xea02_0000;
    const ENTRY: usize = 16;
    let full = |name: &str| invalid(format!("the extended attribute {name} does not fit"));
    put32(room, 0, MAGIC);
    let room = &mut room[4..];
    let (mut front, mut back) = (0, room.len());
    for (full_name, value) in xattrs {
        let (index, name) = [("user.", 1), ("trusted.", 4), ("security.", 6)]
            .iter()
            .find_map(|(prefix, index)| Some((*index, full_name.strip_prefix(prefix)?)))
            .ok_or_else(|| invalid(format!("unknown extended attribute {full_name}")))?;
        let entry = ENTRY + name.len().next_multiple_of(4);
        // Four zero bytes end the list.
        back = back
            .checked_sub(value.len().next_multiple_of(4))
            .filter(|&back| front + entry + 4 <= back && name.len() < 256)
            .ok_or_else(|| full(full_name))?;
        room[back..back + value.len()].copy_from_slice(value);
        room[front] = name.len() as u8;
        room[front + 1] = index;
        put16(room, front + 2, back as u16);
        put32(room, front + 8, value.len() as u32);
        room[front + ENTRY..][..name.len()].copy_from_slice(name.as_bytes());
        front += entry;
    }
    Ok(())
}

/// A name in a directory.
struct Entry<'a> {
    inode: u32,
    name: &'a str,
    kind: &'a Kind,
}

/// The blocks of a directory: no entry crosses from one to the next, and the last
/// one of each is as long as what is left.
#[derive(Default)]
struct DirBlocks {
    data: Vec<u8>,
    /// Where the last entry is.
    last: usize,
}

impl DirBlocks {
    fn add(&mut self, entry: &Entry) -> io::Result<()> {
        if entry.name.len() > 255 {
            return Err(invalid(format!("the name {} is too long", entry.name)));
        }
        let len = (8 + entry.name.len()).next_multiple_of(4);
        let used = self.data.len() % BLOCK as usize;
        if used + len > BLOCK as usize {
            self.fill_block();
        }
        self.last = self.data.len();
        self.data.extend(entry.inode.to_le_bytes());
        self.data.extend((len as u16).to_le_bytes());
        self.data.push(entry.name.len() as u8);
        self.data.push(match entry.kind {
            Kind::File(_) => 1,
            Kind::Dir => 2,
            Kind::CharDevice(..) => 3,
            Kind::BlockDevice(..) => 4,
            Kind::Fifo => 5,
            Kind::Symlink(_) => 7,
            // The entry tells of the file that the link is to.
            Kind::HardLink(_) => 0,
        });
        self.data.extend(entry.name.as_bytes());
        self.data.resize(self.last + len, 0);
        Ok(())
    }

    fn fill_block(&mut self) {
        let end = self.data.len().next_multiple_of(BLOCK as usize);
        put16(&mut self.data, self.last + 4, (end - self.last) as u16);
        self.data.resize(end, 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.fill_block();
        self.data
    }
}

/// Writes one piece after the other to where the runs are.
struct Cursor<'a> {
    disk: &'a File,
    runs: &'a [Run],
    /// Bytes of the first of the runs that are written.
    done: u64,
}

impl Cursor<'_> {
    fn write(&mut self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let (start, len) = self.runs[0];
            let part = data.len().min((len * BLOCK - self.done) as usize);
            self.disk
                .write_all_at(&data[..part], start * BLOCK + self.done)?;
            self.done += part as u64;
            data = &data[part..];
            if self.done == len * BLOCK {
                self.runs = &self.runs[1..];
                self.done = 0;
            }
        }
        Ok(())
    }
}

/// struct ext4_extent_header
fn extent_header(node: &mut [u8], entries: usize, depth: u16) {
    let room = (node.len() - 12) / 12;
    put16(node, 0, 0xf30a);
    put16(node, 2, entries as u16);
    put16(node, 4, room as u16);
    put16(node, 6, depth);
}

/// A leaf of an extent tree.
fn extents(node: &mut [u8], runs: &[Run]) {
    extent_header(node, runs.len(), 0);
    let mut logical = 0;
    for (i, &(start, len)) in runs.iter().enumerate() {
        let at = 12 + i * 12;
        put32(node, at, logical);
        put16(node, at + 4, len as u16);
        put32(node, at + 8, start as u32);
        logical += len as u32;
    }
}

/// A block of bits: the first `used` of `size` are set, and those beyond.
fn bitmap(used: u64, size: u64) -> Vec<u8> {
    let bit = |n: u64| n < used || n >= size;
    (0..BLOCK)
        .map(|byte| (0..8).fold(0, |bits, n| bits | u8::from(bit(byte * 8 + n)) << n))
        .collect()
}

fn put16(bytes: &mut [u8], offset: usize, value: u16) {
    bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
}

fn put32(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

/// The files need a larger disk.
fn too_small() -> io::Error {
    io::Error::new(
        io::ErrorKind::FileTooLarge,
        "the disk is too small for its files",
    )
}

fn invalid(problem: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, problem)
}

#[cfg(test)]
mod tests;
