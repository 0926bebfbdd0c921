//! How long the file would be at each cluster size, counted cluster by cluster.

use super::contents::{percent, times};
use super::disk::{Disk, in_a_row};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// The largest L1 table that QEMU accepts, in entries.
const L1_ENTRIES: u64 = (32 << 20) / 8;

/// One row for `asked`, if it is below 4 KiB, and for each cluster size from 4 KiB to 2 MiB, as far as QEMU can map the disks.
pub(super) fn curve(disks: &[&Disk], asked: u64) -> Value {
    let sizes = (9..=21).map(|bits| 1 << bits).filter(|size| *size >= 4096 || *size == asked);
    sizes.filter_map(|size| row(disks, size)).collect()
}

fn row(disks: &[&Disk], size: u64) -> Option<Value> {
    let (clusters, disk_size) = in_a_row(disks, size);
    let total = disk_size.div_ceil(size);
    let entries = size / 8;
    if total.div_ceil(entries) > L1_ENTRIES {
        return None;
    }
    let times = times(&[&clusters]);
    let (data, distinct) = (clusters.len() as u64, times.len() as u64);
    let members = times.values().filter(|times| **times > 1).count() as u64;
    let tables = clusters.keys().map(|cluster| cluster / entries).collect::<BTreeSet<u64>>().len() as u64;
    // Header, L1 table, L2 tables.
    let common = 1 + (total.div_ceil(entries) * 8).div_ceil(size) + tables;
    let file = with_refcounts(common + pool(members, size) + distinct, size) * size;
    let plain = with_refcounts(common + data, size) * size;
    Some(json!({
        "cluster_size_bytes": size,
        "data_clusters": data,
        "data_bytes": data * size,
        "distinct_clusters": distinct,
        "distinct_bytes": distinct * size,
        "duplicate_percent": percent(data - distinct, data),
        "metadata_bytes": file - distinct * size,
        "file_length_bytes": file,
        "plain_length_bytes": plain,
        "saved_bytes": plain.cast_signed() - file.cast_signed(),
    }))
}

/// Clusters of the pool, with the snapshot table, for which one cluster is enough.
fn pool(members: u64, size: u64) -> u64 {
    let directory = (128 + 40 * members).div_ceil(size);
    let tables = members.div_ceil(size / 8) + directory.div_ceil(size / 8);
    1 + (tables * 8).div_ceil(size) + tables + directory
}

/// So many clusters with the refcount table and blocks that count them and themselves, 4 bytes for each.
fn with_refcounts(clusters: u64, size: u64) -> u64 {
    let mut all = clusters;
    loop {
        let blocks = (all * 4).div_ceil(size);
        let needed = clusters + blocks + (blocks * 8).div_ceil(size);
        if needed == all {
            return all;
        }
        all = needed;
    }
}
