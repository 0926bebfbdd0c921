//! How often each host cluster is referenced.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::Result;
use crate::storage::buffer::zeroed;
use crate::units::{ClusterBits, to_usize};

/// The largest count that lies in the small table; larger ones are rare.
const SMALL: u8 = u8::MAX;

/// Clusters that are looked at together where most of them are alike.
pub(crate) const SIDE_BY_SIDE: u64 = 32;

/// Numbers that share a word of a [`Tally`].
const PER_WORD: u64 = 8;
/// A byte of 1 for each of them.
const ONES: u64 = 0x0101_0101_0101_0101;
/// The top bit of each byte: where all are clear, every count is below 128.
const TOPS: u64 = ONES << 7;

/// Counts by number, from any number of threads: one byte for each number, and a table for the few large counts. Eight bytes
/// lie in a word, because runs of numbers are what is counted most.
pub(crate) struct Tally {
    /// The largest count.
    max: u64,
    /// Numbers from here on cannot be counted.
    limit: u64,
    small: Vec<AtomicU64>,
    large: Mutex<HashMap<u64, u64>>,
}

/// The parts of `numbers` that lie in one word each, where a word has `per_word` of them, with the bits that are theirs.
pub(super) fn by_word(numbers: Range<u64>, per_word: u64) -> impl Iterator<Item = (Range<u64>, u64)> {
    let width = 64 / per_word;
    let mut at = numbers.start;
    std::iter::from_fn(move || {
        let part = at..numbers.end.min((at / per_word + 1) * per_word);
        at = part.end;
        let mask =
            |part: &Range<u64>| u64::MAX >> (64 - (part.end - part.start) * width) << (part.start % per_word * width);
        (part.start < part.end).then(|| (part.clone(), mask(&part)))
    })
}

/// The word of a number and how far its byte is shifted in it.
fn place(number: u64) -> (usize, u64) {
    (to_usize(number / PER_WORD), number % PER_WORD * 8)
}

/// The byte of a count.
fn byte(word: u64, shift: u64) -> u8 {
    u8::try_from(word >> shift & 0xff).unwrap_or(SMALL)
}

impl Tally {
    /// Zeros for the numbers below `limit`, which count up to `max`.
    ///
    /// # Errors
    /// Fails where there is no memory for them.
    pub(crate) fn new(limit: u64, max: u64) -> Result<Self> {
        let small = zeroed(to_usize(limit.div_ceil(PER_WORD)))?;
        Ok(Self { max, limit, small, large: Mutex::default() })
    }

    fn grow(&mut self, limit: u64) {
        self.limit = limit;
        self.small.resize_with(to_usize(limit.div_ceil(PER_WORD)), AtomicU64::default);
    }

    /// Counts `number` so many times; returns how many do not fit.
    pub(crate) fn add(&self, number: u64, times: u64) -> u64 {
        let (index, shift) = place(number);
        // What is not counted is told, so that no count is lowered by the word of a wrong sum.
        let Some(small) = self.small.get(index).filter(|_| number < self.limit) else { return times };
        let fits = |word: u64| {
            let sum = u64::from(byte(word, shift)).checked_add(times)?;
            (sum < u64::from(SMALL) && sum <= self.max).then(|| word + (times << shift))
        };
        if small.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok() {
            return 0;
        }
        // Under the lock nobody else moves a count to the large table.
        let mut large = self.large.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match byte(small.fetch_or(u64::from(SMALL) << shift, Ordering::Relaxed), shift) {
            SMALL => large.get(&number).copied().unwrap_or(0),
            count => u64::from(count),
        };
        let sum = before.saturating_add(times).min(self.max);
        large.insert(number, sum);
        times - (sum - before)
    }

    /// Counts each of `numbers` so many times; tells `lost` which do not fit, and how many times.
    fn add_run(&self, numbers: Range<u64>, times: u64, mut lost: impl FnMut(u64, u64)) {
        for (numbers, mask) in by_word(numbers, PER_WORD) {
            let (index, _) = place(numbers.start);
            // Counts below 128 and what is added, below 64, stay below SMALL.
            let counted = times < 64 && self.max >= u64::from(SMALL) && numbers.end <= self.limit && {
                let fits = |word: u64| (word & TOPS == 0).then(|| word + ((ONES * times) & mask));
                let small = self.small.get(index);
                small.is_some_and(|w| w.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok())
            };
            if !counted {
                for number in numbers {
                    match self.add(number, times) {
                        0 => {}
                        more => lost(number, more),
                    }
                }
            }
        }
    }

    /// The count of `number`.
    pub(crate) fn get(&self, number: u64) -> u64 {
        let (index, shift) = place(number);
        match self.small.get(index).map_or(0, |word| byte(word.load(Ordering::Relaxed), shift)) {
            SMALL => self.large.lock().unwrap_or_else(PoisonError::into_inner).get(&number).copied().unwrap_or(0),
            count => u64::from(count),
        }
    }

    /// The common count of [`SIDE_BY_SIDE`] numbers from `first` on, a multiple of that, if it is 0 or 1 for all of them.
    fn common(&self, first: u64) -> Option<u64> {
        let words = self.small.get(place(first).0..)?.get(..4)?;
        let mut words = words.iter().map(|word| word.load(Ordering::Relaxed));
        match words.next()? {
            0 => words.all(|word| word == 0).then_some(0),
            ONES => words.all(|word| word == ONES).then_some(1),
            _ => None,
        }
    }
}

/// References to the clusters of a file, counted from any number of threads: one byte and two bits for each cluster.
pub(crate) struct Counts {
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
pub(crate) enum Refused {
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
    ///
    /// # Errors
    /// Fails where there is no memory for them.
    pub(crate) fn new(bits: ClusterBits, file_len: u64, max: u64) -> Result<Self> {
        // A reference may end within the cluster that follows a file that ends in mid-cluster.
        let clusters = bits.clusters(file_len) + 1;
        let set = || zeroed(words_for(clusters));
        Ok(Self { bits, file_len, tally: Tally::new(clusters, max)?, data: set()?, packed: set()? })
    }

    /// Makes room for counts of a file that has grown to `file_len` bytes.
    pub(crate) fn grow(&mut self, file_len: u64) {
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
    pub(crate) fn add(&self, offset: u64, size: u64, times: u64, data: bool) -> std::result::Result<(), Refused> {
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

    /// Counts `times` references to each of `clusters`, which hold guest data; tells `lost` of which clusters some were not
    /// counted because a refcount cannot be higher, and how many. Does nothing and returns `false` where not all of them lie
    /// inside the file.
    pub(crate) fn add_data(&self, clusters: Range<u64>, times: u64, lost: impl FnMut(u64, u64)) -> bool {
        if clusters.end > self.file_len >> self.bits.bits() {
            return false;
        }
        self.tally.add_run(clusters.clone(), times, lost);
        for (clusters, mask) in by_word(clusters, 64) {
            if let Some(word) = word(&self.data, clusters.start)
                && word.load(Ordering::Relaxed) & mask != mask
            {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
        true
    }

    /// The common number of references to [`SIDE_BY_SIDE`] clusters from `first` on, a multiple of that, if it is 0 or 1 for all
    /// of them.
    pub(crate) fn common(&self, first: u64) -> Option<u64> {
        self.tally.common(first)
    }

    /// Remembers that the bytes `offset..offset + size`, of at least one byte, are compressed.
    pub(crate) fn set_packed(&self, offset: u64, size: u64) {
        for cluster in offset >> self.bits.bits()..=offset.saturating_add(size - 1) >> self.bits.bits() {
            let Some(word) = word(&self.packed, cluster) else { break };
            word.fetch_or(1 << (cluster & 63), Ordering::Relaxed);
        }
    }

    /// Whether `cluster` holds compressed data.
    #[must_use]
    pub(crate) fn is_packed(&self, cluster: u64) -> bool {
        word(&self.packed, cluster).is_some_and(|word| word.load(Ordering::Relaxed) >> (cluster & 63) & 1 == 1)
    }

    /// The references to `cluster`.
    #[must_use]
    pub(crate) fn get(&self, cluster: u64) -> u64 {
        self.tally.get(cluster)
    }

    /// Whether `cluster` holds guest data.
    #[must_use]
    pub(crate) fn is_data(&self, cluster: u64) -> bool {
        word(&self.data, cluster).is_some_and(|word| word.load(Ordering::Relaxed) >> (cluster & 63) & 1 == 1)
    }

    /// Clusters for which there may be a count: those of the file, and one more where something reaches into it.
    #[must_use]
    pub(crate) fn clusters(&self) -> u64 {
        let file = self.bits.clusters(self.file_len);
        file + u64::from(self.get(file) > 0)
    }
}

/// The words of a set of so many numbers.
fn words_for(numbers: u64) -> usize {
    to_usize(numbers.div_ceil(64))
}

fn word(set: &[AtomicU64], cluster: u64) -> Option<&AtomicU64> {
    usize::try_from(cluster / 64).ok().and_then(|i| set.get(i))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_counts_are_exact_and_stop_at_the_width() {
        let counts = Counts::new(ClusterBits::GRAIN, 10 << 12, 65535).unwrap();
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
    fn a_run_counts_as_its_clusters_one_by_one() {
        for max in [15, 255, 65535] {
            let one_by_one = Counts::new(ClusterBits::GRAIN, 200 << 12, max).unwrap();
            let by_run = Counts::new(ClusterBits::GRAIN, 200 << 12, max).unwrap();
            for n in 0..600u64 {
                let (start, length, times) = (n * 37 % 190, n * 11 % 90 + 1, if n % 50 == 0 { 130 } else { n % 3 + 1 });
                let (mut lost, mut expected) = (Vec::new(), Vec::new());
                let inside = by_run.add_data(start..start + length, times, |cluster, more| lost.push((cluster, more)));
                assert_eq!(inside, start + length <= 200);
                for cluster in (start..start + length).filter(|_| inside) {
                    if let Err(Refused::Overflow { cluster, lost }) = one_by_one.add(cluster << 12, 4096, times, true) {
                        expected.push((cluster, lost));
                    }
                }
                assert_eq!(lost, expected);
            }
            let all = |counts: &Counts| (0..201).map(|c| (counts.get(c), counts.is_data(c))).collect::<Vec<_>>();
            assert_eq!(all(&by_run), all(&one_by_one));
        }
    }

    #[test]
    fn a_reference_may_reach_less_than_a_cluster_past_the_end() {
        let counts = Counts::new(ClusterBits::GRAIN, (10 << 12) + 512, 65535).unwrap();
        assert_eq!(counts.add(10 << 12, 4096, 1, false), Ok(()));
        assert_eq!(counts.add(11 << 12, 4096, 1, false), Err(Refused::PastEnd));
        assert_eq!(counts.add(u64::MAX - 5, 4096, 1, false), Err(Refused::PastEnd));
        let whole = Counts::new(ClusterBits::GRAIN, 10 << 12, 65535).unwrap();
        assert_eq!(whole.add((9 << 12) + 512, 4096, 1, false), Ok(()));
        assert_eq!((whole.get(9), whole.get(10), whole.clusters()), (1, 1, 11));
    }
}
