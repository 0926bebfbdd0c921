//! Free clusters that the file still occupies.

use std::ops::Range;

use crate::check::counts::Counts;
use crate::error::{IoContext, Result};
use crate::sort::runs::runs;
use crate::storage::{BLOCK, Storage};
use crate::units::ClusterBits;

/// Free clusters that are no holes of the file yet, as bytes, in whole blocks of the file system.
pub(crate) fn idle(counts: &Counts, bits: ClusterBits, storage: &dyn Storage) -> Result<Vec<Range<u64>>> {
    idle_where(|cluster| counts.get(cluster) == 0, bits, storage)
}

/// The same for the clusters that `is_free` takes for free.
pub(crate) fn idle_where(
    is_free: impl Fn(u64) -> bool,
    bits: ClusterBits,
    storage: &dyn Storage,
) -> Result<Vec<Range<u64>>> {
    let len = storage.len().at("Could not get its length")?;
    let mut idle: Vec<Range<u64>> = Vec::new();
    for Range { start, end } in runs((0..bits.clusters(len)).filter(|&cluster| is_free(cluster))) {
        let bytes = (start << bits.bits()).next_multiple_of(BLOCK)..(end << bits.bits()).min(len) & !(BLOCK - 1);
        if !bytes.is_empty() {
            let data = storage.next_data(bytes.start).at("Could not look for holes")?;
            if data.is_some_and(|data| data.start < bytes.end) {
                idle.push(bytes);
            }
        }
    }
    Ok(idle)
}
