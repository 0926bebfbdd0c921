//! A cluster that enters the pool.

use crate::units::{GuestCluster, halves};

/// A cluster that enters the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NewMember {
    /// Its unit.
    pub(crate) unit: u64,
    /// The lowest guest cluster that maps to it.
    pub(crate) guest: GuestCluster,
}

impl NewMember {
    pub(crate) fn encode(self) -> u128 {
        u128::from(self.unit) << 64 | u128::from(self.guest.0)
    }

    pub(crate) fn decode(word: u128) -> Self {
        let (unit, guest) = halves(word);
        Self { unit, guest: GuestCluster(guest) }
    }
}
