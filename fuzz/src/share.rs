//! A shared folder, whose guest asks for what the input says.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use lodger_share::{Message, Options, Share};

const LOOKUP: u8 = 1;
const SETATTR: u8 = 4;
const MKDIR: u8 = 9;
const FALLOCATE: u8 = 43;
const COPY_FILE_RANGE: u8 = 47;

/// A request, and the room for its reply.
struct Request {
    given: Vec<u8>,
    room: RefCell<Vec<u8>>,
}

impl Message for Request {
    fn given(&self) -> u64 {
        self.given.len() as u64
    }

    fn room(&self) -> u64 {
        self.room.borrow().len() as u64
    }

    fn take(&self, offset: u64, bytes: &mut [u8]) -> usize {
        let given = self.given.get(offset as usize..).unwrap_or_default();
        let n = given.len().min(bytes.len());
        bytes[..n].copy_from_slice(&given[..n]);
        n
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> usize {
        let mut room = self.room.borrow_mut();
        let room = room.get_mut(offset as usize..).unwrap_or_default();
        let n = room.len().min(bytes.len());
        room[..n].copy_from_slice(&bytes[..n]);
        n
    }

    fn read_file(&self, offset: u64, len: usize, file: BorrowedFd, from: u64) -> io::Result<usize> {
        assert!(offset + len as u64 <= self.room());
        let mut bytes = vec![0; len];
        let n = File::from(file.try_clone_to_owned()?).read_at(&mut bytes, from)?;
        Ok(self.put(offset, &bytes[..n]))
    }

    fn write_file(&self, offset: u64, len: usize, file: BorrowedFd, to: u64) -> io::Result<usize> {
        assert!(offset + len as u64 <= self.given());
        let bytes = &self.given[offset as usize..offset as usize + len];
        File::from(file.try_clone_to_owned()?).write_at(bytes, to)
    }
}

/// The input is requests: operation, node, room in units of 64 bytes, length of the body, body. Nothing beside the folder changes.
pub fn share(data: &[u8]) {
    // Nothing here is to be durable.
    let dir = match Path::new("/dev/shm") {
        shm if shm.is_dir() => tempfile::tempdir_in(shm),
        _ => tempfile::tempdir(),
    };
    let dir = dir.expect("a folder");
    let (inside, secret) = (dir.path().join("shared"), dir.path().join("secret"));
    fs::create_dir_all(inside.join("d")).expect("a folder");
    fs::write(inside.join("f"), b"contents").expect("a file");
    fs::write(inside.join("d/g"), b"more").expect("a file");
    fs::write(&secret, b"secret").expect("a file");
    symlink("../secret", inside.join("l")).expect("a link");
    let options = Options {
        folder: inside,
        read_only: data.first() == Some(&255),
        owner: (0, 0),
        files: 16,
    };
    let share = Share::open(options).expect("a folder");
    let mut rest = data;
    let mut buffer = Vec::new();
    while let [opcode, node, room, len, after @ ..] = rest {
        let len = usize::from(*len).min(after.len());
        let body;
        (body, rest) = after.split_at(len);
        let mut body = body.to_vec();
        tame(*opcode, &mut body);
        let node = match node {
            255 => u64::MAX,
            node => u64::from(node % 8),
        };
        ask(
            &share,
            *opcode,
            node,
            &body,
            usize::from(*room) * 64,
            &mut buffer,
        );
    }
    share.reset();
    let reply = ask(&share, LOOKUP, 1, b"no such name\0", 256, &mut buffer);
    assert_eq!(reply.first(), Some(&16), "it still answers");
    assert_eq!(fs::read(secret).expect("it is there"), b"secret");
    let beside = fs::read_dir(dir.path()).expect("a folder").count();
    assert_eq!(beside, 2, "nothing is beside the folder that was not");
}

/// Keeps a request from using up the host's memory, and from leaving folders that cannot be removed.
fn tame(opcode: u8, body: &mut [u8]) {
    let length = match opcode {
        FALLOCATE => 16..24,
        COPY_FILE_RANGE => 40..48,
        _ => 0..0,
    };
    if let Some(length) = body.get_mut(length).filter(|length| length.len() == 8) {
        length[2..].fill(0);
    }
    match (opcode, body) {
        (SETATTR, [valid, ..]) => *valid &= !1,
        (MKDIR, [low, high, ..]) => (*low, *high) = (*low | 0xc0, *high | 1),
        _ => {}
    }
}

fn ask(
    share: &Share,
    opcode: u8,
    node: u64,
    body: &[u8],
    room: usize,
    buffer: &mut Vec<u8>,
) -> Vec<u8> {
    let mut given = Vec::new();
    given.extend((40 + body.len() as u32).to_le_bytes());
    given.extend(u32::from(opcode).to_le_bytes());
    for word in [7, node, 0, 0] {
        given.extend(u64::to_le_bytes(word));
    }
    given.extend(body);
    let request = Request {
        given,
        room: RefCell::new(vec![0; room]),
    };
    match share.answer(&request, buffer) {
        Ok(len) => {
            let mut reply = request.room.into_inner();
            assert!(len as usize <= reply.len());
            reply.truncate(len as usize);
            if len > 0 {
                assert_eq!(reply[..4], len.to_le_bytes());
                assert_eq!(reply[8..16], 7_u64.to_le_bytes());
            }
            reply
        }
        Err(why) => {
            assert!(!why.to_string().is_empty() && room < 16);
            Vec::new()
        }
    }
}

/// Requests that are understood. What is looked up first is node 2, what is opened first handle 1.
pub fn samples() -> Vec<Vec<u8>> {
    let longs = |longs: &[u64]| -> Vec<u8> { longs.iter().flat_map(|l| l.to_le_bytes()).collect() };
    let request =
        |opcode: u8, node: u8, body: &[u8]| [&[opcode, node, 20, body.len() as u8], body].concat();
    let named = |opcode, node, numbers: &[u64], names: &[u8]| {
        request(opcode, node, &[&longs(numbers)[..], names].concat())
    };
    let init = request(
        26,
        0,
        &[7, 0, 0, 0, 38, 0, 0, 0, 0, 0, 2, 0, 255, 255, 255, 255],
    );
    let files = [
        init.clone(),
        named(LOOKUP, 1, &[], b"f\0"),
        request(14, 2, &[2, 0, 0, 0, 0, 0, 0, 0]),
        named(16, 2, &[1, 3, 4, 0, 0], b"data"),
        named(15, 2, &[1, 0, 100, 0, 0], b""),
        named(46, 2, &[1, 0, 3], b""),
        named(FALLOCATE, 2, &[1, 0, 4096, 1], b""),
        named(35, 1, &[0x1a4_0000_0042, 0], b"new\0"),
        named(COPY_FILE_RANGE, 2, &[1, 0, 3, 2, 0, 100, 0], b""),
        named(SETATTR, 2, &[8, 0, 77, 0, 0, 0, 0, 0, 0, 0, 0], b""),
        named(3, 2, &[0, 0], b""),
        named(20, 2, &[1, 0], b""),
        named(18, 2, &[1, 0, 0], b""),
        named(2, 2, &[1], b""),
    ];
    let names = [
        init.clone(),
        named(LOOKUP, 1, &[], b"d\0"),
        named(LOOKUP, 2, &[], b"g\0"),
        named(MKDIR, 2, &[0x1ed], b"sub\0"),
        named(12, 2, &[1], b"g\0moved\0"),
        named(45, 1, &[2, 2], b"f\0sub\0"),
        named(13, 1, &[3], b"hard\0"),
        named(6, 1, &[], b"soft\0../../secret\0"),
        named(8, 1, &[0x81a4, 0], b"node\0"),
        named(10, 1, &[], b"moved\0"),
        named(11, 2, &[], b"sub\0"),
        named(LOOKUP, 1, &[], b"l\0"),
        named(5, 5, &[], b""),
        named(17, 1, &[], b""),
        named(42, 0, &[2, 2, 1, 3, 1], b""),
    ];
    let others = [
        init,
        named(LOOKUP, 1, &[], b"f\0"),
        named(21, 2, &[3], b"user.a\0abc"),
        named(22, 2, &[100], b"user.a\0"),
        named(23, 2, &[100], b""),
        named(24, 2, &[], b"user.a\0"),
        named(27, 1, &[0], b""),
        named(28, 1, &[1, 0, 1000, 0, 0], b""),
        named(44, 1, &[1, 0, 1000, 0, 0], b""),
        named(29, 1, &[1, 0, 0], b""),
        named(38, 0, &[], b""),
    ];
    vec![files.concat(), names.concat(), others.concat()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_samples_are_understood() {
        for sample in samples() {
            share(&sample);
        }
        // Every one of the first sample has an answer that is no error, but FORGET, which has none.
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), b"contents").unwrap();
        let options = Options {
            folder: dir.path().into(),
            read_only: false,
            owner: (0, 0),
            files: 16,
        };
        let server = Share::open(options).unwrap();
        let sample = samples().remove(0);
        let mut rest = &sample[..];
        while let [opcode, node, room, len, after @ ..] = rest {
            let (body, others) = after.split_at((*len).into());
            rest = others;
            let room = usize::from(*room) * 64;
            let reply = ask(
                &server,
                *opcode,
                (*node).into(),
                body,
                room,
                &mut Vec::new(),
            );
            assert!(reply.is_empty() || reply[4..8] == [0; 4], "{opcode}");
        }
    }
}
