//! Writing a disk into an existing image: only clusters that differ, each content once.
//!
//! ```text
//!  check -> compare with the target -> survey -> links -> pool -> places -> apply -> settle
//!           (source and target, once)  (L2)     (bytes)  (SHA-256, bytes)
//! ```
//!
//! New content is looked for in three places: among what the disk keeps (the comparison reads that anyway), in the pool by its
//! SHA-256, and among itself. What is found nowhere gets a new cluster: a cluster is never written where it lies, so that each one
//! reads as before or as it should whenever a crash comes, and snapshots stay what they are. The order of writes is that of
//! [`crate::edit`]: new clusters are filled in step 3, when nothing leads to them, and L2 entries change in step 8.

mod class;
mod find;
mod place;
mod source;

use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use crate::check::Inspection;
use crate::dedup::group::group;
use crate::dedup::level::Level;
use crate::dedup::reading::Again;
use crate::dedup::scan::{Other, Scan, scan};
use crate::dedup::verify::verify;
use crate::disk::Disk;
use crate::edit::allocate::Allocator;
use crate::edit::apply;
use crate::edit::change::{Members, Overwriting};
use crate::edit::entries::new_tables;
use crate::edit::marks::upgraded;
use crate::edit::members::NewMember;
use crate::edit::phases::{APPLYING, CHECKING, WRITING};
use crate::edit::refuse::{refuse, refuse_snapshots};
use crate::edit::repair::make_ready;
use crate::edit::room::sizes;
use crate::error::{Advice, Error, ErrorKind, Result};
use crate::image::read_header;
use crate::image::refcounts::Refcounts;
use crate::pool::Pin;
use crate::progress::Stage;
use crate::sort::bits::Bits;
use crate::sort::sequence::{Sequence, Sorter, Spill};
use crate::storage::Storage;
use crate::survey::{Ground, guests, sound};
use crate::work::Work;

use class::Stores;
use find::Heads;
use place::Placed;
use source::Source;

/// What an overwriting did. Sizes are in bytes, clusters are those of the target.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct OverwriteReport {
    /// Size of the source.
    pub virtual_size_bytes: u64,
    /// Size of the target; what lies behind the end of the source stays.
    pub target_size_bytes: u64,
    /// Cluster size of the target.
    pub cluster_size_bytes: u64,
    /// Compared: what was not known to be zeros on both sides without reading.
    pub read_bytes: u64,
    /// Clusters that are not zero and that the target reads in the same way.
    pub unchanged_clusters: u64,
    /// Clusters that became zeros.
    pub zeroed_clusters: u64,
    /// Clusters with other data than before.
    pub changed_clusters: u64,
    /// Those of them that share what the target had.
    pub reused_clusters: u64,
    /// Data clusters that were written: one for each content that is new.
    pub written_clusters: u64,
    /// The same in bytes.
    pub written_bytes: u64,
    /// Members of the pool.
    pub pool_members: u64,
    /// Whether a version 2 image became version 3.
    pub upgraded: bool,
    /// Whether anything was to be done.
    pub changed: bool,
    /// Wrong refcounts and flags that were repaired first, because the image was not closed cleanly.
    pub repaired: u64,
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

/// The phases between the checking and the applying.
const COMPARING: Stage = Stage("comparing", 10, 65);
const LOOKING_UP: Stage = Stage("looking up", 65, 80);

/// Makes the disk of the QCOW2 in `storage`, which nobody else may use, read as `disk`. `present` is that disk as it reads now, its
/// backing files included. Clusters with two users enter the pool, or all that are written, as `pin` says. Large tables go to
/// temporary files in `scratch` where `work` names no other directory.
///
/// # Errors
/// [`ErrorKind::Invalid`] where `disk` is larger; refusals by name, where nothing was written; those of reading and writing, where
/// each cluster reads as before or as it should, and the message says if the image needs a repair.
pub fn overwrite(
    storage: &dyn Storage,
    present: &Disk,
    disk: &Disk,
    pin: Pin,
    scratch: &Path,
    work: &Work,
) -> Result<OverwriteReport> {
    let started = Instant::now();
    let header = read_header(storage)?;
    let limit = refuse(&header)?;
    if disk.size() > present.size() {
        let message = format!("output file is smaller than input file ({} and {} bytes)", present.size(), disk.size());
        return Err(Error::invalid(message).advise(Advice::Resize));
    }
    if header.version < 3 {
        upgraded(&header)?;
    }
    work.progress.start();
    let mut inspection = sound(storage, CHECKING, work, |_| {})?;
    refuse_snapshots(&inspection)?;
    refuse_bitmaps(&inspection)?;
    let repaired = make_ready(storage, work)?;
    if repaired.is_some() {
        inspection = sound(storage, CHECKING, work, |_| {})?;
    }
    let bits = header.cluster_bits;
    let (file_length, allocated) = sizes(storage)?;
    let mut report = OverwriteReport {
        virtual_size_bytes: disk.size(),
        target_size_bytes: present.size(),
        cluster_size_bytes: bits.bytes(),
        read_bytes: 0,
        unchanged_clusters: 0,
        zeroed_clusters: 0,
        changed_clusters: 0,
        reused_clusters: 0,
        written_clusters: 0,
        written_bytes: 0,
        pool_members: inspection.pool.as_ref().map_or(0, |pool| pool.members.len() as u64),
        upgraded: false,
        repaired: repaired.map_or(0, |repaired| repaired.corruptions_fixed),
        changed: false,
        file_length_before_bytes: file_length,
        file_length_after_bytes: file_length,
        allocated_before_bytes: allocated,
        allocated_after_bytes: allocated,
        seconds: 0.0,
    };
    work.run(|| {
        let spill = &work.spill_beside(scratch);
        work.progress.begin(COMPARING, disk.size());
        let scan = scan(disk, Some(Other::Target(present)), bits, spill, work)?;
        report.read_bytes = scan.bytes_read;
        report.unchanged_clusters = scan.same;
        if scan.records.is_empty() && scan.zeros.is_empty() {
            disk.ensure_unchanged()
        } else {
            let source = &Source::new(disk, present, bits)?;
            let (overwriting, stores) =
                Planner { storage, source, limit, pin, spill, work }.plan(scan, inspection, &mut report)?;
            work.progress.within(APPLYING.0, APPLYING.1);
            work.progress.begin(WRITING, report.written_bytes);
            let fill = |ground: &Ground, storage: &dyn Storage| {
                source.copy(&stores, ground, storage, work)?;
                // What was compared is what was copied, or nothing will lead to it.
                if disk.restless().next().is_some() {
                    Again { disk, other: Some(Other::Target(present)), spill, work }.ensure_same(&stores.first)?;
                }
                disk.ensure_unchanged()
            };
            apply::overwrite(overwriting, &fill, storage, work)?;
            (report.file_length_after_bytes, report.allocated_after_bytes) = sizes(storage)?;
            Ok(())
        }
    })?;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// Makes a change of what a scan found.
struct Planner<'a> {
    storage: &'a dyn Storage,
    source: &'a Source<'a>,
    /// The sharer limit.
    limit: u64,
    pin: Pin,
    spill: &'a Spill,
    work: &'a Work,
}

impl Planner<'_> {
    /// The change that makes the disk read what `scan` found, and the clusters that it stores.
    fn plan(
        &self,
        mut scan: Scan,
        inspection: Inspection,
        report: &mut OverwriteReport,
    ) -> Result<(Overwriting, Stores)> {
        let Self { storage, source, limit, pin, spill, work } = *self;
        let bits = inspection.header.cluster_bits;
        let ground = Ground::with_room(storage, inspection, scan.records.len())?;
        let small = spill.share(4);
        let unchanged = std::mem::replace(&mut scan.unchanged, Sequence::new(&small)).into_sorted()?;
        let (changed, first) = Level::of(scan, None, spill)?;

        let links = find::links(&changed.records, &unchanged, spill)?;
        drop(unchanged);
        work.progress.begin(LOOKING_UP, changed.data_clusters << bits.bits());
        let links = verify(source, links, |records| group(records, u64::MAX, spill), spill, work)?;
        let heads = || Heads::new(&changed.runs, &links);
        let in_pool = find::in_pool(&ground, storage, source, heads(), &small, work)?;
        let classes = find::classes(&ground, storage, heads(), &links, &in_pool, spill)?;

        let header = &ground.inspection.header;
        let refcounts = Refcounts::load(storage, header)?;
        let free = Allocator::new(&refcounts, header, ground.inspection.file_len, &ground.inspection.counts)?;
        let mut placed = place::place(&ground, &classes, (&changed.zeros, first), (limit, pin), free, spill)?;
        let tables = new_tables(&ground, &placed.entries, &mut placed.free)?;

        let members = self.members(&ground, placed.members, placed.shared)?;
        report.changed_clusters = changed.data_clusters;
        report.zeroed_clusters = placed.entries.len() - changed.data_clusters;
        report.reused_clusters = placed.reused;
        report.written_clusters = placed.stores.places.len();
        report.written_bytes = placed.stores.places.len() << bits.bits();
        report.pool_members = members.after.len();
        report.changed = true;
        let Placed { entries, gains, free, stores, .. } = placed;
        let overwriting = Overwriting::new(ground, members, (entries, gains, tables), free);
        report.upgraded = overwriting.upgrades();
        Ok((overwriting, stores))
    }

    /// What enters the pool, in unit order, and all members that it will have: `new` ones, and units that are `shared` from now
    /// on. Where the directory is lost what is in use enters it once more.
    fn members(&self, ground: &Ground, mut new: Sorter<NewMember>, shared: Bits) -> Result<Members> {
        let mut old = shared;
        let mut after = Bits::new(ground.units.limit());
        for unit in ground.members.bits().iter() {
            if ground.has_records() {
                after.insert(unit);
            } else if ground.units.users(unit) > 0 {
                old.insert(unit);
            }
        }
        guests(ground, self.storage, old, self.spill, self.work, |unit, guests| {
            new.push(NewMember { unit, guest: *guests.start() })
        })?;
        let mut joining = Sequence::new(self.spill);
        for member in new.finish()?.iter() {
            let member = member?;
            after.insert(member.unit);
            joining.push(member)?;
        }
        Ok(Members { after, joining, first: None })
    }
}

/// Fails where a bitmap would have to learn of what is written.
fn refuse_bitmaps(inspection: &Inspection) -> Result<()> {
    match &inspection.recording {
        None => Ok(()),
        Some(name) => {
            Err(Error::new(ErrorKind::Unsupported, format!("its bitmap '{name}' records writes, and would miss these"))
                .advise(Advice::DisableBitmap))
        }
    }
}
