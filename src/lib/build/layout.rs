//! Where everything lies in an image that is written from nothing.
//!
//! ```text
//!  header | data | refcount table | refcount blocks | L1 | snapshots' L1 | L2 tables | pool L1 | pool L2 tables | snapshot table | directory
//! ```
//!
//! Data comes in guest order. How much metadata there is, is known when all data has been seen, and by then data is written: metadata
//! follows it in one piece.

use std::ops::Range;

use crate::error::{Advice, Error, ErrorKind, Result};
use crate::format::header::{MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
use crate::format::refcount::RefcountBits;
use crate::format::snapshot::MAX_TABLE_BYTES;
use crate::pool::directory::DirectoryHeader;
use crate::units::{ClusterBits, HostCluster, HostOffset, StoredCluster};

/// What an image is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parts {
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Refcount width.
    pub refcount_bits: RefcountBits,
    /// Virtual size in bytes.
    pub size: u64,
    /// L2 tables of the active disk and of the snapshots.
    pub l2_tables: u64,
    /// Snapshots, the pool not counted.
    pub snapshots: u32,
    /// Clusters of their L1 tables.
    pub snapshot_l1: u64,
    /// Bytes of the snapshot table; 0 for one cluster where there is a pool alone.
    pub snapshot_table: u64,
    /// Pool members; `None` for an image without a pool.
    pub members: Option<u64>,
    /// Stored data clusters.
    pub data: u64,
}

impl Parts {
    /// An image of `size` bytes with nothing in it, and without a pool.
    #[must_use]
    pub(crate) fn empty(cluster_bits: ClusterBits, refcount_bits: RefcountBits, size: u64) -> Self {
        Self {
            cluster_bits,
            refcount_bits,
            size,
            l2_tables: 0,
            snapshots: 0,
            snapshot_l1: 0,
            snapshot_table: 0,
            members: None,
            data: 0,
        }
    }
}

/// How often a stored cluster may be referenced by guest clusters where counts of this width count the pool as well.
///
/// # Errors
/// Fails where they are too narrow for any sharing.
pub(crate) fn sharer_limit(bits: RefcountBits) -> Result<u64> {
    bits.sharer_limit().ok_or_else(|| too_narrow(bits))
}

fn too_narrow(bits: RefcountBits) -> Error {
    Error::unsupported(format!(
        "refcount_bits={} cannot hold the 4 references that sharing with a pool needs",
        bits.bits()
    ))
    .advise(Advice::AskRefcounts { bits: 4, or_more: true })
}

/// A run of host clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    /// The first cluster.
    pub start: HostCluster,
    /// How many.
    pub clusters: u64,
}

impl Region {
    fn after(before: Self, clusters: u64) -> Self {
        Self { start: before.end(), clusters }
    }

    /// The cluster after the last one.
    #[must_use]
    pub(crate) fn end(self) -> HostCluster {
        HostCluster(self.start.0 + self.clusters)
    }
}

/// The places of an image's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// What is laid out.
    pub parts: Parts,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// L1 entries of the pool that hold members.
    pub member_l1_entries: u32,
    /// All L1 entries of the pool.
    pub pool_l1_entries: u32,
    /// The refcount table.
    pub refcount_table: Region,
    /// The refcount blocks.
    pub refcount_blocks: Region,
    /// The active L1 table.
    pub l1: Region,
    /// The snapshots' L1 tables.
    pub snapshot_l1: Region,
    /// The L2 tables of the active disk and of the snapshots.
    pub l2: Region,
    /// The pool's L1 table.
    pub pool_l1: Region,
    /// The pool's L2 tables.
    pub pool_l2: Region,
    /// The snapshot table.
    pub snapshot_table: Region,
    /// The pool's directory.
    pub directory: Region,
    /// The data clusters.
    pub data: Region,
    /// The cluster after the last one.
    pub end: HostCluster,
}

impl Layout {
    /// The layout of `parts`.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] where a table would be larger than QEMU accepts.
    pub(crate) fn new(parts: Parts) -> Result<Self> {
        let Parts { cluster_bits, refcount_bits, .. } = parts;
        let entries = cluster_bits.entries();
        let too_large = || {
            Error::new(
                ErrorKind::Limit,
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            )
        };
        let l1_entries = |count: u64| match u32::try_from(count) {
            Ok(count) if u64::from(count) * 8 <= MAX_L1_BYTES => Ok(count),
            _ => Err(too_large()),
        };
        let active = l1_entries(cluster_bits.clusters(parts.size).div_ceil(entries))?;
        let directory = parts.members.map_or(0, DirectoryHeader::directory_bytes);
        let directory_clusters = cluster_bits.clusters(directory);
        let snapshot_clusters = u64::from(parts.members.is_some()).max(cluster_bits.clusters(parts.snapshot_table));
        if parts.snapshot_table > MAX_TABLE_BYTES {
            return Err(Error::new(ErrorKind::Limit, "the snapshot table would be larger than QEMU accepts"));
        }
        let member_tables = parts.members.unwrap_or(0).div_ceil(entries);
        let directory_tables = directory_clusters.div_ceil(entries);
        let pool = l1_entries(member_tables + directory_tables)?;
        // A disk of size 0 has an L1 table of 0 entries, which takes no cluster: QEMU counts it so.
        let l1_clusters = cluster_bits.clusters(u64::from(active) * 8);
        let others = 1
            + l1_clusters
            + parts.snapshot_l1
            + parts.l2_tables
            + cluster_bits.clusters(u64::from(pool) * 8)
            + member_tables
            + directory_tables
            + snapshot_clusters
            + directory_clusters
            + parts.data;
        let (table, blocks) = refcount_bits.structure(cluster_bits, others);
        if table * cluster_bits.bytes() > MAX_REFCOUNT_TABLE_BYTES {
            return Err(too_large());
        }

        let header = Region { start: HostCluster(0), clusters: 1 };
        let data = Region::after(header, parts.data);
        let refcount_table = Region::after(data, table);
        let refcount_blocks = Region::after(refcount_table, blocks);
        let l1 = Region::after(refcount_blocks, l1_clusters);
        let snapshot_l1 = Region::after(l1, parts.snapshot_l1);
        let l2 = Region::after(snapshot_l1, parts.l2_tables);
        let pool_l1 = Region::after(l2, cluster_bits.clusters(u64::from(pool) * 8));
        let pool_l2 = Region::after(pool_l1, member_tables + directory_tables);
        let snapshot_table = Region::after(pool_l2, snapshot_clusters);
        let directory = Region::after(snapshot_table, directory_clusters);
        Ok(Self {
            parts,
            l1_entries: active,
            member_l1_entries: l1_entries(member_tables)?,
            pool_l1_entries: pool,
            refcount_table,
            refcount_blocks,
            l1,
            snapshot_l1,
            l2,
            pool_l1,
            pool_l2,
            snapshot_table,
            directory,
            data,
            end: directory.end(),
        })
    }

    /// Bytes of the file.
    #[must_use]
    pub(crate) fn file_len(&self) -> u64 {
        self.end.offset(self.parts.cluster_bits).0
    }

    /// Where a region begins.
    #[must_use]
    pub(crate) fn offset(&self, region: Region) -> HostOffset {
        region.start.offset(self.parts.cluster_bits)
    }

    /// The bytes of a region.
    #[must_use]
    pub(crate) fn bytes(&self, region: Region) -> Range<u64> {
        self.offset(region).0..region.end().offset(self.parts.cluster_bits).0
    }

    /// The host cluster of a stored cluster.
    #[must_use]
    pub(crate) fn stored(&self, number: StoredCluster) -> HostCluster {
        HostCluster(self.data.start.0 + number.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_beyond_the_l1_limit_is_refused() {
        let parts = Parts::empty(ClusterBits::GRAIN, RefcountBits::DEFAULT, 8 << 40);
        let parts = Parts { members: Some(0), ..parts };
        assert!(Layout::new(parts).is_ok());
        assert_eq!(Layout::new(Parts { size: 16 << 40, ..parts }).unwrap_err().kind(), ErrorKind::Limit);
    }
}
