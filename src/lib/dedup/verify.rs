//! Bytes decide (I4): every link is compared before it is believed.

use rayon::iter::ParallelIterator;
use rayon::slice::ParallelSlice;

use super::group::Link;
use super::sequence::{Sorted, Sorter, Spill};
use crate::disk::{Disk, Reader};
use crate::error::{Error, Result};
use crate::storage::buffer::BufferPool;
use crate::units::ClusterBits;
use crate::work::Work;

/// Bytes compared at once.
const PIECE: usize = 256 << 10;
/// Links that one worker takes at a time.
const SHARE: usize = 256;
/// How often clusters of equal fingerprints and different bytes are regrouped. Nature needs no round; somebody who makes
/// collisions on purpose gets what he made stored once for each cluster, in bounded time.
const ROUNDS: usize = 8;

/// Compares the bytes behind `links` (sorted by duplicate) and returns those that are true, sorted by duplicate.
///
/// Clusters that differ from their keeper are compared among themselves, a few times; what is still alone then stays alone.
///
/// # Errors
/// Those of reading the disk and of the temporary files.
pub fn verify(disk: &Disk, bits: ClusterBits, links: Sorted, spill: &Spill, work: &Work<'_>) -> Result<Sorted> {
    let mut wrong = compare_all(disk, bits, &links, spill, work)?;
    if wrong.is_empty() {
        return Ok(links);
    }
    let mut good = Sorter::new(spill);
    let mut pending = links;
    for _ in 0..ROUNDS {
        keep(&pending, &wrong, &mut good)?;
        pending = regroup(&wrong, spill)?;
        wrong = compare_all(disk, bits, &pending, spill, work)?;
        if wrong.is_empty() {
            break;
        }
    }
    keep(&pending, &wrong, &mut good)?;
    good.finish()
}

/// Adds the links that are not among the wrong ones to `good`.
fn keep(links: &Sorted, wrong: &Sorted, good: &mut Sorter) -> Result<()> {
    let mut by_duplicate = Sorter::new(&good.spill());
    for word in wrong.iter() {
        by_duplicate.push(Link::from_keeper(word?).by_duplicate())?;
    }
    let wrong = by_duplicate.finish()?;
    let mut wrong = wrong.iter().peekable();
    for word in links.iter() {
        let word = word?;
        match wrong.peek() {
            Some(Ok(w)) if *w == word => {
                wrong.next();
            }
            _ => good.push(word)?,
        }
    }
    Ok(())
}

/// Links the wrong ones of each keeper to the first of them.
fn regroup(wrong: &Sorted, spill: &Spill) -> Result<Sorted> {
    let mut links = Sorter::new(spill);
    let mut first: Option<Link> = None;
    for word in wrong.iter() {
        let link = Link::from_keeper(word?);
        match first {
            Some(f) if f.keeper == link.keeper => {
                links.push(Link { duplicate: link.duplicate, keeper: f.duplicate }.by_duplicate())?;
            }
            _ => first = Some(link),
        }
    }
    links.finish()
}

/// The links whose bytes differ, sorted by keeper.
fn compare_all(disk: &Disk, bits: ClusterBits, links: &Sorted, spill: &Spill, work: &Work<'_>) -> Result<Sorted> {
    let buffers = BufferPool::new(2 * PIECE.max(bits.len()));
    let mut wrong = Sorter::new(spill);
    let mut words = links.iter();
    loop {
        work.cancel.check()?;
        let batch: Vec<Link> = words
            .by_ref()
            .take(work.batch() * SHARE)
            .map(|word| word.map(Link::from_duplicate))
            .collect::<Result<_>>()?;
        if batch.is_empty() {
            break;
        }
        let results: Vec<Result<Vec<Link>>> =
            batch.par_chunks(SHARE).map(|share| compare(disk, bits, share, &buffers)).collect();
        for result in results {
            for link in result? {
                wrong.push(link.by_keeper())?;
            }
        }
        work.progress.advance(batch.len() as u64 * bits.bytes());
    }
    wrong.finish()
}

/// The links of `share` whose bytes differ.
fn compare(disk: &Disk, bits: ClusterBits, share: &[Link], buffers: &BufferPool) -> Result<Vec<Link>> {
    let mut wrong = Vec::new();
    let mut buffer = buffers.take().map_err(|e| Error::io("Could not get memory", e))?;
    let half = buffer.len() / 2;
    let (ours, theirs) = buffer.split_at_mut(half);
    let mut duplicates = Reader::sequential(disk);
    let mut keepers = Reader::random(disk);
    // Copies of files are runs of duplicates with runs of keepers: both sides are read in one piece.
    let mut rest = share;
    while let Some(first) = rest.first() {
        let run = rest
            .iter()
            .zip(0..)
            .take(half >> bits.bits())
            .take_while(|(link, n)| link.duplicate == first.duplicate + n && link.keeper == first.keeper + n)
            .count();
        let (links, after) = rest.split_at(run);
        let len = links.len() << bits.bits();
        let (Some(ours), Some(theirs)) = (ours.get_mut(..len), theirs.get_mut(..len)) else { break };
        duplicates.read(first.duplicate << bits.bits(), ours)?;
        keepers.read(first.keeper << bits.bits(), theirs)?;
        if ours != theirs {
            let pairs = ours.chunks_exact(bits.len()).zip(theirs.chunks_exact(bits.len()));
            wrong.extend(links.iter().zip(pairs).filter(|(_, (a, b))| a != b).map(|(link, _)| *link));
        }
        rest = after;
    }
    Ok(wrong)
}
