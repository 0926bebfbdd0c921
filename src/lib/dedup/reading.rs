//! One source, one moment (I10): what is read again is held against what was read first.
//!
//! Equality is decided in one pass over a disk, and a cluster that others share is copied in a later one. Where it changes between
//! the two its sharers, which nobody wrote to, would get its new content. Times tell of a file that it was written, of a block
//! device nothing does: so the bytes have to.

use std::iter::Peekable;

use super::index;
use super::level::{Larger, of_parts};
use super::plan::peek;
use super::sequence::{Sequence, Words};
use crate::error::{Error, Result};
use crate::units::ClusterBits;

/// The records of all clusters that were not zero when they were read first, in their order.
pub(crate) struct FirstReading {
    records: Sequence,
    grain: ClusterBits,
}

impl FirstReading {
    /// `records` are those of a scan with clusters of `grain`, ascending.
    ///
    /// # Errors
    /// Those of the temporary file: what would take much memory goes there until it is asked for.
    pub(crate) fn new(mut records: Sequence, grain: ClusterBits) -> Result<Self> {
        records.shelve()?;
        Ok(Self { records, grain })
    }

    /// What clusters of `bits` must be when they are read again.
    #[must_use]
    pub(crate) fn expected(&self, bits: ClusterBits) -> Expected<'_> {
        Expected { words: Larger::new(self.records.iter(), self.grain, bits).peekable() }
    }

    /// What compares clusters with their records.
    #[must_use]
    pub(crate) fn hold(&self) -> Hold {
        Hold { grain: self.grain, parts: Vec::new() }
    }
}

/// The records of clusters, asked for in their order.
pub(crate) struct Expected<'a> {
    words: Peekable<Larger<Words<'a>>>,
}

impl Expected<'_> {
    /// The record of `cluster`, which was not zero and does not come before the one asked for last.
    ///
    /// # Errors
    /// Those of the temporary file.
    pub(crate) fn of(&mut self, cluster: u64) -> Result<u128> {
        while let Some(word) = peek(&mut self.words)? {
            if index(word) == cluster {
                return Ok(word);
            }
            if index(word) > cluster {
                break;
            }
            self.words.next();
        }
        Err(Error::internal(format_args!("cluster {cluster} is read again and was not read before")))
    }
}

/// Compares clusters that are read again with the records of the first reading. Each thread has its own.
#[derive(Clone)]
pub(crate) struct Hold {
    grain: ClusterBits,
    parts: Vec<u128>,
}

impl Hold {
    /// Whether `content` is what `record` was made of.
    pub(crate) fn is_same(&mut self, content: &[u8], record: u128) -> bool {
        of_parts(content, self.grain, index(record), &mut self.parts) == record
    }
}
