//! Doing what a plan says, in an order of writes that a power failure cannot hurt.

use crate::dedup::group::ByDuplicate;
use crate::edit::allocate::Allocator;
use crate::edit::change::{Change, Gain, Overwriting};
use crate::edit::entries::Tables;
use crate::edit::marks::{set_dirty, upgraded};
use crate::edit::mend::{Mender, Pass};
use crate::edit::prepare::{Prepared, prepare};
use crate::edit::room::{self, Fit, Needs};
use crate::edit::settle::{Punch, UNSETTLED, settle};
use crate::error::{Advice, Error, ErrorKind, Left, Result};
use crate::format::header::{SNAPSHOTS_AT, incompatible};
use crate::format::l2;
use crate::format::table::L2Entry;
use crate::image::refcounts::Refcounts;
use crate::storage::latch::Latch;
use crate::storage::sparse::rewrite;
use crate::storage::{Storage, flush, write};
use crate::survey::Ground;
use crate::survey::tables::L2Tables;
use crate::units::{HostOffset, to_usize};
use crate::work::Work;

/// Writes the content of new clusters to an image of which the ground is known.
pub(crate) type Fill<'a> = dyn Fn(&Ground, &dyn Storage) -> Result<()> + 'a;

/// New clusters with content of their own: where their places came from, and who fills them.
struct Filling<'a> {
    free: Allocator,
    fill: &'a Fill<'a>,
}

/// Does what `change` says; returns the number of batches.
pub(crate) fn apply(change: &mut Change, storage: &dyn Storage, punch: Punch, work: &Work) -> Result<u64> {
    run(change, None, storage, punch, work)
}

/// Overwrites parts of the disk; `fill` writes the content of new clusters, when they lie in the file and nothing leads to them.
pub(crate) fn overwrite(overwriting: Overwriting, fill: &Fill<'_>, storage: &dyn Storage, work: &Work) -> Result<u64> {
    let Overwriting { mut change, free } = overwriting;
    run(&mut change, Some(Filling { free, fill }), storage, Punch::Freed, work)
}

fn run(
    change: &mut Change,
    filling: Option<Filling<'_>>,
    storage: &dyn Storage,
    punch: Punch,
    work: &Work,
) -> Result<u64> {
    let found = change.ground.inspection.report;
    if found.corruptions + found.check_errors > 0 {
        // Of an image that was not closed cleanly; make_ready was to come first.
        return Err(Error::corrupt("the image was not closed cleanly").advise(Advice::RepairFirst));
    }
    let storage = &Latch::new(storage);
    let inspection = &change.ground.inspection;
    let before = inspection.file_len;
    // A run that was killed may have freed clusters and not given them back.
    let unsettled = inspection.header.incompatible & incompatible::DIRTY != 0 || inspection.report.leaks > 0;
    let punch = if unsettled { Punch::All } else { punch };
    let (begun, fill) = filling.map_or((None, None), |filling| (Some(filling.free), Some(filling.fill)));
    let prepared = prepare(change, begun, storage)?;
    // What is overwritten may hold holes, so that how much it takes is known only then.
    let fits = if fill.is_some() { Fit::Now } else { fits(change, &prepared, storage)? };
    let changed = match fits {
        Fit::AfterRelease => {
            let released = room::release(change, &prepared, storage);
            released.and_then(|()| raise_counts(change, &prepared)).and_then(|()| work.cancel.check())
        }
        _ => {
            raise_counts(change, &prepared)?;
            work.cancel.check()?;
            Ok(())
        }
    };
    let changed = changed.and_then(|()| write_change(change, &prepared, storage, fill, work));
    // Clusters that were filled in vain are free, and no holes any more.
    let punch = if changed.is_err() { Punch::All } else { punch };
    // What was done so far is right. Settled, it is clean as well.
    match (changed, settle(storage, before, punch, work)) {
        (Ok(batches), Ok(_)) => Ok(batches),
        (Err(error), Ok(_)) => Err(error.leaving(Left::Clean)),
        // Who asked to stop asked for no more than that.
        (Err(stopped), Err(error)) if stopped.kind() == ErrorKind::Cancelled => Err(error.advise(UNSETTLED)),
        (Err(error), Err(_)) => Err(error.advise(UNSETTLED)),
        // Perhaps only giving back space failed: once more.
        (Ok(_), Err(error)) => match settle(storage, before, punch, work) {
            Ok(_) => Err(error),
            Err(_) => Err(error.advise(UNSETTLED)),
        },
    }
}

/// Fails where there is no room for what `prepared` writes.
fn fits(change: &Change, prepared: &Prepared, storage: &dyn Storage) -> Result<Fit> {
    let needs = Needs::of(change, prepared, storage)?;
    let fits = room::fit(needs, change, prepared, storage)?;
    if fits == Fit::Not { needs.ensure().map(|()| fits) } else { Ok(fits) }
}

/// The steps up to the last change of an L2 entry; returns the number of batches.
fn write_change(
    change: &Change,
    prepared: &Prepared,
    storage: &dyn Storage,
    fill: Option<&Fill<'_>>,
    work: &Work,
) -> Result<u64> {
    let mut header = set_dirty(storage, &change.ground.inspection.header)?;
    let bits = header.cluster_bits;

    let counts = &change.ground.inspection.counts;
    prepared.growth.extend(storage)?;
    if let Some(fill) = fill {
        fill(&change.ground, storage)?;
    }
    Mender::new(storage, &header, counts).refcounts(&Refcounts::load(storage, &header)?, Pass::Raise)?;
    prepared.growth.write(storage, &mut header, counts)?;
    if let Some(pool) = &prepared.pool {
        pool.write(change, counts, storage)?;
    }
    if let Some((place, bytes, _)) = prepared.snapshots.as_ref().filter(|(_, bytes, _)| !bytes.is_empty()) {
        write(storage, bytes, place.offset(bits).0)?;
    }
    let overwriting = change.writes().map(|writes| Tables::new(change, writes, storage));
    if let Some(tables) = &overwriting {
        tables.write_new()?;
    }
    flush(storage)?;

    Mender::new(storage, &header, counts).copied(&change.ground.inspection.tables.active, false)?;

    if let Some((place, _, snapshots)) = &prepared.snapshots {
        let offset = if *snapshots == 0 { HostOffset(0) } else { place.offset(bits) };
        (header.snapshots, header.snapshots_offset) = (*snapshots, offset);
    }
    if change.upgrades() {
        write(storage, &upgraded(&header)?, 0)?;
        flush(storage)?;
    } else if prepared.snapshots.is_some() {
        write(storage, &header.snapshots_field(), SNAPSHOTS_AT)?;
        flush(storage)?;
    }

    let batches = redirect(change, storage, work)?;
    overwriting.map_or(Ok(batches), |tables| tables.switch(work).map(|()| batches + 1))
}

/// Counts the references that clusters gain: from the new pool, and from the L2 entries of duplicates.
fn raise_counts(change: &mut Change, prepared: &Prepared) -> Result<()> {
    let bits = change.ground.inspection.header.cluster_bits;
    prepared.growth.count(bits, &mut change.ground.inspection.counts)?;
    let counts = &change.ground.inspection.counts;
    let gain = |unit: u64, times: u64| {
        let bytes = change.ground.units.bytes(unit);
        counts.add(bytes.start, bytes.end - bytes.start, times, true).map_err(|_| {
            Error::new(ErrorKind::Limit, format!("the refcount of the cluster at {:#x} has no more room", bytes.start))
        })
    };
    for new in change.joining() {
        let unit = new?.unit;
        if !change.ground.members.bits().contains(unit) {
            gain(unit, 1)?;
        }
    }
    for link in change.sharing().into_iter().flat_map(|sharing| sharing.links.iter()) {
        let ByDuplicate(link) = link?;
        gain(link.keeper, change.ground.units.users(link.duplicate))?;
    }
    for gained in change.writes().into_iter().flat_map(|writes| writes.gains.iter()) {
        let Gain { unit, references } = gained?;
        gain(unit, references)?;
    }
    Ok(())
}

/// Points the L2 entries of duplicates at what they share, and those of zeros at nothing.
fn redirect(change: &Change, storage: &dyn Storage, work: &Work) -> Result<u64> {
    let Some(sharing) = change.redirects() else { return Ok(0) };
    let header = &change.ground.inspection.header;
    let bits = header.cluster_bits;
    // The zero flag even without a backing file: an incremental backup gets its backing file only later, by rebase -u, and must
    // not let it show through then.
    let gap = L2Entry::Zero { host: None, copied: false }.encode(bits);
    let tables = L2Tables::new(storage, header, &change.ground.inspection.tables);
    let mut links = sharing.links.iter();
    let (mut first, mut batches) = (0u64, 0);
    loop {
        work.cancel.check()?;
        let keeper = |link: Result<ByDuplicate>| Ok(change.ground.units.entry(link?.0.keeper).encode(bits));
        let keepers = links.by_ref().take(sharing.batch).map(keeper).collect::<Result<Vec<u64>>>()?;
        let replaced = |entry: L2Entry| match (entry, change.ground.units.of(entry)) {
            (L2Entry::Zero { host: Some(_), .. }, _) => Some(gap),
            (_, Some(unit)) if sharing.zeros.contains(unit) => Some(gap),
            // Those of other batches come before or later.
            (_, Some(unit)) => {
                let rank = sharing.duplicates.rank(unit)?.checked_sub(first)?;
                keepers.get(to_usize(rank)).copied()
            }
            (_, None) => None,
        };
        tables.visit(
            |table, content| {
                let old = content.to_vec();
                let changed = l2::rewrite(header, content, |_, entry| replaced(entry));
                if changed { rewrite(storage, &old, content, table.host().0) } else { Ok(()) }
            },
            |()| Ok(()),
        )?;
        flush(storage)?;
        batches += 1;
        first += keepers.len() as u64;
        if first >= sharing.links.len() {
            return Ok(batches);
        }
    }
}
