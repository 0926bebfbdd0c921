//! What is asked for.

use std::num::NonZeroU64;

use crate::build::layout::sharer_limit;
use crate::build::writer::Traits;
use crate::codec::CompressionLevel;
use crate::disk::Disk;
use crate::error::Result;
use crate::format::refcount::RefcountBits;
use crate::pool::Pin;
use crate::units::ClusterBits;

/// The cluster size of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClusterSize {
    /// The one of 4, 8, 16, 32 and 64 KiB that gives the smallest file, the larger one on a near tie. How far the contents can be
    /// compressed is estimated.
    #[default]
    Auto,
    /// The 64 KiB that qemu-img takes, for images as others write them.
    Usual,
    /// This one.
    Fixed(ClusterBits),
}

/// A cluster size, and why that one.
#[derive(Clone, Copy)]
pub(super) struct Resolved {
    /// `None` where it is chosen by what the disk holds.
    pub(super) fixed: Option<ClusterBits>,
    /// As in the report.
    pub(super) reason: &'static str,
}

impl ClusterSize {
    /// What it means for an image over `backing`.
    pub(super) fn resolve(self, backing: Option<&Disk>) -> Resolved {
        let (fixed, reason) = match (self, backing) {
            (Self::Fixed(bits), _) => (Some(bits), "option"),
            (Self::Usual, _) => (Some(ClusterBits::DEFAULT), "default"),
            (Self::Auto, None) => (None, "auto"),
            // What differs from the backing file depends on the cluster size; its own one fits.
            (Self::Auto, Some(backing)) => {
                let own = backing.qcow2().map_or(ClusterBits::DEFAULT, |image| image.header().cluster_bits);
                (Some(own), "backing")
            }
        };
        Resolved { fixed, reason }
    }
}

/// Whether equal clusters share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// They do; which of them enter the pool.
    Pooled(Pin),
    /// Every guest cluster that is not zero has a cluster of its own, and there is no pool: an image as others write it.
    Plain,
}

impl Sharing {
    /// How often a stored cluster may be referenced by guest clusters.
    pub(crate) fn limit(self, bits: RefcountBits) -> Result<u64> {
        match self {
            Self::Pooled(_) => sharer_limit(bits),
            Self::Plain => Ok(bits.max()),
        }
    }

    /// `members` of a pool, where there is one.
    pub(super) fn members(self, members: u64) -> Option<u64> {
        (self != Self::Plain).then_some(members)
    }
}

/// What to write.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// Cluster size.
    pub cluster_size: ClusterSize,
    /// Refcount width.
    pub refcount_bits: RefcountBits,
    /// Header fields.
    pub traits: Traits,
    /// Who shares, and which clusters are pooled.
    pub sharing: Sharing,
    /// Whether and how clusters are compressed; of the kind that the header fields say.
    pub compress: Option<CompressionLevel>,
    /// Whether the output is on the disk when [`convert`](super::convert) returns; without, a power failure soon after may lose it.
    pub durable: bool,
    /// Whether the output is taken out of the host's page cache in the end.
    pub uncached: bool,
    /// How many bytes may be written in a second.
    pub rate: Option<NonZeroU64>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            cluster_size: ClusterSize::Auto,
            refcount_bits: RefcountBits::DEFAULT,
            traits: Traits::default(),
            sharing: Sharing::Pooled(Pin::Shared),
            compress: None,
            durable: true,
            uncached: false,
            rate: None,
        }
    }
}
