//! The end of every change: what is on the disk is counted anew, and counts and flags are made to say that.

use std::ops::Range;

use crate::check::{CheckOptions, Inspection, inspect};
use crate::edit::idle::idle;
use crate::edit::mend::{Mender, Pass};
use crate::edit::phases::SETTLING;
use crate::error::{Advice, Error, IoContext, Result};
use crate::format::header::incompatible;
use crate::image::refcounts::Refcounts;
use crate::storage::{Storage, flush};
use crate::work::Work;

/// What is given back to the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Punch {
    /// Clusters that were freed.
    Freed,
    /// All free clusters.
    All,
}

/// Said where the image is not clean after a failure.
pub(crate) const UNSETTLED: Advice = Advice::RepairAfter;

/// Counts everything once more and brings refcounts and flags in line with that, whatever was done before; gives freed clusters
/// back to the file system. A file that has grown from `old_len` bytes for nothing gets that length again.
///
/// What is lowered follows from the image as it is, never from what the plan meant to do.
pub(crate) fn settle(storage: &dyn Storage, old_len: u64, punch: Punch, work: &Work) -> Result<Inspection> {
    // What was written before is what is counted, on the disk as well.
    flush(storage)?;
    // A request to stop does not reach this far: it is what makes stopping safe.
    let work = work.unstoppable();
    let now = inspect(storage, CheckOptions::default(), &work, SETTLING, &mut |_| {})?;
    if let Some(hopeless) = now.hopeless.as_ref().or(now.doubt.as_ref()) {
        return Err(
            Error::corrupt(format!("the image is not as it should be: {hopeless}")).advise_all(hopeless.advice())
        );
    }
    let bits = now.header.cluster_bits;
    let refcounts = Refcounts::load(storage, &now.header)?;
    let mender = Mender::new(storage, &now.header, &now.counts);
    mender.refcounts(&refcounts, Pass::Raise)?;
    mender.copied(&now.tables.active, false)?;
    let freed = mender.refcounts(&refcounts, Pass::Lower)?;
    mender.copied(&now.tables.active, true)?;
    let used = (0..now.counts.clusters()).rev().find(|&cluster| now.counts.get(cluster) > 0);
    let file_len = now.file_len.min(used.map_or(0, |cluster| (cluster + 1) << bits.bits()).max(old_len));
    if file_len < now.file_len {
        storage.set_len(file_len).at("Could not make the file shorter")?;
    }
    let ranges = match punch {
        Punch::All => idle(&now.counts, bits, storage)?,
        Punch::Freed => {
            let bytes = |run: &Range<u64>| run.start << bits.bits()..(run.end << bits.bits()).min(file_len);
            freed.iter().map(bytes).filter(|bytes| !bytes.is_empty()).collect()
        }
    };
    for bytes in ranges {
        if !storage.punch(bytes.clone()).at(format_args!("Could not give back the space at {:#x}", bytes.start))? {
            break;
        }
    }
    mender.clear(incompatible::DIRTY)?;
    Ok(now)
}
