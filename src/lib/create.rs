//! A new, empty image that is ready for deduplication.
//!
//! ```no_run
//! use std::path::Path;
//! use dedup_img::{CreateOptions, Silent, create};
//!
//! let size = create(Path::new("new.qcow2"), &CreateOptions { size: Some(1 << 30), ..CreateOptions::default() }, &Silent)?;
//! assert_eq!(size, 1 << 30);
//! # Ok::<(), dedup_img::Error>(())
//! ```

use std::path::Path;

use crate::build::layout::{Layout, Parts, sharer_limit};
use crate::build::writer::NewImage;
pub use crate::build::writer::{Backing, Traits};
use crate::disk::Disk;
use crate::error::{Context, Error, Result};
use crate::format::refcount::RefcountBits;
use crate::progress::Progress;
use crate::storage::target::Target;
use crate::units::{ClusterBits, RowCluster, SECTOR};

/// What to create.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Virtual size in bytes, rounded up to 512; the backing file's where not given.
    pub size: Option<u64>,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Refcount width.
    pub refcount_bits: RefcountBits,
    /// Header fields.
    pub traits: Traits,
    /// Whether every guest cluster gets its L2 entry and its place in the (sparse) file now.
    pub preallocate_metadata: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: None,
            cluster_bits: ClusterBits::DEFAULT,
            refcount_bits: RefcountBits::DEFAULT,
            traits: Traits::default(),
            preallocate_metadata: false,
        }
    }
}

/// Creates an image with an empty pool at `target`, which appears whole or not at all (I7). Returns its virtual size in bytes.
///
/// # Errors
/// Those of writing; refusals by name. An existing target stays as it was.
pub fn create(target: &Path, options: &CreateOptions, progress: &dyn Progress) -> Result<u64> {
    create_image(target, options, progress).target(target)
}

fn create_image(target: &Path, options: &CreateOptions, progress: &dyn Progress) -> Result<u64> {
    let bits = options.cluster_bits;
    sharer_limit(options.refcount_bits)?;
    // The backing file stays open, and thereby locked, until the image is there.
    let backing = options.traits.open_backing(target)?;
    let size = options
        .size
        .or(backing.as_ref().map(Disk::size))
        .ok_or_else(|| Error::invalid("Image creation needs a size parameter"))?
        .checked_next_multiple_of(SECTOR)
        .filter(|&size| i64::try_from(size).is_ok())
        .ok_or_else(|| Error::invalid("Image size must be less than 8 EiB!"))?;
    let clusters = if options.preallocate_metadata { bits.clusters(size) } else { 0 };
    let layout = Layout::new(Parts {
        l2_tables: clusters.div_ceil(bits.entries()),
        members: Some(0),
        data: clusters,
        ..Parts::empty(bits, options.refcount_bits, size)
    })?;
    let file = Target::file(target, &|notice| progress.notice(notice))?;
    file.begin()?;
    let mut image = NewImage::new(file.storage(), layout, None)?;
    image.map_private(RowCluster(0), clusters)?;
    image.finish(&options.traits)?;
    file.commit(true, &|notice| progress.notice(notice))?;
    Ok(size)
}
