//! Whether an image's reference counts are those of the clusters that its tables use ("Host cluster management"), and
//! putting them right.
//!
//! A count that is too high wastes a cluster: a leak, as a writer that was killed leaves it. One that is too low is an error: the
//! cluster could be given away a second time.
//!
//! Limits: the clusters of dirty bitmaps are not followed, so leaks are not told in images that have some; the contents of compressed clusters are not looked at.

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;

use crate::file::{ImageFile, read_padded};
use crate::qcow2::header::{Header, INCOMPATIBLE_AT, L2_COPIED, Mapping, OFFSET};
use crate::qcow2::reader::read_table;
use crate::qcow2::{LONGEST_MESSAGES, damaged};
use crate::{Format, OpenError, known_format};

/// The most clusters of a file whose references are counted: 4 bytes for each are needed.
const MOST_CLUSTERS: u64 = 1 << 28;
/// The most snapshots, as in QEMU.
const MOST_SNAPSHOTS: u32 = 65536;

/// What a check has found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// The format; a raw image has nothing that could be checked.
    pub format: Format,
    /// Clusters of the disk, and how many of them are in the file, compressed ones included.
    pub total_clusters: u64,
    /// See `total_clusters`.
    pub allocated_clusters: u64,
    /// How many of these are compressed.
    pub compressed_clusters: u64,
    /// References that are wrong: the image must not be written before it is repaired.
    pub errors: u64,
    /// Clusters that nobody uses.
    pub leaks: u64,
    /// The image was not closed properly.
    pub not_closed: bool,
    /// What was found has been put right.
    pub repaired: bool,
    /// The first errors, for a person.
    pub messages: Vec<String>,
}

impl CheckReport {
    fn new(format: Format) -> CheckReport {
        CheckReport {
            format,
            total_clusters: 0,
            allocated_clusters: 0,
            compressed_clusters: 0,
            errors: 0,
            leaks: 0,
            not_closed: false,
            repaired: false,
            messages: Vec::new(),
        }
    }

    /// Whether the image is as it should be now.
    pub fn is_sound(&self) -> bool {
        self.repaired || self.errors == 0 && self.leaks == 0 && !self.not_closed
    }

    fn error(&mut self, what: String) {
        self.errors += 1;
        if self.messages.len() < LONGEST_MESSAGES {
            self.messages.push(what);
        }
    }
}

/// Checks the image at `path`, alone or without its backing file, and with `repair` puts right what can be.
pub fn check(path: &Path, format: Option<Format>, repair: bool) -> Result<CheckReport, OpenError> {
    let image = ImageFile::open(path, !repair)?;
    let format = match format {
        Some(format) => format,
        None => known_format(path, &image)?,
    };
    if format == Format::Raw {
        return Ok(CheckReport::new(format));
    }
    let header = Header::read(&image.file, image.len).map_err(|what| damaged(path, what))?;
    let host = |source| OpenError::Host {
        path: path.into(),
        source,
    };
    let mut count = Count::new(&image, &header).map_err(host)?;
    let (l1, table) = count.examine().map_err(host)?;
    let mut report = count.report.clone();
    if repair && !report.is_sound() {
        if count.structure > 0 {
            let what = format!(
                "it cannot be repaired: {}",
                report.messages.first().map_or("", String::as_str)
            );
            return Err(damaged(path, what));
        }
        count.repair(table, &l1).map_err(host)?;
        report.repaired = true;
    }
    Ok(report)
}

/// Whether the image can be written without harm.
pub(super) fn is_safe(image: &ImageFile, header: &Header) -> io::Result<bool> {
    let mut count = Count::new(image, header)?;
    count.examine()?;
    Ok(count.report.errors == 0)
}

/// A check at work.
struct Count<'a> {
    image: &'a ImageFile,
    header: &'a Header,
    /// How many references each cluster of the file has.
    references: Vec<u32>,
    report: CheckReport,
    /// Errors that are not about counts.
    structure: u64,
}

impl Count<'_> {
    fn new<'a>(image: &'a ImageFile, header: &'a Header) -> io::Result<Count<'a>> {
        let clusters = image.len.div_ceil(header.cluster());
        if clusters > MOST_CLUSTERS {
            return Err(io::Error::other("it has too many clusters to be checked"));
        }
        Ok(Count {
            references: vec![0; clusters as usize],
            report: CheckReport::new(Format::Qcow2),
            structure: 0,
            image,
            header,
        })
    }

    /// Fills the report; returns the L1 table and the refcount table.
    fn examine(&mut self) -> io::Result<(Vec<u64>, Vec<u64>)> {
        let l1 = self.count()?;
        let table = self.compare()?;
        self.report.errors += self.flags(&l1, false)?;
        Ok((l1, table))
    }

    /// Something uses `len` bytes of the file.
    fn mark(&mut self, at: u64, len: u64, what: &str) {
        let bits = self.header.cluster_bits;
        let last = at.saturating_add(len.max(1) - 1) >> bits;
        if last >= self.references.len() as u64 {
            self.structure += 1;
            let text = format!("{what} at {at:#x} is behind the end of the file");
            return self.report.error(text);
        }
        for n in at >> bits..=last {
            let count = &mut self.references[n as usize];
            *count = count.saturating_add(1);
        }
    }

    /// Counts all references; returns the disk's L1 table.
    fn count(&mut self) -> io::Result<Vec<u64>> {
        let cluster = self.header.cluster();
        self.report.not_closed = self.header.state != 0;
        self.report.total_clusters = self.header.size.div_ceil(cluster);
        self.mark(0, cluster, "the header");
        let table = u64::from(self.header.refcount_table_clusters) << self.header.cluster_bits;
        if table > 0 {
            self.mark(self.header.refcount_table_at, table, "the refcount table");
        }
        let entries = read_table(self.image, self.header.refcount_table_at, table / 8)?;
        for at in entries.into_iter().filter(|&at| at != 0) {
            match at.is_multiple_of(cluster) {
                true => self.mark(at, cluster, "a block of reference counts"),
                false => {
                    self.structure += 1;
                    let text = format!("a block of reference counts at {at:#x}, where none begins");
                    self.report.error(text);
                }
            }
        }
        let (at, entries) = (self.header.l1_at, self.header.l1_entries.into());
        let l1 = self.count_l1(at, entries, true)?;
        self.count_snapshots()?;
        Ok(l1)
    }

    fn count_l1(&mut self, at: u64, entries: u64, active: bool) -> io::Result<Vec<u64>> {
        if entries == 0 {
            return Ok(Vec::new());
        }
        self.mark(at, entries * 8, "an L1 table");
        let l1 = read_table(self.image, at, entries)?;
        let mut seen = HashSet::new();
        for entry in &l1 {
            let at = entry & OFFSET;
            if at == 0 {
                continue;
            }
            if !at.is_multiple_of(self.header.cluster()) || !seen.insert(at) {
                self.structure += 1;
                self.report.error(format!(
                    "an L2 table at {at:#x}, used twice or not on a cluster"
                ));
                continue;
            }
            let before = self.structure;
            self.mark(at, self.header.cluster(), "an L2 table");
            if self.structure == before {
                self.count_l2(at, active)?;
            }
        }
        Ok(l1)
    }

    fn count_l2(&mut self, at: u64, active: bool) -> io::Result<()> {
        let table = read_table(self.image, at, self.header.l2_entries())?;
        for entry in table {
            let mut allocated = active.into();
            match self.header.mapping(entry) {
                Ok(Mapping::Data { at }) => self.mark(at, self.header.cluster(), "a cluster"),
                Ok(Mapping::Compressed { at, len }) => {
                    // The last of its sectors need not be there.
                    let len = len.min(self.image.len.saturating_sub(at));
                    self.mark(at, len, "a compressed cluster");
                    self.report.compressed_clusters += u64::from(active);
                }
                Ok(Mapping::Zero) => {
                    allocated = 0;
                    // It keeps its place.
                    if entry & OFFSET != 0 {
                        self.mark(entry & OFFSET, self.header.cluster(), "a cluster");
                    }
                }
                Ok(Mapping::Backing) => allocated = 0,
                Err(what) => {
                    self.structure += 1;
                    self.report.error(what);
                }
            }
            self.report.allocated_clusters += allocated;
        }
        Ok(())
    }

    /// Section "Snapshots".
    fn count_snapshots(&mut self) -> io::Result<()> {
        let start = self.header.snapshots_at;
        let mut at = start;
        if self.header.snapshots > MOST_SNAPSHOTS {
            self.structure += 1;
            self.report.error("too many snapshots".into());
            return Ok(());
        }
        for _ in 0..self.header.snapshots {
            let mut head = [0; 40];
            if at >= self.image.len {
                self.structure += 1;
                self.report
                    .error("a snapshot behind the end of the file".into());
                return Ok(());
            }
            read_padded(&self.image.file, at, &mut head)?;
            let number = |from: usize, len: usize| {
                let bytes = &head[from..from + len];
                bytes.iter().fold(0, |n, &b| n << 8 | u64::from(b))
            };
            let (l1_at, entries) = (number(0, 8), number(8, 4));
            if !l1_at.is_multiple_of(self.header.cluster()) || entries > 4 << 20 {
                self.structure += 1;
                self.report
                    .error(format!("the L1 table of a snapshot at {l1_at:#x}"));
                return Ok(());
            }
            if l1_at < self.image.len {
                self.count_l1(l1_at, entries, false)?;
            } else {
                self.mark(l1_at, entries * 8, "the L1 table of a snapshot");
            }
            at += (40 + number(36, 4) + number(12, 2) + number(14, 2)).next_multiple_of(8);
        }
        if at > start {
            self.mark(start, at - start, "the list of snapshots");
        }
        Ok(())
    }

    /// Compares the counts in the file with those that were found; returns the refcount table.
    fn compare(&mut self) -> io::Result<Vec<u64>> {
        let table = u64::from(self.header.refcount_table_clusters) << self.header.cluster_bits;
        let table = read_table(self.image, self.header.refcount_table_at, table / 8)?;
        let per_block = self.counts_in_block();
        let mut block = vec![0; self.header.cluster() as usize];
        let blocks = (self.references.len() as u64).div_ceil(per_block);
        for n in 0..blocks {
            let at = table.get(n as usize).copied().unwrap_or(0);
            match at == 0 || at >= self.image.len {
                true => block.fill(0),
                false => read_padded(&self.image.file, at, &mut block)?,
            }
            for i in 0..per_block {
                let Some(&found) = self.references.get((n * per_block + i) as usize) else {
                    break;
                };
                let written = get_count(&block, self.header.refcount_order, i as usize);
                let at = (n * per_block + i) << self.header.cluster_bits;
                match written.cmp(&u64::from(found)) {
                    std::cmp::Ordering::Less => self.report.error(format!(
                        "the cluster at {at:#x} is counted {written} times and used {found} times"
                    )),
                    std::cmp::Ordering::Greater if !self.header.has_bitmaps => {
                        self.report.leaks += 1;
                    }
                    _ => {}
                }
            }
        }
        Ok(table)
    }

    fn counts_in_block(&self) -> u64 {
        (self.header.cluster() * 8) >> self.header.refcount_order
    }

    /// How many flags "this cluster has one reference" of the disk are wrong; with `fix` they are corrected.
    fn flags(&mut self, l1: &[u64], fix: bool) -> io::Result<u64> {
        let bits = self.header.cluster_bits;
        let references = |at: u64| self.references.get((at >> bits) as usize).copied();
        let mut wrong = 0;
        let mut right = |entry: u64, place: u64| -> io::Result<()> {
            let at = entry & OFFSET;
            if at == 0 || (entry & L2_COPIED != 0) == (references(at) == Some(1)) {
                return Ok(());
            }
            wrong += 1;
            match fix {
                true => (self.image.file).write_all_at(&(entry ^ L2_COPIED).to_be_bytes(), place),
                false => Ok(()),
            }
        };
        for (n, &entry) in l1.iter().enumerate() {
            right(entry, self.header.l1_at + n as u64 * 8)?;
            let at = entry & OFFSET;
            if at == 0 || references(at).is_none() {
                continue;
            }
            let table = read_table(self.image, at, self.header.l2_entries())?;
            for (n, &entry) in table.iter().enumerate() {
                if let Ok(Mapping::Data { .. } | Mapping::Zero) = self.header.mapping(entry) {
                    right(entry, at + n as u64 * 8)?;
                }
            }
        }
        Ok(wrong)
    }

    /// Writes the counts that were found, in new blocks at the end of the file where some are missing.
    fn repair(&mut self, mut table: Vec<u64>, l1: &[u64]) -> io::Result<()> {
        let (cluster, order) = (self.header.cluster(), self.header.refcount_order);
        let per_block = self.counts_in_block() as usize;
        let most = if order == 6 {
            u64::MAX
        } else {
            (1 << (1 << order)) - 1
        };
        if self.references.iter().any(|&n| u64::from(n) > most) {
            return Err(io::Error::other(
                "a cluster has more references than can be counted",
            ));
        }
        if self.header.has_bitmaps {
            return Err(io::Error::other(
                "it has dirty bitmaps, whose clusters are not counted; `qemu-img check -r all` can do it",
            ));
        }
        let mut n = 0;
        while n * per_block < self.references.len() {
            let used = self.references[n * per_block..].iter().take(per_block);
            let entry = table.get(n).copied();
            if entry.unwrap_or(0) == 0 && used.clone().any(|&count| count > 0) {
                if entry.is_none() {
                    return Err(io::Error::other("its refcount table is too short"));
                }
                table[n] = self.references.len() as u64 * cluster;
                self.references.push(1);
            }
            n += 1;
        }
        // What was appended may be counted in a block that had no entry when it was looked at.
        if self
            .references
            .chunks(per_block)
            .zip(&table)
            .any(|(used, &at)| at == 0 && used.iter().any(|&count| count > 0))
        {
            return Err(io::Error::other(
                "its blocks of reference counts have no room",
            ));
        }
        let end = self.references.len() as u64 * cluster;
        self.image.file.set_len(end.max(self.image.len))?;
        for (counts, &at) in self.references.chunks(per_block).zip(&table) {
            if at == 0 {
                continue;
            }
            let mut block = vec![0; cluster as usize];
            for (i, &count) in counts.iter().enumerate() {
                put_count(&mut block, order, i, count.into());
            }
            self.image.file.write_all_at(&block, at)?;
        }
        let bytes: Vec<u8> = table.iter().flat_map(|at| at.to_be_bytes()).collect();
        (self.image.file).write_all_at(&bytes, self.header.refcount_table_at)?;
        self.flags(l1, true)?;
        self.image.file.sync_all()?;
        if self.header.state != 0 {
            let mut features = [0; 8];
            (self.image.file).read_exact_at(&mut features, INCOMPATIBLE_AT)?;
            let features = u64::from_be_bytes(features) & !self.header.state;
            (self.image.file).write_all_at(&features.to_be_bytes(), INCOMPATIBLE_AT)?;
            self.image.file.sync_all()?;
        }
        Ok(())
    }
}

/// Count `index` of a block whose counts have 2 to the power of `order` bits.
fn get_count(block: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let (bits, per_byte) = (1 << order, 8 >> order);
        let shift = index % per_byte * bits;
        return u64::from(block[index / per_byte]) >> shift & ((1 << bits) - 1);
    }
    let len = 1 << (order - 3);
    let bytes = &block[index * len..][..len];
    bytes.iter().fold(0, |n, &b| n << 8 | u64::from(b))
}

/// Sets count `index`, which is zero.
fn put_count(block: &mut [u8], order: u32, index: usize, count: u64) {
    if order < 3 {
        let (bits, per_byte) = (1 << order, 8 >> order);
        block[index / per_byte] |= (count as u8) << (index % per_byte * bits);
        return;
    }
    let len = 1 << (order - 3);
    block[index * len..][..len].copy_from_slice(&count.to_be_bytes()[8 - len..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width() {
        for order in 0..=6 {
            let most = u64::MAX >> (64 - (1 << order));
            let mut block = vec![0; 512];
            let values: Vec<u64> = (0..64_u64)
                .map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15)) & most)
                .collect();
            for (i, &value) in values.iter().enumerate() {
                put_count(&mut block, order, i, value);
            }
            let found: Vec<u64> = (0..64).map(|i| get_count(&block, order, i)).collect();
            assert_eq!(found, values, "{order}");
        }
    }
}
