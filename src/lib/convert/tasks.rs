//! What a plan stores, cut into tasks for workers.

use std::mem;

use crate::dedup::plan::{Plan, Step, Steps};
use crate::dedup::reading::{Expected, FirstReading, Hold};
use crate::disk::{Disk, Reader};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::Result;
use crate::sort::content::ContentAt;
use crate::storage::buffer::BufferPool;
use crate::units::{ClusterBits, RowCluster, RowPlace, StoredCluster, to_usize};

/// Bytes that a worker reads, names and writes in one go.
const TASK: u64 = 1 << 20;

/// A run of stored clusters: one after the other in the file, from several places of the disk.
#[derive(Default)]
pub(super) struct Task {
    /// The first stored cluster.
    pub(super) first: StoredCluster,
    /// How many.
    pub(super) count: u64,
    /// Where they come from.
    pub(super) pieces: Vec<(RowCluster, u64)>,
    /// What each of them was when it was read first.
    expected: Vec<ContentAt>,
    /// Which of them, counted from `first`, enter the pool.
    pub(super) members: Vec<Member>,
    /// How many layers use those of the others that have not only one, as runs counted from `first`.
    pub(super) users: Vec<(u64, u64, u64)>,
}

#[derive(Clone, Copy)]
pub(super) struct Member {
    pub(super) at: u64,
    /// The lowest place of a disk that uses it.
    pub(super) place: RowPlace,
    /// Guest clusters that use it.
    pub(super) sharers: u64,
}

/// The most clusters of `bits` that a task has.
fn per_task(bits: ClusterBits) -> u64 {
    (TASK >> bits.bits()).max(1)
}

/// Buffers for the content of a task.
pub(super) fn buffers(bits: ClusterBits) -> BufferPool {
    BufferPool::new(to_usize(per_task(bits) * bits.bytes()))
}

/// A plan as batches of tasks. No step has more than a batch of work, so that whoever works on them is never long away from the
/// cancel check.
pub(super) struct Batches<'a> {
    steps: Steps<'a>,
    tasks: Tasks<'a>,
    most: usize,
}

impl<'a> Batches<'a> {
    /// Batches of `most` tasks of what `plan` stores, which `first` was the first reading of.
    pub(super) fn new(plan: &'a Plan, first: &'a FirstReading, bits: ClusterBits, most: usize) -> Self {
        let steps = plan.steps(Self::longest_step(bits, most));
        Self { steps, tasks: Tasks::new(per_task(bits), first.expected(bits)), most }
    }

    /// The most clusters of a step.
    pub(super) fn longest_step(bits: ClusterBits, most: usize) -> u64 {
        per_task(bits) * most as u64
    }

    /// The next batch; `each` sees the steps that lead to it.
    ///
    /// # Errors
    /// Those of `each` and of the temporary files.
    pub(super) fn next(&mut self, mut each: impl FnMut(&Step) -> Result<()>) -> Result<Option<Vec<Task>>> {
        for step in self.steps.by_ref() {
            let step = step?;
            each(&step)?;
            self.tasks.step(&step)?;
            if self.tasks.done.len() >= self.most {
                return Ok(Some(mem::take(&mut self.tasks.done)));
            }
        }
        self.tasks.close();
        let rest = mem::take(&mut self.tasks.done);
        Ok((!rest.is_empty()).then_some(rest))
    }
}

/// Collects steps into tasks.
struct Tasks<'a> {
    per_task: u64,
    expected: Expected<'a>,
    /// Those that are full.
    done: Vec<Task>,
    open: Task,
}

impl<'a> Tasks<'a> {
    /// Tasks of up to `per_task` clusters, which were read before as `expected` says.
    fn new(per_task: u64, expected: Expected<'a>) -> Self {
        Self { per_task, expected, done: Vec::new(), open: Task::default() }
    }

    fn add(&mut self, row: RowCluster, count: u64, users: u64) -> Result<()> {
        let (mut row, mut count) = (row, count);
        while count > 0 {
            let some = count.min(self.per_task - self.open.count);
            for cluster in row.0..row.0 + some {
                self.open.expected.push(self.expected.of(cluster)?);
            }
            match self.open.pieces.last_mut() {
                Some((start, len)) if start.0 + *len == row.0 => *len += some,
                _ => self.open.pieces.push((row, some)),
            }
            if users > 1 {
                self.open.users.push((self.open.count, some, users));
            }
            self.open.count += some;
            row = RowCluster(row.0 + some);
            count -= some;
            if self.open.count == self.per_task {
                self.close();
            }
        }
        Ok(())
    }

    /// Adds what `step` stores.
    ///
    /// # Errors
    /// Those of the temporary files.
    fn step(&mut self, step: &Step) -> Result<()> {
        match *step {
            Step::Private { row, count, users } => self.add(row, count, users),
            Step::Member { row, sharers, place } => {
                self.open.members.push(Member { at: self.open.count, place, sharers });
                self.add(row, 1, 1)
            }
            Step::Shared { .. } | Step::Zero { .. } | Step::Inherited { .. } | Step::InheritedTable { .. } => Ok(()),
        }
    }

    /// Ends the task that is being filled.
    fn close(&mut self) {
        let next = Task { first: self.open.first.after(self.open.count), ..Task::default() };
        let done = mem::replace(&mut self.open, next);
        if done.count > 0 {
            self.done.push(done);
        }
    }
}

/// Reads clusters of a disk again, and holds them against the first reading (I10).
pub(super) struct Held<'a> {
    disk: &'a Disk,
    pub(super) reader: Reader<'a>,
    hold: Hold,
    bits: ClusterBits,
}

impl<'a> Held<'a> {
    /// A reader of clusters of `bits`, of which `first` was the first reading.
    pub(super) fn new(disk: &'a Disk, first: &FirstReading, bits: ClusterBits) -> Self {
        Self { disk, reader: Reader::sequential(disk), hold: first.hold(), bits }
    }

    /// Fills `content` with the clusters from `row`, which are to be what `records` say.
    ///
    /// # Errors
    /// Those of reading; [`ErrorKind::Changed`] where one is not.
    pub(super) fn read(&mut self, row: RowCluster, content: &mut [u8], records: &[ContentAt]) -> Result<()> {
        let offset = row.offset(self.bits);
        self.reader.read(offset, content)?;
        for ((cluster, record), at) in content.chunks_exact(self.bits.len()).zip(records).zip(0u64..) {
            if !self.hold.is_same(cluster, *record) {
                return Err(self.disk.changed_at(offset + (at << self.bits.bits())));
            }
        }
        Ok(())
    }
}

impl Task {
    /// How many layers use the cluster at `at`, counted from `first`, which is no member.
    pub(super) fn users_of(&self, at: u64) -> u64 {
        let run =
            self.users.partition_point(|(start, ..)| *start <= at).checked_sub(1).and_then(|run| self.users.get(run));
        run.filter(|(start, count, _)| at < start + count).map_or(1, |(.., users)| *users)
    }

    /// Reads the clusters into `content`.
    ///
    /// # Errors
    /// Those of reading; [`ErrorKind::Changed`] where one is not what it was when it was read first.
    pub(super) fn read(&self, reader: &mut Held<'_>, content: &mut [u8]) -> Result<()> {
        let mut rest = content;
        let mut expected = self.expected.as_slice();
        for (row, count) in &self.pieces {
            let (piece, after) = rest.split_at_mut(to_usize(count * reader.bits.bytes()));
            let (records, others) = expected.split_at(to_usize(*count));
            reader.read(*row, piece, records)?;
            (rest, expected) = (after, others);
        }
        Ok(())
    }

    /// The clusters one by one: where each comes from, and what it was when it was read first.
    pub(super) fn rows(&self) -> impl Iterator<Item = (RowCluster, ContentAt)> + '_ {
        let rows = self.pieces.iter().flat_map(|&(first, count)| (first.0..first.0 + count).map(RowCluster));
        rows.zip(self.expected.iter().copied())
    }
}
