//! Reading a disk once: which clusters are not zero, and the fingerprint of each.

use std::ops::Range;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use crate::dedup::{INDEX_BITS, Run};
use crate::digest::{fingerprint, is_zero};
use crate::disk::chunks::{CHUNK, Chunks};
use crate::disk::{Disk, Reader};
use crate::error::{Error, ErrorKind, OrInternal, Result};
use crate::image::Place;
use crate::sort::content::ContentAt;
use crate::sort::sequence::{Sequence, Spill};
use crate::storage::buffer::BufferPool;
use crate::units::{ClusterBits, append, to_usize};
use crate::work::Work;

/// What a scan found.
pub(crate) struct Scan {
    /// For each cluster that is not zero, in guest order: the high 88 bits of its fingerprint, then its index.
    pub records: Sequence<ContentAt>,
    /// Clusters that read as zeros, and on the other disk as something else, in guest order.
    pub zeros: Sequence<Run>,
    /// Clusters that are not zero and left out, because the other disk has them.
    pub same: u64,
    /// The records of those that can be shared: that the target has as whole clusters, not in its backing file.
    pub unchanged: Sequence<ContentAt>,
    /// Of a disk with its snapshots: clusters that lie where the layer above has them, and were not read for it.
    pub in_common: Sequence<Run>,
    /// The cluster size of the records.
    pub grain: ClusterBits,
    /// Bytes read: what was not known to be zeros without reading.
    pub bytes_read: u64,
}

/// Another disk that a scan compares with: clusters that it reads in the same way are left out.
#[derive(Clone, Copy)]
pub(crate) enum Other<'a> {
    /// The backing file of what will be written: nobody reads what it has behind the end of the disk.
    Backing(&'a Disk),
    /// What will be written, as it reads now: what it has behind the end of the disk stays.
    Target(&'a Disk),
}

impl<'a> Other<'a> {
    fn disk(self) -> &'a Disk {
        match self {
            Self::Backing(disk) | Self::Target(disk) => disk,
        }
    }
}

/// Scans `disk` in clusters of `grain`, those that `other` reads in the same way left out.
///
/// # Errors
/// Those of reading; [`ErrorKind::Limit`] for a disk of more than 2^40 clusters.
pub(crate) fn scan(
    disk: &Disk,
    other: Option<Other<'_>>,
    grain: ClusterBits,
    spill: &Spill,
    work: &Work,
) -> Result<Scan> {
    Scanner::new(disk, other, grain).scan(spill, work)
}

struct Scanner<'a> {
    disk: &'a Disk,
    other: Option<Other<'a>>,
    grain: ClusterBits,
    buffers: BufferPool,
}

#[derive(Default)]
struct ChunkScan {
    records: Vec<ContentAt>,
    zeros: Vec<u64>,
    same: u64,
    unchanged: Vec<ContentAt>,
    /// In bytes.
    in_common: Vec<Range<u64>>,
    bytes_read: u64,
}

impl<'a> Scanner<'a> {
    fn new(disk: &'a Disk, other: Option<Other<'a>>, grain: ClusterBits) -> Self {
        let buffers = BufferPool::new(to_usize(CHUNK));
        Self { disk, other, grain, buffers }
    }

    fn scan(&self, spill: &Spill, work: &Work) -> Result<Scan> {
        let Self { disk, grain, .. } = *self;
        if grain.clusters(disk.size()) > 1 << INDEX_BITS {
            let message = format!("the disk has more than 2^{INDEX_BITS} clusters; use a larger cluster_size");
            return Err(Error::new(ErrorKind::Limit, message));
        }
        let small = spill.share(4);
        let mut scan = Scan {
            records: Sequence::new(spill),
            zeros: Sequence::new(&small),
            in_common: Sequence::new(&small),
            same: 0,
            unchanged: Sequence::new(spill),
            grain,
            bytes_read: 0,
        };
        let (mut zeros, mut in_common) = (Runs::default(), Runs::default());
        let mut chunks = Chunks::over(disk, self.other.map(Other::disk));
        let mut position = 0;
        loop {
            work.cancel.check()?;
            let batch = chunks.batch(work.batch())?;
            if batch.is_empty() {
                break;
            }
            let results: Vec<Result<ChunkScan>> = batch.par_iter().map(|chunk| self.chunk(chunk.clone())).collect();
            for result in results {
                let chunk = result?;
                scan.records.extend(&chunk.records)?;
                scan.bytes_read += chunk.bytes_read;
                scan.same += chunk.same;
                scan.unchanged.extend(&chunk.unchanged)?;
                for cluster in chunk.zeros {
                    zeros.add(cluster, 1, &mut scan.zeros)?;
                }
                for run in chunk.in_common {
                    let clusters = grain.clusters(run.end - run.start);
                    in_common.add(run.start >> grain.bits(), clusters, &mut scan.in_common)?;
                }
            }
            work.progress.advance(chunks.position() - position);
            position = chunks.position();
        }
        zeros.end(&mut scan.zeros)?;
        in_common.end(&mut scan.in_common)?;
        disk.settle();
        Ok(scan)
    }

    fn chunk(&self, chunk: Range<u64>) -> Result<ChunkScan> {
        let Self { disk, other, grain, .. } = *self;
        let mut reader = Reader::sequential(disk);
        let mut in_common = Vec::new();
        if let Some(history) = disk.history() {
            reader.in_common(&chunk, history.grain().bytes(), &mut in_common)?;
            if in_common.first() == Some(&chunk) {
                return Ok(ChunkScan { in_common, ..ChunkScan::default() });
            }
        }
        let mut runs = Vec::new();
        if let Some(other) = other {
            without(&[chunk], &in_common, &mut runs);
            let mut found = ChunkScan { in_common, ..ChunkScan::default() };
            runs.into_iter().try_for_each(|run| self.compare(other, run, &mut found))?;
            return Ok(found);
        }
        let mut buffer = self.buffers.take()?;
        reader.data_runs(chunk, grain.bytes(), &mut runs)?;
        if !in_common.is_empty() {
            let all = std::mem::take(&mut runs);
            without(&all, &in_common, &mut runs);
        }
        let clusters: u64 = runs.iter().map(|run| grain.clusters(run.end - run.start)).sum();
        let records = Vec::with_capacity(to_usize(clusters));
        let mut found = ChunkScan { records, in_common, ..ChunkScan::default() };
        found.bytes_read = runs.iter().map(|run| run.end - run.start).sum();
        // Each piece takes the place of the one before, which is in the cache.
        let place = |_| 0;
        reader.clusters(&runs, grain, &mut buffer, place, |cluster, content| {
            found.records.push(ContentAt::new(fingerprint(content), cluster));
        })?;
        Ok(found)
    }

    /// Scans what differs from another disk in a part of a chunk.
    fn compare(&self, other: Other<'_>, run: Range<u64>, found: &mut ChunkScan) -> Result<()> {
        let Self { disk, grain, .. } = *self;
        let (mut ours, mut theirs) = (self.buffers.take()?, self.buffers.take()?);
        let len = to_usize((run.end - run.start).next_multiple_of(grain.bytes()));
        let ours = ours.get_mut(..len).or_internal("a run is longer than its buffer")?;
        let theirs = theirs.get_mut(..len).or_internal("a run is longer than its buffer")?;
        Reader::sequential(disk).read(run.start, ours)?;
        found.bytes_read += run.end - run.start;
        let mut shareable = Vec::new();
        // A VM state has no backing file behind it, but QEMU looks there for what is not allocated.
        let mut is_disk = true;
        match other {
            Other::Backing(backing) => {
                let behind = disk.behind(&run)?;
                is_disk = behind.is_some();
                let behind = behind.unwrap_or(0..0);
                // What the backing file has behind the end of the disk nobody reads.
                let end = to_usize(behind.end - behind.start).min(len);
                let (shown, hidden) = theirs.split_at_mut(end);
                Reader::sequential(backing).read(behind.start, shown)?;
                hidden.fill(0);
            }
            Other::Target(target) => {
                Reader::sequential(target).read(run.start, theirs)?;
                // What the target has behind the end of the disk stays.
                let end = to_usize(run.end - run.start);
                let (_, behind) = theirs.split_at(end);
                ours.split_at_mut(end).1.copy_from_slice(behind);
                shareable = own_clusters(target, grain, &run)?;
            }
        }
        let mut shareable = shareable.into_iter().peekable();
        let clusters = ours.chunks_exact(grain.len()).zip(theirs.chunks_exact(grain.len()));
        for (cluster, (content, theirs)) in (run.start >> grain.bits()..).zip(clusters) {
            match (is_disk && content == theirs, is_zero(content)) {
                (true, true) => {}
                (true, false) => {
                    found.same += 1;
                    while shareable.next_if(|run| run.end <= cluster).is_some() {}
                    if shareable.peek().is_some_and(|run| run.contains(&cluster)) {
                        found.unchanged.push(ContentAt::new(fingerprint(content), cluster));
                    }
                }
                (false, true) => found.zeros.push(cluster),
                (false, false) => found.records.push(ContentAt::new(fingerprint(content), cluster)),
            }
        }
        Ok(())
    }
}

/// The clusters of `chunk` that the image `target` itself holds, as runs. Behind the end of the disk its last cluster may hold what
/// nobody reads: it is left out where the disk ends within.
fn own_clusters(target: &Disk, grain: ClusterBits, chunk: &Range<u64>) -> Result<Vec<Range<u64>>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let end = chunk.end.min(target.size() & !(grain.bytes() - 1));
    let Some(image) = target.qcow2().filter(|_| chunk.start < end) else { return Ok(runs) };
    let mut at = chunk.start;
    image.extents(chunk.start, end - chunk.start, &mut Vec::new(), |extent| {
        let run = at >> grain.bits()..(at + extent.len) >> grain.bits();
        at += extent.len;
        match extent.place {
            Place::Unallocated | Place::Zero => {}
            Place::Data(_) | Place::Compressed { .. } => append(&mut runs, run),
        }
    })?;
    Ok(runs)
}

/// Emits what lies in `all` and not in `out`; both ascend.
fn without(all: &[Range<u64>], out: &[Range<u64>], rest: &mut Vec<Range<u64>>) {
    for run in all {
        let mut at = run.start;
        for out in out.iter().filter(|out| out.start < run.end && run.start < out.end) {
            rest.extend((at < out.start).then_some(at..out.start));
            at = out.end;
        }
        rest.extend((at < run.end).then_some(at..run.end));
    }
}

/// Collects ascending clusters as runs.
#[derive(Default)]
pub(crate) struct Runs(Option<Run>);

impl Runs {
    /// Adds `count` clusters; a run that they end goes to `runs`.
    pub(crate) fn add(&mut self, cluster: u64, count: u64, runs: &mut Sequence<Run>) -> Result<()> {
        match &mut self.0 {
            Some(run) if run.end() == cluster => {
                run.len += count;
                Ok(())
            }
            last => {
                let done = last.replace(Run { start: cluster, len: count });
                done.map_or(Ok(()), |run| runs.push(run))
            }
        }
    }

    /// Ends the last run, and tells the cluster behind it; 0 where there was none.
    pub(crate) fn end(self, runs: &mut Sequence<Run>) -> Result<u64> {
        self.0.map_or(Ok(0), |run| runs.push(run).map(|()| run.end()))
    }
}
