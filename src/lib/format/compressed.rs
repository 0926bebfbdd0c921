//! Compressed cluster descriptors (spec, "Compressed Clusters Descriptor").

use crate::units::{ClusterBits, HostOffset, SECTOR};

/// Where the compressed bytes of a cluster lie: any alignment, and neighbours may share a host cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CompressedExtent {
    /// The first compressed byte.
    pub host: HostOffset,
    /// 512-byte sectors touched beyond the first.
    pub more_sectors: u64,
}

impl CompressedExtent {
    /// Where `len` compressed bytes lie that begin at `host`; `len` is not 0.
    #[must_use]
    pub(crate) fn new(host: HostOffset, len: u64) -> Self {
        Self { host, more_sectors: (host.0 + len - 1) / SECTOR - host.0 / SECTOR }
    }

    /// Whether a descriptor can say so: it has `cluster_bits - 8` bits for the sectors.
    #[must_use]
    pub(crate) fn has_descriptor(self, cluster_bits: ClusterBits) -> bool {
        self.more_sectors >> (cluster_bits.bits() - 8) == 0
    }

    /// The bit at which the sector count begins: 62 - (cluster_bits - 8).
    fn split(cluster_bits: ClusterBits) -> u32 {
        70 - cluster_bits.bits()
    }

    /// Decodes a descriptor, whose bits 62 and 63 are ignored.
    #[must_use]
    pub fn decode(word: u64, cluster_bits: ClusterBits) -> Self {
        let split = Self::split(cluster_bits);
        let word = word & ((1 << 62) - 1);
        Self { host: HostOffset(word & ((1 << split) - 1)), more_sectors: word >> split }
    }

    /// Bits 0 to 61 of the descriptor.
    #[must_use]
    pub fn encode(self, cluster_bits: ClusterBits) -> u64 {
        debug_assert!(self.has_descriptor(cluster_bits), "{self:?} has no descriptor");
        self.host.0 | self.more_sectors << Self::split(cluster_bits)
    }

    /// The bytes from the first compressed one to the end of the last sector: all that a decoder may look at.
    #[must_use]
    pub fn len(self) -> u64 {
        (self.more_sectors + 1) * SECTOR - self.host.0 % SECTOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sector_count_has_8_bits_at_64_kib() {
        let extent = CompressedExtent { host: HostOffset(0x5_0123), more_sectors: 3 };
        assert_eq!(extent.encode(ClusterBits::DEFAULT), 3 << 54 | 0x5_0123);
        assert_eq!(CompressedExtent::decode(u64::MAX, ClusterBits::DEFAULT).more_sectors, 255);
        assert_eq!(extent.len(), 4 * 512 - 0x123);
        assert_eq!(CompressedExtent::new(extent.host, 4 * 512 - 0x123), extent);
        assert!(CompressedExtent { more_sectors: 255, ..extent }.has_descriptor(ClusterBits::DEFAULT));
        assert!(!CompressedExtent { more_sectors: 256, ..extent }.has_descriptor(ClusterBits::DEFAULT));
    }
}
