//! The stored refcounts as far as COPIED flags depend on them: is it exactly one?

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use crate::error::Result;
use crate::image::refcounts::{Block, Refcounts};

/// What is known of a stored refcount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
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
pub struct States {
    per_block: u64,
    blocks: Vec<Vec<u8>>,
    /// Blocks behind these whose counts cannot be read.
    unreadable: Vec<u64>,
}

impl States {
    /// Reads all refcount blocks that count the first `clusters` clusters.
    ///
    /// # Errors
    /// Those of reading.
    pub fn load(refcounts: &Refcounts<'_>, clusters: u64) -> Result<Self> {
        let per_block = refcounts.per_block();
        let blocks: Vec<Vec<u8>> = (0..clusters.div_ceil(per_block))
            .into_par_iter()
            .map_init(Vec::new, |block, index| {
                let packed = |state: u8| vec![state * 0b0101_0101; usize::try_from(per_block.div_ceil(4)).unwrap_or(0)];
                match refcounts.block(index) {
                    Block::Missing => Ok(Vec::new()),
                    Block::Unaligned(_) | Block::Unreachable(_) => Ok(packed(3)),
                    Block::At(offset) => {
                        refcounts.read(offset, block)?;
                        let mut states = packed(0);
                        for cluster in 0..per_block {
                            let state = u8::try_from(refcounts.count(block, cluster).min(2)).unwrap_or(2);
                            if let Some(byte) = usize::try_from(cluster / 4).ok().and_then(|i| states.get_mut(i)) {
                                *byte |= state << (cluster % 4 * 2);
                            }
                        }
                        Ok(states)
                    }
                }
            })
            .collect::<Result<_>>()?;
        let behind = blocks.len() as u64..refcounts.entries().len() as u64;
        let unreadable = behind
            .filter(|&index| matches!(refcounts.block(index), Block::Unaligned(_) | Block::Unreachable(_)))
            .collect();
        Ok(Self { per_block, blocks, unreadable })
    }

    /// The state of `cluster`.
    #[must_use]
    pub fn get(&self, cluster: u64) -> State {
        let (block, index) = (cluster / self.per_block, cluster % self.per_block);
        if self.unreadable.binary_search(&block).is_ok() {
            return State::Unknown;
        }
        let block = usize::try_from(block).ok().and_then(|b| self.blocks.get(b));
        let byte = usize::try_from(index / 4).ok().and_then(|i| block?.get(i)).copied().unwrap_or(0);
        match byte >> (index % 4 * 2) & 3 {
            0 => State::Free,
            1 => State::One,
            2 => State::Many,
            _ => State::Unknown,
        }
    }
}
