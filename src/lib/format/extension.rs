//! Header extensions (spec, "Header extensions").

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::coding::Encryption;
use super::{u32_at, u64_at};
use crate::error::{Error, Result};
use crate::name::shown;
use crate::units::ClusterBits;

/// End of the extension area.
pub(crate) const END: u32 = 0;
/// The format of the backing file, as a name.
pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names for feature bits.
pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
/// Where the directory of persistent bitmaps is.
pub(crate) const BITMAPS: u32 = 0x2385_2875;
/// Where the LUKS header is.
pub(crate) const LUKS: u32 = 0x0537_be77;

/// QEMU: the name of a backing file's format is shorter than this, in bytes.
const MAX_FORMAT: usize = 16;
/// Length of the LUKS extension: an offset and a length.
const LUKS_LENGTH: usize = 16;

/// One header extension, kept as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Extension {
    /// Its type.
    pub magic: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// The extensions in `window`, without the end marker.
pub(super) fn decode(mut window: &[u8]) -> Result<Vec<Extension>> {
    let mut extensions = Vec::new();
    while let (Some(magic), Some(length)) = (u32_at(window, 0), u32_at(window, 4)) {
        if magic == END {
            break;
        }
        let length = length as usize;
        let data = window
            .get(8..)
            .and_then(|rest| rest.get(..length))
            .ok_or_else(|| Error::corrupt("Header extension too large"))?;
        extensions.push(Extension { magic, data: data.to_vec() });
        window = window.get(8 + length.next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(extensions)
}

/// Fails, in QEMU's words, where an extension that is known is not as it must be. Bitmaps are not looked at: reading a disk does not
/// depend on them.
pub(super) fn refuse_invalid(
    extensions: &[Extension],
    encryption: Option<Encryption>,
    bits: ClusterBits,
) -> Result<()> {
    let mut has_luks = false;
    for Extension { magic, data } in extensions {
        let length = data.len();
        match *magic {
            BACKING_FORMAT if length >= MAX_FORMAT => {
                let what = format!("ERROR: ext_backing_format: len={length} too large (>={MAX_FORMAT})");
                return Err(Error::corrupt(what));
            }
            LUKS => {
                has_luks = true;
                let offset = u64_at(data, 0).unwrap_or(0);
                if encryption != Some(Encryption::Luks) {
                    return Err(Error::corrupt("CRYPTO header extension only expected with LUKS encryption method"));
                }
                if length != LUKS_LENGTH {
                    let what = format!("CRYPTO header extension size {length}, but expected size {LUKS_LENGTH}");
                    return Err(Error::corrupt(what));
                }
                if offset & (bits.bytes() - 1) != 0 {
                    let cluster = bits.bytes();
                    let what =
                        format!("Encryption header offset '{offset}' is not a multiple of cluster size '{cluster}'");
                    return Err(Error::corrupt(what));
                }
            }
            _ => {}
        }
    }
    if encryption == Some(Encryption::Luks) && !has_luks {
        return Err(Error::corrupt("Missing CRYPTO header for crypt method 2"));
    }
    Ok(())
}

/// Where the data of the first extension of type `magic` begins in `cluster`, whose extensions begin at `start`.
pub(crate) fn position(cluster: &[u8], start: usize, magic: u32) -> Option<usize> {
    let mut at = start;
    loop {
        match u32_at(cluster, at)? {
            END => return None,
            found if found == magic => return Some(at + 8),
            _ => at += 8 + (u32_at(cluster, at + 4)? as usize).next_multiple_of(8),
        }
    }
}

/// The names of the unknown incompatible feature bits, from the image's own table where it has one.
pub(super) fn feature_names(unknown: u64, extensions: &[Extension]) -> String {
    let table = extensions.iter().find(|e| e.magic == FEATURE_NAMES);
    let rows: Vec<&[u8]> = table.map_or(Vec::new(), |t| t.data.chunks_exact(48).collect());
    let name = |bit: u32| {
        rows.iter().find_map(|row| match row {
            [0, b, name @ ..] if u32::from(*b) == bit => {
                let end = name.iter().position(|&c| c == 0).unwrap_or(name.len());
                Some(shown(OsStr::from_bytes(name.get(..end)?)))
            }
            _ => None,
        })
    };
    (0..64)
        .filter(|bit| unknown >> bit & 1 == 1)
        .map(|bit| name(bit).unwrap_or_else(|| format!("Unknown incompatible feature: {:x}", 1u64 << bit)))
        .collect::<Vec<_>>()
        .join(", ")
}
