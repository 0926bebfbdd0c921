//! 64-bit numbers by stored cluster, more than memory may hold.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::error::{OrInternal, Result};
use crate::sort::sequence::Spill;
use crate::storage::buffer::zeroed;
use crate::units::{StoredCluster, to_usize};

/// A number for each stored cluster, which is set once and read in any order; 0 until then.
pub(crate) enum Numbers {
    Memory(Vec<u64>),
    File(File, Spill),
}

impl Numbers {
    /// `count` zeros, in a temporary file where they would take more than twice the words that stay in memory.
    pub(crate) fn new(count: u64, spill: &Spill) -> Result<Self> {
        match usize::try_from(count).ok().filter(|&count| count / 2 <= spill.words()) {
            Some(count) => zeroed(count).map(Self::Memory),
            None => Ok(Self::File(spill.file()?, spill.clone())),
        }
    }

    /// Sets number `at`.
    pub(crate) fn set(&mut self, at: StoredCluster, number: u64) -> Result<()> {
        match self {
            Self::Memory(numbers) => {
                *numbers.get_mut(to_usize(at.0)).or_internal("a stored cluster has a number that is too high")? =
                    number;
                Ok(())
            }
            Self::File(file, spill) => file.write_all_at(&number.to_be_bytes(), at.0 * 8).map_err(|e| spill.error(e)),
        }
    }

    /// Number `at`.
    pub(crate) fn get(&self, at: StoredCluster) -> Result<u64> {
        match self {
            Self::Memory(numbers) => {
                numbers.get(to_usize(at.0)).copied().or_internal("a stored cluster has a number that is too high")
            }
            Self::File(file, spill) => {
                let mut bytes = [0; 8];
                file.read_exact_at(&mut bytes, at.0 * 8).map_err(|e| spill.error(e))?;
                Ok(u64::from_be_bytes(bytes))
            }
        }
    }
}
