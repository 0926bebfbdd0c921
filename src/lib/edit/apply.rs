//! Doing what a plan says, in an order of writes that a power failure cannot hurt.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::check::counts::Counts;
use crate::check::{CheckOptions, Inspection, inspect};
use crate::dedup::group::Link;
use crate::dedup::plan::split_run;
use crate::edit::allocate::{Allocator, Growth};
use crate::edit::change::Change;
use crate::edit::mend::{Mender, Pass};
use crate::edit::pool_writer::Places;
use crate::edit::room::{self, Fit, Needs};
use crate::error::{Error, ErrorKind, IoContext, Left, OrInternal, Result};
use crate::format::header::{Header, INCOMPATIBLE_AT, SECTOR, SNAPSHOTS_AT, incompatible};
use crate::format::snapshot::{MAX_TABLE_BYTES, Snapshot};
use crate::format::table::L2Entry;
use crate::image::refcounts::Refcounts;
use crate::inplace::SETTLING;
use crate::inplace::overwrite::tables::Tables;
use crate::inplace::repair::clear_unknown_autoclear;
use crate::storage::device::ensure_capacity;
use crate::storage::latch::Latch;
use crate::storage::sparse::rewrite;
use crate::storage::{Storage, flush, write};
use crate::survey::Ground;
use crate::survey::tables::L2Tables;
use crate::units::{ClusterBits, HostCluster, HostOffset, to_usize};
use crate::work::Work;

/// Free space is given back in whole blocks of the file system; this is what most have.
const BLOCK: u64 = 4096;

/// What is given back to the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Punch {
    /// Clusters that were freed.
    Freed,
    /// All free clusters.
    All,
}

/// Writes the content of new clusters to an image of which the ground is known.
pub(crate) type Fill<'a> = dyn Fn(&Ground, &dyn Storage) -> Result<()> + 'a;

/// Said where the image is not clean after a failure.
pub(crate) const UNSETTLED: &str = "; no data is lost, but the image needs 'dedup-img check -r all'";

/// What is written before anything refers to it.
pub(crate) struct Prepared {
    pub(crate) growth: Growth,
    pool: Option<Places>,
    /// The new snapshot table, if there is one.
    snapshots: Option<(HostCluster, Vec<u8>, u32)>,
}

impl Prepared {
    /// What is written to the places that were chosen, in bytes of the file: of the pool's last clusters and of the snapshot table's
    /// only what they hold.
    pub(crate) fn writes(&self, bits: ClusterBits) -> Vec<Range<u64>> {
        let mut writes = self.pool.as_ref().map_or_else(Vec::new, |pool| pool.writes(bits));
        if let Some((place, bytes, _)) = &self.snapshots {
            writes.extend((0..bytes.len() as u64).step_by(bits.len()).map(|at| {
                let start = place.offset(bits).0 + at;
                start..start + (bytes.len() as u64 - at).min(bits.bytes())
            }));
        }
        let own: BTreeSet<u64> = writes.iter().map(|range| range.start >> bits.bits()).collect();
        let others = self.growth.taken.iter().filter(|cluster| !own.contains(&cluster.0));
        let others: Vec<Range<u64>> =
            others.map(|cluster| cluster.offset(bits).0).map(|at| at..at + bits.bytes()).collect();
        writes.extend(others);
        writes
    }
}

/// What `change` needs, and the places for it. Nothing is written.
pub(crate) fn needs(change: &Change, storage: &dyn Storage) -> Result<(Needs, Prepared)> {
    let prepared = prepare(change, None, storage)?;
    let needs = Needs::of(change, &prepared, storage)?;
    Ok((needs, prepared))
}

/// Does what `change` says; returns the number of batches.
pub(crate) fn apply(change: &mut Change, storage: &dyn Storage, punch: Punch, work: &Work) -> Result<u64> {
    apply_with(change, storage, punch, &|_, _| Ok(()), work)
}

/// The same; `fill` writes the content of new clusters, when they lie in the file and nothing leads to them.
pub(crate) fn apply_with(
    change: &mut Change,
    storage: &dyn Storage,
    punch: Punch,
    fill: &Fill<'_>,
    work: &Work,
) -> Result<u64> {
    let found = change.ground.inspection.report;
    if found.corruptions + found.check_errors > 0 {
        // Of an image that was not closed cleanly; check::make_ready was to come first.
        return Err(Error::corrupt("the image was not closed cleanly; run dedup-img check -r all on it first"));
    }
    let storage = &Latch::new(storage);
    let inspection = &change.ground.inspection;
    let before = inspection.file_len;
    // A run that was killed may have freed clusters and not given them back.
    let unsettled = inspection.header.incompatible & incompatible::DIRTY != 0 || inspection.report.leaks > 0;
    let punch = if unsettled { Punch::All } else { punch };
    let begun = change.writes.as_mut().and_then(|writes| writes.free.take());
    let prepared = prepare(change, begun, storage)?;
    // What is overwritten may hold holes, so that how much it takes is known only then.
    let fits = if change.writes.is_some() { Fit::Now } else { fits(change, &prepared, storage)? };
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
        (Err(stopped), Err(error)) if stopped.kind() == ErrorKind::Cancelled => Err(error.ending(UNSETTLED)),
        (Err(error), Err(_)) => Err(error.ending(UNSETTLED)),
        // Perhaps only giving back space failed: once more.
        (Ok(_), Err(error)) => match settle(storage, before, punch, work) {
            Ok(_) => Err(error),
            Err(_) => Err(error.ending(UNSETTLED)),
        },
    }
}

/// Fails where there is no room for what `prepared` writes.
fn fits(change: &Change, prepared: &Prepared, storage: &dyn Storage) -> Result<Fit> {
    let needs = Needs::of(change, prepared, storage)?;
    let fits = room::fit(needs, change, prepared, storage)?;
    if fits == Fit::Not { needs.ensure().map(|()| fits) } else { Ok(fits) }
}

/// Chooses places for what is new. Nothing is written.
fn prepare(change: &Change, begun: Option<Allocator>, storage: &dyn Storage) -> Result<Prepared> {
    let inspection = &change.ground.inspection;
    let header = &inspection.header;
    let bits = header.cluster_bits;
    let refcounts = Refcounts::load(storage, header)?;
    let mut free = match begun {
        Some(free) => free,
        None => Allocator::new(&refcounts, header, inspection.file_len, &inspection.counts)?,
    };
    let has_pool = change.ground.pool_index.is_some() || change.members_after.len() > 0;
    let pool = match has_pool && change.changes_pool() && !change.drops_pool {
        true => Some(Places::new(change.members_after.len(), bits, &mut free)?),
        false => None,
    };
    let incomplete = change.upgrades() && inspection.snapshots.iter().any(|snapshot| snapshot.disk_size.is_none());
    let mut snapshots = None;
    let drops = change.drops_pool && change.ground.pool_index.is_some();
    let last = inspection.snapshots.len().checked_sub(1);
    if drops && !incomplete && change.ground.pool_index == last {
        // The last entry goes by being counted no more, which needs no room.
        let place = HostCluster(header.snapshots_offset.0 >> bits.bits());
        let count = header.snapshots.checked_sub(1).or_internal("the pool is no snapshot")?;
        snapshots = Some((place, Vec::new(), count));
    } else if pool.is_some() || incomplete || drops {
        let table = snapshot_table(change, pool.as_ref())?;
        let bytes: Vec<u8> = table.iter().flat_map(Snapshot::encode).collect();
        if bytes.len() as u64 > MAX_TABLE_BYTES {
            let message = "the snapshot table would be larger than the 64 MiB that QEMU accepts";
            return Err(Error::new(ErrorKind::Limit, message));
        }
        let place = free.run(bits.clusters(bytes.len() as u64));
        let count = u32::try_from(table.len()).ok().or_internal("more snapshots than fit into a table")?;
        snapshots = Some((place, bytes, count));
    }
    let growth = free.finish(&refcounts)?;
    ensure_capacity(storage, growth.file_len)?;
    Ok(Prepared { growth, pool, snapshots })
}

/// The snapshots, with a new pool in the place of the old one or behind the others, or without the old one.
fn snapshot_table(change: &Change, pool: Option<&Places>) -> Result<Vec<Snapshot>> {
    let header = &change.ground.inspection.header;
    let mut table = change.ground.inspection.snapshots.clone();
    for snapshot in &mut table {
        // Version 2 may leave it out, version 3 may not: QEMU takes the disk's.
        snapshot.disk_size.get_or_insert(header.size);
    }
    if let Some(index) = change.ground.pool_index.filter(|_| change.drops_pool) {
        table.remove(index);
    }
    let Some(pool) = pool else { return Ok(table) };
    let mut entry = pool.snapshot(crate::pool::next_id(&table), header.cluster_bits)?;
    match change.ground.pool_index.and_then(|index| table.get_mut(index)) {
        Some(old) => {
            entry.id.clone_from(&old.id);
            *old = entry;
        }
        None => table.push(entry),
    }
    Ok(table)
}

/// Sets the dirty bit, which version 2 does not have, and clears autoclear bits that are not known; returns the header.
pub(crate) fn set_dirty(storage: &dyn Storage, header: &Header) -> Result<Header> {
    let mut header = header.clone();
    if header.version >= 3 {
        clear_unknown_autoclear(storage, &header)?;
        header.incompatible |= incompatible::DIRTY;
        write(storage, &header.incompatible.to_be_bytes(), INCOMPATIBLE_AT)?;
        flush(storage)?;
    }
    Ok(header)
}

/// The steps up to the last change of an L2 entry; returns the number of batches.
fn write_change(
    change: &Change,
    prepared: &Prepared,
    storage: &dyn Storage,
    fill: &Fill<'_>,
    work: &Work,
) -> Result<u64> {
    let mut header = set_dirty(storage, &change.ground.inspection.header)?;
    let bits = header.cluster_bits;

    let counts = &change.ground.inspection.counts;
    prepared.growth.extend(storage)?;
    fill(&change.ground, storage)?;
    Mender::new(storage, &header, counts).refcounts(&Refcounts::load(storage, &header)?, Pass::Raise)?;
    prepared.growth.write(storage, &mut header, counts)?;
    if let Some(pool) = &prepared.pool {
        pool.write(change, counts, storage)?;
    }
    if let Some((place, bytes, _)) = prepared.snapshots.as_ref().filter(|(_, bytes, _)| !bytes.is_empty()) {
        write(storage, bytes, place.offset(bits).0)?;
    }
    let overwriting = change.writes.as_ref().map(|writes| Tables::new(change, writes, storage));
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

/// The first sector of a version 2 image that becomes version 3: it is written at once, so it holds the whole header.
pub(crate) fn upgraded(header: &Header) -> Result<Vec<u8>> {
    let new = Header { version: 3, incompatible: incompatible::DIRTY, ..header.clone() };
    let mut bytes = new.encode()?;
    if bytes.len() > SECTOR {
        return Err(Error::unsupported(
            "the header of this version 2 image is too long to be upgraded safely; upgrade it first: qemu-img amend \
             -o compat=1.1 FILE",
        ));
    }
    bytes.resize(SECTOR, 0);
    Ok(bytes)
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
    for word in change.links.iter() {
        let link = Link::from_duplicate(word?);
        gain(link.keeper, change.ground.units.users(link.duplicate))?;
    }
    for word in change.writes.iter().flat_map(|writes| writes.gains.iter()) {
        let (unit, references) = split_run(word?);
        gain(unit, references)?;
    }
    Ok(())
}

/// Points the L2 entries of duplicates at what they share, and those of zeros at nothing.
fn redirect(change: &Change, storage: &dyn Storage, work: &Work) -> Result<u64> {
    let header = &change.ground.inspection.header;
    let bits = header.cluster_bits;
    // The zero flag even without a backing file: an incremental backup gets its backing file only later, by rebase -u, and must
    // not let it show through then.
    let gap = L2Entry::Zero { host: None, copied: false }.encode(bits);
    let tables = L2Tables::new(storage, header, &change.ground.inspection.tables);
    let mut links = change.links.iter();
    let (mut first, mut batches) = (0u64, 0);
    while change.changes_content() {
        work.cancel.check()?;
        let keeper =
            |word: Result<u128>| Ok(change.ground.units.entry(Link::from_duplicate(word?).keeper).encode(bits));
        let keepers = links.by_ref().take(change.batch).map(keeper).collect::<Result<Vec<u64>>>()?;
        let replaced = |entry: L2Entry| match (entry, change.ground.units.of(entry)) {
            (L2Entry::Zero { host: Some(_), .. }, _) => Some(gap),
            (_, Some(unit)) if change.zeros.contains(unit) => Some(gap),
            // Those of other batches come before or later.
            (_, Some(unit)) => {
                let rank = change.duplicates.rank(unit)?.checked_sub(first)?;
                keepers.get(to_usize(rank)).copied()
            }
            (_, None) => None,
        };
        tables.visit(
            |table, content| {
                let mut changed = false;
                let old = content.to_vec();
                for word in content.as_chunks_mut::<8>().0 {
                    if let Some(new) = replaced(L2Entry::decode(u64::from_be_bytes(*word), bits, true)) {
                        *word = new.to_be_bytes();
                        changed = true;
                    }
                }
                if changed { rewrite(storage, &old, content, table.host().0) } else { Ok(()) }
            },
            |()| Ok(()),
        )?;
        flush(storage)?;
        batches += 1;
        first += keepers.len() as u64;
        if first >= change.links.len() {
            break;
        }
    }
    Ok(batches)
}

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
        return Err(Error::corrupt(format!("the image is not as it should be: {hopeless}")));
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
    let mut free = (0..bits.clusters(len)).filter(|&cluster| is_free(cluster)).peekable();
    while let Some(first) = free.next() {
        let mut end = first + 1;
        while free.next_if_eq(&end).is_some() {
            end += 1;
        }
        let bytes = (first << bits.bits()).next_multiple_of(BLOCK)..(end << bits.bits()).min(len) & !(BLOCK - 1);
        if !bytes.is_empty() {
            let data = storage.next_data(bytes.start).at("Could not look for holes")?;
            if data.is_some_and(|data| data.start < bytes.end) {
                idle.push(bytes);
            }
        }
    }
    Ok(idle)
}
