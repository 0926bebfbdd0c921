//! Reading a disk's content.

use std::fmt;
use std::ops::Range;
use std::ptr;

use super::chunks::PIECE;
use super::read::ChainReader;
use super::{Disk, Part, Span};
use crate::digest::is_zero;
use crate::error::{OrInternal, Result};
use crate::format::coding::CompressionType;
use crate::units::{ClusterBits, append, to_usize};

/// Reads a [`Disk`]; each thread has its own, with its scratch memory and decoders.
pub struct Reader<'a> {
    disk: &'a Disk,
    /// What `chain` reads.
    part: &'a Part,
    chain: ChainReader<'a>,
}

impl fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("disk", self.disk).finish_non_exhaustive()
    }
}

impl<'a> Reader<'a> {
    /// A reader for ascending offsets: it looks up the tables of a whole window at once.
    #[must_use]
    pub fn sequential(disk: &'a Disk) -> Self {
        Self { disk, part: &disk.first, chain: ChainReader::sequential(&disk.first.chain) }
    }

    /// A reader for offsets in any order: it looks up what it reads, no more.
    #[must_use]
    pub fn random(disk: &'a Disk) -> Self {
        Self { disk, part: &disk.first, chain: ChainReader::random(&disk.first.chain) }
    }

    /// Emits the parts of `range` (of at most 2 MiB) that are not known to be zeros, widened to multiples of `grain` and merged.
    ///
    /// # Errors
    /// Fails where the image's tables cannot be read or are impossible.
    pub(crate) fn data_runs(&mut self, range: Range<u64>, grain: u64, runs: &mut Vec<Range<u64>>) -> Result<()> {
        runs.clear();
        let mut at = range.start;
        while at < range.end {
            let span = self.enter(at)?;
            let (end, part) = (span.row.end.min(range.end), span.at);
            // From here on what the part has at its start is at `start` of the disk.
            let start = span.row.start;
            for data in self.chain.data(part + (at - start)..part + (end - start))? {
                let data = data.start - part..data.end - part;
                // Widened, what ends one image and what begins the next can be one run, or one cluster.
                let data = ((start + data.start) & !(grain - 1)).max(range.start)
                    ..(start + data.end).next_multiple_of(grain).min(range.end);
                append(runs, data);
            }
            at = end;
        }
        Ok(())
    }

    /// Reads `runs` of a chunk in pieces, each to the place in `buffer` that `place` gives for its start, and emits the clusters of `grain`
    /// that are not zero. The last cluster of the disk is padded with zeros.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub(crate) fn clusters(
        &mut self,
        runs: &[Range<u64>],
        grain: ClusterBits,
        buffer: &mut [u8],
        place: impl Fn(u64) -> u64,
        mut emit: impl FnMut(u64, &[u8]),
    ) -> Result<()> {
        let step = PIECE.max(self.disk.preferred_read()).max(grain.bytes());
        for run in runs {
            let mut at = run.start;
            while at < run.end {
                // Pieces end where larger clusters of the source do.
                let end = ((at + step) & !(step - 1)).min(run.end);
                let first = to_usize(place(at));
                let len = to_usize((end - at).next_multiple_of(grain.bytes()));
                let piece = buffer.get_mut(first..first + len).or_internal("a piece lies outside of its buffer")?;
                self.read(at, piece)?;
                for (cluster, content) in (at >> grain.bits()..).zip(piece.chunks_exact(grain.len())) {
                    if !is_zero(content) {
                        emit(cluster, content);
                    }
                }
                at = end;
            }
        }
        Ok(())
    }

    /// Fills `buf` with the disk's content from `start`. What lies past its end reads as zeros.
    ///
    /// # Errors
    /// Fails where something cannot be read or decompressed, naming the file and the offset in it.
    pub fn read(&mut self, start: u64, buf: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (start, buf);
        while !rest.is_empty() {
            let Span { row, at: from, .. } = self.enter(at)?;
            let len = to_usize(row.end - at).min(rest.len());
            let (piece, remaining) = rest.split_at_mut(len);
            self.chain.read(from + (at - row.start), piece)?;
            at += len as u64;
            rest = remaining;
        }
        Ok(())
    }

    /// The compressed bytes of the cluster of `bits` that begins at `start`, where that is what an image has there, of this kind and
    /// of the same size.
    pub(crate) fn packed(&mut self, start: u64, bits: ClusterBits, kind: CompressionType) -> Result<Option<&[u8]>> {
        let Span { row, at, .. } = self.enter(start)?;
        self.chain.packed(at + (start - row.start), bits, kind)
    }

    /// Emits the parts of `range` (of at most 2 MiB) that the layer above has too, at the same place of the disk and of the files.
    /// They are whole clusters of `grain` bytes. A disk that was not opened with its snapshots has no layers.
    ///
    /// # Errors
    /// As [`Reader::data_runs`].
    pub(crate) fn in_common(&mut self, range: &Range<u64>, grain: u64, parts: &mut Vec<Range<u64>>) -> Result<()> {
        parts.clear();
        let Span { row, at: from, above: Some(above), .. } = self.enter(range.start)? else { return Ok(()) };
        let place = |at: u64| from + (at - row.start);
        self.chain.in_common(above, place(range.start)..place(range.end), grain, parts)?;
        for part in parts {
            *part = row.start + (part.start - from)..row.start + (part.end - from);
        }
        Ok(())
    }

    /// Turns to the image that `offset` lies in, and returns the run that it lies in.
    fn enter(&mut self, offset: u64) -> Result<Span<'a>> {
        let span = self.disk.span_at(offset)?;
        if !ptr::eq(span.part, self.part) {
            self.part = span.part;
            self.chain.turn_to(&span.part.chain);
        }
        Ok(span)
    }
}
