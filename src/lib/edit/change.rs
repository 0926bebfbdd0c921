//! A change of an image: the value that is applied.

use std::collections::HashMap;

use crate::dedup::reading::FirstReading;
use crate::edit::allocate::Allocator;
use crate::edit::members::NewMember;
use crate::error::Result;
use crate::format::header::incompatible;
use crate::format::table::{L2Entry, l1_target};
use crate::inplace::scan::Key;
use crate::pool::clusters;
use crate::sort::bits::{Bits, Ranked};
use crate::sort::sequence::{Sequence, Sorted, Sorter, Spill};
use crate::storage::{Storage, read_exact};
use crate::survey::Ground;
use crate::units::{HostCluster, HostOffset, to_usize};

/// The block of most file systems, in bytes.
const BLOCK: u64 = 4096;

/// A change of an image.
pub(crate) struct Change {
    pub(crate) ground: Ground,
    /// Duplicate and keeper, both units; sorted by duplicate.
    pub(crate) links: Sorted,
    pub(crate) duplicates: Ranked,
    /// Units that hold nothing but zeros.
    pub(crate) zeros: Bits,
    /// Whether entries with the zero flag lose the place that they keep.
    pub(crate) frees_kept: bool,
    /// What enters the pool: [`NewMember`] words in unit order.
    pub(crate) joining: Sequence,
    /// What was read of those before, by which key, if they were.
    pub(crate) first: Option<(FirstReading, Key)>,
    /// All members that the pool will have.
    pub(crate) members_after: Bits,
    /// Whether the pool goes.
    pub(crate) drops_pool: bool,
    /// Whether an image of version 2 becomes version 3.
    pub(crate) may_upgrade: bool,
    /// How many duplicates are redirected together.
    pub(crate) batch: usize,
    /// New content of the disk.
    pub(crate) writes: Option<Writes>,
}

/// New content of the disk: its clusters have their places, and nothing leads to them yet.
pub(crate) struct Writes {
    /// Guest clusters (high 64 bits) and their new L2 entries, ascending.
    pub(crate) entries: Sorted,
    /// What the clusters behind those entries gain beside the one reference of a new cluster: unit (high 64 bits) and number.
    pub(crate) gains: Sequence,
    /// L2 tables that are written to a new place, because there is none yet or a snapshot uses it: L1 index and place, ascending.
    pub(crate) tables: Vec<(u64, HostCluster)>,
    /// Where the places come from; more are taken when the change is applied.
    pub(crate) free: Option<Allocator>,
}

impl Change {
    /// A change of nothing.
    pub(crate) fn none(ground: Ground, spill: &Spill) -> Result<Self> {
        Ok(Self {
            links: Sorter::new(spill).finish()?,
            duplicates: Bits::new(0).ranked(),
            zeros: Bits::new(0),
            frees_kept: false,
            joining: Sequence::new(spill),
            first: None,
            members_after: Bits::new(ground.units.limit()),
            drops_pool: false,
            may_upgrade: false,
            batch: spill.words() * 2,
            writes: None,
            ground,
        })
    }

    /// Whether nothing will lead to `unit` any more.
    pub(crate) fn is_gone(&self, unit: u64) -> bool {
        self.duplicates.bits().contains(unit) || self.zeros.contains(unit)
    }

    /// What enters the pool, in unit order.
    pub(crate) fn joining(&self) -> impl Iterator<Item = Result<NewMember>> + '_ {
        self.joining.iter().map(|word| word.map(NewMember::decode))
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        let inspection = &self.ground.inspection;
        let dirty = inspection.header.incompatible & incompatible::DIRTY != 0;
        !self.changes_content()
            && self.writes.is_none()
            && !self.changes_pool()
            && inspection.report.leaks == 0
            && !dirty
    }

    /// Whether L2 entries change.
    pub(crate) fn changes_content(&self) -> bool {
        !self.links.is_empty() || self.zeros.len() > 0 || self.frees_kept && self.ground.units.kept_by_zeros.len() > 0
    }

    /// Whether the pool is written anew, or goes.
    pub(crate) fn changes_pool(&self) -> bool {
        let has_pool = self.ground.pool_index.is_some();
        !self.joining.is_empty()
            || has_pool && (self.drops_pool || !self.ground.has_records() || !self.ground.is_ascending)
            || self.ground.members.bits().len() != self.members_after.len()
    }

    /// Whether the block of the file system in which `cluster` lies holds nothing but clusters of `gone`.
    pub(crate) fn frees_block(&self, cluster: u64, gone: &Bits) -> bool {
        let per_block = (BLOCK >> self.ground.inspection.header.cluster_bits.bits()).max(1);
        let first = cluster - cluster % per_block;
        (first..first + per_block).all(|cluster| gone.contains(cluster))
    }

    /// The clusters that the pool takes for itself before and after; 0 and 0 where it stays as it is.
    pub(crate) fn pool_clusters(&self) -> (u64, u64) {
        if !self.changes_pool() {
            return (0, 0);
        }
        let Ground { inspection, pool_index, members, .. } = &self.ground;
        let bits = inspection.header.cluster_bits;
        let old = pool_index.and_then(|index| inspection.snapshots.get(index));
        let before = old.map_or(0, |pool| clusters(members.bits().len(), bits, pool.l1_entries));
        (before, if self.drops_pool { 0 } else { clusters(self.members_after.len(), bits, 0) })
    }

    /// The clusters that the pool has for itself now.
    pub(crate) fn old_pool(&self, storage: &dyn Storage) -> Result<Vec<u64>> {
        let Ground { inspection, pool_index, members, .. } = &self.ground;
        let bits = inspection.header.cluster_bits;
        let Some(pool) = pool_index.and_then(|index| inspection.snapshots.get(index)) else { return Ok(Vec::new()) };
        let cluster = |host: HostOffset| host.0 >> bits.bits();
        let length = u64::from(pool.l1_entries) * 8;
        let mut own: Vec<u64> = (cluster(pool.l1_offset)..cluster(pool.l1_offset) + bits.clusters(length)).collect();
        let mut l1 = vec![0; to_usize(length)];
        read_exact(storage, &mut l1, pool.l1_offset.0, "L1 table of the pool")?;
        let member_tables = members.bits().len().div_ceil(bits.entries());
        let mut table = vec![0; bits.len()];
        for (word, index) in l1.as_chunks().0.iter().zip(0u64..) {
            let Some(host) = l1_target(u64::from_be_bytes(*word)) else { continue };
            own.push(cluster(host));
            if index >= member_tables {
                read_exact(storage, &mut table, host.0, "L2 table of the pool")?;
                let entries =
                    table.as_chunks().0.iter().map(|word| L2Entry::decode(u64::from_be_bytes(*word), bits, true));
                own.extend(entries.filter_map(|entry| match entry {
                    L2Entry::Data { host, .. } => Some(cluster(host)),
                    _ => None,
                }));
            }
        }
        Ok(own)
    }

    /// Whether the image will get version 3: a snapshot, and the pool is one, blocks the resizing of version 2 images.
    pub(crate) fn upgrades(&self) -> bool {
        self.may_upgrade && self.ground.inspection.header.version < 3 && !self.is_empty()
    }

    /// Clusters of the file with data that nothing will use any more.
    pub(crate) fn gone_clusters(&self) -> Bits {
        let Ground { units, members, inspection, .. } = &self.ground;
        let dropped = |unit: u64| members.bits().contains(unit) && !self.members_after.contains(unit);
        // Entries with the zero flag may hold on to their place.
        let kept = |unit: u64| !self.frees_kept && units.kept_by_zeros.contains(unit);
        let goes = |&unit: &u64| self.is_gone(unit) || units.users(unit) == 0 && dropped(unit) && !kept(unit);
        let mut gone = Bits::new(units.plain().end);
        units.plain().filter(goes).for_each(|unit| gone.insert(unit));
        if self.frees_kept {
            let unused = |&unit: &u64| units.users(unit) == 0 && !members.bits().contains(unit);
            units.kept_by_zeros.iter().filter(unused).for_each(|unit| gone.insert(unit));
        }
        // Compressed neighbours share host clusters: one is free when the last of them goes.
        let mut left = HashMap::new();
        for unit in units.compressed().filter(goes) {
            let references = units.users(unit) + u64::from(members.bits().contains(unit));
            for host in units.hosts(unit) {
                let left = left.entry(host).or_insert_with(|| inspection.counts.get(host));
                *left = left.saturating_sub(references);
                if *left == 0 && references > 0 {
                    gone.insert(host);
                }
            }
        }
        gone
    }
}
