//! `stats` of several images together: what they have in common, what each adds, and the same with any threads and memory.

use super::stats_figures::root_part;
use crate::args;
use crate::support::corpus::{K, edit, write_sparse};
use crate::support::count::{Source, assert_figures, counted, judged, made_at_random, named, source_of, stats};
use crate::support::{dedup_img, families, names_in, qemu, scratch};
use serde_json::Value;
use std::fs;

/// Raw and QCOW2, of different cluster sizes, with backing files and without, that have much in common.
fn mixed() -> [Source; 3] {
    [
        named(families::raw(), "sparse.raw"),
        named(families::versions(), "v3-32k.qcow2"),
        named(families::chains(), "deeper/top.qcow2"),
    ]
}

#[test]
fn stats_figures_of_raw_and_qcow2_images_together() {
    let report = judged(&mixed(), &[], None);
    assert_eq!(report["cluster_size_bytes"], 4 * K, "{report:#}");
    let overlap = &report["overlap"];
    assert!(overlap[0][1] == overlap[0][0] && overlap[2][0].as_u64().unwrap() > 0, "{overlap:#}");
    for size in [512, 16 * K, 64 * K] {
        judged(&mixed(), &["--no-curve"], Some(size));
    }
}

/// The curve is that of one disk on which all lie in a row, each at a multiple of 2 MiB.
#[test]
fn stats_curve_of_images_together_comes_true() {
    let home = scratch();
    let [row, target] = ["row.raw", "target.qcow2"].map(|name| home.path().join(name));
    let mut bytes: Vec<u8> = Vec::new();
    let truths = [
        families::raw().remove(0).truth,
        families::versions().remove(3).truth,
        families::chains().into_iter().find(|sample| sample.name == "deeper/top.qcow2").unwrap().truth,
    ];
    for truth in truths {
        bytes.resize(bytes.len().next_multiple_of(2 << 20), 0);
        bytes.extend(fs::read(truth).unwrap());
    }
    write_sparse(&row, &bytes);
    let report = stats(&mixed(), &[]);
    for entry in report["curve"].as_array().unwrap() {
        let option = format!("cluster_size={}", entry["cluster_size_bytes"]);
        dedup_img(args!["convert", "-q", "-f", "raw", "-t", "unsafe", "-o", option, row, target]).ok();
        assert_eq!(entry["file_length_bytes"], target.metadata().unwrap().len(), "{entry:#}");
    }
}

/// The order decides who brings what is new.
#[test]
fn stats_figures_of_images_in_another_order() {
    let [a, b, c] = mixed();
    judged(&[c, a, b], &[], None);
    let [a, _, _] = mixed();
    let small = named(families::versions(), "v2-512.qcow2");
    let report = judged(&[a, small, named(families::raw(), "ends.raw")], &[], None);
    assert_eq!(report["cluster_size_bytes"], 512, "{report:#}");
}

/// Images of QEMU's alone, for which `--quick` has an answer too.
#[test]
fn stats_figures_of_qcow2_images_together() {
    let sources = [
        named(families::compressed(), "zlib-64k.qcow2"),
        named(families::snapshots(), "snapshots.qcow2"),
        named(families::versions(), "v3-256k.qcow2"),
        named(families::zeros(), "zeros.qcow2"),
    ];
    let report = judged(&sources, &["-f", "qcow2"], None);
    assert_eq!(report["cluster_size_bytes"], 64 * K, "{report:#}");
    let has_map: Vec<bool> = (0..4).map(|n| report["images"][n].get("map").is_some()).collect();
    assert_eq!(has_map, [true, true, false, true]);
}

/// One image that is there twice has everything in common with itself; empty ones have nothing.
#[test]
fn stats_figures_of_the_same_image_twice_and_of_empty_ones() {
    let [a, _, _] = mixed();
    let [again, _, _] = mixed();
    let report = judged(&[a, again], &["--no-curve"], None);
    assert_eq!(report["exclusive"][0]["clusters"], 0, "{report:#}");
    let empty = ["nothing.raw", "one-byte.raw"].map(|name| named(families::raw(), name));
    let [none, one] = empty;
    judged(
        &[none, one, named(families::versions(), "nothing.qcow2"), named(families::versions(), "empty.qcow2")],
        &[],
        None,
    );
}

/// Images that random commands made, of different sizes, cluster sizes and widths.
#[test]
fn stats_figures_of_images_made_at_random_together() {
    for seed in (100..116).step_by(4) {
        let home = scratch();
        let sources: Vec<Source> = (seed..seed + 4).map(|seed| source_of(&made_at_random(home.path(), seed))).collect();
        judged(&sources, &["--memory", "1M"], None);
        judged(&sources, &["--no-curve"], Some(512 << (seed % 9)));
    }
}

/// A root file system, the same some time later, and a deduplicated copy of it.
#[test]
fn stats_figures_are_the_same_with_any_threads_and_memory() {
    let (part, home) = (root_part(), scratch());
    let [later, copy] = ["later.qcow2", "copy.qcow2"].map(|name| home.path().join(name));
    qemu::convert("raw", &part, "qcow2", &later, &["-o", "cluster_size=64k"]);
    edit(&later, &["write -P 7 20M 3M", "write -s @ 30M 4M", "write -z 44M 2M"]);
    dedup_img(args!["convert", "-q", "-f", "raw", "-t", "unsafe", part, copy]).ok();
    let sources = [Source::new(&part, "raw", &part), source_of(&later), Source::new(&copy, "qcow2", &part)];
    let reference = counted(judged(&sources, &["--no-curve"], None));
    assert_eq!(reference["cluster_size_bytes"], 4 * K, "{reference:#}");
    for means in [["--threads", "1"], ["--threads", "4"], ["--memory", "1M"], ["--memory", "64M"]] {
        let other = stats(&sources, &[&means[..], &["--no-curve"]].concat());
        assert_figures(&counted(other), &reference, &format!("{means:?}"));
    }
    // Small clusters are many: with the least memory the tables do not fit.
    let due: Value = whole(stats(&sources, &["--cluster-size", "512"]));
    for means in [["--threads", "1", "--memory", "1M"], ["--threads", "4", "--memory", "1M"]] {
        let other = whole(stats(&sources, &[&means[..], &["--cluster-size", "512"]].concat()));
        assert!(other == due, "{means:?}");
    }
    assert_eq!(names_in(home.path()), ["copy.qcow2", "later.qcow2", "later.truth"]);
}

/// The report but for what differs from run to run, advice included.
fn whole(mut report: Value) -> Value {
    let all = report.as_object_mut().unwrap();
    all.remove("seconds").unwrap();
    all.remove("peak_memory_bytes").unwrap();
    report
}
