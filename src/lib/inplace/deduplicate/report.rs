//! What a deduplication is told, and what it tells.

use serde::Serialize;

use crate::pool::Pin;
use crate::units::HostOffset;

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

/// The figures of a plan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    /// Distinct data clusters that the disk or a snapshot uses.
    pub scanned: u64,
    /// Those that were read.
    pub read: u64,
    /// Those that hold nothing but zeros.
    pub zero: u64,
    /// Those that another one replaces.
    pub duplicate: u64,
    /// Those that replace others and were not in the pool before.
    pub newly_shared: u64,
    /// Members of the pool that the disk or a snapshot used before.
    pub already_shared: u64,
    /// Clusters whose refcount is too high.
    pub leaked: u64,
    /// Clusters of the file that nothing will use any more, the old pool's own left out.
    pub freed: u64,
    /// Members that the pool will have.
    pub pool_members: u64,
}

/// A duplicate as a plan shows it. Offsets are in bytes; that of a compressed cluster is where its compressed bytes begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Share {
    /// The cluster that will not be used any more.
    pub duplicate: HostOffset,
    /// The one that replaces it.
    pub keeper: HostOffset,
    /// How many L2 entries change for that, as QEMU counts them.
    pub references: u64,
}
