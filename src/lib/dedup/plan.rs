//! What will be stored, in which order, and who shares it.

use std::iter::Peekable;

use crate::dedup::group::Link;
use crate::dedup::level::Level;
use crate::dedup::weave::{Inherited, UserCounts, Woven};
use crate::dedup::{INDEX_BITS, index};
pub(crate) use crate::dedup::{peek, split_run};
use crate::error::{OrInternal, Result};
use crate::pool::Pin;
use crate::sort::sequence::{Sequence, Sorted, Sorter, Spill, Words};
use crate::units::{ClusterBits, GuestCluster, halves};

/// Which guest clusters are stored and which share them. Stored clusters are numbered from 0 in guest order.
pub(crate) struct Plan {
    /// See [`Level::runs`].
    runs: Sequence,
    /// See [`Level::zeros`].
    zeros: Sequence,
    /// Duplicate, then the number of the stored cluster that it shares; sorted by duplicate.
    links: Sorted,
    /// Keepers of duplicates in guest order; see [`Keeper`].
    keepers: Sequence,
    /// Of a disk with its snapshots: what the layers have in common.
    pub woven: Option<Woven>,
    pin: Pin,
    /// Clusters that are not zero, in all layers.
    pub data_clusters: u64,
    /// Clusters to store.
    pub stored: u64,
    /// Stored clusters with two or more sharers at different places.
    pub shared: u64,
    /// L2 tables of the active disk.
    pub l2_tables: u64,
    /// The cluster after the last one that is not zero.
    end: u64,
}

impl Plan {
    /// The plan that follows from a level and its verified links, sorted by duplicate.
    ///
    /// # Errors
    /// Those of the temporary files.
    pub(crate) fn new(level: Level, links: &Sorted, pin: Pin, spill: &Spill) -> Result<Self> {
        let Level { data_clusters, l2_tables, runs, zeros, end, woven, records, cluster_bits: _ } = level;
        drop(records);
        let mut by_keeper = Sorter::new(spill);
        let mut users = UserCounts::new(woven.as_ref());
        for word in links.iter() {
            let link = Link::from_duplicate(word?);
            by_keeper.push(link.by_keeper() << USERS_BITS | u128::from(users.of(link.duplicate)?.0))?;
        }
        let by_keeper = by_keeper.finish()?;
        let place = |cluster: u64| woven.as_ref().map_or(cluster, |woven| woven.weave.place(cluster));
        let mut users = UserCounts::new(woven.as_ref());
        let mut pooled = 0;
        let mut numbers = Numbers::new(&runs, links);
        let mut numbered = Sorter::new(spill);
        let mut keepers = Sequence::new(&spill.share(4));
        let mut current: Option<(Keeper, u64)> = None;
        let mut keep = |keeper: Keeper| {
            pooled += u64::from(keeper.pooled);
            keepers.push(keeper.encode())
        };
        for word in by_keeper.iter() {
            let word = word?;
            let link = Link::from_keeper(word >> USERS_BITS);
            let sharers = halves(word & ((1 << USERS_BITS) - 1)).1;
            let (mut keeper, number) = match current {
                Some((keeper, number)) if keeper.cluster == link.keeper => (keeper, number),
                done => {
                    done.map_or(Ok(()), |(keeper, _)| keep(keeper))?;
                    let (cluster, sharers) = (link.keeper, users.of(link.keeper)?.0);
                    (Keeper { cluster, sharers, pooled: false, place: place(cluster) }, numbers.of(cluster)?)
                }
            };
            let place = place(link.duplicate);
            keeper.sharers += sharers;
            keeper.pooled |= place != keeper.place;
            keeper.place = keeper.place.min(place);
            current = Some((keeper, number));
            numbered.push(u128::from(link.duplicate) << INDEX_BITS | u128::from(number))?;
        }
        current.map_or(Ok(()), |(keeper, _)| keep(keeper))?;
        Ok(Self {
            pin,
            data_clusters: data_clusters + woven.as_ref().map_or(0, |woven| woven.inherited_clusters),
            stored: data_clusters - links.len(),
            shared: pooled,
            l2_tables,
            end,
            runs,
            zeros,
            links: numbered.finish()?,
            keepers,
            woven,
        })
    }

    /// The part of a disk of `size` bytes that lies in clusters that are not zero.
    #[must_use]
    pub(crate) fn data_bytes(&self, bits: ClusterBits, size: u64) -> u64 {
        let overhang = bits.clusters(size) * bits.bytes() - size;
        let last_is_data = self.end == bits.clusters(size);
        self.data_clusters * bits.bytes() - if last_is_data { overhang } else { 0 }
    }

    /// The number of stored clusters that enter the pool.
    #[must_use]
    pub(crate) fn members(&self) -> u64 {
        match self.pin {
            Pin::Shared => self.shared,
            Pin::All => self.stored,
        }
    }

    /// The steps in guest order, none of more than `most` clusters.
    #[must_use]
    pub(crate) fn steps(&self, most: u64) -> Steps<'_> {
        Steps {
            most,
            pin: self.pin,
            runs: self.runs.iter(),
            zeros: self.zeros.iter().peekable(),
            links: self.links.iter().peekable(),
            keepers: self.keepers.iter().peekable(),
            inherited: self.woven.as_ref().map(|woven| woven.inherited.iter().peekable()),
            users: UserCounts::new(self.woven.as_ref()),
            plan: self,
            run: (0, 0),
        }
    }
}

/// Bits of a word that say how many layers use a duplicate, beside its link.
const USERS_BITS: u32 = 48;

/// A stored cluster that has duplicates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Keeper {
    cluster: u64,
    /// All its users.
    sharers: u64,
    /// Whether they are at different places. What only the layers share, at one place, is a snapshot's sharing, after which QEMU
    /// sets COPIED when the snapshot goes.
    pooled: bool,
    /// The lowest place of them.
    place: u64,
}

impl Keeper {
    fn encode(self) -> u128 {
        let sharers = u128::from(self.sharers << 1 | u64::from(self.pooled));
        u128::from(self.cluster) << 88 | sharers << INDEX_BITS | u128::from(self.place)
    }

    fn decode(word: u128) -> Self {
        let sharers = halves(word >> INDEX_BITS & ((1 << 48) - 1)).1;
        Self { cluster: index(word >> 88), sharers: sharers >> 1, pooled: sharers & 1 == 1, place: index(word) }
    }
}

/// Numbers stored clusters, asked for in guest order.
struct Numbers<'a> {
    runs: Words<'a>,
    run: (u64, u64),
    /// Data clusters before the run.
    before: u64,
    links: Peekable<Words<'a>>,
    /// Duplicates before the cluster last asked for.
    duplicates: u64,
}

impl<'a> Numbers<'a> {
    fn new(runs: &'a Sequence, links: &'a Sorted) -> Self {
        Self { runs: runs.iter(), run: (0, 0), before: 0, links: links.iter().peekable(), duplicates: 0 }
    }

    /// The number of `cluster`: the data clusters before it that are no duplicates.
    fn of(&mut self, cluster: u64) -> Result<u64> {
        while self.run.0 + self.run.1 <= cluster {
            let word = self.runs.next().or_internal("a cluster that is kept is in no run of data")?;
            self.before += self.run.1;
            self.run = split_run(word?);
        }
        while let Some(word) = self.links.peek() {
            match word {
                Ok(word) if index(*word >> INDEX_BITS) < cluster => {
                    self.links.next();
                    self.duplicates += 1;
                }
                Ok(_) => break,
                Err(_) => {
                    self.links.next().transpose()?;
                }
            }
        }
        Ok(self.before + cluster.saturating_sub(self.run.0) - self.duplicates)
    }
}

/// What happens to a piece of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// `count` clusters from `guest` are stored and have no other user than layers at the same place.
    Private {
        /// The first.
        guest: GuestCluster,
        /// How many.
        count: u64,
        /// Layers that use each of them: 1 for a disk without snapshots.
        users: u64,
    },
    /// A cluster is stored and enters the pool.
    Member {
        /// The cluster.
        guest: GuestCluster,
        /// Guest clusters that use it, this one included.
        sharers: u64,
        /// The lowest place of a disk at which one of them is.
        place: GuestCluster,
    },
    /// `count` clusters from `guest` are zeros that a backing file must not show through.
    Zero {
        /// The first.
        guest: GuestCluster,
        /// How many.
        count: u64,
    },
    /// `count` clusters from `guest` are what the layer above has at the same place.
    Inherited {
        /// The first.
        guest: GuestCluster,
        /// How many.
        count: u64,
    },
    /// The L2 table that maps `guest`, its first cluster, is that of the layer above.
    InheritedTable {
        /// The first of them.
        guest: GuestCluster,
    },
    /// A cluster uses what another one has stored.
    Shared {
        /// The cluster.
        guest: GuestCluster,
        /// The number of the stored cluster.
        stored: u64,
    },
}

/// Iterates over the steps of a [`Plan`].
pub(crate) struct Steps<'a> {
    most: u64,
    pin: Pin,
    runs: Words<'a>,
    zeros: Peekable<Words<'a>>,
    links: Peekable<Words<'a>>,
    keepers: Peekable<Words<'a>>,
    inherited: Option<Peekable<Words<'a>>>,
    users: UserCounts<'a>,
    plan: &'a Plan,
    /// What is left of the current run.
    run: (u64, u64),
}

impl Steps<'_> {
    fn try_next(&mut self) -> Result<Option<Step>> {
        if self.run.1 == 0 {
            match self.runs.next().transpose()? {
                // Behind all data only zeros are left.
                None => self.run = (u64::MAX, 0),
                Some(word) => self.run = split_run(word),
            }
        }
        let zeros = peek(&mut self.zeros)?.map(split_run);
        if let Some(step) = self.inherit(self.run.0.min(zeros.map_or(u64::MAX, |(start, _)| start)))? {
            return Ok(Some(step));
        }
        if let Some((start, count)) = zeros.filter(|(start, _)| *start < self.run.0) {
            self.zeros.next();
            return Ok(Some(Step::Zero { guest: GuestCluster(start), count }));
        }
        if self.run.1 == 0 {
            return Ok(None);
        }
        let (at, end) = (self.run.0, self.run.0 + self.run.1);
        let guest = GuestCluster(at);
        let link = peek(&mut self.links)?.map(|word| (index(word >> INDEX_BITS), index(word)));
        if let Some((duplicate, stored)) = link
            && duplicate == at
        {
            self.links.next();
            self.advance(1);
            return Ok(Some(Step::Shared { guest, stored }));
        }
        let keeper = peek(&mut self.keepers)?.map(Keeper::decode);
        if let Some(Keeper { sharers, pooled, place, .. }) = keeper.filter(|keeper| keeper.cluster == at) {
            self.keepers.next();
            self.advance(1);
            return Ok(Some(match pooled || self.pin == Pin::All {
                true => Step::Member { guest, sharers, place: GuestCluster(place) },
                false => Step::Private { guest, count: 1, users: sharers },
            }));
        }
        let (users, change) = self.users.of(at)?;
        if self.pin == Pin::All {
            self.advance(1);
            let place = self.plan.woven.as_ref().map_or(at, |woven| woven.weave.place(at));
            return Ok(Some(Step::Member { guest, sharers: users, place: GuestCluster(place) }));
        }
        let end = end.min(change).min(link.map_or(end, |link| link.0)).min(keeper.map_or(end, |keeper| keeper.cluster));
        let count = (end - at).min(self.most);
        self.advance(count);
        Ok(Some(Step::Private { guest, count, users }))
    }

    /// What is inherited next, if that comes before cluster `end`.
    fn inherit(&mut self, end: u64) -> Result<Option<Step>> {
        let Some(words) = &mut self.inherited else { return Ok(None) };
        let Some(run) = peek(words)?.map(Inherited::decode).filter(|run| run.start < end) else { return Ok(None) };
        words.next();
        let guest = GuestCluster(run.start);
        Ok(Some(if run.table { Step::InheritedTable { guest } } else { Step::Inherited { guest, count: run.len } }))
    }

    fn advance(&mut self, count: u64) {
        self.run = (self.run.0 + count, self.run.1 - count);
    }
}

impl Iterator for Steps<'_> {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Result<Step>> {
        self.try_next().transpose()
    }
}
