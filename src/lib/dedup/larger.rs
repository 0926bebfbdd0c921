//! The records of larger clusters, made of those of smaller ones.

use zerocopy::IntoBytes;

use crate::digest::{fingerprint, is_zero};
use crate::error::Result;
use crate::sort::content::ContentAt;
use crate::units::ClusterBits;

/// The records of larger clusters, in guest order, made of records in guest order.
pub(crate) struct Larger<I> {
    records: I,
    from: ClusterBits,
    to: ClusterBits,
    parts: Vec<ContentAt>,
    /// The first part of the next cluster.
    next: Option<ContentAt>,
}

impl<I: Iterator<Item = Result<ContentAt>>> Larger<I> {
    pub(crate) fn new(records: I, from: ClusterBits, to: ClusterBits) -> Self {
        Self { records, from, to, parts: Vec::new(), next: None }
    }
}

impl<I: Iterator<Item = Result<ContentAt>>> Iterator for Larger<I> {
    type Item = Result<ContentAt>;

    fn next(&mut self) -> Option<Result<ContentAt>> {
        let first = match self.next.take() {
            Some(record) => record,
            None => match self.records.next()? {
                Ok(record) => record,
                failed => return Some(failed),
            },
        };
        let (from, shift) = (self.from, self.to.bits() - self.from.bits());
        let part = |record: ContentAt| part(record, record.cluster() & ((1 << shift) - 1), from);
        let cluster = first.cluster() >> shift;
        self.parts.clear();
        self.parts.push(part(first));
        for record in self.records.by_ref() {
            match record {
                Ok(record) if record.cluster() >> shift == cluster => self.parts.push(part(record)),
                Ok(record) => {
                    self.next = Some(record);
                    break;
                }
                failed => return Some(failed),
            }
        }
        Some(Ok(joined(&self.parts, cluster)))
    }
}

/// The record that a scan with clusters of `grain` leads to for `content`, which is not all zeros. `parts` is scratch memory.
pub(crate) fn of_parts(content: &[u8], grain: ClusterBits, cluster: u64, parts: &mut Vec<ContentAt>) -> ContentAt {
    parts.clear();
    let pieces = (0..).zip(content.chunks(grain.len())).filter(|(_, piece)| !is_zero(piece));
    parts.extend(pieces.map(|(place, piece)| part(ContentAt::new(fingerprint(piece), 0), place, grain)));
    joined(parts, cluster)
}

/// A part of a cluster: what it holds and where it begins. That is told in units of the smallest cluster, so that records which
/// are made from level to level differ where contents do: a part in second place of 8 KiB is not one in second place of 16 KiB.
fn part(content: ContentAt, place: u64, size: ClusterBits) -> ContentAt {
    content.at(place << (size.bits() - ClusterBits::MIN.bits()))
}

fn joined(parts: &[ContentAt], cluster: u64) -> ContentAt {
    match parts {
        // Of the same size as the scan, or with one part that is not zero in its first place.
        [one] if one.cluster() == 0 => one.at(cluster),
        _ => ContentAt::new(fingerprint(parts.as_bytes()), cluster),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const FROM: ClusterBits = ClusterBits::MIN;

    /// Records of clusters with these contents, none for 0.
    fn records(contents: &[u8]) -> Vec<ContentAt> {
        let cluster = |(&content, at): (&u8, u64)| ContentAt::new(fingerprint(&[content; 512]), at);
        contents.iter().zip(0..).filter(|(content, _)| **content != 0).map(cluster).collect()
    }

    fn larger(records: &[ContentAt], from: ClusterBits, to: ClusterBits) -> Vec<ContentAt> {
        Larger::new(records.iter().copied().map(Ok), from, to).collect::<Result<_>>().unwrap()
    }

    proptest! {
        #[test]
        fn larger_clusters_have_equal_records_where_their_contents_are_equal(
            contents in proptest::collection::vec(0u8..3, 1..200),
        ) {
            let mut stepwise = records(&contents);
            for bits in FROM.bits() + 1..=FROM.bits() + 4 {
                let to = ClusterBits::new(bits).unwrap();
                stepwise = larger(&stepwise, ClusterBits::new(bits - 1).unwrap(), to);
                let parts = 1 << (bits - FROM.bits());
                let content = |cluster: u64| {
                    let start = usize::try_from(cluster).unwrap() * parts;
                    let mut content = contents[start..contents.len().min(start + parts)].to_vec();
                    content.resize(parts, 0);
                    content
                };
                for words in [&stepwise, &larger(&records(&contents), FROM, to)] {
                    let data = (0..contents.len().div_ceil(parts) as u64).filter(|&c| content(c).iter().any(|&b| b != 0));
                    prop_assert!(words.iter().map(|&word| word.cluster()).eq(data));
                    let mut by_record = HashMap::new();
                    let mut by_content = HashMap::new();
                    for &word in words {
                        let content = content(word.cluster());
                        prop_assert_eq!(by_record.entry(word.name()).or_insert_with(|| content.clone()), &content);
                        prop_assert_eq!(*by_content.entry(content).or_insert(word.name()), word.name());
                    }
                }
            }
        }
    }

    #[test]
    fn a_cluster_in_memory_has_the_record_that_a_scan_leads_to() {
        let contents = [0, 1, 0, 2, 1, 0, 0, 0];
        let bytes: Vec<u8> = contents.iter().flat_map(|&content| [content; 512]).collect();
        let mut parts = Vec::new();
        assert_eq!(larger(&records(&contents), FROM, ClusterBits::GRAIN), [of_parts(&bytes, FROM, 0, &mut parts)]);
    }
}
