//! Undoes the compressions in which kernels come.
//!
//! The result is bounded: a file that would grow beyond guest memory is refused, however small it is.

use std::io::Read;

use liblzma::read::XzDecoder;
use liblzma::stream::Stream;

use crate::error::Reason;

/// The formats that are known by their first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Xz,
    Lzma,
    /// The "legacy" frame of the lz4 command, which kernels use.
    Lz4,
    Zstd,
}

/// Memory that the LZMA decoders may use; the largest preset takes 65 MiB.
const LZMA_MEMORY: u64 = 256 << 20;

impl Compression {
    fn of(bytes: &[u8]) -> Option<Compression> {
        let known: [(&[u8], Compression); 5] = [
            (&[0x1f, 0x8b, 8], Compression::Gzip),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Compression::Xz),
            (&[0x5d, 0, 0], Compression::Lzma),
            (&[0x02, 0x21, 0x4c, 0x18], Compression::Lz4),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
        ];
        let found = known.iter().find(|(magic, _)| bytes.starts_with(magic));
        found.map(|(_, compression)| *compression)
    }
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Compression::Gzip => "gzip",
            Compression::Xz => "xz",
            Compression::Lzma => "lzma",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        })
    }
}

/// Decompresses `bytes` to at most `limit` bytes. Bytes after the compressed data are ignored: in a bzImage, the
/// size of the result follows it. `None`: not a compression known here.
pub(crate) fn decompress(
    bytes: &[u8],
    limit: u64,
) -> Result<Option<(Vec<u8>, Compression)>, Reason> {
    let Some(compression) = Compression::of(bytes) else {
        return Ok(None);
    };
    let failed = |error: std::io::Error| Reason::Damaged(format!("{compression}: {error}"));
    let lzma = |stream: Result<Stream, liblzma::stream::Error>| {
        stream.map_err(|error| failed(error.into()))
    };
    let result = match compression {
        Compression::Gzip => read(flate2::read::GzDecoder::new(bytes), limit),
        Compression::Xz => {
            let stream = lzma(Stream::new_stream_decoder(LZMA_MEMORY, 0))?;
            read(XzDecoder::new_stream(bytes, stream), limit)
        }
        Compression::Lzma => {
            let stream = lzma(Stream::new_lzma_decoder(LZMA_MEMORY))?;
            read(XzDecoder::new_stream(bytes, stream), limit)
        }
        Compression::Lz4 => lz4_legacy(bytes, limit),
        Compression::Zstd => zstd::stream::read::Decoder::with_buffer(bytes)
            .and_then(|decoder| read(decoder.single_frame(), limit)),
    };
    result
        .map(|bytes| Some((bytes, compression)))
        .map_err(failed)
}

/// The file itself, decompressed if it is compressed.
pub(crate) fn decompress_file(file: Vec<u8>, limit: u64) -> Result<Vec<u8>, Reason> {
    Ok(match decompress(&file, limit)? {
        Some((bytes, _)) => bytes,
        None => file,
    })
}

fn read(decoder: impl Read, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    decoder.take(limit + 1).read_to_end(&mut bytes)?;
    within(bytes, limit)
}

fn within(bytes: Vec<u8>, limit: u64) -> std::io::Result<Vec<u8>> {
    if bytes.len() as u64 > limit {
        return Err(std::io::Error::other(
            "the result is larger than guest memory",
        ));
    }
    Ok(bytes)
}

/// A magic number, then blocks: compressed size (4 bytes), data that gives at most 8 MiB. Only the last block gives
/// less (lz4 `doc/lz4_Frame_format.md`, "Legacy frame").
fn lz4_legacy(bytes: &[u8], limit: u64) -> std::io::Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let mut result = Vec::new();
    let mut rest = &bytes[4..];
    while let Some((size, after)) = rest.split_first_chunk() {
        let size = u32::from_le_bytes(*size) as usize;
        if after.is_empty() && size == result.len() {
            // What follows the frame in a bzImage: the size of the result.
            break;
        }
        let block = after.split_at_checked(size);
        let (block, after) = block.ok_or_else(|| std::io::Error::other("a block is truncated"))?;
        let start = result.len();
        result.resize(start + BLOCK, 0);
        let written = lz4_flex::block::decompress_into(block, &mut result[start..])
            .map_err(std::io::Error::other)?;
        result.truncate(start + written);
        result = within(result, limit)?;
        if written < BLOCK && after.len() > 4 {
            return Err(std::io::Error::other("a block is too short"));
        }
        rest = after;
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn lz4(data: &[u8]) -> Vec<u8> {
        let mut frame = vec![0x02, 0x21, 0x4c, 0x18];
        for block in data.chunks(8 << 20) {
            let block = lz4_flex::block::compress(block);
            frame.extend((block.len() as u32).to_le_bytes());
            frame.extend(block);
        }
        frame
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn xz(data: &[u8]) -> Vec<u8> {
        let mut encoded = Vec::new();
        let mut encoder = liblzma::read::XzEncoder::new(data, 0);
        encoder.read_to_end(&mut encoded).unwrap();
        encoded
    }

    fn lzma(data: &[u8]) -> Vec<u8> {
        let options = liblzma::stream::LzmaOptions::new_preset(0).unwrap();
        let stream = Stream::new_lzma_encoder(&options).unwrap();
        let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        zstd::encode_all(data, 1).unwrap()
    }

    type Encoder = fn(&[u8]) -> Vec<u8>;
    const ENCODERS: [Encoder; 5] = [lz4, gzip, xz, lzma, zstd];

    fn sample(len: usize) -> Vec<u8> {
        (0..len as u32)
            .map(|i| (i.wrapping_mul(i) >> 7) as u8)
            .collect()
    }

    #[test]
    fn every_format_is_undone_with_or_without_the_size_that_follows() {
        for len in [0, 1, 70_000, 9 << 20] {
            let data = sample(len);
            for encode in ENCODERS {
                let mut compressed = encode(&data);
                let (plain, kind) = decompress(&compressed, 10 << 20).unwrap().unwrap();
                assert!(plain == data, "{kind} {len}");
                compressed.extend((len as u32).to_le_bytes());
                let (plain, _) = decompress(&compressed, 10 << 20).unwrap().unwrap();
                assert!(plain == data, "{kind} {len} with size");
            }
        }
        assert!(decompress(b"\x7fELF", 100).unwrap().is_none());
    }

    #[test]
    fn what_grows_beyond_the_limit_is_refused() {
        let data = vec![0; 3 << 20];
        for encode in ENCODERS {
            let compressed = encode(&data);
            assert!(decompress(&compressed, 3 << 20).is_ok());
            let error = decompress(&compressed, (3 << 20) - 1).unwrap_err();
            assert!(error.to_string().contains("larger"), "{error}");
        }
    }

    #[test]
    fn a_flipped_or_missing_byte_is_an_error_or_other_data_but_never_more() {
        let data = sample(600);
        for encode in ENCODERS {
            let good = encode(&data);
            for at in 4..good.len() {
                let mut bad = good.clone();
                bad[at] ^= 0x55;
                if let Ok(Some((plain, kind))) = decompress(&bad, 6000) {
                    assert!(plain.len() <= 6000, "{kind}");
                }
                if let Ok(Some((plain, kind))) = decompress(&good[..at], 6000) {
                    assert!(plain.len() <= data.len(), "{kind} cut at {at}");
                }
            }
        }
    }
}
