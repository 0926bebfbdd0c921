//! Reading a disk once: which clusters are not zero, and the fingerprint of each.

use std::ops::Range;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::sequence::{Sequence, Spill};
use super::{INDEX, INDEX_BITS};
use crate::digest::{fingerprint, is_zero};
use crate::disk::chunks::{CHUNK, Chunks};
use crate::disk::{Disk, Reader};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::buffer::BufferPool;
use crate::units::ClusterBits;
use crate::work::Work;

/// Bytes read at once: small enough to stay in the processor's cache until they are hashed.
const PIECE: u64 = 256 << 10;

/// What a scan found.
pub struct Scan {
    /// For each cluster that is not zero, in guest order: the high 88 bits of its fingerprint, then its index.
    pub records: Sequence,
    /// The cluster size of the records.
    pub grain: ClusterBits,
    /// Bytes read: what was not known to be zeros without reading.
    pub bytes_read: u64,
}

/// Scans `disk` in clusters of `grain`.
///
/// # Errors
/// Those of reading; [`ErrorKind::Limit`] for a disk of more than 2^40 clusters.
pub fn scan(disk: &Disk, grain: ClusterBits, spill: &Spill, work: &Work<'_>) -> Result<Scan> {
    if grain.clusters(disk.size()) > 1 << INDEX_BITS {
        let message = format!("the disk has more than 2^{INDEX_BITS} clusters; use a larger cluster_size");
        return Err(Error::new(ErrorKind::Limit, message));
    }
    let buffers = BufferPool::new(usize::try_from(CHUNK).unwrap_or(usize::MAX));
    let mut scan = Scan { records: Sequence::new(spill), grain, bytes_read: 0 };
    let mut chunks = Chunks::new(disk);
    let mut position = 0;
    loop {
        work.cancel.check()?;
        let batch = chunks.batch(work.batch())?;
        if batch.is_empty() {
            break;
        }
        let results: Vec<Result<ChunkScan>> =
            batch.par_iter().map(|chunk| scan_chunk(disk, grain, chunk.clone(), &buffers)).collect();
        for result in results {
            let chunk = result?;
            scan.records.extend(&chunk.records)?;
            scan.bytes_read += chunk.bytes_read;
        }
        work.progress.advance(chunks.position() - position);
        position = chunks.position();
    }
    disk.settle();
    Ok(scan)
}

struct ChunkScan {
    records: Vec<u128>,
    bytes_read: u64,
}

fn scan_chunk(disk: &Disk, grain: ClusterBits, chunk: Range<u64>, buffers: &BufferPool) -> Result<ChunkScan> {
    let mut reader = Reader::sequential(disk);
    let mut buffer = buffers.take().map_err(|e| Error::io("Could not get memory", e))?;
    let mut runs = Vec::new();
    reader.data_runs(chunk, grain.bytes(), &mut runs)?;
    let clusters: u64 = runs.iter().map(|run| grain.clusters(run.end - run.start)).sum();
    let mut found = ChunkScan { records: Vec::with_capacity(usize::try_from(clusters).unwrap_or(0)), bytes_read: 0 };
    let step = PIECE.max(disk.preferred_read()).max(grain.bytes());
    for run in runs {
        found.bytes_read += run.end - run.start;
        let mut at = run.start;
        while at < run.end {
            // Pieces end where larger clusters of the source do. The last cluster of the disk is padded with zeros.
            let end = ((at + step) & !(step - 1)).min(run.end);
            let len = usize::try_from((end - at).next_multiple_of(grain.bytes())).unwrap_or(usize::MAX);
            let Some(piece) = buffer.get_mut(..len) else { break };
            reader.read(at, piece)?;
            for (cluster, content) in (at >> grain.bits()..).zip(piece.chunks_exact(grain.len())) {
                if !is_zero(content) {
                    found.records.push(record(fingerprint(content), cluster));
                }
            }
            at = end;
        }
    }
    Ok(found)
}

/// A record: 88 bits of a fingerprint, then the cluster that has it.
pub(crate) fn record(fingerprint: u128, cluster: u64) -> u128 {
    fingerprint & !INDEX | u128::from(cluster)
}
