//! Writing what a plan says.

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use crate::dedup::plan::{Plan, Step};
use crate::digest::{Sha, sha256};
use crate::disk::{Disk, Reader};
use crate::error::{Error, Result};
use crate::image::layout::Layout;
use crate::image::writer::{NewImage, Traits};
use crate::storage::Storage;
use crate::storage::buffer::BufferPool;
use crate::units::{ClusterBits, GuestCluster};
use crate::work::Work;

/// Bytes that a worker reads, names and writes in one go.
const TASK: u64 = 1 << 20;

/// A run of stored clusters: one after the other in the file, from several places of the disk.
#[derive(Default)]
struct Task {
    /// The number of the first stored cluster.
    first: u64,
    /// How many.
    count: u64,
    /// Where they come from.
    pieces: Vec<(GuestCluster, u64)>,
    /// Which of them, counted from `first`, enter the pool, and whether they come retired.
    members: Vec<Member>,
}

#[derive(Clone, Copy)]
struct Member {
    at: u64,
    guest: GuestCluster,
    retired: bool,
}

/// Writes the image that `plan` describes to `storage`, which is empty.
pub(super) fn write(
    disk: &Disk,
    plan: &Plan,
    layout: Layout,
    traits: &Traits,
    limit: u64,
    storage: &dyn Storage,
    work: &Work<'_>,
) -> Result<()> {
    let bits = layout.parts.cluster_bits;
    let per_task = (TASK >> bits.bits()).max(1);
    let buffers = BufferPool::new(usize::try_from(per_task * bits.bytes()).unwrap_or(usize::MAX));
    let mut image = NewImage::new(storage, layout, traits.gap())?;
    let mut tasks = Tasks { per_task, done: Vec::new(), open: Task::default() };
    let run = |tasks: &mut Vec<Task>, image: &mut NewImage<'_>| -> Result<()> {
        work.cancel.check()?;
        let named: Vec<Result<Vec<Sha>>> =
            tasks.par_iter().map(|task| copy(disk, bits, &layout, task, storage, &buffers, work)).collect();
        for (task, names) in tasks.drain(..).zip(named) {
            for (member, sha) in task.members.iter().zip(names?) {
                image.member(sha, member.guest, member.retired)?;
            }
        }
        Ok(())
    };
    // No step has more than a batch of work, so that the loop is never long away from the cancel check.
    let batch = work.batch();
    for step in plan.steps(per_task * batch as u64) {
        let step = step?;
        image.step(&step)?;
        match step {
            Step::Private { guest, count } => tasks.add(guest, count),
            Step::Member { guest, sharers } => tasks.add_member(guest, sharers >= limit),
            Step::Shared { .. } => {}
        }
        if tasks.done.len() >= batch {
            run(&mut tasks.done, &mut image)?;
        }
    }
    tasks.close();
    run(&mut tasks.done, &mut image)?;
    image.finish(traits)
}

/// Collects steps into tasks.
struct Tasks {
    per_task: u64,
    done: Vec<Task>,
    open: Task,
}

impl Tasks {
    fn add(&mut self, guest: GuestCluster, count: u64) {
        let (mut guest, mut count) = (guest, count);
        while count > 0 {
            let some = count.min(self.per_task - self.open.count);
            match self.open.pieces.last_mut() {
                Some((start, len)) if start.0 + *len == guest.0 => *len += some,
                _ => self.open.pieces.push((guest, some)),
            }
            self.open.count += some;
            guest = GuestCluster(guest.0 + some);
            count -= some;
            if self.open.count == self.per_task {
                self.close();
            }
        }
    }

    fn add_member(&mut self, guest: GuestCluster, retired: bool) {
        self.open.members.push(Member { at: self.open.count, guest, retired });
        self.add(guest, 1);
    }

    fn close(&mut self) {
        let next = Task { first: self.open.first + self.open.count, ..Task::default() };
        let done = std::mem::replace(&mut self.open, next);
        if done.count > 0 {
            self.done.push(done);
        }
    }
}

/// Copies the clusters of `task`; returns the SHA-256 of its members.
fn copy(
    disk: &Disk,
    bits: ClusterBits,
    layout: &Layout,
    task: &Task,
    storage: &dyn Storage,
    buffers: &BufferPool,
    work: &Work<'_>,
) -> Result<Vec<Sha>> {
    let mut buffer = buffers.take().map_err(|e| Error::io("Could not get memory", e))?;
    let len = usize::try_from(task.count * bits.bytes()).unwrap_or(usize::MAX);
    let Some(content) = buffer.get_mut(..len) else { return Ok(Vec::new()) };
    let mut reader = Reader::sequential(disk);
    let mut rest = &mut *content;
    for (guest, count) in &task.pieces {
        let (piece, after) = rest.split_at_mut(usize::try_from(count * bits.bytes()).unwrap_or(usize::MAX));
        reader.read(guest.offset(bits).0, piece)?;
        rest = after;
    }
    let offset = layout.stored(task.first).offset(bits).0;
    storage.write_at(content, offset).map_err(|e| Error::io(format_args!("Could not write at {offset:#x}"), e))?;
    work.progress.advance(task.count * bits.bytes());
    let clusters = content.chunks_exact(bits.len());
    let names = task.members.iter().map(|member| {
        let at = usize::try_from(member.at).unwrap_or(usize::MAX);
        clusters.clone().nth(at).map(sha256).unwrap_or_default()
    });
    Ok(names.collect())
}
