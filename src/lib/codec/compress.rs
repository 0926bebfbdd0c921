//! Compressing clusters as QEMU does.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::bulk::{Compressor as Encoder, Decompressor as Decoder};

use crate::error::{Error, Result};
use crate::format::coding::CompressionType;

/// The window of QEMU's deflate streams in bits (`qcow2-threads.c` of QEMU 10): it reads no larger one.
const WINDOW_BITS: u8 = 12;

/// How to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressionLevel {
    kind: CompressionType,
    level: u32,
}

impl CompressionLevel {
    /// Level `level` of `kind`; without one that which QEMU takes: 6 of zlib, 3 of zstd.
    ///
    /// # Errors
    /// Fails where there is no such level: zlib has 1 to 9, zstd 1 to 19.
    pub fn new(kind: CompressionType, level: Option<u32>) -> Result<Self> {
        let (default, most) = match kind {
            CompressionType::Zlib => (6, 9),
            CompressionType::Zstd => (3, 19),
        };
        let level = level.unwrap_or(default);
        match (1..=most).contains(&level) {
            true => Ok(Self { kind, level }),
            false => Err(Error::invalid(format!("{kind} has compression levels from 1 to {most}"))),
        }
    }

    /// The kind of compression.
    #[must_use]
    pub fn kind(self) -> CompressionType {
        self.kind
    }
}

/// Compresses clusters; each thread has its own.
pub(crate) struct Compressor {
    codec: Codec,
    /// What was compressed, decompressed again.
    back: Vec<u8>,
}

enum Codec {
    Zlib(Box<(Compress, Decompress)>),
    Zstd(Box<(Encoder<'static>, Decoder<'static>)>),
}

impl Compressor {
    pub(crate) fn new(level: CompressionLevel) -> Result<Self> {
        let failed = |e| Error::io("Could not start zstd", e);
        let codec = match level.kind {
            CompressionType::Zlib => {
                let deflate = Compress::new_with_window_bits(Compression::new(level.level), false, WINDOW_BITS);
                Codec::Zlib(Box::new((deflate, Decompress::new_with_window_bits(false, WINDOW_BITS))))
            }
            CompressionType::Zstd => {
                let encoder = Encoder::new(i32::try_from(level.level).unwrap_or(0)).map_err(failed)?;
                Codec::Zstd(Box::new((encoder, Decoder::new().map_err(failed)?)))
            }
        };
        Ok(Self { codec, back: Vec::new() })
    }

    /// Appends the compressed form of `cluster` to `out`, if it is smaller, as QEMU stores it then; returns its length.
    ///
    /// What does not decompress into the cluster again is not used: zlib-rs 0.6.8 writes damaged streams at level 1 with this window.
    pub(crate) fn append(&mut self, cluster: &[u8], out: &mut Vec<u8>) -> Option<usize> {
        let start = out.len();
        // There is room for what becomes larger: a stream is always finished, and leaves nothing behind for the next one.
        out.resize(start + cluster.len() + cluster.len() / 64 + 64, 0);
        let length = out.get_mut(start..).and_then(|room| self.compress(cluster, room));
        out.truncate(start + length.unwrap_or(0));
        length
    }

    fn compress(&mut self, cluster: &[u8], room: &mut [u8]) -> Option<usize> {
        self.back.resize(cluster.len(), 0);
        let length = match &mut self.codec {
            Codec::Zlib(codec) => {
                let (deflate, inflate) = &mut **codec;
                deflate.reset();
                inflate.reset(false);
                let status = deflate.compress(cluster, room, FlushCompress::Finish).ok()?;
                let length = usize::try_from(deflate.total_out()).ok().filter(|_| status == Status::StreamEnd)?;
                let packed = room.get(..length).filter(|packed| packed.len() < cluster.len())?;
                inflate.decompress(packed, &mut self.back, FlushDecompress::Finish).ok()?;
                (inflate.total_out() == cluster.len() as u64).then_some(length)?
            }
            Codec::Zstd(codec) => {
                let (encoder, decoder) = &mut **codec;
                let length = encoder.compress_to_buffer(cluster, room).ok()?;
                let packed = room.get(..length).filter(|packed| packed.len() < cluster.len())?;
                let back = decoder.decompress_to_buffer(packed, self.back.as_mut_slice()).ok()?;
                (back == cluster.len()).then_some(length)?
            }
        };
        (self.back == cluster).then_some(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Contents from easy to impossible to compress.
    fn contents(len: usize) -> Vec<Vec<u8>> {
        let random = |n: u64| (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_pow(3).to_be_bytes()[1];
        let random: Vec<u8> = (0..len as u64).map(random).collect();
        let text: Vec<u8> = b"All work and no play. ".iter().copied().cycle().take(len).collect();
        let mut half = text.clone();
        half[len / 2..].copy_from_slice(&random[len / 2..]);
        vec![random.clone(), text, half, vec![7; len], random]
    }

    #[test]
    fn what_is_compressed_comes_back_and_what_is_not_smaller_is_not_kept() {
        for bits in 9..=21 {
            let len = 1 << bits;
            for (kind, levels) in [(CompressionType::Zlib, 1..=9), (CompressionType::Zstd, 1..=5)] {
                for level in levels {
                    // One compressor for all: nothing is left of the cluster before.
                    let mut compressor = Compressor::new(CompressionLevel::new(kind, Some(level)).unwrap()).unwrap();
                    let mut out = b"before".to_vec();
                    for (content, at) in contents(len).iter().zip(0..) {
                        let start = out.len();
                        let length = compressor.append(content, &mut out);
                        assert_eq!(out.len(), start + length.unwrap_or(0));
                        assert!(
                            length.is_none() || !matches!(at, 0 | 4),
                            "content {at} of {len} bytes, {kind} {level}"
                        );
                        assert!(length.is_some() || matches!(at, 0 | 4) || level == 1, "{at}, {len}, {kind} {level}");
                        let Some(length) = length else { continue };
                        assert!(length < len);
                        let mut back = vec![0; len];
                        match kind {
                            CompressionType::Zlib => {
                                let mut zlib = Decompress::new_with_window_bits(false, WINDOW_BITS);
                                zlib.decompress(&out[start..], &mut back, FlushDecompress::Finish).unwrap();
                            }
                            CompressionType::Zstd => {
                                zstd::bulk::decompress_to_buffer(&out[start..], &mut back).unwrap();
                            }
                        }
                        assert!(back == *content);
                    }
                }
            }
        }
    }

    #[test]
    fn levels_are_those_of_the_kind() {
        assert!(CompressionLevel::new(CompressionType::Zlib, Some(10)).is_err());
        assert!(CompressionLevel::new(CompressionType::Zstd, Some(19)).is_ok());
        assert!(CompressionLevel::new(CompressionType::Zstd, Some(0)).is_err());
    }
}
