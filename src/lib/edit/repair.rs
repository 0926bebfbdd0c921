//! Mending what a check found, in an order of writes that is safe at every point (I3).
//!
//! Its steps are those marked `r` in [`crate::edit`].
//!
//! No guest data is written, moved or dropped, and no table of a snapshot or a bitmap is touched but for COPIED flags of L2
//! tables that a snapshot shares with the active disk, which mean nothing to it. Where one finding cannot be mended nothing is
//! written: freeing clusters by the word of a damaged mapping could free what a repair by hand would still find. Where two parts
//! claim a cluster, steps 4 and 6 keep writers from harming either; step 11 then sets flags only, and no count is lowered.

use std::fmt;

use crate::check::finding::{Finding, Kind, Remark, Repairable, Severity};
use crate::check::overlap::Metadata;
use crate::check::{ALONE, CheckOptions, How, Inspection, Report, inspect, inspect_as, snapshots};
use crate::edit::directory::write_directory;
use crate::edit::marks::{clear_marks, clear_unknown_autoclear};
use crate::edit::mend::Mender;
use crate::error::{Advice, Error, Left, Result};
use crate::format::header::{Header, incompatible};
use crate::format::table::L2Entry;
use crate::image::read_header;
use crate::storage::{Storage, flush, write};
use crate::units::HostOffset;
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
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Repaired {
    /// What the check after the repair found; of the one check, where nothing was mended.
    pub report: Report,
    /// Leaked clusters that were freed.
    pub leaks_fixed: u64,
    /// Corruptions that were mended.
    pub corruptions_fixed: u64,
    /// Whether the image was marked corrupt, and is so no more.
    pub unmarked: bool,
    /// Why nothing was written, where something is to be mended.
    pub refused: Option<Refusal>,
}

/// Why nothing is repaired.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// This cannot be repaired.
    Hopeless(Kind),
    /// Leaks were to be repaired, and there is corruption.
    Corruption,
}

impl Refusal {
    /// What can be done about it.
    #[must_use]
    pub fn advice(&self) -> Option<Advice> {
        match self {
            Self::Hopeless(kind) => kind.advice(),
            Self::Corruption => Some(Advice::RepairAll),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hopeless(kind) => write!(f, "nothing was repaired, because this cannot be: {kind}"),
            Self::Corruption => {
                f.write_str("nothing was repaired: leaked clusters are not freed while there is corruption")
            }
        }
    }
}

impl From<Report> for Repaired {
    /// A check without a repair.
    fn from(report: Report) -> Self {
        Self { report, leaks_fixed: 0, corruptions_fixed: 0, unmarked: false, refused: None }
    }
}

impl Repaired {
    /// The same, without the note on a mark that is `gone`.
    fn without_note(mut self, gone: bool) -> Self {
        self.report.benign -= u64::from(gone);
        self
    }
}

/// Whether the image in `storage` was not closed cleanly and its refcounts are wrong for that, so that it must be repaired before
/// anybody writes to it. Leaks are no reason: whoever writes in place frees them in the end.
///
/// # Errors
/// Those of [`crate::check::check`].
pub(crate) fn is_unready(storage: &dyn Storage, work: &Work) -> Result<bool> {
    let header = read_header(storage)?;
    if header.incompatible & incompatible::DIRTY == 0 || header.refuse_unreadable().is_err() {
        return Ok(false);
    }
    let found = inspect(storage, CheckOptions::default(), &work.silent(), ALONE, &mut |_| {})?.report;
    Ok(found.corruptions + found.check_errors > 0)
}

/// Repairs the image in `storage` if [`is_unready`], as QEMU does when it opens such a one to write to it. It stays marked as not closed
/// cleanly: that is for the writer that follows. Returns what was done.
///
/// # Errors
/// Those of [`repair`](crate::inplace::repair); [`Corrupt`](crate::ErrorKind::Corrupt) where the image is damaged beyond that. Then nothing was written, or what was is right.
pub(crate) fn make_ready(storage: &dyn Storage, work: &Work) -> Result<Option<Repaired>> {
    if !is_unready(storage, work)? {
        return Ok(None);
    }
    let what = (Repair::All, CheckOptions::default());
    let repaired = work.run(|| repair_and(storage, what, &work.silent(), 0, &mut |_| {}))?;
    let left = repaired.report.corruptions + repaired.report.check_errors + repaired.report.findings_beyond;
    match (&repaired.refused, left) {
        (None, 0) => Ok(Some(repaired)),
        (Some(why), _) => {
            let what = format!("the image was not closed cleanly, and {why}");
            Err(Error::corrupt(what).advise_all(why.advice()).advise(Advice::Check))
        }
        (None, _) => {
            let what = "the image was not closed cleanly, and not all could be repaired";
            Err(Error::corrupt(what).advise(Advice::Check))
        }
    }
}

/// As [`repair`](crate::inplace::repair), with what is to be mended and how to look; takes the incompatible feature bits `marks` away where nothing wrong is left.
pub(crate) fn repair_and(
    storage: &dyn Storage,
    (what, options): (Repair, CheckOptions),
    work: &Work,
    marks: u64,
    sink: &mut (dyn FnMut(&Finding) + Send),
) -> Result<Repaired> {
    let any_extra = what == Repair::All;
    work.progress.start();
    work.progress.within(0.0, 0.5);
    let first = inspect_as(storage, options, work, ALONE, How { any_extra, ..How::default() }, sink)?;
    work.progress.within(0.5, 1.0);
    let report = first.report;
    let was_wanted = first.repair > Repairable::Nothing;
    let mut plan = first;
    if what == Repair::All && (plan.hopeless.is_some() || plan.doubt.is_some() || !plan.misplaced.is_empty()) {
        // A zero cluster reads the same without its place, and some of what was found may be of that place.
        let how = How { any_extra, without: Some(Metadata::of(&plan)), ..How::default() };
        let without = inspect_as(storage, options, &work.silent(), ALONE, how, &mut |_| {})?;
        if !without.misplaced.is_empty() {
            plan = without;
        }
    }
    let wanted = match what {
        Repair::Leaks => report.leaks > 0,
        Repair::All => was_wanted || plan.repair > Repairable::Nothing,
    };
    if !wanted {
        let unmarked = unmark(storage, &plan.header, &report, marks)?;
        return Ok(Repaired { unmarked, ..Repaired::from(report).without_note(unmarked) });
    }
    if let Some(why) = refusal(storage, what, &plan)? {
        return Ok(Repaired { refused: Some(why), ..Repaired::from(report) });
    }
    work.cancel.check()?;
    clear_unknown_autoclear(storage, &plan.header)?;
    let look = |how: How| {
        let seen = inspect_as(storage, options, &work.silent(), ALONE, How { any_extra, ..how }, &mut |_| {});
        let seen = seen.map_err(|e| e.leaving(Left::HalfMended))?;
        match &seen.hopeless {
            None => Ok(seen),
            Some(hopeless) => Err(Error::internal(format_args!("a repair came upon what it had not seen: {hopeless}"))),
        }
    };
    if !plan.misplaced.is_empty() {
        drop_preallocations(storage, &plan)?;
        plan = look(How::default())?;
    }
    if needs_table(&plan) {
        let at = write_snapshots(storage, &plan)?;
        plan = look(How { snapshots_at: Some(at), ..How::default() })?;
    }
    let in_doubt = plan.doubt.is_some();
    Mender::new(storage, &plan.header, &plan.counts).mend(&plan)?;
    if let (Repair::All, Some(directory)) = (what, &plan.stale) {
        write_directory(directory, &plan, storage)?;
    }
    drop(plan);
    let mut note = None;
    let mut others = |finding: &Finding| match finding.kind {
        // That is decided by what is found here.
        Kind::MarkedCorrupt => note = Some(finding.clone()),
        _ => sink(finding),
    };
    let after = inspect(storage, options, work, ALONE, &mut others).map_err(|e| e.leaving(Left::Unchecked))?;
    let unmarked = unmark(storage, &after.header, &after.report, marks)?;
    let after = after.report;
    if in_doubt && after.leaks > 0 {
        let kept = Kind::Remark(Remark::LeaksKept);
        sink(&Finding { severity: Severity::Benign, kind: kept, times: 1 });
    }
    note.filter(|_| !unmarked).iter().for_each(sink);
    Ok(Repaired {
        leaks_fixed: report.leaks.saturating_sub(after.leaks),
        corruptions_fixed: (report.corruptions + report.check_errors)
            .saturating_sub(after.corruptions + after.check_errors),
        unmarked,
        ..Repaired::from(after).without_note(unmarked)
    })
}

/// Why nothing is to be written, if that is so.
fn refusal(storage: &dyn Storage, what: Repair, plan: &Inspection) -> Result<Option<Refusal>> {
    let cannot = |what: &Kind| Some(Refusal::Hopeless(what.clone()));
    if let Some(hopeless) = &plan.hopeless {
        return Ok(cannot(hopeless));
    }
    let corrupt = plan.report.corruptions + plan.report.check_errors > 0 || plan.doubt.is_some();
    if what == Repair::Leaks && corrupt {
        return Ok(Some(Refusal::Corruption));
    }
    let Some(doubt) = &plan.doubt else { return Ok(None) };
    // Where it is not known which of two parts has a cluster, counts are raised, which is right for both. Nothing else is written there.
    let mends = plan.misplaced.is_empty()
        && plan.stale.is_none()
        && !needs_table(plan)
        && plan.repair < Repairable::Rebuild
        && Mender::new(storage, &plan.header, &plan.counts).spares_doubt(plan)?;
    Ok(if mends { None } else { cannot(doubt) })
}

/// Takes the feature bits `marks` away where nothing that QEMU looks for is wrong any more, as QEMU does: then writing does no harm.
/// Returns whether the image was marked corrupt.
fn unmark(storage: &dyn Storage, header: &Header, report: &Report, marks: u64) -> Result<bool> {
    if report.corruptions + report.check_errors > 0 {
        return Ok(false);
    }
    if header.incompatible & marks != 0 {
        clear_unknown_autoclear(storage, header)?;
        clear_marks(storage, header, marks)?;
    }
    Ok(header.incompatible & marks & incompatible::CORRUPT != 0)
}

/// Whether an entry of the snapshot table is to be written anew.
fn needs_table(plan: &Inspection) -> bool {
    plan.long_entries || plan.header.version >= 3 && plan.snapshots.iter().any(|snapshot| snapshot.disk_size.is_none())
}

/// Writes a mended snapshot table behind the file, where nobody looks for it yet, and returns where.
fn write_snapshots(storage: &dyn Storage, plan: &Inspection) -> Result<HostOffset> {
    let bits = plan.header.cluster_bits;
    let table = snapshots::mended(&plan.snapshots, &plan.header)?;
    let at = HostOffset(bits.clusters(plan.file_len).max(plan.counts.clusters()) << bits.bits());
    write(storage, &table, at.0)?;
    flush(storage)?;
    Ok(at)
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
