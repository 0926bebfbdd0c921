//! How much room a change takes beside what the file occupies, and whether it is there: asked before anything is written.
//!
//! Where things are written never depends on it (I5), only whether a run begins, and what is given back first.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::check::counts::Counts;
use crate::edit::change::Change;
use crate::edit::idle::idle_where;
use crate::edit::marks::set_dirty;
use crate::edit::mend::{Mender, Pass};
use crate::edit::prepare::{Prepared, prepare};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::format::header::Header;
use crate::image::refcounts::{Block, Refcounts};
use crate::storage::{BLOCK, Room, Storage, flush};
use crate::units::ClusterBits;

/// Room for tables that are changed on file systems that never write in place: what they replace is free again with some flush.
const COPIES: u64 = 16 << 20;

/// Room, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Needs {
    /// What the file takes more while it is worked on.
    pub(crate) needed: u64,
    /// What there is; `None` where nobody knows.
    pub(crate) available: Option<u64>,
}

/// Whether there is room for a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fit {
    /// There is.
    Now,
    /// There is once free clusters are given back that the file still occupies.
    AfterRelease,
    /// There is not.
    Not,
}

impl Needs {
    /// What `change` needs with the places that it was given.
    pub(crate) fn of(change: &Change, prepared: &Prepared, storage: &dyn Storage) -> Result<Self> {
        let inspection = &change.ground.inspection;
        let (header, bits) = (&inspection.header, inspection.header.cluster_bits);
        let room = room(storage)?;
        if room == Room::Fixed {
            return Ok(Self {
                needed: (prepared.growth.taken.len() as u64) << bits.bits(),
                available: Some(free_clusters(storage, &inspection.counts, bits)? << bits.bits()),
            });
        }
        let mut needed = with_slack(unbacked(storage, prepared.writes(bits))? + uncounted(header, prepared, storage)?);
        if matches!(room, Room::FileSystem { copies: true, .. }) {
            needed += metadata(&inspection.counts, bits).min(COPIES);
        }
        Ok(Self { needed, available: available(room) })
    }

    /// Those of nothing.
    pub(crate) fn none(change: &Change, storage: &dyn Storage) -> Result<Self> {
        let inspection = &change.ground.inspection;
        let bits = inspection.header.cluster_bits;
        let available = match room(storage)? {
            Room::Fixed => Some(free_clusters(storage, &inspection.counts, bits)? << bits.bits()),
            room => available(room),
        };
        Ok(Self { needed: 0, available })
    }

    /// Whether that much is there.
    pub(crate) fn is_met(self) -> bool {
        self.available.is_none_or(|available| self.needed <= available)
    }

    /// Fails where that much is not there. Nothing was written.
    pub(crate) fn ensure(self) -> Result<()> {
        match self.available {
            Some(available) if self.needed > available => {
                let needed = self.needed;
                let message =
                    format!("{needed} bytes of room are needed, and {available} are there; nothing was written");
                Err(Error::new(ErrorKind::NoRoom { needed, available }, message))
            }
            _ => Ok(()),
        }
    }
}

/// What `change` needs, and the places for it. Nothing is written.
pub(crate) fn needs(change: &Change, storage: &dyn Storage) -> Result<(Needs, Prepared)> {
    let prepared = prepare(change, None, storage)?;
    let needs = Needs::of(change, &prepared, storage)?;
    Ok((needs, prepared))
}

/// What the file of `storage` can grow by.
pub(crate) fn room(storage: &dyn Storage) -> Result<Room> {
    storage.room().at("Could not ask for the room on its file system")
}

/// The bytes of it, where that is known and may change.
pub(crate) fn available(room: Room) -> Option<u64> {
    match room {
        Room::FileSystem { available, .. } => Some(available),
        Room::Unknown | Room::Fixed => None,
    }
}

/// With room for the file system's own records of many new blocks.
pub(crate) fn with_slack(bytes: u64) -> u64 {
    bytes + ((bytes / 64) & !(BLOCK - 1))
}

/// The bytes of all tables: what is changed in them needs room on file systems that never write in place.
fn metadata(counts: &Counts, bits: ClusterBits) -> u64 {
    let tables = (0..counts.clusters()).filter(|&cluster| counts.get(cluster) > 0 && !counts.is_data(cluster));
    (tables.count() as u64) << bits.bits()
}

/// The clusters of a device that nothing uses.
fn free_clusters(storage: &dyn Storage, counts: &Counts, bits: ClusterBits) -> Result<u64> {
    let clusters = storage.len().at("Could not get its length")? >> bits.bits();
    Ok((0..clusters).filter(|&cluster| counts.get(cluster) == 0).count() as u64)
}

/// Whether there is room for what `prepared` writes.
pub(crate) fn fit(needs: Needs, change: &Change, prepared: &Prepared, storage: &dyn Storage) -> Result<Fit> {
    if needs.is_met() || room(storage)? == Room::Fixed {
        return Ok(Fit::Now);
    }
    let released = backed(storage, releasable(change, prepared, storage)?)?;
    let after = Needs { available: needs.available.map(|bytes| bytes.saturating_add(released)), ..needs };
    Ok(if after.is_met() { Fit::AfterRelease } else { Fit::Not })
}

/// Free clusters that the file occupies and that `prepared` does not fill.
pub(crate) fn releasable(change: &Change, prepared: &Prepared, storage: &dyn Storage) -> Result<Vec<Range<u64>>> {
    let inspection = &change.ground.inspection;
    let taken: BTreeSet<u64> = prepared.growth.taken.iter().map(|cluster| cluster.0).collect();
    let is_free = |cluster: u64| inspection.counts.get(cluster) == 0 && !taken.contains(&cluster);
    idle_where(is_free, inspection.header.cluster_bits, storage)
}

/// Gives back what is free already. `change` must not have counted its own references yet.
///
/// After a crash here leaks are fewer than before.
pub(crate) fn release(change: &Change, prepared: &Prepared, storage: &dyn Storage) -> Result<()> {
    // Before all else: there are file systems on which even the dirty bit needs room. Nothing refers to what is punched.
    for bytes in releasable(change, prepared, storage)? {
        if !storage.punch(bytes.clone()).at(format_args!("Could not give back the space at {:#x}", bytes.start))? {
            break;
        }
    }
    flush(storage)?;
    let inspection = &change.ground.inspection;
    let header = set_dirty(storage, &inspection.header)?;
    let refcounts = Refcounts::load(storage, &header)?;
    Mender::new(storage, &header, &inspection.counts).refcounts(&refcounts, Pass::Lower).map(|_| ())
}

/// How much of `ranges` is in holes of the file, or behind its end, in whole blocks of the file system.
pub(crate) fn unbacked(storage: &dyn Storage, ranges: Vec<Range<u64>>) -> Result<u64> {
    let (all, backed) = measure(storage, ranges)?;
    Ok(all - backed)
}

/// How much of `ranges` the file occupies.
pub(crate) fn backed(storage: &dyn Storage, ranges: Vec<Range<u64>>) -> Result<u64> {
    Ok(measure(storage, ranges)?.1)
}

/// The bytes of the blocks in which `ranges` lie, and how many of them the file occupies.
fn measure(storage: &dyn Storage, mut ranges: Vec<Range<u64>>) -> Result<(u64, u64)> {
    ranges.sort_unstable_by_key(|range| range.start);
    let len = storage.len().at("Could not get its length")?;
    // What was preallocated and never written is said to be a hole, and is none.
    let is_full = storage.allocated().at("Could not get its size on disk")? >= len;
    let (mut all, mut backed, mut end) = (0, 0, 0);
    let mut data = Some(0..0);
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        let blocks = end.max(range.start & !(BLOCK - 1))..end.max(range.end.next_multiple_of(BLOCK));
        end = blocks.end;
        all += blocks.end - blocks.start;
        if is_full {
            backed += len.next_multiple_of(BLOCK).min(blocks.end).saturating_sub(blocks.start);
            continue;
        }
        let mut at = blocks.start;
        while at < blocks.end {
            if data.as_ref().is_some_and(|data| data.end <= at) {
                data = storage.next_data(at).at("Could not look for holes")?;
            }
            let Some(found) = data.as_ref().filter(|data| data.start < blocks.end) else { break };
            let stop = found.end.next_multiple_of(BLOCK).min(blocks.end);
            backed += stop - found.start.max(at);
            at = stop;
        }
    }
    Ok((all, backed))
}

/// Refcounts of new clusters that lie in holes of their blocks, which have counted nothing there so far.
fn uncounted(header: &Header, prepared: &Prepared, storage: &dyn Storage) -> Result<u64> {
    let refcounts = Refcounts::load(storage, header)?;
    let per_block = refcounts.per_block();
    let mut blocks = BTreeSet::new();
    for cluster in &prepared.growth.taken {
        if let Block::At(offset) = refcounts.block(cluster.0 / per_block) {
            let byte = cluster.0 % per_block * u64::from(header.refcount_bits.bits()) / 8;
            blocks.insert((offset.0 + byte) & !(BLOCK - 1));
        }
    }
    unbacked(storage, blocks.into_iter().map(|start| start..start + BLOCK).collect())
}

/// Length of the file, and what it occupies.
pub(crate) fn sizes(storage: &dyn Storage) -> Result<(u64, u64)> {
    let length = storage.len().at("Could not get its length")?;
    Ok((length, storage.allocated().at("Could not get its size on disk")?))
}
