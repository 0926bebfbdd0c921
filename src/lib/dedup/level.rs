//! The records of one cluster size, derived from a scan at a smaller one.

use twox_hash::XxHash3_128;
use zerocopy::IntoBytes;

use super::scan::{Scan, record};
use super::sequence::{Sequence, Sorted, Sorter, Spill};
use super::{INDEX, index};
use crate::error::Result;
use crate::units::ClusterBits;

/// What is known of a disk at one cluster size.
pub struct Level {
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// Records sorted by fingerprint, then by cluster.
    pub records: Sorted,
    /// The clusters that are not zero, in guest order, as runs: first cluster in the high 64 bits, length in the low ones.
    pub runs: Sequence,
    /// Clusters that are not zero.
    pub data_clusters: u64,
    /// L2 tables that map at least one of them.
    pub l2_tables: u64,
    /// The cluster after the last one of them; 0 where there is none.
    pub end: u64,
}

/// Counts of a [`Level`] by fingerprint alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Distinct {
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
    pub fn derive(scan: &Scan, cluster_bits: ClusterBits, spill: &Spill) -> Result<Self> {
        let shift = cluster_bits.bits() - scan.grain.bits();
        let mut runs = Runs::new(&spill.share(4), cluster_bits);
        let mut sorter = Sorter::new(spill);
        let mut parts: Vec<u128> = Vec::new();
        let mut current = None;
        for word in scan.records.iter() {
            let word = word?;
            let cluster = index(word) >> shift;
            if current != Some(cluster) {
                if let Some(done) = current {
                    sorter.push(joined(&parts, done))?;
                }
                runs.push(cluster)?;
                parts.clear();
                current = Some(cluster);
            }
            let part = u128::from(index(word) & ((1 << shift) - 1));
            parts.push(word & !INDEX | part);
        }
        if let Some(done) = current {
            sorter.push(joined(&parts, done))?;
        }
        runs.into_level(sorter.finish()?)
    }

    /// The level of the scan's own grain, made of its records without a copy.
    ///
    /// # Errors
    /// Those of the temporary files.
    pub fn of(scan: Scan, spill: &Spill) -> Result<Self> {
        let mut runs = Runs::new(&spill.share(4), scan.grain);
        for word in scan.records.iter() {
            runs.push(index(word?))?;
        }
        runs.into_level(scan.records.into_sorted()?)
    }

    /// How many clusters would be stored with at most `limit` sharers each, taking equal fingerprints for equal contents.
    ///
    /// # Errors
    /// Those of the temporary files.
    pub fn distinct(&self, limit: u64) -> Result<Distinct> {
        let mut distinct = Distinct { stored: 0, shared: 0 };
        let mut fingerprint = None;
        let mut sharers = 0;
        for word in self.records.iter() {
            let word = word?;
            if fingerprint == Some(word & !INDEX) && sharers < limit {
                sharers += 1;
                distinct.shared += u64::from(sharers == 2);
            } else {
                fingerprint = Some(word & !INDEX);
                sharers = 1;
                distinct.stored += 1;
            }
        }
        Ok(distinct)
    }
}

fn joined(parts: &[u128], cluster: u64) -> u128 {
    match parts {
        // Of the same size as the scan, or with one part that is not zero in its first place.
        [one] if one & INDEX == 0 => *one | u128::from(cluster),
        _ => record(XxHash3_128::oneshot(parts.as_bytes()), cluster),
    }
}

/// Collects the clusters that are not zero.
struct Runs {
    cluster_bits: ClusterBits,
    runs: Sequence,
    last: Option<(u64, u64)>,
    data_clusters: u64,
    l2_tables: u64,
    table: Option<u64>,
}

impl Runs {
    fn new(spill: &Spill, cluster_bits: ClusterBits) -> Self {
        Self { cluster_bits, runs: Sequence::new(spill), last: None, data_clusters: 0, l2_tables: 0, table: None }
    }

    fn push(&mut self, cluster: u64) -> Result<()> {
        self.data_clusters += 1;
        let table = cluster / self.cluster_bits.entries();
        if self.table != Some(table) {
            self.table = Some(table);
            self.l2_tables += 1;
        }
        match &mut self.last {
            Some((start, len)) if *start + *len == cluster => *len += 1,
            last => {
                if let Some(done) = last.replace((cluster, 1)) {
                    self.runs.push(run_word(done))?;
                }
            }
        }
        Ok(())
    }

    fn into_level(mut self, records: Sorted) -> Result<Level> {
        if let Some(done) = self.last {
            self.runs.push(run_word(done))?;
        }
        Ok(Level {
            end: self.last.map_or(0, |(start, len)| start + len),
            cluster_bits: self.cluster_bits,
            records,
            runs: self.runs,
            data_clusters: self.data_clusters,
            l2_tables: self.l2_tables,
        })
    }
}

fn run_word((start, len): (u64, u64)) -> u128 {
    u128::from(start) << 64 | u128::from(len)
}
