//! A disk cut into chunks, for workers.

use std::ops::Range;

use super::Disk;
use crate::error::Result;

/// Bytes of a chunk: a multiple of every cluster size, aligned.
pub(crate) const CHUNK: u64 = 2 << 20;

/// Bytes that are read, and hashed or compared, at once: small enough to stay in the processor's cache meanwhile.
pub(crate) const PIECE: u64 = 256 << 10;

/// The chunks of a disk that may hold something else than zeros, in order.
pub(crate) struct Chunks<'a> {
    disk: &'a Disk,
    backing: Option<&'a Disk>,
    at: u64,
    data: Range<u64>,
}

impl<'a> Chunks<'a> {
    /// The chunks of `disk`.
    #[must_use]
    pub(crate) fn new(disk: &'a Disk) -> Self {
        Self::over(disk, None)
    }

    /// The chunks of `disk` and those for which `backing` has data.
    #[must_use]
    pub(crate) fn over(disk: &'a Disk, backing: Option<&'a Disk>) -> Self {
        Self { disk, backing, at: 0, data: 0..0 }
    }

    /// The first range at or after `offset` for which one of them may have data.
    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        self.disk.next_data_over(self.backing, offset)
    }

    /// Up to `count` more chunks; empty at the end.
    ///
    /// # Errors
    /// Those of looking for data in the files.
    pub(crate) fn batch(&mut self, count: usize) -> Result<Vec<Range<u64>>> {
        let mut chunks = Vec::with_capacity(count);
        while chunks.len() < count && self.at < self.disk.size() {
            if self.at >= self.data.end {
                match self.next_data(self.at)? {
                    None => {
                        self.at = self.disk.size();
                        break;
                    }
                    Some(data) => {
                        self.at = data.start & !(CHUNK - 1);
                        self.data = data;
                    }
                }
            }
            let end = (self.at + CHUNK).min(self.disk.size());
            chunks.push(self.at..end);
            self.at = end;
        }
        Ok(chunks)
    }

    /// The guest offset up to which chunks were given out or skipped.
    #[must_use]
    pub(crate) fn position(&self) -> u64 {
        self.at
    }
}
