//! What works as in any file system.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use tempfile::{TempDir, tempdir};

use crate::client::{Client, ROOT, longs, name, op, u32_at, u64_at, words};

const ENOENT: i32 = 2;
const EPERM: i32 = 1;
const EEXIST: i32 = 17;
const ENOTEMPTY: i32 = 39;
const EROFS: i32 = 30;
const ENODATA: i32 = 61;
const EOPNOTSUPP: i32 = 95;
const ERANGE: i32 = 34;
const RDWR: u32 = 2;

fn rig() -> (TempDir, Client) {
    let dir = tempdir().unwrap();
    let client = Client::new(dir.path());
    (dir, client)
}

#[test]
fn files_are_made_written_and_read() {
    let (dir, c) = rig();
    let (file, handle) = c.create(ROOT, "a", RDWR).unwrap();
    assert_eq!((file.size, file.mode & 0o170_000), (0, 0o100_000));
    assert_eq!(file.owner, (0, 0), "what is ours is root's");
    assert_eq!(c.write(handle, 3, b"hello"), Ok(5));
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"\0\0\0hello");
    assert_eq!(c.read(handle, 0, 100).unwrap(), b"\0\0\0hello");
    assert_eq!(c.read(handle, 6, 1).unwrap(), b"l");
    assert_eq!(c.read(handle, 100, 10).unwrap(), b"");
    assert_eq!(c.getattr(file.node).unwrap().size, 8);
    c.call(op::FSYNC, file.node, &longs(&[handle, 0])).unwrap();
    c.call(op::SYNCFS, ROOT, &[0; 8]).unwrap();
    // What it is to be again, as another one.
    assert_eq!(c.create(ROOT, "a", RDWR | 0o200).unwrap_err(), EEXIST);
    let (again, other) = c.create(ROOT, "a", RDWR | 0o1000).unwrap();
    assert_eq!((again.node, again.size), (file.node, 0));
    // It is still itself without its name, as long as it is open.
    c.call(op::UNLINK, ROOT, &name("a")).unwrap();
    assert_eq!(c.getattr(file.node).unwrap().links, 0);
    assert_eq!(c.write(other, 0, b"x"), Ok(1));
    assert_eq!(c.read(handle, 0, 9).unwrap(), b"x");
    for handle in [handle, other] {
        c.release(op::RELEASE, handle).unwrap();
    }
    assert!(c.read(handle, 0, 1).is_err());
    assert!(c.getattr(file.node).is_err());
    assert_eq!(c.lookup(ROOT, "a").unwrap_err(), ENOENT);
}

#[test]
fn big_requests_are_whole() {
    let (dir, c) = rig();
    let (_, handle) = c.create(ROOT, "big", RDWR).unwrap();
    let bytes: Vec<u8> = (0..1 << 20_u32).map(|n| (n / 7) as u8).collect();
    assert_eq!(c.write(handle, 0, &bytes), Ok(1 << 20));
    assert_eq!(c.read(handle, 0, 1 << 20).unwrap(), bytes);
    assert_eq!(fs::read(dir.path().join("big")).unwrap(), bytes);
    // More than was agreed on.
    assert!(c.write(handle, 0, &[0; (1 << 20) + 1]).is_err());
    // Copied by the host, and a hole in it.
    let (_, copy) = c.create(ROOT, "copy", RDWR).unwrap();
    let body = longs(&[handle, 5, 0, copy, 0, 1 << 30, 0]);
    let reply = c.call(op::COPY_FILE_RANGE, 0, &body).unwrap();
    assert_eq!(u32_at(&reply, 0), (1 << 20) - 5);
    assert_eq!(fs::read(dir.path().join("copy")).unwrap(), bytes[5..]);
    let punch = [longs(&[copy, 0, 1 << 19]), words(&[3, 0], &[])].concat();
    c.call(op::FALLOCATE, 0, &punch).unwrap();
    let seek = [longs(&[copy, 0]), words(&[3, 0], &[])].concat();
    let data = u64_at(&c.call(op::LSEEK, 0, &seek).unwrap(), 0);
    assert!(data <= 1 << 19, "{data}");
    assert!(c.read(copy, 0, 1 << 19).unwrap().iter().all(|&b| b == 0));
}

#[test]
fn names_change() {
    let (dir, c) = rig();
    let path = |name: &str| dir.path().join(name);
    let folder = |text: &str| words(&[0o755, 0], &[&name(text)]);
    let d = c.entry(op::MKDIR, ROOT, &folder("d")).unwrap();
    let e = c.entry(op::MKDIR, d.node, &folder("e")).unwrap();
    let (file, handle) = c.create(e.node, "file", RDWR).unwrap();
    assert_eq!(c.call(op::RMDIR, ROOT, &name("d")), Err(ENOTEMPTY));
    // A whole tree moves, and what is known of it goes along.
    let rename = |to: u64, a: &str, b: &str| [longs(&[to]), name(a), name(b)].concat();
    c.call(op::RENAME, ROOT, &rename(ROOT, "d", "D")).unwrap();
    assert!(path("D/e/file").is_file() && !path("d").exists());
    assert_eq!(c.getattr(file.node).unwrap().size, 0);
    c.call(op::RENAME, e.node, &rename(d.node, "file", "moved"))
        .unwrap();
    assert_eq!(c.lookup(d.node, "moved").unwrap().node, file.node);
    // Only if there is nothing, and both at once.
    fs::write(path("D/other"), b"12").unwrap();
    let rename2 = |flags: u64| [longs(&[d.node, flags]), name("moved"), name("other")].concat();
    assert_eq!(c.call(op::RENAME2, d.node, &rename2(1)), Err(EEXIST));
    let other = c.lookup(d.node, "other").unwrap();
    c.call(op::RENAME2, d.node, &rename2(2)).unwrap();
    assert_eq!(fs::read(path("D/moved")).unwrap(), b"12");
    assert_eq!(c.getattr(other.node).unwrap().size, 2);
    // Whiteouts are device files.
    assert!(c.call(op::RENAME2, d.node, &rename2(4)).is_err());
    // Links of both kinds.
    let link = [longs(&[file.node]), name("hard")].concat();
    let hard = c.entry(op::LINK, ROOT, &link).unwrap();
    assert_eq!((hard.node, hard.links), (file.node, 2));
    c.call(op::UNLINK, d.node, &name("other")).unwrap();
    assert_eq!(c.getattr(file.node).unwrap().links, 1);
    c.release(op::RELEASE, handle).unwrap();
    let target = "/etc/../no/matter\\what";
    let soft = [name("soft"), name(target)].concat();
    let soft = c.entry(op::SYMLINK, ROOT, &soft).unwrap();
    assert_eq!(soft.mode & 0o170_000, 0o120_000);
    let reply = c.call(op::READLINK, soft.node, &[]).unwrap();
    assert_eq!(reply, target.as_bytes());
    c.call(op::RMDIR, d.node, &name("e")).unwrap();
    assert!(!path("D/e").exists());
}

#[test]
fn folders_are_listed_whole_with_any_room() {
    let (dir, c) = rig();
    let mut expected: Vec<String> = (0..500).map(|n| format!("{n:0>100}")).collect();
    for name in &expected {
        fs::write(dir.path().join(name), name).unwrap();
    }
    symlink("nowhere", dir.path().join("link")).unwrap();
    expected.push("link".into());
    expected.sort();
    for opcode in [op::READDIR, op::READDIRPLUS] {
        for room in [300, 4096, 65_536] {
            assert_eq!(c.list(ROOT, opcode, room).unwrap(), expected, "{room}");
        }
    }
}

#[test]
fn attributes_are_set() {
    let (dir, c) = rig();
    let path = dir.path().join("f");
    fs::write(&path, b"12345").unwrap();
    let node = c.lookup(ROOT, "f").unwrap().node;
    // valid, size, atime, mtime, (nanoseconds,) mode, owner.
    let set = |valid: u32, size: u64, mtime: u64, mode: u32, owner: (u32, u32)| {
        let body = [
            words(&[valid, 0], &[]),
            longs(&[0, size, 0, 5, mtime, 0]),
            words(&[7, 8, 0, mode, 0, owner.0, owner.1, 0], &[]),
        ];
        c.call(op::SETATTR, node, &body.concat()).map(drop)
    };
    set(8, 3, 0, 0, (0, 0)).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"123");
    set(16 | 32, 0, 1_000_000_000, 0, (0, 0)).unwrap();
    let found = fs::metadata(&path).unwrap();
    assert_eq!((found.mtime(), found.mtime_nsec()), (1_000_000_000, 8));
    assert_eq!((found.atime(), found.atime_nsec()), (5, 7));
    // Bits that would lend the host user's rights to others are not set.
    set(1, 0, 0, 0o6750, (0, 0)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o750);
    // To itself.
    set(2 | 4, 0, 0, 0, (0, 0)).unwrap();
    assert_eq!(set(2, 0, 0, 0, (1000, 0)), Err(EPERM));
    assert_eq!(set(4, 0, 0, 0, (0, 1000)), Err(EPERM));
    assert!(set(8, u64::MAX, 0, 0, (0, 0)).is_err());
    let reply = c.call(op::STATFS, ROOT, &[]).unwrap();
    assert_eq!(reply.len(), 80);
    assert!(u64_at(&reply, 0) > 0);
}

#[test]
fn bits_that_lend_rights_go_when_others_write() {
    let (dir, c) = rig();
    let path = dir.path().join("f");
    fs::write(&path, b"12345").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
    let node = c.lookup(ROOT, "f").unwrap().node;
    let handle = c.open(node, RDWR).unwrap();
    let body = [longs(&[handle, 0]), words(&[1, 4, 0, 0, 0, 0], &[b"x"])].concat();
    c.call(op::WRITE, node, &body).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn extended_attributes_are_the_users() {
    let (dir, c) = rig();
    fs::write(dir.path().join("f"), b"").unwrap();
    let node = c.lookup(ROOT, "f").unwrap().node;
    let set = |key: &str, value: &[u8]| {
        let body = words(&[value.len() as u32, 0], &[&name(key), value]);
        c.call(op::SETXATTR, node, &body)
    };
    let get =
        |opcode: u32, size: u32, key: &str| c.call(opcode, node, &words(&[size, 0], &[&name(key)]));
    match set("user.one", b"value") {
        // The host's file system has none.
        Err(EOPNOTSUPP) => return,
        done => drop(done.unwrap()),
    }
    assert_eq!(get(op::GETXATTR, 100, "user.one").unwrap(), b"value");
    let size = get(op::GETXATTR, 0, "user.one").unwrap();
    assert_eq!((u32_at(&size, 0), size.len()), (5, 8));
    assert_eq!(get(op::GETXATTR, 4, "user.one"), Err(ERANGE));
    assert_eq!(get(op::GETXATTR, 100, "user.two"), Err(ENODATA));
    assert_eq!(get(op::LISTXATTR, 100, "").unwrap(), b"user.one\0");
    for key in [
        "security.capability",
        "trusted.x",
        "system.posix_acl_access",
    ] {
        assert_eq!(set(key, b"x"), Err(EOPNOTSUPP), "{key}");
        assert_eq!(get(op::GETXATTR, 9, key), Err(EOPNOTSUPP), "{key}");
    }
    c.call(op::REMOVEXATTR, node, &name("user.one")).unwrap();
    assert_eq!(get(op::LISTXATTR, 100, "").unwrap(), b"");
}

#[test]
fn a_read_only_folder_stays_as_it_is() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("f"), b"here").unwrap();
    let c = Client::with(dir.path(), true, 64);
    let node = c.lookup(ROOT, "f").unwrap().node;
    let handle = c.open(node, 0).unwrap();
    assert_eq!(c.read(handle, 0, 10).unwrap(), b"here");
    assert_eq!(c.list(ROOT, op::READDIR, 4096).unwrap(), ["f"]);
    assert_eq!(c.open(node, 1).unwrap_err(), EROFS);
    assert_eq!(c.open(node, RDWR).unwrap_err(), EROFS);
    assert_eq!(c.write(handle, 0, b"x"), Err(EROFS));
    for (opcode, body) in [
        (op::CREATE, words(&[0, 0o644, 0, 0], &[b"x\0"])),
        (op::MKDIR, words(&[0, 0], &[b"x\0"])),
        (op::MKNOD, words(&[0o100644, 0, 0, 0], &[b"x\0"])),
        (op::SYMLINK, b"x\0y\0".to_vec()),
        (op::UNLINK, name("f")),
        (op::RMDIR, name("f")),
        (op::RENAME, [longs(&[1]), b"f\0g\0".to_vec()].concat()),
        (op::RENAME2, [longs(&[1, 0]), b"f\0g\0".to_vec()].concat()),
        (op::LINK, [longs(&[node]), name("g")].concat()),
        (op::SETATTR, vec![0; 88]),
        (op::SETXATTR, words(&[1, 0], &[b"user.x\0y"])),
        (op::REMOVEXATTR, name("user.x")),
        (op::FALLOCATE, vec![0; 32]),
        (op::COPY_FILE_RANGE, vec![0; 56]),
    ] {
        assert_eq!(c.call(opcode, ROOT, &body), Err(EROFS), "{opcode}");
    }
    // Opening it to cut it short is writing, whatever the mode says.
    assert!(c.open(node, 0o1000).is_err());
    assert_eq!(fs::read(dir.path().join("f")).unwrap(), b"here");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}
