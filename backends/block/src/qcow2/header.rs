//! The header of an image ("Header", "Header extensions"), checked before anything else of it is believed.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// The most bytes of an L1 table, as in QEMU.
const LARGEST_L1: u64 = 32 << 20;
/// The most bytes of a refcount table, as in QEMU.
const LARGEST_REFCOUNT_TABLE: u64 = 8 << 20;
/// The most bytes of a backing file's name.
const LONGEST_NAME: u32 = 1023;
/// Incompatible features.
pub(crate) const DIRTY: u64 = 1 << 0;
pub(crate) const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const SUBCLUSTERS: u64 = 1 << 4;
/// Where these features are in the header.
pub(crate) const INCOMPATIBLE_AT: u64 = 72;
/// Extensions.
const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const BITMAPS: u32 = 0x2385_2875;

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Raw deflate.
    Zlib,
    Zstd,
}

impl Compression {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// A backing file, as named in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Backing {
    pub(crate) name: String,
    pub(crate) format: Option<String>,
}

/// A header that makes sense.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    /// Bytes of the disk.
    pub(crate) size: u64,
    pub(crate) l1_entries: u32,
    pub(crate) l1_at: u64,
    pub(crate) refcount_table_at: u64,
    pub(crate) refcount_table_clusters: u32,
    /// Bits of a refcount are 2 to the power of this.
    pub(crate) refcount_order: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_at: u64,
    /// Of the incompatible features those that are states: dirty, corrupt.
    pub(crate) state: u64,
    pub(crate) compression: Compression,
    pub(crate) backing: Option<Backing>,
    pub(crate) has_bitmaps: bool,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut b = [0; 4];
    b.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(b)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

impl Header {
    /// Reads the header of a file of `len` bytes. An error tells what is wrong with the image, for a person.
    pub(crate) fn read(file: &File, len: u64) -> Result<Header, String> {
        let mut head = vec![0; len.min(2 << 20) as usize];
        file.read_exact_at(&mut head, 0)
            .map_err(|e| format!("cannot be read: {e}"))?;
        Header::parse(&head, len)
    }

    /// `head`: the first bytes of the file, 2 MiB if it has as many.
    fn parse(head: &[u8], len: u64) -> Result<Header, String> {
        let wrong = |what: &str| Err(format!("it is a damaged qcow2 image: {what}"));
        let unknown = |what: &str| {
            Err(format!(
                "it is a qcow2 image with {what}, which is not understood; `qemu-img convert -O qcow2` makes one without"
            ))
        };
        if head.len() < 104 && (head.len() < 72 || u32_at(head, 4) != 2) {
            return wrong("it is too short");
        }
        if !head.starts_with(b"QFI\xfb") {
            return Err("it is not a qcow2 image; say format=raw, or nothing, if it is raw".into());
        }
        let version = u32_at(head, 4);
        if !(2..=3).contains(&version) {
            return Err(format!(
                "it is a qcow2 image of version {version}; 2 and 3 are understood"
            ));
        }
        let cluster_bits = u32_at(head, 20);
        if !(9..=21).contains(&cluster_bits) {
            return wrong("the size of its clusters");
        }
        let cluster = 1_u64 << cluster_bits;
        let head = &head[..head.len().min(cluster as usize)];
        if u32_at(head, 32) != 0 {
            return unknown("encryption");
        }
        let (mut features, mut refcount_order, mut header_len) = (0, 4, 72);
        let mut compression = Compression::Zlib;
        if version == 3 {
            features = u64_at(head, 72);
            refcount_order = u32_at(head, 96);
            header_len = u32_at(head, 100) as usize;
            if header_len < 104 || header_len % 8 != 0 || header_len > head.len() {
                return wrong("the length of its header");
            }
            if features & COMPRESSION != 0 {
                compression = match head[..header_len].get(104) {
                    Some(0) => Compression::Zlib,
                    Some(1) => Compression::Zstd,
                    _ => return unknown("an unknown compression"),
                };
            }
        }
        if features & DATA_FILE != 0 {
            return unknown("its data in another file");
        }
        if features & SUBCLUSTERS != 0 {
            return unknown("subclusters (extended_l2)");
        }
        if features & !(DIRTY | CORRUPT | COMPRESSION) != 0 {
            return unknown("an unknown incompatible feature");
        }
        if refcount_order > 6 {
            return wrong("the width of its reference counts");
        }
        let size = u64_at(head, 24);
        let per_l1 = cluster * (cluster / 8);
        let needed = size.div_ceil(per_l1);
        let (l1_entries, l1_at) = (u32_at(head, 36), u64_at(head, 40));
        if u64::from(l1_entries) * 8 > LARGEST_L1 || u64::from(l1_entries) < needed {
            return wrong("the size of its L1 table");
        }
        if size == 0 || !size.is_multiple_of(512) {
            return Err(format!(
                "it is a qcow2 image of {size} bytes; a disk is some sectors of 512 bytes; `qemu-img resize` gives it another size"
            ));
        }
        let refcount_table_at = u64_at(head, 48);
        let refcount_table_clusters = u32_at(head, 56);
        if u64::from(refcount_table_clusters) << cluster_bits > LARGEST_REFCOUNT_TABLE {
            return wrong("the size of its refcount table");
        }
        let inside = |at: u64, bytes: u64| {
            at.is_multiple_of(cluster) && at.checked_add(bytes).is_some_and(|end| end <= len)
        };
        if !inside(l1_at, u64::from(l1_entries) * 8) {
            return wrong("its L1 table is not in the file");
        }
        if !inside(
            refcount_table_at,
            u64::from(refcount_table_clusters) << cluster_bits,
        ) {
            return wrong("its refcount table is not in the file");
        }
        let (name_at, name_len) = (u64_at(head, 8), u32_at(head, 16));
        let end = match name_at {
            0 => head.len(),
            at => usize::try_from(at).unwrap_or(usize::MAX).min(head.len()),
        };
        let mut backing_format = None;
        let mut has_bitmaps = false;
        let mut at = header_len;
        while at + 8 <= end {
            let (kind, len) = (u32_at(head, at), u32_at(head, at + 4) as usize);
            at += 8;
            let Some(data) = head[at..end].get(..len) else {
                break;
            };
            match kind {
                0 => break,
                BACKING_FORMAT => backing_format = Some(String::from_utf8_lossy(data).into_owned()),
                BITMAPS => has_bitmaps = true,
                _ => {}
            }
            at += len.next_multiple_of(8);
        }
        let mut backing = None;
        if name_at != 0 && name_len != 0 {
            let start = usize::try_from(name_at).unwrap_or(usize::MAX);
            let name = head.get(start..).and_then(|rest| {
                (name_len <= LONGEST_NAME).then(|| rest.get(..name_len as usize))?
            });
            let name = name.and_then(|name| std::str::from_utf8(name).ok());
            let Some(name) = name.filter(|name| !name.contains('\0')) else {
                return wrong("the name of its backing file");
            };
            backing = Some(Backing {
                name: name.into(),
                format: backing_format,
            });
        }
        Ok(Header {
            version,
            cluster_bits,
            size,
            l1_entries,
            l1_at,
            refcount_table_at,
            refcount_table_clusters,
            refcount_order,
            snapshots: u32_at(head, 60),
            snapshots_at: u64_at(head, 64),
            state: features & (DIRTY | CORRUPT),
            compression,
            backing,
            has_bitmaps,
        })
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub(crate) fn l2_entries(&self) -> u64 {
        self.cluster() / 8
    }

    /// What an L2 entry says, or why it makes no sense.
    pub(crate) fn mapping(&self, entry: u64) -> Result<Mapping, String> {
        if entry & L2_COMPRESSED != 0 {
            let bits = 62 - (self.cluster_bits - 8);
            let at = entry & ((1 << bits) - 1);
            let sectors = (entry & !(L2_COPIED | L2_COMPRESSED)) >> bits;
            let len = (sectors + 1) * 512 - at % 512;
            return Ok(Mapping::Compressed { at, len });
        }
        let at = entry & OFFSET;
        if !at.is_multiple_of(self.cluster()) {
            return Err(format!("a cluster at {at:#x}, where none begins"));
        }
        Ok(match (at, entry & L2_ZERO != 0 && self.version >= 3) {
            (_, true) => Mapping::Zero,
            (0, false) => Mapping::Backing,
            (at, false) => Mapping::Data { at },
        })
    }
}

/// The offset in an L1, L2 or snapshot's L1 entry.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster has one reference.
pub(crate) const L2_COPIED: u64 = 1 << 63;
pub(crate) const L2_COMPRESSED: u64 = 1 << 62;
const L2_ZERO: u64 = 1;

/// Where a cluster's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// In the file.
    Data { at: u64 },
    /// In the file, in at most `len` bytes.
    Compressed { at: u64, len: u64 },
    /// They are zero.
    Zero,
    /// In the backing file; they are zero if there is none, or behind its end.
    Backing,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of a disk of 1 GiB in a file of 1 MiB.
    fn header() -> Vec<u8> {
        let mut h = vec![0; 0x1_0000];
        h[..4].copy_from_slice(b"QFI\xfb");
        let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
        put(4, &3_u32.to_be_bytes());
        put(20, &16_u32.to_be_bytes());
        put(24, &(1_u64 << 30).to_be_bytes());
        put(36, &2_u32.to_be_bytes());
        put(40, &0x3_0000_u64.to_be_bytes());
        put(48, &0x1_0000_u64.to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(96, &4_u32.to_be_bytes());
        put(100, &112_u32.to_be_bytes());
        h
    }

    /// Offset, number of bytes, value, what the message says; nothing if it is understood.
    #[test]
    fn headers_are_understood_or_refused() {
        for (at, len, value, expected) in [
            (0, 0, 0_u64, ""),
            (0, 1, 0, "not a qcow2 image"),
            (4, 4, 1, "version 1"),
            (4, 4, 4, "version 4"),
            (20, 4, 8, "clusters"),
            (20, 4, 22, "clusters"),
            (24, 8, 0, "0 bytes"),
            (24, 8, 513, "513 bytes"),
            (24, 8, u64::MAX, "L1"),
            (32, 4, 1, "encryption"),
            (36, 4, 1, "L1"),
            (36, 4, u64::from(u32::MAX), "L1"),
            (40, 8, 0x3_0001, "not in the file"),
            (40, 8, !0xffff, "not in the file"),
            (48, 8, 0xf_ffff_0000, "not in the file"),
            (56, 4, u64::from(u32::MAX), "refcount table"),
            (72, 8, 1, ""),
            (72, 8, 2, ""),
            (72, 8, 4, "another file"),
            (72, 8, 8, ""),
            (72, 8, 16, "subclusters"),
            (72, 8, 1 << 40, "unknown incompatible"),
            (96, 4, 7, "reference counts"),
            (100, 4, 72, "length"),
            (100, 4, 0x2_0000, "length"),
        ] {
            let mut h = header();
            let bytes = value.to_be_bytes();
            h[at..at + len].copy_from_slice(&bytes[8 - len..]);
            let line = format!("{at} {value:#x}");
            match (Header::parse(&h, 1 << 20), expected) {
                (Ok(_), "") => {}
                (Err(e), expected) if !expected.is_empty() => {
                    assert!(e.contains(expected), "{line}: {e}");
                }
                (found, _) => panic!("{line}: {found:?}"),
            }
        }
        assert!(Header::parse(&header()[..100], 100).is_err());
    }

    #[test]
    fn backing_files_are_named_with_their_format() {
        let mut h = header();
        h[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 5]);
        h[112..125].copy_from_slice(b"\xe2\x79\x2a\xca\0\0\0\x05qcow2");
        h[256..261].copy_from_slice(b"a.img");
        let expected = |format: Option<&str>| Backing {
            name: "a.img".into(),
            format: format.map(Into::into),
        };
        let backing = |h: &[u8]| Header::parse(h, 1 << 20).map(|h| h.backing);
        assert_eq!(backing(&h), Ok(Some(expected(Some("qcow2")))));
        h[112] = 0;
        assert_eq!(backing(&h), Ok(Some(expected(None))));
        for (at, value) in [(10, 9), (17, 1), (18, 4), (256, 0xff), (257, 0)] {
            let mut bad = h.clone();
            bad[at] = value;
            assert!(backing(&bad).is_err(), "{at}");
        }
    }

    #[test]
    fn entries() {
        let header = Header::parse(&header(), 1 << 20).unwrap();
        let compressed = L2_COMPRESSED | 3 << 54 | 0x1234;
        for (entry, expected) in [
            (0, Ok(Mapping::Backing)),
            (1, Ok(Mapping::Zero)),
            (0x5_0001, Ok(Mapping::Zero)),
            (L2_COPIED | 0x5_0000, Ok(Mapping::Data { at: 0x5_0000 })),
            (0x5_0200, Err(())),
            (
                compressed,
                Ok(Mapping::Compressed {
                    at: 0x1234,
                    len: 4 * 512 - 0x34,
                }),
            ),
        ] {
            assert_eq!(header.mapping(entry).map_err(drop), expected, "{entry:#x}");
        }
    }
}
