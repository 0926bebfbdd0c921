//! One pass over the records of all clusters, sorted by content.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use super::map::Cells;
use super::metadata::by_powers;
use super::report::{Amount, Growth, Occurrences};
use crate::error::Result;
use crate::sort::content::ContentAt;
use crate::sort::sequence::Sorted;
use crate::units::ClusterBits;

/// A content that occurs more than once; larger is earlier in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Frequent {
    pub(super) times: u64,
    /// The first cluster that has it, counted through all images.
    pub(super) first: Reverse<u64>,
}

/// What is counted of contents.
pub(super) struct Groups {
    bits: ClusterBits,
    /// The first cluster of each image.
    bases: Vec<u64>,
    /// Clusters with data of each image, and its contents.
    pub(super) images: Vec<(u64, u64)>,
    /// Contents of all images.
    pub(super) contents: u64,
    /// Contents that occur twice or more.
    pub(super) repeated: u64,
    by_times: BTreeMap<u32, (u64, u64)>,
    overlap: Vec<Vec<u64>>,
    /// Contents that are new with each image.
    new: Vec<u64>,
    exclusive: Vec<u64>,
    top: BinaryHeap<Reverse<Frequent>>,
    most: usize,
}

/// A run of one content in one image.
#[derive(Clone, Copy)]
struct Run {
    image: usize,
    times: u64,
    first: u64,
}

impl Groups {
    /// Counts contents in `records`, the `most` frequent of which are kept. Image `k` begins at cluster `bases[k]` of all, and
    /// `cells[k]` is its map.
    pub(super) fn count(
        records: &Sorted<ContentAt>,
        bits: ClusterBits,
        bases: Vec<u64>,
        cells: &mut [Option<Cells>],
        most: usize,
    ) -> Result<Self> {
        let images = bases.len();
        let mut groups = Self {
            bits,
            images: vec![(0, 0); images],
            contents: 0,
            repeated: 0,
            by_times: BTreeMap::new(),
            overlap: if images > 1 { vec![vec![0; images]; images] } else { Vec::new() },
            new: vec![0; images],
            exclusive: vec![0; images],
            top: BinaryHeap::new(),
            most,
            bases,
        };
        let mut name = None;
        let mut runs: Vec<Run> = Vec::new();
        for record in records.iter() {
            let record = record?;
            let cluster = record.cluster();
            if name != Some(record.name()) {
                groups.end(&runs, cells);
                runs.clear();
                name = Some(record.name());
            }
            let image = groups.bases.partition_point(|&base| base <= cluster) - 1;
            let repeated = |cells: &mut [Option<Cells>], cluster| {
                if let Some(Some(map)) = cells.get_mut(image) {
                    map.add_repeated(cluster - groups.bases.get(image).copied().unwrap_or(0));
                }
            };
            match runs.last_mut() {
                Some(run) if run.image == image => {
                    run.times += 1;
                    if run.times == 2 {
                        repeated(cells, run.first);
                    }
                    repeated(cells, cluster);
                }
                _ => runs.push(Run { image, times: 1, first: cluster }),
            }
        }
        groups.end(&runs, cells);
        Ok(groups)
    }

    /// Counts a content that occurs in `runs`.
    fn end(&mut self, runs: &[Run], cells: &mut [Option<Cells>]) {
        let Some(first) = runs.first() else { return };
        let times: u64 = runs.iter().map(|run| run.times).sum();
        self.contents += 1;
        let (contents, references) = self.by_times.entry(times.ilog2()).or_default();
        *contents += 1;
        *references += times;
        if times > 1 {
            self.repeated += 1;
            self.top.push(Reverse(Frequent { times, first: Reverse(first.first) }));
            if self.top.len() > self.most {
                self.top.pop();
            }
        }
        for run in runs {
            if let Some((data, contents)) = self.images.get_mut(run.image) {
                *data += run.times;
                *contents += 1;
            }
            if run.times == 1
                && let (Some(Some(map)), Some(base)) = (cells.get_mut(run.image), self.bases.get(run.image))
            {
                map.add_unique(run.first - base);
            }
            if let Some(row) = self.overlap.get_mut(run.image) {
                for other in runs {
                    row.get_mut(other.image).into_iter().for_each(|clusters| *clusters += run.times);
                }
            }
        }
        self.new.get_mut(first.image).into_iter().for_each(|new| *new += 1);
        if runs.len() == 1 {
            self.exclusive.get_mut(first.image).into_iter().for_each(|only| *only += 1);
        }
    }

    /// Clusters with data of all images.
    pub(super) fn data(&self) -> u64 {
        self.images.iter().map(|(data, _)| data).sum()
    }

    /// The image and the cluster in it that number `cluster` of all is.
    pub(super) fn place(&self, cluster: u64) -> (usize, u64) {
        let image = self.bases.partition_point(|&base| base <= cluster).saturating_sub(1);
        (image, cluster - self.bases.get(image).copied().unwrap_or(0))
    }

    pub(super) fn histogram(&self) -> Vec<Occurrences> {
        let shift = self.bits.bits();
        by_powers(&self.by_times, |(times_from, times_to), (contents, references)| Occurrences {
            times_from,
            times_to,
            contents,
            contents_bytes: contents << shift,
            references_clusters: references,
            references_bytes: references << shift,
        })
    }

    /// The most frequent contents, the most frequent one first.
    pub(super) fn top(&self) -> Vec<Frequent> {
        let mut top: Vec<Frequent> = self.top.iter().map(|Reverse(frequent)| *frequent).collect();
        top.sort_unstable_by(|a, b| b.cmp(a));
        top
    }

    /// The overlap matrix.
    pub(super) fn overlap(&self) -> Vec<Vec<u64>> {
        self.overlap.clone()
    }

    /// What each image adds to those before it.
    pub(super) fn growth(&self) -> Vec<Growth> {
        let shift = self.bits.bits();
        let mut total = 0;
        let growth = |&new: &u64| {
            total += new;
            Growth { new_clusters: new, new_bytes: new << shift, total_clusters: total, total_bytes: total << shift }
        };
        self.new.iter().map(growth).collect()
    }

    /// What only each image has.
    pub(super) fn exclusive(&self) -> Vec<Amount> {
        let amount = |&clusters: &u64| Amount { clusters, bytes: clusters << self.bits.bits() };
        self.exclusive.iter().map(amount).collect()
    }
}
