//! qcow2 images as disks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lodger_block::{BlockBackend, CreateOptions, Format, OpenError, Overlay, check, create, open};
use tempfile::TempDir;

use crate::sample::Sample;
use crate::{Random, qemu_img_agrees, text};

fn dir() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

fn put(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).expect("a file");
    path
}

fn contents(disk: &dyn BlockBackend) -> Vec<u8> {
    let mut bytes = vec![0; disk.size_bytes() as usize];
    disk.read_at(0, &mut bytes).expect("it can be read");
    bytes
}

fn new(path: &Path, size: u64, backing: Option<&str>) {
    let options = CreateOptions {
        format: Format::Qcow2,
        size: Some(size),
        backing: backing.map(Into::into),
        backing_format: None,
    };
    create(path, &options).expect("it can be made");
}

/// QEMU's own tool finds the image `path` sound and equal to `raw`.
fn qemu_img_sees_the_same(path: &Path, raw: &Path) {
    let (path, raw) = (text(path), text(raw));
    qemu_img_agrees(&["compare", "-f", "qcow2", "-F", "raw", path, raw]);
    qemu_img_agrees(&["check", "-f", "qcow2", path]);
}

#[test]
fn samples_are_read() {
    for version in [2, 3] {
        for cluster_bits in [9, 12, 16, 21] {
            for zstd in [false, true] {
                let sample = Sample {
                    version,
                    cluster_bits,
                    zstd,
                    ..Sample::PLAIN
                };
                if zstd && version == 2 {
                    continue;
                }
                let dir = dir();
                let (file, mut disk) = sample.build(8);
                let path = put(&dir, "a", &file);
                let line = format!("version {version}, clusters of 2^{cluster_bits}, zstd {zstd}");
                let image = open(&path, true, None).expect("it can be opened");
                assert!(contents(&*image) == disk, "{line}");
                let mut part = vec![0; disk.len() / 2];
                image.read_at(77, &mut part).expect("it can be read");
                assert!(part == disk[77..77 + part.len()], "{line}");
                let report = check(&path, None, false).expect("it can be checked");
                assert!(report.is_sound(), "{line}: {report:?}");
                assert_eq!(report.compressed_clusters, 2, "{line}");
                drop(image);
                let raw = put(&dir, "raw", &disk);
                qemu_img_sees_the_same(&path, &raw);
                match open(&path, false, None) {
                    Ok(image) => {
                        assert!(!zstd && contents(&*image) == disk, "{line}");
                        image.write_at(1, &[0xee; 700]).expect("it can be written");
                        disk[1..701].fill(0xee);
                        assert!(contents(&*image) == disk, "{line}");
                    }
                    Err(error) => assert!(zstd && error.to_string().contains("zstd"), "{error}"),
                }
                let report = check(&path, None, false).expect("it can be checked");
                assert!(report.is_sound(), "{line}: {report:?}");
                qemu_img_agrees(&["check", "-f", "qcow2", text(&path)]);
            }
        }
    }
}

/// Does some thousand things to a disk and to a vector; they must stay equal.
fn exercise(disk: &dyn BlockBackend, copy: &mut [u8], seed: u64, rounds: usize) {
    let mut random = Random(seed);
    let size = copy.len();
    for round in 0..rounds {
        let offset = random.below(size);
        let most = [700, 5000, 200_000][random.below(3)];
        let len = random.below((size - offset).min(most) + 1);
        let (at, n) = (offset as u64, len as u64);
        let part = &mut copy[offset..offset + len];
        match random.below(12) {
            0..5 => {
                part.fill(round as u8 | 1);
                disk.write_at(at, part).expect("it can be written");
            }
            5 => {
                part.fill(0);
                disk.write_zeroes(at, n, round % 2 == 0)
                    .expect("it can be zeroed");
            }
            6 => {
                disk.discard(at, n).expect("it can be discarded");
                let mut now = vec![0; len];
                disk.read_at(at, &mut now).expect("it can be read");
                let old_or_zero = |(new, old): (&u8, &u8)| *new == *old || *new == 0;
                assert!(now.iter().zip(&*part).all(old_or_zero), "{seed} {round}");
                part.copy_from_slice(&now);
            }
            7 => disk.flush().expect("it can be flushed"),
            _ => {
                let mut found = vec![0xee; len];
                disk.read_at(at, &mut found).expect("it can be read");
                assert!(found == part, "{seed} {round}: {offset} {len}");
            }
        }
    }
}

#[test]
fn a_new_image_behaves_like_bytes() {
    let dir = dir();
    let path = dir.path().join("a.qcow2");
    // Not whole clusters.
    let size = (5 << 20) + 1536;
    new(&path, size, None);
    let mut copy = vec![0; size as usize];
    for seed in 1..4 {
        let disk = open(&path, false, None).expect("it can be opened");
        assert_eq!((disk.size_bytes(), disk.read_only()), (size, false));
        exercise(&*disk, &mut copy, seed, 1500);
        let beyond = [(size, 1), (size - 5, 6), (u64::MAX, 2)];
        for (offset, len) in beyond {
            let mut buf = vec![0; len];
            assert!(disk.read_at(offset, &mut buf).is_err());
            assert!(disk.write_at(offset, &buf).is_err());
            assert!(disk.discard(offset, len as u64).is_err());
            assert!(disk.write_zeroes(offset, len as u64, true).is_err());
        }
        disk.flush().expect("it can be flushed");
        drop(disk);
        // The writer is a crate, the reader is ours.
        let reader = open(&path, true, None).expect("it can be opened");
        assert!(contents(&*reader) == copy, "{seed}");
        let report = check(&path, None, false).expect("it can be checked");
        assert!(report.is_sound(), "{report:?}");
        drop(reader);
        let raw = put(&dir, "raw", &copy);
        qemu_img_sees_the_same(&path, &raw);
    }
}

#[test]
fn images_continue_others() {
    let dir = dir();
    let (file, mut below) = Sample {
        zstd: true,
        ..Sample::PLAIN
    }
    .build(8);
    put(&dir, "base", &file);
    // Larger than what it continues.
    let size = below.len() as u64 + (1 << 20) + 512;
    let (middle, top) = (dir.path().join("middle"), dir.path().join("top"));
    new(&middle, size, Some("base"));
    below.resize(size as usize, 0);
    let disk = open(&middle, false, Some(Format::Qcow2)).expect("it can be opened");
    exercise(&*disk, &mut below, 7, 500);
    disk.flush().expect("it can be flushed");
    drop(disk);
    new(&top, size, Some("middle"));
    let middle_before = std::fs::read(&middle).expect("the image");
    let mut copy = below.clone();
    let disk = open(&top, false, Some(Format::Qcow2)).expect("it can be opened");
    exercise(&*disk, &mut copy, 8, 1000);
    drop(disk);
    let reader = open(&top, true, Some(Format::Qcow2)).expect("it can be opened");
    assert!(contents(&*reader) == copy);
    drop(reader);
    assert!(std::fs::read(&middle).expect("the image") == middle_before);
    let raw = put(&dir, "raw", &copy);
    qemu_img_agrees(&[
        "compare",
        "-f",
        "qcow2",
        "-F",
        "raw",
        text(&top),
        text(&raw),
    ]);
    for image in [&middle, &top] {
        let report = check(image, None, false).expect("it can be checked");
        assert!(report.is_sound(), "{report:?}");
        qemu_img_agrees(&["check", "-f", "qcow2", text(image)]);
    }
    // What is recognised by its contents gets no other file.
    for (image, read_only) in [(&top, false), (&top, true), (&middle, true)] {
        let error = open(image, read_only, None).err().expect("refused");
        assert!(
            matches!(error, OpenError::BackingNotTrusted { .. }),
            "{error}"
        );
        assert!(error.to_string().contains("format=qcow2"), "{error}");
    }
    // A machine that writes an image keeps others from writing what is behind it.
    let _top = open(&top, false, Some(Format::Qcow2)).expect("it can be opened");
    let error = open(&middle, false, Some(Format::Qcow2))
        .err()
        .expect("in use");
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
}

#[test]
fn a_temporary_disk_begins_with_an_image() {
    let dir = dir();
    let (file, mut copy) = Sample {
        zstd: true,
        ..Sample::PLAIN
    }
    .build(9);
    let path = put(&dir, "a", &file);
    let disk = Overlay::open(&path, None, dir.path()).expect("it can be opened");
    exercise(&disk, &mut copy, 3, 500);
    assert!(std::fs::read(&path).expect("the image") == file);
}

/// What is said to be in a file is there.
#[test]
fn bytes_are_found_in_files() {
    use std::os::unix::fs::FileExt;
    let dir = dir();
    let (file, disk) = Sample::PLAIN.build(8);
    let base = put(&dir, "base", &file);
    let top = dir.path().join("top");
    new(&top, disk.len() as u64 + 4096, Some("base"));
    {
        let top = open(&top, false, Some(Format::Qcow2)).expect("it can be opened");
        top.write_at(5 << 16, &[9; 1 << 16]).expect("written");
        top.flush().expect("flushed");
    }
    let overlay = Overlay::open(&base, None, dir.path()).expect("it can be opened");
    let disks: [(Arc<dyn BlockBackend>, usize); 3] = [
        (open(&base, true, None).expect("opened"), 2),
        (open(&top, true, Some(Format::Qcow2)).expect("opened"), 3),
        (Arc::new(overlay), 2),
    ];
    for (disk, expected) in disks {
        let mut found = 0;
        for cluster in 0..8_u64 {
            let (at, len) = ((cluster << 16) + 512, 5000);
            let mut bytes = vec![0; len];
            disk.read_at(at, &mut bytes).expect("read");
            assert!(disk.direct(at, len as u64, true).is_none());
            let Some(direct) = disk.direct(at, len as u64, false) else {
                continue;
            };
            found += 1;
            let file = direct.file.try_clone_to_owned().expect("a file");
            let mut there = vec![1; len];
            let read = std::fs::File::from(file).read_exact_at(&mut there, direct.offset);
            read.expect("read");
            assert!(there == bytes, "{cluster}");
            // Not beyond what is in one piece.
            assert!(disk.direct(at, 1 << 16, false).is_none());
        }
        assert_eq!(found, expected);
        assert!(disk.direct(disk.size_bytes() - 512, 512, false).is_none());
    }
}

#[test]
fn several_threads_write_at_once() {
    let dir = dir();
    let path = dir.path().join("a.qcow2");
    new(&path, 8 << 20, None);
    let disk: Arc<dyn BlockBackend> = open(&path, false, None).expect("it can be opened");
    let part = 2 << 20;
    std::thread::scope(|s| {
        for n in 0..4_u64 {
            let disk = &disk;
            s.spawn(move || {
                let mut random = Random(n + 1);
                let mut copy = vec![0; part];
                let start = n * part as u64;
                for round in 0..300 {
                    let offset = random.below(part);
                    let len = random.below((part - offset).min(90_000) + 1);
                    let at = start + offset as u64;
                    match random.below(8) {
                        0 => {
                            disk.write_zeroes(at, len as u64, true).expect("zeroed");
                            copy[offset..offset + len].fill(0);
                        }
                        1 => disk.flush().expect("flushed"),
                        _ => {
                            copy[offset..offset + len].fill(round as u8);
                            disk.write_at(at, &copy[offset..offset + len])
                                .expect("written");
                        }
                    }
                }
                let mut found = vec![0; part];
                disk.read_at(start, &mut found).expect("read");
                assert!(found == copy, "{n}");
            });
        }
    });
    drop(disk);
    assert!(check(&path, None, false).expect("checked").is_sound());
    qemu_img_agrees(&["check", "-f", "qcow2", text(&path)]);
}

#[test]
fn discarded_clusters_are_given_back() {
    use std::os::unix::fs::MetadataExt;
    let dir = dir();
    let path = dir.path().join("a.qcow2");
    new(&path, 8 << 20, None);
    let disk = open(&path, false, None).expect("it can be opened");
    disk.write_at(0, &vec![1; 8 << 20]).expect("written");
    disk.flush().expect("flushed");
    let blocks = || path.metadata().expect("a file").blocks();
    let before = blocks();
    disk.discard(1 << 20, 6 << 20).expect("discarded");
    disk.flush().expect("flushed");
    assert!(blocks() < before / 2, "{before} {}", blocks());
}

/// A guest must not turn the disk that it was given into one that reads other files.
#[test]
fn a_raw_disk_stays_one() {
    let dir = dir();
    put(&dir, "secret", &[7; 4096]);
    let (header, _) = Sample {
        backing: Some(("secret", Some("raw"))),
        ..Sample::PLAIN
    }
    .build(4);
    let path = put(&dir, "disk", &vec![0; header.len()]);
    let disk = open(&path, false, None).expect("it can be opened");
    for (offset, len) in [(0, 512), (0, 4), (0, header.len())] {
        let error = disk.write_at(offset, &header[..len]).expect_err("refused");
        assert!(error.to_string().contains("format=raw"), "{error}");
    }
    disk.write_at(0, &header[..2]).expect("not yet a header");
    disk.write_at(2, &header[2..4]).expect_err("a header");
    disk.write_at(4, &header[4..]).expect("not a header");
    drop(disk);
    // Where somebody has said that it is raw, it may look like anything.
    let disk = open(&path, false, Some(Format::Raw)).expect("it can be opened");
    disk.write_at(0, &header).expect("anything");
    drop(disk);
    let error = open(&path, false, None).err().expect("refused");
    assert!(
        matches!(error, OpenError::BackingNotTrusted { .. }),
        "{error}"
    );
    let disk = open(&path, true, Some(Format::Raw)).expect("it can be opened");
    assert!(contents(&*disk) == header);
}

#[test]
fn what_cannot_be_used_is_named() {
    let refused = |sample: Sample, read_only, expected: &str| {
        let dir = dir();
        let path = put(&dir, "disk", &sample.build(4).0);
        let error = open(&path, read_only, Some(Format::Qcow2)).err();
        let error = error.unwrap_or_else(|| panic!("{expected}")).to_string();
        assert!(error.contains(expected), "{error}");
        assert!(error.contains(text(&path)), "{error}");
    };
    let backing = |name, format| Sample {
        backing: Some((name, format)),
        ..Sample::PLAIN
    };
    let incompatible = |incompatible| Sample {
        incompatible,
        ..Sample::PLAIN
    };
    refused(
        backing("nowhere", Some("raw")),
        true,
        "nowhere: there is no such file",
    );
    refused(backing("nowhere", None), false, "which format");
    refused(
        backing("nowhere", Some("vmdk")),
        true,
        "unknown format 'vmdk'",
    );
    refused(
        backing("/dev/zero", Some("raw")),
        true,
        "a character device",
    );
    refused(backing("disk", Some("qcow2")), true, "more than 16 images");
    refused(incompatible(1), false, "not closed properly");
    refused(incompatible(2), false, "disk check --repair");
    refused(incompatible(4), true, "its data in another file");
    let dir = dir();
    for (magic, format) in [
        (&b"KDMV"[..], "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"conectix", "VHD"),
    ] {
        let mut bytes = magic.to_vec();
        bytes.resize(1024, 0);
        let path = put(&dir, "other", &bytes);
        let error = open(&path, true, None).err().expect("refused").to_string();
        assert!(error.contains(format), "{error}");
        assert!(open(&path, true, Some(Format::Raw)).is_ok());
    }
    let path = put(&dir, "raw", &[0; 1024]);
    let error = open(&path, true, Some(Format::Qcow2))
        .err()
        .expect("refused");
    assert!(error.to_string().contains("not a qcow2 image"), "{error}");
}

#[test]
fn damage_is_found_and_put_right() {
    let (good, disk) = Sample::PLAIN.build(8);
    let cluster = 1 << 16;
    // The cluster of the file, and what is written there: the counts of clusters 5 and 20, the flag of the first L2 entry, the dirty bit.
    for (at, value, errors, leaks) in [
        (2 * cluster + 10, 0_u8, 0, 0),
        (2 * cluster + 11, 0, 1, 0),
        (2 * cluster + 11, 2, 0, 1),
        (2 * cluster + 15, 9, 0, 1),
        (4 * cluster, 0, 1, 0),
        (79, 1, 0, 0),
    ] {
        let dir = dir();
        let mut bad = good.clone();
        bad[at] = value;
        let damaged = bad != good;
        let path = put(&dir, "a", &bad);
        let report = check(&path, None, false).expect("it can be checked");
        assert_eq!(
            (report.errors, report.leaks),
            (errors, leaks),
            "{at} {value}"
        );
        assert_eq!(report.is_sound(), !damaged, "{at} {value}");
        let opened = open(&path, false, None);
        assert_eq!(opened.is_ok(), errors == 0 && at != 79, "{at} {value}");
        drop(opened);
        let report = check(&path, None, true).expect("it can be repaired");
        assert_eq!(report.repaired, damaged);
        let report = check(&path, None, false).expect("it can be checked");
        assert!(report.is_sound(), "{report:?}");
        qemu_img_agrees(&["check", "-f", "qcow2", text(&path)]);
        let image = open(&path, false, None).expect("it can be opened");
        assert!(contents(&*image) == disk);
    }
    // No block of counts at all, as a writer leaves it that keeps them for later.
    let dir = dir();
    let mut bad = good.clone();
    bad[cluster..cluster + 8].fill(0);
    bad[79] = 1;
    let path = put(&dir, "a", &bad);
    assert!(
        check(&path, None, true)
            .expect("it can be repaired")
            .repaired
    );
    assert!(check(&path, None, false).expect("checked").is_sound());
    qemu_img_agrees(&["check", "-f", "qcow2", text(&path)]);
    // What points nowhere cannot be guessed.
    let mut bad = good;
    bad[4 * cluster + 1] = 1;
    let path = put(&dir, "b", &bad);
    assert!(check(&path, None, false).expect("checked").errors > 0);
    let error = check(&path, None, true).expect_err("it cannot be repaired");
    assert!(error.to_string().contains("cannot be repaired"), "{error}");
}
