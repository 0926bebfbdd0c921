//! `check` says of sound images what `qemu-img check` says, number by number.

use super::check_agreement::differences;
use crate::args;
use crate::support::subjects::{deduplicated, foreign, subjects};
use crate::support::{dedup_img, families, qemu, scratch};
use std::path::Path;

/// Both programs say the same of a sound image, and ours finds nothing beyond.
#[track_caller]
fn agree_on(name: &str, path: &Path) {
    let (different, ours, theirs) = differences(path);
    assert!(different.is_empty(), "{name}: {different:?}\n{}\n{}", ours.ran.told(), theirs.ran.told());
    assert_eq!(ours.beyond(), 0, "{name}: {}", ours.ran.told());
}

#[test]
fn undamaged_images_whose_data_we_never_read_are_judged_as_by_qemu_img() {
    let home = scratch();
    let images = foreign(home.path());
    // With an external data file, offset 0 is a cluster like any other.
    qemu::io("qcow2", &images[0].1, &["write -P 1 0 64k".into()]);
    for (name, path) in images {
        agree_on(name, &path);
    }
}

#[test]
fn undamaged_images_of_every_kind_are_judged_as_by_qemu_img() {
    let families = [
        families::versions(),
        families::widths(),
        families::zeros(),
        families::compressed(),
        families::subclusters(),
        families::snapshots(),
        families::odd_states(),
        families::chains(),
    ];
    for sample in families.iter().flatten().filter(|sample| sample.format == "qcow2" && sample.snapshot.is_none()) {
        agree_on(&sample.name, &sample.path);
    }
    for (name, path) in subjects() {
        agree_on(name, &path);
        assert_eq!(qemu::check(&path).code, 0, "{name} is damaged from the start");
    }
}

#[test]
fn undamaged_deduplicated_images_are_judged_as_by_qemu_img() {
    let home = scratch();
    for (name, more) in [
        ("shared", &[][..]),
        ("all", &["--pin", "all"]),
        ("large", &["-o", "cluster_size=64k"]),
        ("wide", &["-o", "refcount_bits=64"]),
        ("narrow", &["-o", "refcount_bits=4"]),
    ] {
        let path = deduplicated(home.path(), name, more);
        agree_on(name, &path);
        let ran = dedup_img(args!["check", path]).ok();
        assert_eq!(ran.stderr, "", "{}", ran.told());
    }
}
