//! What deduplication in place will do. Nothing is written while a plan is made.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::time::Instant;

use crate::dedup::group::ByDuplicate;
use crate::dedup::reading::FirstReading;
use crate::dedup::verify::verify;
use crate::edit::apply;
use crate::edit::change::{Change, Entries, NewPool, Sharing};
use crate::edit::key::{Key, named};
use crate::edit::marks::upgraded;
use crate::edit::phases::{APPLYING, CHECKING, WRITING};
use crate::edit::refuse::{refuse, refuse_snapshots};
use crate::edit::repair::{Repaired, is_unready, make_ready};
use crate::edit::room::{Needs, needs, sizes};
use crate::edit::settle::Punch;
use crate::error::{IoContext, Result};
use crate::image::read_header;
use crate::inplace::deduplicate::choose::Choice;
use crate::inplace::deduplicate::members::new_members;
use crate::inplace::deduplicate::report::{DedupOptions, DedupReport, Figures, Share};
use crate::inplace::deduplicate::scan::scan;
use crate::progress::Stage;
use crate::sort::bits::Bits;
use crate::sort::sequence::{Sorted, Sorter, Spill};
use crate::storage::device::capacity;
use crate::storage::{BLOCK, Storage};
use crate::survey::{Ground, sound};
use crate::units::HostOffset;
use crate::work::Work;

/// The phases up to the plan, behind the checking.
const SCANNING: Stage = Stage("scanning", 10, 65);
const COMPARING: Stage = Stage("comparing", 65, 80);

/// What deduplication of an image will do: it can be looked at, and then applied or dropped. The image is the plan's alone until then,
/// so that a plan is never applied to anything else, nor to what has changed since it was made.
///
/// ```no_run
/// use dedup_img::storage::LockMode;
/// use dedup_img::{DedupOptions, DedupPlan, Work, WorkOptions, open_image};
///
/// let work = Work::new(WorkOptions::default())?;
/// let (mut one, _) = open_image("one.qcow2".as_ref(), None, LockMode::Write)?;
/// let plan = DedupPlan::new(&mut one, DedupOptions::default(), &work)?;
/// plan.apply(&work)?;
/// # Ok::<(), dedup_img::Error>(())
/// ```
///
/// There is no way to name another image:
///
/// ```compile_fail,E0061
/// use dedup_img::storage::LockMode;
/// use dedup_img::{DedupOptions, DedupPlan, Work, WorkOptions, open_image};
///
/// let work = Work::new(WorkOptions::default())?;
/// let (mut one, _) = open_image("one.qcow2".as_ref(), None, LockMode::Write)?;
/// let (mut other, _) = open_image("other.qcow2".as_ref(), None, LockMode::Write)?;
/// let plan = DedupPlan::new(&mut one, DedupOptions::default(), &work)?;
/// plan.apply(&mut other, &work)?;
/// # Ok::<(), dedup_img::Error>(())
/// ```
///
/// Nor is there one to apply two plans that were made of the same state:
///
/// ```compile_fail,E0499
/// use dedup_img::storage::LockMode;
/// use dedup_img::{DedupOptions, DedupPlan, Work, WorkOptions, open_image};
///
/// let work = Work::new(WorkOptions::default())?;
/// let (mut one, _) = open_image("one.qcow2".as_ref(), None, LockMode::Write)?;
/// let first = DedupPlan::new(&mut one, DedupOptions::default(), &work)?;
/// let second = DedupPlan::new(&mut one, DedupOptions::default(), &work)?;
/// first.apply(&work)?;
/// second.apply(&work)?;
/// # Ok::<(), dedup_img::Error>(())
/// ```
pub struct DedupPlan<'s> {
    storage: &'s dyn Storage,
    options: DedupOptions,
    change: Change,
    figures: Figures,
    /// When it was begun.
    started: Instant,
}

impl fmt::Debug for DedupPlan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DedupPlan").field("figures", &self.figures).finish_non_exhaustive()
    }
}

/// What was found in an image.
pub(crate) struct Found {
    /// Units with the content of another one, which is kept; sorted by duplicate.
    pub(crate) links: Sorted<ByDuplicate>,
    /// Units that hold nothing but zeros.
    pub(crate) zeros: Bits,
    /// Clusters that were read.
    pub(crate) read: u64,
}

/// Deduplicates the image in `storage`, which nobody else may use.
///
/// # Errors
/// Those of [`DedupPlan::new`], where nothing was written; those of writing, where the content of the disk and of all snapshots is
/// still what it was, and the message says if the image needs a repair.
pub fn dedup(storage: &dyn Storage, options: DedupOptions, work: &Work) -> Result<DedupReport> {
    DedupPlan::read(storage, options, work)?.made_ready(work, |_| {})?.apply(work)
}

impl<'s> DedupPlan<'s> {
    /// Checks and reads the image in `storage`.
    ///
    /// # Errors
    /// Those of reading; [`Unsupported`](crate::ErrorKind::Unsupported) and [`Corrupt`](crate::ErrorKind::Corrupt) for images that are refused by name.
    pub fn new(storage: &'s mut dyn Storage, options: DedupOptions, work: &Work) -> Result<Self> {
        Self::read(storage, options, work)
    }

    fn read(storage: &'s dyn Storage, options: DedupOptions, work: &Work) -> Result<Self> {
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
        storage: &'s dyn Storage,
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
        found.records.iter().try_for_each(|record| records.push(record?))?;
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
        if let NewPool::Of(members) = &mut plan.change.pool {
            members.first = Some((first, key));
        }
        Ok(plan)
    }

    /// The plan that follows from what was found in an image.
    pub(crate) fn of(
        storage: &'s dyn Storage,
        options: DedupOptions,
        ground: Ground,
        found: Found,
        spill: &Spill,
        work: &Work,
    ) -> Result<Self> {
        let limit = ground.units.limit();
        let (mut duplicates, mut keepers) = (Bits::new(limit), Bits::new(limit));
        for link in found.links.iter() {
            let ByDuplicate(link) = link?;
            duplicates.insert(link.duplicate);
            keepers.insert(link.keeper);
        }
        let sharing = Sharing::new(found.links, duplicates, found.zeros, spill);
        let joining = new_members(&ground, &sharing, storage, &keepers, options.pin, spill, work)?;
        let mut after = match ground.has_records() {
            true => ground.members.bits().filtered(|&unit| !sharing.is_gone(unit)),
            false => Bits::new(limit),
        };
        for new in joining.iter() {
            after.insert(new?.unit);
        }
        let duplicates = sharing.duplicates.bits().iter().filter(|&unit| ground.units.users(unit) > 0).count() as u64;
        let zero = sharing.zeros.len();
        let pool = NewPool::of(after, joining);
        let change = Change { ground, entries: Entries::Shared(sharing), pool };
        let figures = Figures { read: found.read, zero, duplicate: duplicates, ..Self::count(&change, &keepers) };
        Ok(Self { storage, options, change, figures, started: Instant::now() })
    }

    fn count(change: &Change, keepers: &Bits) -> Figures {
        let Ground { units, members, .. } = &change.ground;
        let used = |&unit: &u64| units.users(unit) > 0;
        Figures {
            scanned: (0..units.limit()).filter(used).count() as u64,
            newly_shared: keepers.iter().filter(|&unit| !members.bits().contains(unit)).count() as u64,
            already_shared: change.ground.used_members(),
            leaked: change.ground.inspection.report.leaks,
            freed: change.gone_clusters().len(),
            pool_members: change.members_after(),
            ..Figures::default()
        }
    }

    /// Whether the image was not closed cleanly and must be repaired before the plan is applied.
    ///
    /// # Errors
    /// Those of [`check`](crate::check::check).
    pub fn is_unready(&self, work: &Work) -> Result<bool> {
        is_unready(self.storage, work)
    }

    /// Repairs the image if [`Self::is_unready`], tells `tell` what was done, and plans anew then.
    ///
    /// # Errors
    /// Those of repairing, and of [`Self::new`].
    pub fn made_ready(self, work: &Work, tell: impl FnOnce(&Repaired)) -> Result<Self> {
        let (storage, options) = (self.storage, self.options);
        let Some(repaired) = make_ready(storage, work)? else { return Ok(self) };
        tell(&repaired);
        drop(self);
        Self::read(storage, options, work)
    }

    /// Does what the plan says to the image that it was made from.
    ///
    /// # Errors
    /// As [`dedup`].
    pub fn apply(mut self, work: &Work) -> Result<DedupReport> {
        let storage = self.storage;
        let mut report = self.report(work)?;
        if !self.is_empty() {
            work.progress.within(APPLYING.0, APPLYING.1);
            work.progress.begin(WRITING, 0);
            report.batches = work.run(|| apply::apply(&mut self.change, storage, Punch::Freed, work))?;
            (report.file_length_after_bytes, report.allocated_after_bytes) = sizes(storage)?;
        }
        report.seconds = self.started.elapsed().as_secs_f64();
        Ok(report)
    }

    /// What the plan says, for an image that is as it was.
    ///
    /// # Errors
    /// Those of asking for the file's size, and of reading the refcounts again for the room that is needed.
    pub fn report(&self, work: &Work) -> Result<DedupReport> {
        let storage = self.storage;
        let (file_length, allocated) = sizes(storage)?;
        let figures = self.figures;
        let needs = match self.is_empty() {
            true => Needs::none(&self.change, storage)?,
            false => work.run(|| needs(&self.change, storage))?.0,
        };
        Ok(DedupReport {
            cluster_size_bytes: self.cluster_size(),
            scanned_clusters: figures.scanned,
            read_clusters: figures.read,
            zero_clusters: figures.zero,
            duplicate_clusters: figures.duplicate,
            newly_shared_clusters: figures.newly_shared,
            already_shared_clusters: figures.already_shared,
            leaked_clusters: figures.leaked,
            freed_clusters: figures.freed,
            freed_bytes: figures.freed * self.cluster_size(),
            pool_members: figures.pool_members,
            upgraded: self.upgrades(),
            batches: 0,
            changed: !self.is_empty(),
            room_needed_bytes: needs.needed,
            room_available_bytes: needs.available,
            file_length_before_bytes: file_length,
            file_length_after_bytes: file_length,
            allocated_before_bytes: allocated,
            allocated_after_bytes: allocated,
            seconds: self.started.elapsed().as_secs_f64(),
        })
    }

    /// What the file will occupy, in bytes; the `lost` clusters of it are taken and nothing refers to them.
    pub(crate) fn allocated_after(&self, lost: &[u64]) -> Result<u64> {
        let (change, storage) = (&self.change, self.storage);
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
            None => written_blocks(needs(change, storage)?.1.writes(bits)),
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
        self.links().map(move |link| {
            let ByDuplicate(link) = link?;
            let references = units.users(link.duplicate);
            Ok(Share { duplicate: host(link.duplicate), keeper: host(link.keeper), references })
        })
    }

    fn links(&self) -> impl Iterator<Item = Result<ByDuplicate>> + '_ {
        self.change.sharing().into_iter().flat_map(|sharing| sharing.links.iter())
    }

    /// The clusters that hold nothing but zeros, in the order of the file.
    pub fn zeros(&self) -> impl Iterator<Item = HostOffset> + '_ {
        let zeros = self.change.sharing().into_iter().flat_map(|sharing| sharing.zeros.iter());
        zeros.map(|unit| HostOffset(self.change.ground.units.bytes(unit).start))
    }
}

/// The bytes of the file system's blocks in which `writes` lie.
fn written_blocks(writes: Vec<Range<u64>>) -> u64 {
    let blocks = writes.into_iter().flat_map(|range| range.start / BLOCK..range.end.div_ceil(BLOCK));
    blocks.collect::<BTreeSet<u64>>().len() as u64 * BLOCK
}
