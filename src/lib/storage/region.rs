//! Writing one region of a file from its start to its end in large pieces.

use std::io;
use std::ops::Range;

use super::Storage;
use crate::units::to_usize;

/// Collects small pieces and writes them in order as runs of up to [`RegionWriter::RUN`] bytes.
pub(crate) struct RegionWriter<'a> {
    storage: &'a dyn Storage,
    offset: u64,
    /// The end of the region: writing past it would damage what comes next.
    end: u64,
    buffer: Vec<u8>,
}

impl<'a> RegionWriter<'a> {
    /// The longest write.
    pub(crate) const RUN: usize = 1 << 20;

    /// A writer whose first byte goes to `region.start`.
    #[must_use]
    pub(crate) fn new(storage: &'a dyn Storage, region: Range<u64>) -> Self {
        Self { storage, offset: region.start, end: region.end, buffer: Vec::new() }
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// Those of the write that this may cause.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= Self::RUN {
            self.flush()?;
        }
        Ok(())
    }

    /// The offset of the next byte.
    #[must_use]
    pub(crate) fn position(&self) -> u64 {
        self.offset + self.buffer.len() as u64
    }

    /// Appends zeros up to the end of the region, which lies within a few clusters, and writes everything.
    ///
    /// # Errors
    /// Those of the write.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        self.zeros_until(self.end)?;
        self.flush()
    }

    /// Appends zeros up to `offset`, which lies within a few clusters.
    ///
    /// # Errors
    /// Those of the write that this may cause.
    pub(crate) fn zeros_until(&mut self, offset: u64) -> io::Result<()> {
        let missing = to_usize(offset.saturating_sub(self.position()));
        self.buffer.resize(self.buffer.len() + missing, 0);
        self.write(&[])
    }

    /// Writes what was collected.
    ///
    /// # Errors
    /// Those of the write.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if self.position() > self.end {
            let message = format!("the region that ends at {:#x} is too small for what it should hold", self.end);
            return Err(io::Error::other(message));
        }
        if !self.buffer.is_empty() {
            self.storage.write_at(&self.buffer, self.offset)?;
            self.offset += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }
}
