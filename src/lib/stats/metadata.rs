//! What the metadata of a QCOW2 image tells, without its data.

use std::collections::BTreeMap;

use super::report::{DiskClusters, FileClusters, PoolStats, Qcow2Stats, RefcountStats, Sharing, Users};
use super::snapshots;
use crate::check::counts::Tally;
use crate::error::Result;
use crate::format::header::Header;
use crate::format::l2::{self, Slot};
use crate::format::table::{L2Entry, Subclusters};
use crate::pool;
use crate::progress::Stage;
use crate::sort::bits::Bits;
use crate::sort::sequence::Spill;
use crate::storage::Storage;
use crate::survey::tables::{L2Table, L2Tables};
use crate::survey::{Ground, guests, sound};
use crate::units::percent;
use crate::work::Work;

/// A surveyed image.
pub(super) struct Metadata {
    pub(super) ground: Ground,
    pub(super) disk: DiskClusters,
    pub(super) stats: Qcow2Stats,
    /// How many clusters of the disk use each unit.
    pub(super) users: Tally,
    /// Clusters that are taken and that nothing refers to.
    pub(super) lost: Vec<u64>,
}

/// How an entry has its guest cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapped {
    /// In a cluster of the file.
    Stored(L2Entry),
    /// As zeros by the zero flag.
    Zero,
    /// Not at all.
    Unallocated,
}

/// How an L2 entry has its guest cluster. With subclusters a zero flag is one that all of them have.
pub(super) fn mapped(slot: Slot, header: &Header) -> Mapped {
    let entry = slot.entry(header);
    let all_zero = header.extended_l2() && Subclusters(slot.subclusters).reads_as_zeros();
    match entry {
        L2Entry::Compressed(_) => Mapped::Stored(entry),
        L2Entry::Zero { .. } => Mapped::Zero,
        _ if all_zero => Mapped::Zero,
        L2Entry::Data { .. } => Mapped::Stored(entry),
        L2Entry::Unallocated => Mapped::Unallocated,
    }
}

/// Checks the image in `storage` and counts what its metadata tells.
pub(super) fn survey(storage: &dyn Storage, phase: Stage, spill: &Spill, work: &Work) -> Result<Metadata> {
    let mut lost = Vec::new();
    let inspection = sound(storage, phase, work, |leak| lost.extend(leak.lost_cluster()))?;
    let ground = Ground::new(storage, inspection)?;
    let (disk, users) = disk_clusters(&ground, storage)?;
    let stats = Qcow2Stats {
        file: file_clusters(&ground),
        sharing: sharing(&ground, &users, disk.allocated_clusters),
        dedup: None,
        pool: pool_stats(&ground, storage, spill, work)?,
        refcounts: refcounts(&ground),
        snapshots: snapshots::exclusive(&ground, storage)?,
    };
    let mut metadata = Metadata { ground, disk, stats, users, lost };
    metadata.subtract_pool();
    Ok(metadata)
}

impl Metadata {
    fn subtract_pool(&mut self) {
        let sharing = &mut self.stats.sharing;
        let pool = i64::try_from(self.stats.file.pool_metadata_bytes).unwrap_or(i64::MAX);
        sharing.net_saved_bytes = i64::try_from(sharing.saved_bytes).unwrap_or(i64::MAX) - pool;
    }
}

/// How the disk's clusters are mapped, and how many of them use each unit.
fn disk_clusters(ground: &Ground, storage: &dyn Storage) -> Result<(DiskClusters, Tally)> {
    let Ground { inspection, units, .. } = ground;
    let header = &inspection.header;
    let total = header.cluster_bits.clusters(header.size);
    let users = Tally::new(units.limit(), u64::MAX)?;
    let mut disk = DiskClusters {
        cluster_size_bytes: header.cluster_bits.bytes(),
        total_clusters: total,
        ..DiskClusters::default()
    };
    // What lies behind the disk's end, no guest reads.
    let times = |table: &L2Table<'_>, index: u64| table.guests(index).filter(|guest| guest.0 < total).count() as u64;
    L2Tables::active(storage, header, &inspection.tables).visit(
        |table, content| {
            let (mut stored, mut compressed, mut zero) = (0, 0, 0);
            for slot in l2::slots(header, content) {
                let index = slot.index;
                match mapped(slot, header) {
                    Mapped::Unallocated => {}
                    Mapped::Zero => zero += times(table, index),
                    Mapped::Stored(entry) => {
                        let times = times(table, index);
                        stored += times;
                        compressed += if matches!(entry, L2Entry::Compressed(_)) { times } else { 0 };
                        if let Some(unit) = units.of(entry).filter(|_| times > 0) {
                            users.add(unit, times);
                        }
                    }
                }
            }
            Ok((stored, compressed, zero))
        },
        |(stored, compressed, zero)| {
            disk.allocated_clusters += stored;
            disk.compressed_clusters += compressed;
            disk.zero_flagged_clusters += zero;
            Ok(())
        },
    )?;
    disk.unallocated_clusters = total.saturating_sub(disk.allocated_clusters + disk.zero_flagged_clusters);
    Ok((disk, users))
}

fn file_clusters(ground: &Ground) -> FileClusters {
    let Ground { inspection, units, members, pool_index, .. } = ground;
    let bits = inspection.header.cluster_bits;
    let counts = &inspection.counts;
    let mut data = Bits::new(counts.clusters() + 1);
    for unit in (0..units.limit()).filter(|&unit| units.users(unit) > 0 || members.bits().contains(unit)) {
        units.hosts(unit).for_each(|host| data.insert(host));
    }
    units.kept_by_zeros.iter().for_each(|host| data.insert(host));
    let used = (0..counts.clusters()).filter(|&cluster| counts.get(cluster) > 0).count() as u64;
    let metadata = used.saturating_sub(data.len());
    let pool = pool_index.and_then(|index| inspection.snapshots.get(index));
    let own = pool.map_or(0, |pool| pool::clusters(members.bits().len(), bits, pool.l1_entries));
    FileClusters {
        cluster_size_bytes: bits.bytes(),
        used_clusters: used,
        data_clusters: data.len(),
        metadata_clusters: metadata,
        metadata_bytes: metadata << bits.bits(),
        pool_metadata_bytes: own << bits.bits(),
        leaked_clusters: inspection.report.leaks,
    }
}

fn sharing(ground: &Ground, users: &Tally, allocated: u64) -> Sharing {
    let mut by_users: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
    let (mut stored, mut shared) = (0, 0);
    for count in (0..ground.units.limit()).map(|unit| users.get(unit)).filter(|&count| count > 0) {
        stored += 1;
        shared += u64::from(count > 1);
        let (units, references) = by_users.entry(count.ilog2()).or_default();
        *units += 1;
        *references += count;
    }
    let saved = allocated.saturating_sub(stored);
    Sharing {
        stored_clusters: stored,
        shared_clusters: shared,
        saved_clusters: saved,
        saved_bytes: saved << ground.inspection.header.cluster_bits.bits(),
        saved_percent: percent(saved, allocated),
        net_saved_bytes: 0,
        histogram: by_powers(&by_users, |(users_from, users_to), (stored_clusters, references_clusters)| Users {
            users_from,
            users_to,
            stored_clusters,
            references_clusters,
        }),
    }
}

/// Rows for 1, 2 to 3, 4 to 7 and so on, up to the last one that is not empty.
pub(super) fn by_powers<R>(rows: &BTreeMap<u32, (u64, u64)>, row: impl Fn((u64, u64), (u64, u64)) -> R) -> Vec<R> {
    let end = rows.last_key_value().map_or(0, |(power, _)| power + 1);
    let range = |power: u32| (1 << power, (1_u64 << power) - 1 + (1 << power));
    (0..end).map(|power| row(range(power), rows.get(&power).copied().unwrap_or_default())).collect()
}

fn pool_stats(ground: &Ground, storage: &dyn Storage, spill: &Spill, work: &Work) -> Result<Option<PoolStats>> {
    if ground.pool_index.is_none() {
        return Ok(None);
    }
    let members = ground.members.bits();
    let used = ground.used_members();
    // Entries of several snapshots may lead to it from one place of the disk.
    let candidates = members.filtered(|&unit| ground.units.users(unit) > 1);
    let mut single = used - candidates.len();
    guests(ground, storage, candidates, spill, work, |_, guests| {
        single += u64::from(guests.start() == guests.end());
        Ok(())
    })?;
    Ok(Some(PoolStats {
        members: members.len(),
        garbage_members: members.len() - used,
        single_user_members: single,
        directory_valid: ground.has_records(),
    }))
}

fn refcounts(ground: &Ground) -> RefcountStats {
    let Ground { inspection, units, members, .. } = ground;
    let (counts, width) = (&inspection.counts, inspection.header.refcount_bits);
    let data = (0..counts.clusters()).filter(|&cluster| counts.is_data(cluster));
    let highest = data.map(|cluster| counts.get(cluster)).max().unwrap_or(0);
    let limit = width.sharer_limit();
    let is_full = |unit: &u64| {
        let references = units.hosts(*unit).map(|host| counts.get(host)).max().unwrap_or(0);
        ground.record(*unit).is_some_and(|record| record.retired)
            || limit.is_none_or(|limit| references.saturating_sub(1) >= limit)
    };
    RefcountStats {
        refcount_bits: width.bits(),
        max_references: width.max(),
        highest_references: highest,
        head_room_references: width.max() - highest,
        sharer_limit: limit,
        full_members: members.bits().iter().filter(is_full).count() as u64,
    }
}
