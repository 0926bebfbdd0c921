//! What is written before anything refers to it, and where. Nothing is written while places are chosen.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::edit::allocate::{Allocator, Growth};
use crate::edit::change::Change;
use crate::edit::pool_writer::Places;
use crate::error::{Error, ErrorKind, OrInternal, Result};
use crate::format::snapshot::{MAX_TABLE_BYTES, Snapshot};
use crate::image::refcounts::Refcounts;
use crate::storage::Storage;
use crate::storage::device::ensure_capacity;
use crate::units::{ClusterBits, HostCluster};

/// What is written before anything refers to it.
pub(crate) struct Prepared {
    pub(crate) growth: Growth,
    pub(crate) pool: Option<Places>,
    /// The new snapshot table, if there is one.
    pub(crate) snapshots: Option<(HostCluster, Vec<u8>, u32)>,
}

impl Prepared {
    /// What is written to the places that were chosen, in bytes of the file: of the pool's last clusters and of the snapshot table's
    /// only what they hold.
    pub(crate) fn writes(&self, bits: ClusterBits) -> Vec<Range<u64>> {
        let mut writes = self.pool.as_ref().map_or_else(Vec::new, |pool| pool.writes(bits));
        if let Some((place, bytes, _)) = &self.snapshots {
            writes.extend((0..bytes.len() as u64).step_by(bits.len()).map(|at| {
                let start = place.offset(bits).0 + at;
                start..start + (bytes.len() as u64 - at).min(bits.bytes())
            }));
        }
        let own: BTreeSet<u64> = writes.iter().map(|range| range.start >> bits.bits()).collect();
        let others = self.growth.taken.iter().filter(|cluster| !own.contains(&cluster.0));
        let others: Vec<Range<u64>> =
            others.map(|cluster| cluster.offset(bits).0).map(|at| at..at + bits.bytes()).collect();
        writes.extend(others);
        writes
    }
}

/// Chooses places for what is new. Nothing is written.
pub(crate) fn prepare(change: &Change, begun: Option<Allocator>, storage: &dyn Storage) -> Result<Prepared> {
    let inspection = &change.ground.inspection;
    let header = &inspection.header;
    let bits = header.cluster_bits;
    let refcounts = Refcounts::load(storage, header)?;
    let mut free = match begun {
        Some(free) => free,
        None => Allocator::new(&refcounts, header, inspection.file_len, &inspection.counts)?,
    };
    let members = change.members().map(|members| members.after.len());
    let has_pool = |members: &u64| change.ground.pool_index.is_some() || *members > 0;
    let pool = match members.filter(|members| has_pool(members) && change.changes_pool()) {
        Some(members) => Some(Places::new(members, bits, &mut free)?),
        None => None,
    };
    let incomplete = change.upgrades() && inspection.snapshots.iter().any(|snapshot| snapshot.disk_size.is_none());
    let mut snapshots = None;
    let drops = change.drops_pool();
    let last = inspection.snapshots.len().checked_sub(1);
    if drops && !incomplete && change.ground.pool_index == last {
        // The last entry goes by being counted no more, which needs no room.
        let place = HostCluster(header.snapshots_offset.0 >> bits.bits());
        let count = header.snapshots.checked_sub(1).or_internal("the pool is no snapshot")?;
        snapshots = Some((place, Vec::new(), count));
    } else if pool.is_some() || incomplete || drops {
        let table = snapshot_table(change, pool.as_ref())?;
        let bytes: Vec<u8> = table.iter().flat_map(Snapshot::encode).collect();
        if bytes.len() as u64 > MAX_TABLE_BYTES {
            let message = "the snapshot table would be larger than the 64 MiB that QEMU accepts";
            return Err(Error::new(ErrorKind::Limit, message));
        }
        let place = free.run(bits.clusters(bytes.len() as u64));
        let count = u32::try_from(table.len()).ok().or_internal("more snapshots than fit into a table")?;
        snapshots = Some((place, bytes, count));
    }
    let growth = free.finish(&refcounts)?;
    ensure_capacity(storage, growth.file_len)?;
    Ok(Prepared { growth, pool, snapshots })
}

/// The snapshots, with a new pool in the place of the old one or behind the others, or without the old one.
fn snapshot_table(change: &Change, pool: Option<&Places>) -> Result<Vec<Snapshot>> {
    let header = &change.ground.inspection.header;
    let mut table = change.ground.inspection.snapshots.clone();
    for snapshot in &mut table {
        // Version 2 may leave it out, version 3 may not: QEMU takes the disk's.
        snapshot.disk_size.get_or_insert(header.size);
    }
    if let Some(index) = change.ground.pool_index.filter(|_| change.drops_pool()) {
        table.remove(index);
    }
    let Some(pool) = pool else { return Ok(table) };
    let mut entry = pool.snapshot(crate::pool::next_id(&table), header.cluster_bits)?;
    match change.ground.pool_index.and_then(|index| table.get_mut(index)) {
        Some(old) => {
            entry.id.clone_from(&old.id);
            *old = entry;
        }
        None => table.push(entry),
    }
    Ok(table)
}
