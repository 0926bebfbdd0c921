//! Whose content a cluster gets, and which new clusters there are for it.

use crate::dedup::reading::FirstReading;
use crate::sort::sequence::Sequence;

/// Marks the class of content that the target does not have: the rest is the guest cluster that it is read from. Other classes are
/// units.
pub(super) const NEW: u64 = 1 << 63;

/// New clusters, in the order in which they got their places.
pub(super) struct Stores {
    /// The host cluster (high 64 bits) and the class whose content it gets.
    pub(super) places: Sequence,
    /// What the content of each was when it was read first; 0 for one that the target has.
    pub(super) records: Sequence,
    /// The first reading of the source.
    pub(super) first: FirstReading,
}
