//! A disk becomes a deduplicated QCOW2, a plain one, or a raw file, or goes into a QCOW2 that exists.
//!
//! ```no_run
//! use std::path::Path;
//! use dedup_img::units::ClusterBits;
//! use dedup_img::{ClusterSize, ConvertOptions, Disk, DiskOptions, RawOptions, Work, WorkOptions, convert, to_raw};
//!
//! let work = Work::new(WorkOptions::default())?;
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
mod job;
mod options;
mod packed;
mod raw;
mod refuse;
mod report;
mod sample;
mod size;
mod stages;
mod stream;
mod tasks;

use std::path::Path;
use std::time::Instant;

pub use into::{IntoOptions, convert_into};
pub use options::{ClusterSize, ConvertOptions, Sharing};
pub use raw::{RawOptions, RawReport, to_raw};
pub use report::ConvertReport;
pub use size::SizeChoice;

use crate::disk::Disk;
use crate::error::{Context, Result};
use crate::storage::rate::Paced;
use crate::storage::target::Target;
use crate::work::Work;
use job::Job;
use refuse::{refuse_own_source, sharer_records};
use stages::Begun;

/// Converts `disk` into a QCOW2 at `target`, deduplicated or plain. A file appears whole or not at all (I7); a block
/// device holds no image until all of it is there.
///
/// # Errors
/// Those of reading and writing; refusals by name. An existing file stays as it was.
pub fn convert(disk: &Disk, target: &Path, options: &ConvertOptions, work: &Work) -> Result<ConvertReport> {
    let begun = Begun::default();
    convert_to(disk, target, options, &begun, work).map_err(|e| e.leaving(begun.left()))
}

/// Resolves what is asked for, refuses what cannot be, writes, gives the file its name, and reports.
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
    refuse_own_source(disk, target)?;
    let backing = options.traits.open_backing(target).target(target)?;
    let backing = backing.as_ref();
    let file = Target::open(target, &|notice| work.progress.notice(notice))?;
    let size = options.cluster_size.resolve(backing);
    let spill = work.spill_beside(file.directory());
    let storage = &Paced::new(file.storage(), options.rate, &work.cancel);
    let job = Job { begun, disk, target, file: &file, backing, options, size, limit, records, storage, spill, work };
    job.refuse_size()?;

    let written = job.run()?;
    job.ensure_unchanged(written.first.as_ref())?;
    work.cancel.check()?;
    if options.uncached {
        file.uncache()?;
    }
    let allocated_bytes = file.commit(options.durable, &|notice| work.progress.notice(notice))?;
    let report = ConvertReport::new(disk, options, written, size.reason, allocated_bytes);
    Ok(ConvertReport { seconds: started.elapsed().as_secs_f64(), ..report })
}
