//! File systems as e2fsprogs sees them.

use std::path::Path;
use std::process::Command;

use super::*;

const MIB: u64 = 1 << 20;

fn options(size: u64) -> Options {
    Options {
        size,
        uuid: *b"0123456789abcdef",
        label: "test",
        time: 1_700_000_000,
        journal: 4 * MIB,
    }
}

fn make(tree: &Tree, size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    write(tree, &options(size), file.as_file()).unwrap();
    file
}

/// What a program of e2fsprogs says to the file system.
fn e2fsprogs(program: &str, args: &[&str], disk: &Path) -> (bool, String) {
    let output = Command::new(program)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(args)
        .arg(disk)
        .output()
        .expect("the tests need e2fsprogs");
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

fn assert_clean(disk: &Path) {
    let (clean, report) = e2fsprogs("e2fsck", &["-f", "-n"], disk);
    assert!(clean, "{report}");
}

/// Every kind of file, and sizes around those of blocks and extents.
fn sample() -> Tree {
    let mut tree = Tree::default();
    tree.dir("empty");
    for (i, len) in [0, 1, 4095, 4096, 4097, 3_000_000].into_iter().enumerate() {
        tree.file(&format!("files/{i}"), 0o644, vec![i as u8 + 1; len]);
    }
    for i in 0..700 {
        tree.file(&format!("many/a-rather-long-name-{i}"), 0o600, vec![]);
    }
    tree.symlink("short", "files/1");
    tree.symlink("long", &format!("{}/files/1", ".".repeat(70)));
    tree.char_device("tty", 0o620, 4, 64);
    tree.insert(
        "second-name",
        Node::new(0, Kind::HardLink("files/3".into())),
    );
    let mut setuid = Node::new(0o4755, Kind::File(Content::Bytes(b"program".to_vec())));
    setuid.owner = (1, 70_000);
    setuid.mtime = 1_600_000_000;
    let capability =
        b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    setuid
        .xattrs
        .insert("security.capability".into(), capability.to_vec());
    tree.insert("bin/ping", setuid);
    tree
}

#[test]
fn file_systems_of_all_sizes_are_clean() {
    for size in [
        16 * MIB,
        128 * MIB,
        128 * MIB + 40 * BLOCK,
        129 * MIB + 512,
        2048 * MIB,
        40_000 * MIB,
    ] {
        assert_clean(make(&sample(), size).path());
    }
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let bytes = || std::fs::read(make(&sample(), 16 * MIB).path()).unwrap();
    assert!(bytes() == bytes());
}

#[test]
fn what_is_written_is_read() {
    let disk = make(&sample(), 300 * MIB);
    let ask = |request: &str| e2fsprogs("debugfs", &["-R", request], disk.path()).1;
    for (i, len) in [0, 1, 4095, 4096, 4097, 3_000_000].into_iter().enumerate() {
        let copy = tempfile::NamedTempFile::new().unwrap();
        ask(&format!("dump /files/{i} {}", copy.path().display()));
        let found = std::fs::read(copy.path()).unwrap();
        assert!(found == vec![i as u8 + 1; len], "{i}");
    }
    for (path, expected) in [
        (
            "/bin/ping",
            &[
                "Mode:  04755",
                "User:     1",
                "Group: 70000",
                "mtime: 0x5f5e1000",
            ][..],
        ),
        (
            "/bin/ping",
            &["security.capability (20) = 01 00 00 02 00 20"],
        ),
        ("/second-name", &["Links: 2", "Size: 4096"]),
        ("/short", &["Fast link dest: \"files/1\""]),
        ("/long", &["Type: symlink", "Size: 78"]),
        ("/tty", &["character special", "4:64"]),
        ("/many", &["Type: directory", "Links: 2", "Size: 24576"]),
    ] {
        let told = ask(&format!("stat {path}"));
        for part in expected {
            assert!(told.contains(part), "{path}: {part}: {told}");
        }
    }
}

#[test]
fn file_in_many_pieces() {
    // A data block of each group is left over: more pieces than an inode has room for.
    let disk = tempfile::NamedTempFile::new().unwrap();
    let options = options(1200 * MIB);
    disk.as_file().set_len(options.size).unwrap();
    let mut tree = Tree::default();
    tree.dir("a");
    let mut writer = Writer::new(&tree, &options, disk.as_file()).unwrap();
    writer.add_all(&tree).unwrap();
    let (root, blocks) = writer.store(900 * MIB, |write| write(b"x")).unwrap();
    assert_eq!(blocks, 900 * MIB / BLOCK + 1);
    assert_eq!(root[..8], [0x0a, 0xf3, 1, 0, 4, 0, 1, 0]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut tree = Tree::default();
    tree.file("large", 0o644, vec![1; 12 << 20]);
    for size in [0, BLOCK, MIB, 12 * MIB, 16 * MIB] {
        let file = tempfile::tempfile().unwrap();
        let error = write(&tree, &options(size), &file).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge, "{size}");
    }
    for (name, value) in [("security.x", vec![0; 200]), ("odd.x", vec![])] {
        let mut tree = Tree::default();
        tree.file("a", 0o644, vec![]);
        tree.get_mut("a").unwrap().xattrs.insert(name.into(), value);
        let file = tempfile::tempfile().unwrap();
        let error = write(&tree, &options(16 * MIB), &file).unwrap_err();
        assert!(error.to_string().starts_with("a: "), "{error}");
    }
}
