//! Header extensions (spec, "Header extensions").

use super::u32_at;
use crate::error::{Error, Result};

/// End of the extension area.
pub const END: u32 = 0;
/// The format of the backing file, as a name.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names for feature bits.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Where the directory of persistent bitmaps is.
pub const BITMAPS: u32 = 0x2385_2875;
/// Where the LUKS header is.
pub const LUKS: u32 = 0x0537_be77;
/// Name of the external data file.
pub const DATA_FILE: u32 = 0x4441_5441;

/// One header extension, kept as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extension {
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
                let name = String::from_utf8_lossy(name.get(..end)?);
                Some(name.chars().filter(|c| !c.is_control()).collect::<String>())
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
