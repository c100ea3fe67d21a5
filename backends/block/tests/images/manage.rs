//! Images as files.

use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use lodger_block::{
    Convert, CreateOptions, Format, ManageError, check, convert, create, info, open, resize,
};

use crate::sample::Sample;
use crate::{qemu_img, qemu_img_agrees, text};

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("a directory");
    let mut names: Vec<_> = entries
        .map(|e| {
            e.expect("an entry")
                .file_name()
                .into_string()
                .expect("ASCII")
        })
        .collect();
    names.sort();
    names
}

fn plain(format: Format, size: u64) -> CreateOptions {
    CreateOptions {
        format,
        size: Some(size),
        backing: None,
        backing_format: None,
    }
}

fn onward(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn images_are_made_and_grow() {
    let dir = tempfile::tempdir().expect("a directory");
    for (format, name) in [(Format::Raw, "a.img"), (Format::Qcow2, "a.qcow2")] {
        let path = dir.path().join(name);
        assert_eq!(
            create(&path, &plain(format, 3 << 20)).expect("made"),
            3 << 20
        );
        let again = create(&path, &plain(format, 1 << 20)).expect_err("it exists");
        assert!(matches!(again, ManageError::Exists(_)), "{again}");
        {
            let disk = open(&path, false, None).expect("opened");
            disk.write_at((3 << 20) - 3, &[1, 2, 3]).expect("written");
            let used = resize(&path, None, |_| 9 << 20).expect_err("in use");
            assert!(used.to_string().contains("another process"), "{used}");
        }
        let sizes = resize(&path, None, |old| old + (4 << 30)).expect("grown");
        assert_eq!(sizes, (3 << 20, (4 << 30) + (3 << 20)));
        let smaller = resize(&path, None, |_| 1 << 20).expect_err("smaller");
        assert!(smaller.to_string().contains("only grows"), "{smaller}");
        let disk = open(&path, false, None).expect("opened");
        assert_eq!(disk.size_bytes(), sizes.1);
        let mut end = [9; 8];
        disk.read_at((3 << 20) - 3, &mut end).expect("read");
        assert_eq!(end, [1, 2, 3, 0, 0, 0, 0, 0]);
        disk.write_at(sizes.1 - 4, &[5; 4]).expect("written");
        drop(disk);
        let found = info(&path, None).expect("described");
        assert_eq!((found.format, found.size), (format, sizes.1));
        assert!(found.allocated < 2 << 20, "{found:?}");
        assert!(check(&path, None, false).expect("checked").is_sound());
        if format == Format::Qcow2 {
            qemu_img_agrees(&["check", "-f", "qcow2", text(&path)]);
        }
    }
    for size in [0, 100, 1 << 60] {
        let error = create(&dir.path().join("b"), &plain(Format::Raw, size)).expect_err("wrong");
        assert!(matches!(error, ManageError::Size { .. }), "{error}");
    }
    let nowhere = dir.path().join("nowhere/a");
    let error = create(&nowhere, &plain(Format::Raw, 512)).expect_err("no directory");
    assert!(error.to_string().contains("nowhere"), "{error}");
    assert_eq!(names(dir.path()), ["a.img", "a.qcow2"]);
}

#[test]
fn an_image_that_continues_another_tells_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let base = dir.path().join("base.img");
    std::fs::write(&base, vec![7; 1 << 20]).expect("a file");
    let top = dir.path().join("top.qcow2");
    let options = |backing: &str| CreateOptions {
        format: Format::Qcow2,
        size: None,
        backing: Some(backing.into()),
        backing_format: None,
    };
    let missing = create(&top, &options("nowhere.img")).expect_err("missing");
    assert!(missing.to_string().contains("nowhere.img"), "{missing}");
    assert_eq!(create(&top, &options("base.img")).expect("made"), 1 << 20);
    let found = info(&top, None).expect("described").qcow2.expect("qcow2");
    assert_eq!(found.backing.as_deref(), Some("base.img"));
    assert_eq!(found.backing_format.as_deref(), Some("raw"));
    assert_eq!(found.backing_path.as_deref(), Some(&*base));
    // Grown, it reads zeroes where there was nothing.
    resize(&top, None, |old| old + 4096).expect("grown");
    resize(&base, None, |old| old + 4096).expect("grown");
    std::fs::write(&base, vec![7; (1 << 20) + 4096]).expect("a file");
    let disk = open(&top, true, Some(Format::Qcow2)).expect("opened");
    let mut bytes = [1; 8192];
    disk.read_at((1 << 20) - 4096, &mut bytes).expect("read");
    assert!(bytes[..4096].iter().all(|&b| b == 7) && bytes[4096..].iter().all(|&b| b == 0));
    drop(disk);
    qemu_img_agrees(&["check", "-f", "qcow2", text(&top)]);
}

#[test]
fn contents_survive_conversions() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name);
    for zstd in [false, true] {
        let sample = Sample {
            zstd,
            ..Sample::PLAIN
        };
        let (file, disk) = sample.build(40);
        std::fs::write(path("a"), file).expect("a file");
        let mut from = path("a");
        for (name, format) in [
            ("b", Format::Raw),
            ("c", Format::Qcow2),
            ("d", Format::Qcow2),
            ("e", Format::Raw),
        ] {
            let to = path(name);
            let job = Convert {
                from: &from,
                from_format: None,
                to: &to,
                format,
            };
            let mut last = 0;
            let mut progress = |done, total| {
                assert!(last <= done && done <= total);
                last = done;
                ControlFlow::Continue(())
            };
            convert(&job, &mut progress).expect("converted");
            let image = open(&to, true, Some(format)).expect("opened");
            let mut bytes = vec![0; disk.len()];
            image.read_at(0, &mut bytes).expect("read");
            assert!(bytes == disk, "{name}");
            drop(image);
            // Zeroes take no space.
            let taken = to.metadata().expect("a file").blocks() * 512;
            assert!(
                taken <= disk.len() as u64 / 2 + (1 << 20),
                "{name}: {taken}"
            );
            assert!(check(&to, None, false).expect("checked").is_sound());
            let format = format.to_string();
            qemu_img_agrees(&[
                "compare",
                "-f",
                "qcow2",
                "-F",
                &format,
                text(&path("a")),
                text(&to),
            ]);
            from = to;
        }
        for name in ["b", "c", "d", "e"] {
            std::fs::remove_file(path(name)).expect("a file");
        }
    }
    // What QEMU makes is understood.
    std::fs::write(
        path("raw"),
        (0..3 << 20)
            .map(|i: u32| (i >> 9) as u8)
            .collect::<Vec<_>>(),
    )
    .expect("a file");
    let (raw, made) = (path("raw"), path("q"));
    for options in [
        "compat=0.10",
        "cluster_size=4k",
        "compression_type=zstd",
        "refcount_bits=1",
    ] {
        let arguments = [
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            options,
            text(&raw),
            text(&made),
        ];
        if qemu_img(&arguments).is_some_and(|(success, _)| success) {
            let image = open(&made, true, None).expect("opened");
            let mut bytes = vec![0; 3 << 20];
            image.read_at(0, &mut bytes).expect("read");
            assert!(bytes == std::fs::read(&raw).expect("a file"), "{options}");
            let report = check(&made, None, false).expect("checked");
            assert!(
                report.is_sound() && report.compressed_clusters > 0,
                "{report:?}"
            );
        }
    }
}

#[test]
fn nothing_is_left_of_what_fails() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut file, _) = Sample::PLAIN.build(40);
    let from = dir.path().join("a");
    std::fs::write(&from, &file).expect("a file");
    let to = dir.path().join("b");
    for format in [Format::Raw, Format::Qcow2] {
        let job = Convert {
            from: &from,
            from_format: None,
            to: &to,
            format,
        };
        let mut steps = 0;
        let mut stop = |_, _| {
            steps += 1;
            match steps {
                1..3 => ControlFlow::Continue(()),
                _ => ControlFlow::Break(()),
            }
        };
        let error = convert(&job, &mut stop).expect_err("stopped");
        assert!(matches!(error, ManageError::Interrupted), "{error}");
        assert_eq!(names(dir.path()), ["a"]);
    }
    // A cluster that cannot be decompressed.
    let cluster = 1 << 16;
    file[6 * cluster + 100..6 * cluster + 200].fill(0xff);
    std::fs::write(&from, &file).expect("a file");
    let job = Convert {
        from: &from,
        from_format: None,
        to: &to,
        format: Format::Qcow2,
    };
    let error = convert(&job, &mut onward).expect_err("damaged");
    assert!(
        error.to_string().contains("cannot read it at byte"),
        "{error}"
    );
    assert_eq!(names(dir.path()), ["a"]);
    std::fs::write(&to, b"mine").expect("a file");
    let error = convert(&job, &mut onward).expect_err("it exists");
    assert!(matches!(error, ManageError::Exists(_)), "{error}");
    assert_eq!(std::fs::read(&to).expect("a file"), b"mine");
}
