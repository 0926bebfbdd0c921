//! The stored refcounts as far as COPIED flags depend on them: is it exactly one?

use std::ops::Range;

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use crate::check::counts::{SIDE_BY_SIDE, by_word};
use crate::error::{Error, Result};
use crate::format::refcount::RefcountBits;
use crate::image::refcounts::{Block, Refcounts};
use crate::storage::buffer::zeroed;
use crate::units::to_usize;

/// What is known of a stored refcount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// It is 0.
    Free,
    /// It is 1.
    One,
    /// It is more than 1.
    Many,
    /// It cannot be read.
    Unknown,
}

/// The state of every cluster's stored refcount, two bits each.
pub(crate) struct States {
    per_block: u64,
    /// Clusters that the words tell of.
    clusters: u64,
    words: Vec<u64>,
    /// Blocks behind these whose counts cannot be read.
    unreadable: Vec<u64>,
}

/// Clusters in a word.
const PER_WORD: u64 = SIDE_BY_SIDE;
/// The state [`State::One`] of each cluster of a word.
const ONES: u64 = 0x5555_5555_5555_5555;

/// The states of as many counts as a word tells of.
fn states(width: RefcountBits, counts: &[u8]) -> u64 {
    (0..32).rev().fold(0, |word, index| word << 2 | width.get(counts, index).min(2))
}

impl States {
    /// Reads all refcount blocks that count the first `clusters` clusters.
    ///
    /// # Errors
    /// Those of reading.
    pub(crate) fn load(refcounts: &Refcounts<'_>, clusters: u64) -> Result<Self> {
        let per_block = refcounts.per_block();
        let blocks = clusters.div_ceil(per_block);
        // A block counts 64 clusters at the least.
        let words_in = |clusters: u64| to_usize(clusters / PER_WORD);
        let mut words = zeroed(words_in(blocks.saturating_mul(per_block)))?;
        let ones = refcounts.width().ones(PER_WORD);
        words.par_chunks_mut(words_in(per_block)).enumerate().try_for_each_init(
            Vec::new,
            |block, (index, words)| {
                match refcounts.block(index as u64) {
                    Block::Missing => {}
                    Block::Unaligned(_) | Block::Unreachable(_) => words.fill(u64::MAX),
                    Block::At(offset) => {
                        refcounts.read(offset, block)?;
                        for (word, counts) in words.iter_mut().zip(block.chunks_exact(ones.len())) {
                            *word = if counts == ones { ONES } else { states(refcounts.width(), counts) };
                        }
                    }
                }
                Ok::<_, Error>(())
            },
        )?;
        let unreadable = (blocks..refcounts.entries().len() as u64)
            .filter(|&index| matches!(refcounts.block(index), Block::Unaligned(_) | Block::Unreachable(_)))
            .collect();
        Ok(Self { per_block, clusters: blocks.saturating_mul(per_block), words, unreadable })
    }

    /// The state of `cluster`.
    #[must_use]
    pub(crate) fn get(&self, cluster: u64) -> State {
        if cluster >= self.clusters {
            let unreadable = self.unreadable.binary_search(&(cluster / self.per_block)).is_ok();
            return if unreadable { State::Unknown } else { State::Free };
        }
        match self.word(cluster) >> (cluster % PER_WORD * 2) & 3 {
            0 => State::Free,
            1 => State::One,
            2 => State::Many,
            _ => State::Unknown,
        }
    }

    /// Whether the stored refcount of each of `clusters` is one.
    #[must_use]
    pub(crate) fn all_one(&self, clusters: Range<u64>) -> bool {
        self.all(clusters, |word| word ^ ONES)
    }

    /// Whether none of `clusters` is known to have a stored refcount of one.
    #[must_use]
    pub(crate) fn none_one(&self, clusters: Range<u64>) -> bool {
        self.all(clusters, |word| word & !(word >> 1) & ONES)
    }

    /// Whether `wrong` has no bit for any of `clusters`.
    fn all(&self, clusters: Range<u64>, wrong: impl Fn(u64) -> u64) -> bool {
        by_word(clusters, PER_WORD).all(|(clusters, mask)| wrong(self.word(clusters.start)) & mask == 0)
    }

    /// The common stored refcount of [`SIDE_BY_SIDE`] clusters from `first` on, a multiple of that, if it is 0 or 1 for all of
    /// them.
    pub(crate) fn common(&self, first: u64) -> Option<u64> {
        match self.word(first) {
            0 => Some(0),
            ONES => Some(1),
            _ => None,
        }
    }

    /// The word that tells of `cluster`.
    fn word(&self, cluster: u64) -> u64 {
        usize::try_from(cluster / PER_WORD).ok().and_then(|index| self.words.get(index)).copied().unwrap_or(0)
    }
}
