//! Giving space back: what only the pool holds, what leaked, and with compaction every hole in the file.

mod compact;
mod moves;

use std::fmt;
use std::ops::Range;
use std::time::Instant;

use serde::Serialize;

use crate::edit::change::{Change, NewPool};
use crate::edit::idle::idle;
use crate::edit::members::NewMember;
use crate::edit::phases::WRITING;
use crate::edit::renew;
use crate::edit::repair::{Repaired, is_unready, make_ready};
use crate::edit::room::{Needs, backed, needs, room, sizes, with_slack};
use crate::edit::settle::{Punch, settle};
use crate::error::{Advice, Error, Left, Result};
use crate::format::header::Header;
use crate::image::read_header;
use crate::progress::Stage;
use crate::sort::bits::Bits;
use crate::sort::sequence::{Sequence, Spill};
use crate::storage::{BLOCK, Room, Storage};
use crate::survey::guests;
use crate::survey::{Ground, sound};
use crate::work::Work;

/// The phases of a collection; after the checking come those of applying a change.
const CHECKING: Stage = Stage("checking", 0, 30);
const MOVING: Stage = Stage("moving", 60, 100);

/// What to collect.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GcOptions {
    /// Move clusters from the end of the file into holes, and cut the file.
    pub compact: bool,
    /// Remove the pool. Sharing stays.
    pub drop_pool: bool,
}

/// What a collection will do to the image that it was made from, which is the plan's alone: see [`DedupPlan`](crate::inplace::DedupPlan).
///
/// ```no_run
/// use dedup_img::storage::LockMode;
/// use dedup_img::{GcOptions, GcPlan, Work, WorkOptions, open_image};
///
/// let work = Work::new(WorkOptions::default())?;
/// let (mut one, _) = open_image("one.qcow2".as_ref(), None, LockMode::Write)?;
/// let plan = GcPlan::new(&mut one, GcOptions::default(), &work)?;
/// plan.apply(&work)?;
/// # Ok::<(), dedup_img::Error>(())
/// ```
///
/// ```compile_fail,E0061
/// use dedup_img::storage::LockMode;
/// use dedup_img::{GcOptions, GcPlan, Work, WorkOptions, open_image};
///
/// let work = Work::new(WorkOptions::default())?;
/// let (mut one, _) = open_image("one.qcow2".as_ref(), None, LockMode::Write)?;
/// let (mut other, _) = open_image("other.qcow2".as_ref(), None, LockMode::Write)?;
/// let plan = GcPlan::new(&mut one, GcOptions::default(), &work)?;
/// plan.apply(&mut other, &work)?;
/// # Ok::<(), dedup_img::Error>(())
/// ```
pub struct GcPlan<'s> {
    storage: &'s dyn Storage,
    options: GcOptions,
    change: Change,
    report: GcReport,
    spill: Spill,
    /// Whether the file occupies space for free clusters.
    is_idle: bool,
    /// When it was begun.
    started: Instant,
}

impl fmt::Debug for GcPlan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GcPlan").field("report", &self.report).finish_non_exhaustive()
    }
}

/// What a collection did, or would do. Sizes are in bytes.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct GcReport {
    /// Cluster size of the image.
    pub cluster_size_bytes: u64,
    /// Clusters whose refcount was too high.
    pub leaked_clusters: u64,
    /// Members of the pool that nothing else used.
    pub garbage_members: u64,
    /// Members that left the pool because one guest cluster is left that uses them.
    pub unpooled_members: u64,
    /// Members of the pool.
    pub pool_members: u64,
    /// Whether the directory of the pool was lost, and is made anew.
    pub directory_rebuilt: bool,
    /// Whether the pool was removed.
    pub pool_dropped: bool,
    /// Clusters that nothing uses any more; the pool's own are not counted.
    pub freed_clusters: u64,
    /// The same in bytes.
    pub freed_bytes: u64,
    /// Clusters that moved; for a plan, those that are to.
    pub moved_clusters: u64,
    /// What compaction copies, in bytes: holes inside clusters are not copied. A forecast, for what was done as well.
    pub copied_bytes: u64,
    /// Whether anything was to be done.
    pub changed: bool,
    /// The most room on the file system that the run takes at a time where there is enough, beside what the file occupies already.
    pub room_needed_bytes: u64,
    /// The least that it begins with: it takes smaller steps then.
    pub room_least_bytes: u64,
    /// Room that there is; of a device what the image does not use; `None` where nobody knows.
    pub room_available_bytes: Option<u64>,
    /// Length of the file before.
    pub file_length_before_bytes: u64,
    /// Length of the file after.
    pub file_length_after_bytes: u64,
    /// What the file occupied before.
    pub allocated_before_bytes: u64,
    /// What it occupies after.
    pub allocated_after_bytes: u64,
    /// Time taken.
    pub seconds: f64,
}

/// Collects what can be given back of the image in `storage`, which nobody else may use.
///
/// # Errors
/// As [`dedup()`](crate::inplace::dedup()).
pub fn gc(storage: &dyn Storage, options: GcOptions, work: &Work) -> Result<GcReport> {
    GcPlan::read(storage, options, work)?.made_ready(work, |_| {})?.apply(work)
}

impl<'s> GcPlan<'s> {
    /// Checks the image in `storage`. Nothing is written.
    ///
    /// # Errors
    /// Those of reading; refusals by name.
    pub fn new(storage: &'s mut dyn Storage, options: GcOptions, work: &Work) -> Result<Self> {
        Self::read(storage, options, work)
    }

    fn read(storage: &'s dyn Storage, options: GcOptions, work: &Work) -> Result<Self> {
        let started = Instant::now();
        let header = read_header(storage)?;
        refuse(&header, options)?;
        let mut lost = 0;
        work.progress.start();
        let inspection = sound(storage, CHECKING, work, |leak| {
            lost += u64::from(leak.lost_cluster().is_some());
        })?;
        if inspection.pool.is_some() && (header.extended_l2() || header.encryption.is_some()) {
            return Err(Error::unsupported("a deduplication pool in an encrypted image, or in one with subclusters"));
        }
        let bits = header.cluster_bits;
        let (file_length, allocated) = sizes(storage)?;
        work.run(|| {
            let spill = work.spill();
            let (change, unpooled) = collect(Ground::new(storage, inspection)?, options, storage, &spill, work)?;
            let ground = &change.ground;
            let used = ground.used_members();
            let freed = change.gone_clusters().len() + lost;
            let report = GcReport {
                cluster_size_bytes: bits.bytes(),
                leaked_clusters: ground.inspection.report.leaks,
                garbage_members: if options.drop_pool { 0 } else { ground.members.bits().len() - used },
                unpooled_members: unpooled,
                pool_members: change.members_after(),
                directory_rebuilt: ground.pool_index.is_some() && !options.drop_pool && !ground.has_records(),
                pool_dropped: options.drop_pool && ground.pool_index.is_some(),
                freed_clusters: freed,
                freed_bytes: freed * bits.bytes(),
                moved_clusters: 0,
                copied_bytes: 0,
                changed: false,
                room_needed_bytes: 0,
                room_least_bytes: 0,
                room_available_bytes: None,
                file_length_before_bytes: file_length,
                file_length_after_bytes: file_length,
                allocated_before_bytes: allocated,
                allocated_after_bytes: allocated,
                seconds: 0.0,
            };
            let idle = idle(&ground.inspection.counts, bits, storage)?;
            let is_idle = !idle.is_empty();
            let mut plan = Self { storage, options, change, report, spill: spill.clone(), is_idle, started };
            let inspection = &plan.change.ground.inspection;
            let compacts = options.compact && (!plan.change.is_empty() || compact::has_work(storage, inspection)?);
            if compacts {
                plan.forecast()?;
            }
            plan.report.changed = !plan.change.is_empty() || plan.is_idle || compacts;
            plan.room(compacts, idle)?;
            Ok(plan)
        })
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

    /// What the plan says, for an image that is as it was.
    ///
    /// # Errors
    /// None: all of it is known. Those of other plans are here so that all have one shape.
    pub fn report(&self, _work: &Work) -> Result<GcReport> {
        Ok(GcReport { seconds: self.started.elapsed().as_secs_f64(), ..self.report.clone() })
    }

    /// How long the file will be, and how much moves.
    fn forecast(&mut self) -> Result<()> {
        let inspection = &self.change.ground.inspection;
        let bits = inspection.header.cluster_bits;
        let gone = self.change.gone_clusters();
        let mut used = (0..inspection.counts.clusters()).filter(|&c| inspection.counts.get(c) > 0).count() as u64;
        used = used.saturating_sub(gone.len());
        let (before, after) = self.change.pool_clusters();
        used = (used + after).saturating_sub(before);
        let end = compact::target(self.storage, &inspection.header, used)?;
        let stays = |&cluster: &u64| inspection.counts.get(cluster) > 0 && !gone.contains(cluster);
        self.report.moved_clusters = end.saturating_sub((0..end).filter(stays).count() as u64);
        self.report.file_length_after_bytes = (end << bits.bits()).min(self.report.file_length_before_bytes);
        Ok(())
    }

    /// What is copied, and the room that it takes; `idle` are free clusters that the file occupies.
    fn room(&mut self, compacts: bool, idle: Vec<Range<u64>>) -> Result<()> {
        let (change, storage) = (&self.change, self.storage);
        let bits = change.ground.inspection.header.cluster_bits;
        let mut released = backed(storage, idle)?;
        let needs = if change.is_empty() {
            Needs::none(change, storage)?
        } else {
            let (needs, prepared) = needs(change, storage)?;
            released = released.saturating_sub(backed(storage, prepared.writes(bits))?);
            needs
        };
        let mut least = needs.needed.saturating_sub(released);
        if change.changes_pool()
            && let Some(in_two_steps) = renew::least(change, storage)?
        {
            least = least.min(in_two_steps);
        }
        let (mut needed, mut copied) = (needs.needed, 0);
        if compacts {
            let end = self.report.file_length_after_bytes >> bits.bits();
            let gone = change.gone_clusters();
            let counts = &change.ground.inspection.counts;
            let bytes = |cluster: u64| cluster << bits.bits()..(cluster + 1) << bits.bits();
            let moves = |&cluster: &u64| counts.get(cluster) > 0 && !gone.contains(cluster);
            copied = backed(storage, (end..counts.clusters()).filter(moves).map(bytes).collect())?;
            // Clusters that are smaller than blocks need room in whole ones where they go.
            let filled = match bits.bytes() < BLOCK {
                true => (0..end).filter(|cluster| !moves(cluster)).count() as u64 * BLOCK,
                false => copied,
            };
            let pass = with_slack(filled.min(compact::most_bytes(&change.ground.inspection))) + BLOCK;
            // A pass is done in parts where there is no room for all of it, with what was freed before it.
            let freed = released + backed(storage, gone.iter().map(bytes).collect())?;
            needed = needed.max(pass);
            least = least.max(compact::least(pass, bits).saturating_sub(freed));
        }
        self.report.copied_bytes = copied;
        self.report.room_needed_bytes = needed;
        self.report.room_least_bytes = least;
        self.report.room_available_bytes = needs.available;
        Ok(())
    }

    /// Does what the plan says to the image that it was made from.
    ///
    /// # Errors
    /// As [`gc`].
    pub fn apply(mut self, work: &Work) -> Result<GcReport> {
        let storage = self.storage;
        if self.report.changed {
            let (needed, available) = (self.report.room_least_bytes, self.report.room_available_bytes);
            if room(storage)? != Room::Fixed {
                Needs { needed, available }.ensure()?;
            }
            work.run(|| {
                work.progress.within(0.3, if self.options.compact { 0.6 } else { 1.0 });
                work.progress.begin(WRITING, 0);
                if !self.change.is_empty() {
                    renew::apply(&mut self.change, storage, Punch::All, &self.spill, work)?;
                } else if self.is_idle {
                    settle(storage, self.report.file_length_before_bytes, Punch::All, work)?;
                }
                let moving = std::mem::take(&mut self.report.moved_clusters) * self.report.cluster_size_bytes;
                if self.options.compact {
                    work.progress.within(0.0, 1.0);
                    work.progress.begin(MOVING, moving);
                    self.report.moved_clusters = compact::compact(storage, &self.spill, work)?;
                }
                Ok::<_, Error>(())
            })
            .map_err(|e| e.leaving(Left::Clean))?;
            (self.report.file_length_after_bytes, self.report.allocated_after_bytes) = sizes(storage)?;
        }
        self.report.seconds = self.started.elapsed().as_secs_f64();
        Ok(self.report)
    }
}

/// Refuses by name what cannot be collected.
fn refuse(header: &Header, options: GcOptions) -> Result<()> {
    header.refuse_damaged()?;
    match header.encryption {
        Some(_) if options.compact => Err(Error::unsupported(
            "encrypted images are not compacted: their content depends on its place in the file",
        )
        .advise(Advice::ConvertPlain)),
        _ => Ok(()),
    }
}

/// The change that a collection is, and how many members leave the pool although something uses them.
fn collect(
    ground: Ground,
    options: GcOptions,
    storage: &dyn Storage,
    spill: &Spill,
    work: &Work,
) -> Result<(Change, u64)> {
    if options.drop_pool {
        return Ok((Change::of_pool(ground, NewPool::Dropped), 0));
    }
    let Ground { units, members, .. } = &ground;
    let shared = members.bits().filtered(|&unit| units.users(unit) > 1);
    let has_records = ground.has_records();
    let (mut after, mut joining) = (Bits::new(units.limit()), Sequence::new(spill));
    guests(&ground, storage, shared, spill, work, |unit, guests| {
        if guests.start() < guests.end() {
            after.insert(unit);
            if !has_records {
                joining.push(NewMember { unit, guest: *guests.start() })?;
            }
        }
        Ok(())
    })?;
    let unpooled = ground.used_members() - after.len();
    Ok((Change::of_pool(ground, NewPool::of(after, joining)), unpooled))
}
