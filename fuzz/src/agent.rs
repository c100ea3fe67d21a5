//! What a guest's agent sends to the host: messages, and files as a tar stream.

use std::fs;
use std::path::Path;

use lodger_guest_protocol::{
    FromGuest, ToGuest, UnpackOptions, pack, read, unpack, write, write_data,
};

/// Messages of either side.
pub fn agent_messages(data: &[u8]) {
    let mut rest = data;
    while let Ok(Some(message)) = read::<FromGuest>(&mut rest) {
        let mut bytes = Vec::new();
        write(&mut bytes, &message).expect("what was read can be written");
        let again = read::<FromGuest>(&mut &bytes[..]).expect("and read again");
        assert_eq!(again, Some(message));
    }
    let mut rest = data;
    while let Ok(Some(_)) = read::<ToGuest>(&mut rest) {}
}

pub fn message_samples() -> Vec<Vec<u8>> {
    let mut bytes = Vec::new();
    for message in [
        FromGuest::End,
        FromGuest::Taken(7),
        FromGuest::Errors(b"e".to_vec()),
    ] {
        write(&mut bytes, &message).expect("memory");
    }
    write_data::<FromGuest>(&mut bytes, b"some data").expect("memory");
    vec![bytes]
}

/// A stream of files: whatever it says, it stays where it is put.
pub fn agent_files(data: &[u8]) {
    let outer = tempfile::tempdir().expect("a folder");
    let dir = outer.path().join("dir");
    fs::create_dir(&dir).expect("a folder");
    fs::write(outer.path().join("secret"), "s").expect("a file");
    std::os::unix::fs::symlink("..", dir.join("out")).expect("a link");
    // A wrong checksum would hide what else is wrong.
    let mut stream = data.to_vec();
    for block in stream.chunks_exact_mut(512) {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
        block[154] = 0;
    }
    // It may be as wrong as it likes.
    let _ = unpack(&dir, &stream[..], &UnpackOptions::default());
    let mut left: Vec<_> = (fs::read_dir(outer.path()).expect("a folder"))
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["dir", "secret"]);
    let secret = fs::read(outer.path().join("secret"));
    assert_eq!(secret.expect("a file"), b"s");
}

pub fn file_samples() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().expect("a folder");
    let root = dir.path();
    fs::create_dir(root.join("d")).expect("a folder");
    fs::write(root.join("d/file"), "text").expect("a file");
    fs::write(root.join("n".repeat(120)), "long").expect("a file");
    std::os::unix::fs::symlink("../..", root.join("up")).expect("a link");
    let mut samples = Vec::new();
    for name in ["x", "."] {
        let mut bytes = Vec::new();
        pack(root, Path::new(name), false, &mut bytes).expect("they are there");
        samples.push(bytes);
    }
    samples
}
