//! Writing what a plan says.

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::tasks::{Batches, Held, Member, Task, buffers};
use crate::build::layers::Layers;
use crate::build::layout::Layout;
use crate::build::writer::{NewImage, Traits};
use crate::dedup::plan::Plan;
use crate::dedup::reading::FirstReading;
use crate::digest::{Sha, sha256};
use crate::disk::Disk;
use crate::error::{Context, OrInternal, Result};
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
    let buffers = buffers(bits);
    let mut image = NewImage::new(storage, layout, Layers::of(disk, plan, bits)?)?;
    let mut batches = Batches::new(plan, first, bits, work.batch());
    while let Some(tasks) = batches.next(|step| image.step(step))? {
        work.cancel.check()?;
        let named: Vec<Result<Vec<Sha>>> =
            tasks.par_iter().map(|task| copy((disk, first), &layout, task, storage, &buffers, work)).collect();
        for (task, names) in tasks.iter().zip(named) {
            for (member, sha) in task.members.iter().zip(names?) {
                image.member(sha, member.place, member.sharers >= limit)?;
            }
        }
    }
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
    storage.write_at(content, offset).writing(offset)?;
    work.progress.advance(task.count * bits.bytes());
    let name = |member: &Member| {
        let at = to_usize(member.at) << bits.bits();
        let cluster = content.get(at..at + bits.len()).or_internal("a member lies outside of its task")?;
        Ok(sha256(cluster))
    };
    task.members.iter().map(name).collect()
}
