//! What a conversion tells when it is done.

use serde::Serialize;

use super::job::Written;
use super::options::{ConvertOptions, Sharing};
use super::size::SizeChoice;
use crate::disk::Disk;
use crate::disk::history::History;
use crate::units::{ClusterBits, percent};

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

impl ConvertReport {
    /// Of `disk`, which was `written` so; the output occupies `allocated_bytes` and has its cluster size for the `reason` given. The time
    /// is filled in by whoever knows it.
    pub(super) fn new(
        disk: &Disk,
        options: &ConvertOptions,
        written: Written,
        reason: &'static str,
        allocated_bytes: u64,
    ) -> Self {
        let Written { plan, bits, first: _, seen, layout, compressed_clusters, compressed_bytes } = written;
        let duplicates = plan.data_clusters - plan.stored;
        let content = disk.history().map_or(disk.size(), History::content_size);
        let size = disk.history().map_or(disk.size(), History::disk_size);
        let data_bytes = match disk.history() {
            None => plan.data_bytes(bits, disk.size()),
            Some(_) => (plan.data_clusters << bits.bits()).min(content),
        };
        Self {
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
            cluster_size_reason: reason,
            cluster_sizes: seen.choices,
            l2_cache_size_bytes: l2_cache_size(size, bits),
            seconds: 0.0,
        }
    }
}

/// QEMU 10's default `l2-cache-size` is at most 32 MiB: 16 GiB of disk at 4 KiB clusters, 256 GiB at 64 KiB.
const DEFAULT_L2_CACHE: u64 = 32 << 20;

/// The size of all L2 tables of a disk of `size` bytes, where that is more than QEMU caches by default.
fn l2_cache_size(size: u64, bits: ClusterBits) -> Option<u64> {
    let tables = bits.clusters(size).div_ceil(bits.entries()) * bits.bytes();
    (tables > DEFAULT_L2_CACHE).then_some(tables)
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
