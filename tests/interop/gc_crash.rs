//! I1 and I3 for `gc`, compacting or not: the power fails at every write, hole and change of length, or the disk fails, and every
//! guest byte still reads right before and after a repair, ours or QEMU's. `tests/crash-long` asks for more of the same.

use super::dedup_crash::{Judge, asked};
use super::dedup_errors::{fails_everywhere, stops_everywhere};
use crate::support::crash::CrashStorage;
use crate::support::inplace::{Subject, put};
use crate::support::reader::Image;
use dedup_img::Cancel;

/// Random choices of what was not flushed, for each operation.
const CHOICES: u64 = 8;

/// Collects in an image of the kind and judges it as each of at least so many power failures leaves it.
#[track_caller]
fn survives(kind: &'static str, step: usize, least: usize) {
    let subject = Subject::to_collect(kind);
    let compacts = subject.collects.unwrap().compact;
    let mut judge = Judge::new(&subject);
    let storage = CrashStorage::open(&subject.path);
    let report = subject.collect_until(&storage, &Cancel::default()).unwrap();
    assert!(report.changed && (report.moved_clusters > 0) == compacts, "{kind}: {report:?}");
    judge.finished(&storage);
    if compacts {
        let file = subject.home.path().join("compact.qcow2");
        put(&file, &storage.now());
        let image = Image::open(&file);
        let last = image.refcounts().iter().rposition(|count| *count > 0).unwrap() as u64;
        assert_eq!(image.length, (last + 1) * image.cluster_size(), "{kind}: the file does not end with what is used");
    }
    storage.crashes(17, asked().unwrap_or(CHOICES), step, |state, when| judge.state(state, when));
    judge.sum(least);
}

macro_rules! survives {
    ($($name:ident: $kind:literal, $step:literal, $least:literal;)*) => { $(
        /// I1, I3.
        #[test]
        fn $name() {
            survives($kind, $step, $least);
        }
    )* };
}

// The numbers of states add up to more than 2000.
survives! {
    leaks_that_are_freed_survive_every_crash: "leaks", 1, 35;
    a_pool_with_garbage_survives_every_crash: "garbage", 1, 55;
    a_pool_with_garbage_beside_snapshots_survives_every_crash: "garbage, snapshots", 1, 50;
    a_pool_whose_directory_is_stale_survives_every_crash: "stale directory", 1, 55;
    a_pool_that_is_dropped_survives_every_crash: "dropped pool", 1, 35;
    an_image_with_holes_survives_every_crash_of_compaction: "holes", 1, 95;
    snapshots_that_share_tables_survive_every_crash_of_compaction: "snapshots", 1, 70;
    bitmaps_survive_every_crash_of_compaction: "bitmaps", 1, 175;
    an_image_compressed_with_zlib_survives_every_crash_of_compaction: "zlib", 1, 260;
    an_image_compressed_with_zstd_survives_every_crash_of_compaction: "zstd", 1, 240;
    a_version_2_image_survives_every_crash_of_compaction: "version 2", 1, 100;
    an_overlay_survives_every_crash_of_compaction: "backing", 1, 100;
    subclusters_survive_every_crash_of_compaction: "subclusters", 1, 60;
    a_vm_state_survives_every_crash_of_compaction: "VM state", 1, 45;
    a_pool_survives_every_crash_of_compaction: "pool", 1, 240;
    compressed_members_survive_every_crash_of_compaction: "compressed pool", 1, 250;
    a_pool_that_is_dropped_survives_every_crash_of_compaction: "dropped pool, holes", 1, 145;
    tables_of_several_clusters_survive_every_crash_of_compaction: "amended", 9, 230;
    what_makes_way_for_a_table_survives_every_crash_of_compaction: "in the way", 1, 240;
}

/// I1, I3 on a disk that fails.
#[test]
fn every_failure_leaves_a_pool_with_garbage_whole() {
    fails_everywhere(&Subject::to_collect("garbage, snapshots"), 1, 40);
}

/// I1, I3 on a disk that fails.
#[test]
fn every_failure_leaves_an_image_whole_that_is_compacted() {
    fails_everywhere(&Subject::to_collect("snapshots"), 1, 50);
}

/// I1, I3 on a disk that fails.
#[test]
fn every_failure_leaves_tables_of_several_clusters_whole() {
    fails_everywhere(&Subject::to_collect("in the way"), 2, 50);
}

/// I1, I3 on a disk that fails. Refcount blocks go here that a shorter file does not need.
#[test]
fn every_failure_leaves_an_image_whole_that_needs_fewer_refcount_blocks() {
    fails_everywhere(&Subject::to_collect("amended"), 7, 40);
}

/// I1, I3 on a disk that fails.
#[test]
fn every_failure_leaves_a_pool_whole_that_is_compacted() {
    fails_everywhere(&Subject::to_collect("pool"), 2, 80);
}

/// I1 and I2 for a run that is asked to stop.
#[test]
fn a_collection_that_is_stopped_leaves_a_clean_image() {
    for kind in ["snapshots", "pool", "in the way"] {
        stops_everywhere(&Subject::to_collect(kind), 5);
    }
}
