//! Bytes decide (I4): every link is compared before it is believed.

use rayon::iter::ParallelIterator;
use rayon::slice::ParallelSlice;

use super::group::{Link, group};
use super::scan::record;
use super::sequence::{Sorted, Sorter, Spill, Words};
use crate::digest::sha256;
use crate::disk::{Disk, Reader};
use crate::error::{Error, Result};
use crate::storage::buffer::BufferPool;
use crate::units::ClusterBits;
use crate::work::Work;

/// Bytes compared at once.
const PIECE: usize = 256 << 10;
/// Links that one worker takes at a time, at most.
const SHARE: usize = 256;

/// Links that one worker takes at a time: about a MiB, so that nobody waits long for the last one.
fn share(bits: ClusterBits) -> usize {
    ((1 << 20) >> bits.bits()).clamp(1, SHARE)
}
/// Compares the bytes behind `links` (sorted by duplicate) and returns those that are true, sorted by duplicate.
///
/// Clusters that differ from their keeper are grouped once more, by SHA-256, and compared again; what differs even then stays
/// alone. Nature needs no second round: it is for disks whose author made fingerprints collide on purpose.
///
/// # Errors
/// Those of reading the disk and of the temporary files.
pub fn verify(
    disk: &Disk,
    bits: ClusterBits,
    links: Sorted,
    limit: u64,
    spill: &Spill,
    work: &Work<'_>,
) -> Result<Sorted> {
    let wrong = compare_all(disk, bits, &links, spill, work)?;
    if wrong.is_empty() {
        return Ok(links);
    }
    let mut good = Sorter::new(spill);
    keep(&links, &wrong, &mut good)?;
    drop(links);
    let records = rename(disk, bits, &wrong, spill, work)?;
    let again = group(&records, limit, spill)?;
    let wrong = compare_all(disk, bits, &again, spill, work)?;
    keep(&again, &wrong, &mut good)?;
    good.finish()
}

/// Adds the links that are not among the wrong ones to `good`.
fn keep(links: &Sorted, wrong: &Sorted, good: &mut Sorter) -> Result<()> {
    let mut wrong = wrong.iter();
    let mut next = wrong.next().transpose()?;
    for word in links.iter() {
        let word = word?;
        if next == Some(word) {
            next = wrong.next().transpose()?;
        } else {
            good.push(word)?;
        }
    }
    Ok(())
}

/// Records of the duplicates in `wrong` with the SHA-256 of their content for a fingerprint.
fn rename(disk: &Disk, bits: ClusterBits, wrong: &Sorted, spill: &Spill, work: &Work<'_>) -> Result<Sorted> {
    let mut records = Sorter::new(spill);
    let mut words = wrong.iter();
    loop {
        work.cancel.check()?;
        let batch = next_batch(&mut words, bits, work)?;
        if batch.is_empty() {
            break;
        }
        let shares: Vec<Result<Vec<u128>>> =
            batch.par_chunks(share(bits)).map(|share| names(disk, bits, share)).collect();
        for share in shares {
            for word in share? {
                records.push(word)?;
            }
        }
    }
    records.finish()
}

fn names(disk: &Disk, bits: ClusterBits, share: &[Link]) -> Result<Vec<u128>> {
    let mut reader = Reader::sequential(disk);
    let mut content = vec![0; bits.len()];
    let name = |link: &Link| {
        reader.read(link.duplicate << bits.bits(), &mut content)?;
        let sha = sha256(&content);
        Ok(record(u128::from_be_bytes(*sha.first_chunk().unwrap_or(&[0; 16])), link.duplicate))
    };
    share.iter().map(name).collect()
}

/// Up to a batch of links.
fn next_batch(words: &mut Words<'_>, bits: ClusterBits, work: &Work<'_>) -> Result<Vec<Link>> {
    words.take(work.batch() * share(bits)).map(|word| word.map(Link::from_duplicate)).collect()
}

/// The links whose bytes differ, sorted by duplicate.
fn compare_all(disk: &Disk, bits: ClusterBits, links: &Sorted, spill: &Spill, work: &Work<'_>) -> Result<Sorted> {
    let buffers = BufferPool::new(2 * PIECE.max(bits.len()));
    let mut wrong = Sorter::new(spill);
    let mut words = links.iter();
    loop {
        work.cancel.check()?;
        let batch = next_batch(&mut words, bits, work)?;
        if batch.is_empty() {
            break;
        }
        let results: Vec<Result<Vec<Link>>> =
            batch.par_chunks(share(bits)).map(|share| compare(disk, bits, share, &buffers)).collect();
        for result in results {
            for link in result? {
                wrong.push(link.by_duplicate())?;
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
