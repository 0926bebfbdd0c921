//! The counter itself is judged by QEMU.

use super::image::qcow2_clusters;
use super::layers::Layers;
use super::measured::alone;
use crate::args;
use crate::support::qemu;
use crate::support::reader::Image;
use serde_json::Value;
use std::path::Path;

/// Asserts that qemu-img finds as many clusters of each kind as the counter does, and that references and refcounts are the same.
#[track_caller]
pub(crate) fn agrees_with_qemu(path: &Path) {
    let told = |ran: crate::support::Ran| -> Value {
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()))
    };
    let layers = Layers::of(Image::open(path));
    let size = layers.image.cluster_size();
    let counts = layers.image.refcounts();
    for (cluster, by) in layers.data() {
        assert_eq!(counts[cluster as usize], by.values().sum::<u64>(), "{}: cluster {cluster}: {by:?}", path.display());
    }
    let check = told(qemu::img(args!["check", "--output=json", alone(path)]).ok());
    let figure = |key: &str| check.get(key).map_or(0, |figure| figure.as_u64().unwrap());
    let mine = qcow2_clusters(&layers, &Default::default());
    let mine = |key: &str| mine[key].as_u64().unwrap();
    let compressed = layers.disk().filter(|lead| lead.is_compressed()).count() as u64;
    assert_eq!(figure("total-clusters"), mine("total_clusters"), "{}", path.display());
    assert_eq!(figure("allocated-clusters"), layers.disk().count() as u64, "{}", path.display());
    assert_eq!(figure("compressed-clusters"), compressed, "{}", path.display());
    if layers.image.extended() {
        return;
    }
    let map = told(qemu::img(args!["map", "--output=json", alone(path)]).ok());
    let clusters = |holds: fn(&Value) -> bool| -> u64 {
        let parts = map.as_array().unwrap().iter().filter(|part| part["depth"] == 0 && holds(part));
        parts.map(|part| part["length"].as_u64().unwrap().div_ceil(size)).sum()
    };
    // Since version 8.2.
    let tells_compression = map.as_array().unwrap().iter().any(|part| part.get("compressed").is_some());
    let due = ["allocated_clusters", "compressed_clusters", "zero_flagged_clusters", "unallocated_clusters"].map(mine);
    let found = [
        clusters(|part| part["data"] == true),
        if tells_compression { clusters(|part| part["compressed"] == true) } else { due[1] },
        clusters(|part| part["zero"] == true && part["present"] == true && part["data"] == false),
        clusters(|part| part["present"] == false),
    ];
    assert_eq!(found, due, "{}: {map:#}", path.display());
}
