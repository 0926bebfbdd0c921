//! What is not deduplicated in place, by name.

use crate::check::Inspection;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::format::header::{Header, MAX_SNAPSHOTS};
use crate::pool;

/// Refuses by name what is not deduplicated in place; returns the sharer limit.
pub(crate) fn refuse(header: &Header) -> Result<u64> {
    header.refuse_unreadable()?;
    if header.extended_l2() {
        let what = "images with subclusters (extended_l2=on) are not deduplicated in place";
        return Err(Error::unsupported(what).advise(Advice::Convert));
    }
    header.refcount_bits.sharer_limit().ok_or_else(|| {
        Error::unsupported(format!(
            "refcount_bits={} cannot hold the 4 references that sharing with a pool needs",
            header.refcount_bits.bits()
        ))
        .advise(Advice::WidenRefcounts { bits: 16 })
    })
}

pub(crate) fn refuse_snapshots(inspection: &Inspection) -> Result<()> {
    let snapshots = &inspection.snapshots;
    if snapshots.iter().any(|s| s.name == pool::NAME.as_bytes() && !s.is_pool()) {
        return Err(Error::unsupported(format!(
            "the image has a snapshot called '{}' that is not a deduplication pool; it is left alone; delete it, or take it again under another name",
            pool::NAME
        )));
    }
    if inspection.pool.is_none() && snapshots.len() >= MAX_SNAPSHOTS as usize {
        return Err(Error::new(
            ErrorKind::Limit,
            "the image has no room for one more snapshot, which the pool would be",
        ));
    }
    Ok(())
}
