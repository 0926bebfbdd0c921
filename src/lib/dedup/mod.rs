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
//! Every stage is a sequence of 128-bit words that is sorted or streamed, in memory or spilled to a temporary file, so that
//! memory is bounded (I9) and the result does not depend on the number of threads (I5).

use std::iter::Peekable;

use crate::error::Result;
use crate::units::halves;

pub(crate) mod group;
pub(crate) mod larger;
pub(crate) mod level;
pub(crate) mod numbers;
pub(crate) mod plan;
pub(crate) mod reading;
pub(crate) mod scan;
pub(crate) mod verify;
pub(crate) mod weave;

/// Bits of a word that hold a cluster's index: enough for the largest disk that QEMU can map at any cluster size.
pub(crate) const INDEX_BITS: u32 = 40;
/// Masks a cluster index.
pub(crate) const INDEX: u128 = (1 << INDEX_BITS) - 1;

/// The low cluster index of a word.
pub(crate) fn index(word: u128) -> u64 {
    halves(word & INDEX).1
}

/// The first of a run of clusters, and how many they are.
pub(crate) fn split_run(word: u128) -> (u64, u64) {
    halves(word)
}

/// The next word, which stays the next one; an error is taken out.
pub(crate) fn peek<I: Iterator<Item = Result<u128>>>(words: &mut Peekable<I>) -> Result<Option<u128>> {
    match words.peek() {
        None => Ok(None),
        Some(Ok(word)) => Ok(Some(*word)),
        Some(Err(_)) => words.next().transpose(),
    }
}
