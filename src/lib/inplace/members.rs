//! Which clusters enter the pool.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};

use super::bits::Bits;
use super::change::{Change, Ground};
use super::tables::L2Tables;
use crate::dedup::sequence::{Sequence, Spill};
use crate::error::Result;
use crate::format::table::L2Entry;
use crate::pool::Pin;
use crate::storage::Storage;
use crate::units::GuestCluster;
use crate::work::Work;

/// A cluster that enters the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NewMember {
    /// Its unit.
    pub(super) unit: u64,
    /// The lowest guest cluster that maps to it.
    pub(super) guest: GuestCluster,
}

impl NewMember {
    pub(super) fn encode(self) -> u128 {
        u128::from(self.unit) << 64 | u128::from(self.guest.0)
    }

    pub(super) fn decode(word: u128) -> Self {
        let [unit, guest] =
            [word >> 64, word & u128::from(u64::MAX)].map(|half| u64::try_from(half).unwrap_or(u64::MAX));
        Self { unit, guest: GuestCluster(guest) }
    }
}

/// The clusters that enter the pool, in unit order: keepers of duplicates, and what two or more guest clusters share already.
/// Where the directory of the pool is lost its members enter it once more.
///
/// A cluster that the disk and its snapshots have at the same place only is left out: that is a snapshot's sharing, after which
/// QEMU sets COPIED right by itself when the snapshot goes.
pub(super) fn new_members(
    change: &Change,
    storage: &dyn Storage,
    keepers: &Bits,
    pin: Pin,
    spill: &Spill,
    work: &Work<'_>,
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

/// Tells the lowest and the highest guest cluster, of the disk and of all snapshots, that map to each of `wanted`, in unit order.
pub(super) fn guests(
    ground: &Ground,
    storage: &dyn Storage,
    wanted: Bits,
    spill: &Spill,
    work: &Work<'_>,
    mut tell: impl FnMut(u64, RangeInclusive<GuestCluster>) -> Result<()>,
) -> Result<()> {
    let header = &ground.inspection.header;
    let wanted = wanted.ranked();
    let tables = L2Tables::new(storage, header, &ground.inspection.tables);
    let mut numbers = wanted.bits().iter();
    for first in (0..wanted.bits().len()).step_by(spill.words()) {
        work.cancel.check()?;
        let batch = spill.words().min(usize::try_from(wanted.bits().len() - first).unwrap_or(usize::MAX));
        let lowest: Vec<AtomicU64> = (0..batch).map(|_| AtomicU64::new(u64::MAX)).collect();
        let highest: Vec<AtomicU64> = (0..batch).map(|_| AtomicU64::new(0)).collect();
        tables.visit(
            |table, content| {
                for (word, index) in content.as_chunks().0.iter().zip(0u64..) {
                    let entry = L2Entry::decode(u64::from_be_bytes(*word), header.cluster_bits, true);
                    let rank = ground.units.of(entry).and_then(|unit| wanted.rank(unit)?.checked_sub(first));
                    let Some(at) = rank.and_then(|rank| usize::try_from(rank).ok()) else { continue };
                    let (Some(lowest), Some(highest)) = (lowest.get(at), highest.get(at)) else { continue };
                    for guest in table.guests(index) {
                        lowest.fetch_min(guest.0, Ordering::Relaxed);
                        highest.fetch_max(guest.0, Ordering::Relaxed);
                    }
                }
                Ok(())
            },
            |()| Ok(()),
        )?;
        for ((lowest, highest), unit) in lowest.iter().zip(&highest).zip(numbers.by_ref()) {
            let [lowest, highest] = [lowest, highest].map(|guest| GuestCluster(guest.load(Ordering::Relaxed)));
            tell(unit, lowest..=highest)?;
        }
    }
    Ok(())
}
