//! How often each host cluster is referenced.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::units::ClusterBits;

/// The largest count that lies in the small table; larger ones are rare.
const SMALL: u8 = u8::MAX;

/// Counts by number, from any number of threads: one byte for each number, and a table for the few large counts.
pub(crate) struct Tally {
    /// The largest count.
    max: u64,
    small: Vec<AtomicU8>,
    large: Mutex<HashMap<u64, u64>>,
}

impl Tally {
    /// Zeros for the numbers below `limit`, which count up to `max`.
    pub(crate) fn new(limit: u64, max: u64) -> Self {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        Self { max, small: (0..limit).map(|_| AtomicU8::new(0)).collect(), large: Mutex::default() }
    }

    fn grow(&mut self, limit: u64) {
        self.small.resize_with(usize::try_from(limit).unwrap_or(usize::MAX), AtomicU8::default);
    }

    /// Counts `number` so many times; returns how many do not fit.
    pub(crate) fn add(&self, number: u64, times: u64) -> u64 {
        let Some(small) = usize::try_from(number).ok().and_then(|c| self.small.get(c)) else { return 0 };
        let fits = |count: u8| {
            let sum = u64::from(count).checked_add(times).filter(|&sum| sum < u64::from(SMALL) && sum <= self.max)?;
            u8::try_from(sum).ok()
        };
        if small.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok() {
            return 0;
        }
        // Under the lock nobody else moves a count to the large table.
        let mut large = self.large.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match small.swap(SMALL, Ordering::Relaxed) {
            SMALL => large.get(&number).copied().unwrap_or(0),
            count => u64::from(count),
        };
        let sum = before.saturating_add(times).min(self.max);
        large.insert(number, sum);
        times - (sum - before)
    }

    /// The count of `number`.
    pub(crate) fn get(&self, number: u64) -> u64 {
        let small = usize::try_from(number).ok().and_then(|c| self.small.get(c));
        match small.map(|s| s.load(Ordering::Relaxed)) {
            None => 0,
            Some(SMALL) => self.large.lock().unwrap_or_else(PoisonError::into_inner).get(&number).copied().unwrap_or(0),
            Some(count) => u64::from(count),
        }
    }
}

/// References to the clusters of a file, counted from any number of threads: one byte and two bits for each cluster.
pub struct Counts {
    bits: ClusterBits,
    file_len: u64,
    tally: Tally,
    /// Which clusters hold guest data.
    data: Vec<AtomicU64>,
    /// Which clusters hold compressed data.
    packed: Vec<AtomicU64>,
}

/// Why a reference was not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It ends a cluster or more after the end of the file.
    PastEnd,
    /// Counts are as high as a refcount can be.
    Overflow {
        /// The first cluster of which that is true.
        cluster: u64,
        /// How many references were not counted.
        lost: u64,
    },
}

impl Counts {
    /// No references in a file of `file_len` bytes.
    #[must_use]
    pub fn new(bits: ClusterBits, file_len: u64, max: u64) -> Self {
        // A reference may end within the cluster that follows a file that ends in mid-cluster.
        let clusters = bits.clusters(file_len) + 1;
        let set = || (0..words_for(clusters)).map(|_| AtomicU64::new(0)).collect();
        Self { bits, file_len, tally: Tally::new(clusters, max), data: set(), packed: set() }
    }

    /// Makes room for counts of a file that has grown to `file_len` bytes.
    pub fn grow(&mut self, file_len: u64) {
        self.file_len = self.file_len.max(file_len);
        let clusters = self.bits.clusters(self.file_len) + 1;
        self.tally.grow(clusters);
        self.data.resize_with(words_for(clusters), AtomicU64::default);
        self.packed.resize_with(words_for(clusters), AtomicU64::default);
    }

    /// Counts `times` references to the bytes `offset..offset + size`; `data` says that they hold guest data.
    ///
    /// # Errors
    /// Says why not, with QEMU's limits: a reference may reach less than a cluster past the end of the file.
    pub fn add(&self, offset: u64, size: u64, times: u64, data: bool) -> Result<(), Refused> {
        if size == 0 {
            return Ok(());
        }
        let end = offset.checked_add(size).ok_or(Refused::PastEnd)?;
        if end > self.file_len && end - self.file_len >= self.bits.bytes() {
            return Err(Refused::PastEnd);
        }
        let mut overflow = Ok(());
        for cluster in offset >> self.bits.bits()..=(end - 1) >> self.bits.bits() {
            match (self.tally.add(cluster, times), &mut overflow) {
                (0, _) => {}
                (more, Err(Refused::Overflow { lost, .. })) => *lost += more,
                (lost, none) => *none = Err(Refused::Overflow { cluster, lost }),
            }
            if data && let Some(word) = word(&self.data, cluster) {
                word.fetch_or(1 << (cluster & 63), Ordering::Relaxed);
            }
        }
        overflow
    }

    /// Remembers that the bytes `offset..offset + size`, of at least one byte, are compressed.
    pub fn set_packed(&self, offset: u64, size: u64) {
        for cluster in offset >> self.bits.bits()..=offset.saturating_add(size - 1) >> self.bits.bits() {
            let Some(word) = word(&self.packed, cluster) else { break };
            word.fetch_or(1 << (cluster & 63), Ordering::Relaxed);
        }
    }

    /// Whether `cluster` holds compressed data.
    #[must_use]
    pub fn is_packed(&self, cluster: u64) -> bool {
        word(&self.packed, cluster).is_some_and(|word| word.load(Ordering::Relaxed) >> (cluster & 63) & 1 == 1)
    }

    /// The references to `cluster`.
    #[must_use]
    pub fn get(&self, cluster: u64) -> u64 {
        self.tally.get(cluster)
    }

    /// Whether `cluster` holds guest data.
    #[must_use]
    pub fn is_data(&self, cluster: u64) -> bool {
        word(&self.data, cluster).is_some_and(|word| word.load(Ordering::Relaxed) >> (cluster & 63) & 1 == 1)
    }

    /// Clusters for which there may be a count: those of the file, and one more where something reaches into it.
    #[must_use]
    pub fn clusters(&self) -> u64 {
        let file = self.bits.clusters(self.file_len);
        file + u64::from(self.get(file) > 0)
    }
}

/// The words of a set of so many numbers.
fn words_for(numbers: u64) -> usize {
    usize::try_from(numbers.div_ceil(64)).unwrap_or(usize::MAX)
}

fn word(set: &[AtomicU64], cluster: u64) -> Option<&AtomicU64> {
    usize::try_from(cluster / 64).ok().and_then(|i| set.get(i))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_counts_are_exact_and_stop_at_the_width() {
        let counts = Counts::new(ClusterBits::GRAIN, 10 << 12, 65535);
        for _ in 0..1000 {
            counts.add(4096, 4096, 1, true).unwrap();
        }
        assert_eq!((counts.get(1), counts.get(0), counts.get(2)), (1000, 0, 0));
        counts.add(4096, 1, 64535, true).unwrap();
        assert_eq!(counts.add(4096, 1, 1, true), Err(Refused::Overflow { cluster: 1, lost: 1 }));
        assert_eq!(counts.get(1), 65535);
        assert!(counts.is_data(1) && !counts.is_data(2));
    }

    #[test]
    fn a_reference_may_reach_less_than_a_cluster_past_the_end() {
        let counts = Counts::new(ClusterBits::GRAIN, (10 << 12) + 512, 65535);
        assert_eq!(counts.add(10 << 12, 4096, 1, false), Ok(()));
        assert_eq!(counts.add(11 << 12, 4096, 1, false), Err(Refused::PastEnd));
        assert_eq!(counts.add(u64::MAX - 5, 4096, 1, false), Err(Refused::PastEnd));
        let whole = Counts::new(ClusterBits::GRAIN, 10 << 12, 65535);
        assert_eq!(whole.add((9 << 12) + 512, 4096, 1, false), Ok(()));
        assert_eq!((whole.get(9), whole.get(10), whole.clusters()), (1, 1, 11));
    }
}
