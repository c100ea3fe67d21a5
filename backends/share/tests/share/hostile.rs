//! Requests that no kernel sends.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use lodger_share::{Malformed, Options, Share, ShareError};
use tempfile::{TempDir, tempdir};

use crate::client::{Client, ROOT, longs, name, op, u32_at, words};

const EINVAL: i32 = 22;
const ENOSYS: i32 = 38;
const ESTALE: i32 = 116;

/// A folder beside a secret, with links to it of every kind.
fn rig() -> (TempDir, Client) {
    let dir = tempdir().unwrap();
    let inside = dir.path().join("shared");
    fs::create_dir_all(inside.join("folder")).unwrap();
    fs::write(dir.path().join("secret"), b"secret").unwrap();
    fs::write(inside.join("file"), b"file").unwrap();
    symlink("../secret", inside.join("relative")).unwrap();
    symlink(dir.path().join("secret"), inside.join("absolute")).unwrap();
    symlink("..", inside.join("up")).unwrap();
    symlink("/proc/self/root", inside.join("magic")).unwrap();
    let client = Client::new(&inside);
    (dir, client)
}

/// Every operation there is, and some that there are not.
fn every_op() -> impl Iterator<Item = u32> {
    // INIT, DESTROY and what has no answer are looked at elsewhere.
    (0..64).filter(|op| ![2, 26, 36, 38, 42].contains(op))
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let (dir, c) = rig();
    let outside = dir.path().join("secret");
    let absolute = outside.to_str().unwrap();
    let long = "x".repeat(256);
    let node = c.lookup(ROOT, "file").unwrap().node;
    for bad in [
        "",
        ".",
        "..",
        "/",
        "../secret",
        "folder/../../secret",
        "folder/",
        "/etc/passwd",
        absolute,
        &long,
    ] {
        let bad = &name(bad)[..];
        for (opcode, body) in [
            (op::LOOKUP, bad.to_vec()),
            (op::UNLINK, bad.to_vec()),
            (op::RMDIR, bad.to_vec()),
            (op::MKDIR, words(&[0o755, 0], &[bad])),
            (op::MKNOD, words(&[0o100644, 0, 0, 0], &[bad])),
            (op::CREATE, words(&[2, 0o644, 0, 0], &[bad])),
            (op::SYMLINK, [bad, b"target\0"].concat()),
            (op::LINK, [&longs(&[node])[..], bad].concat()),
            (op::RENAME, [&longs(&[1])[..], b"file\0", bad].concat()),
            (op::RENAME, [&longs(&[1])[..], bad, b"file\0"].concat()),
            (op::RENAME2, [&longs(&[1, 0])[..], b"file\0", bad].concat()),
        ] {
            let answer = c.call(opcode, ROOT, &body);
            assert!(matches!(answer, Err(EINVAL | 36)), "{opcode} {bad:?}");
        }
    }
    // A name ends at its NUL; without one there is none.
    assert!(c.call(op::LOOKUP, ROOT, b"file").is_err());
    assert!(c.call(op::LOOKUP, ROOT, b"file\0/../../secret\0").is_ok());
    assert_eq!(fs::read(outside).unwrap(), b"secret");
}

#[test]
fn links_are_never_followed() {
    let (dir, c) = rig();
    for link in ["relative", "absolute", "up", "magic"] {
        let found = c.lookup(ROOT, link).unwrap();
        assert_eq!(found.mode & 0o170_000, 0o120_000, "{link}");
        for flags in [0, 1, 2, 0o1000] {
            assert!(c.open(found.node, flags).is_err(), "{link}");
        }
        assert!(c.call(op::OPENDIR, found.node, &[0; 8]).is_err());
        assert!(c.lookup(found.node, "secret").is_err(), "{link}");
        assert!(c.create(found.node, "new", 2).is_err(), "{link}");
        assert!(c.create(ROOT, link, 2).is_err(), "{link}");
        // A mode and a size.
        for valid in [1, 8] {
            let body = words(&[valid], &[&[0; 84]]);
            assert!(c.call(op::SETATTR, found.node, &body).is_err(), "{link}");
        }
        let body = words(&[1, 0], &[b"user.x\0y"]);
        assert!(c.call(op::SETXATTR, found.node, &body).is_err());
        // Times are those of the link.
        let body = words(&[16 | 32], &[&[0; 84]]);
        c.call(op::SETATTR, found.node, &body).unwrap();
        // So is another name.
        let body = [longs(&[found.node]), name(&format!("{link}2"))].concat();
        let other = c.entry(op::LINK, ROOT, &body).unwrap();
        assert_eq!(other.mode & 0o170_000, 0o120_000, "{link}");
    }
    let secret = dir.path().join("secret");
    let found = fs::metadata(&secret).unwrap();
    assert!(found.modified().unwrap().elapsed().unwrap().as_secs() < 1000);
    assert_eq!(fs::read(secret).unwrap(), b"secret");
}

#[test]
fn what_is_too_short_or_too_long_is_refused() {
    let (_dir, c) = rig();
    let node = c.lookup(ROOT, "file").unwrap().node;
    // The host need not write all its files a thousand times.
    for opcode in every_op().filter(|&opcode| opcode != op::SYNCFS) {
        for len in 0..100 {
            for fill in [0, 1, 0xff] {
                // Whatever comes back, it fits, and nothing breaks.
                for room in [0, 8, 5000] {
                    let _ = c.call_with_room(opcode, node, &vec![fill; len], room);
                }
            }
        }
        assert!(c.call(opcode, ROOT, &vec![b'a'; 70_000]).is_err() || opcode == op::STATFS);
        let _ = c.call(opcode, ROOT, &vec![b'a'; 1 << 17]);
    }
    assert!(c.lookup(ROOT, "file").is_ok());
}

#[test]
fn what_has_no_header_or_no_room_is_malformed() {
    let (_dir, c) = rig();
    for len in 0..40 {
        assert_eq!(c.raw(vec![1; len], 4096), Err(Malformed::NoHeader));
    }
    let mut lookup = words(&[45, op::LOOKUP], &[&[0; 8]]);
    lookup.extend(longs(&[ROOT, 0, 0]));
    lookup.extend(b"file\0");
    for room in 0..16 {
        assert_eq!(c.raw(lookup.clone(), room), Err(Malformed::NoRoom));
    }
    // A header that says another length than there is.
    for (len, error) in [
        (0, EINVAL),
        (39, EINVAL),
        (40, EINVAL),
        (u32::MAX, 0),
        (45, 0),
    ] {
        lookup[..4].copy_from_slice(&len.to_le_bytes());
        let reply = c.raw(lookup.clone(), 4096).unwrap();
        assert_eq!(-(u32_at(&reply, 4) as i32), error, "{len}");
    }
    // No room for the whole answer.
    for room in [16, 100, 143] {
        let reply = c.raw(lookup.clone(), room).unwrap();
        assert_eq!((reply.len(), -(u32_at(&reply, 4) as i32)), (16, EINVAL));
    }
    // What has no answer never gets one.
    let mut forget = words(&[48, op::FORGET], &[&[0; 8]]);
    forget.extend(longs(&[77, 0, 0, 1]));
    assert_eq!(c.raw(forget, 0), Ok(Vec::new()));
    let mut forget = words(&[56, op::BATCH_FORGET], &[&[0; 8]]);
    forget.extend(longs(&[0, 0, 0, u64::MAX, ROOT, u64::MAX]));
    assert_eq!(c.raw(forget, 4096), Ok(Vec::new()));
    assert!(c.lookup(ROOT, "file").is_ok());
}

#[test]
fn numbers_that_were_never_given_lead_nowhere() {
    let (_dir, c) = rig();
    let file = c.lookup(ROOT, "file").unwrap().node;
    for node in [0, 999, u64::MAX, i64::MAX as u64] {
        assert_eq!(c.lookup(node, "file").unwrap_err(), ESTALE);
        assert_eq!(c.getattr(node).unwrap_err(), ESTALE);
        assert_eq!(c.open(node, 0).unwrap_err(), ESTALE);
        let body = [longs(&[node]), name("x")].concat();
        assert_eq!(c.call(op::LINK, ROOT, &body).unwrap_err(), ESTALE);
    }
    let folder = c.lookup(ROOT, "folder").unwrap().node;
    let handle = c.open(file, 0).unwrap();
    let listing = c.call(op::OPENDIR, folder, &[0; 8]).unwrap();
    let listing = u64::from_le_bytes(listing[..8].try_into().unwrap());
    for bad in [0, 999, u64::MAX, listing] {
        assert!(c.read(bad, 0, 10).is_err());
        assert!(c.write(bad, 0, b"x").is_err());
    }
    assert!(c.read(handle, u64::MAX, 10).is_err());
    assert!(c.write(handle, u64::MAX - 3, b"12345").is_err());
    // The handle of a file is none of a folder.
    let body = [longs(&[handle, 0]), words(&[4096; 6], &[])].concat();
    assert!(c.call(op::READDIR, folder, &body).is_err());
    let body = [longs(&[listing, u64::MAX]), words(&[4096; 6], &[])].concat();
    assert!(c.call(op::READDIR, folder, &body).is_err());
    // A file is no folder, nor the other way round.
    assert!(c.lookup(file, "x").is_err());
    assert!(c.open(folder, 0).is_err());
    for opcode in [7, 19, 31, 33, 37, 39, 40, 48, 49, 51, 60, 4096, u32::MAX] {
        assert_eq!(c.call(opcode, ROOT, &[0; 64]), Err(ENOSYS), "{opcode}");
    }
}

#[test]
fn device_files_are_not_made() {
    let (dir, c) = rig();
    for mode in [0o020_666, 0o060_666, 0o120_777, 0o040_755, 0o170_000] {
        let body = words(&[mode, 0x103, 0, 0], &[b"node\0"]);
        assert!(c.call(op::MKNOD, ROOT, &body).is_err(), "{mode:o}");
    }
    // A pipe is one, but nobody here opens it.
    let body = words(&[0o010_644, 0, 0, 0], &[b"pipe\0"]);
    let pipe = c.entry(op::MKNOD, ROOT, &body).unwrap();
    assert_eq!(pipe.mode & 0o170_000, 0o010_000);
    for flags in [0, 1, 2] {
        assert!(c.open(pipe.node, flags).is_err());
        assert!(c.create(ROOT, "pipe", flags).is_err());
    }
    assert!(!dir.path().join("shared/node").exists());
}

#[test]
fn other_versions_are_refused_or_told_ours() {
    let (_dir, c) = rig();
    for (major, minor, works) in [
        (7, 31, true),
        (7, 99, true),
        (7, 30, false),
        (6, 99, false),
        (8, 0, true),
    ] {
        let body = words(&[major, minor, 0, u32::MAX], &[]);
        assert_eq!(c.call(op::INIT, 0, &body).is_ok(), works, "{major}.{minor}");
    }
    assert!(c.call(op::INIT, 0, &[7, 0, 0, 0]).is_err());
}

#[test]
fn what_cannot_be_shared() {
    let (dir, _) = rig();
    let open = |folder: &Path| {
        Share::open(Options {
            folder: folder.into(),
            read_only: false,
            owner: (0, 0),
            files: 16,
        })
    };
    let file = open(&dir.path().join("secret")).unwrap_err();
    assert!(matches!(file, ShareError::NotAFolder(_)), "{file}");
    assert!(file.to_string().contains("share the folder that it is in"));
    let missing = open(&dir.path().join("nothing")).unwrap_err();
    assert!(missing.to_string().contains("No such file"), "{missing}");
}
