//! Which clusters enter the pool.

use std::collections::HashMap;

use crate::edit::change::Change;
use crate::error::Result;
use crate::pool::Pin;
use crate::sort::bits::Bits;
use crate::sort::sequence::{Sequence, Spill};
use crate::storage::Storage;
use crate::survey::{Ground, guests};
use crate::units::{GuestCluster, halves};
use crate::work::Work;

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

/// The clusters that enter the pool, in unit order: keepers of duplicates, and what two or more guest clusters share already.
/// Where the directory of the pool is lost its members enter it once more.
///
/// A cluster that the disk and its snapshots have at the same place only is left out: that is a snapshot's sharing, after which
/// QEMU sets COPIED right by itself when the snapshot goes.
pub(crate) fn new_members(
    change: &Change,
    storage: &dyn Storage,
    keepers: &Bits,
    pin: Pin,
    spill: &Spill,
    work: &Work,
) -> Result<Sequence> {
    let Ground { units, inspection, members, .. } = &change.ground;
    let (all, members) = (pin == Pin::All, members.bits());
    let (max, limit) =
        (inspection.header.refcount_bits.max(), inspection.header.refcount_bits.sharer_limit().unwrap_or(0));
    // Compressed clusters that lie in one host cluster add to the same refcount.
    let mut pooled: HashMap<u64, u64> = HashMap::new();
    let mut candidates = Bits::new(units.limit());
    for unit in (0..units.limit()).filter(|&unit| !change.is_gone(unit)) {
        // A count that is as high as it can be has no room for the pool's reference.
        let room = |pooled: &mut HashMap<u64, u64>| {
            if units.plain().contains(&unit) {
                return inspection.counts.get(unit) < max;
            }
            let count = |host: u64| inspection.counts.get(host) + pooled.get(&host).copied().unwrap_or(0);
            let fits = units.hosts(unit).all(|host| count(host) < max - limit);
            if fits {
                units.hosts(unit).for_each(|host| *pooled.entry(host).or_default() += 1);
            }
            fits
        };
        let users = units.users(unit);
        let joins = match members.contains(unit) {
            true => !change.ground.has_records() && users > 0,
            false => (keepers.contains(unit) || users > 1 || all && users > 0) && room(&mut pooled),
        };
        if joins {
            candidates.insert(unit);
        }
    }
    let mut joining = Sequence::new(spill);
    guests(&change.ground, storage, candidates, spill, work, |unit, guests| {
        if all || keepers.contains(unit) || members.contains(unit) || guests.start() < guests.end() {
            joining.push(NewMember { unit, guest: *guests.start() }.encode())?;
        }
        Ok(())
    })?;
    Ok(joining)
}
