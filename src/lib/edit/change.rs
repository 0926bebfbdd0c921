//! A change of an image: the value that is applied.

use std::collections::HashMap;

use crate::dedup::group::ByDuplicate;
use crate::dedup::reading::FirstReading;
use crate::edit::allocate::Allocator;
use crate::edit::key::Key;
use crate::edit::members::NewMember;
use crate::error::Result;
use crate::format::header::incompatible;
use crate::format::l2;
use crate::format::table::{L2Entry, l1_target};
use crate::pool::clusters;
use crate::sort::bits::{Bits, Ranked};
use crate::sort::record::record;
use crate::sort::sequence::{Sequence, Sorted, Spill};
use crate::storage::{BLOCK, Storage, read_exact};
use crate::survey::Ground;
use crate::units::{GuestCluster, HostCluster, HostOffset, to_usize};

/// A change of an image.
pub(crate) struct Change {
    pub(crate) ground: Ground,
    pub(crate) entries: Entries,
    pub(crate) pool: NewPool,
}

/// What becomes of the L2 entries of the disk and its snapshots.
pub(crate) enum Entries {
    /// They stay.
    Same,
    /// Those of duplicates lead to what is kept, those of zeros nowhere.
    Shared(Sharing),
    /// Some of the disk get new content.
    Overwritten(Writes),
}

/// Which L2 entries come to share, and which lead nowhere any more: those of zeros, and those with the zero flag that keep a place.
pub(crate) struct Sharing {
    /// Duplicate and keeper, both units.
    pub(crate) links: Sorted<ByDuplicate>,
    pub(crate) duplicates: Ranked,
    /// Units that hold nothing but zeros.
    pub(crate) zeros: Bits,
    /// How many duplicates are redirected together.
    pub(super) batch: usize,
}

/// New content of the disk: its clusters have their places, and nothing leads to them yet. Only [`Overwriting`] has any.
pub(crate) struct Writes {
    pub(super) entries: Sorted<NewEntry>,
    /// What the clusters behind those entries gain beside the one reference of a new cluster.
    pub(super) gains: Sequence<Gain>,
    /// L2 tables that are written to a new place, because there is none yet or a snapshot uses it: L1 index and place, ascending.
    pub(super) tables: Vec<(u64, HostCluster)>,
}

/// A guest cluster and its new L2 entry, by guest cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NewEntry {
    pub(crate) guest: GuestCluster,
    pub(crate) entry: u64,
}

record!(new_entry_words: NewEntry { guest: 64, entry: 64 });

/// How many references a unit gains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gain {
    pub(crate) unit: u64,
    pub(crate) references: u64,
}

record!(gain_words: Gain { unit: 64, references: 64 });

/// A change of the disk's content, and where the places of new clusters come from: more are taken when it is applied.
pub(crate) struct Overwriting {
    pub(super) change: Change,
    pub(super) free: Allocator,
}

/// What becomes of the pool.
pub(crate) enum NewPool {
    /// It goes.
    Dropped,
    /// It has these members.
    Of(Box<Members>),
}

/// The members of a pool that is to be.
pub(crate) struct Members {
    /// All of them.
    pub(crate) after: Bits,
    /// What enters the pool, in unit order.
    pub(crate) joining: Sequence<NewMember>,
    /// What was read of those before, by which key, if they were.
    pub(crate) first: Option<(FirstReading, Key)>,
}

impl NewPool {
    /// A pool with the members `after`, of which `joining` are new and were not read before.
    pub(crate) fn of(after: Bits, joining: Sequence<NewMember>) -> Self {
        Self::Of(Box::new(Members { after, joining, first: None }))
    }
}

impl Sharing {
    /// What `links`, sorted by duplicate, and `zeros` come to; all are units below `limit`.
    pub(crate) fn new(links: Sorted<ByDuplicate>, duplicates: Bits, zeros: Bits, spill: &Spill) -> Self {
        Self { links, duplicates: duplicates.ranked(), zeros, batch: spill.words() * 2 }
    }

    /// Whether nothing will lead to `unit` any more.
    pub(crate) fn is_gone(&self, unit: u64) -> bool {
        self.duplicates.bits().contains(unit) || self.zeros.contains(unit)
    }

    /// Whether there are any, in an image on this ground.
    fn is_empty(&self, ground: &Ground) -> bool {
        self.links.is_empty() && self.zeros.len() == 0 && ground.units.kept_by_zeros.len() == 0
    }
}

impl Overwriting {
    /// Guest clusters get new L2 entries: `entries`, `gains` and `tables` are as in [`Writes`], the places are from `free`.
    pub(crate) fn new(
        ground: Ground,
        members: Members,
        (entries, gains, tables): (Sorted<NewEntry>, Sequence<Gain>, Vec<(u64, HostCluster)>),
        free: Allocator,
    ) -> Self {
        let entries = Entries::Overwritten(Writes { entries, gains, tables });
        Self { change: Change { ground, entries, pool: NewPool::Of(Box::new(members)) }, free }
    }

    /// As [`Change::upgrades`].
    pub(crate) fn upgrades(&self) -> bool {
        self.change.upgrades()
    }
}

impl Change {
    /// A change of the pool alone.
    pub(crate) fn of_pool(ground: Ground, pool: NewPool) -> Self {
        Self { ground, entries: Entries::Same, pool }
    }

    /// What comes to share, if anything may.
    pub(crate) fn sharing(&self) -> Option<&Sharing> {
        match &self.entries {
            Entries::Shared(sharing) => Some(sharing),
            Entries::Same | Entries::Overwritten(_) => None,
        }
    }

    /// What comes to share, if anything does.
    pub(super) fn redirects(&self) -> Option<&Sharing> {
        self.sharing().filter(|sharing| !sharing.is_empty(&self.ground))
    }

    /// What is overwritten, if anything is.
    pub(super) fn writes(&self) -> Option<&Writes> {
        match &self.entries {
            Entries::Overwritten(writes) => Some(writes),
            Entries::Same | Entries::Shared(_) => None,
        }
    }

    /// The members that the pool will have, unless it goes.
    pub(crate) fn members(&self) -> Option<&Members> {
        match &self.pool {
            NewPool::Of(members) => Some(members.as_ref()),
            NewPool::Dropped => None,
        }
    }

    /// How many members the pool will have.
    pub(crate) fn members_after(&self) -> u64 {
        self.members().map_or(0, |members| members.after.len())
    }

    /// What enters the pool, in unit order.
    pub(super) fn joining(&self) -> impl Iterator<Item = Result<NewMember>> + '_ {
        self.members().into_iter().flat_map(|members| members.joining.iter())
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        let inspection = &self.ground.inspection;
        let dirty = inspection.header.incompatible & incompatible::DIRTY != 0;
        !self.changes_entries() && !self.changes_pool() && inspection.report.leaks == 0 && !dirty
    }

    /// Whether L2 entries change.
    pub(super) fn changes_entries(&self) -> bool {
        match &self.entries {
            Entries::Same => false,
            Entries::Shared(sharing) => !sharing.is_empty(&self.ground),
            Entries::Overwritten(_) => true,
        }
    }

    /// Whether the pool is written anew, or goes.
    pub(crate) fn changes_pool(&self) -> bool {
        let has_pool = self.ground.pool_index.is_some();
        match &self.pool {
            NewPool::Dropped => has_pool,
            NewPool::Of(members) => {
                !members.joining.is_empty()
                    || has_pool && (!self.ground.has_records() || !self.ground.is_ascending)
                    || self.ground.members.bits().len() != members.after.len()
            }
        }
    }

    /// Whether the image loses its pool.
    pub(super) fn drops_pool(&self) -> bool {
        self.ground.pool_index.is_some() && matches!(self.pool, NewPool::Dropped)
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
        (before, self.members().map_or(0, |members| clusters(members.after.len(), bits, 0)))
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
                own.extend(l2::entries(&inspection.header, &table).filter_map(|(_, entry)| match entry {
                    L2Entry::Data { host, .. } => Some(cluster(host)),
                    _ => None,
                }));
            }
        }
        Ok(own)
    }

    /// Whether the image will get version 3: a snapshot, and the pool is one, blocks the resizing of version 2 images.
    pub(crate) fn upgrades(&self) -> bool {
        let may_upgrade = !matches!(self.entries, Entries::Same);
        may_upgrade && self.ground.inspection.header.version < 3 && !self.is_empty()
    }

    /// Clusters of the file with data that nothing will use any more.
    pub(crate) fn gone_clusters(&self) -> Bits {
        let Ground { units, members, inspection, .. } = &self.ground;
        let stays = |unit: u64| self.members().is_some_and(|members| members.after.contains(unit));
        let dropped = |unit: u64| members.bits().contains(unit) && !stays(unit);
        // Entries with the zero flag may hold on to their place.
        let frees_kept = self.sharing().is_some();
        let kept = |unit: u64| !frees_kept && units.kept_by_zeros.contains(unit);
        let is_gone = |unit: u64| self.sharing().is_some_and(|sharing| sharing.is_gone(unit));
        let goes = |&unit: &u64| is_gone(unit) || units.users(unit) == 0 && dropped(unit) && !kept(unit);
        let mut gone = Bits::new(units.plain().end);
        units.plain().filter(goes).for_each(|unit| gone.insert(unit));
        if frees_kept {
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
