//! The records of one cluster size, derived from a scan at a smaller one.

use std::iter::Peekable;

use crate::dedup::Run;
use crate::dedup::larger::Larger;
use crate::dedup::reading::FirstReading;
use crate::dedup::scan::{Runs, Scan};
use crate::dedup::weave::{Woven, weave};
use crate::disk::history::History;
use crate::error::Result;
use crate::sort::content::ContentAt;
use crate::sort::sequence::{Sequence, Sorted, Sorter, Spill, Words};
use crate::units::ClusterBits;

/// What is known of a disk at one cluster size.
pub(crate) struct Level {
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// Records sorted by fingerprint, then by cluster.
    pub records: Sorted<ContentAt>,
    /// The clusters that are not zero, in guest order.
    pub runs: Sequence<Run>,
    /// Clusters that are not zero.
    pub data_clusters: u64,
    /// Over a backing file: clusters that read as zeros and there as something else.
    pub zeros: Sequence<Run>,
    /// L2 tables that map at least one of all these.
    pub l2_tables: u64,
    /// The cluster after the last one of them; 0 where there is none.
    pub end: u64,
    /// Of a disk with its snapshots: what the layers have in common.
    pub woven: Option<Woven>,
}

/// Counts of a [`Level`] by fingerprint alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Distinct {
    /// Clusters to store.
    pub stored: u64,
    /// Those of them that have two or more sharers.
    pub shared: u64,
}

impl Level {
    /// The level of `cluster_bits`, which is at least the scan's grain.
    ///
    /// The fingerprint of a larger cluster is the fingerprint of its parts' records: nothing is read again.
    ///
    /// # Errors
    /// Those of the temporary files.
    pub(crate) fn derive(
        scan: &Scan,
        cluster_bits: ClusterBits,
        history: Option<&History>,
        spill: &Spill,
    ) -> Result<Self> {
        let mut runs = DataRuns::new(&spill.share(4), cluster_bits);
        let mut sorter = Sorter::new(spill);
        for record in Larger::new(scan.records.iter(), scan.grain, cluster_bits) {
            let record = record?;
            runs.push(record.cluster())?;
            sorter.push(record)?;
        }
        let level = runs.into_level(sorter.finish()?, Sequence::new(&spill.share(4)))?;
        level.woven(history, &scan.in_common, scan.grain, spill)
    }

    /// The level of the scan's own grain, and what later readings are held against.
    ///
    /// # Errors
    /// Those of the temporary files.
    pub(crate) fn of(scan: Scan, history: Option<&History>, spill: &Spill) -> Result<(Self, FirstReading)> {
        let mut runs = DataRuns::new(&spill.share(4), scan.grain);
        let mut sorter = Sorter::new(spill);
        let mut zeros = scan.zeros.iter().peekable();
        for record in scan.records.iter() {
            let record = record?;
            let cluster = record.cluster();
            runs.tables_of_zeros(&mut zeros, cluster)?;
            runs.push(cluster)?;
            sorter.push(record)?;
        }
        runs.tables_of_zeros(&mut zeros, u64::MAX)?;
        drop(zeros);
        let first = FirstReading::new(scan.records, scan.grain)?;
        let level = runs.into_level(sorter.finish()?, scan.zeros)?;
        Ok((level.woven(history, &scan.in_common, scan.grain, spill)?, first))
    }

    /// Finds what the layers of `history` have in common, of which a scan with clusters of `grain` found `in_common`.
    fn woven(
        mut self,
        history: Option<&History>,
        in_common: &Sequence<Run>,
        grain: ClusterBits,
        spill: &Spill,
    ) -> Result<Self> {
        let Some(history) = history else { return Ok(self) };
        let shift = self.cluster_bits.bits() - grain.bits();
        let larger = |run: Run| Run { start: run.start >> shift, len: run.len >> shift };
        let in_common = in_common.iter().map(|run| run.map(larger));
        let (row, entries) = (history.weave(self.cluster_bits), self.cluster_bits.entries());
        let woven = weave(row, entries, (&self.runs, &self.zeros), in_common, spill)?;
        self.l2_tables = woven.l2_tables;
        self.woven = Some(woven);
        Ok(self)
    }

    /// How many clusters would be stored with at most `limit` sharers each, taking equal fingerprints for equal contents.
    ///
    /// # Errors
    /// Those of the temporary files.
    pub(crate) fn distinct(&self, limit: u64) -> Result<Distinct> {
        let row = self.woven.as_ref().map(|woven| woven.weave);
        distinct(&self.records, limit, |cluster| row.map_or(cluster, |row| row.place(cluster)))
    }
}

/// How many clusters would be stored for sorted `records` with at most `limit` sharers each. What is shared at one `place` of the
/// disk only, by the layers of it, does not count as shared.
pub(crate) fn distinct(records: &Sorted<ContentAt>, limit: u64, place: impl Fn(u64) -> u64) -> Result<Distinct> {
    let mut distinct = Distinct { stored: 0, shared: 0 };
    let mut name = None;
    let (mut sharers, mut first) = (0, None);
    for record in records.iter() {
        let record = record?;
        if name == Some(record.name()) && sharers < limit {
            sharers += 1;
            if first.is_some_and(|first| first != place(record.cluster())) {
                distinct.shared += 1;
                first = None;
            }
        } else {
            name = Some(record.name());
            (sharers, first) = (1, Some(place(record.cluster())));
            distinct.stored += 1;
        }
    }
    Ok(distinct)
}

/// Collects the clusters that are not zero.
pub(crate) struct DataRuns {
    cluster_bits: ClusterBits,
    runs: Sequence<Run>,
    last: Runs,
    data_clusters: u64,
    l2_tables: u64,
    table: Option<u64>,
}

impl DataRuns {
    pub(crate) fn new(spill: &Spill, cluster_bits: ClusterBits) -> Self {
        let (runs, last) = (Sequence::new(spill), Runs::default());
        Self { cluster_bits, runs, last, data_clusters: 0, l2_tables: 0, table: None }
    }

    /// Adds the next one.
    pub(crate) fn push(&mut self, cluster: u64) -> Result<()> {
        self.data_clusters += 1;
        self.map(cluster / self.cluster_bits.entries());
        self.last.add(cluster, 1, &mut self.runs)
    }

    /// Counts L2 table `table`; tables come in order.
    fn map(&mut self, table: u64) {
        self.l2_tables += u64::from(self.table.is_none_or(|last| last < table));
        self.table = self.table.max(Some(table));
    }

    /// Counts the tables that map the runs of `zeros` before `cluster`.
    fn tables_of_zeros(&mut self, zeros: &mut Peekable<Words<'_, Run>>, cluster: u64) -> Result<()> {
        let entries = self.cluster_bits.entries();
        while let Some(run) = zeros.next_if(|run| run.as_ref().map_or(true, |run| run.start < cluster)) {
            let Run { start, len } = run?;
            (start / entries..=(start + len - 1) / entries).for_each(|table| self.map(table));
        }
        Ok(())
    }

    /// All of them as a level, which has `records` and `zeros`.
    pub(crate) fn into_level(mut self, records: Sorted<ContentAt>, zeros: Sequence<Run>) -> Result<Level> {
        Ok(Level {
            end: self.last.end(&mut self.runs)?,
            cluster_bits: self.cluster_bits,
            records,
            zeros,
            runs: self.runs,
            data_clusters: self.data_clusters,
            l2_tables: self.l2_tables,
            woven: None,
        })
    }
}
