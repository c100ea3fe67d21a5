//! Small qcow2 images made by hand, with what our writer does not make: compressed clusters, other widths and sizes.

use std::io::Write;

/// What an image is to be.
#[derive(Clone)]
pub struct Sample {
    pub version: u32,
    pub cluster_bits: u32,
    pub zstd: bool,
    /// Name and format of the backing file.
    pub backing: Option<(&'static str, Option<&'static str>)>,
    pub incompatible: u64,
}

impl Sample {
    pub const PLAIN: Sample = Sample {
        version: 3,
        cluster_bits: 16,
        zstd: false,
        backing: None,
        incompatible: 0,
    };

    /// An image whose clusters are, in turn: data, compressed, zero (data in version 2), not there. Also what its disk reads as.
    pub fn build(&self, clusters: u64) -> (Vec<u8>, Vec<u8>) {
        let cluster = 1_usize << self.cluster_bits;
        let per_table = cluster / 8;
        assert!(clusters <= per_table as u64, "one L2 table");
        // Header, refcount table, refcount block, L1, L2, then data.
        let mut file = vec![0; 5 * cluster];
        let mut disk = Vec::new();
        let mut references = vec![1_u16; 5];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb");
        put(4, &self.version.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &(clusters * cluster as u64).to_be_bytes());
        put(36, &1_u32.to_be_bytes());
        put(40, &(3 * cluster as u64).to_be_bytes());
        put(48, &(cluster as u64).to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        let mut at = 72;
        if self.version == 3 {
            let zstd = u64::from(self.zstd) << 3;
            put(72, &(self.incompatible | zstd).to_be_bytes());
            put(96, &4_u32.to_be_bytes());
            put(100, &112_u32.to_be_bytes());
            put(104, &[self.zstd.into()]);
            at = 112;
        }
        if let Some((name, format)) = self.backing {
            if let Some(format) = format {
                put(at, &0xe279_2aca_u32.to_be_bytes());
                put(at + 4, &(format.len() as u32).to_be_bytes());
                put(at + 8, format.as_bytes());
                at += 8 + format.len().next_multiple_of(8);
            }
            at += 8;
            put(8, &(at as u64).to_be_bytes());
            put(16, &(name.len() as u32).to_be_bytes());
            put(at, name.as_bytes());
        }
        put(cluster, &(2 * cluster as u64).to_be_bytes());
        let copied = 1_u64 << 63;
        put(3 * cluster, &(copied | (4 * cluster as u64)).to_be_bytes());
        for n in 0..clusters as usize {
            let bytes: Vec<u8> = (0..cluster).map(|i| (i / 256 + n * 7) as u8 | 1).collect();
            let end = file.len();
            let entry = match n % 4 {
                0 => {
                    file.extend(&bytes);
                    references.push(1);
                    disk.extend(&bytes);
                    copied | end as u64
                }
                1 => {
                    let packed = self.compress(&bytes);
                    // Not at the start of its cluster.
                    let start = end + 100;
                    file.resize(start, 0);
                    file.extend(&packed);
                    file.resize(file.len().next_multiple_of(cluster), 0);
                    references.push(1);
                    assert!(packed.len() + 100 < cluster);
                    disk.extend(&bytes);
                    let sectors = ((start + packed.len() - 1) / 512 - start / 512) as u64;
                    (1 << 62) | (sectors << (62 - (self.cluster_bits - 8))) | start as u64
                }
                2 if self.version == 3 => {
                    disk.extend(vec![0; cluster]);
                    1
                }
                2 => {
                    disk.extend(vec![0; cluster]);
                    file.resize(end + cluster, 0);
                    references.push(1);
                    copied | end as u64
                }
                _ => {
                    disk.extend(vec![0; cluster]);
                    0
                }
            };
            file[4 * cluster + n * 8..][..8].copy_from_slice(&entry.to_be_bytes());
        }
        for (n, count) in references.iter().enumerate() {
            file[2 * cluster + n * 2..][..2].copy_from_slice(&count.to_be_bytes());
        }
        (file, disk)
    }

    fn compress(&self, bytes: &[u8]) -> Vec<u8> {
        if self.zstd {
            return zstd::bulk::compress(bytes, 3).expect("memory");
        }
        let mut deflate =
            flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::new(6));
        deflate.write_all(bytes).expect("memory");
        deflate.finish().expect("memory")
    }
}
