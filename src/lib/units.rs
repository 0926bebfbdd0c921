//! Cluster sizes, and guest and host positions as different types, so that a mix-up does not compile.
//!
//! ```
//! use dedup_img::units::{ClusterBits, GuestOffset};
//!
//! assert_eq!(ClusterBits::from_bytes(65536), Some(ClusterBits::DEFAULT));
//! assert_eq!(ClusterBits::from_bytes(3000), None);
//! assert_eq!(format!("{:#x}", GuestOffset(4096)), "0x1000");
//! ```

use std::fmt;
use std::ops::Range;

use serde::Serialize;

// Lengths and indexes of the format have 64 bits. Where memory is addressed by fewer they could not be told apart from larger ones.
const _: () = assert!(usize::BITS >= u64::BITS, "a machine with addresses of 64 bits is needed");

/// The unit in which disks have their size, and what one writes whole or not at all, in bytes.
pub(crate) const SECTOR: u64 = 512;

/// A length or an index of the format as one in memory: the same number.
#[expect(clippy::cast_possible_truncation, reason = "an address has no fewer than 64 bits, which is asserted above")]
pub(crate) const fn to_usize(number: u64) -> usize {
    number as usize
}

macro_rules! position {
    ($(#[$doc:meta])* $vis:vis $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
        $vis struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

position! {
    /// A byte offset on the disk that the guest sees.
    pub GuestOffset
}
position! {
    /// A byte offset in an image file.
    pub HostOffset
}
impl From<HostOffset> for u64 {
    fn from(offset: HostOffset) -> Self {
        offset.0
    }
}
position! {
    /// The index of a cluster of the guest's disk.
    pub(crate) GuestCluster
}
position! {
    /// The index of a cluster of the row in which the layers of a disk with its snapshots lie (see [`crate::disk::history`]); a disk
    /// without snapshots is such a row itself.
    pub(crate) RowCluster
}
position! {
    /// Where a cluster of the row is on the disk of its layer: a [`GuestCluster`], but behind the layers the [`RowCluster`] of a VM state.
    pub(crate) RowPlace
}
position! {
    /// The number of a stored cluster, in the order in which they are stored.
    pub(crate) StoredCluster
}
position! {
    /// The index of a cluster of the image file.
    pub(crate) HostCluster
}

/// The size of a cluster as a power of two: 9 (512 bytes) to 21 (2 MiB), the range of QEMU 10.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClusterBits(u8);

impl ClusterBits {
    /// 512 bytes.
    pub const MIN: Self = Self(9);
    /// 2 MiB.
    pub const MAX: Self = Self(21);
    /// 4 KiB, the block size of most guest file systems and the grain of every automatic choice.
    pub const GRAIN: Self = Self(12);
    /// 64 KiB, QEMU's default.
    pub const DEFAULT: Self = Self(16);

    /// The size of `2^bits` bytes, if QEMU supports it.
    #[must_use]
    pub fn new(bits: u32) -> Option<Self> {
        let bits = u8::try_from(bits).ok()?;
        (Self::MIN.0..=Self::MAX.0).contains(&bits).then_some(Self(bits))
    }

    /// The cluster size of exactly `bytes`, if QEMU supports it.
    #[must_use]
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        bytes.is_power_of_two().then(|| Self::new(bytes.trailing_zeros())).flatten()
    }

    /// The exponent.
    #[must_use]
    pub fn bits(self) -> u32 {
        u32::from(self.0)
    }

    /// The size of a cluster in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The size of a cluster in bytes, for lengths in memory.
    #[must_use]
    pub(crate) fn len(self) -> usize {
        1 << self.0
    }

    /// The number of 8-byte entries that a cluster holds (an L2 table without subclusters).
    #[must_use]
    pub(crate) fn entries(self) -> u64 {
        self.bytes() / 8
    }

    /// The number of clusters that hold `bytes` bytes.
    #[must_use]
    pub fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }
}

impl GuestCluster {
    /// The first byte of the cluster.
    #[must_use]
    pub(crate) fn offset(self, bits: ClusterBits) -> GuestOffset {
        GuestOffset(self.0 << bits.bits())
    }
}

impl RowCluster {
    /// The first byte of the cluster in the row.
    #[must_use]
    pub(crate) fn offset(self, bits: ClusterBits) -> u64 {
        self.0 << bits.bits()
    }
}

impl StoredCluster {
    /// The one that is stored `count` clusters later.
    #[must_use]
    pub(crate) fn after(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl HostCluster {
    /// The first byte of the cluster.
    #[must_use]
    pub(crate) fn offset(self, bits: ClusterBits) -> HostOffset {
        HostOffset(self.0 << bits.bits())
    }
}

/// Appends `next` to `ranges`, which ascend, as a part of the last one where it touches or overlaps that.
pub(crate) fn append(ranges: &mut Vec<Range<u64>>, next: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if next.start <= last.end => last.end = last.end.max(next.end),
        _ => ranges.push(next),
    }
}

/// `part` of `whole` as a percentage; 0 of nothing.
#[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
pub(crate) fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_become_one() {
        let mut ranges = Vec::new();
        [0..2, 2..3, 1..2, 5..6, 6..8].into_iter().for_each(|next| append(&mut ranges, next));
        assert_eq!(ranges, [0..3, 5..8]);
    }

    #[test]
    fn cluster_sizes_are_those_of_qemu() {
        assert_eq!(ClusterBits::from_bytes(4096), Some(ClusterBits::GRAIN));
        assert_eq!(ClusterBits::from_bytes(512), Some(ClusterBits::MIN));
        assert_eq!(ClusterBits::from_bytes(2 << 20), Some(ClusterBits::MAX));
        for bytes in [0, 1, 256, 3000, 4 << 20] {
            assert_eq!(ClusterBits::from_bytes(bytes), None);
        }
    }
}
