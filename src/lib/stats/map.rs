//! A disk cut into pieces.

use super::report::{Cell, Map};
use crate::units::to_usize;

/// Pieces of a map.
const CELLS: u64 = 64;

/// Counts what the clusters of each piece are.
pub(super) struct Cells {
    clusters: u64,
    cells: Vec<Cell>,
    /// Some that share a cluster of the file with one in which the disk ends, which reads like no other one perhaps.
    odd: Vec<u64>,
}

impl Cells {
    /// The pieces of a disk of `clusters` clusters.
    pub(super) fn new(clusters: u64) -> Self {
        let count = to_usize(clusters.min(CELLS));
        Self { clusters, cells: vec![Cell::default(); count], odd: Vec::new() }
    }

    /// The piece of a cluster: piece k begins at cluster k * clusters / pieces, rounded down.
    fn cell(&mut self, cluster: u64) -> Option<&mut Cell> {
        let count = self.cells.len() as u64;
        let at = ((cluster + 1) * count - 1) / self.clusters.max(1);
        self.cells.get_mut(usize::try_from(at).ok()?)
    }

    /// Counts a shared cluster; `odd` says that the disk ends inside one of its sharers.
    pub(super) fn add_shared(&mut self, cluster: u64, odd: bool) {
        // Three of them: two with the same content, and the last one.
        if odd && self.odd.len() < 3 || cluster + 1 == self.clusters {
            self.odd.push(cluster);
        }
        self.cell(cluster).into_iter().for_each(|cell| cell.shared_clusters += 1);
    }

    pub(super) fn add_unique(&mut self, cluster: u64) {
        if self.odd.contains(&cluster) {
            return self.add_repeated(cluster);
        }
        self.cell(cluster).into_iter().for_each(|cell| cell.unique_clusters += 1);
    }

    /// Counts a cluster whose content occurs more than once, be it shared or not.
    pub(super) fn add_repeated(&mut self, cluster: u64) {
        self.cell(cluster).into_iter().for_each(|cell| cell.duplicate_clusters += 1);
    }

    /// The map, when all clusters were counted.
    pub(super) fn finish(mut self) -> Map {
        let (clusters, count) = (self.clusters, self.cells.len() as u64);
        for (cell, k) in self.cells.iter_mut().zip(0u64..) {
            let all = (k + 1) * clusters / count - k * clusters / count;
            // What is shared occurs more than once.
            cell.zero_clusters = all.saturating_sub(cell.unique_clusters + cell.duplicate_clusters);
            cell.duplicate_clusters = cell.duplicate_clusters.saturating_sub(cell.shared_clusters);
        }
        Map { cells: self.cells }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cluster_is_in_the_piece_that_begins_at_or_before_it() {
        for clusters in [1, 2, 63, 64, 65, 100, 127, 128, 1000] {
            let mut cells = Cells::new(clusters);
            (0..clusters).for_each(|cluster| cells.add_unique(cluster));
            let map = cells.finish();
            assert_eq!(map.cells.len() as u64, clusters.min(64));
            assert!(map.cells.iter().all(|cell| cell.zero_clusters == 0 && cell.unique_clusters > 0), "{clusters}");
            assert_eq!(map.cells.iter().map(|cell| cell.unique_clusters).sum::<u64>(), clusters);
        }
    }
}
