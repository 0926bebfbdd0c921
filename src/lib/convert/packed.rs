//! Writing what a plan says in compressed clusters.
//!
//! Every content is compressed once, on all threads, and packed byte by byte as QEMU does; its sharers have the same descriptor.
//! What does not become smaller is stored as it is. The data comes first in the file: where the metadata lies is known when all of
//! it is written.

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::tasks::{Batches, Held, Member, Task, buffers};
use crate::build::layers::Layers;
use crate::build::layout::{Layout, Parts};
use crate::build::writer::{NewImage, Traits};
use crate::codec::{CompressionLevel, Compressor};
use crate::dedup::numbers::Numbers;
use crate::dedup::plan::{Plan, Step};
use crate::dedup::reading::FirstReading;
use crate::digest::{Sha, sha256};
use crate::disk::Disk;
use crate::error::{Error, OrInternal, Result};
use crate::format::compressed::CompressedExtent;
use crate::format::table::L2Entry;
use crate::sort::record::record;
use crate::sort::sequence::{Sequence, Spill};
use crate::sort::wide::{Wide, WideSequence};
use crate::storage::Storage;
use crate::storage::buffer::BufferPool;
use crate::storage::region::RegionWriter;
use crate::units::{ClusterBits, HostOffset, RowCluster, RowPlace, StoredCluster, to_usize};
use crate::work::Work;

/// Bytes of clusters that did not become smaller, which wait until it pays to leave the rest of a cluster unused for them.
const WAITING: usize = 16 << 20;

/// Compressed bytes that are worth a word on how far the operation is.
const STEP: u64 = 256 << 10;

/// What was written.
pub(super) struct Packed {
    pub(super) layout: Layout,
    /// Stored clusters that are compressed.
    pub(super) clusters: u64,
    /// The bytes that they take.
    pub(super) bytes: u64,
}

/// What a worker made of a task: the stored form of its clusters, one after the other.
struct Done {
    bytes: Vec<u8>,
    /// The length of each; that of a cluster for what is not compressed.
    lengths: Vec<usize>,
    /// The SHA-256 of the members.
    names: Vec<Sha>,
}

/// Writes the image that `plan` describes to `storage`, which is empty. `parts` are those of the image but for its data.
pub(super) fn write(
    disk: &Disk,
    (plan, first): (&Plan, &FirstReading),
    parts: Parts,
    (traits, level): (&Traits, CompressionLevel),
    storage: &dyn Storage,
    spill: &Spill,
    work: &Work,
) -> Result<Packed> {
    let bits = parts.cluster_bits;
    let limit = match parts.members {
        Some(_) => parts.refcount_bits.sharer_limit().unwrap_or(0),
        None => parts.refcount_bits.max(),
    };
    let buffers = buffers(bits);
    let mut packer = Packer::new(storage, bits, limit, plan.stored, spill)?;
    // What is compressed waits in memory for its place, and compressing takes long enough that few tasks keep a thread busy.
    let batch = (work.batch() / 8).max(1);
    let mut batches = Batches::new(plan, first, bits, batch);
    while let Some(tasks) = batches.next(|_| Ok(()))? {
        work.cancel.check()?;
        let done: Vec<Result<Done>> =
            tasks.par_iter().map(|task| pack((disk, first), bits, level, task, &buffers, work)).collect();
        for (task, done) in tasks.iter().zip(done) {
            packer.add(task, done?)?;
        }
    }
    packer.finish_data()?;

    let layout = Layout::new(Parts { data: packer.next_cluster() - 1, ..parts })?;
    let mut image = NewImage::new(storage, layout, Layers::of(disk, plan, bits)?)?;
    packer.write_tables(plan, Batches::longest_step(bits, batch), &mut image)?;
    image.finish(traits)?;
    Ok(Packed { layout, clusters: packer.packed, bytes: packer.packed_bytes })
}

/// Reads, names and compresses the clusters of `task`.
fn pack(
    (disk, first): (&Disk, &FirstReading),
    bits: ClusterBits,
    level: CompressionLevel,
    task: &Task,
    buffers: &BufferPool,
    work: &Work,
) -> Result<Done> {
    let mut buffer = buffers.take()?;
    let len = to_usize(task.count * bits.bytes());
    let content = buffer.get_mut(..len).or_internal("a task is longer than its buffer")?;
    let mut reader = Held::new(disk, first, bits);
    let mut compressor = Compressor::new(level)?;
    let mut done = Done { bytes: Vec::with_capacity(len), lengths: Vec::new(), names: Vec::new() };
    let reuses = disk.may_have_packed(bits, level.kind());
    if !reuses {
        task.read(&mut reader, content)?;
    }
    let mut members = task.members.iter().peekable();
    let mut told = 0;
    for ((cluster, (row, record)), at) in content.chunks_exact_mut(bits.len()).zip(task.rows()).zip(0u64..) {
        let start = done.bytes.len();
        let mut length = None;
        if reuses {
            reader.read(row, cluster, &[record])?;
            // What was just decompressed: it is not read once more.
            let packed = reader.reader.packed(row.offset(bits), bits, level.kind())?;
            if let Some(packed) = packed.filter(|packed| packed.len() < bits.len()) {
                done.bytes.extend_from_slice(packed);
                length = Some(packed.len());
            }
        }
        let length = length.or_else(|| compressor.append(cluster, &mut done.bytes)).unwrap_or(bits.len());
        if length == bits.len() {
            done.bytes.truncate(start);
            done.bytes.extend_from_slice(cluster);
        }
        done.lengths.push(length);
        if members.next_if(|member| member.at == at).is_some() {
            done.names.push(sha256(cluster));
        }
        // Not for each of the small ones: whoever is told is told by one thread at a time.
        told += bits.bytes();
        if told >= STEP {
            work.progress.advance(std::mem::take(&mut told));
        }
    }
    work.progress.advance(told);
    Ok(done)
}

/// A stored cluster on its way to its place.
struct Piece {
    /// Which one.
    stored: StoredCluster,
    /// What is known of it as a member of the pool.
    member: Option<(Member, Sha)>,
    /// Layers that use it, where it is no member.
    users: u64,
}

impl Piece {
    /// References to it, the pool's included.
    fn references(&self) -> u64 {
        self.member.as_ref().map_or(self.users, |(member, _)| member.sharers + 1)
    }
}

/// A run of clusters with the same refcount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counted {
    count: u64,
    clusters: u64,
}

record!(counted_words: Counted { count: 64, clusters: 64 });

/// A member of the pool.
#[derive(Clone, Copy)]
struct Pooled {
    at: PooledAt,
    sha: Sha,
}

/// Where a member of the pool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PooledAt {
    entry: u64,
    place: RowPlace,
    retired: bool,
}

record!(pooled_at_words: PooledAt { entry: 64, place: 63, retired: 1 });

impl Wide for Pooled {
    type Parts = (PooledAt, [u8; 16], [u8; 16]);

    fn parts(self) -> Self::Parts {
        let [first, second]: [[u8; 16]; 2] = zerocopy::transmute!(self.sha);
        (self.at, first, second)
    }

    fn of((at, first, second): Self::Parts) -> Self {
        Self { at, sha: zerocopy::transmute!([first, second]) }
    }
}

/// Gives stored clusters their places, one after the other.
struct Packer<'a> {
    bits: ClusterBits,
    limit: u64,
    file: RegionWriter<'a>,
    /// The cluster in which the last piece ends, and the references to it so far.
    last: u64,
    references: u64,
    /// Complete refcounts in the order of the file.
    counts: Sequence<Counted>,
    run: Counted,
    /// The L2 entry of each stored cluster.
    entries: Numbers,
    /// Members in the order of the file.
    members: WideSequence<Pooled>,
    /// Clusters that did not become smaller.
    waiting: Vec<(Piece, Vec<u8>)>,
    packed: u64,
    packed_bytes: u64,
}

impl<'a> Packer<'a> {
    fn new(storage: &'a dyn Storage, bits: ClusterBits, limit: u64, stored: u64, spill: &Spill) -> Result<Self> {
        Ok(Self {
            bits,
            limit,
            file: RegionWriter::new(storage, bits.bytes()..u64::MAX),
            last: 1,
            references: 0,
            counts: Sequence::new(&spill.share(4)),
            run: Counted::default(),
            entries: Numbers::new(stored, spill)?,
            members: WideSequence::new(spill),
            waiting: Vec::new(),
            packed: 0,
            packed_bytes: 0,
        })
    }

    /// The first cluster that nothing was written to.
    fn next_cluster(&self) -> u64 {
        self.bits.clusters(self.file.position())
    }

    fn add(&mut self, task: &Task, done: Done) -> Result<()> {
        let mut members = task.members.iter().zip(done.names).peekable();
        let mut rest = done.bytes.as_slice();
        for (length, at) in done.lengths.into_iter().zip(0u64..) {
            let (bytes, after) = rest.split_at(length);
            rest = after;
            let member = members.next_if(|(member, _)| member.at == at).map(|(member, sha)| (*member, sha));
            let piece = Piece { stored: task.first.after(at), member, users: task.users_of(at) };
            if length == self.bits.len() {
                self.waiting.push((piece, bytes.to_vec()));
                if self.waiting.len() << self.bits.bits() >= WAITING {
                    self.place_waiting()?;
                }
            } else {
                self.place_packed(&piece, bytes)?;
            }
        }
        Ok(())
    }

    /// Leaves the rest of a cluster unused.
    fn align(&mut self) -> Result<()> {
        let end = self.next_cluster() << self.bits.bits();
        self.file.zeros_until(end).map_err(writing)
    }

    fn place_packed(&mut self, piece: &Piece, bytes: &[u8]) -> Result<()> {
        let references = piece.references();
        let first = self.file.position() >> self.bits.bits();
        // The references to all that lies in a cluster add up.
        if first == self.last && self.references > 0 && self.references + references > self.limit {
            self.align()?;
        }
        let host = self.file.position();
        let end = host + bytes.len() as u64;
        self.file.write(bytes).map_err(writing)?;
        for cluster in host >> self.bits.bits()..self.bits.clusters(end) {
            self.refer(cluster, references)?;
        }
        self.packed += 1;
        self.packed_bytes += bytes.len() as u64;
        let extent = CompressedExtent::new(HostOffset(host), bytes.len() as u64);
        self.placed(piece, L2Entry::Compressed(extent))
    }

    fn place_waiting(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.align()?;
        for (piece, bytes) in std::mem::take(&mut self.waiting) {
            let host = HostOffset(self.file.position());
            self.file.write(&bytes).map_err(writing)?;
            self.refer(host.0 >> self.bits.bits(), piece.references())?;
            self.placed(&piece, L2Entry::Data { host, copied: piece.references() == 1 })?;
        }
        Ok(())
    }

    fn placed(&mut self, piece: &Piece, entry: L2Entry) -> Result<()> {
        let word = entry.encode(self.bits);
        self.entries.set(piece.stored, word)?;
        if let Some((member, sha)) = &piece.member {
            let retired = member.sharers >= self.limit;
            self.members.push(Pooled { at: PooledAt { entry: word, place: member.place, retired }, sha: *sha })?;
        }
        Ok(())
    }

    /// Counts references to `cluster`. What comes before it is complete: nothing is placed there any more.
    fn refer(&mut self, cluster: u64, references: u64) -> Result<()> {
        while self.last < cluster {
            let count = std::mem::take(&mut self.references);
            self.last += 1;
            if count == self.run.count {
                self.run.clusters += 1;
            } else {
                self.end_run()?;
                self.run = Counted { count, clusters: 1 };
            }
        }
        self.references += references;
        Ok(())
    }

    fn end_run(&mut self) -> Result<()> {
        let run = std::mem::take(&mut self.run);
        if run.clusters > 0 { self.counts.push(run) } else { Ok(()) }
    }

    fn finish_data(&mut self) -> Result<()> {
        self.place_waiting()?;
        self.align()?;
        self.file.flush().map_err(writing)?;
        self.refer(self.next_cluster(), 0)?;
        self.end_run()
    }

    /// Writes refcounts, pool and mapping.
    fn write_tables(&self, plan: &Plan, most: u64, image: &mut NewImage<'_>) -> Result<()> {
        for run in self.counts.iter() {
            let Counted { count, clusters } = run?;
            image.count(count, clusters)?;
        }
        for member in self.members.iter() {
            let Pooled { at, sha } = member?;
            image.pool_as(L2Entry::decode(at.entry, self.bits, true))?;
            image.member(sha, at.place, at.retired)?;
        }
        let mut next = StoredCluster(0);
        for step in plan.steps(most) {
            let (row, stored, count) = match step? {
                Step::Shared { row, stored } => (row, stored, 1),
                Step::Private { row, count, .. } => (row, next, count),
                Step::Member { row, .. } => (row, next, 1),
                step @ (Step::Zero { .. } | Step::Inherited { .. } | Step::InheritedTable { .. }) => {
                    image.step(&step)?;
                    continue;
                }
            };
            next = next.max(stored.after(count));
            for n in 0..count {
                let entry = L2Entry::decode(self.entries.get(stored.after(n))?, self.bits, true);
                image.map_as(RowCluster(row.0 + n), entry)?;
            }
        }
        Ok(())
    }
}

fn writing(source: std::io::Error) -> Error {
    Error::io("Could not write", source)
}
