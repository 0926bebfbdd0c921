//! What is duplicated, what sharing saves, and what it could save, in one image or across many.
//!
//! ```no_run
//! use std::path::Path;
//! use dedup_img::stats::{Named, StatsOptions, stats};
//! use dedup_img::{Disk, DiskOptions, Work, WorkOptions};
//!
//! let work = Work::new(WorkOptions::default())?;
//! let path = Path::new("disk.raw");
//! let disk = Named { path: path.to_owned(), item: Disk::open(path, &DiskOptions::default())? };
//! let report = stats(&[disk], StatsOptions::default(), &work)?;
//! for point in report.curve.iter().flatten() {
//!     println!("{point:?}");
//! }
//! # Ok::<(), dedup_img::Error>(())
//! ```
//!
//! # How it goes
//!
//! ```text
//!  check -> survey -> metadata figures                                         each QCOW2 image
//!  scan -> (fingerprint, cluster) records in guest order                       each disk, read once
//!            |-> join with the L2 tables -> what dedup would do                each QCOW2 image
//!            +-> all disks in a row -> sorted at each cluster size -> groups -> histogram, top, overlap
//!                                                          +-> distinct -> Layout -> the curve
//! ```
//!
//! Contents are counted by fingerprint; bytes are not compared, because nothing is shared. Nothing is written but temporary files.

mod advice;
mod curve;
mod forecast;
mod groups;
mod guess;
mod join;
mod map;
mod metadata;
mod report;
mod snapshots;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub use advice::{Action, Advice, Why};
pub use report::{
    Amount, Cell, Content, CurvePoint, DedupForecast, DiskClusters, FileClusters, Forecast, Growth, ImageStats, Map,
    Occurrences, PoolStats, Qcow2Stats, RefcountStats, Repeated, Sharing, SnapshotStats, StatsReport, StillDuplicate,
    Users, hex,
};

use crate::check::ALONE;
use crate::dedup::INDEX_BITS;
use crate::dedup::larger::Larger;
use crate::dedup::scan::scan;
use crate::digest::sha256;
use crate::disk::chunks::CHUNK;
use crate::disk::{Disk, Format, Reader};
use crate::error::{Context, Error, ErrorKind, IoContext, Result};
use crate::format::header::extension;
use crate::image::Qcow2;
use crate::progress::Stage;
use crate::sort::content::ContentAt;
use crate::sort::sequence::{Sequence, Spill};
use crate::storage::Storage;
use crate::units::ClusterBits;
use crate::work::Work;
use groups::Groups;
use map::Cells;

/// What to count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatsOptions {
    /// The cluster size in which content is counted; if not given the smallest of the images, where a raw image counts as 4 KiB.
    pub cluster_size: Option<ClusterBits>,
    /// Whether to look at all cluster sizes up to 2 MiB.
    pub curve: bool,
    /// How many of the most frequent contents are told.
    pub top: usize,
}

impl Default for StatsOptions {
    fn default() -> Self {
        Self { cluster_size: None, curve: true, top: 10 }
    }
}

/// An image by its name.
#[derive(Debug)]
pub struct Named<T> {
    /// The name.
    pub path: PathBuf,
    /// What has it.
    pub item: T,
}

/// Reads `disks` and counts.
///
/// # Errors
/// Those of reading; [`ErrorKind::Corrupt`] for a damaged image; [`ErrorKind::Changed`] for one that changed while it was read.
pub fn stats(disks: &[Named<Disk>], options: StatsOptions, work: &Work) -> Result<StatsReport> {
    let started = Instant::now();
    let spill = work.spill();
    let mut report = work.run(|| Count::new(disks, options)?.run(&spill, work))?;
    for disk in disks {
        disk.item.ensure_unchanged()?;
    }
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// Counts what the metadata of QCOW2 `images` tells; no data is read.
///
/// # Errors
/// Those of reading; [`ErrorKind::Corrupt`] for a damaged image.
pub fn quick(images: &[Named<Qcow2>], work: &Work) -> Result<StatsReport> {
    let started = Instant::now();
    let spill = work.spill();
    let mut all = Vec::new();
    work.progress.start();
    for (n, image) in images.iter().enumerate() {
        work.progress.within(nth(n, images.len()), nth(n + 1, images.len()));
        let storage = image.item.storage();
        let surveyed = work.run(|| metadata::survey(storage, ALONE, &spill, work));
        let surveyed = surveyed.on(&image.path)?;
        let size = surveyed.ground.inspection.header.size;
        let mut stats = ImageStats::new(&image.path, Format::Qcow2, size, storage).on(&image.path)?;
        stats.disk = surveyed.disk;
        stats.qcow2 = Some(surveyed.stats);
        all.push(stats);
    }
    let cluster_size = all.iter().map(|image| image.disk.cluster_size_bytes).min().unwrap_or(0);
    let mut report = StatsReport::new(all, cluster_size);
    report.quick = true;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// The phases of one image.
const CHECKING: Stage = Stage("checking", 0, 15);
const SCANNING: Stage = Stage("scanning", 15, 100);
/// Where counting begins when all images are read.
const COUNTING: f64 = 0.9;

/// The `n`th of `count` equal parts, as a fraction.
#[expect(clippy::cast_precision_loss, reason = "a fraction for people")]
fn nth(n: usize, count: usize) -> f64 {
    n as f64 / count.max(1) as f64
}

impl StatsReport {
    fn new(images: Vec<ImageStats>, cluster_size_bytes: u64) -> Self {
        Self {
            quick: false,
            cluster_size_bytes,
            images,
            content: None,
            histogram: None,
            top: None,
            curve: None,
            recommendation: None,
            overlap: None,
            growth: None,
            exclusive: None,
            seconds: 0.0,
        }
    }
}

impl ImageStats {
    fn new(path: &Path, format: Format, size: u64, storage: &dyn Storage) -> Result<Self> {
        Ok(Self {
            filename: path.display().to_string(),
            format,
            virtual_size_bytes: size,
            file_length_bytes: storage.len().at("Could not get its length")?,
            file_allocated_bytes: storage.allocated().at("Could not get its size on disk")?,
            disk: DiskClusters::default(),
            content: None,
            still_duplicate: None,
            qcow2: None,
            map: None,
        })
    }
}

/// A count of disks.
struct Count<'a> {
    disks: &'a [Named<Disk>],
    options: StatsOptions,
    /// The cluster size in which content is counted.
    bits: ClusterBits,
    /// The cluster size of the scans.
    grain: ClusterBits,
    /// Where each disk begins when all are laid out in a row, in bytes: at multiples of the largest cluster, so that no cluster
    /// holds parts of two.
    bases: Vec<u64>,
    /// Where the last one ends.
    size: u64,
}

impl<'a> Count<'a> {
    fn new(disks: &'a [Named<Disk>], options: StatsOptions) -> Result<Self> {
        let own = disks.iter().map(|disk| own_size(&disk.item).unwrap_or(ClusterBits::GRAIN)).min();
        let own = own.ok_or_else(|| Error::invalid("statistics of no image"))?;
        let bits = options.cluster_size.unwrap_or(own);
        let sizes = disks.iter().filter_map(|disk| own_size(&disk.item)).chain([bits]);
        let sizes = sizes.chain(options.curve.then_some(ClusterBits::GRAIN));
        let grain = sizes.min().unwrap_or(bits);
        let (mut bases, mut size) = (Vec::new(), 0_u64);
        for disk in disks {
            let base = size.next_multiple_of(CHUNK);
            size = base.saturating_add(disk.item.size());
            if grain.clusters(size) > 1 << INDEX_BITS {
                let message = format!("the disks have more than 2^{INDEX_BITS} clusters");
                return Err(Error::new(ErrorKind::Limit, message).advise(crate::error::Advice::CountLess));
            }
            bases.push(base);
        }
        Ok(Self { disks, options, bits, grain, bases, size })
    }

    fn run(&self, spill: &Spill, work: &Work) -> Result<StatsReport> {
        let mut records = Sequence::new(spill);
        let mut images = Vec::new();
        let mut cells = Vec::new();
        work.progress.start();
        for (n, (disk, &base)) in self.disks.iter().zip(&self.bases).enumerate() {
            work.progress.within(COUNTING * nth(n, self.disks.len()), COUNTING * nth(n + 1, self.disks.len()));
            let (image, map) = self.image(disk, base, &mut records, spill, work)?;
            images.push(image);
            cells.push(map);
        }
        work.progress.within(COUNTING, 1.0);
        work.progress.begin(Stage("counting", 0, 100), 0);
        let mut curve = Vec::new();
        let mut groups = None;
        curve::each_size(records, &self.sizes(), spill, work, |bits, l2_tables, records| {
            if self.options.curve && (bits == self.bits || bits >= ClusterBits::GRAIN) {
                curve.extend(curve::point(bits, self.size, l2_tables, records)?);
            }
            if bits == self.bits {
                let bases = self.bases.iter().map(|base| base >> bits.bits()).collect();
                groups = Some(Groups::count(records, bits, bases, &mut cells, self.options.top)?);
            }
            Ok(())
        })?;
        let mut report = StatsReport::new(images, self.bits.bytes());
        if let Some(groups) = groups {
            self.fill(&mut report, &groups, cells)?;
        }
        if let ([image], [disk], true) = (report.images.as_slice(), self.disks, self.options.curve) {
            let header = disk.item.qcow2().map(Qcow2::header);
            let is_alone = header
                .is_none_or(|header| header.backing_name.is_none() && header.extension(extension::BITMAPS).is_none())
                && image.qcow2.as_ref().is_none_or(|qcow2| qcow2.snapshots.is_empty());
            // A conversion leaves snapshots and bitmaps behind, and takes in the backing file.
            report.recommendation = Some(advice::advise(image, &disk.path, &curve, is_alone));
        }
        report.curve = self.options.curve.then_some(curve);
        Ok(report)
    }

    /// The cluster sizes that are looked at, in ascending order: that of the scans and that of the report, and for the curve 4 KiB
    /// and more.
    fn sizes(&self) -> Vec<ClusterBits> {
        let curve = (ClusterBits::GRAIN.bits()..=ClusterBits::MAX.bits()).filter(|_| self.options.curve);
        let sizes: BTreeSet<ClusterBits> = curve.filter_map(ClusterBits::new).chain([self.grain, self.bits]).collect();
        sizes.into_iter().collect()
    }

    /// Scans one disk, and appends its records to those of the disks before it.
    fn image(
        &self,
        named: &Named<Disk>,
        base: u64,
        records: &mut Sequence<ContentAt>,
        spill: &Spill,
        work: &Work,
    ) -> Result<(ImageStats, Option<Cells>)> {
        let disk = &named.item;
        let Some(file) = disk.file() else { return Err(Error::invalid("statistics of no file")) };
        let mut stats = ImageStats::new(&named.path, disk.format(), disk.size(), file)?;
        let surveyed = match disk.qcow2() {
            Some(image) => Some(metadata::survey(image.storage(), CHECKING, spill, work).on(&named.path)?),
            None => None,
        };
        work.progress.begin(SCANNING, disk.size());
        let found = scan(disk, None, self.grain, spill, work)?;
        let own = own_size(disk).unwrap_or(self.bits);
        let mut cells = (own == self.bits).then(|| Cells::new(own.clusters(disk.size())));
        match surveyed {
            None => stats.disk = self.raw_clusters(disk, &found.records)?,
            Some(surveyed) => {
                let larger = Larger::new(found.records.iter(), self.grain, own);
                let joined = join::join(&surveyed, file, larger, cells.as_mut(), spill, work).on(&named.path)?;
                stats.disk = DiskClusters { stored_zero_clusters: Some(joined.stored_zeros), ..surveyed.disk };
                let mut qcow2 = surveyed.stats.clone();
                let forecast = forecast::forecast(surveyed, joined, file, self.grain, spill, work);
                let (still, forecast) = forecast.on(&named.path)?;
                qcow2.dedup = Some(forecast);
                stats.still_duplicate = Some(still);
                stats.qcow2 = Some(qcow2);
            }
        }
        if records.is_empty() && base == 0 {
            *records = found.records;
            return Ok((stats, cells));
        }
        let base = base >> self.grain.bits();
        for record in found.records.iter() {
            let record = record?;
            records.push(record.at(base + record.cluster()))?;
        }
        Ok((stats, cells))
    }

    /// How a raw image has its clusters.
    fn raw_clusters(&self, disk: &Disk, records: &Sequence<ContentAt>) -> Result<DiskClusters> {
        let total = self.bits.clusters(disk.size());
        let (mut allocated, mut at) = (0, 0);
        while let Some(data) = disk.next_data(at)? {
            // A cluster in which two pieces of data lie counts once.
            let first = (data.start >> self.bits.bits()).max(self.bits.clusters(at));
            let end = self.bits.clusters(data.end);
            allocated += end.saturating_sub(first);
            at = (end << self.bits.bits()).min(disk.size());
        }
        let (mut data, mut last) = (0, None);
        for record in records.iter() {
            let cluster = record?.cluster() >> (self.bits.bits() - self.grain.bits());
            data += u64::from(last.replace(cluster) != Some(cluster));
        }
        Ok(DiskClusters {
            cluster_size_bytes: self.bits.bytes(),
            total_clusters: total,
            allocated_clusters: allocated,
            unallocated_clusters: total - allocated,
            stored_zero_clusters: Some(allocated.saturating_sub(data)),
            ..DiskClusters::default()
        })
    }

    /// Adds what the groups tell.
    fn fill(&self, report: &mut StatsReport, groups: &Groups, cells: Vec<Option<Cells>>) -> Result<()> {
        report.content = Some(Content::new(groups.data(), groups.contents, self.bits));
        report.histogram = Some(groups.histogram());
        for ((image, &(data, contents)), cells) in report.images.iter_mut().zip(&groups.images).zip(cells) {
            let content = Content::new(data, contents, self.bits);
            image.content = Some(content);
            if image.qcow2.is_none() {
                let still = StillDuplicate::new(content.duplicate_clusters, data, self.bits.bytes());
                image.still_duplicate = Some(still);
            }
            image.map = cells.map(Cells::finish);
        }
        let mut content = vec![0; self.bits.len()];
        let mut top = Vec::new();
        for frequent in groups.top() {
            let (first_image, cluster) = groups.place(frequent.first.0);
            let Some(disk) = self.disks.get(first_image) else { continue };
            let first_offset_bytes = cluster << self.bits.bits();
            Reader::random(&disk.item).read(first_offset_bytes, &mut content)?;
            top.push(Repeated {
                times: frequent.times,
                bytes: frequent.times << self.bits.bits(),
                sha256: sha256(&content),
                guess: guess::guess(&content),
                first_image,
                first_offset_bytes,
            });
        }
        report.top = Some(top);
        if self.disks.len() > 1 {
            report.overlap = Some(groups.overlap());
            report.growth = Some(groups.growth());
            report.exclusive = Some(groups.exclusive());
        }
        Ok(())
    }
}

/// The cluster size of a QCOW2 image.
fn own_size(disk: &Disk) -> Option<ClusterBits> {
    disk.qcow2().map(|image| image.header().cluster_bits)
}
