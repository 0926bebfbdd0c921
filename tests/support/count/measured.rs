//! What is known only by doing it to a copy.

use super::layers::Layers;
use crate::args;
use crate::support::reader::Image;
use crate::support::{dedup_img, qemu, scratch};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// A copy for qemu-img that needs no backing file.
pub(super) fn alone(path: &Path) -> String {
    let file = serde_json::json!({"driver": "file", "filename": path});
    format!("json:{}", serde_json::json!({"driver": "qcow2", "backing": null, "file": file}))
}

/// Clusters that something refers to, and those that leaked. QEMU counts the references, and its own repair shows what is left.
#[track_caller]
pub(super) fn used(path: &Path) -> (u64, u64) {
    let ran = qemu::img(args!["check", "-U", "--output=json", alone(path)]);
    let told: Value = serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()));
    assert_eq!(told.get("corruptions"), None, "{}", ran.told());
    let leaks = told.get("leaks").map_or(0, |leaks| leaks.as_u64().unwrap());
    let counted = |path: &Path| Image::open(path).refcounts().iter().filter(|count| **count > 0).count() as u64;
    if leaks == 0 {
        return (counted(path), 0);
    }
    let home = scratch();
    let copy = home.path().join("mended.qcow2");
    fs::copy(path, &copy).unwrap();
    qemu::img(args!["check", "-q", "-r", "leaks", alone(&copy)]).ok();
    (counted(&copy), leaks)
}

/// The layers of a copy after `dedup`; nothing where it is refused.
pub(super) fn deduplicated(path: &Path) -> Option<Layers> {
    let home = scratch();
    let copy = home.path().join("deduplicated.qcow2");
    fs::copy(path, &copy).unwrap();
    let ran = dedup_img(args!["dedup", "-q", "-f", "qcow2", copy]);
    (ran.code == 0).then(|| Layers::of(Image::open(&copy)))
}

/// How many clusters with data or tables are given back when a snapshot is deleted; what only a pool holds then counts, for `gc`
/// takes it out.
#[track_caller]
pub(super) fn freed_by_deleting(path: &Path, name: &str) -> u64 {
    let home = scratch();
    let [with, without] = ["with.qcow2", "without.qcow2"].map(|name| home.path().join(name));
    fs::copy(path, &with).unwrap();
    fs::copy(path, &without).unwrap();
    qemu::img(args!["snapshot", "-d", name, alone(&without)]).ok();
    let [before, after] = [with, without].map(|path| {
        if Layers::of(Image::open(&path)).pool.is_some() {
            dedup_img(args!["gc", "-q", "-f", "qcow2", path]).ok();
        }
        Layers::of(Image::open(&path)).clusters_of_layers()
    });
    before - after
}
