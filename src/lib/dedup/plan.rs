//! What will be stored, in which order, and who shares it.

use std::iter::Peekable;

use super::group::Link;
use super::level::Level;
use super::sequence::{Sequence, Sorted, Sorter, Spill, Words};
use super::{INDEX_BITS, index};
use crate::error::Result;
use crate::pool::Pin;
use crate::units::{ClusterBits, GuestCluster};

/// Which guest clusters are stored and which share them. Stored clusters are numbered from 0 in guest order.
pub struct Plan {
    /// See [`Level::runs`].
    runs: Sequence,
    /// See [`Level::zeros`].
    zeros: Sequence,
    /// Duplicate, then the number of the stored cluster that it shares; sorted by duplicate.
    links: Sorted,
    /// Keepers with two or more sharers in guest order, and their sharers in the low bits.
    keepers: Sequence,
    pin: Pin,
    /// Clusters that are not zero.
    pub data_clusters: u64,
    /// Clusters to store.
    pub stored: u64,
    /// Stored clusters with two or more sharers.
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
    pub fn new(level: Level, links: &Sorted, pin: Pin, spill: &Spill) -> Result<Self> {
        let Level { data_clusters, l2_tables, runs, zeros, end, .. } = level;
        let mut by_keeper = Sorter::new(spill);
        for word in links.iter() {
            by_keeper.push(Link::from_duplicate(word?).by_keeper())?;
        }
        let by_keeper = by_keeper.finish()?;
        let mut numbers = Numbers::new(&runs, links);
        let mut numbered = Sorter::new(spill);
        let mut keepers = Sequence::new(&spill.share(4));
        let mut current: Option<(u64, u64, u64)> = None;
        for word in by_keeper.iter() {
            let link = Link::from_keeper(word?);
            let (keeper, number, sharers) = match current {
                Some((keeper, number, sharers)) if keeper == link.keeper => (keeper, number, sharers + 1),
                done => {
                    if let Some((keeper, _, sharers)) = done {
                        keepers.push(keeper_word(keeper, sharers))?;
                    }
                    (link.keeper, numbers.of(link.keeper)?, 2)
                }
            };
            current = Some((keeper, number, sharers));
            numbered.push(u128::from(link.duplicate) << INDEX_BITS | u128::from(number))?;
        }
        if let Some((keeper, _, sharers)) = current {
            keepers.push(keeper_word(keeper, sharers))?;
        }
        Ok(Self {
            pin,
            data_clusters,
            stored: data_clusters - links.len(),
            shared: keepers.len(),
            l2_tables,
            end,
            runs,
            zeros,
            links: numbered.finish()?,
            keepers,
        })
    }

    /// The part of a disk of `size` bytes that lies in clusters that are not zero.
    #[must_use]
    pub fn data_bytes(&self, bits: ClusterBits, size: u64) -> u64 {
        let overhang = bits.clusters(size) * bits.bytes() - size;
        let last_is_data = self.end == bits.clusters(size);
        self.data_clusters * bits.bytes() - if last_is_data { overhang } else { 0 }
    }

    /// The number of stored clusters that enter the pool.
    #[must_use]
    pub fn members(&self) -> u64 {
        match self.pin {
            Pin::Shared => self.shared,
            Pin::All => self.stored,
        }
    }

    /// The steps in guest order, none of more than `most` clusters.
    #[must_use]
    pub fn steps(&self, most: u64) -> Steps<'_> {
        Steps {
            most,
            pin: self.pin,
            runs: self.runs.iter(),
            zeros: self.zeros.iter().peekable(),
            links: self.links.iter().peekable(),
            keepers: self.keepers.iter().peekable(),
            run: (0, 0),
        }
    }
}

fn keeper_word(keeper: u64, sharers: u64) -> u128 {
    u128::from(keeper) << 64 | u128::from(sharers)
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
            let Some(word) = self.runs.next() else { break };
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

pub(crate) fn split_run(word: u128) -> (u64, u64) {
    let low = u128::from(u64::MAX);
    (u64::try_from(word >> 64).unwrap_or(u64::MAX), u64::try_from(word & low).unwrap_or(u64::MAX))
}

/// What happens to a piece of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// `count` clusters from `guest` are stored and have no other user.
    Private {
        /// The first.
        guest: GuestCluster,
        /// How many.
        count: u64,
    },
    /// A cluster is stored and enters the pool.
    Member {
        /// The cluster.
        guest: GuestCluster,
        /// Guest clusters that use it, this one included.
        sharers: u64,
    },
    /// `count` clusters from `guest` are zeros that a backing file must not show through.
    Zero {
        /// The first.
        guest: GuestCluster,
        /// How many.
        count: u64,
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
pub struct Steps<'a> {
    most: u64,
    pin: Pin,
    runs: Words<'a>,
    zeros: Peekable<Words<'a>>,
    links: Peekable<Words<'a>>,
    keepers: Peekable<Words<'a>>,
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
        let keeper = peek(&mut self.keepers)?.map(split_run);
        if let Some((keeper, sharers)) = keeper
            && keeper == at
        {
            self.keepers.next();
            self.advance(1);
            return Ok(Some(Step::Member { guest, sharers }));
        }
        if self.pin == Pin::All {
            self.advance(1);
            return Ok(Some(Step::Member { guest, sharers: 1 }));
        }
        let next = |event: Option<(u64, u64)>| event.map_or(end, |(cluster, _)| cluster.min(end));
        let count = (next(link).min(next(keeper)) - at).min(self.most);
        self.advance(count);
        Ok(Some(Step::Private { guest, count }))
    }

    fn advance(&mut self, count: u64) {
        self.run = (self.run.0 + count, self.run.1 - count);
    }
}

pub(crate) fn peek(words: &mut Peekable<Words<'_>>) -> Result<Option<u128>> {
    match words.peek() {
        None => Ok(None),
        Some(Ok(word)) => Ok(Some(*word)),
        Some(Err(_)) => words.next().transpose(),
    }
}

impl Iterator for Steps<'_> {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Result<Step>> {
        self.try_next().transpose()
    }
}
