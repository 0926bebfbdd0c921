//! Which clusters enter the pool.

use std::sync::atomic::{AtomicU64, Ordering};

use super::bits::Bits;
use super::plan::Plan;
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
    fn encode(self) -> u128 {
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
    plan: &Plan,
    storage: &dyn Storage,
    keepers: &Bits,
    spill: &Spill,
    work: &Work<'_>,
) -> Result<Sequence> {
    let Plan { units, inspection, options, .. } = plan;
    let all = options.pin == Pin::All;
    let is_candidate = |&unit: &u64| {
        let was_member = plan.members.bits().contains(unit);
        // A count that is as high as it can be has no room for the pool's reference.
        let room = || units.hosts(unit).all(|host| inspection.counts.get(host) < inspection.header.refcount_bits.max());
        let users = units.users(unit);
        let wanted = keepers.contains(unit) || users > 1 || all && users > 0;
        !plan.is_gone(unit) && if was_member { plan.records.is_none() && users > 0 } else { wanted && room() }
    };
    let mut candidates = Bits::new(units.limit());
    (0..units.limit()).filter(is_candidate).for_each(|unit| candidates.insert(unit));
    let candidates = candidates.ranked();

    let tables = L2Tables::new(storage, &inspection.header, &inspection.tables);
    let mut joining = Sequence::new(spill);
    let per_batch = spill.words().max(1);
    let mut numbers = candidates.bits().iter();
    for first in (0..candidates.bits().len()).step_by(per_batch) {
        work.cancel.check()?;
        let batch = per_batch.min(usize::try_from(candidates.bits().len() - first).unwrap_or(per_batch));
        let lowest: Vec<AtomicU64> = (0..batch).map(|_| AtomicU64::new(u64::MAX)).collect();
        let highest: Vec<AtomicU64> = (0..batch).map(|_| AtomicU64::new(0)).collect();
        tables.visit(
            |table, content| {
                for (word, index) in content.as_chunks().0.iter().zip(0u64..) {
                    let entry = L2Entry::decode(u64::from_be_bytes(*word), inspection.header.cluster_bits, true);
                    let rank = units.of(entry).and_then(|unit| candidates.rank(unit)?.checked_sub(first));
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
            let (lowest, highest) = (lowest.load(Ordering::Relaxed), highest.load(Ordering::Relaxed));
            if all || keepers.contains(unit) || plan.members.bits().contains(unit) || lowest < highest {
                joining.push(NewMember { unit, guest: GuestCluster(lowest) }.encode())?;
            }
        }
    }
    Ok(joining)
}
