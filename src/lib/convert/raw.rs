//! A disk becomes a sparse raw file.

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use serde::Serialize;

use super::refuse_own_source;
use crate::digest::is_zero;
use crate::disk::chunks::{CHUNK, Chunks};
use crate::disk::{Disk, Reader};
use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::storage::atomic_file::AtomicFile;
use crate::storage::buffer::BufferPool;
use crate::work::Work;

/// Zeros in runs of at least this many bytes, aligned, become holes (`qemu-img convert -S`, default 4k).
const SPARSE: usize = 4096;

/// How to write a raw file.
#[derive(Debug, Clone, Copy)]
pub struct RawOptions {
    /// Whether the output is on the disk when [`to_raw`] returns.
    pub durable: bool,
}

/// What a conversion to raw did. Sizes are in bytes.
#[derive(Debug, Clone, Serialize)]
pub struct RawReport {
    /// Size of the disk that the guest sees, and length of the file.
    pub virtual_size_bytes: u64,
    /// Read from the source.
    pub read_bytes: u64,
    /// Written to the file; the rest is holes.
    pub written_bytes: u64,
    /// Length of the output file.
    pub file_length_bytes: u64,
    /// Bytes that the output file occupies.
    pub allocated_bytes: u64,
    /// Time taken.
    pub seconds: f64,
}

/// Writes the content of `disk` as a sparse raw file at `target`, which appears whole or not at all (I7).
///
/// # Errors
/// Those of reading and writing. An existing target stays as it was.
pub fn to_raw(disk: &Disk, target: &Path, options: RawOptions, work: &Work<'_>) -> Result<RawReport> {
    let started = Instant::now();
    refuse_own_source(disk, target)?;
    let file = AtomicFile::create(target)?;
    let said = |e: Error| e.prefixed(&target.display().to_string());
    file.storage().set_len(disk.size()).map_err(|e| said(Error::io("Could not set the length", e)))?;
    work.progress.phase(0, 1, "writing", disk.size());
    let buffers = BufferPool::new(usize::try_from(CHUNK).unwrap_or(usize::MAX));
    let mut chunks = Chunks::new(disk);
    let (mut read_bytes, mut written_bytes, mut position) = (0, 0, 0);
    loop {
        work.cancel.check()?;
        let batch = chunks.batch(work.batch())?;
        if batch.is_empty() {
            break;
        }
        let results: Vec<Result<(u64, u64)>> = work
            .run(|| batch.par_iter().map(|chunk| copy_chunk(disk, chunk.clone(), file.storage(), &buffers)).collect());
        for result in results {
            let (read, written) = result.map_err(said)?;
            read_bytes += read;
            written_bytes += written;
        }
        work.progress.advance(chunks.position() - position);
        position = chunks.position();
    }
    disk.ensure_unchanged()?;
    let allocated_bytes = file.commit(options.durable)?;
    Ok(RawReport {
        virtual_size_bytes: disk.size(),
        read_bytes,
        written_bytes,
        file_length_bytes: disk.size(),
        allocated_bytes,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Copies what is not zero of `chunk`; returns the bytes read and written.
fn copy_chunk(disk: &Disk, chunk: Range<u64>, storage: &dyn Storage, buffers: &BufferPool) -> Result<(u64, u64)> {
    let mut reader = Reader::sequential(disk);
    let mut buffer = buffers.take().map_err(|e| Error::io("Could not get memory", e))?;
    let mut runs = Vec::new();
    reader.data_runs(chunk, SPARSE as u64, &mut runs)?;
    let (mut read, mut written) = (0, 0);
    for run in runs {
        let len = usize::try_from(run.end - run.start).unwrap_or(usize::MAX);
        let Some(content) = buffer.get_mut(..len) else { break };
        reader.read(run.start, content)?;
        read += len as u64;
        // Consecutive pieces that are not zero go out in one write.
        let mut start = None;
        let mut at = 0;
        for piece in content.chunks(SPARSE) {
            match (is_zero(piece), start) {
                (false, None) => start = Some(at),
                (true, Some(from)) => {
                    written += write(storage, run.start, content, from..at)?;
                    start = None;
                }
                _ => {}
            }
            at += piece.len();
        }
        if let Some(from) = start {
            written += write(storage, run.start, content, from..at)?;
        }
    }
    Ok((read, written))
}

fn write(storage: &dyn Storage, base: u64, content: &[u8], range: Range<usize>) -> Result<u64> {
    let offset = base + range.start as u64;
    let piece = content.get(range).unwrap_or_default();
    storage.write_at(piece, offset).map_err(|e| Error::io(format_args!("Could not write at {offset:#x}"), e))?;
    Ok(piece.len() as u64)
}
