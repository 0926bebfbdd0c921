//! Every figure of `stats`, counted anew: qemu-img makes a raw file of each disk, which is cut into clusters whose SHA-256 are
//! counted; tables and references are those that the tests' own reader finds; what deleting and deduplicating give back is seen by
//! doing it to a copy. Slow and obvious, and no code in common with the program under test.

mod compared;
mod contents;
mod disk;
mod image;
mod judged;
mod layers;
mod layout;
mod measured;
mod oracle;
mod random;

use disk::Clusters;
use serde_json::{Value, json};

pub(crate) use compared::assert_figures;
pub(crate) use disk::Disk;
pub(crate) use image::Source;
pub(crate) use judged::{counted, judged, named, source_of, stats};
pub(crate) use oracle::agrees_with_qemu;
pub(crate) use random::made_at_random;

/// The cluster size that contents are counted in where none is asked for.
pub(crate) fn default_size(sources: &[Source]) -> u64 {
    match sources {
        [one] => one.own_size().unwrap_or(4096),
        many => many.iter().map(|source| source.own_size().unwrap_or(4096)).min().unwrap(),
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// The cluster size that contents are counted in.
    pub(crate) size: u64,
    /// How many of the contents that occur most often are listed.
    pub(crate) top: usize,
    /// Whether there is a curve.
    pub(crate) curve: bool,
}

/// The whole report of some images, but for the recommendation and what differs from run to run.
#[track_caller]
pub(crate) fn report(sources: &[Source], asked: Asked) -> Value {
    let Asked { size, top, curve } = asked;
    let disks: Vec<Clusters> = sources.iter().map(|source| source.disk.clusters(size)).collect();
    let disks: Vec<&Clusters> = disks.iter().collect();
    let held: Vec<&Disk> = sources.iter().map(|source| &source.disk).collect();
    let mut report = json!({
        "schema_version": 1,
        "quick": false,
        "cluster_size_bytes": size,
        "images": sources.iter().map(|source| source.figures(size)).collect::<Value>(),
        "content": contents::content(&disks, size),
        "histogram": contents::histogram(&disks, size),
        "top": contents::top(&disks, size, top),
    });
    if curve {
        report["curve"] = layout::curve(&held, size);
    }
    if sources.len() > 1 {
        report["overlap"] = contents::overlap(&disks);
        report["growth"] = contents::growth(&disks, size);
        report["exclusive"] = contents::exclusive(&disks, size);
    }
    report
}
