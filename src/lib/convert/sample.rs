//! How far the contents of a disk can be compressed, found out by compressing some of them.

use rayon::iter::ParallelIterator;
use rayon::slice::ParallelSlice;

use super::options::{ConvertOptions, Sharing};
use crate::codec::{CompressionLevel, Compressor};
use crate::dedup::Run;
use crate::dedup::level::Level;
use crate::disk::{Disk, Reader};
use crate::error::{OrInternal, Result};
use crate::units::ClusterBits;

/// The largest cluster size that is compared, and the pieces of the disk that are looked at.
const WINDOW: ClusterBits = ClusterBits::DEFAULT;
/// The most of them: 16 MiB.
const MOST: u64 = 256;
/// The least, where there are as many.
const LEAST: u64 = 16;
/// One in so many is enough: all sizes together then cost a sixth of compressing everything, and with [`MOST`] mostly far less.
const ONE_IN: u64 = 32;
/// Bytes that a worker compresses in one go.
const TASK: usize = 256 << 10;

/// Pieces of a disk, spread evenly over what is not zero. They are the same for all cluster sizes, so that what is special about
/// them is the same for all.
pub(super) struct Sample<'a> {
    disk: &'a Disk,
    options: &'a ConvertOptions,
    /// Their numbers, ascending.
    windows: Vec<u64>,
}

/// What a cluster size leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Packed {
    /// Clusters that were compressed.
    clusters: u64,
    /// Those of them that did not become smaller.
    whole: u64,
    /// The bytes of the others.
    bytes: u64,
}

impl Packed {
    fn and(self, other: Self) -> Self {
        Self {
            clusters: self.clusters + other.clusters,
            whole: self.whole + other.whole,
            bytes: self.bytes + other.bytes,
        }
    }

    /// The clusters that `stored` contents take, if all are like these.
    pub(super) fn scaled(self, stored: u64, bits: ClusterBits) -> u64 {
        if self.clusters == 0 {
            return stored;
        }
        // Of a sample the rest of a division times a length stays far below 64 bits.
        let (times, rest) = (stored / self.clusters, stored % self.clusters);
        let share = |n: u64| n.saturating_mul(times).saturating_add(n * rest / self.clusters);
        share(self.whole) + share(self.bytes).div_ceil(bits.bytes())
    }
}

impl<'a> Sample<'a> {
    /// A sample of the disk whose clusters of 64 KiB `level` knows.
    pub(super) fn of(disk: &'a Disk, options: &'a ConvertOptions, level: &Level) -> Result<Self> {
        let count = (level.data_clusters / ONE_IN).clamp(LEAST, MOST).min(level.data_clusters);
        let mut windows = Vec::new();
        let mut runs = level.runs.iter();
        let (mut run, mut before) = (Run::default(), 0);
        for n in 0..count {
            let wanted = n * level.data_clusters / count;
            while before + run.len <= wanted {
                let next = runs.next().transpose()?.or_internal("the runs of a level are fewer than its clusters")?;
                before += run.len;
                run = next;
            }
            windows.push(run.start + wanted.saturating_sub(before));
        }
        Ok(Self { disk, options, windows })
    }

    /// Compresses those contents of `level` that lie in the sample.
    pub(super) fn compress(&self, level: &Level, how: CompressionLevel) -> Result<Packed> {
        let bits = level.cluster_bits;
        let shift = WINDOW.bits().saturating_sub(bits.bits());
        let mut clusters = Vec::new();
        let mut name = None;
        for record in level.records.iter() {
            let record = record?;
            let is_first = name.replace(record.name()) != Some(record.name());
            // Without sharing nobody has compared fingerprints, and every cluster is stored.
            if (is_first || self.options.sharing == Sharing::Plain)
                && self.windows.binary_search(&(record.cluster() >> shift)).is_ok()
            {
                clusters.push(record.cluster());
            }
        }
        clusters.sort_unstable();
        let tasks = clusters.par_chunks((TASK >> bits.bits()).max(1));
        let packed: Vec<Result<Packed>> = tasks.map(|task| self.task(task, bits, how)).collect();
        packed.into_iter().try_fold(Packed::default(), |sum, packed| packed.map(|packed| sum.and(packed)))
    }

    fn task(&self, clusters: &[u64], bits: ClusterBits, how: CompressionLevel) -> Result<Packed> {
        let mut reader = Reader::random(self.disk);
        let mut compressor = Compressor::new(how)?;
        let (mut content, mut out) = (vec![0; bits.len()], Vec::new());
        let mut packed = Packed { clusters: clusters.len() as u64, ..Packed::default() };
        for cluster in clusters {
            reader.read(cluster << bits.bits(), &mut content)?;
            out.clear();
            match compressor.append(&content, &mut out) {
                Some(length) => packed.bytes += length as u64,
                None => packed.whole += 1,
            }
        }
        Ok(packed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_stands_for_all() {
        let bits = ClusterBits::GRAIN;
        let packed = Packed { clusters: 10, whole: 2, bytes: 8 * 1024 };
        assert_eq!(packed.scaled(10, bits), 2 + 2);
        assert_eq!(packed.scaled(1000, bits), 200 + 200);
        assert_eq!(packed.scaled(0, bits), 0);
        assert_eq!(Packed::default().scaled(7, bits), 7);
    }
}
