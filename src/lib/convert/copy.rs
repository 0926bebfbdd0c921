//! Writing what a plan says.

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::layers;
use super::tasks::{Held, Member, TASK, Task, Tasks};
use crate::build::layout::Layout;
use crate::build::writer::{NewImage, Traits};
use crate::dedup::plan::Plan;
use crate::dedup::reading::FirstReading;
use crate::digest::{Sha, sha256};
use crate::disk::Disk;
use crate::error::{Error, OrInternal, Result};
use crate::storage::Storage;
use crate::storage::buffer::BufferPool;
use crate::units::to_usize;
use crate::work::Work;

/// Writes the image that `plan` describes to `storage`, which is empty.
pub(super) fn write(
    disk: &Disk,
    (plan, first): (&Plan, &FirstReading),
    layout: Layout,
    traits: &Traits,
    limit: u64,
    storage: &dyn Storage,
    work: &Work,
) -> Result<()> {
    let bits = layout.parts.cluster_bits;
    let per_task = (TASK >> bits.bits()).max(1);
    let buffers = BufferPool::new(to_usize(per_task * bits.bytes()));
    let mut image = NewImage::new(storage, layout, layers(disk, plan, bits)?)?;
    let mut tasks = Tasks::new(per_task, first.expected(bits));
    let run = |tasks: &mut Vec<Task>, image: &mut NewImage<'_>| -> Result<()> {
        work.cancel.check()?;
        let named: Vec<Result<Vec<Sha>>> =
            tasks.par_iter().map(|task| copy((disk, first), &layout, task, storage, &buffers, work)).collect();
        for (task, names) in tasks.drain(..).zip(named) {
            for (member, sha) in task.members.iter().zip(names?) {
                image.member(sha, member.place, member.sharers >= limit)?;
            }
        }
        Ok(())
    };
    // No step has more than a batch of work, so that the loop is never long away from the cancel check.
    let batch = work.batch();
    for step in plan.steps(per_task * batch as u64) {
        let step = step?;
        image.step(&step)?;
        tasks.step(&step)?;
        if tasks.done.len() >= batch {
            run(&mut tasks.done, &mut image)?;
        }
    }
    tasks.close();
    run(&mut tasks.done, &mut image)?;
    image.finish(traits)
}

/// Copies the clusters of `task`; returns the SHA-256 of its members.
fn copy(
    (disk, first): (&Disk, &FirstReading),
    layout: &Layout,
    task: &Task,
    storage: &dyn Storage,
    buffers: &BufferPool,
    work: &Work,
) -> Result<Vec<Sha>> {
    let bits = layout.parts.cluster_bits;
    let mut buffer = buffers.take()?;
    let len = to_usize(task.count * bits.bytes());
    let content = buffer.get_mut(..len).or_internal("a task is longer than its buffer")?;
    task.read(&mut Held::new(disk, first, bits), content)?;
    let offset = layout.stored(task.first).offset(bits).0;
    storage.write_at(content, offset).map_err(|e| Error::io(format_args!("Could not write at {offset:#x}"), e))?;
    work.progress.advance(task.count * bits.bytes());
    let name = |member: &Member| {
        let at = to_usize(member.at) << bits.bits();
        let cluster = content.get(at..at + bits.len()).or_internal("a member lies outside of its task")?;
        Ok(sha256(cluster))
    };
    task.members.iter().map(name).collect()
}
