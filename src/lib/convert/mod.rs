//! A disk becomes a deduplicated QCOW2, a plain one, or a raw file, or goes into a QCOW2 that exists.
//!
//! ```no_run
//! # use std::path::Path;
//! # use dedup_img::work;
//! # let work = work::Work::new(work::WorkOptions::default())?;
//! use dedup_img::convert::{ClusterSize, ConvertOptions, RawOptions, convert, to_raw};
//! use dedup_img::disk::{Disk, DiskOptions};
//! use dedup_img::units::ClusterBits;
//!
//! let disk = Disk::open(Path::new("disk.raw"), &DiskOptions::default())?;
//! let options = ConvertOptions { cluster_size: ClusterSize::Fixed(ClusterBits::GRAIN), ..ConvertOptions::default() };
//! let report = convert(&disk, Path::new("disk.qcow2"), &options, &work)?;
//! println!("{} of {} clusters stored", report.stored_clusters, report.data_clusters);
//!
//! let back = Disk::open(Path::new("disk.qcow2"), &DiskOptions::default())?;
//! to_raw(&back, Path::new("back.raw"), RawOptions::default(), &work)?;
//! # Ok::<(), dedup_img::Error>(())
//! ```

mod copy;
mod into;
mod packed;
mod raw;
mod sample;
pub(crate) mod size;
mod stages;
mod stream;
mod tasks;

use std::num::NonZeroU64;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

pub use into::{IntoOptions, convert_into};
pub use raw::{RawOptions, RawReport, to_raw};
use size::Seen;
pub use size::SizeChoice;
use stages::{Begun, COMPARING, CONVERTING, MEASURING, WRITING};
use stream::Streamed;

use crate::build::layers::{Layers, with_snapshots};
use crate::build::layout::{Layout, Parts};
use crate::build::writer::Traits;
use crate::codec::CompressionLevel;
use crate::dedup::group::group;
use crate::dedup::plan::Plan;
use crate::dedup::reading::{Again, FirstReading};
use crate::dedup::scan::Other;
use crate::dedup::verify::{GuestClusters, verify};
use crate::disk::Disk;
use crate::disk::history::History;
use crate::error::{Error, IoContext, Result};
use crate::format::refcount::RefcountBits;
use crate::name::shown;
use crate::pool::Pin;
use crate::sort::sequence::{Sorter, Spill};
use crate::storage::Storage;
use crate::storage::open::FileId;
use crate::storage::rate::Paced;
use crate::storage::stack::Bytes;
use crate::storage::target::{Nowhere, Target};
use crate::units::{ClusterBits, percent};
use crate::work::Work;

/// The cluster size of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClusterSize {
    /// The one of 4, 8, 16, 32 and 64 KiB that gives the smallest file, the larger one on a near tie. How far the contents can be
    /// compressed is estimated.
    #[default]
    Auto,
    /// The 64 KiB that qemu-img takes, for images as others write them.
    Usual,
    /// This one.
    Fixed(ClusterBits),
}

/// Whether equal clusters share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// They do; which of them enter the pool.
    Pooled(Pin),
    /// Every guest cluster that is not zero has a cluster of its own, and there is no pool: an image as others write it.
    Plain,
}

impl Sharing {
    /// How often a stored cluster may be referenced by guest clusters.
    pub(crate) fn limit(self, bits: RefcountBits) -> Result<u64> {
        match self {
            Self::Pooled(_) => bits.sharer_limit().ok_or_else(|| too_narrow(bits)),
            Self::Plain => Ok(bits.max()),
        }
    }

    /// `members` of a pool, where there is one.
    fn members(self, members: u64) -> Option<u64> {
        (self != Self::Plain).then_some(members)
    }
}

/// What to write.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// Cluster size.
    pub cluster_size: ClusterSize,
    /// Refcount width.
    pub refcount_bits: RefcountBits,
    /// Header fields.
    pub traits: Traits,
    /// Who shares, and which clusters are pooled.
    pub sharing: Sharing,
    /// Whether and how clusters are compressed; of the kind that the header fields say.
    pub compress: Option<CompressionLevel>,
    /// Whether the output is on the disk when [`convert`] returns; without, a power failure soon after may lose it.
    pub durable: bool,
    /// Whether the output is taken out of the host's page cache in the end.
    pub uncached: bool,
    /// How many bytes may be written in a second.
    pub rate: Option<NonZeroU64>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            cluster_size: ClusterSize::Auto,
            refcount_bits: RefcountBits::DEFAULT,
            traits: Traits::default(),
            sharing: Sharing::Pooled(Pin::Shared),
            compress: None,
            durable: true,
            uncached: false,
            rate: None,
        }
    }
}

/// What a conversion did. Sizes are in bytes.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ConvertReport {
    /// Whether nothing is shared and there is no pool.
    pub plain: bool,
    /// Size of the disk that the guest sees.
    pub virtual_size_bytes: u64,
    /// Snapshots that were converted with the disk; `None` where that was not asked for. The clusters below are those of the disk, of
    /// all snapshots and of their VM states then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshots: Option<u64>,
    /// Read from the source to find fingerprints: what was not known to be zeros without reading.
    pub read_bytes: u64,
    /// Part of the virtual size that reads as zeros and is not stored.
    pub zero_bytes: u64,
    /// Guest clusters that are not zero and that the backing file has: they are left to it.
    pub backing_clusters: u64,
    /// Other guest clusters that are not zero.
    pub data_clusters: u64,
    /// Data clusters in the file: one for each distinct content, and the copies that the sharer limit forces.
    pub stored_clusters: u64,
    /// Stored clusters that two or more guest clusters share; what only snapshots share, at one place of the disk, does not count.
    pub shared_clusters: u64,
    /// Guest clusters that need no cluster of their own: `data_clusters - stored_clusters`.
    pub duplicate_clusters: u64,
    /// What sharing saves: `duplicate_clusters` in bytes.
    pub saved_bytes: u64,
    /// The same as a share of all data clusters.
    pub saved_percent: f64,
    /// Whether clusters that become smaller by it are compressed.
    #[serde(skip)]
    pub compressed: bool,
    /// Stored clusters that are compressed.
    pub compressed_clusters: u64,
    /// What they take.
    pub compressed_bytes: u64,
    /// Members of the pool.
    pub pool_members: u64,
    /// Length of the output file.
    pub file_length_bytes: u64,
    /// Bytes that the output file occupies.
    pub allocated_bytes: u64,
    /// Cluster size of the output.
    pub cluster_size_bytes: u64,
    /// `option`, `auto`, `default`, or `backing` for the backing file's.
    pub cluster_size_reason: &'static str,
    /// The file lengths from which `auto` chose; estimates where clusters are compressed.
    pub cluster_sizes: Vec<SizeChoice>,
    /// The `l2-cache-size` with which QEMU caches all L2 tables, where its default does not cover the disk.
    pub l2_cache_size_bytes: Option<u64>,
    /// Time taken.
    pub seconds: f64,
}

/// Converts `disk` into a QCOW2 at `target`, deduplicated or plain. A file appears whole or not at all (I7); a block
/// device holds no image until all of it is there.
///
/// # Errors
/// Those of reading and writing; refusals by name. An existing file stays as it was.
pub fn convert(disk: &Disk, target: &Path, options: &ConvertOptions, work: &Work) -> Result<ConvertReport> {
    let begun = Begun::default();
    convert_to(disk, target, options, &begun, work).map_err(|e| e.leaving(begun.left()))
}

fn convert_to(
    disk: &Disk,
    target: &Path,
    options: &ConvertOptions,
    begun: &Begun,
    work: &Work,
) -> Result<ConvertReport> {
    let started = Instant::now();
    work.progress.start();
    let limit = options.sharing.limit(options.refcount_bits)?;
    let records = sharer_records(limit, disk, options.refcount_bits)?;
    let said = |e: Error| e.prefixed(&shown(target));
    refuse_own_source(disk, target)?;
    let backing = options.traits.open_backing(target).map_err(said)?;
    let file = Target::open(target, &|notice| work.progress.notice(notice))?;
    let spill = work.spill_beside(file.directory());
    let parts = |bits: ClusterBits| Parts {
        cluster_bits: bits,
        refcount_bits: options.refcount_bits,
        size: disk.size(),
        l2_tables: 0,
        members: options.sharing.members(0),
        snapshots: 0,
        snapshot_l1: 0,
        snapshot_table: 0,
        data: 0,
    };
    let parts = |bits: ClusterBits| with_snapshots(parts(bits), disk.history()).map_err(said);
    let asked_for = options.cluster_size;
    let mut options = options.clone();
    match (options.cluster_size, &backing) {
        (ClusterSize::Auto, Some(backing)) => {
            // What differs from the backing file depends on the cluster size; its own one fits.
            let own = backing.qcow2().map_or(ClusterBits::DEFAULT, |image| image.header().cluster_bits);
            options.cluster_size = ClusterSize::Fixed(own);
        }
        (ClusterSize::Usual, _) => options.cluster_size = ClusterSize::Fixed(ClusterBits::DEFAULT),
        _ => {}
    }
    let options = &options;
    if let ClusterSize::Fixed(bits) = options.cluster_size {
        Layout::new(parts(bits)?).map_err(said)?;
        refuse_grain(disk, bits).map_err(said)?;
    }

    let storage = Paced::new(file.storage(), options.rate, &work.cancel);
    let job = Job {
        begun,
        disk,
        file: &file,
        backing: backing.as_ref(),
        options,
        limit,
        records,
        storage: &storage,
        spill,
        work,
    };
    let written = match job.stream(&parts).map_err(said)? {
        Some(written) => written,
        None => job.in_passes(&parts, said)?,
    };
    let Written { plan, bits, first, seen, layout, compressed_clusters, compressed_bytes } = written;
    if let Some(first) = first.filter(|_| disk.restless().next().is_some()) {
        job.again().ensure_same(&first)?;
    }
    disk.ensure_unchanged()?;
    if let Some(backing) = &backing {
        backing.ensure_unchanged()?;
    }
    work.cancel.check()?;
    if options.uncached {
        file.uncache()?;
    }
    let allocated_bytes = file.commit(options.durable, &|notice| work.progress.notice(notice))?;

    let duplicates = plan.data_clusters - plan.stored;
    let content = disk.history().map_or(disk.size(), History::content_size);
    let size = disk.history().map_or(disk.size(), History::disk_size);
    let data_bytes = match disk.history() {
        None => plan.data_bytes(bits, disk.size()),
        Some(_) => (plan.data_clusters << bits.bits()).min(content),
    };
    Ok(ConvertReport {
        plain: options.sharing == Sharing::Plain,
        virtual_size_bytes: size,
        snapshots: disk.history().map(|history| history.snapshots().len() as u64),
        read_bytes: seen.bytes_read,
        zero_bytes: (content - data_bytes).saturating_sub(seen.same * bits.bytes()),
        backing_clusters: seen.same,
        data_clusters: plan.data_clusters,
        stored_clusters: plan.stored,
        shared_clusters: plan.shared,
        duplicate_clusters: duplicates,
        saved_bytes: duplicates * bits.bytes(),
        saved_percent: percent(duplicates, plan.data_clusters),
        compressed: options.compress.is_some(),
        compressed_clusters,
        compressed_bytes,
        pool_members: plan.members(),
        file_length_bytes: layout.file_len(),
        allocated_bytes,
        cluster_size_bytes: bits.bytes(),
        cluster_size_reason: match (asked_for, &backing) {
            (ClusterSize::Fixed(_), _) => "option",
            (ClusterSize::Usual, _) => "default",
            (ClusterSize::Auto, None) => "auto",
            (ClusterSize::Auto, Some(_)) => "backing",
        },
        cluster_sizes: seen.choices,
        l2_cache_size_bytes: l2_cache_size(size, bits),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// A conversion that is about to write.
struct Job<'a> {
    begun: &'a Begun,
    disk: &'a Disk,
    file: &'a Target,
    backing: Option<&'a Disk>,
    options: &'a ConvertOptions,
    /// The sharer limit, and how many scanned clusters that is.
    limit: u64,
    records: u64,
    storage: &'a Paced<'a>,
    spill: Spill,
    work: &'a Work,
}

/// What was written.
struct Written {
    plan: Plan,
    bits: ClusterBits,
    /// What later readings are held against, where there may be any.
    first: Option<FirstReading>,
    seen: Seen,
    layout: Layout,
    compressed_clusters: u64,
    compressed_bytes: u64,
}

impl Job<'_> {
    /// What reads the disk once more.
    fn again(&self) -> Again<'_> {
        Again { disk: self.disk, other: self.backing.map(Other::Backing), spill: &self.spill, work: self.work }
    }

    /// Writes the image in one pass over the disk, where that can be done.
    fn stream(&self, parts: &impl Fn(ClusterBits) -> Result<Parts>) -> Result<Option<Written>> {
        let Self { disk, options, work, .. } = *self;
        let (ClusterSize::Fixed(bits), None) = (options.cluster_size, options.compress) else { return Ok(None) };
        // A device keeps what it holds until it is sure to have room, with --salvage all passes must read the same, and what is read
        // once is held against nothing.
        let read_twice = disk.salvages() || disk.restless().next().is_some();
        if self.backing.is_some() || disk.history().is_some() || read_twice || !self.file.is_empty() {
            return Ok(None);
        }
        let parts = parts(bits)?;
        let streamed = work.run(|| {
            if options.sharing != Sharing::Plain && !stream::fits(disk, bits, work)? {
                return Ok(None);
            }
            work.progress.begin(CONVERTING, disk.size());
            stream::stream(disk, parts, options.sharing, (&options.traits, self.limit), self.storage, &self.spill, work)
        })?;
        match streamed {
            Some(Streamed { plan, layout, bytes_read }) => {
                let seen = Seen { bytes_read, same: 0, choices: Vec::new() };
                let (compressed_clusters, compressed_bytes) = (0, 0);
                Ok(Some(Written { plan, bits, first: None, seen, layout, compressed_clusters, compressed_bytes }))
            }
            None => {
                work.progress.anew();
                self.storage.set_len(0).at("Could not begin anew")?;
                Ok(None)
            }
        }
    }

    /// Writes the image in several passes: scan, comparison, copy.
    fn in_passes(
        &self,
        parts: &impl Fn(ClusterBits) -> Result<Parts>,
        said: impl Fn(Error) -> Error + Copy,
    ) -> Result<Written> {
        let Self { disk, file, backing, options, limit, records, storage, work, .. } = *self;
        let spill = &self.spill;
        let begin = || {
            if !file.is_empty() {
                self.begun.set();
            }
            file.begin()
        };
        let (plan, first, bits, seen) = work.run(|| {
            let found = size::scan_and_choose(disk, backing, options, records, spill, work)?;
            let bits = found.level.cluster_bits;
            let (links, pin) = match options.sharing {
                Sharing::Plain => (Sorter::new(spill).finish()?, Pin::Shared),
                Sharing::Pooled(pin) => {
                    let links = group(&found.level.records, records, spill)?;
                    work.progress.begin(COMPARING, links.len() * bits.bytes());
                    let clusters = GuestClusters { disk, cluster_bits: bits };
                    (verify(&clusters, links, |again| group(again, records, spill), spill, work)?, pin)
                }
            };
            let plan = Plan::new(found.level, &links, pin, spill)?;
            Ok::<_, Error>((plan, found.first, bits, found.seen))
        })?;

        let members = options.sharing.members(plan.members());
        let parts = Parts { l2_tables: plan.l2_tables, members, data: plan.stored, ..parts(bits)? };
        work.progress.begin(WRITING, plan.stored * bits.bytes());
        let (layout, compressed_clusters, compressed_bytes) = match options.compress {
            None => {
                let layout = Layout::new(parts).map_err(said)?;
                file.ensure_room(layout.file_len())?;
                begin()?;
                work.run(|| copy::write(disk, (&plan, &first), layout, &options.traits, limit, storage, work))
                    .map_err(said)?;
                (layout, 0, 0)
            }
            Some(level) => {
                let write = |storage: &dyn Storage| {
                    work.run(|| {
                        packed::write(disk, (&plan, &first), parts, (&options.traits, level), storage, spill, work)
                    })
                };
                // Compressed it is shorter, but how much is known when it is done. Where not even that is sure to have room it is done
                // twice, so that a device that is too small keeps what it holds.
                if file.ensure_room(Layout::new(parts).map_err(said)?.file_len()).is_err() {
                    work.progress.begin(MEASURING, plan.stored * bits.bytes());
                    file.ensure_room(write(&Nowhere).map_err(said)?.layout.file_len())?;
                    work.progress.begin(WRITING, plan.stored * bits.bytes());
                }
                begin()?;
                let packed = write(storage).map_err(said)?;
                (packed.layout, packed.clusters, packed.bytes)
            }
        };
        Ok(Written { plan, bits, first: Some(first), seen, layout, compressed_clusters, compressed_bytes })
    }
}

/// QEMU 10's default `l2-cache-size` is at most 32 MiB: 16 GiB of disk at 4 KiB clusters, 256 GiB at 64 KiB.
const DEFAULT_L2_CACHE: u64 = 32 << 20;

/// The size of all L2 tables of a disk of `size` bytes, where that is more than QEMU caches by default.
fn l2_cache_size(size: u64, bits: ClusterBits) -> Option<u64> {
    let tables = bits.clusters(size).div_ceil(bits.entries()) * bits.bytes();
    (tables > DEFAULT_L2_CACHE).then_some(tables)
}

/// How many scanned clusters may share one that takes `limit` sharers: all layers of a disk may use each of them.
fn sharer_records(limit: u64, disk: &Disk, bits: RefcountBits) -> Result<u64> {
    let Some(history) = disk.history() else { return Ok(limit) };
    let layers = history.snapshots().len() as u64 + 1;
    if limit / layers < 2 {
        return Err(Error::unsupported(format!(
            "refcount_bits={} cannot hold the references of {} snapshots; use refcount_bits=32",
            bits.bits(),
            layers - 1
        )));
    }
    Ok(limit / layers)
}

/// Fails where the clusters are larger than those for which a disk with snapshots was opened.
fn refuse_grain(disk: &Disk, bits: ClusterBits) -> Result<()> {
    match disk.history() {
        Some(history) if history.grain() < bits => Err(Error::unsupported(format!(
            "the clusters of the backing file have {size} bytes; with snapshots say so: -o cluster_size={size}",
            size = bits.bytes()
        ))),
        _ => Ok(()),
    }
}

/// The layers that a disk with its snapshots has.
fn layers<'a>(disk: &'a Disk, plan: &'a Plan, bits: ClusterBits) -> Result<Option<Layers<'a>>> {
    match (disk.history(), &plan.woven) {
        (Some(history), Some(woven)) => Layers::new(history, woven, bits).map(Some),
        _ => Ok(None),
    }
}

/// Fails where `target` is one of the files that `disk` is read from, or has their bytes under another name.
fn refuse_own_source(disk: &Disk, target: &Path) -> Result<()> {
    let Ok(metadata) = std::fs::metadata(target) else { return Ok(()) };
    match disk.find(&Bytes::of(FileId::of(&metadata))) {
        None => Ok(()),
        Some(source) => Err(Error::invalid(format!(
            "'{}' is a source of this conversion ('{}'); name another target",
            shown(target),
            shown(source)
        ))),
    }
}

pub(crate) fn too_narrow(bits: RefcountBits) -> Error {
    Error::unsupported(format!(
        "refcount_bits={} cannot hold the 4 references that sharing with a pool needs; use refcount_bits=4 or more",
        bits.bits()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_within_the_default_cache_gets_no_hint() {
        assert_eq!(l2_cache_size(16 << 30, ClusterBits::GRAIN), None);
        assert_eq!(l2_cache_size(32 << 30, ClusterBits::GRAIN), Some(64 << 20));
        assert_eq!(l2_cache_size(256 << 30, ClusterBits::DEFAULT), None);
    }
}
