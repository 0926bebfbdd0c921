//! A new, empty image that is ready for deduplication.

use std::path::Path;

use crate::convert::too_narrow;
use crate::error::{Error, Result};
use crate::format::refcount::RefcountBits;
use crate::image::layout::{Layout, Parts};
use crate::image::writer::{NewImage, Traits};
use crate::storage::atomic_file::AtomicFile;
use crate::units::{ClusterBits, GuestCluster};

/// What to create.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Virtual size in bytes; rounded up to 512.
    pub size: u64,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Refcount width.
    pub refcount_bits: RefcountBits,
    /// Header fields.
    pub traits: Traits,
    /// Whether every guest cluster gets its L2 entry and its place in the (sparse) file now.
    pub preallocate_metadata: bool,
}

/// Creates an image with an empty pool at `target`, which appears whole or not at all (I7).
///
/// # Errors
/// Those of writing; refusals by name. An existing target stays as it was.
pub fn create(target: &Path, options: &CreateOptions) -> Result<()> {
    let said = |e: Error| e.prefixed(&target.display().to_string());
    let size = options
        .size
        .checked_next_multiple_of(512)
        .filter(|&size| i64::try_from(size).is_ok())
        .ok_or_else(|| said(Error::invalid("Image size must be less than 8 EiB!")))?;
    if options.refcount_bits.sharer_limit().is_none() {
        return Err(said(too_narrow(options.refcount_bits)));
    }
    let bits = options.cluster_bits;
    let clusters = if options.preallocate_metadata { bits.clusters(size) } else { 0 };
    let layout = Layout::new(Parts {
        cluster_bits: bits,
        refcount_bits: options.refcount_bits,
        size,
        l2_tables: clusters.div_ceil(bits.entries()),
        members: 0,
        data: clusters,
    })
    .map_err(said)?;
    let file = AtomicFile::create(target)?;
    let write = || {
        let mut image = NewImage::new(file.storage(), layout)?;
        image.map_private(GuestCluster(0), clusters)?;
        image.finish(&options.traits)
    };
    write().map_err(said)?;
    file.commit(true).map(|_| ())
}
