//! The tables of an image with snapshots, while it is written in the order of the row (see [`crate::disk::history`]).

use crate::dedup::plan::Plan;
use crate::dedup::weave::{TableUsers, Woven};
use crate::disk::Disk;
use crate::disk::history::{History, L1Size, Weave};
use crate::error::{OrInternal, Result};
use crate::format::snapshot::Snapshot;
use crate::pool;
use crate::sort::sequence::Words;
use crate::units::{ClusterBits, GuestCluster, HostOffset, RowCluster, RowPlace, to_usize};

use crate::build::layout::Parts;

const OUTSIDE: &str = "a cluster of the row lies outside of its unit";
const NO_LAYER: &str = "a layer has no L1 table";

/// Knows where in the L1 tables of all layers a cluster of the row belongs, and what the layer above has at the same place.
pub(crate) struct Layers<'a> {
    history: &'a History,
    bits: ClusterBits,
    weave: Weave,
    sizes: Vec<L1Size>,
    /// The first entry of each layer's L1 table, where all of them are one.
    starts: Vec<usize>,
    /// Runs of how many layers use the next L2 tables.
    woven: &'a Woven,
    tables: Words<'a, TableUsers>,
    run: TableUsers,
    unit: u64,
    above: Unit,
    now: Unit,
}

/// What one layer has in a unit.
struct Unit {
    entries: Vec<u64>,
    tables: Vec<HostOffset>,
}

/// Adds what the snapshots of `history` need to `parts`, which are those of their disk.
///
/// # Errors
/// [`crate::ErrorKind::Limit`] where a snapshot's L1 table would be larger than QEMU accepts.
pub(crate) fn with_snapshots(parts: Parts, history: Option<&History>) -> Result<Parts> {
    let Some(history) = history else { return Ok(parts) };
    let bits = parts.cluster_bits;
    let sizes = history.l1_sizes(bits)?;
    // QEMU counts the clusters that the entries need, no more.
    let pool = pool::snapshot(pool::next_id(history.snapshots()), HostOffset(0), 0, 0);
    let table = history.snapshots().iter().chain([&pool]).map(|snapshot| snapshot.encode().len() as u64).sum();
    Ok(Parts {
        size: history.disk_size(),
        snapshots: u32::try_from(history.snapshots().len()).ok().or_internal("too many snapshots")?,
        snapshot_l1: sizes.iter().skip(1).map(|size| bits.clusters(u64::from(size.all) * 8)).sum(),
        snapshot_table: table,
        ..parts
    })
}

impl<'a> Layers<'a> {
    /// The layers that a disk with its snapshots has; a disk without has none.
    ///
    /// # Errors
    /// As [`with_snapshots`].
    pub(crate) fn of(disk: &'a Disk, plan: &'a Plan, bits: ClusterBits) -> Result<Option<Self>> {
        match (disk.history(), &plan.woven) {
            (Some(history), Some(woven)) => Self::new(history, woven, bits).map(Some),
            _ => Ok(None),
        }
    }

    /// The layers of `history` with clusters of `bits`, for which `woven` was found.
    ///
    /// # Errors
    /// As [`with_snapshots`].
    fn new(history: &'a History, woven: &'a Woven, bits: ClusterBits) -> Result<Self> {
        let sizes = history.l1_sizes(bits)?;
        let starts = sizes.iter().scan(0, |sum, size| {
            let start = *sum;
            *sum += size.all as usize;
            Some(start)
        });
        let unit = || Unit {
            entries: vec![0; to_usize(woven.weave.unit)],
            tables: vec![HostOffset(0); to_usize(woven.weave.unit / bits.entries())],
        };
        Ok(Self {
            history,
            bits,
            weave: woven.weave,
            starts: starts.collect(),
            sizes,
            woven,
            tables: woven.tables.iter(),
            run: TableUsers::default(),
            unit: 0,
            above: unit(),
            now: unit(),
        })
    }

    /// Entries of all L1 tables together.
    pub(crate) fn l1_entries(&self) -> usize {
        self.sizes.iter().map(|size| size.all as usize).sum()
    }

    /// Turns to `cluster` of the row; clusters come in order.
    pub(crate) fn enter(&mut self, cluster: RowCluster) {
        let unit = cluster.0 / self.weave.unit;
        if unit != self.unit {
            std::mem::swap(&mut self.above, &mut self.now);
            self.now.clear();
            if self.weave.group(unit) != self.weave.group(self.unit) || unit != self.unit + 1 {
                self.above.clear();
            }
            self.unit = unit;
        }
    }

    /// Runs of L2 tables in the order of the file: how many layers use each, and how many tables.
    pub(crate) fn all_tables(&self) -> impl Iterator<Item = Result<TableUsers>> + use<'a> {
        self.woven.tables.iter()
    }

    /// How many layers use the next L2 table.
    pub(crate) fn table_layers(&mut self) -> Result<u64> {
        while self.run.tables == 0 {
            match self.tables.next().transpose()? {
                Some(run) => self.run = run,
                None => return Ok(1),
            }
        }
        self.run.tables -= 1;
        Ok(self.run.layers)
    }

    /// Whether `cluster` of the row belongs to the active disk.
    pub(crate) fn is_active(&self, cluster: RowCluster) -> bool {
        self.weave.locate(cluster.0).is_some_and(|(layer, _)| layer == 0)
    }

    /// The layer that `cluster` of the row belongs to, and which cluster of it that is; VM states lie behind the disk.
    fn locate(&self, cluster: RowCluster) -> Result<(usize, GuestCluster)> {
        if let Some((layer, place)) = self.weave.locate(cluster.0) {
            return Ok((to_usize(layer), GuestCluster(place)));
        }
        let start = |vm: u64| vm >> self.bits.bits();
        let vm = self.history.vm();
        let before = vm.partition_point(|vm| start(vm.start) <= cluster.0);
        let vm =
            vm.get(..before).and_then(<[_]>::last).or_internal("a cluster lies behind the disk and in no VM state")?;
        let layer = to_usize(vm.layer);
        let disk = self.sizes.get(layer).or_internal(NO_LAYER)?.disk;
        Ok((layer, GuestCluster(u64::from(disk) * self.bits.entries() + (cluster.0 - start(vm.start)))))
    }

    /// The guest cluster at `place`, a place of the disk or a cluster of a VM state in the row.
    pub(crate) fn guest(&self, place: RowPlace) -> Result<GuestCluster> {
        match place.0 < self.weave.end {
            true => Ok(GuestCluster(place.0)),
            false => Ok(self.locate(RowCluster(place.0))?.1),
        }
    }

    /// The entry for the L2 table of `cluster` in the L1 tables of all layers.
    pub(crate) fn l1_index(&self, cluster: RowCluster) -> Result<usize> {
        let (layer, guest) = self.locate(cluster)?;
        Ok(self.starts.get(layer).or_internal(NO_LAYER)? + to_usize(guest.0 / self.bits.entries()))
    }

    fn at(&self, cluster: u64) -> usize {
        to_usize(cluster % self.weave.unit)
    }

    /// Remembers the L2 entry of `cluster`.
    pub(crate) fn set(&mut self, cluster: RowCluster, word: u64) -> Result<()> {
        let at = self.at(cluster.0);
        *self.now.entries.get_mut(at).or_internal(OUTSIDE)? = word;
        Ok(())
    }

    /// Remembers the L2 table of `cluster`.
    pub(crate) fn set_table(&mut self, cluster: RowCluster, table: HostOffset) -> Result<()> {
        let at = self.at(cluster.0) >> (self.bits.bits() - 3);
        *self.now.tables.get_mut(at).or_internal(OUTSIDE)? = table;
        Ok(())
    }

    /// The L2 entry of the layer above at the place of `cluster`.
    pub(crate) fn above(&mut self, cluster: RowCluster) -> Result<u64> {
        self.enter(cluster);
        self.above.entries.get(self.at(cluster.0)).copied().or_internal(OUTSIDE)
    }

    /// Takes the L2 table of the layer above for the one that begins at `cluster`, and returns it.
    pub(crate) fn inherit_table(&mut self, cluster: RowCluster) -> Result<HostOffset> {
        let first = self.at(cluster.0);
        let range = first..first + self.bits.len() / 8;
        let above = self.above.entries.get(range.clone()).or_internal(OUTSIDE)?;
        self.now.entries.get_mut(range).or_internal(OUTSIDE)?.copy_from_slice(above);
        let table = self.above.tables.get(first >> (self.bits.bits() - 3)).copied().or_internal(OUTSIDE)?;
        self.set_table(cluster, table)?;
        Ok(table)
    }

    /// The active L1 table, and those of the snapshots in the order of the snapshot table, of `l1`, which has all.
    pub(crate) fn split<'b>(&self, l1: &'b [u64]) -> Result<(&'b [u64], Vec<&'b [u64]>)> {
        let table = |layer: usize| {
            let start = *self.starts.get(layer).or_internal(NO_LAYER)?;
            let size = self.sizes.get(layer).or_internal(NO_LAYER)?;
            l1.get(start..start + size.all as usize).or_internal(NO_LAYER)
        };
        let snapshots = 0..self.history.snapshots().len();
        let snapshots = snapshots.map(|index| table(self.history.layer(index))).collect::<Result<_>>()?;
        Ok((table(0)?, snapshots))
    }

    /// The entries of the snapshot table, with their L1 tables at `places`.
    pub(crate) fn snapshots(&self, places: impl Iterator<Item = (HostOffset, usize)>) -> Result<Vec<Snapshot>> {
        let entry = |(snapshot, (l1_offset, entries)): (&Snapshot, (HostOffset, usize))| {
            let l1_entries = u32::try_from(entries).ok().or_internal("an L1 table is too long for its snapshot")?;
            Ok(Snapshot { l1_offset, l1_entries, ..snapshot.clone() })
        };
        self.history.snapshots().iter().zip(places).map(entry).collect()
    }

    /// The id of the pool: the highest of the snapshots plus 1.
    pub(crate) fn pool_id(&self) -> u64 {
        pool::next_id(self.history.snapshots())
    }
}

impl Unit {
    fn clear(&mut self) {
        self.entries.fill(0);
        self.tables.fill(HostOffset(0));
    }
}
