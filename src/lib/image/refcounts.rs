//! The refcounts that an image has stored.

use crate::error::{Context, Doing, Result, Table};
use crate::format::header::Header;
use crate::format::refcount::RefcountBits;
use crate::storage::buffer::zeroed;
use crate::storage::{Storage, read_padded};
use crate::units::{ClusterBits, HostOffset, to_usize};

/// Bits 9 to 63 of a refcount table entry.
const OFFSET_MASK: u64 = !511;

/// QEMU: no file is longer, and what would lie behind is not read.
const MAX_FILE: u64 = (1 << 63) - (1 << 30);

/// What a refcount table entry points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Block {
    /// Nothing: all its counts are 0.
    Missing,
    /// A refcount block.
    At(HostOffset),
    /// No cluster boundary; its counts cannot be read.
    Unaligned(HostOffset),
    /// Behind every file offset; its counts cannot be read.
    Unreachable(HostOffset),
}

/// The refcount table of an image.
pub(crate) struct Refcounts<'a> {
    storage: &'a dyn Storage,
    cluster_bits: ClusterBits,
    width: RefcountBits,
    table: Vec<u64>,
}

impl<'a> Refcounts<'a> {
    /// Reads the table; what the file lacks of it is 0, as for QEMU.
    ///
    /// # Errors
    /// Those of reading.
    pub(crate) fn load(storage: &'a dyn Storage, header: &Header) -> Result<Self> {
        let mut bytes = zeroed(header.refcount_table_clusters as usize * header.cluster_bits.len())?;
        read_padded(storage, &mut bytes, header.refcount_table_offset.0)
            .doing(|| Doing::Reading(Table::Refcounts, None))?;
        let table = bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect();
        Ok(Self { storage, cluster_bits: header.cluster_bits, width: header.refcount_bits, table })
    }

    /// The entries of the table, as stored.
    #[must_use]
    pub(crate) fn entries(&self) -> &[u64] {
        &self.table
    }

    /// The reserved bits of a table entry.
    #[must_use]
    pub(crate) fn reserved(entry: u64) -> u64 {
        entry & !OFFSET_MASK
    }

    /// The width of a count.
    #[must_use]
    pub(crate) fn width(&self) -> RefcountBits {
        self.width
    }

    /// How many clusters a block counts.
    #[must_use]
    pub(crate) fn per_block(&self) -> u64 {
        self.width.per_block(self.cluster_bits.bytes())
    }

    /// Where block `index` is.
    #[must_use]
    pub(crate) fn block(&self, index: u64) -> Block {
        // What the table does not reach has no block.
        let entry = self.table.get(to_usize(index)).copied().unwrap_or(0);
        match entry & OFFSET_MASK {
            0 => Block::Missing,
            offset if offset & (self.cluster_bits.bytes() - 1) != 0 => Block::Unaligned(HostOffset(offset)),
            offset if offset > MAX_FILE - self.cluster_bits.bytes() => Block::Unreachable(HostOffset(offset)),
            offset => Block::At(HostOffset(offset)),
        }
    }

    /// Reads the block at `offset`; past the end of the file all its counts are 0.
    ///
    /// # Errors
    /// Those of reading.
    pub(crate) fn read(&self, offset: HostOffset, block: &mut Vec<u8>) -> Result<()> {
        block.resize(self.cluster_bits.len(), 0);
        read_padded(self.storage, block, offset.0).reading(Table::RefcountBlock, offset)
    }

    /// The count at `index` of a block that was read.
    #[must_use]
    pub(crate) fn count(&self, block: &[u8], index: u64) -> u64 {
        self.width.get(block, to_usize(index))
    }
}
