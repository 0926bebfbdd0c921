//! What deduplication in place will do. Nothing is written while a plan is made.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Instant;

use crate::check::Inspection;
use crate::dedup::group::Link;
use crate::dedup::reading::FirstReading;
use crate::dedup::verify::verify;
use crate::edit::apply::{self, upgraded};
use crate::edit::change::Change;
use crate::edit::members::new_members;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::format::header::{Header, MAX_SNAPSHOTS};
use crate::image::read_header;
use crate::inplace::choose::Choice;
use crate::inplace::scan::{Key, named, scan};
use crate::inplace::{CHECKING, COMPARING, DedupOptions, SCANNING};
use crate::pool;
use crate::sort::bits::Bits;
use crate::sort::sequence::{Sorted, Sorter, Spill};
use crate::storage::device::capacity;
use crate::storage::{BLOCK, Storage};
use crate::survey::{Ground, sound};
use crate::units::HostOffset;
use crate::work::Work;

/// What deduplication of an image will do: a value that can be looked at, and then applied or dropped.
pub struct Plan {
    pub(super) change: Change,
    figures: Figures,
    /// When it was begun.
    pub(super) started: Instant,
}

/// The figures of a plan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    /// Distinct data clusters that the disk or a snapshot uses.
    pub scanned: u64,
    /// Those that were read.
    pub read: u64,
    /// Those that hold nothing but zeros.
    pub zero: u64,
    /// Those that another one replaces.
    pub duplicate: u64,
    /// Those that replace others and were not in the pool before.
    pub newly_shared: u64,
    /// Members of the pool that the disk or a snapshot used before.
    pub already_shared: u64,
    /// Clusters whose refcount is too high.
    pub leaked: u64,
    /// Clusters of the file that nothing will use any more, the old pool's own left out.
    pub freed: u64,
    /// Members that the pool will have.
    pub pool_members: u64,
}

/// What was found in an image.
pub(crate) struct Found {
    /// Units with the content of another one, which is kept; sorted by duplicate.
    pub(crate) links: Sorted,
    /// Units that hold nothing but zeros.
    pub(crate) zeros: Bits,
    /// Clusters that were read.
    pub(crate) read: u64,
}

/// A duplicate as a plan shows it. Offsets are in bytes; that of a compressed cluster is where its compressed bytes begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Share {
    /// The cluster that will not be used any more.
    pub duplicate: HostOffset,
    /// The one that replaces it.
    pub keeper: HostOffset,
    /// How many L2 entries change for that, as QEMU counts them.
    pub references: u64,
}

impl Plan {
    /// Checks and reads the image in `storage`.
    ///
    /// # Errors
    /// Those of reading; [`ErrorKind::Unsupported`] and [`ErrorKind::Corrupt`] for images that are refused by name.
    pub fn new(storage: &dyn Storage, options: DedupOptions, work: &Work) -> Result<Self> {
        let started = Instant::now();
        let header = read_header(storage)?;
        let limit = refuse(&header)?;
        if header.version < 3 {
            upgraded(&header)?;
        }
        work.progress.start();
        let inspection = sound(storage, CHECKING, work, |_| {})?;
        refuse_snapshots(&inspection)?;
        work.run(|| {
            let ground = Ground::new(storage, inspection)?;
            let plan = Self::find(storage, options, ground, limit, &work.spill(), work)?;
            Ok(Self { started, ..plan })
        })
    }

    fn find(
        storage: &dyn Storage,
        options: DedupOptions,
        ground: Ground,
        limit: u64,
        spill: &Spill,
        work: &Work,
    ) -> Result<Self> {
        let bits = ground.inspection.header.cluster_bits;
        let content = ground.content(storage);
        let (units, members) = (&ground.units, ground.members.bits());
        let mut wanted = Bits::new(units.limit());
        (0..units.limit()).filter(|&unit| units.users(unit) > 0).for_each(|unit| wanted.insert(unit));
        // What has its SHA-256 on record need not be read, if the others are named by it as well.
        let by_name = ground.has_records() && members.len() > 0;
        if by_name {
            members.iter().for_each(|unit| wanted.remove(unit));
        }
        work.progress.begin(SCANNING, wanted.len() << bits.bits());
        let key = if by_name { Key::Sha256 } else { Key::Fingerprint };
        let found = scan(&content, &wanted, key, spill, work)?;
        let mut records = Sorter::new(spill);
        found.records.iter().try_for_each(|word| records.push(word?))?;
        if by_name {
            for unit in members.iter() {
                if let Some(record) = ground.record(unit) {
                    records.push(named(&record.sha256, unit))?;
                }
            }
        }
        let records = records.finish()?;
        let first = FirstReading::new(found.records, bits)?;
        let choice = Choice::new(&ground, limit);
        let links = choice.links(&records, spill)?;
        drop(records);
        work.progress.begin(COMPARING, links.len() << bits.bits());
        let links = verify(&content, links, |records| choice.links(records, spill), spill, work)?;
        let found = Found { links, zeros: found.zeros, read: found.read };
        let mut plan = Self::of(storage, options, ground, found, spill, work)?;
        plan.change.first = Some((first, key));
        Ok(plan)
    }

    /// The plan that follows from what was found in an image.
    pub(crate) fn of(
        storage: &dyn Storage,
        options: DedupOptions,
        ground: Ground,
        found: Found,
        spill: &Spill,
        work: &Work,
    ) -> Result<Self> {
        let limit = ground.units.limit();
        let (mut duplicates, mut keepers) = (Bits::new(limit), Bits::new(limit));
        for word in found.links.iter() {
            let link = Link::from_duplicate(word?);
            duplicates.insert(link.duplicate);
            keepers.insert(link.keeper);
        }
        let mut change = Change {
            links: found.links,
            duplicates: duplicates.ranked(),
            zeros: found.zeros,
            frees_kept: true,
            may_upgrade: true,
            ..Change::none(ground, spill)?
        };
        change.joining = new_members(&change, storage, &keepers, options.pin, spill, work)?;
        if change.ground.has_records() {
            let stays = |&unit: &u64| !change.is_gone(unit);
            change.members_after = change.ground.members.bits().filtered(stays);
        }
        for new in change.joining.iter().map(|word| word.map(crate::edit::members::NewMember::decode)) {
            change.members_after.insert(new?.unit);
        }
        let figures = Self::count(&change, &keepers, found.read);
        Ok(Self { change, figures, started: Instant::now() })
    }

    fn count(change: &Change, keepers: &Bits, read: u64) -> Figures {
        let Ground { units, members, .. } = &change.ground;
        let used = |&unit: &u64| units.users(unit) > 0;
        Figures {
            scanned: (0..units.limit()).filter(used).count() as u64,
            read,
            zero: change.zeros.len(),
            duplicate: change.duplicates.bits().iter().filter(used).count() as u64,
            newly_shared: keepers.iter().filter(|&unit| !members.bits().contains(unit)).count() as u64,
            already_shared: change.ground.used_members(),
            leaked: change.ground.inspection.report.leaks,
            freed: change.gone_clusters().len(),
            pool_members: change.members_after.len(),
        }
    }

    /// What the file will occupy, in bytes; the `lost` clusters of it are taken and nothing refers to them.
    pub(crate) fn allocated_after(&self, storage: &dyn Storage, lost: &[u64]) -> Result<u64> {
        let change = &self.change;
        let bits = change.ground.inspection.header.cluster_bits;
        let allocated = storage.allocated().at("Could not get its size on disk")?;
        if change.is_empty() {
            return Ok(allocated);
        }
        let mut gone = change.gone_clusters();
        lost.iter().for_each(|&cluster| gone.insert(cluster));
        if change.changes_pool() {
            change.old_pool(storage)?.into_iter().for_each(|cluster| gone.insert(cluster));
        }
        let mut freed = 0;
        let mut data = Some(0..0);
        // Neighbours of small clusters keep the file system's block.
        for cluster in gone.iter().filter(|&cluster| change.frees_block(cluster, &gone)) {
            let bytes = cluster << bits.bits()..(cluster + 1) << bits.bits();
            if data.as_ref().is_some_and(|data| data.end <= bytes.start) {
                data = storage.next_data(bytes.start).at("Could not look for holes")?;
            }
            let Some(data) = &data else { break };
            freed += data.end.min(bytes.end).saturating_sub(data.start.max(bytes.start));
        }
        // A device occupies what it has.
        let new = match capacity(storage)? {
            Some(_) => 0,
            None => written_blocks(apply::needs(change, storage)?.1.writes(bits)),
        };
        Ok((allocated + new).saturating_sub(freed))
    }

    /// The figures.
    #[must_use]
    pub(crate) fn figures(&self) -> Figures {
        self.figures
    }

    /// Cluster size of the image in bytes.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.change.ground.inspection.header.cluster_bits.bytes()
    }

    /// Whether there is nothing to do: no duplicates, no zeros, no leaks, nothing to pool, and a pool in order.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.change.is_empty()
    }

    /// Whether the image will get version 3: a snapshot, and the pool is one, blocks the resizing of version 2 images.
    #[must_use]
    pub fn upgrades(&self) -> bool {
        self.change.upgrades()
    }

    /// The duplicates, in the order of the file.
    pub fn shares(&self) -> impl Iterator<Item = Result<Share>> + '_ {
        let units = &self.change.ground.units;
        let host = |unit: u64| HostOffset(units.bytes(unit).start);
        self.change.links.iter().map(move |word| {
            let link = Link::from_duplicate(word?);
            let references = units.users(link.duplicate);
            Ok(Share { duplicate: host(link.duplicate), keeper: host(link.keeper), references })
        })
    }

    /// The clusters that hold nothing but zeros, in the order of the file.
    pub fn zeros(&self) -> impl Iterator<Item = HostOffset> + '_ {
        self.change.zeros.iter().map(|unit| HostOffset(self.change.ground.units.bytes(unit).start))
    }
}

/// The bytes of the file system's blocks in which `writes` lie.
fn written_blocks(writes: Vec<Range<u64>>) -> u64 {
    let blocks = writes.into_iter().flat_map(|range| range.start / BLOCK..range.end.div_ceil(BLOCK));
    blocks.collect::<BTreeSet<u64>>().len() as u64 * BLOCK
}

/// Refuses by name what is not deduplicated in place; returns the sharer limit.
pub(crate) fn refuse(header: &Header) -> Result<u64> {
    header.refuse_unreadable()?;
    if header.extended_l2() {
        return Err(Error::unsupported(
            "images with subclusters (extended_l2=on) are not deduplicated in place; use dedup-img convert",
        ));
    }
    header.refcount_bits.sharer_limit().ok_or_else(|| {
        Error::unsupported(format!(
            "refcount_bits={} cannot hold the 4 references that sharing with a pool needs; widen it first: qemu-img amend \
             -o refcount_bits=16 FILE",
            header.refcount_bits.bits()
        ))
    })
}

pub(crate) fn refuse_snapshots(inspection: &Inspection) -> Result<()> {
    let snapshots = &inspection.snapshots;
    if snapshots.iter().any(|s| s.name == pool::NAME.as_bytes() && !pool::is_pool(s)) {
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
