//! Whose content a cluster gets, and which new clusters there are for it.

use crate::dedup::reading::FirstReading;
use crate::sort::content::ContentAt;
use crate::sort::record::record;
use crate::sort::sequence::Sequence;
use crate::units::HostCluster;

/// Marks the class of content that the target does not have: the rest is the guest cluster that it is read from. Other classes are
/// units.
pub(super) const NEW: u64 = 1 << 63;

/// New clusters, in the order in which they got their places.
pub(super) struct Stores {
    pub(super) places: Sequence<Place>,
    /// What the content was when it was read first, of each that the target does not have.
    pub(super) records: Sequence<ContentAt>,
    /// The first reading of the source.
    pub(super) first: FirstReading,
}

/// A changed cluster and its class, by class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Classed {
    pub(super) class: u64,
    pub(super) guest: u64,
}

record!(classed_words: Classed { class: 64, guest: 64 });

/// A new cluster, and the class whose content it gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(super) host: HostCluster,
    pub(super) class: u64,
}

record!(place_words: Place { host: 64, class: 64 });
