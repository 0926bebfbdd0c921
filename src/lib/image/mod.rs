//! What a QCOW2 image says of itself: an open one with its snapshots, and the words of the format.
//!
//! Whoever wants a disk's content opens a [`crate::disk::Disk`].

mod extents;
mod open;
pub(crate) mod refcounts;

#[doc(hidden)]
pub use extents::{Extent, Place};
pub(crate) use open::Lost;
pub use open::SnapshotName;

pub use crate::codec::CompressionLevel;
pub use crate::format::coding::CompressionType;
pub use crate::format::refcount::RefcountBits;
pub use crate::format::snapshot::Snapshot;
pub(crate) use open::read_header;

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use crate::format::header::Header;
use crate::storage::Storage;
use crate::units::ClusterBits;

/// A QCOW2 image, or one of its snapshots, open for reading.
///
/// It keeps no L2 table in memory: each request reads the slice of the table that it needs, so that any number of threads can
/// work on one image without a lock.
pub struct Qcow2 {
    storage: Arc<dyn Storage>,
    header: Header,
    /// The L1 table of the active disk or of the chosen snapshot, as stored.
    l1: Vec<u64>,
    /// Virtual size in bytes of what `l1` maps.
    size: u64,
    file_len: u64,
    /// Whether what can be read is read of an image that is damaged.
    salvages: bool,
    /// Where it is damaged then, see [`Qcow2::lost`].
    lost: Vec<Lost>,
}

impl fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2").field("header", &self.header).field("size", &self.size).finish_non_exhaustive()
    }
}

impl Qcow2 {
    /// The validated header.
    #[must_use]
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Version of the format, 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// Cluster size.
    #[must_use]
    pub fn cluster_size(&self) -> ClusterBits {
        self.header.cluster_bits
    }

    /// Refcount width.
    #[must_use]
    pub fn refcount_bits(&self) -> RefcountBits {
        self.header.refcount_bits
    }

    /// How compressed clusters are compressed.
    #[must_use]
    pub fn compression(&self) -> CompressionType {
        self.header.compression
    }

    /// The name of the backing file, as the image has it. Whoever made the image chose it.
    #[must_use]
    pub fn backing_name(&self) -> Option<&Path> {
        self.header.backing_name.as_deref().map(|name| Path::new(OsStr::from_bytes(name)))
    }

    /// Virtual size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file.
    #[must_use]
    pub(crate) fn storage(&self) -> &dyn Storage {
        &*self.storage
    }
}
