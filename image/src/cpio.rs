//! The cpio archive that a kernel unpacks into its first root file system.
//!
//! The same tree gives the same bytes: names are sorted, times are zero and
//! everything belongs to root, so a build needs no privilege even for device
//! nodes. Only what an initial RAM disk needs is here: no hard links, block devices or
//! pipes, no reading.
//!
//! The format is "newc", as in the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst.

use std::io::{self, Write};

use crate::tree::{Content, Kind, Node, Tree};

/// The file type bits of a mode (POSIX `S_IFMT`), and the types used here.
const TYPE: u32 = 0o170000;
const DIRECTORY: u32 = 0o040000;
const CHAR_DEVICE: u32 = 0o020000;
const REGULAR: u32 = 0o100000;
const SYMLINK: u32 = 0o120000;

/// Writes the archive. A directory comes before what is in it, because its path is
/// a prefix and so sorts first.
pub(crate) fn write(tree: &Tree, out: &mut impl Write) -> io::Result<()> {
    for (inode, (path, node)) in (1..).zip(tree.iter()) {
        write_node(out, inode, path, node)?;
    }
    write_entry(out, 0, "TRAILER!!!", 0, (0, 0), b"")
}

fn write_node(out: &mut impl Write, inode: u32, path: &str, node: &Node) -> io::Result<()> {
    let (kind, device, data) = match &node.kind {
        Kind::Dir => (DIRECTORY, (0, 0), Vec::new()),
        Kind::File(Content::Bytes(data)) => (REGULAR, (0, 0), data.clone()),
        Kind::File(content) => (REGULAR, (0, 0), content.bytes()?),
        Kind::Symlink(target) => (SYMLINK, (0, 0), target.clone().into()),
        Kind::CharDevice(major, minor) => (CHAR_DEVICE, (*major, *minor), Vec::new()),
        Kind::HardLink(_) | Kind::BlockDevice(..) | Kind::Fifo => {
            let problem = format!("{path}: a hard link, block device or pipe in a cpio");
            return Err(io::Error::new(io::ErrorKind::Unsupported, problem));
        }
    };
    write_entry(out, inode, path, kind | node.permissions, device, &data)
}

fn write_entry(
    out: &mut impl Write,
    inode: u32,
    path: &str,
    mode: u32,
    (major, minor): (u32, u32),
    data: &[u8],
) -> io::Result<()> {
    let too_big = || io::Error::new(io::ErrorKind::FileTooLarge, format!("{path} in a cpio"));
    let size = u32::try_from(data.len()).map_err(|_| too_big())?;
    let name_size = path.len() as u32 + 1;
    // In order: inode, mode, uid, gid, links, mtime, size, device the file is on
    // (2), device the file is (2), size of the name, checksum (not in newc).
    let links = if mode & TYPE == DIRECTORY { 2 } else { 1 };
    let fields = [
        inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0,
    ];
    let mut header = String::from("070701");
    for field in fields {
        header += &format!("{field:08x}");
    }
    header += path;
    header.push('\0');
    out.write_all(header.as_bytes())?;
    out.write_all(padding(header.len()))?;
    out.write_all(data)?;
    out.write_all(padding(data.len()))
}

/// Zeros that bring something of `len` bytes to a multiple of four.
fn padding(len: usize) -> &'static [u8] {
    &[0; 3][..len.wrapping_neg() % 4]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(tree: &Tree) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(tree, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn bytes_of_a_small_archive() {
        let mut tree = Tree::default();
        tree.file("a/b", 0o644, b"hello".to_vec());
        let expected = concat!(
            "070701",
            "00000001",
            "000041ed",
            "00000000",
            "00000000",
            "00000002",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000002",
            "00000000",
            "a\0",
            "070701",
            "00000002",
            "000081a4",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000005",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000004",
            "00000000",
            "a/b\0\0\0",
            "hello\0\0\0",
            "070701",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "0000000b",
            "00000000",
            "TRAILER!!!\0\0\0\0",
        );
        assert_eq!(String::from_utf8(archive(&tree)).unwrap(), expected);
    }

    #[test]
    fn order_of_insertion_does_not_matter() {
        let mut one = Tree::default();
        one.symlink("bin/sh", "busybox");
        one.char_device("dev/console", 0o600, 5, 1);
        let mut other = Tree::default();
        other.char_device("dev/console", 0o600, 5, 1);
        other.dir("bin");
        other.symlink("bin/sh", "busybox");
        assert_eq!(archive(&one), archive(&other));
    }

    #[test]
    fn every_kind_of_node_has_its_type_and_device() {
        let mut tree = Tree::default();
        tree.dir("d");
        tree.file("f", 0o755, vec![]);
        tree.symlink("l", "f");
        tree.char_device("c", 0o600, 5, 1);
        let text = String::from_utf8(archive(&tree)).unwrap();
        for (path, mode, device) in [
            ("d", "000041ed", "0000000000000000"),
            ("f", "000081ed", "0000000000000000"),
            ("l", "0000a1ff", "0000000000000000"),
            ("c", "00002180", "0000000500000001"),
        ] {
            // The name follows a header of 110 bytes.
            let name = text.find(&format!("{path}\0")).unwrap();
            let header = &text[name - 110..name];
            assert_eq!(&header[14..22], mode, "{path}");
            assert_eq!(&header[78..94], device, "{path}");
        }
    }
}
