//! A cluster that enters the pool.

use crate::sort::record::record;
use crate::units::GuestCluster;

/// A cluster that enters the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NewMember {
    /// Its unit.
    pub(crate) unit: u64,
    /// The lowest guest cluster that maps to it.
    pub(crate) guest: GuestCluster,
}

record!(new_member_words: NewMember { unit: 64, guest: 64 });
