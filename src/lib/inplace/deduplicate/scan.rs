//! Reading every distinct data cluster once, in the order of the file.

use std::ops::Range;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use crate::dedup::verify::Clusters;
use crate::digest::is_zero;
use crate::edit::key::Key;
use crate::error::{IoContext, OrInternal, Result};
use crate::sort::bits::Bits;
use crate::sort::content::ContentAt;
use crate::sort::runs::tasks;
use crate::sort::sequence::{Sequence, Spill};
use crate::storage::buffer::BufferPool;
use crate::survey::units::Content;
use crate::units::to_usize;
use crate::work::Work;

/// Bytes that a worker reads in one go.
const TASK: u64 = 1 << 20;

/// What a scan found.
pub(crate) struct Scan {
    /// For each unit that is not zero, its key and its number.
    pub(crate) records: Sequence<ContentAt>,
    /// Units that hold nothing but zeros.
    pub(crate) zeros: Bits,
    /// Clusters that were read.
    pub(crate) read: u64,
}

/// Reads the units in `wanted`.
pub(crate) fn scan(content: &Content<'_>, wanted: &Bits, key: Key, spill: &Spill, work: &Work) -> Result<Scan> {
    let units = content.units;
    let bits = content.cluster_bits();
    let per_task = (TASK >> bits.bits()).max(1);
    let buffers = BufferPool::new(to_usize(per_task << bits.bits()));
    let mut scan = Scan { records: Sequence::new(spill), zeros: Bits::new(units.limit()), read: 0 };
    let mut tasks = Tasks { content, wanted: wanted.iter(), data: Some(0..0), per_task };
    loop {
        work.cancel.check()?;
        let batch = tasks.batch(work.batch(), &mut scan.zeros)?;
        if batch.is_empty() {
            break;
        }
        let scanned: Vec<Result<Vec<ContentAt>>> =
            batch.par_iter().map(|task| scan_task(content, key, task, &buffers)).collect();
        for (task, records) in batch.iter().zip(scanned) {
            let records = records?;
            let count = task.iter().map(|run| run.end - run.start).sum::<u64>();
            scan.read += count;
            let mut found = records.iter().map(|record| record.cluster()).peekable();
            for unit in task.iter().cloned().flatten() {
                if found.next_if_eq(&unit).is_none() {
                    scan.zeros.insert(unit);
                }
            }
            scan.records.extend(&records)?;
            work.progress.advance(count << bits.bits());
        }
    }
    Ok(scan)
}

/// Cuts the units to read into tasks: runs of units, together no longer than a buffer.
struct Tasks<'a, I: Iterator<Item = u64>> {
    content: &'a Content<'a>,
    wanted: I,
    /// The part of the file around the last unit that is no hole; `None` where only holes follow.
    data: Option<Range<u64>>,
    per_task: u64,
}

impl<I: Iterator<Item = u64>> Tasks<'_, I> {
    /// Up to `count` more tasks; units that lie in holes go to `zeros`.
    fn batch(&mut self, count: usize, zeros: &mut Bits) -> Result<Vec<Vec<Range<u64>>>> {
        let per_task = self.per_task;
        let next = || {
            while let Some(unit) = self.wanted.next() {
                if !self.is_hole(unit)? {
                    return Ok(Some(unit));
                }
                zeros.insert(unit);
            }
            Ok(None)
        };
        tasks(next, per_task, count)
    }

    /// Whether a plain unit lies in a hole of the file, which reads as zeros.
    fn is_hole(&mut self, unit: u64) -> Result<bool> {
        let units = self.content.units;
        if !units.plain().contains(&unit) {
            return Ok(false);
        }
        let bytes = units.bytes(unit);
        if self.data.as_ref().is_some_and(|data| data.end <= bytes.start) {
            self.data = self.content.storage.next_data(bytes.start).at("Could not look for holes")?;
        }
        Ok(self.data.as_ref().is_none_or(|data| data.start >= bytes.end))
    }
}

/// The records of the units of `task` that are not zero.
fn scan_task(content: &Content<'_>, key: Key, task: &[Range<u64>], buffers: &BufferPool) -> Result<Vec<ContentAt>> {
    let bits = content.cluster_bits();
    let mut buffer = buffers.take()?;
    let mut reader = content.in_order();
    let mut records = Vec::new();
    let mut parts = Vec::new();
    for run in task {
        let len = to_usize((run.end - run.start) << bits.bits());
        let piece = buffer.get_mut(..len).or_internal("a run is longer than its buffer")?;
        reader.read(run.start, piece)?;
        for (unit, cluster) in run.clone().zip(piece.chunks_exact(bits.len())) {
            if !is_zero(cluster) {
                records.push(key.record(cluster, unit, &mut parts));
            }
        }
    }
    Ok(records)
}
