use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use tar::{Builder, Header};

use super::*;
use crate::pack;

/// An entry: kind, path, mode, what it leads to or has in it.
type Made<'a> = (EntryType, &'a str, u32, &'a str);

/// A stream of these entries, with paths that no honest writer would put there.
fn stream(entries: &[Made]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (kind, path, mode, text) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(*mode);
        header.set_mtime(1_000_000);
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        let link = matches!(kind, EntryType::Symlink | EntryType::Link);
        if link {
            header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        let data = if link { "" } else { text };
        header.set_size(data.len() as u64);
        header.set_cksum();
        builder.append(&header, data.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn dirs() -> (tempfile::TempDir, PathBuf) {
    let outer = tempfile::tempdir().unwrap();
    let dir = outer.path().join("dir");
    fs::create_dir(&dir).unwrap();
    (outer, dir)
}

#[test]
fn there_and_back() {
    let (outer, dir) = dirs();
    let from = outer.path().join("from");
    let long = "n".repeat(150);
    fs::create_dir_all(from.join("deep").join(&long)).unwrap();
    fs::write(from.join("deep").join(&long).join("file"), [7; 100_000]).unwrap();
    fs::write(from.join("script"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(from.join("script"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::write(from.join("empty"), "").unwrap();
    symlink("../nowhere", from.join("link")).unwrap();
    fs::create_dir(from.join("closed")).unwrap();
    fs::write(from.join("closed/inside"), "x").unwrap();
    fs::set_permissions(from.join("closed"), fs::Permissions::from_mode(0o500)).unwrap();
    let time = fs::metadata(from.join("script")).unwrap().mtime();

    let mut bytes = Vec::new();
    let packed = pack(&from, Path::new("to"), false, &mut bytes).unwrap();
    assert_eq!(packed, 100_011);
    for (keep_special, mode) in [(true, 0o4755), (false, 0o755)] {
        let options = UnpackOptions {
            only: Some("to".into()),
            keep_special,
        };
        // Twice: over what is there.
        assert_eq!(unpack(&dir, &bytes[..], &options).unwrap(), packed);
        let to = dir.join("to");
        let read = fs::read(to.join("deep").join(&long).join("file")).unwrap();
        assert_eq!(read, [7; 100_000]);
        let script = fs::metadata(to.join("script")).unwrap();
        assert_eq!((script.mode() & 0o7777, script.mtime()), (mode, time));
        let link = fs::read_link(to.join("link")).unwrap();
        assert_eq!(link, Path::new("../nowhere"));
        let closed = fs::metadata(to.join("closed")).unwrap();
        assert_eq!(closed.mode() & 0o777, 0o500);
        assert_eq!(fs::read(to.join("closed/inside")).unwrap(), b"x");
        assert_eq!(fs::read(to.join("empty")).unwrap(), b"");
        fs::set_permissions(to.join("closed"), fs::Permissions::from_mode(0o700)).unwrap();
    }
    fs::set_permissions(from.join("closed"), fs::Permissions::from_mode(0o700)).unwrap();
    // A link by itself, and what it leads to.
    symlink("script", from.join("way")).unwrap();
    for (follow, is_link) in [(false, true), (true, false)] {
        let mut bytes = Vec::new();
        pack(&from.join("way"), Path::new("w"), follow, &mut bytes).unwrap();
        unpack(&dir, &bytes[..], &UnpackOptions::default()).unwrap();
        let found = fs::symlink_metadata(dir.join("w")).unwrap();
        assert_eq!(found.is_symlink(), is_link);
    }
    // Files that tell no size.
    let mut bytes = Vec::new();
    pack(
        Path::new("/proc/version"),
        Path::new("v"),
        false,
        &mut bytes,
    )
    .unwrap();
    unpack(&dir, &bytes[..], &UnpackOptions::default()).unwrap();
    assert!(
        fs::read_to_string(dir.join("v"))
            .unwrap()
            .starts_with("Linux")
    );
}

/// Streams of a hostile sender: nothing appears outside of the directory.
#[test]
fn hostile_streams() {
    use EntryType::{Block, Char, Directory, Fifo, GNUSparse, Link, Regular, Symlink};
    let table: &[(&str, &[Made])] = &[
        ("parent", &[(Regular, "../evil", 0o644, "x")]),
        ("parent inside", &[(Regular, "a/../../evil", 0o644, "x")]),
        ("absolute", &[(Regular, "/tmp/evil", 0o644, "x")]),
        (
            "through a link",
            &[(Symlink, "a", 0, ".."), (Regular, "a/evil", 0o644, "x")],
        ),
        (
            "through an absolute link",
            &[(Symlink, "a", 0, "/tmp"), (Regular, "a/evil", 0o644, "x")],
        ),
        (
            "a directory through a link",
            &[(Symlink, "a", 0, ".."), (Directory, "a/evil", 0o755, "")],
        ),
        (
            "permissions through a link",
            &[(Symlink, "a", 0, ".."), (Directory, "a", 0o777, "")],
        ),
        (
            "through a link that was there",
            &[(Regular, "out/evil", 0o644, "x")],
        ),
        ("a hard link out", &[(Link, "a", 0, "../secret")]),
        ("an absolute hard link", &[(Link, "a", 0, "/etc/passwd")]),
        (
            "a hard link through a link",
            &[(Symlink, "s", 0, ".."), (Link, "a", 0, "s/secret")],
        ),
        ("a device", &[(Char, "a", 0o666, "")]),
        ("another device", &[(Block, "a", 0o666, "")]),
        ("a pipe", &[(Fifo, "a", 0o666, "")]),
        ("holes", &[(GNUSparse, "a", 0o666, "")]),
        ("a file for the root", &[(Regular, ".", 0o644, "x")]),
        ("no name", &[(Regular, "", 0o644, "x")]),
        (
            "a file for a directory",
            &[(Directory, "d/e", 0o755, ""), (Regular, "d", 0o644, "x")],
        ),
    ];
    for (name, entries) in table {
        let (outer, dir) = dirs();
        fs::write(outer.path().join("secret"), "s").unwrap();
        symlink("..", dir.join("out")).unwrap();
        let mode = fs::metadata(outer.path()).unwrap().mode();
        let unpacked = unpack(&dir, &stream(entries)[..], &UnpackOptions::default());
        assert!(unpacked.is_err(), "{name}");
        let mut left: Vec<_> = fs::read_dir(outer.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["dir", "secret"], "{name}");
        assert_eq!(fs::metadata(outer.path()).unwrap().mode(), mode, "{name}");
        assert_eq!(
            fs::metadata(outer.path().join("secret")).unwrap().nlink(),
            1
        );
    }
}

#[test]
fn a_link_is_replaced_not_followed() {
    let (outer, dir) = dirs();
    let secret = outer.path().join("secret");
    fs::write(&secret, "s").unwrap();
    symlink(&secret, dir.join("a")).unwrap();
    let bytes = stream(&[(EntryType::Regular, "a", 0o600, "new")]);
    unpack(&dir, &bytes[..], &UnpackOptions::default()).unwrap();
    assert_eq!(fs::read(&secret).unwrap(), b"s");
    assert_eq!(fs::read(dir.join("a")).unwrap(), b"new");
}

#[test]
fn only_what_was_asked_for() {
    let (_outer, dir) = dirs();
    let options = UnpackOptions {
        only: Some("a".into()),
        keep_special: false,
    };
    let unpack = |entries: &[Made]| unpack(&dir, &stream(entries)[..], &options);
    unpack(&[(EntryType::Regular, "a/b", 0o600, "x")]).unwrap();
    unpack(&[(EntryType::Regular, "./a/c", 0o600, "x")]).unwrap();
    unpack(&[(EntryType::Regular, ".bashrc", 0o600, "x")]).unwrap_err();
    unpack(&[(EntryType::Regular, "ab", 0o600, "x")]).unwrap_err();
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
}

#[test]
fn a_stream_that_breaks_off() {
    let (_outer, dir) = dirs();
    let bytes = stream(&[(EntryType::Regular, "a", 0o600, &"x".repeat(3000))]);
    for len in [100, 512, 1000, 3000] {
        let cut = unpack(&dir, &bytes[..len], &UnpackOptions::default());
        assert!(cut.is_err(), "{len}");
    }
}
