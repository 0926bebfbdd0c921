//! An open QCOW2 image: validated facts, and the walk from guest to host offsets.

mod extents;
pub(crate) mod layers;
pub mod layout;
mod open;
pub mod refcounts;
pub mod writer;

pub use extents::{Extent, Place};
pub use open::SnapshotName;
pub(crate) use open::read_header;

use std::sync::Arc;

use crate::format::header::Header;
use crate::storage::Storage;

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
}

impl Qcow2 {
    /// The validated header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Virtual size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file.
    #[must_use]
    pub fn storage(&self) -> &dyn Storage {
        &*self.storage
    }
}
