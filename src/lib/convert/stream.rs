//! Converting in one pass: what is new is written as soon as it is read, what is not is compared while it is in memory.
//!
//! ```text
//!  batch:  read, fingerprint (parallel) -> look up, in guest order -> compare, name (parallel) -> write, while the next is read
//!  end:    the plan that grouping would have made -> metadata
//! ```
//!
//! The table of fingerprints must fit into memory, and the cluster size must be known. The file is that of the way in several
//! passes, byte for byte; where a fingerprint has deceived, that way is taken after all.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;

use rayon::iter::{IntoParallelIterator, IntoParallelRefMutIterator, ParallelIterator};

use super::options::Sharing;
use crate::build::layout::{Layout, Parts};
use crate::build::writer::{NewImage, Traits};
use crate::dedup::group::{ByDuplicate, Link};
use crate::dedup::level::DataRuns;
use crate::dedup::plan::{Plan, Step};
use crate::digest::{Sha, fingerprint, sha256};
use crate::disk::chunks::{CHUNK, Chunks, PIECE};
use crate::disk::{Disk, Reader};
use crate::error::{Error, OrInternal, Result};
use crate::pool::Pin;
use crate::sort::record::record;
use crate::sort::sequence::{Sequence, Sorted, Sorter, Spill, Words};
use crate::storage::buffer::no_memory;
use crate::storage::buffer::{Buffer, BufferPool};
use crate::storage::{Storage, write};
use crate::units::{ClusterBits, HostOffset, StoredCluster, to_usize};
use crate::work::Work;

/// Memory for a cluster in the table, with the room in which tables grow.
const PER_CLUSTER: u64 = 60;
/// A content that has more sharers than this is left to the other way.
const MAX_SHARERS: u64 = (1 << SHARER_BITS) - 1;
const SHARER_BITS: u32 = 24;

/// What was written.
pub(super) struct Streamed {
    pub(super) plan: Plan,
    pub(super) layout: Layout,
    /// Read to find fingerprints.
    pub(super) bytes_read: u64,
}

/// Whether the table for `disk` in clusters of `bits` fits into memory.
pub(super) fn fits(disk: &Disk, bits: ClusterBits, work: &Work) -> Result<bool> {
    let most = work.table_memory() / PER_CLUSTER;
    let mut chunks = Chunks::new(disk);
    let mut clusters = 0;
    loop {
        let batch = chunks.batch(work.batch())?;
        clusters += batch.iter().map(|chunk| bits.clusters(chunk.end - chunk.start)).sum::<u64>();
        if batch.is_empty() || clusters > most {
            return Ok(clusters <= most);
        }
        work.cancel.check()?;
    }
}

/// Writes `disk` as an image of `parts`, whose tables and data are not known yet, to `storage`, which is empty. `None` where it
/// cannot be done in one pass: what was written is of no use then.
pub(super) fn stream(
    disk: &Disk,
    parts: Parts,
    sharing: Sharing,
    (traits, limit): (&Traits, u64),
    storage: &dyn Storage,
    spill: &Spill,
    work: &Work,
) -> Result<Option<Streamed>> {
    let bits = parts.cluster_bits;
    let copier = Copier {
        disk,
        bits,
        sharing,
        storage,
        data: Layout::new(parts)?.data.start.offset(bits),
        buffers: BufferPool::new(to_usize(CHUNK)),
        pieces: BufferPool::new(to_usize(PIECE.max(bits.bytes()))),
    };
    let small = spill.share(4);
    let mut index = Index { sharing, limit, contents: HashMap::default(), stored: StoredCluster(0) };
    let mut runs = DataRuns::new(&small, bits);
    let (mut links, mut names) = (Sequence::new(spill), Names::new(spill));
    let mut bytes_read = 0;
    let mut chunks = Chunks::new(disk);
    let mut position = 0;
    let read = |ranges: Vec<Range<u64>>| {
        ranges.into_par_iter().map(|range| copier.read(range)).collect::<Result<Vec<Chunk<'_>>>>()
    };
    let held = work.held(CHUNK);
    let mut batch = read(chunks.batch(held)?)?;
    while !batch.is_empty() {
        work.cancel.check()?;
        for chunk in &mut batch {
            bytes_read += chunk.bytes_read;
            if !index.look_up(chunk)? {
                return Ok(None);
            }
            for (&(_, cluster), found) in chunk.clusters.iter().zip(&chunk.found) {
                runs.push(cluster)?;
                if let Found::Duplicate { keeper, .. } = *found {
                    links.push(ByDuplicate(Link { duplicate: cluster, keeper }))?;
                }
            }
        }
        let gathered: Vec<Result<Option<Vec<Name>>>> = batch.par_iter_mut().map(|chunk| copier.gather(chunk)).collect();
        for named in gathered {
            let Some(named) = named? else { return Ok(None) };
            named.into_iter().try_for_each(|name| names.push(name))?;
        }
        work.progress.advance(chunks.position() - position);
        position = chunks.position();
        let next = chunks.batch(held)?;
        // File systems let one writer into a file at a time. The others read meanwhile.
        let (written, next) = rayon::join(|| batch.iter().try_for_each(|chunk| copier.write(chunk)), || read(next));
        written?;
        batch = next?;
    }
    drop(index);
    let level = runs.into_level(Sorter::new(&small).finish()?, Sequence::new(&small))?;
    let pin = match sharing {
        Sharing::Plain => Pin::Shared,
        Sharing::Pooled(pin) => pin,
    };
    let plan = Plan::new(level, &links.into_sorted()?, pin, spill)?;
    let members = sharing.members(plan.members());
    let parts = Parts { l2_tables: plan.l2_tables, members, data: plan.stored, ..parts };
    let layout = Layout::new(parts)?;
    let mut image = NewImage::new(storage, layout, None)?;
    let names = names.finish()?;
    let mut names = names.iter();
    for step in plan.steps(CHUNK >> bits.bits()) {
        let step = step?;
        image.step(&step)?;
        if let Step::Member { row, sharers, place } = step {
            image.member(next_name(&mut names, row.0)?, place, sharers >= limit)?;
        }
    }
    image.finish(traits)?;
    Ok(Some(Streamed { plan, layout, bytes_read }))
}

/// A piece of the disk in memory.
struct Chunk<'a> {
    range: Range<u64>,
    content: Buffer<'a>,
    /// Its clusters that are not zero: the high half of the fingerprint and the cluster.
    clusters: Vec<(u64, u64)>,
    /// What is known of each.
    found: Vec<Found>,
    /// The first one that is stored.
    first: StoredCluster,
    /// How many bytes at the front of the content are to be written, when they are there.
    new: usize,
    bytes_read: u64,
}

#[derive(Clone, Copy)]
enum Found {
    /// Nothing with this fingerprint came before.
    New,
    /// It seems to have the content of an earlier cluster.
    Duplicate {
        keeper: u64,
        /// Whether it is the first that does.
        first: bool,
    },
}

/// The SHA-256 of a cluster.
type Name = (u64, Sha);

/// What came before.
struct Index {
    sharing: Sharing,
    limit: u64,
    /// By fingerprint: the first cluster with it, and above that how many share it.
    contents: HashMap<u64, u64, BuildHasherDefault<Ready>>,
    stored: StoredCluster,
}

/// For keys that are hashes already.
#[derive(Default)]
struct Ready(u64);

impl Hasher for Ready {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, &byte| hash.rotate_left(8) ^ u64::from(byte));
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}

impl Index {
    /// Looks up the clusters of the next chunk. Past the sharer limit a second first one begins, as in [`group`].
    ///
    /// [`group`]: crate::dedup::group::group
    fn look_up(&mut self, chunk: &mut Chunk<'_>) -> Result<bool> {
        chunk.first = self.stored;
        if self.sharing == Sharing::Plain {
            chunk.found.resize(chunk.clusters.len(), Found::New);
            self.stored = self.stored.after(chunk.found.len() as u64);
            return Ok(true);
        }
        for &(fingerprint, cluster) in &chunk.clusters {
            if self.contents.len() == self.contents.capacity() {
                let room = self.contents.try_reserve(1);
                room.map_err(|_| no_memory::<(u64, u64)>(self.contents.len() * 2))?;
            }
            let known = self.contents.entry(fingerprint).or_insert(0);
            let (keeper, sharers) = (*known >> SHARER_BITS, *known & MAX_SHARERS);
            if sharers == MAX_SHARERS {
                return Ok(false);
            }
            if sharers == 0 || sharers >= self.limit {
                *known = cluster << SHARER_BITS | 1;
                chunk.found.push(Found::New);
                self.stored = self.stored.after(1);
            } else {
                *known += 1;
                chunk.found.push(Found::Duplicate { keeper, first: sharers == 1 });
            }
        }
        Ok(true)
    }
}

/// Reads and writes.
struct Copier<'a> {
    disk: &'a Disk,
    bits: ClusterBits,
    sharing: Sharing,
    storage: &'a dyn Storage,
    /// Where the data begins.
    data: HostOffset,
    buffers: BufferPool,
    pieces: BufferPool,
}

impl Copier<'_> {
    /// Reads a chunk and fingerprints its clusters.
    fn read(&self, range: Range<u64>) -> Result<Chunk<'_>> {
        let bits = self.bits;
        let mut reader = Reader::sequential(self.disk);
        let mut content = self.buffers.take()?;
        let mut runs = Vec::new();
        reader.data_runs(range.clone(), bits.bytes(), &mut runs)?;
        let most: u64 = runs.iter().map(|run| bits.clusters(run.end - run.start)).sum();
        let mut clusters = Vec::with_capacity(to_usize(most));
        let bytes_read = runs.iter().map(|run| run.end - run.start).sum();
        let place = |at| at - range.start;
        reader.clusters(&runs, bits, &mut content, place, |cluster, content| {
            clusters.push((self.key(content), cluster));
        })?;
        let found = Vec::with_capacity(clusters.len());
        Ok(Chunk { range, content, clusters, found, first: StoredCluster(0), new: 0, bytes_read })
    }

    /// The high half of the fingerprint; nobody asks for it where nothing is shared.
    fn key(&self, content: &[u8]) -> u64 {
        match self.sharing {
            Sharing::Plain => 0,
            Sharing::Pooled(_) => fingerprint(content).high(),
        }
    }

    /// Compares the duplicates of a chunk, names what enters the pool, and moves what is new together, to be written in one piece.
    /// `None` where clusters with equal fingerprints differ.
    fn gather(&self, chunk: &mut Chunk<'_>) -> Result<Option<Vec<Name>>> {
        let Some(mut names) = self.compare(chunk)? else { return Ok(None) };
        let bits = self.bits;
        let mut end = 0;
        for (&(_, cluster), found) in chunk.clusters.iter().zip(&chunk.found) {
            if matches!(found, Found::Duplicate { .. }) {
                continue;
            }
            let place =
                bytes((cluster << bits.bits()) - chunk.range.start..((cluster + 1) << bits.bits()) - chunk.range.start);
            if self.sharing == Sharing::Pooled(Pin::All) {
                let content = chunk.content.get(place.clone()).or_internal("a cluster lies outside of its chunk")?;
                names.push((cluster, sha256(content)));
            }
            if place.start > end {
                chunk.content.copy_within(place, end);
            }
            end += bits.len();
        }
        chunk.new = end;
        Ok(Some(names))
    }

    /// Writes what is new.
    fn write(&self, chunk: &Chunk<'_>) -> Result<()> {
        match chunk.content.get(..chunk.new) {
            None => Err(Error::internal("what is new in a chunk is longer than the chunk")),
            Some([]) => Ok(()),
            Some(new) => write(self.storage, new, self.data.0 + (chunk.first.0 << self.bits.bits())),
        }
    }

    fn compare(&self, chunk: &Chunk<'_>) -> Result<Option<Vec<Name>>> {
        let bits = self.bits;
        let mut names = Vec::new();
        let mut other = self.pieces.take()?;
        let mut reader = Reader::random(self.disk);
        let most = other.len() >> bits.bits();
        let own = |cluster: u64, count: usize| {
            let start = (cluster << bits.bits()).checked_sub(chunk.range.start)?;
            chunk.content.get(bytes(start..start + ((count as u64) << bits.bits())))
        };
        let mut firsts = Vec::with_capacity(most);
        let mut clusters = chunk.clusters.iter().map(|(_, cluster)| *cluster).zip(&chunk.found).peekable();
        while let Some((cluster, found)) = clusters.next() {
            let Found::Duplicate { keeper, first } = *found else { continue };
            firsts.clear();
            firsts.push(first);
            // Copies of files are runs of duplicates with runs of keepers: they are read in one piece.
            while firsts.len() < most {
                let n = firsts.len() as u64;
                let next = clusters.next_if(|(next, found)| {
                    *next == cluster + n && matches!(found, Found::Duplicate { keeper: k, .. } if *k == keeper + n)
                });
                let Some((_, Found::Duplicate { first, .. })) = next else { break };
                firsts.push(*first);
            }
            let len = firsts.len() << bits.bits();
            let content = own(cluster, firsts.len()).or_internal("a cluster lies outside of its chunk")?;
            let other = other.get_mut(..len).or_internal("a run of duplicates is longer than its buffer")?;
            let kept = match own(keeper, firsts.len()) {
                Some(kept) => kept,
                None => {
                    reader.read(keeper << bits.bits(), other)?;
                    other
                }
            };
            if content != kept {
                return Ok(None);
            }
            if self.sharing == Sharing::Pooled(Pin::Shared) {
                let named = (keeper..).zip(content.chunks_exact(bits.len())).zip(&firsts).filter(|(_, first)| **first);
                names.extend(named.map(|((keeper, content), _)| (keeper, sha256(content))));
            }
        }
        Ok(Some(names))
    }
}

/// A range of a buffer.
fn bytes(range: Range<u64>) -> Range<usize> {
    let [start, end] = [range.start, range.end].map(to_usize);
    start..end
}

/// SHA-256 names of clusters, in the order of these in the end.
struct Names(Sorter<NamePart>);

/// A quarter of a name; those of one cluster come together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NamePart {
    cluster: u64,
    number: u64,
    bytes: u64,
}

record!(name_part_words: NamePart { cluster: 62, number: 2, bytes: 64 });

impl Names {
    fn new(spill: &Spill) -> Self {
        Self(Sorter::new(spill))
    }

    fn push(&mut self, (cluster, sha): Name) -> Result<()> {
        let parts = sha.as_chunks::<8>().0.iter().zip(0u64..);
        let part = |(part, number): (&[u8; 8], u64)| NamePart { cluster, number, bytes: u64::from_be_bytes(*part) };
        parts.map(part).try_for_each(|part| self.0.push(part))
    }

    fn finish(self) -> Result<Sorted<NamePart>> {
        self.0.finish()
    }
}

/// The next name, which is that of `cluster`.
fn next_name(parts: &mut Words<'_, NamePart>, cluster: u64) -> Result<Sha> {
    let mut sha = Sha::default();
    for (part, number) in sha.as_chunks_mut::<8>().0.iter_mut().zip(0u64..) {
        let next = parts.next().transpose()?.or_internal("a shared cluster has no name")?;
        if (next.cluster, next.number) != (cluster, number) {
            // Every member has been compared, and was named by that.
            return Err(Error::internal("a shared cluster has no name"));
        }
        *part = next.bytes.to_be_bytes();
    }
    Ok(sha)
}
