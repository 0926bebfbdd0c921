//! Changing an image where it lies: deduplicating it with all its snapshots, writing a disk into it, giving space back.
//!
//! ```no_run
//! # use std::path::Path;
//! # use dedup_img::work;
//! # let work = work::Work::new(work::WorkOptions::default())?;
//! use dedup_img::inplace::{DedupOptions, Plan};
//! use dedup_img::{disk, storage::LockMode};
//!
//! let (storage, _) = disk::open_image(Path::new("disk.qcow2"), None, LockMode::Write)?;
//! let plan = Plan::new(&storage, DedupOptions::default(), &work)?;
//! println!("{} clusters will be free", plan.report(&storage, &work)?.freed_clusters);
//! plan.apply(&storage, &work)?;
//! # Ok::<(), dedup_img::Error>(())
//! ```
//!
//! # How it goes
//!
//! ```text
//!  check -> survey -> scan -> choose -> verify -> Plan -> apply -> settle
//!           (L2)     (data)  (keepers) (bytes)   (a value)
//! ```
//!
//! # Order of writes
//!
//! ```text
//!    step                                                  after a crash here
//!  1 set the dirty bit; flush                              nothing has changed
//!  2 fill new clusters, raise the refcounts of what gains  counts that are too high
//!    references, write new L2 tables, the new pool and the
//!    snapshot table beside the old; flush
//!  3 clear COPIED of what is about to be shared; flush     the same, and needless copies
//!  4 switch to the new snapshot table in one sector;       the new pool is there; the old one's clusters are leaks
//!    flush
//!  5 point duplicates at what they share; flush; again     some do, some do not yet: both hold the same bytes
//!    for each batch
//!    give what is overwritten its new L2 entries; flush    each cluster reads as before or as it should
//!  6 count everything anew; lower what is too high; flush  leaks
//!  7 set COPIED where one reference is left; flush         COPIED that is missing: needless copies
//!  8 punch what is free; clear the dirty bit; flush        nothing uses what is punched
//! ```
//!
//! Whether there is room for what steps 2 to 5 write is asked before step 1. Where there is only once leaks and free clusters that
//! the file still occupies are given back, that is done before step 1: they are punched, and counts that are
//! too high lowered.
//!
//! Clusters are pooled (4) before they are shared (5). Done the other way round, a crash in between would leave shared clusters
//! without the pool's reference, which is right, but not for long: after a repair and some writes by a guest `qemu-img check`
//! would find wrong COPIED flags (I2).
//!
//! Step 6 lowers refcounts by a recount of the image as it is on the disk, not by what the plan meant to change. A failed or
//! interrupted run ends with the same step.

pub(crate) mod choose;
mod compact;
mod gc;
mod moves;
pub(crate) mod overwrite;
pub(crate) mod plan;
mod pointers;
pub(crate) mod repair;
pub(crate) mod scan;

use crate::edit::apply::{self, Punch};
use crate::edit::room::Needs;
pub use gc::{GcOptions, GcPlan, GcReport, gc};
pub use overwrite::OverwriteReport;
pub(crate) use overwrite::overwrite;
pub use plan::{Plan, Share};
use serde::Serialize;

use crate::check::make_ready;
use crate::error::{IoContext, Result};
use crate::pool::Pin;
use crate::progress::Stage;
use crate::storage::Storage;
use crate::work::Work;

/// The phases of a deduplication up to its plan. Those of applying it are in the section behind them.
const CHECKING: Stage = Stage("checking", 0, 10);
const SCANNING: Stage = Stage("scanning", 10, 65);
const COMPARING: Stage = Stage("comparing", 65, 80);
const APPLYING: (f64, f64) = (0.8, 1.0);
/// The phases of applying any change.
const WRITING: Stage = Stage("writing", 0, 70);
pub(crate) const SETTLING: Stage = Stage("settling", 70, 100);

/// How to deduplicate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DedupOptions {
    /// What is pooled. Members of the pool stay members either way.
    pub pin: Pin,
}

/// What a deduplication did, or would do. Sizes are in bytes.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct DedupReport {
    /// Cluster size of the image.
    pub cluster_size_bytes: u64,
    /// Distinct data clusters that the disk or a snapshot uses.
    pub scanned_clusters: u64,
    /// Those that were read: not members of a pool in order, and not in holes of the file.
    pub read_clusters: u64,
    /// Those that hold nothing but zeros.
    pub zero_clusters: u64,
    /// Those that another one replaces.
    pub duplicate_clusters: u64,
    /// Those that replace others and were not in the pool before.
    pub newly_shared_clusters: u64,
    /// Members of the pool that were in use before.
    pub already_shared_clusters: u64,
    /// Clusters whose refcount was too high.
    pub leaked_clusters: u64,
    /// Clusters with data that nothing uses any more; leaked ones and the pool's own are not counted.
    pub freed_clusters: u64,
    /// The same in bytes.
    pub freed_bytes: u64,
    /// Members of the pool.
    pub pool_members: u64,
    /// Whether a version 2 image became version 3.
    pub upgraded: bool,
    /// Passes over the L2 tables that redirected entries.
    pub batches: u64,
    /// Whether anything was to be done.
    pub changed: bool,
    /// Room on the file system that the run needs, beside what the file occupies already.
    pub room_needed_bytes: u64,
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

/// Deduplicates the image in `storage`, which nobody else may use.
///
/// # Errors
/// Those of [`Plan::new`], where nothing was written; those of writing, where the content of the disk and of all snapshots is
/// still what it was, and the message says if the image needs a repair.
pub fn dedup(storage: &dyn Storage, options: DedupOptions, work: &Work) -> Result<DedupReport> {
    let mut plan = Plan::new(storage, options, work)?;
    if make_ready(storage, work)?.is_some() {
        plan = Plan::new(storage, options, work)?;
    }
    plan.apply(storage, work)
}

impl Plan {
    /// Does what the plan says to the image that it was made from.
    ///
    /// # Errors
    /// As [`dedup`].
    pub fn apply(mut self, storage: &dyn Storage, work: &Work) -> Result<DedupReport> {
        let mut report = self.report(storage, work)?;
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
    pub fn report(&self, storage: &dyn Storage, work: &Work) -> Result<DedupReport> {
        let (file_length, allocated) = sizes(storage)?;
        let figures = self.figures();
        let needs = match self.is_empty() {
            true => Needs::none(&self.change, storage)?,
            false => work.run(|| apply::needs(&self.change, storage))?.0,
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
}

/// Length of the file, and what it occupies.
fn sizes(storage: &dyn Storage) -> Result<(u64, u64)> {
    let length = storage.len().at("Could not get its length")?;
    Ok((length, storage.allocated().at("Could not get its size on disk")?))
}
