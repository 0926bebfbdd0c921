//! Places for new content.

use std::collections::HashMap;

use crate::dedup::Run;
use crate::dedup::reading::{Expected, FirstReading};
use crate::edit::allocate::Allocator;
use crate::edit::change::{Gain, NewEntry};
use crate::edit::members::NewMember;
use crate::error::Result;
use crate::format::table::L2Entry;
use crate::inplace::overwrite::class::{Classed, NEW, Place, Stores};
use crate::pool::Pin;
use crate::sort::bits::Bits;
use crate::sort::content::ContentAt;
use crate::sort::sequence::{Sequence, Sorted, Sorter, Spill};
use crate::survey::Ground;
use crate::units::{GuestCluster, HostCluster};

/// What becomes of the changed clusters.
pub(super) struct Placed {
    pub(super) entries: Sorted<NewEntry>,
    /// New clusters.
    pub(super) stores: Stores,
    /// What clusters gain beside the first reference of a new one.
    pub(super) gains: Sequence<Gain>,
    /// New clusters that enter the pool.
    pub(super) members: Sorter<NewMember>,
    /// Clusters of the target that are shared from now on and not in the pool yet.
    pub(super) shared: Bits,
    pub(super) free: Allocator,
    /// Changed clusters that use what the target has.
    pub(super) reused: u64,
}

/// Gives out places.
struct Placer<'a> {
    ground: &'a Ground,
    limit: u64,
    pin: Pin,
    entries: Sorter<NewEntry>,
    places: Sequence<Place>,
    records: Sequence<ContentAt>,
    expected: Expected<'a>,
    gains: Sequence<Gain>,
    members: Sorter<NewMember>,
    shared: Bits,
    free: Allocator,
    reused: u64,
    /// What host clusters of compressed ones gain: several may lie in one.
    packed: HashMap<u64, u64>,
}

/// A new cluster and its users so far.
#[derive(Clone, Copy)]
struct New {
    host: HostCluster,
    first: u64,
    users: u64,
}

/// Places what `classes` say, of which `first` was the first reading, and zeros for the clusters in the runs `zeros`. No cluster gets more than `limit` sharers.
pub(super) fn place(
    ground: &Ground,
    classes: &Sorted<Classed>,
    (zeros, first): (&Sequence<Run>, FirstReading),
    (limit, pin): (u64, Pin),
    free: Allocator,
    spill: &Spill,
) -> Result<Placed> {
    let mut placer = Placer {
        ground,
        limit,
        pin,
        entries: Sorter::new(spill),
        places: Sequence::new(spill),
        records: Sequence::new(spill),
        expected: first.expected(ground.inspection.header.cluster_bits),
        gains: Sequence::new(spill),
        members: Sorter::new(spill),
        shared: Bits::new(ground.units.limit()),
        free,
        reused: 0,
        packed: HashMap::new(),
    };
    let mut changed = classes.iter().peekable();
    while let Some(Classed { class, guest: first }) = changed.next().transpose()? {
        let mut guest = Some(first);
        let mut next =
            || changed.next_if(|other| other.as_ref().map_or(true, |other| other.class == class)).transpose();
        if class & NEW == 0 {
            let room = placer.room(class);
            let mut gained = 0;
            while let Some(sharer) = guest.filter(|_| gained < room) {
                placer.entry(sharer, ground.units.entry(class))?;
                gained += 1;
                guest = next()?.map(|other| other.guest);
            }
            placer.gain(class, gained)?;
        }
        let mut new: Option<New> = None;
        while let Some(user) = guest {
            new = Some(match new.filter(|new| new.users < limit) {
                Some(new) => placer.one_more(new, user)?,
                None => {
                    placer.end(new)?;
                    placer.store(class, user)?
                }
            });
            guest = next()?.map(|other| other.guest);
        }
        placer.end(new)?;
    }
    for run in zeros.iter() {
        let run = run?;
        for guest in run.start..run.end() {
            // The zero flag even without a backing file, as everywhere in place.
            placer.entry(guest, L2Entry::Zero { host: None, copied: false })?;
        }
    }
    let Placer { entries, places, records, gains, members, shared, free, reused, .. } = placer;
    let stores = Stores { places, records, first };
    Ok(Placed { entries: entries.finish()?, stores, gains, members, shared, free, reused })
}

impl Placer<'_> {
    fn entry(&mut self, guest: u64, entry: L2Entry) -> Result<()> {
        let entry = entry.encode(self.ground.inspection.header.cluster_bits);
        self.entries.push(NewEntry { guest: GuestCluster(guest), entry })
    }

    /// How many sharers more `unit` may have, the pool's reference not counted.
    fn room(&self, unit: u64) -> u64 {
        let Ground { units, inspection, members, .. } = self.ground;
        let counted = |host: u64| inspection.counts.get(host) + self.packed.get(&host).copied().unwrap_or(0);
        if units.plain().contains(&unit) {
            let pooled = u64::from(members.bits().contains(unit));
            return self.limit.saturating_sub(counted(unit).saturating_sub(pooled));
        }
        units.hosts(unit).map(|host| self.limit.saturating_sub(counted(host))).min().unwrap_or(0)
    }

    /// Notes that `unit` has `users` more, and enters the pool with that.
    fn gain(&mut self, unit: u64, users: u64) -> Result<()> {
        if users == 0 {
            return Ok(());
        }
        let Ground { units, members, .. } = self.ground;
        let joins = !members.bits().contains(unit);
        if joins {
            self.shared.insert(unit);
        }
        if !units.plain().contains(&unit) {
            for host in units.hosts(unit) {
                *self.packed.entry(host).or_default() += users + u64::from(joins);
            }
        }
        self.reused += users;
        self.gains.push(Gain { unit, references: users })
    }

    /// A new cluster with the content of `class`, for `user`.
    fn store(&mut self, class: u64, user: u64) -> Result<New> {
        let host = self.free.one();
        self.places.push(Place { host, class })?;
        if class & NEW != 0 {
            self.records.push(self.expected.of(class & !NEW)?)?;
        }
        Ok(New { host, first: user, users: 1 })
    }

    fn one_more(&mut self, new: New, user: u64) -> Result<New> {
        if new.users == 1 {
            self.map(new.first, new, false)?;
        }
        self.map(user, new, false)?;
        Ok(New { users: new.users + 1, ..new })
    }

    fn map(&mut self, guest: u64, new: New, copied: bool) -> Result<()> {
        let host = new.host.offset(self.ground.inspection.header.cluster_bits);
        self.entry(guest, L2Entry::Data { host, copied })
    }

    /// Ends a new cluster: it gets no more users.
    fn end(&mut self, new: Option<New>) -> Result<()> {
        let Some(new) = new else { return Ok(()) };
        let pooled = new.users > 1 || self.pin == Pin::All;
        if new.users == 1 {
            self.map(new.first, new, !pooled)?;
        } else {
            self.gains.push(Gain { unit: new.host.0, references: new.users - 1 })?;
        }
        if pooled {
            self.members.push(NewMember { unit: new.host.0, guest: GuestCluster(new.first) })?;
        }
        Ok(())
    }
}
