//! Writing what a plan says.

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::layers;
use super::tasks::{TASK, Task, Tasks};
use crate::dedup::plan::Plan;
use crate::digest::{Sha, sha256};
use crate::disk::{Disk, Reader};
use crate::error::{Error, Result};
use crate::image::layout::Layout;
use crate::image::writer::{NewImage, Traits};
use crate::storage::Storage;
use crate::storage::buffer::BufferPool;
use crate::units::{ClusterBits, to_usize};
use crate::work::Work;

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
    let buffers = BufferPool::new(to_usize(per_task * bits.bytes()));
    let mut image = NewImage::new(storage, layout, layers(disk, plan, bits)?)?;
    let mut tasks = Tasks::new(per_task);
    let run = |tasks: &mut Vec<Task>, image: &mut NewImage<'_>| -> Result<()> {
        work.cancel.check()?;
        let named: Vec<Result<Vec<Sha>>> =
            tasks.par_iter().map(|task| copy(disk, bits, &layout, task, storage, &buffers, work)).collect();
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
        tasks.step(&step);
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
    disk: &Disk,
    bits: ClusterBits,
    layout: &Layout,
    task: &Task,
    storage: &dyn Storage,
    buffers: &BufferPool,
    work: &Work<'_>,
) -> Result<Vec<Sha>> {
    let mut buffer = buffers.take().map_err(|e| Error::io("Could not get memory", e))?;
    let len = to_usize(task.count * bits.bytes());
    let Some(content) = buffer.get_mut(..len) else { return Ok(Vec::new()) };
    task.read(&mut Reader::sequential(disk), bits, content)?;
    let offset = layout.stored(task.first).offset(bits).0;
    storage.write_at(content, offset).map_err(|e| Error::io(format_args!("Could not write at {offset:#x}"), e))?;
    work.progress.advance(task.count * bits.bytes());
    let clusters = content.chunks_exact(bits.len());
    let names = task.members.iter().map(|member| {
        let at = to_usize(member.at);
        clusters.clone().nth(at).map(sha256).unwrap_or_default()
    });
    Ok(names.collect())
}
