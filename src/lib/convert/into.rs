//! A disk goes into an image that exists.

use std::num::NonZeroU64;
use std::path::Path;

use super::refuse::refuse_own_source;
use crate::disk::{BackingRule, Disk, DiskOptions, Format, open_image};
use crate::error::Result;
use crate::inplace::{OverwriteReport, overwrite};
use crate::pool::Pin;
use crate::storage::drop_cache;
use crate::storage::lock::LockMode;
use crate::storage::rate::Paced;
use crate::work::Work;

/// How to write into an image.
#[derive(Debug, Clone, Default)]
pub struct IntoOptions {
    /// What of the new clusters is pooled. Members of the pool stay members either way.
    pub pin: Pin,
    /// Whether the image is taken out of the host's page cache in the end.
    pub uncached: bool,
    /// How many bytes may be written in a second.
    pub rate: Option<NonZeroU64>,
    /// Which backing files of the target are opened.
    pub backing: BackingRule,
}

/// Writes `disk` into the QCOW2 at `target`: only clusters that differ from what it reads now, each content once.
///
/// Snapshots in the target stay as they are. The order of writes is that of all that is done in place (see the front page): it does not depend on an option
/// what a crash leaves.
///
/// # Errors
/// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) where `disk` is larger than the target or one of its sources is the target; refusals by name, where nothing
/// was written; those of reading and writing, where each cluster reads as before or as it should, and the message says if the image
/// needs a repair.
pub fn convert_into(disk: &Disk, target: &Path, options: IntoOptions, work: &Work) -> Result<OverwriteReport> {
    refuse_own_source(disk, target)?;
    let (file, _) = open_image(target, Some(Format::Qcow2), LockMode::Write)?;
    let present = Disk::of_storage(target, &file, &DiskOptions { backing: options.backing, ..DiskOptions::default() })?;
    let storage = Paced::new(&file, options.rate, &work.cancel);
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let report = overwrite(&storage, &present, disk, options.pin, parent, work).map_err(|e| e.of_image(target))?;
    if options.uncached {
        drop_cache(file.file());
    }
    Ok(report)
}
