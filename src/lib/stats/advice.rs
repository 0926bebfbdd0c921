//! What to do with an image.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::report::{CurvePoint, Forecast, ImageStats};
use crate::build::size::{CANDIDATES, is_better};
use crate::disk::Format;
use crate::name::quoted;
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
    /// A shell command for it, which overwrites no file that exists; `None` also where the name has no form that all shells read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Why.
    pub reason: &'static str,
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
    let (action, cluster_size_bytes, predicted_bytes, reason) = match (in_place, new) {
        (Some(in_place), Some(new)) if in_place < worth && !is_better(new.1, Some(in_place)) => {
            (Action::Dedup, None, in_place, "in place; no conversion would be much smaller")
        }
        (Some(in_place), None) if in_place < worth => {
            let reason = "in place; a conversion would lose its snapshots, bitmaps or backing file";
            (Action::Dedup, None, in_place, reason)
        }
        (in_place, Some((size, length))) if length < worth => {
            let reason = match in_place {
                None => "one copy of each content, and no zeros; the best of 4 to 64 KiB",
                Some(_) => "smaller than deduplicated in place; the best of 4 to 64 KiB",
            };
            (Action::Convert, Some(size), length, reason)
        }
        (_, Some(_)) => (Action::None, None, now_bytes, "neither dedup nor convert would save 5 % of the space"),
        (_, None) => {
            let reason =
                "dedup would not save 5 % of the space, and convert would lose its snapshots, bitmaps or backing file";
            (Action::None, None, now_bytes, reason)
        }
    };
    let command = match action {
        Action::None => None,
        Action::Dedup => quoted(path).map(|path| format!("dedup-img dedup {path}")),
        Action::Convert => {
            let size = cluster_size_bytes.unwrap_or(0) >> 10;
            // Nobody must take what a guest wrote into a raw disk for a format.
            let format = if image.format == Format::Raw { " -f raw" } else { "" };
            // Not among the devices.
            let beside = if is_device { Path::new(path.file_name().unwrap_or_default()) } else { path };
            let names = quoted(path).zip(quoted(free_name(beside)));
            names.map(|(path, target)| format!("dedup-img convert{format} -o cluster_size={size}k {path} {target}"))
        }
    };
    Advice { action, cluster_size_bytes, predicted_bytes, now_bytes, command, reason }
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
