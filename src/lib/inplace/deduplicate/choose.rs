//! Which of several equal clusters to keep.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

use crate::check::counts::Counts;
use crate::dedup::group::{ByDuplicate, Link};
use crate::error::Result;
use crate::sort::bits::Bits;
use crate::sort::content::ContentAt;
use crate::sort::sequence::{Sorted, Sorter, Spill};
use crate::survey::Ground;
use crate::survey::units::Units;

/// Equal units that are looked at together. More of one content than that are taken in turns, so that memory is bounded.
const GROUP: usize = 1 << 20;

/// What the choice depends on.
pub(crate) struct Choice<'a> {
    units: &'a Units,
    /// All references, the pool's included.
    counts: &'a Counts,
    /// Members of the pool.
    members: &'a Bits,
    /// The sharer limit.
    limit: u64,
    /// The largest refcount, less one for the pool.
    max: u64,
}

impl<'a> Choice<'a> {
    /// The choice for an image in which a cluster may have `limit` sharers.
    pub(crate) fn new(ground: &'a Ground, limit: u64) -> Self {
        let Ground { units, inspection, members, .. } = ground;
        let max = inspection.header.refcount_bits.max() - 1;
        Self { units, counts: &inspection.counts, members: members.bits(), limit, max }
    }

    /// Links units with equal keys in `records`: the rest to the one that is kept. Kept is a member of the pool before others,
    /// then the one with the most references, then the first in the file. Where the keeper has all the sharers that it may have,
    /// the next one is kept as well.
    ///
    /// No two units that are kept would fit into one: doing it again finds nothing.
    pub(crate) fn links(&self, records: &Sorted<ContentAt>, spill: &Spill) -> Result<Sorted<ByDuplicate>> {
        let mut links = Sorter::new(spill);
        let mut group = Group { choice: self, keepers: BTreeSet::new(), gained: HashMap::new(), order: 0 };
        let mut units = Vec::new();
        let mut name = None;
        for record in records.iter() {
            let record = record?;
            let ends = name != Some(record.name());
            if ends || units.len() == GROUP {
                group.link(&mut units, &mut links)?;
            }
            if ends {
                name = Some(record.name());
                group.keepers.clear();
            }
            units.push(record.cluster());
        }
        group.link(&mut units, &mut links)?;
        links.finish()
    }
}

/// Units of the same content.
struct Group<'a> {
    choice: &'a Choice<'a>,
    /// Those that are kept: room for sharers, in which order they were chosen, the unit.
    keepers: BTreeSet<(u64, u64, u64)>,
    /// What host clusters gain that have other references than those of one unit.
    gained: HashMap<u64, u64>,
    order: u64,
}

impl Group<'_> {
    fn link(&mut self, units: &mut Vec<u64>, links: &mut Sorter<ByDuplicate>) -> Result<()> {
        if units.len() + self.keepers.len() < 2 {
            // Most contents occur once.
            units.clear();
            return Ok(());
        }
        let Choice { members, .. } = *self.choice;
        units.sort_by_cached_key(|&unit| {
            (!members.contains(unit), Reverse(self.choice.units.users(unit)), self.choice.units.bytes(unit).start)
        });
        for unit in units.drain(..) {
            let references = self.choice.units.users(unit);
            match self.keeper(references) {
                Some((room, order, keeper)) => {
                    self.keepers.insert((room - references, order, keeper));
                    links.push(ByDuplicate(Link { duplicate: unit, keeper }))?;
                }
                None => {
                    self.keepers.insert((self.choice.limit.saturating_sub(references), self.order, unit));
                    self.order += 1;
                }
            }
        }
        Ok(())
    }

    /// Takes out the keeper with the least room for `references` more. Those whose host clusters are full go for good.
    fn keeper(&mut self, references: u64) -> Option<(u64, u64, u64)> {
        loop {
            let kept = self.keepers.range((references, 0, 0)..).next().copied()?;
            self.keepers.remove(&kept);
            if self.gain(kept.2, references) {
                return Some(kept);
            }
        }
    }

    /// Whether the host clusters of `keeper` have room for more references, which are then counted.
    fn gain(&mut self, keeper: u64, references: u64) -> bool {
        let Choice { units, counts, limit, max, .. } = *self.choice;
        // On one plain cluster nothing else counts, unless entries with the zero flag keep it.
        let most = if units.plain().contains(&keeper) { max } else { limit };
        if most == max && counts.get(keeper) < limit {
            return true;
        }
        let hosts = units.hosts(keeper);
        let fits = hosts.clone().all(|host| {
            let gained = self.gained.get(&host).copied().unwrap_or(0);
            counts.get(host).saturating_add(gained).saturating_add(references) <= most
        });
        if fits {
            hosts.for_each(|host| *self.gained.entry(host).or_default() += references);
        }
        fits
    }
}
