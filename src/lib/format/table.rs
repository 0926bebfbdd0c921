//! Entries of L1 and L2 tables (spec, "L1 table", "L2 table", "Extended L2 entries").

use super::compressed::CompressedExtent;
use crate::units::{ClusterBits, HostOffset};

/// Bits 9 to 55: where something lies in the file.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: the target's refcount is exactly one, so it may be written in place.
const COPIED: u64 = 1 << 63;
/// Bit 62: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard entry: reads as zeros.
const ZERO: u64 = 1;

/// The L2 table that an L1 entry points to; `None` where the whole range is unallocated.
#[must_use]
pub(crate) fn l1_target(entry: u64) -> Option<HostOffset> {
    let offset = entry & OFFSET_MASK;
    (offset != 0).then_some(HostOffset(offset))
}

/// The reserved bits of an L1 entry.
#[must_use]
pub(crate) fn l1_reserved(entry: u64) -> u64 {
    entry & !(OFFSET_MASK | COPIED)
}

/// The COPIED flag of an L1 or L2 entry.
#[must_use]
pub(crate) fn is_copied(entry: u64) -> bool {
    entry & COPIED != 0
}

/// The entry with its COPIED flag set or cleared.
#[must_use]
pub(crate) fn with_copied(entry: u64, copied: bool) -> u64 {
    if copied { entry | COPIED } else { entry & !COPIED }
}

/// The entry of an L1 table, or of an L2 table if it is not compressed, with another offset and the same flags.
#[must_use]
pub(crate) fn with_offset(entry: u64, offset: HostOffset) -> u64 {
    entry & !OFFSET_MASK | offset.0 & OFFSET_MASK
}

/// The reserved bits of an L2 entry that is not compressed.
#[must_use]
pub(crate) fn l2_reserved(entry: u64) -> u64 {
    entry & !(OFFSET_MASK | COPIED | COMPRESSED | ZERO)
}

/// An L1 entry that points to `table`.
#[must_use]
pub(crate) fn l1_entry(table: HostOffset, copied: bool) -> u64 {
    table.0 | if copied { COPIED } else { 0 }
}

/// What an L2 entry says about its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum L2Entry {
    /// Nothing here: the backing file shows through, or zeros.
    Unallocated,
    /// Reads as zeros; a cluster may be kept as preallocation.
    Zero {
        /// The preallocated cluster.
        host: Option<HostOffset>,
        /// Its COPIED flag.
        copied: bool,
    },
    /// Stored in a cluster of its own or of several sharers.
    Data {
        /// Where.
        host: HostOffset,
        /// The COPIED flag.
        copied: bool,
    },
    /// Stored compressed.
    Compressed(CompressedExtent),
}

impl L2Entry {
    /// Decodes the 64-bit word of an entry. `zero_flag` says whether bit 0 means "reads as zeros": everywhere but with
    /// subclusters. (In version 2 it is reserved, and QEMU reports the entry as damage.)
    ///
    /// As in QEMU, an entry whose offset is 0 is unallocated even if COPIED is set.
    #[must_use]
    pub(crate) fn decode(word: u64, cluster_bits: ClusterBits, zero_flag: bool) -> Self {
        if word & COMPRESSED != 0 {
            return Self::Compressed(CompressedExtent::decode(word, cluster_bits));
        }
        let host = HostOffset(word & OFFSET_MASK);
        let copied = word & COPIED != 0;
        if zero_flag && word & ZERO != 0 {
            return Self::Zero { host: (host.0 != 0).then_some(host), copied };
        }
        match host.0 {
            0 => Self::Unallocated,
            _ => Self::Data { host, copied },
        }
    }

    /// The 64-bit word of the entry: the inverse of [`L2Entry::decode`].
    #[must_use]
    pub(crate) fn encode(self, cluster_bits: ClusterBits) -> u64 {
        let flag = |copied| if copied { COPIED } else { 0 };
        match self {
            Self::Unallocated => 0,
            Self::Zero { host, copied } => ZERO | host.map_or(0, |h| h.0 | flag(copied)),
            Self::Data { host, copied } => host.0 | flag(copied),
            Self::Compressed(extent) => COMPRESSED | extent.encode(cluster_bits),
        }
    }
}

/// The subclusters of a cluster in an image with extended L2 entries: 32 pieces, each allocated, zero or neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subclusters(pub u64);

/// How one subcluster reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subcluster {
    /// From the entry's host cluster.
    Allocated,
    /// As zeros.
    Zero,
    /// From the backing file.
    Unallocated,
}

impl Subclusters {
    /// The bits that say which subclusters are allocated.
    pub(crate) const ALLOCATED: u64 = 0xffff_ffff;
    /// Subclusters in a cluster.
    pub(crate) const COUNT: u32 = 32;

    /// Whether the bitmap contradicts itself or its entry: a subcluster allocated and zero, or allocated in no cluster. QEMU
    /// reports an I/O error for such a cluster.
    #[must_use]
    pub(crate) fn is_invalid(self, has_cluster: bool) -> bool {
        self.0 >> Self::COUNT & self.0 != 0 || (!has_cluster && self.0 & Self::ALLOCATED != 0)
    }

    /// Whether every subcluster reads as zeros by its flag.
    #[must_use]
    pub(crate) fn reads_as_zeros(self) -> bool {
        self.0 >> Self::COUNT == Self::ALLOCATED
    }

    /// How subcluster `index` (0 to 31) of a valid bitmap reads.
    #[must_use]
    pub(crate) fn get(self, index: u32) -> Subcluster {
        if self.0 >> (index + Self::COUNT) & 1 == 1 {
            Subcluster::Zero
        } else if self.0 >> index & 1 == 1 {
            Subcluster::Allocated
        } else {
            Subcluster::Unallocated
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host() -> impl Strategy<Value = HostOffset> {
        (1u64..1 << 47).prop_map(|n| HostOffset(n << 9))
    }

    fn entry() -> impl Strategy<Value = (ClusterBits, L2Entry)> {
        (9u32..=21, host(), any::<bool>(), 0u8..5, any::<u64>()).prop_map(|(bits, host, copied, kind, raw)| {
            let bits = ClusterBits::new(bits).unwrap();
            let entry = match kind {
                0 => L2Entry::Unallocated,
                1 => L2Entry::Zero { host: None, copied: false },
                2 => L2Entry::Zero { host: Some(host), copied },
                3 => L2Entry::Data { host, copied },
                _ => L2Entry::Compressed(CompressedExtent::decode(raw, bits)),
            };
            (bits, entry)
        })
    }

    proptest! {
        #[test]
        fn encode_and_decode_are_inverse((bits, entry) in entry()) {
            prop_assert_eq!(L2Entry::decode(entry.encode(bits), bits, true), entry);
        }
    }

    #[test]
    fn an_entry_without_offset_is_unallocated_even_if_copied_is_set() {
        assert_eq!(L2Entry::decode(COPIED, ClusterBits::DEFAULT, true), L2Entry::Unallocated);
    }

    #[test]
    fn bit_0_is_no_zero_flag_with_subclusters() {
        let word = 0x10000 | COPIED | ZERO;
        let data = L2Entry::Data { host: HostOffset(0x10000), copied: true };
        assert_eq!(L2Entry::decode(word, ClusterBits::DEFAULT, false), data);
    }
}
