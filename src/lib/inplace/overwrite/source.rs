//! What is to be written, as clusters of the target.

use std::ops::Range;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use crate::dedup::reading::FirstReading;
use crate::dedup::verify::{Clusters, ReadClusters};
use crate::disk::{Disk, Reader};
use crate::error::{OrInternal, Result};
use crate::inplace::overwrite::class::{NEW, Place, Stores};
use crate::sort::content::ContentAt;
use crate::storage::buffer::BufferPool;
use crate::storage::{Storage, write};
use crate::survey::Ground;
use crate::units::{ClusterBits, HostCluster, to_usize};
use crate::work::Work;

/// Bytes that a worker reads and writes in one go.
pub(super) const TASK: u64 = 1 << 20;

/// The source, and behind its end what the target has there.
pub(super) struct Source<'a> {
    pub(super) disk: &'a Disk,
    bits: ClusterBits,
    /// The cluster in which the source ends and the target goes on: which and its new content.
    last: Option<(u64, Vec<u8>)>,
}

impl<'a> Source<'a> {
    /// The clusters of `disk`, written over those of `present`, which has clusters of `bits`.
    pub(super) fn new(disk: &'a Disk, present: &Disk, bits: ClusterBits) -> Result<Self> {
        let (end, last) = (disk.size(), disk.size() >> bits.bits());
        let start = last << bits.bits();
        if start == end || present.size() <= end {
            return Ok(Self { disk, bits, last: None });
        }
        let mut content = vec![0; bits.len()];
        Reader::sequential(present).read(start, &mut content)?;
        let own = to_usize(end - start);
        Reader::sequential(disk).read(start, content.split_at_mut(own).0)?;
        Ok(Self { disk, bits, last: Some((last, content)) })
    }

    /// Writes the new clusters of `stores` to the image in `storage`. What is read of the source is what was read of it before.
    pub(super) fn copy(&self, stores: &Stores, ground: &Ground, storage: &dyn Storage, work: &Work) -> Result<()> {
        let per_task = (TASK >> self.bits.bits()).max(1);
        let buffers = BufferPool::new(to_usize(per_task << self.bits.bits()));
        let copier = Copier { source: self, ground, first: &stores.first, storage, buffers };
        let (mut places, mut records) = (stores.places.iter(), stores.records.iter());
        let mut store = |place: Result<Place>| {
            let Place { host, class } = place?;
            let record = match class & NEW {
                0 => None,
                _ => Some(records.next().transpose()?.or_internal("a new cluster was not read before")?),
            };
            Ok(Store { host, class, record })
        };
        loop {
            work.cancel.check()?;
            let most = to_usize(per_task) * work.batch();
            let batch = places.by_ref().take(most).map(&mut store).collect::<Result<Vec<Store>>>()?;
            if batch.is_empty() {
                return Ok(());
            }
            let runs: Vec<&[Store]> = batch
                .chunk_by(|a, b| a.host.0 + 1 == b.host.0)
                .flat_map(|run| run.chunks(to_usize(per_task)))
                .collect();
            runs.par_iter().try_for_each(|run| copier.run(run))?;
            work.progress.advance((batch.len() as u64) << self.bits.bits());
        }
    }
}

/// A new cluster.
struct Store {
    host: HostCluster,
    /// Whose content it gets: a unit of the target, or a guest cluster of the source.
    class: u64,
    /// What that was when it was read first, if it is of the source.
    record: Option<ContentAt>,
}

impl Store {
    fn is_new(&self) -> bool {
        self.record.is_some()
    }
}

/// Writes new clusters.
struct Copier<'a> {
    source: &'a Source<'a>,
    ground: &'a Ground,
    first: &'a FirstReading,
    storage: &'a dyn Storage,
    buffers: BufferPool,
}

impl Copier<'_> {
    /// Writes clusters that follow each other in the file.
    fn run(&self, run: &[Store]) -> Result<()> {
        let Self { source, ground, storage, .. } = *self;
        let bits = source.bits;
        let first = run.first().or_internal("a run of no clusters")?;
        let mut buffer = self.buffers.take()?;
        let content = buffer.get_mut(..run.len() << bits.bits()).or_internal("a run is longer than its buffer")?;
        let target = ground.content(storage);
        let (mut guests, mut units) = (source.in_order(), target.at_random());
        let mut rest = &mut *content;
        for stores in run.chunk_by(|a, b| a.class + 1 == b.class) {
            let (piece, after) = rest.split_at_mut(stores.len() << bits.bits());
            let from = stores.first().or_internal("a run of no clusters")?;
            match from.is_new() {
                true => guests.read(from.class & !NEW, piece)?,
                false => units.read(from.class, piece)?,
            }
            rest = after;
        }
        self.hold(run, content)?;
        write(storage, content, first.host.offset(bits).0)
    }

    /// Fails where a cluster of the source is not what it was when it was compared.
    fn hold(&self, run: &[Store], content: &[u8]) -> Result<()> {
        let bits = self.source.bits;
        let mut hold = self.first.hold();
        for (store, cluster) in run.iter().zip(content.chunks_exact(bits.len())) {
            if store.record.is_some_and(|record| !hold.is_same(cluster, record)) {
                return Err(self.source.disk.changed_at((store.class & !NEW) << bits.bits()));
            }
        }
        Ok(())
    }
}

impl Clusters for Source<'_> {
    fn cluster_bits(&self) -> ClusterBits {
        self.bits
    }

    fn in_order(&self) -> Box<dyn ReadClusters + '_> {
        Box::new(SourceReader { source: self, reader: Reader::sequential(self.disk) })
    }

    fn at_random(&self) -> Box<dyn ReadClusters + '_> {
        Box::new(SourceReader { source: self, reader: Reader::random(self.disk) })
    }
}

struct SourceReader<'a> {
    source: &'a Source<'a>,
    reader: Reader<'a>,
}

impl ReadClusters for SourceReader<'_> {
    fn read(&mut self, first: u64, buffer: &mut [u8]) -> Result<()> {
        let bits = self.source.bits;
        self.reader.read(first << bits.bits(), buffer)?;
        let Some((last, content)) = &self.source.last else { return Ok(()) };
        let place = last.checked_sub(first).map(|at| to_usize(at << bits.bits()));
        if let Some(cluster) = place.and_then(|at| buffer.get_mut(Range { start: at, end: at + bits.len() })) {
            cluster.copy_from_slice(content);
        }
        Ok(())
    }
}
