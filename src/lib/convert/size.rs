//! Scanning, and choosing the cluster size.

use serde::Serialize;

use super::options::{ConvertOptions, Sharing};
use super::sample::Sample;
use super::stages::SCANNING;
use crate::build::layers::with_snapshots;
use crate::build::layout::{Layout, Parts};
use crate::build::size::{CANDIDATES, is_better};
use crate::dedup::level::{Distinct, Level};
use crate::dedup::reading::FirstReading;
use crate::dedup::scan::{Other, scan};
use crate::disk::Disk;
use crate::error::{Advice, ErrorKind, Result};
use crate::pool::Pin;
use crate::sort::sequence::Spill;
use crate::units::ClusterBits;
use crate::work::Work;

/// A cluster size that `auto` considered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SizeChoice {
    /// The cluster size.
    pub cluster_size_bytes: u64,
    /// The length that the file would have; an estimate where clusters are compressed.
    pub file_length_bytes: u64,
}

/// The level to go on with.
pub(super) struct Found {
    pub level: Level,
    /// What later readings are held against.
    pub first: FirstReading,
    pub seen: Seen,
}

/// What a scan tells beside the level.
pub(super) struct Seen {
    pub bytes_read: u64,
    /// Clusters that are not zero and that the backing file has.
    pub same: u64,
    pub choices: Vec<SizeChoice>,
}

/// Reads the disk once and returns its level at the `fixed` cluster size, or at the best one.
pub(super) fn scan_and_choose(
    disk: &Disk,
    backing: Option<&Disk>,
    fixed: Option<ClusterBits>,
    options: &ConvertOptions,
    limit: u64,
    spill: &Spill,
    work: &Work,
) -> Result<Found> {
    let grain = fixed.unwrap_or(ClusterBits::GRAIN);
    work.progress.begin(SCANNING, disk.size());
    let history = disk.history();
    let other = backing.map(Other::Backing);
    let scan = scan(disk, other, grain, spill, work)?;
    let (bytes_read, same) = (scan.bytes_read, scan.same);
    if fixed.is_some() {
        let seen = Seen { bytes_read, same, choices: Vec::new() };
        let (level, first) = Level::of(scan, history, spill)?;
        return Ok(Found { level, first, seen });
    }

    let mut choices = Vec::new();
    let mut sample = None;
    let mut best: Option<(Level, u64)> = None;
    let mut consider = |level: Level, best: &mut Option<(Level, u64)>| -> Result<()> {
        work.cancel.check()?;
        let distinct = match options.sharing {
            Sharing::Pooled(_) => level.distinct(limit)?,
            Sharing::Plain => Distinct { stored: level.data_clusters, shared: 0 },
        };
        let parts = parts(options, level.cluster_bits, disk.size(), distinct, level.l2_tables);
        let mut parts = match with_snapshots(parts, history).and_then(Layout::new) {
            Ok(layout) => layout.parts,
            // A disk too large for this cluster size.
            Err(e) if e.kind() == ErrorKind::Limit => return Ok(()),
            Err(e) => return Err(e),
        };
        if let Some(how) = options.compress {
            let sample = match &mut sample {
                Some(sample) => sample,
                // The first level is that of the largest clusters.
                none => none.insert(Sample::of(disk, options, &level)?),
            };
            parts.data = sample.compress(&level, how)?.scaled(distinct.stored, level.cluster_bits);
        }
        let length = Layout::new(parts)?.file_len();
        let cluster_size_bytes = level.cluster_bits.bytes();
        choices.push(SizeChoice { cluster_size_bytes, file_length_bytes: length });
        if is_better(length, best.as_ref().map(|(_, shortest)| *shortest)) {
            *best = Some((level, length));
        }
        Ok(())
    };
    for bits in CANDIDATES.iter().filter_map(|&bits| ClusterBits::new(bits)).filter(|&bits| bits > grain) {
        consider(Level::derive(&scan, bits, history, spill)?, &mut best)?;
    }
    let (level, first) = Level::of(scan, history, spill)?;
    consider(level, &mut best)?;
    match best {
        Some((level, _)) => Ok(Found { level, first, seen: Seen { bytes_read, same, choices } }),
        None => Err(crate::Error::new(
            ErrorKind::Limit,
            "The image size is too large for every cluster size that auto considers",
        )
        .advise(Advice::AskLargestClusters)),
    }
}

fn parts(options: &ConvertOptions, cluster_bits: ClusterBits, size: u64, distinct: Distinct, l2_tables: u64) -> Parts {
    Parts {
        l2_tables,
        members: match options.sharing {
            Sharing::Pooled(Pin::Shared) => Some(distinct.shared),
            Sharing::Pooled(Pin::All) => Some(distinct.stored),
            Sharing::Plain => None,
        },
        data: distinct.stored,
        ..Parts::empty(cluster_bits, options.refcount_bits, size)
    }
}
