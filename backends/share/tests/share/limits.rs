//! What a guest can make the server hold.

use std::fs;
use std::path::PathBuf;

use tempfile::tempdir;

use crate::client::{Client, ROOT, longs, op, words};

const ENFILE: i32 = 23;

/// Descriptors of this process that are below a folder.
fn open_below(folder: &PathBuf) -> usize {
    let all = fs::read_dir("/proc/self/fd").unwrap();
    let links = all.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    links.filter(|path| path.starts_with(folder)).count()
}

#[test]
fn files_that_are_known_take_no_descriptors() {
    let dir = tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    for n in 0..200 {
        fs::create_dir(root.join(format!("{n}"))).unwrap();
        fs::write(root.join(format!("{n}/file")), b"x").unwrap();
    }
    let c = Client::with(&root, false, 32);
    let files: Vec<u64> = (0..200)
        .map(|n| c.walk(&format!("{n}/file")).unwrap().node)
        .collect();
    // Folders that were opened on the way are closed again.
    assert!(open_below(&root) <= 17, "{}", open_below(&root));
    for &file in files.iter().chain(files.iter().rev()) {
        assert_eq!(c.getattr(file).unwrap().size, 1);
        let handle = c.open(file, 0).unwrap();
        assert_eq!(c.read(handle, 0, 9).unwrap(), b"x");
        c.release(op::RELEASE, handle).unwrap();
    }
    assert!(open_below(&root) <= 17, "{}", open_below(&root));
    // What is forgotten is forgotten.
    for &file in &files {
        let mut forget = words(&[48, op::FORGET], &[&[0; 8]]);
        forget.extend(longs(&[file, 0, 0, 1]));
        c.raw(forget, 0).unwrap();
        assert!(c.getattr(file).is_err());
    }
    c.0.reset();
    assert_eq!(open_below(&root), 1, "the folder itself");
}

#[test]
fn open_files_have_an_end() {
    let dir = tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    fs::write(root.join("f"), b"x").unwrap();
    let c = Client::with(&root, false, 32);
    let node = c.lookup(ROOT, "f").unwrap().node;
    let handles: Vec<u64> = (0..16).map(|_| c.open(node, 0).unwrap()).collect();
    assert_eq!(c.open(node, 0), Err(ENFILE));
    assert_eq!(c.call(op::OPENDIR, ROOT, &[0; 8]), Err(ENFILE));
    assert_eq!(c.create(ROOT, "new", 2).unwrap_err(), ENFILE);
    assert!(!root.join("new").exists(), "nothing is half made");
    c.release(op::RELEASE, handles[3]).unwrap();
    c.open(node, 0).unwrap();
    // Another mount begins anew.
    c.call(op::INIT, 0, &words(&[7, 38, 0, 0], &[])).unwrap();
    assert!(c.read(handles[0], 0, 1).is_err());
    assert!(c.getattr(node).is_err(), "numbers are not given again");
    assert_ne!(c.lookup(ROOT, "f").unwrap().node, node);
}
