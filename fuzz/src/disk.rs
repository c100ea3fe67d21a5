//! Disk images that nobody made.

use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use lodger_block::{BlockBackend, Convert, Format, check, convert, info, open};

/// The file is an image, opened in every way and written to. It cannot name other files, because it is recognised by its
/// contents at most, or has none that would be there.
pub fn disk_image(data: &[u8]) {
    // Nothing here is to be durable.
    let dir = match Path::new("/dev/shm") {
        shm if shm.is_dir() => shm.to_path_buf(),
        _ => std::env::temp_dir(),
    };
    let file: File = tempfile::tempfile_in(&dir).expect("a file");
    (&file).write_all(data).expect("memory");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let told = |e: &dyn std::fmt::Display| assert!(!e.to_string().is_empty());
    if let Err(e) = info(&path, None) {
        told(&e);
    }
    for (read_only, format) in [(true, None), (true, Some(Format::Qcow2)), (false, None)] {
        match open(&path, read_only, format) {
            Ok(disk) => use_disk(&*disk),
            Err(e) => told(&e),
        }
    }
    for repair in [false, true, false] {
        match check(&path, None, repair) {
            Ok(report) => assert!(report.errors > 0 || report.messages.is_empty()),
            Err(e) => told(&e),
        }
    }
    let to = dir.join(format!("lodger-fuzz-{}", std::process::id()));
    let mut steps = 0;
    let mut stop = |_, _| {
        steps += 1;
        match steps {
            ..50 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    };
    let job = Convert {
        from: &path,
        from_format: None,
        to: &to,
        format: Format::Raw,
    };
    if convert(&job, &mut stop).is_ok() {
        std::fs::remove_file(&to).expect("it is there");
    }
}

fn use_disk(disk: &dyn BlockBackend) {
    let size = disk.size_bytes();
    assert_eq!(size % 512, 0);
    let mut buffer = [0; 5000];
    let places = [0, 300, 1024, 4096, size / 2, size.saturating_sub(5000)];
    for (n, &at) in places.iter().enumerate() {
        let len = buffer.len().min(size.saturating_sub(at) as usize);
        // An error is an answer, too.
        let _ = disk.read_at(at, &mut buffer[..len]);
        let _ = disk.extent(at);
        if !disk.read_only() {
            let _ = disk.write_at(at, &vec![n as u8; len / 2]);
            let _ = disk.write_zeroes(at, (len / 2) as u64, n % 2 == 0);
            let _ = disk.discard(at, len as u64);
        }
    }
    assert!(disk.read_at(size, &mut [0]).is_err());
    assert!(disk.read_at(u64::MAX, &mut [0; 2]).is_err());
    let _ = disk.flush();
}

/// Small images: with clusters of 512 bytes, data, compressed and zero clusters, version 2 and 3, zlib and zstd.
pub(crate) fn samples() -> Vec<Vec<u8>> {
    vec![
        image(3, false),
        image(3, true),
        image(2, false),
        b"a raw disk".repeat(100),
    ]
}

fn image(version: u32, zstd: bool) -> Vec<u8> {
    const CLUSTER: usize = 512;
    let mut file = vec![0; 7 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let at = |cluster: usize| ((cluster * CLUSTER) as u64).to_be_bytes();
    put(0, b"QFI\xfb");
    put(4, &version.to_be_bytes());
    put(20, &9_u32.to_be_bytes());
    put(24, &(40 * CLUSTER as u64).to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &at(3));
    put(48, &at(1));
    put(56, &1_u32.to_be_bytes());
    if version == 3 {
        put(72, &(u64::from(zstd) << 3).to_be_bytes());
        put(96, &4_u32.to_be_bytes());
        put(100, &112_u32.to_be_bytes());
        put(104, &[zstd.into()]);
    }
    put(CLUSTER, &at(2));
    for n in 0..7 {
        put(2 * CLUSTER + 2 * n, &[0, 1]);
    }
    let copied = 1_u64 << 63;
    let entry = |cluster: usize| (copied | (cluster * CLUSTER) as u64).to_be_bytes();
    put(3 * CLUSTER, &entry(4));
    put(4 * CLUSTER, &entry(5));
    // In the last cluster, with no further sectors.
    put(
        4 * CLUSTER + 8,
        &((1 << 62) | (6 * CLUSTER as u64)).to_be_bytes(),
    );
    put(
        4 * CLUSTER + 16,
        &[0, 0, 0, 0, 0, 0, 0, (version == 3).into()],
    );
    put(5 * CLUSTER, b"some data");
    put(6 * CLUSTER, &packed(&[7; CLUSTER], zstd));
    file
}

fn packed(bytes: &[u8], zstd: bool) -> Vec<u8> {
    if zstd {
        return zstd::bulk::compress(bytes, 1).expect("memory");
    }
    let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    deflate.write_all(bytes).expect("memory");
    deflate.finish().expect("memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_samples_are_sound() {
        for (n, bytes) in samples().into_iter().enumerate() {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&bytes).unwrap();
            let disk = open(file.path(), true, None).unwrap();
            let mut all = vec![0; disk.size_bytes() as usize];
            disk.read_at(0, &mut all).unwrap();
            assert!(check(file.path(), None, false).unwrap().is_sound(), "{n}");
            if n < 3 {
                assert_eq!(all[512..1024], [7; 512]);
            }
        }
    }
}
