//! From sorted records to links.

use crate::dedup::INDEX_BITS;
use crate::error::Result;
use crate::sort::content::ContentAt;
use crate::sort::record::record;
use crate::sort::sequence::{Sorted, Sorter, Spill};

/// Says that a cluster has, or is thought to have, the content of an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    /// The cluster that need not be stored.
    pub duplicate: u64,
    /// The one that is stored: the first of its content, or of its share of the content where the sharer limit splits it.
    pub keeper: u64,
}

/// A link that is sorted by its duplicate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByDuplicate(pub(crate) Link);

record!(by_duplicate_words: ByDuplicate(Link) { duplicate: INDEX_BITS, keeper: INDEX_BITS });

/// A link that is sorted by its keeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ByKeeper(pub(crate) Link);

record!(by_keeper_words: ByKeeper(Link) { keeper: INDEX_BITS, duplicate: INDEX_BITS });

/// Links every cluster to the first one with the same fingerprint; after `limit` sharers a new first one begins.
///
/// The links are candidates until their bytes were compared. They come back sorted by duplicate.
///
/// # Errors
/// Those of the temporary files.
pub fn group(records: &Sorted<ContentAt>, limit: u64, spill: &Spill) -> Result<Sorted<ByDuplicate>> {
    let mut links = Sorter::new(spill);
    let mut name = None;
    let (mut keeper, mut sharers) = (0, 0);
    for record in records.iter() {
        let record = record?;
        let cluster = record.cluster();
        if name == Some(record.name()) && sharers < limit {
            sharers += 1;
            links.push(ByDuplicate(Link { duplicate: cluster, keeper }))?;
        } else {
            name = Some(record.name());
            (keeper, sharers) = (cluster, 1);
        }
    }
    links.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::fingerprint;

    fn links(records: &[(u8, u64)], limit: u64) -> Vec<(u64, u64)> {
        let directory = tempfile::tempdir().unwrap();
        let spill = Spill::new(1 << 20, directory.path());
        let mut sorter = Sorter::new(&spill);
        for &(content, cluster) in records {
            sorter.push(ContentAt::new(fingerprint(&[content]), cluster)).unwrap();
        }
        let links = group(&sorter.finish().unwrap(), limit, &spill).unwrap();
        links.iter().map(|link| link.unwrap().0).map(|link| (link.duplicate, link.keeper)).collect()
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
