//! What deleting a snapshot would give back.

use std::sync::atomic::{AtomicU32, Ordering};

use super::report::SnapshotStats;
use crate::error::Result;
use crate::format::l2;
use crate::format::snapshot::Snapshot;
use crate::format::table::L2Entry;
use crate::storage::Storage;
use crate::storage::buffer::zeroed;
use crate::survey::Ground;
use crate::survey::tables::L2Tables;
use crate::units::to_usize;

/// More than one layer refers to the cluster.
const MANY: u32 = u32::MAX;

/// Which layer refers to each cluster of a file: 0 for none, its number plus 1 for one.
struct Owners(Vec<AtomicU32>);

impl Owners {
    fn claim(&self, cluster: u64, layer: Option<u32>) {
        let new = layer.map_or(MANY, |layer| layer + 1);
        if let Some(owner) = usize::try_from(cluster).ok().and_then(|at| self.0.get(at)) {
            let both = |old| if old == 0 || old == new { new } else { MANY };
            let _ = owner.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some(both(old)));
        }
    }
}

/// The clusters that only one of the user's snapshots refers to, for each of them. The pool's references are not counted.
///
/// Every L2 table is looked at once, however many snapshots there are.
pub(super) fn exclusive(ground: &Ground, storage: &dyn Storage) -> Result<Vec<SnapshotStats>> {
    let Ground { inspection, units, pool_index, .. } = ground;
    let header = &inspection.header;
    let bits = header.cluster_bits;
    let snapshots = inspection.snapshots.iter().zip(0..).filter(|(_, index)| Some(*index) != *pool_index);
    let snapshots: Vec<_> = snapshots.collect();
    if snapshots.is_empty() {
        return Ok(Vec::new());
    }
    let limit = to_usize(units.plain().end);
    // Zeroed memory that nothing touches is not taken: a file may be much longer than what it holds.
    let owners = Owners(zeroed(limit)?);
    L2Tables::new(storage, header, &inspection.tables).visit(
        |table, content| {
            let layer = table.layer();
            owners.claim(table.host().0 >> bits.bits(), layer);
            for (_, entry) in l2::entries(header, content) {
                match entry {
                    L2Entry::Data { host, .. } | L2Entry::Zero { host: Some(host), .. } => {
                        owners.claim(host.0 >> bits.bits(), layer);
                    }
                    L2Entry::Compressed(extent) => {
                        let end = bits.clusters(extent.host.0 + extent.len());
                        (extent.host.0 >> bits.bits()..end).for_each(|host| owners.claim(host, layer));
                    }
                    L2Entry::Unallocated | L2Entry::Zero { host: None, .. } => {}
                }
            }
            Ok(())
        },
        |()| Ok(()),
    )?;
    let mut exclusive = vec![0u64; inspection.snapshots.len() + 2];
    let used = (0..inspection.counts.clusters()).filter(|&cluster| inspection.counts.get(cluster) > 0);
    for owner in used.filter_map(|cluster| owners.0.get(usize::try_from(cluster).ok()?)) {
        let owner = to_usize(owner.load(Ordering::Relaxed).into());
        if let Some(count) = exclusive.get_mut(owner) {
            *count += 1;
        }
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let stats = |&(snapshot, index): &(&Snapshot, usize)| {
        // Layer 0 is the disk, and no owner is number 0.
        let tables = exclusive.get(index + 2).copied().unwrap_or(0);
        let clusters = tables + bits.clusters(u64::from(snapshot.l1_entries) * 8);
        SnapshotStats {
            id: text(&snapshot.id),
            name: text(&snapshot.name),
            exclusive_clusters: clusters,
            exclusive_bytes: clusters << bits.bits(),
        }
    };
    Ok(snapshots.iter().map(stats).collect())
}
