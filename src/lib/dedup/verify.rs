//! Bytes decide (I4): every link is compared before it is believed.

use rayon::iter::ParallelIterator;
use rayon::slice::ParallelSlice;

use crate::dedup::group::{ByDuplicate, Link};
use crate::digest::{Fingerprint, sha256};
use crate::disk::chunks::PIECE;
use crate::disk::{Disk, Reader};
use crate::error::{OrInternal, Result};
use crate::sort::content::ContentAt;
use crate::sort::sequence::{Sorted, Sorter, Spill, Words};
use crate::storage::buffer::BufferPool;
use crate::units::{ClusterBits, to_usize};
use crate::work::Work;

/// Links that one worker takes at a time, at most.
const SHARE: usize = 256;

/// Links that one worker takes at a time: about a MiB, so that nobody waits long for the last one.
fn share(bits: ClusterBits) -> usize {
    ((1 << 20) >> bits.bits()).clamp(1, SHARE)
}

/// Clusters that can be read by their number.
pub(crate) trait Clusters: Sync {
    /// Their size.
    fn cluster_bits(&self) -> ClusterBits;
    /// A reader for ascending numbers.
    fn in_order(&self) -> Box<dyn ReadClusters + '_>;
    /// A reader for numbers in any order.
    fn at_random(&self) -> Box<dyn ReadClusters + '_>;
}

/// Reads clusters; each thread has its own reader.
pub(crate) trait ReadClusters {
    /// Fills `buffer` with clusters `first` and those that follow it.
    ///
    /// # Errors
    /// Those of reading and decompressing.
    fn read(&mut self, first: u64, buffer: &mut [u8]) -> Result<()>;
}

/// The clusters of a disk in guest order.
pub(crate) struct GuestClusters<'a> {
    /// The disk.
    pub disk: &'a Disk,
    /// The size of its clusters, whatever they are in its own files.
    pub cluster_bits: ClusterBits,
}

impl Clusters for GuestClusters<'_> {
    fn cluster_bits(&self) -> ClusterBits {
        self.cluster_bits
    }

    fn in_order(&self) -> Box<dyn ReadClusters + '_> {
        Box::new((Reader::sequential(self.disk), self.cluster_bits))
    }

    fn at_random(&self) -> Box<dyn ReadClusters + '_> {
        Box::new((Reader::random(self.disk), self.cluster_bits))
    }
}

impl ReadClusters for (Reader<'_>, ClusterBits) {
    fn read(&mut self, first: u64, buffer: &mut [u8]) -> Result<()> {
        self.0.read(first << self.1.bits(), buffer)
    }
}

/// Compares the bytes behind `links` (sorted by duplicate) and returns those that are true, sorted by duplicate.
///
/// Clusters that differ from their keeper are grouped once more, by SHA-256, and compared again; what differs even then stays
/// alone. Nature needs no second round: it is for disks whose author made fingerprints collide on purpose.
///
/// # Errors
/// Those of reading the clusters and of the temporary files.
pub(crate) fn verify(
    clusters: &impl Clusters,
    links: Sorted<ByDuplicate>,
    regroup: impl FnOnce(&Sorted<ContentAt>) -> Result<Sorted<ByDuplicate>>,
    spill: &Spill,
    work: &Work,
) -> Result<Sorted<ByDuplicate>> {
    let wrong = compare_all(clusters, &links, spill, work)?;
    if wrong.is_empty() {
        return Ok(links);
    }
    let mut good = Sorter::new(spill);
    keep(&links, &wrong, &mut good)?;
    drop(links);
    let records = rename(clusters, &wrong, spill, work)?;
    let again = regroup(&records)?;
    let wrong = compare_all(clusters, &again, spill, work)?;
    keep(&again, &wrong, &mut good)?;
    good.finish()
}

/// Adds the links that are not among the wrong ones to `good`.
fn keep(links: &Sorted<ByDuplicate>, wrong: &Sorted<ByDuplicate>, good: &mut Sorter<ByDuplicate>) -> Result<()> {
    let mut wrong = wrong.iter();
    let mut next = wrong.next().transpose()?;
    for link in links.iter() {
        let link = link?;
        if next == Some(link) {
            next = wrong.next().transpose()?;
        } else {
            good.push(link)?;
        }
    }
    Ok(())
}

/// Records of the duplicates in `wrong` with the SHA-256 of their content for a fingerprint.
fn rename(
    clusters: &impl Clusters,
    wrong: &Sorted<ByDuplicate>,
    spill: &Spill,
    work: &Work,
) -> Result<Sorted<ContentAt>> {
    let bits = clusters.cluster_bits();
    let mut records = Sorter::new(spill);
    let mut links = wrong.iter();
    loop {
        work.cancel.check()?;
        let batch = next_batch(&mut links, bits, work)?;
        if batch.is_empty() {
            break;
        }
        let shares: Vec<Result<Vec<ContentAt>>> =
            batch.par_chunks(share(bits)).map(|share| names(clusters, share)).collect();
        for share in shares {
            for record in share? {
                records.push(record)?;
            }
        }
    }
    records.finish()
}

fn names(clusters: &impl Clusters, share: &[Link]) -> Result<Vec<ContentAt>> {
    let mut reader = clusters.in_order();
    let mut content = vec![0; clusters.cluster_bits().len()];
    let name = |link: &Link| {
        reader.read(link.duplicate, &mut content)?;
        Ok(ContentAt::new(Fingerprint::of_sha(&sha256(&content)), link.duplicate))
    };
    share.iter().map(name).collect()
}

/// Up to a batch of links.
fn next_batch(links: &mut Words<'_, ByDuplicate>, bits: ClusterBits, work: &Work) -> Result<Vec<Link>> {
    links.take(work.batch() * share(bits)).map(|link| link.map(|ByDuplicate(link)| link)).collect()
}

/// The links whose bytes differ, sorted by duplicate.
fn compare_all(
    clusters: &impl Clusters,
    links: &Sorted<ByDuplicate>,
    spill: &Spill,
    work: &Work,
) -> Result<Sorted<ByDuplicate>> {
    let bits = clusters.cluster_bits();
    let buffers = BufferPool::new(2 * to_usize(PIECE).max(bits.len()));
    let mut wrong = Sorter::new(spill);
    let mut links = links.iter();
    loop {
        work.cancel.check()?;
        let batch = next_batch(&mut links, bits, work)?;
        if batch.is_empty() {
            break;
        }
        let results: Vec<Result<Vec<Link>>> =
            batch.par_chunks(share(bits)).map(|share| compare(clusters, share, &buffers)).collect();
        for result in results {
            for link in result? {
                wrong.push(ByDuplicate(link))?;
            }
        }
        work.progress.advance(batch.len() as u64 * bits.bytes());
    }
    wrong.finish()
}

/// The links of `share` whose bytes differ.
fn compare(clusters: &impl Clusters, share: &[Link], buffers: &BufferPool) -> Result<Vec<Link>> {
    let bits = clusters.cluster_bits();
    let mut wrong = Vec::new();
    let mut buffer = buffers.take()?;
    let half = buffer.len() / 2;
    let (ours, theirs) = buffer.split_at_mut(half);
    let mut duplicates = clusters.in_order();
    let mut keepers = clusters.at_random();
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
        let ours = ours.get_mut(..len).or_internal("a run of links is longer than its buffer")?;
        let theirs = theirs.get_mut(..len).or_internal("a run of links is longer than its buffer")?;
        duplicates.read(first.duplicate, ours)?;
        keepers.read(first.keeper, theirs)?;
        if ours != theirs {
            let pairs = ours.chunks_exact(bits.len()).zip(theirs.chunks_exact(bits.len()));
            wrong.extend(links.iter().zip(pairs).filter(|(_, (a, b))| a != b).map(|(link, _)| *link));
        }
        rest = after;
    }
    Ok(wrong)
}
