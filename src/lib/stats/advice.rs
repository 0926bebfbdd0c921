//! What to do with an image.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::report::{CurvePoint, Forecast, ImageStats};
use crate::build::size::{CANDIDATES, is_better};
use crate::disk::Format;
use crate::units::ClusterBits;

/// What saves less than this percentage of the space that the file occupies now is not worth it: shared clusters are copied when a
/// guest writes to them, and what lies together on the disk does not lie together in the file.
const WORTH: u64 = 5;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Action {
    /// Deduplicate in place.
    Dedup,
    /// Convert into a new file.
    Convert,
    /// Nothing.
    None,
}

/// Advice for a single image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Advice {
    /// What is to be done.
    pub action: Action,
    /// The cluster size of the new file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size_bytes: Option<u64>,
    /// What the file will occupy.
    pub predicted_bytes: u64,
    /// What it occupies now.
    pub now_bytes: u64,
    /// A shell command for it, where whoever prints this has one: the library leaves it out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Why, in words.
    pub reason: Cow<'static, str>,
    /// Why.
    #[serde(skip)]
    pub why: Why,
    /// The image.
    #[serde(skip)]
    pub image: PathBuf,
    /// Its format.
    #[serde(skip)]
    pub format: Format,
    /// The new file of a conversion: a name that no file has.
    #[serde(skip)]
    pub target: Option<PathBuf>,
}

/// Why something is to be done, or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Why {
    /// In place it becomes as small as it can, or nearly.
    InPlace,
    /// In place it becomes smaller, and a conversion would lose something.
    OnlyInPlace,
    /// A conversion makes it smaller.
    OneCopy,
    /// A conversion makes it smaller than it becomes in place.
    Smaller,
    /// Nothing would make it much smaller.
    NotWorth,
    /// In place it would not become much smaller, and a conversion would lose something.
    NotWorthInPlace,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}

impl Why {
    fn words(self) -> &'static str {
        match self {
            Self::InPlace => "in place; no conversion would be much smaller",
            Self::OnlyInPlace => "in place; a conversion would lose its snapshots, bitmaps or backing file",
            Self::OneCopy => "one copy of each content, and no zeros; the best of 4 to 64 KiB",
            Self::Smaller => "smaller than deduplicated in place; the best of 4 to 64 KiB",
            Self::NotWorth => "neither deduplication in place nor a conversion would save 5 % of the space",
            Self::NotWorthInPlace => {
                "deduplication in place would not save 5 % of the space, and a conversion would lose its snapshots, \
                 bitmaps or backing file"
            }
        }
    }
}

/// The best that can be done with `image`, which `converts` where nothing would be lost by converting it.
pub(super) fn advise(image: &ImageStats, path: &Path, curve: &[CurvePoint], converts: bool) -> Advice {
    // A block device does not say what it occupies, and has nothing to give back.
    let is_device = image.file_allocated_bytes == 0 && image.disk.allocated_clusters > 0;
    let now_bytes = if is_device { image.file_length_bytes } else { image.file_allocated_bytes };
    let in_place = match image.qcow2.as_ref().and_then(|qcow2| qcow2.dedup.as_ref()) {
        Some(Forecast::Done(done)) if !is_device => Some(done.file_allocated_after_bytes),
        _ => None,
    };
    let new = best(curve).filter(|_| converts);
    let worth = now_bytes.saturating_sub(now_bytes / 100 * WORTH);
    let (action, cluster_size_bytes, predicted_bytes, why) = match (in_place, new) {
        (Some(in_place), Some(new)) if in_place < worth && !is_better(new.1, Some(in_place)) => {
            (Action::Dedup, None, in_place, Why::InPlace)
        }
        (Some(in_place), None) if in_place < worth => (Action::Dedup, None, in_place, Why::OnlyInPlace),
        (in_place, Some((size, length))) if length < worth => {
            let why = if in_place.is_none() { Why::OneCopy } else { Why::Smaller };
            (Action::Convert, Some(size), length, why)
        }
        (_, Some(_)) => (Action::None, None, now_bytes, Why::NotWorth),
        (_, None) => (Action::None, None, now_bytes, Why::NotWorthInPlace),
    };
    // Not among the devices.
    let beside = if is_device { Path::new(path.file_name().unwrap_or_default()) } else { path };
    let target = (action == Action::Convert).then(|| free_name(beside));
    let (format, image) = (image.format, path.to_owned());
    let (command, reason) = (None, why.words().into());
    Advice { action, cluster_size_bytes, predicted_bytes, now_bytes, command, reason, why, image, format, target }
}

/// The cluster size that `convert` would choose, and the length of its file.
fn best(curve: &[CurvePoint]) -> Option<(u64, u64)> {
    let sizes = CANDIDATES.iter().filter_map(|&bits| ClusterBits::new(bits));
    let points = sizes.filter_map(|bits| curve.iter().find(|point| point.cluster_size_bytes == bits.bytes()));
    points.fold(None, |best, point| match best {
        Some((_, shortest)) if !is_better(point.file_length_bytes, Some(shortest)) => best,
        _ => Some((point.cluster_size_bytes, point.file_length_bytes)),
    })
}

/// A name beside `path` that no file has.
fn free_name(path: &Path) -> PathBuf {
    let plain = path.with_extension("qcow2");
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let numbered = (1..).map(|n| match n {
        1 => path.with_file_name(format!("{stem}-dedup.qcow2")),
        n => path.with_file_name(format!("{stem}-dedup-{n}.qcow2")),
    });
    std::iter::once(plain).chain(numbered).find(|name| name.symlink_metadata().is_err()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_taken_is_not_suggested() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        for expected in ["disk.qcow2", "disk-dedup.qcow2", "disk-dedup-2.qcow2"] {
            let free = free_name(&path);
            assert_eq!(free.file_name().unwrap(), expected);
            std::fs::write(free, "").unwrap();
        }
    }
}
