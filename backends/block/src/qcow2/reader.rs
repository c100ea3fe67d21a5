//! An image that nobody changes while it is open. Its tables are read when they are needed and kept as long as there is
//! room; what was decompressed last is kept as well.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::file::{ImageFile, is_in_memory, read_padded};
use crate::qcow2::header::{Compression, Header, Mapping, OFFSET};
use crate::qcow2::{damaged, open_backing};
use crate::{BlockBackend, Direct, Extent, OpenError, check_range};

/// Bytes of L2 tables, and of decompressed clusters, that are kept.
const KEPT: u64 = 8 << 20;

/// See the module documentation.
pub(crate) struct Reader {
    image: ImageFile,
    header: Header,
    l1: Vec<u64>,
    tables: Kept<[u64]>,
    clusters: Kept<[u8]>,
    backing: Option<Arc<dyn BlockBackend>>,
    /// It is on a tmpfs.
    in_memory: bool,
}

/// The values that were used last, by their place in the file.
struct Kept<T: ?Sized> {
    most: usize,
    inner: Mutex<KeptInner<T>>,
}

struct KeptInner<T: ?Sized> {
    values: HashMap<u64, (Arc<T>, u64)>,
    uses: u64,
}

impl<T: ?Sized> Kept<T> {
    fn new(most: u64) -> Kept<T> {
        Kept {
            most: most.max(1) as usize,
            inner: Mutex::new(KeptInner {
                values: HashMap::new(),
                uses: 0,
            }),
        }
    }

    fn has(&self, key: u64) -> bool {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.values.contains_key(&key)
    }

    /// The value at `key`, made by `load` if it is not kept.
    fn get(&self, key: u64, load: impl FnOnce() -> io::Result<Arc<T>>) -> io::Result<Arc<T>> {
        // A panic elsewhere leaves whole values only.
        let lock = || self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut inner = lock();
            inner.uses += 1;
            let now = inner.uses;
            if let Some((value, used)) = inner.values.get_mut(&key) {
                *used = now;
                return Ok(Arc::clone(value));
            }
        }
        let value = load()?;
        let mut inner = lock();
        if inner.values.len() >= self.most {
            let oldest = inner.values.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(key) = oldest.map(|(key, _)| *key) {
                inner.values.remove(&key);
            }
        }
        let now = inner.uses;
        inner.values.insert(key, (Arc::clone(&value), now));
        Ok(value)
    }
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Reader {
    /// `trusted`: other files that the image names may be opened.
    pub(crate) fn open(path: &Path, image: ImageFile, trusted: bool) -> Result<Reader, OpenError> {
        Reader::open_at(path, image, trusted, 0)
    }

    pub(super) fn open_at(
        path: &Path,
        image: ImageFile,
        trusted: bool,
        depth: usize,
    ) -> Result<Reader, OpenError> {
        let header = Header::read(&image.file, image.len).map_err(|what| damaged(path, what))?;
        let backing = open_backing(path, &header, trusted, depth)?;
        let l1 = read_table(&image, header.l1_at, header.l1_entries.into());
        let l1 = l1.map_err(|e| damaged(path, format!("its L1 table: {e}")))?;
        let most = KEPT >> header.cluster_bits;
        Ok(Reader {
            in_memory: is_in_memory(&image.file),
            image,
            header,
            l1,
            tables: Kept::new(most),
            clusters: Kept::new(most),
            backing,
        })
    }

    /// Where the cluster with number `cluster` is.
    fn mapping(&self, cluster: u64) -> io::Result<Mapping> {
        let per_table = self.header.l2_entries();
        let l1 = self.l1.get((cluster / per_table) as usize);
        let at = l1.map_or(0, |entry| entry & OFFSET);
        if at == 0 {
            return Ok(Mapping::Backing);
        }
        if !at.is_multiple_of(self.header.cluster()) {
            return Err(invalid(format!(
                "an L2 table at {at:#x}, where none begins"
            )));
        }
        let load = || read_table(&self.image, at, per_table).map(Arc::from);
        let table = self.tables.get(at, load)?;
        let entry = table[(cluster % per_table) as usize];
        self.header.mapping(entry).map_err(invalid)
    }

    /// How many clusters from `first` on, at most up to `last`, are one piece, and where it is.
    fn piece(&self, first: u64, last: u64) -> io::Result<(Mapping, u64)> {
        let start = self.mapping(first)?;
        let mut count = 1;
        if let Mapping::Compressed { .. } = start {
            return Ok((start, count));
        }
        while first + count <= last {
            if start == Mapping::Backing
                && let Some(all) = self.empty_table(first + count)
            {
                count = (count + all).min(last + 1 - first);
                continue;
            }
            let next = match start {
                Mapping::Data { at } => Mapping::Data {
                    at: at + count * self.header.cluster(),
                },
                other => other,
            };
            if self.mapping(first + count)? != next {
                break;
            }
            count += 1;
        }
        Ok((start, count))
    }

    /// How many clusters from `cluster` on have no L2 table, up to the end of that table.
    fn empty_table(&self, cluster: u64) -> Option<u64> {
        let per_table = self.header.l2_entries();
        let entry = *self.l1.get((cluster / per_table) as usize)?;
        (entry & OFFSET == 0).then(|| per_table - cluster % per_table)
    }

    /// Whether the table in which the cluster is looked up is at hand.
    fn is_known(&self, cluster: u64) -> bool {
        let entry = self.l1.get((cluster / self.header.l2_entries()) as usize);
        entry.is_none_or(|entry| entry & OFFSET == 0 || self.tables.has(entry & OFFSET))
    }

    fn decompress(&self, at: u64, len: u64) -> io::Result<Arc<[u8]>> {
        self.clusters.get(at, || {
            let cluster = self.header.cluster() as usize;
            // What is compressed is shorter than what is not.
            if len > 2 * self.header.cluster() || at >= self.image.len {
                return Err(invalid(format!("a compressed cluster at {at:#x}+{len:#x}")));
            }
            let mut packed = vec![0; len as usize];
            read_padded(&self.image.file, at, &mut packed)?;
            let mut whole = vec![0; cluster];
            let done = match self.header.compression {
                Compression::Zlib => {
                    let mut inflate = flate2::Decompress::new(false);
                    let status =
                        inflate.decompress(&packed, &mut whole, flate2::FlushDecompress::Finish);
                    status.is_ok() && inflate.total_out() == cluster as u64
                }
                Compression::Zstd => {
                    // There may be other bytes behind the frame.
                    let mut zstd = zstd::stream::raw::Decoder::new()?;
                    unzstd(&mut zstd, &packed, &mut whole)?
                }
            };
            match done {
                true => Ok(whole.into()),
                false => Err(invalid(format!("what is compressed at {at:#x} is damaged"))),
            }
        })
    }
}

/// Decompresses the frame at the beginning of `packed`; whether it fills `whole`.
fn unzstd(
    decoder: &mut zstd::stream::raw::Decoder<'_>,
    packed: &[u8],
    whole: &mut [u8],
) -> io::Result<bool> {
    use zstd::stream::raw::{InBuffer, Operation, OutBuffer};
    let mut input = InBuffer::around(packed);
    let mut output = OutBuffer::around(whole);
    loop {
        let (read, written) = (input.pos(), output.pos());
        let left = decoder.run(&mut input, &mut output)?;
        if left == 0
            || output.pos() == output.capacity()
            || (read, written) == (input.pos(), output.pos())
        {
            return Ok(output.pos() == output.capacity());
        }
    }
}

/// `entries` big-endian numbers at `at`.
pub(super) fn read_table(image: &ImageFile, at: u64, entries: u64) -> io::Result<Vec<u64>> {
    if at >= image.len {
        return Err(invalid(format!(
            "a table at {at:#x} is behind the end of the file"
        )));
    }
    let mut bytes = vec![0; entries as usize * 8];
    read_padded(&image.file, at, &mut bytes)?;
    let number = |b: &[u8]| b.iter().fold(0, |n, &b| n << 8 | u64::from(b));
    Ok(bytes.chunks(8).map(number).collect())
}

/// Reads from a backing file, which may be shorter than the disk; without one there are zeroes.
pub(super) fn read_backing(
    backing: Option<&Arc<dyn BlockBackend>>,
    offset: u64,
    buf: &mut [u8],
) -> io::Result<()> {
    let size = backing.map_or(0, |b| b.size_bytes());
    let there = size.saturating_sub(offset).min(buf.len() as u64) as usize;
    let (inside, behind) = buf.split_at_mut(there);
    behind.fill(0);
    match backing {
        Some(backing) if !inside.is_empty() => backing.read_at(offset, inside),
        _ => Ok(()),
    }
}

impl BlockBackend for Reader {
    fn size_bytes(&self) -> u64 {
        self.header.size
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(self.header.size, offset, buf.len() as u64)?;
        let (bits, mask) = (self.header.cluster_bits, self.header.cluster() - 1);
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let (mapping, clusters) = self.piece(at >> bits, (end - 1) >> bits)?;
            let next = end.min(((at >> bits) + clusters) << bits);
            let part = &mut buf[(at - offset) as usize..(next - offset) as usize];
            match mapping {
                Mapping::Data { at: start } => {
                    let from = start + (at & mask);
                    if start >= self.image.len {
                        return Err(invalid(format!(
                            "a cluster at {start:#x}, behind the end of the file"
                        )));
                    }
                    read_padded(&self.image.file, from, part)?;
                }
                Mapping::Compressed { at: start, len } => {
                    let whole = self.decompress(start, len)?;
                    let from = (at & mask) as usize;
                    part.copy_from_slice(&whole[from..from + part.len()]);
                }
                Mapping::Zero => part.fill(0),
                Mapping::Backing => read_backing(self.backing.as_ref(), at, part)?,
            }
            at = next;
        }
        Ok(())
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        if offset >= self.header.size {
            return Ok(Extent { len: 0, zero: true });
        }
        let bits = self.header.cluster_bits;
        let first = offset >> bits;
        // A bounded number of table entries is looked at.
        let last = (first + 0xffff).min((self.header.size - 1) >> bits);
        let (mapping, clusters) = self.piece(first, last)?;
        let len = ((first + clusters) << bits).min(self.header.size) - offset;
        match (mapping, &self.backing) {
            (Mapping::Zero, _) | (Mapping::Backing, None) => Ok(Extent { len, zero: true }),
            (Mapping::Backing, Some(backing)) if offset >= backing.size_bytes() => {
                Ok(Extent { len, zero: true })
            }
            (Mapping::Backing, Some(backing)) => {
                let below = backing.extent(offset)?;
                Ok(Extent {
                    len: len.min(below.len),
                    zero: below.zero,
                })
            }
            _ => Ok(Extent { len, zero: false }),
        }
    }

    fn direct(&self, offset: u64, len: u64, write: bool) -> Option<Direct<'_>> {
        let bits = self.header.cluster_bits;
        let (first, last) = (offset >> bits, (offset + len).checked_sub(1)? >> bits);
        // A table that must be read first is for those who may wait.
        if write || !self.is_known(first) || !self.is_known(last) {
            return None;
        }
        match self.piece(first, last).ok()? {
            (Mapping::Data { at }, clusters) if first + clusters > last => {
                let offset = at + (offset - (first << bits));
                let inside = offset.checked_add(len)? <= self.image.len;
                inside.then(|| Direct {
                    file: self.image.file.as_fd(),
                    offset,
                    in_memory: self.in_memory,
                })
            }
            (Mapping::Backing, clusters) if first + clusters > last => {
                let backing = self.backing.as_ref()?;
                let inside = offset + len <= backing.size_bytes();
                inside.then(|| backing.direct(offset, len, false))?
            }
            _ => None,
        }
    }

    fn write_at(&self, _offset: u64, _buf: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _may_unmap: bool) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}
