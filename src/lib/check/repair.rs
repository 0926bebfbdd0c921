//! Mending what a check found, in an order of writes that is safe at every point (I3).
//!
//! ```text
//!  step                                              after a crash here
//!  - clear autoclear bits that are not known; flush  as after any writer that does not know them
//!  - zero clusters lose a preallocated place that is  they read as before
//!    no cluster; flush
//!  1 raise refcounts that are too low; flush         some are right, none is lower than before
//!    (or write new refcount blocks and a new table   the old ones still count
//!    behind the file; flush; switch the header to
//!    them in one sector; flush)                      one of the two counts, whole
//!  2 clear COPIED that should not be set; flush      QEMU copies before it writes: never wrong
//!  3 lower refcounts that are too high, set COPIED   leaks, needless copies
//!    where it should be; flush
//!  4 clear the dirty and the corrupt bit; flush      the next check clears them
//!  5 write a stale directory of the pool anew; flush it stays stale, and nobody uses it
//! ```
//!
//! No guest data is written, moved or dropped, and no table of a snapshot or a bitmap is touched but for COPIED flags of L2
//! tables that a snapshot shares with the active disk, which mean nothing to it. Where one finding cannot be mended nothing is
//! written: freeing clusters by the word of a damaged mapping could free what a repair by hand would still find.

use super::finding::{Finding, Repairable};
use super::mend::Mender;
use super::pool::write_directory;
use super::{ALONE, CheckOptions, Inspection, Report, inspect};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{AUTOCLEAR_AT, Header, autoclear, incompatible};
use crate::format::table::L2Entry;
use crate::storage::{Storage, flush, write};
use crate::work::Work;

/// What to mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Leaked clusters only.
    Leaks,
    /// Everything that can be mended.
    All,
}

/// What a repair did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Repaired {
    /// What the check after the repair found; of the one check, where nothing was to be mended.
    pub report: Report,
    /// Leaked clusters that were freed.
    pub leaks_fixed: u64,
    /// Corruptions that were mended.
    pub corruptions_fixed: u64,
}

impl From<Report> for Repaired {
    /// A check without a repair.
    fn from(report: Report) -> Self {
        Self { report, leaks_fixed: 0, corruptions_fixed: 0 }
    }
}

/// Checks the image in `storage` and mends it, then checks it again; the findings of the first check go to `sink`, those of the
/// second one only if there was a repair.
///
/// # Errors
/// Those of [`super::check`], and of writing. [`ErrorKind::Corrupt`] where something cannot be mended; then nothing was written.
pub fn repair(
    storage: &dyn Storage,
    what: Repair,
    options: CheckOptions,
    work: &Work<'_>,
    sink: &mut (dyn FnMut(&Finding) + Send),
) -> Result<Repaired> {
    let before = inspect(storage, options, work, ALONE, sink)?;
    let nothing = Repaired::from(before.report);
    let flags = incompatible::DIRTY | incompatible::CORRUPT;
    let marked = what == Repair::All && before.header.incompatible & flags != 0;
    let wanted = match what {
        Repair::Leaks => before.report.leaks > 0,
        Repair::All => before.repair > Repairable::Nothing,
    };
    if let Some(hopeless) = &before.hopeless
        && wanted
    {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("nothing was repaired, because this cannot be: {hopeless}"),
        ));
    }
    if !wanted && !marked {
        return Ok(nothing);
    }
    if what == Repair::Leaks && before.report.corruptions + before.report.check_errors > 0 {
        let message = "nothing was repaired: leaked clusters are not freed while there is corruption; use -r all";
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    work.cancel.check()?;
    let first = before.report;
    clear_unknown_autoclear(storage, &before.header)?;
    // What a misplaced preallocation seemed to refer to is not referred to any more: count again.
    let before = match before.misplaced.is_empty() {
        true => before,
        false => {
            drop_preallocations(storage, &before)?;
            inspect(storage, options, work, ALONE, &mut |_| {})?
        }
    };
    Mender::new(storage, &before.header, &before.counts).mend(&before, flags)?;
    if let (Repair::All, Some(directory)) = (what, &before.stale) {
        write_directory(directory, &before, storage)?;
    }
    let after = inspect(storage, options, work, ALONE, sink)?.report;
    Ok(Repaired {
        report: after,
        leaks_fixed: first.leaks.saturating_sub(after.leaks),
        corruptions_fixed: (first.corruptions + first.check_errors)
            .saturating_sub(after.corruptions + after.check_errors),
    })
}

/// Spec: a writer first clears the autoclear bits that it does not know. Bitmaps stay valid, as no guest data changes.
pub(crate) fn clear_unknown_autoclear(storage: &dyn Storage, header: &Header) -> Result<()> {
    if header.version < 3 || header.autoclear & !autoclear::KNOWN == 0 {
        return Ok(());
    }
    let known = (header.autoclear & autoclear::KNOWN).to_be_bytes();
    write(storage, &known, AUTOCLEAR_AT)?;
    flush(storage)
}

/// Makes plain zero clusters of those whose preallocated place is no cluster. They read as before: no data was there.
fn drop_preallocations(storage: &dyn Storage, before: &Inspection) -> Result<()> {
    // With subclusters the bitmap says what is zero, and stays.
    let entry = match before.header.extended_l2() {
        true => L2Entry::Unallocated,
        false => L2Entry::Zero { host: None, copied: false },
    };
    let word = entry.encode(before.header.cluster_bits).to_be_bytes();
    for &at in &before.misplaced {
        write(storage, &word, at)?;
    }
    flush(storage)
}
