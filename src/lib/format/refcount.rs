//! Widths and encoding of reference counts (spec, "Refcount blocks").

use crate::units::{ClusterBits, to_usize};

/// The width of a reference count: 1, 2, 4, 8, 16, 32 or 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefcountBits(u8);

impl RefcountBits {
    /// What new images get: room for two thousand million sharers.
    pub const DEFAULT: Self = Self(5);

    /// What images get that nobody shares in, as from qemu-img: some programs read no other width.
    pub const PLAIN: Self = Self(4);

    /// A width of `bits`.
    #[must_use]
    pub fn new(bits: u32) -> Option<Self> {
        bits.is_power_of_two().then(|| Self::from_order(bits.trailing_zeros())).flatten()
    }

    /// A width of `1 << order` bits.
    #[must_use]
    pub(crate) fn from_order(order: u32) -> Option<Self> {
        u8::try_from(order).ok().filter(|&o| o <= 6).map(Self)
    }

    /// The base-2 logarithm of the width.
    #[must_use]
    pub(crate) fn order(self) -> u32 {
        u32::from(self.0)
    }

    /// The width in bits.
    #[must_use]
    pub fn bits(self) -> u32 {
        1 << self.0
    }

    /// The largest count.
    #[must_use]
    pub fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// How many sharers a pool member may have: a quarter of what the width can hold, less one.
    ///
    /// That leaves room for two snapshots of a disk whose member is full, and for going back to one of them: the pool, the disk
    /// and each snapshot hold references, and `qemu-img snapshot -a` adds those of the snapshot before it drops those of the
    /// disk. With n sharers that is `1 + 4 n`. (With half of the width, QEMU 10.0.2 refuses to go back, and with 2^(bits-1)
    /// sharers it refuses the first snapshot: "Could not create snapshot: Invalid argument".)
    ///
    /// `None` where the width cannot hold 4 references, which is too narrow for a pool.
    #[must_use]
    pub fn sharer_limit(self) -> Option<u64> {
        (self.bits() >= 4).then(|| (1 << (self.bits() - 2)) - 1)
    }

    /// The number of counts in a refcount block of `cluster_bytes` bytes.
    #[must_use]
    pub(crate) fn per_block(self, cluster_bytes: u64) -> u64 {
        cluster_bytes * 8 / u64::from(self.bits())
    }

    /// Clusters of the refcount table and of the refcount blocks of a file with `others` other clusters: they count themselves too.
    #[must_use]
    pub(crate) fn structure(self, cluster_bits: ClusterBits, others: u64) -> (u64, u64) {
        let per_block = self.per_block(cluster_bits.bytes());
        let parts = |all: u64| {
            let blocks = all.div_ceil(per_block);
            (blocks.div_ceil(cluster_bits.entries()).max(1), blocks)
        };
        let all = with_own(others, |all| parts(all).0 + parts(all).1);
        parts(all)
    }

    /// The clusters of a file with `others` clusters that are no refcount blocks, and the blocks that count them and themselves.
    #[must_use]
    pub(crate) fn with_blocks(self, cluster_bits: ClusterBits, others: u64) -> u64 {
        let per_block = self.per_block(cluster_bits.bytes());
        with_own(others, |all| all.div_ceil(per_block))
    }

    /// The count at `index` of `block`; 0 past its end.
    #[must_use]
    pub(crate) fn get(self, block: &[u8], index: usize) -> u64 {
        let bits = self.bits() as usize;
        if bits < 8 {
            let per_byte = 8 / bits;
            let byte = block.get(index / per_byte).copied().unwrap_or(0);
            return u64::from(byte) >> (index % per_byte * bits) & self.max();
        }
        let width = bits / 8;
        let bytes = block.get(index * width..(index + 1) * width).unwrap_or_default();
        bytes.iter().fold(0, |count, &byte| count << 8 | u64::from(byte))
    }

    /// The encoding of `counts` ones, whose number fills whole bytes.
    #[must_use]
    pub(crate) fn ones(self, counts: u64) -> Vec<u8> {
        let mut encoded = Vec::new();
        self.encode(&vec![1; to_usize(counts)], &mut encoded);
        encoded
    }

    /// Appends the encoding of `counts`, whose number fills whole bytes, to `block`.
    ///
    /// Counts of a byte or more are big-endian integers; of smaller ones the first lies in the least significant bits.
    pub(crate) fn encode(self, counts: &[u64], block: &mut Vec<u8>) {
        match self.bits() {
            bits @ (1 | 2 | 4) => {
                for byte in counts.chunks((8 / bits) as usize) {
                    let packed = byte.iter().rev().fold(0, |packed: u64, count| packed << bits | count & self.max());
                    block.push(packed.to_be_bytes()[7]);
                }
            }
            bits => {
                let skip = 8 - bits as usize / 8;
                for count in counts {
                    block.extend_from_slice(count.to_be_bytes().get(skip..).unwrap_or_default());
                }
            }
        }
    }
}

/// The least number of clusters that `others` and those that count them take, where `own` says how many count so many.
fn with_own(others: u64, own: impl Fn(u64) -> u64) -> u64 {
    let mut all = others;
    loop {
        let next = others + own(all);
        if next == all {
            return all;
        }
        all = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn narrow_counts_fill_a_byte_from_its_low_end() {
        let mut block = Vec::new();
        RefcountBits::new(1).unwrap().encode(&[1, 0, 0, 0, 0, 0, 0, 0], &mut block);
        RefcountBits::new(2).unwrap().encode(&[1, 2, 0, 3], &mut block);
        RefcountBits::new(4).unwrap().encode(&[1, 2], &mut block);
        RefcountBits::new(16).unwrap().encode(&[258], &mut block);
        assert_eq!(block, [1, 0b1100_1001, 0x21, 1, 2]);
    }

    #[test]
    fn what_was_encoded_is_read_back_at_every_width() {
        for width in (0..=6).map(|order| RefcountBits::from_order(order).unwrap()) {
            let counts: Vec<u64> = (0..64).map(|n| (n * 0x0123_4567_89ab_cdef) & width.max()).collect();
            let mut block = Vec::new();
            width.encode(&counts, &mut block);
            let read: Vec<u64> = (0..65).map(|index| width.get(&block, index)).collect();
            assert_eq!((&read[..64], read[64]), (&counts[..], 0));
        }
    }

    #[test]
    fn a_pool_needs_room_for_four_references() {
        let limit = |bits| RefcountBits::new(bits).unwrap().sharer_limit();
        assert_eq!((limit(1), limit(2), limit(4)), (None, None, Some(3)));
        assert_eq!((limit(16), limit(64)), (Some(16383), Some((1 << 62) - 1)));
        assert_eq!(RefcountBits::new(64).unwrap().max(), u64::MAX);
    }

    proptest! {
        #[test]
        fn the_refcount_blocks_cover_the_file_and_no_block_is_idle(
            bits in 9u32..=21, order in 0u32..=6, others in 1u64..1 << 34,
        ) {
            let (bits, width) = (ClusterBits::new(bits).unwrap(), RefcountBits::from_order(order).unwrap());
            let (table, blocks) = width.structure(bits, others);
            let per_block = width.per_block(bits.bytes());
            prop_assert!(blocks * per_block >= others + table + blocks);
            prop_assert!(table * bits.entries() >= blocks);
            prop_assert!((blocks - 1) * per_block < others + table + blocks);
        }
    }
}
