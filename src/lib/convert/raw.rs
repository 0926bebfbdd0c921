//! A disk becomes a sparse raw file, or goes to a block device.

use std::num::NonZeroU64;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use serde::Serialize;

use super::refuse::refuse_own_source;
use super::stages::Begun;
use crate::dedup::reading::Again;
use crate::digest::is_zero;
use crate::disk::chunks::{CHUNK, Chunks};
use crate::disk::{Disk, Reader};
use crate::error::{Context, IoContext, OrInternal, Result};
use crate::progress::Stage;
use crate::storage::buffer::BufferPool;
use crate::storage::rate::Paced;
use crate::storage::target::Target;
use crate::storage::{BLOCK, Storage};
use crate::units::{SECTOR, to_usize};
use crate::work::Work;

/// Zeros that are written in one go.
const ZEROS: u64 = 1 << 20;
/// What a device is to zero in one go: some take long, and nothing stops them.
const CLEAR: u64 = 64 << 20;

/// How to write a raw file.
#[derive(Debug, Clone, Copy)]
pub struct RawOptions {
    /// So many zero bytes in a row become a hole, a multiple of 512; with 0 there are no holes, and zeros are written.
    pub sparse: u64,
    /// Whether the output is on the disk when [`to_raw`] returns.
    pub durable: bool,
    /// Whether the output is taken out of the host's page cache in the end.
    pub uncached: bool,
    /// How many bytes may be written in a second.
    pub rate: Option<NonZeroU64>,
}

impl RawOptions {
    /// What qemu-img makes a hole of where it is not told.
    pub const DEFAULT_SPARSE: u64 = BLOCK;

    /// Whether `zeros` bytes of zeros are a hole.
    fn is_hole(self, zeros: u64) -> bool {
        self.sparse > 0 && zeros >= self.sparse
    }

    /// The grain in which zeros are looked for; most file systems have no finer holes than a block anyway.
    fn grain(self) -> u64 {
        if self.sparse.is_multiple_of(BLOCK) { BLOCK } else { SECTOR }
    }
}

impl Default for RawOptions {
    fn default() -> Self {
        Self { sparse: Self::DEFAULT_SPARSE, durable: true, uncached: false, rate: None }
    }
}

/// What a conversion to raw did. Sizes are in bytes.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct RawReport {
    /// Size of the disk that the guest sees, and length of what is written.
    pub virtual_size_bytes: u64,
    /// Read from the source.
    pub read_bytes: u64,
    /// Written as data; the rest is holes, or zeros of a device.
    pub written_bytes: u64,
    /// Length of the output file.
    pub file_length_bytes: u64,
    /// Bytes that the output file occupies.
    pub allocated_bytes: u64,
    /// Time taken.
    pub seconds: f64,
}

const WRITING: Stage = Stage("writing", 0, 100);

/// Writes the content of `disk` as a sparse raw file at `target`, which appears whole or not at all (I7), or to the block device
/// there. What the device has behind the end of the disk stays.
///
/// # Errors
/// Those of reading and writing. An existing target stays as it was.
pub fn to_raw(disk: &Disk, target: &Path, options: RawOptions, work: &Work) -> Result<RawReport> {
    let begun = Begun::default();
    to_raw_of(disk, target, options, &begun, work).map_err(|e| e.leaving(begun.left()))
}

fn to_raw_of(disk: &Disk, target: &Path, options: RawOptions, begun: &Begun, work: &Work) -> Result<RawReport> {
    let started = Instant::now();
    refuse_own_source(disk, target)?;
    let file = Target::open(target, &|notice| work.progress.notice(notice))?;
    file.ensure_room(disk.size())?;
    file.storage().set_len(disk.size()).at("Could not set the length").target(target)?;
    if disk.size() > 0 {
        if !file.is_empty() {
            begun.set();
        }
        file.begin()?;
    }
    let spill = work.spill_beside(file.directory());
    // What is read once is held against nothing: where times do not tell, the disk is read before and after.
    let again = Again { disk, other: None, spill: &spill, work };
    let first = disk.restless().next().map(|_| again.first()).transpose()?;
    work.progress.start();
    work.progress.begin(WRITING, disk.size());
    let storage = Paced::new(file.storage(), options.rate, &work.cancel);
    let buffers = BufferPool::new(to_usize(CHUNK));
    let copy = Copy { disk, storage: &storage, options, was_empty: file.reads_zeros(), buffers };
    let mut chunks = Chunks::new(disk);
    let (mut read_bytes, mut written_bytes, mut position) = (0, 0, 0);
    // Zeros reach over the ends of chunks: where the data before them ended.
    let mut zeros_from = 0;
    loop {
        work.cancel.check()?;
        let batch = chunks.batch(work.batch())?;
        if batch.is_empty() {
            break;
        }
        let results: Vec<Result<Copied>> =
            work.run(|| batch.par_iter().map(|chunk| copy.chunk(chunk.clone())).collect());
        for result in results {
            let copied = result.target(target)?;
            read_bytes += copied.read;
            written_bytes += copied.written;
            let Some(data) = copied.data else { continue };
            if options.is_hole(data.start - zeros_from) {
                copy.hole(zeros_from..data.start, work).target(target)?;
            } else {
                written_bytes += copy.zeros(zeros_from..data.start, work).target(target)?;
            }
            zeros_from = data.end;
        }
        work.progress.advance(chunks.position() - position);
        position = chunks.position();
    }
    // As qemu-img does it, zeros at the end are a hole however few they are.
    if options.sparse == 0 {
        written_bytes += copy.zeros(zeros_from..disk.size(), work).target(target)?;
    } else {
        copy.hole(zeros_from..disk.size(), work).target(target)?;
    }
    if let Some(first) = first {
        again.ensure_same(&first)?;
    }
    disk.ensure_unchanged()?;
    if options.uncached {
        file.uncache()?;
    }
    let allocated_bytes = file.commit(options.durable, &|notice| work.progress.notice(notice))?;
    Ok(RawReport {
        virtual_size_bytes: disk.size(),
        read_bytes,
        written_bytes,
        file_length_bytes: disk.size(),
        allocated_bytes,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// What a worker has done with a chunk.
#[derive(Default)]
struct Copied {
    read: u64,
    written: u64,
    /// From the first to the last byte that it has written.
    data: Option<Range<u64>>,
}

/// What the workers share.
struct Copy<'a> {
    disk: &'a Disk,
    storage: &'a dyn Storage,
    options: RawOptions,
    /// Whether holes are there where nothing is written.
    was_empty: bool,
    buffers: BufferPool,
}

impl Copy<'_> {
    /// Copies what is not zero of `chunk`, with the zeros between that are too few for a hole.
    fn chunk(&self, chunk: Range<u64>) -> Result<Copied> {
        let mut reader = Reader::sequential(self.disk);
        let mut buffer = self.buffers.take()?;
        let mut runs = Vec::new();
        let grain = self.options.grain();
        reader.data_runs(chunk, grain, &mut runs)?;
        let mut copied = Copied::default();
        for run in runs {
            let len = to_usize(run.end - run.start);
            let content = buffer.get_mut(..len).or_internal("a chunk is longer than its buffer")?;
            reader.read(run.start, content)?;
            copied.read += len as u64;
            // What goes out in one write.
            let mut open: Option<Range<u64>> = None;
            let mut at = run.start;
            for piece in content.chunks(to_usize(grain)) {
                let end = at + piece.len() as u64;
                if !is_zero(piece) {
                    match &mut open {
                        Some(open) if open.end == at || !self.options.is_hole(at - open.end) => open.end = end,
                        open => {
                            if let Some(done) = open.replace(at..end) {
                                self.write(run.start, content, done, &mut copied)?;
                            }
                        }
                    }
                }
                at = end;
            }
            if let Some(open) = open {
                self.write(run.start, content, open, &mut copied)?;
            }
        }
        Ok(copied)
    }

    /// Writes `range` of the disk from `content`, which begins at `base`, and what lies between it and what was written before.
    fn write(&self, base: u64, content: &[u8], range: Range<u64>, copied: &mut Copied) -> Result<()> {
        if let Some(before) = &copied.data {
            let gap = before.end..range.start;
            match self.options.is_hole(gap.end - gap.start) {
                true => self.clear(gap)?,
                false => copied.written += self.write_zeros(gap)?,
            }
        }
        let index = |at: u64| to_usize(at - base);
        let piece = content.get(index(range.start)..index(range.end)).or_internal("a piece lies outside of its run")?;
        self.put(piece, range.start)?;
        copied.written += piece.len() as u64;
        let start = copied.data.as_ref().map_or(range.start, |data| data.start);
        copied.data = Some(start..range.end);
        Ok(())
    }

    /// Makes a hole of any length.
    fn hole(&self, range: Range<u64>, work: &Work) -> Result<()> {
        let mut at = range.start;
        while !self.was_empty && at < range.end {
            work.cancel.check()?;
            let end = range.end.min(at + CLEAR);
            self.clear(at..end)?;
            at = end;
        }
        Ok(())
    }

    /// Makes a hole where there may be something.
    fn clear(&self, range: Range<u64>) -> Result<()> {
        if self.was_empty || range.is_empty() {
            return Ok(());
        }
        let cleared = self.storage.punch(range.clone());
        cleared.map(drop).at(format_args!("Could not clear {range:#x?}"))
    }

    /// Writes zeros over a range of any length.
    fn zeros(&self, range: Range<u64>, work: &Work) -> Result<u64> {
        let mut at = range.start;
        while at < range.end {
            work.cancel.check()?;
            at += self.write_zeros(at..range.end.min(at + ZEROS))?;
        }
        Ok(range.end - range.start)
    }

    /// Writes zeros over a range within a chunk.
    fn write_zeros(&self, range: Range<u64>) -> Result<u64> {
        let len = range.end - range.start;
        self.put(&vec![0; to_usize(len)], range.start)?;
        Ok(len)
    }

    fn put(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let wrote = self.storage.write_at(bytes, offset);
        wrote.writing(offset)
    }
}
