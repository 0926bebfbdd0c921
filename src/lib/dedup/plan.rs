//! What will be stored, in which order, and who shares it.

use std::iter::Peekable;

use crate::dedup::group::{ByDuplicate, Link};
use crate::dedup::level::Level;
use crate::dedup::weave::{Inherited, UserCounts, Woven};
use crate::dedup::{INDEX_BITS, Run, peek};
use crate::error::{OrInternal, Result};
use crate::pool::Pin;
use crate::sort::record::record;
use crate::sort::sequence::{Sequence, Sorted, Sorter, Spill, Words};
use crate::units::{ClusterBits, RowCluster, RowPlace, StoredCluster};

/// Which guest clusters are stored and which share them. Stored clusters are numbered from 0 in guest order.
pub(crate) struct Plan {
    /// See [`Level::runs`].
    runs: Sequence<Run>,
    /// See [`Level::zeros`].
    zeros: Sequence<Run>,
    links: Sorted<Numbered>,
    /// Keepers of duplicates in guest order.
    keepers: Sequence<Keeper>,
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
    pub(crate) fn new(level: Level, links: &Sorted<ByDuplicate>, pin: Pin, spill: &Spill) -> Result<Self> {
        let Level { data_clusters, l2_tables, runs, zeros, end, woven, records, cluster_bits: _ } = level;
        drop(records);
        let mut by_keeper = Sorter::new(spill);
        let mut users = UserCounts::new(woven.as_ref());
        for link in links.iter() {
            let ByDuplicate(Link { duplicate, keeper }) = link?;
            by_keeper.push(Use { keeper, duplicate, users: users.of(duplicate)?.0 })?;
        }
        let by_keeper = by_keeper.finish()?;
        let place = |cluster: u64| woven.as_ref().map_or(cluster, |woven| woven.weave.place(cluster));
        let mut users = UserCounts::new(woven.as_ref());
        let mut pooled = 0;
        let mut numbers = Numbers::new(&runs, links);
        let mut numbered = Sorter::new(spill);
        let mut keepers = Sequence::new(&spill.share(4));
        let mut current: Option<(Keeper, StoredCluster)> = None;
        let mut keep = |keeper: Keeper| {
            pooled += u64::from(keeper.pooled);
            keepers.push(keeper)
        };
        for link in by_keeper.iter() {
            let link = link?;
            let (mut keeper, number) = match current {
                Some((keeper, number)) if keeper.cluster == link.keeper => (keeper, number),
                done => {
                    done.map_or(Ok(()), |(keeper, _)| keep(keeper))?;
                    let (cluster, sharers) = (link.keeper, users.of(link.keeper)?.0);
                    (Keeper { cluster, sharers, pooled: false, place: place(cluster) }, numbers.of(cluster)?)
                }
            };
            let place = place(link.duplicate);
            keeper.sharers += link.users;
            keeper.pooled |= place != keeper.place;
            keeper.place = keeper.place.min(place);
            current = Some((keeper, number));
            numbered.push(Numbered { duplicate: link.duplicate, stored: number })?;
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
            run: Run::default(),
        }
    }
}

/// A link, sorted by its keeper, and how many layers use its duplicate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Use {
    keeper: u64,
    duplicate: u64,
    users: u64,
}

record!(use_words: Use { keeper: INDEX_BITS, duplicate: INDEX_BITS, users: 48 });

/// A duplicate, and the number of the stored cluster that it shares; sorted by duplicate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Numbered {
    duplicate: u64,
    stored: StoredCluster,
}

record!(numbered_words: Numbered { duplicate: INDEX_BITS, stored: INDEX_BITS });

/// A stored cluster that has duplicates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Keeper {
    cluster: u64,
    /// All its users.
    sharers: u64,
    /// Whether they are at different places. What only the layers share, at one place, is a snapshot's sharing, after which QEMU
    /// sets COPIED when the snapshot goes.
    pooled: bool,
    /// The lowest place of them.
    place: u64,
}

record!(keeper_words: Keeper { cluster: INDEX_BITS, sharers: 47, pooled: 1, place: INDEX_BITS });

/// Numbers stored clusters, asked for in guest order.
struct Numbers<'a> {
    runs: Words<'a, Run>,
    run: Run,
    /// Data clusters before the run.
    before: u64,
    links: Peekable<Words<'a, ByDuplicate>>,
    /// Duplicates before the cluster last asked for.
    duplicates: u64,
}

impl<'a> Numbers<'a> {
    fn new(runs: &'a Sequence<Run>, links: &'a Sorted<ByDuplicate>) -> Self {
        Self { runs: runs.iter(), run: Run::default(), before: 0, links: links.iter().peekable(), duplicates: 0 }
    }

    /// The number of `cluster`: the data clusters before it that are no duplicates.
    fn of(&mut self, cluster: u64) -> Result<StoredCluster> {
        while self.run.end() <= cluster {
            let run = self.runs.next().or_internal("a cluster that is kept is in no run of data")?;
            self.before += self.run.len;
            self.run = run?;
        }
        while peek(&mut self.links)?.is_some_and(|ByDuplicate(link)| link.duplicate < cluster) {
            self.links.next();
            self.duplicates += 1;
        }
        Ok(StoredCluster(self.before + cluster.saturating_sub(self.run.start) - self.duplicates))
    }
}

/// What happens to a piece of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// `count` clusters from `row` are stored and have no other user than layers at the same place.
    Private {
        /// The first.
        row: RowCluster,
        /// How many.
        count: u64,
        /// Layers that use each of them: 1 for a disk without snapshots.
        users: u64,
    },
    /// A cluster is stored and enters the pool.
    Member {
        /// The cluster.
        row: RowCluster,
        /// Guest clusters that use it, this one included.
        sharers: u64,
        /// The lowest place of a disk at which one of them is.
        place: RowPlace,
    },
    /// `count` clusters from `row` are zeros that a backing file must not show through.
    Zero {
        /// The first.
        row: RowCluster,
        /// How many.
        count: u64,
    },
    /// `count` clusters from `row` are what the layer above has at the same place.
    Inherited {
        /// The first.
        row: RowCluster,
        /// How many.
        count: u64,
    },
    /// The L2 table that maps `row`, its first cluster, is that of the layer above.
    InheritedTable {
        /// The first of them.
        row: RowCluster,
    },
    /// A cluster uses what another one has stored.
    Shared {
        /// The cluster.
        row: RowCluster,
        /// The stored cluster.
        stored: StoredCluster,
    },
}

/// Iterates over the steps of a [`Plan`].
pub(crate) struct Steps<'a> {
    most: u64,
    pin: Pin,
    runs: Words<'a, Run>,
    zeros: Peekable<Words<'a, Run>>,
    links: Peekable<Words<'a, Numbered>>,
    keepers: Peekable<Words<'a, Keeper>>,
    inherited: Option<Peekable<Words<'a, Inherited>>>,
    users: UserCounts<'a>,
    plan: &'a Plan,
    /// What is left of the current run.
    run: Run,
}

impl Steps<'_> {
    fn try_next(&mut self) -> Result<Option<Step>> {
        if self.run.len == 0 {
            // Behind all data only zeros are left.
            self.run = self.runs.next().transpose()?.unwrap_or(Run { start: u64::MAX, len: 0 });
        }
        let zeros = peek(&mut self.zeros)?;
        if let Some(step) = self.inherit(self.run.start.min(zeros.map_or(u64::MAX, |zeros| zeros.start)))? {
            return Ok(Some(step));
        }
        if let Some(zeros) = zeros.filter(|zeros| zeros.start < self.run.start) {
            self.zeros.next();
            return Ok(Some(Step::Zero { row: RowCluster(zeros.start), count: zeros.len }));
        }
        if self.run.len == 0 {
            return Ok(None);
        }
        let (at, end) = (self.run.start, self.run.end());
        let row = RowCluster(at);
        let link = peek(&mut self.links)?;
        if let Some(Numbered { duplicate, stored }) = link
            && duplicate == at
        {
            self.links.next();
            self.advance(1);
            return Ok(Some(Step::Shared { row, stored }));
        }
        let keeper = peek(&mut self.keepers)?;
        if let Some(Keeper { sharers, pooled, place, .. }) = keeper.filter(|keeper| keeper.cluster == at) {
            self.keepers.next();
            self.advance(1);
            return Ok(Some(match pooled || self.pin == Pin::All {
                true => Step::Member { row, sharers, place: RowPlace(place) },
                false => Step::Private { row, count: 1, users: sharers },
            }));
        }
        let (users, change) = self.users.of(at)?;
        if self.pin == Pin::All {
            self.advance(1);
            let place = self.plan.woven.as_ref().map_or(at, |woven| woven.weave.place(at));
            return Ok(Some(Step::Member { row, sharers: users, place: RowPlace(place) }));
        }
        let end = end
            .min(change)
            .min(link.map_or(end, |link| link.duplicate))
            .min(keeper.map_or(end, |keeper| keeper.cluster));
        let count = (end - at).min(self.most);
        self.advance(count);
        Ok(Some(Step::Private { row, count, users }))
    }

    /// What is inherited next, if that comes before cluster `end`.
    fn inherit(&mut self, end: u64) -> Result<Option<Step>> {
        let Some(inherited) = &mut self.inherited else { return Ok(None) };
        let Some(run) = peek(inherited)?.filter(|run| run.start < end) else { return Ok(None) };
        inherited.next();
        let row = RowCluster(run.start);
        Ok(Some(if run.table { Step::InheritedTable { row } } else { Step::Inherited { row, count: run.len } }))
    }

    fn advance(&mut self, count: u64) {
        self.run = self.run.skip(count);
    }
}

impl Iterator for Steps<'_> {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Result<Step>> {
        self.try_next().transpose()
    }
}
