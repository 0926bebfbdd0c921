//! From sorted records to links.

use crate::dedup::{INDEX, INDEX_BITS, index};
use crate::error::Result;
use crate::sort::sequence::{Sorted, Sorter, Spill};

/// Says that a cluster has, or is thought to have, the content of an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    /// The cluster that need not be stored.
    pub duplicate: u64,
    /// The one that is stored: the first of its content, or of its share of the content where the sharer limit splits it.
    pub keeper: u64,
}

impl Link {
    /// A word that sorts by duplicate.
    pub(crate) fn by_duplicate(self) -> u128 {
        u128::from(self.duplicate) << INDEX_BITS | u128::from(self.keeper)
    }

    /// The inverse of [`Link::by_duplicate`].
    pub(crate) fn from_duplicate(word: u128) -> Self {
        Self { duplicate: index(word >> INDEX_BITS), keeper: index(word) }
    }

    /// A word that sorts by keeper.
    pub(crate) fn by_keeper(self) -> u128 {
        u128::from(self.keeper) << INDEX_BITS | u128::from(self.duplicate)
    }

    /// The inverse of [`Link::by_keeper`].
    pub(crate) fn from_keeper(word: u128) -> Self {
        Self { duplicate: index(word), keeper: index(word >> INDEX_BITS) }
    }
}

/// Links every cluster to the first one with the same fingerprint; after `limit` sharers a new first one begins.
///
/// The links are candidates until their bytes were compared. They come back sorted by duplicate.
///
/// # Errors
/// Those of the temporary files.
pub fn group(records: &Sorted, limit: u64, spill: &Spill) -> Result<Sorted> {
    let mut links = Sorter::new(spill);
    let mut fingerprint = None;
    let (mut keeper, mut sharers) = (0, 0);
    for word in records.iter() {
        let word = word?;
        let cluster = index(word);
        if fingerprint == Some(word & !INDEX) && sharers < limit {
            sharers += 1;
            links.push(Link { duplicate: cluster, keeper }.by_duplicate())?;
        } else {
            fingerprint = Some(word & !INDEX);
            (keeper, sharers) = (cluster, 1);
        }
    }
    links.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dedup::scan::record;

    fn links(records: &[(u128, u64)], limit: u64) -> Vec<(u64, u64)> {
        let directory = tempfile::tempdir().unwrap();
        let spill = Spill::new(1 << 20, directory.path());
        let mut sorter = Sorter::new(&spill);
        for &(fingerprint, cluster) in records {
            sorter.push(record(fingerprint << INDEX_BITS, cluster)).unwrap();
        }
        let links = group(&sorter.finish().unwrap(), limit, &spill).unwrap();
        links.iter().map(|w| Link::from_duplicate(w.unwrap())).map(|l| (l.duplicate, l.keeper)).collect()
    }

    #[test]
    fn duplicates_point_to_the_first_of_their_content() {
        assert_eq!(links(&[(5, 9), (7, 2), (5, 3), (5, 4), (7, 1)], 100), [(2, 1), (4, 3), (9, 3)]);
    }

    #[test]
    fn past_the_sharer_limit_a_second_copy_begins() {
        let same: Vec<_> = (0..7).map(|cluster| (1, cluster)).collect();
        assert_eq!(links(&same, 3), [(1, 0), (2, 0), (4, 3), (5, 3)]);
    }
}
