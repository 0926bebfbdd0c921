//! What is to be written, as clusters of the target.

use std::ops::Range;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use crate::dedup::plan::split_run;
use crate::dedup::sequence::Sequence;
use crate::dedup::verify::{Clusters, ReadClusters};
use crate::disk::{Disk, Reader};
use crate::error::{Error, Result};
use crate::storage::buffer::BufferPool;
use crate::storage::{Storage, write};
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
        Reader::sequential(disk).read(start, content.get_mut(..own).unwrap_or_default())?;
        Ok(Self { disk, bits, last: Some((last, content)) })
    }

    /// Writes the new clusters of `stores`: host cluster, and guest cluster with the content.
    pub(super) fn copy(&self, stores: &Sequence, storage: &dyn Storage, work: &Work<'_>) -> Result<()> {
        let per_task = (TASK >> self.bits.bits()).max(1);
        let buffers = BufferPool::new(to_usize(per_task << self.bits.bits()));
        let mut words = stores.iter();
        loop {
            work.cancel.check()?;
            let most = to_usize(per_task) * work.batch();
            let batch = words.by_ref().take(most).map(|word| word.map(split_run)).collect::<Result<Vec<_>>>()?;
            if batch.is_empty() {
                return Ok(());
            }
            let runs: Vec<&[(u64, u64)]> =
                batch.chunk_by(|a, b| a.0 + 1 == b.0).flat_map(|run| run.chunks(to_usize(per_task))).collect();
            runs.par_iter().try_for_each(|run| self.copy_run(run, storage, &buffers))?;
            work.progress.advance((batch.len() as u64) << self.bits.bits());
        }
    }

    /// Writes clusters that follow each other in the file.
    fn copy_run(&self, run: &[(u64, u64)], storage: &dyn Storage, buffers: &BufferPool) -> Result<()> {
        let mut buffer = buffers.take().map_err(|e| Error::io("Could not get memory", e))?;
        let (Some(content), Some((host, _))) = (buffer.get_mut(..run.len() << self.bits.bits()), run.first()) else {
            return Ok(());
        };
        let mut reader = self.in_order();
        let mut rest = &mut *content;
        for guests in run.chunk_by(|a, b| a.1 + 1 == b.1) {
            let (piece, after) = rest.split_at_mut(guests.len() << self.bits.bits());
            if let Some((_, first)) = guests.first() {
                reader.read(*first, piece)?;
            }
            rest = after;
        }
        write(storage, content, HostCluster(*host).offset(self.bits).0)
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
        let place = last.checked_sub(first).and_then(|at| usize::try_from(at << bits.bits()).ok());
        if let Some(cluster) = place.and_then(|at| buffer.get_mut(Range { start: at, end: at + bits.len() })) {
            cluster.copy_from_slice(content);
        }
        Ok(())
    }
}
