//! Finding equal clusters: scan, group by fingerprint, compare bytes, plan.
//!
//! ```text
//!  scan       read every cluster once; drop zeros; (fingerprint, cluster) records in guest order     parallel
//!  level      the records of a larger cluster size, derived from those of 4 KiB; sort                parallel sort
//!  group      runs of equal fingerprints become links: duplicate -> first cluster of the same content
//!  verify     compare the bytes behind every link (I4); what differs is regrouped                    parallel
//!  plan       number the stored clusters in guest order; who shares what, how often
//! ```
//!
//! Every stage is a sequence of records, packed into a word each, that is sorted or streamed, in memory or spilled to a temporary file, so that
//! memory is bounded (I9) and the result does not depend on the number of threads (I5).

use std::iter::Peekable;

use crate::error::Result;
use crate::sort::record::record;

pub(crate) mod group;
pub(crate) mod larger;
pub(crate) mod level;
pub(crate) mod numbers;
pub(crate) mod plan;
pub(crate) mod reading;
pub(crate) mod scan;
pub(crate) mod verify;
pub(crate) mod weave;

pub(crate) use crate::sort::content::INDEX_BITS;

/// A run of clusters: the first, and how many they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

record!(run_words: Run { start: 64, len: 64 });

impl Run {
    /// The cluster behind it.
    pub(crate) fn end(self) -> u64 {
        self.start + self.len
    }

    /// Takes the first `count` clusters away.
    pub(crate) fn skip(self, count: u64) -> Self {
        Self { start: self.start + count, len: self.len - count }
    }
}

/// The next record, which stays the next one; an error is taken out.
pub(crate) fn peek<T: Copy, I: Iterator<Item = Result<T>>>(records: &mut Peekable<I>) -> Result<Option<T>> {
    match records.peek() {
        None => Ok(None),
        Some(Ok(record)) => Ok(Some(*record)),
        Some(Err(_)) => records.next().transpose(),
    }
}
