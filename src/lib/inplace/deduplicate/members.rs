//! Which clusters enter the pool.

use std::collections::HashMap;

use crate::edit::change::Sharing;
use crate::edit::members::NewMember;
use crate::error::Result;
use crate::pool::Pin;
use crate::sort::bits::Bits;
use crate::sort::sequence::{Sequence, Spill};
use crate::storage::Storage;
use crate::survey::{Ground, guests};
use crate::work::Work;

/// The clusters that enter the pool, in unit order: keepers of duplicates, and what two or more guest clusters share already.
/// Where the directory of the pool is lost its members enter it once more.
///
/// A cluster that the disk and its snapshots have at the same place only is left out: that is a snapshot's sharing, after which
/// QEMU sets COPIED right by itself when the snapshot goes.
pub(super) fn new_members(
    ground: &Ground,
    sharing: &Sharing,
    storage: &dyn Storage,
    keepers: &Bits,
    pin: Pin,
    spill: &Spill,
    work: &Work,
) -> Result<Sequence<NewMember>> {
    let Ground { units, inspection, members, .. } = ground;
    let (all, members) = (pin == Pin::All, members.bits());
    let (max, limit) =
        (inspection.header.refcount_bits.max(), inspection.header.refcount_bits.sharer_limit().unwrap_or(0));
    // Compressed clusters that lie in one host cluster add to the same refcount.
    let mut pooled: HashMap<u64, u64> = HashMap::new();
    let mut candidates = Bits::new(units.limit());
    for unit in (0..units.limit()).filter(|&unit| !sharing.is_gone(unit)) {
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
            true => !ground.has_records() && users > 0,
            false => (keepers.contains(unit) || users > 1 || all && users > 0) && room(&mut pooled),
        };
        if joins {
            candidates.insert(unit);
        }
    }
    let mut joining = Sequence::new(spill);
    guests(ground, storage, candidates, spill, work, |unit, guests| {
        if all || keepers.contains(unit) || members.contains(unit) || guests.start() < guests.end() {
            joining.push(NewMember { unit, guest: *guests.start() })?;
        }
        Ok(())
    })?;
    Ok(joining)
}
