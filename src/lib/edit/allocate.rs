//! Places for new clusters in an image, and the growth of its refcount structure that they need.

use std::collections::BTreeMap;

use crate::check::counts::Counts;
use crate::check::states::{State, States};
use crate::error::{Error, ErrorKind, IoContext, OrInternal, Result};
use crate::format::header::{Header, MAX_REFCOUNT_TABLE_BYTES, REFCOUNT_TABLE_AT};
use crate::image::refcounts::{Block, Refcounts};
use crate::sort::bits::Bits;
use crate::storage::sparse::write_sparse;
use crate::storage::{Storage, flush, write};
use crate::units::{ClusterBits, HostCluster, HostOffset, to_usize};

/// Gives out clusters: free ones inside the file first, then new ones at its end. Decides only; nothing is written.
pub(crate) struct Allocator {
    bits: ClusterBits,
    per_block: u64,
    /// Free clusters of the file.
    free: Bits,
    /// No free cluster comes before this.
    next: u64,
    /// The cluster after the last one given out at the end.
    end: u64,
    taken: Vec<HostCluster>,
}

/// What an allocation needs beside the clusters themselves.
pub(crate) struct Growth {
    /// Clusters that were given out, those of the refcount structure included; each gets one reference.
    pub(crate) taken: Vec<HostCluster>,
    /// The least length of the file in bytes.
    pub(crate) file_len: u64,
    /// New refcount blocks: which and where.
    blocks: Vec<(u64, HostCluster)>,
    /// A new refcount table, where the old one is too short: where and how many clusters.
    table: Option<(HostCluster, u64)>,
}

impl Allocator {
    /// For an image whose clusters have the references `counts`.
    pub(crate) fn new(refcounts: &Refcounts<'_>, header: &Header, file_len: u64, counts: &Counts) -> Result<Self> {
        let bits = header.cluster_bits;
        let file = bits.clusters(file_len);
        let states = States::load(refcounts, file)?;
        let mut free = Bits::new(file);
        (0..file)
            .filter(|&cluster| states.get(cluster) == State::Free && counts.get(cluster) == 0)
            .for_each(|cluster| free.insert(cluster));
        // Something may reach into the cluster that follows the file.
        let end = file.max(counts.clusters());
        Ok(Self { bits, per_block: refcounts.per_block(), free, next: 0, end, taken: Vec::new() })
    }

    /// A free cluster.
    pub(crate) fn one(&mut self) -> HostCluster {
        let cluster = self.free.iter_from(self.next).next().unwrap_or(self.end);
        self.next = cluster + 1;
        self.take(cluster, 1)
    }

    /// `count` clusters in a row.
    pub(crate) fn run(&mut self, count: u64) -> HostCluster {
        let start = if count == 0 { None } else { self.free.run_from(self.next, count) };
        self.take(start.unwrap_or(self.end), count)
    }

    fn take(&mut self, start: u64, count: u64) -> HostCluster {
        for cluster in start..start + count {
            self.free.remove(cluster);
            self.taken.push(HostCluster(cluster));
        }
        self.end = self.end.max(start + count);
        HostCluster(start)
    }

    /// Ends the allocation: adds the refcount blocks and the table that the new clusters, and they themselves, need.
    pub(crate) fn finish(mut self, refcounts: &Refcounts<'_>) -> Result<Growth> {
        let capacity = refcounts.entries().len() as u64;
        let mut blocks: BTreeMap<u64, HostCluster> = BTreeMap::new();
        let mut table: Option<(HostCluster, u64)> = None;
        let (mut seen, mut entries) = (0, 0);
        loop {
            while let Some(cluster) = self.taken.get(seen).copied() {
                seen += 1;
                let index = cluster.0 / self.per_block;
                entries = entries.max(index + 1);
                if refcounts.block(index) == Block::Missing && !blocks.contains_key(&index) {
                    let place = self.one();
                    blocks.insert(index, place);
                }
            }
            if entries <= table.map_or(capacity, |(_, clusters)| clusters * self.bits.entries()) {
                break;
            }
            // With room to grow, so that it need not move again soon.
            let clusters = (entries + entries / 2).div_ceil(self.bits.entries());
            table = Some((self.run(clusters), clusters));
        }
        let bytes = table.map_or(0, |(_, clusters)| clusters * self.bits.bytes());
        if bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::new(ErrorKind::Limit, "the file needs a larger refcount table than QEMU accepts"));
        }
        let last = self.taken.iter().map(|cluster| cluster.0 + 1).max().unwrap_or(0);
        Ok(Growth {
            taken: self.taken,
            file_len: last << self.bits.bits(),
            blocks: blocks.into_iter().collect(),
            table,
        })
    }
}

impl Growth {
    /// Counts the new clusters, once each.
    ///
    /// # Errors
    /// Internal ones: new clusters lie in the file and have no references.
    pub(crate) fn count(&self, bits: ClusterBits, counts: &mut Counts) -> Result<()> {
        counts.grow(self.file_len);
        for cluster in &self.taken {
            let added = counts.add(cluster.offset(bits).0, bits.bytes(), 1, false);
            added.map_err(|_| Error::internal("a new cluster lies outside of the file, or is in use"))?;
        }
        Ok(())
    }

    /// Makes the file as long as it must be.
    pub(crate) fn extend(&self, storage: &dyn Storage) -> Result<()> {
        if storage.len().at("Could not get its length")? < self.file_len {
            storage.set_len(self.file_len).at("Could not make the file longer")?;
            // No check sees counts of clusters behind the end of a file whose growth was lost.
            flush(storage)?;
        }
        Ok(())
    }

    /// Adds the new refcount blocks and the new table, with the counts of `counts`. Where they lie in the old blocks' care they
    /// are counted there already: what is in use is never counted as free.
    ///
    /// After a crash here clusters that nobody uses are counted.
    pub(crate) fn write(&self, storage: &dyn Storage, header: &mut Header, counts: &Counts) -> Result<()> {
        let refcounts = Refcounts::load(storage, header)?;
        let bits = header.cluster_bits;
        if self.blocks.is_empty() && self.table.is_none() {
            return Ok(());
        }
        let per_block = refcounts.per_block();
        for (index, place) in &self.blocks {
            let counts: Vec<u64> = (index * per_block..(index + 1) * per_block).map(|c| counts.get(c)).collect();
            let mut block = Vec::with_capacity(bits.len());
            header.refcount_bits.encode(&counts, &mut block);
            write_sparse(storage, &block, place.offset(bits).0)?;
        }
        let entry = |place: HostCluster| place.offset(bits).0.to_be_bytes();
        let Some((place, clusters)) = self.table else {
            flush(storage)?;
            for (index, place) in &self.blocks {
                write(storage, &entry(*place), header.refcount_table_offset.0 + index * 8)?;
            }
            return flush(storage);
        };
        let mut words = refcounts.entries().to_vec();
        words.resize(to_usize(clusters * bits.entries()), 0);
        for (index, place) in &self.blocks {
            let word = words.get_mut(to_usize(*index)).or_internal("a new refcount block lies behind the new table")?;
            *word = place.offset(bits).0;
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        write_sparse(storage, &bytes, place.offset(bits).0)?;
        flush(storage)?;
        header.refcount_table_offset = HostOffset(place.offset(bits).0);
        let clusters = u32::try_from(clusters).ok();
        header.refcount_table_clusters = clusters.or_internal("a refcount table that is too large")?;
        write(storage, &header.refcount_table_field(), REFCOUNT_TABLE_AT)?;
        flush(storage)
    }
}
