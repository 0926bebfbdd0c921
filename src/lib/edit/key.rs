//! By what clusters are thought to be equal.

use crate::dedup::larger::of_parts;
use crate::digest::{Fingerprint, Sha, fingerprint, sha256};
use crate::sort::content::ContentAt;
use crate::units::ClusterBits;

/// By what clusters are thought to be equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    /// The fast fingerprint.
    Fingerprint,
    /// SHA-256, where the pool has it of its members, which then need not be read.
    Sha256,
    /// What a scan of a disk in clusters of this size leads to.
    Parts(ClusterBits),
}

impl Key {
    /// The record of a unit with this content, which is not zero. `parts` is scratch memory.
    pub(crate) fn record(self, content: &[u8], unit: u64, parts: &mut Vec<ContentAt>) -> ContentAt {
        match self {
            Self::Fingerprint => ContentAt::new(fingerprint(content), unit),
            Self::Sha256 => named(&sha256(content), unit),
            Self::Parts(grain) => of_parts(content, grain, unit, parts),
        }
    }
}

/// The record of a unit whose content has this name.
pub(crate) fn named(sha: &Sha, unit: u64) -> ContentAt {
    ContentAt::new(Fingerprint::of_sha(sha), unit)
}
