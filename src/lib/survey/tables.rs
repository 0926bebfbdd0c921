//! All L2 tables of the disk and its snapshots, each one once.

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use crate::check::finding::Layer;
use crate::check::tables::{L2Reference, Tables};
use crate::error::{Context, Result, Table};
use crate::format::header::Header;
use crate::storage::{Storage, read_padded};
use crate::units::{GuestCluster, HostOffset, to_usize};

/// L2 tables that are read at once, as bytes: bounds the memory of a batch.
const BATCH: u64 = 16 << 20;

/// An L2 table and the L1 entries that lead to it, those of the pool left out.
pub(crate) struct L2Table<'a> {
    references: &'a [L2Reference],
    entries: u64,
}

impl L2Table<'_> {
    /// Where it is.
    pub(crate) fn host(&self) -> HostOffset {
        self.references.first().map_or(HostOffset(0), |first| first.table)
    }

    /// How many L1 entries lead to it: QEMU counts each of its entries so often.
    pub(crate) fn times(&self) -> u64 {
        self.references.len() as u64
    }

    /// The layer that leads to it, where that is only one.
    pub(crate) fn layer(&self) -> Option<u32> {
        let (first, rest) = self.references.split_first()?;
        rest.iter().all(|other| other.layer == first.layer).then_some(first.layer)
    }

    /// The guest clusters that entry `index` maps: one for each L1 entry.
    pub(crate) fn guests(&self, index: u64) -> impl Iterator<Item = GuestCluster> {
        self.references.iter().map(move |reference| GuestCluster(u64::from(reference.index) * self.entries + index))
    }
}

/// The L2 tables of an image.
pub(crate) struct L2Tables<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    references: Vec<L2Reference>,
}

impl<'a> L2Tables<'a> {
    /// All of `tables`.
    pub(crate) fn all(storage: &'a dyn Storage, header: &'a Header, tables: &Tables) -> Self {
        Self { storage, header, references: tables.references.clone() }
    }

    /// Those of `tables`, without the pool's.
    pub(crate) fn new(storage: &'a dyn Storage, header: &'a Header, tables: &Tables) -> Self {
        let is_pool = |r: &&L2Reference| tables.layers.get(r.layer as usize).is_none_or(|layer| *layer == Layer::Pool);
        let references = tables.references.iter().filter(|r| !is_pool(r)).copied().collect();
        Self { storage, header, references }
    }

    /// Those of `tables` that the active disk uses.
    pub(crate) fn active(storage: &'a dyn Storage, header: &'a Header, tables: &Tables) -> Self {
        let references = tables.references.iter().filter(|r| r.layer == 0).copied().collect();
        Self { storage, header, references }
    }

    /// Hands every table with its content to `visit`, on all threads, and what that returns to `collect`, in the order of the file.
    pub(crate) fn visit<T: Send>(
        &self,
        visit: impl Fn(&L2Table<'_>, &mut [u8]) -> Result<T> + Sync,
        mut collect: impl FnMut(T) -> Result<()>,
    ) -> Result<()> {
        let entries = self.header.l2_entries();
        let tables: Vec<L2Table<'_>> = self
            .references
            .chunk_by(|a, b| a.table == b.table)
            .map(|references| L2Table { references, entries })
            .collect();
        let per_batch = to_usize(BATCH / self.header.cluster_bits.bytes()).max(8);
        for batch in tables.chunks(per_batch) {
            let visited: Vec<Result<T>> = batch
                .par_iter()
                .map_init(
                    || vec![0; self.header.cluster_bits.len()],
                    |content, table| {
                        let host = table.host();
                        read_padded(self.storage, content, host.0).reading(Table::L2, host)?;
                        visit(table, content)
                    },
                )
                .collect();
            for result in visited {
                collect(result?)?;
            }
        }
        Ok(())
    }
}
