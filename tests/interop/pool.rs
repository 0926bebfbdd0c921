//! The pool under stock QEMU: it cannot be reverted to, it can be deleted, and it has room for a snapshot of every sharer.

use crate::args;
use crate::support::corpus::{K, M, content, write_sparse};
use crate::support::reader::{Facts, Image, Pin, verify_dedup};
use crate::support::{Random, dedup_img, names_in, qemu, scratch, sha256_of};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Some MiB with duplicates as a raw file, and their conversion with the options given.
fn converted(options: &[&str]) -> (TempDir, PathBuf, PathBuf) {
    let home = scratch();
    let [source, target] = ["source.raw", "target.qcow2"].map(|name| home.path().join(name));
    write_sparse(&source, &content());
    let mut words = args!["convert", "-q", "-f", "raw", "-t", "unsafe"].to_vec();
    words.extend(options.iter().map(Into::into));
    words.extend(args![source, target]);
    dedup_img(words).ok();
    (home, source, target)
}

/// The pool's guard: reverting to it by name or by id is refused, and not one byte of the file changes.
#[track_caller]
fn revert_is_refused(image: &Path) {
    assert!(qemu::snapshots(image).contains(&("1".into(), "dedup-pool".into())), "qemu-img sees no pool");
    let before = sha256_of(image);
    for name in ["dedup-pool", "1"] {
        let ran = qemu::snapshot("-a", name, image);
        assert_eq!(ran.code, 1, "{}", ran.told());
        assert_eq!(sha256_of(image), before, "the file has changed: {}", ran.told());
    }
    qemu::check_clean(image);
}

#[test]
fn reverting_to_the_pool_is_refused_and_changes_nothing() {
    for options in [&["-o", "cluster_size=4k"][..], &["-o", "cluster_size=64k"], &["--pin", "all"]] {
        let (_home, source, target) = converted(options);
        revert_is_refused(&target);
        qemu::compare_same("raw", &source, "qcow2", &target);
    }
}

#[test]
fn reverting_is_still_refused_after_qemu_has_written_and_resized() {
    let (_home, _source, target) = converted(&["-o", "cluster_size=4k"]);
    qemu::io("qcow2", &target, &["write -P 7 0 3M".into(), "write -z 4M 1M".into()]);
    qemu::img(args!["resize", "-q", "-f", "qcow2", target, "+3M"]).ok();
    qemu::snapshot("-c", "mine", &target).ok();
    revert_is_refused(&target);
    qemu::snapshot("-a", "mine", &target).ok();
    qemu::check_clean(&target);
}

#[test]
fn deleting_the_pool_leaves_a_clean_image_with_the_same_content() {
    for pin in ["shared", "all"] {
        let (_home, source, target) = converted(&["-o", "cluster_size=4k", "--pin", pin]);
        assert_eq!(qemu::snapshots(&target), [("1".into(), "dedup-pool".into())]);
        qemu::snapshot("-d", "dedup-pool", &target).ok();
        assert_eq!(qemu::snapshots(&target), []);
        qemu::check_clean(&target);
        qemu::compare_same("raw", &source, "qcow2", &target);
    }
}

#[test]
fn a_snapshot_taken_before_the_pool_is_deleted_outlives_it() {
    let (home, source, target) = converted(&["-o", "cluster_size=4k"]);
    qemu::snapshot("-c", "mine", &target).ok();
    qemu::io("qcow2", &target, &["write -P 9 0 6M".into()]);
    qemu::check_clean(&target);
    qemu::snapshot("-d", "dedup-pool", &target).ok();
    qemu::check_clean(&target);
    let raw = home.path().join("mine.raw");
    qemu::convert("qcow2", &target, "raw", &raw, &["-l", "mine"]);
    qemu::compare_same("raw", &source, "raw", &raw);
}

/// A raw file in which one random content of `grain` bytes occurs `times` times, between a few others.
fn repeated(path: &Path, grain: u64, times: u64) {
    let mut random = Random::new(70_000);
    let [first, block, last] = [grain, grain, 3 * grain].map(|length| random.bytes(length as usize));
    std::fs::write(path, [first, block.repeat(times as usize), last].concat()).unwrap();
}

/// Converts a content that occurs `times` times and checks everything but the number of its copies.
fn copies(home: &Path, bits: u32, times: u64) -> (PathBuf, PathBuf, Facts) {
    let [source, target] = ["source.raw", "target.qcow2"].map(|name| home.join(name));
    repeated(&source, 4 * K, times);
    let options = format!("cluster_size=4k,refcount_bits={bits}");
    dedup_img(args!["convert", "-q", "-f", "raw", "-t", "unsafe", "-o", options, source, target]).ok();
    qemu::check_clean(&target);
    qemu::compare_same("raw", &source, "qcow2", &target);
    let facts = verify_dedup(&target, Pin::Shared);
    assert_eq!((facts.refcount_bits, facts.mapped), (bits, times + 4));
    (source, target, facts)
}

/// How often each host cluster is shared, the most shared ones first, without the four that occur once.
fn sharers(facts: &Facts) -> Vec<u64> {
    let mut counts: Vec<u64> = facts.sharers.values().copied().collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    assert_eq!(counts.split_off(counts.len() - 4), [1; 4]);
    counts
}

/// Snapshots of an image that now holds `truth` count every sharer once more each: two must find room and be readable, QEMU must
/// be able to go back to one of them (it counts that one a second time on the way), and both must be deletable.
fn snapshots_work(target: &Path, truth: &Path) {
    for name in ["first", "second"] {
        qemu::snapshot("-c", name, target).ok();
        qemu::check_clean(target);
    }
    qemu::snapshot("-a", "first", target).ok();
    qemu::check_clean(target);
    qemu::io("qcow2", target, &["write -P 3 12k 12k".into(), "write -P 4 1k 1k".into()]);
    qemu::check_clean(target);
    let raw = target.with_extension("snapshot");
    qemu::convert("qcow2", target, "raw", &raw, &["-l", "first"]);
    qemu::compare_same("raw", truth, "raw", &raw);
    qemu::snapshot("-a", "second", target).ok();
    qemu::compare_same("raw", truth, "qcow2", target);
    for name in ["first", "second"] {
        qemu::snapshot("-d", name, target).ok();
        qemu::check_clean(target);
    }
}

/// The most sharers that leave room for the pool, two snapshots and going back to one: `1 + 4 * limit` references.
fn limit(bits: u32) -> u64 {
    (1 << (bits - 2)) - 1
}

#[test]
fn sharing_70000_ways_at_16_bits_splits_the_cluster_into_five() {
    let home = scratch();
    let (source, target, facts) = copies(home.path(), 16, 70_000);
    let full = limit(16);
    assert_eq!(sharers(&facts), [full, full, full, full, 70_000 - 4 * full]);
    assert_eq!((facts.retired, facts.members.len()), (4, 5), "the full copies are retired, the last one takes more");
    snapshots_work(&target, &source);
}

#[test]
fn narrow_refcounts_split_a_cluster_sooner() {
    for (bits, times) in [(8, 1000), (4, 100), (4, limit(4)), (4, limit(4) + 1)] {
        let home = scratch();
        let (source, target, facts) = copies(home.path(), bits, times);
        let full = times / limit(bits);
        let mut due = vec![limit(bits); full as usize];
        due.extend((times % limit(bits) != 0).then_some(times % limit(bits)));
        assert_eq!(sharers(&facts), due, "{bits} bits, {times} times");
        assert!(facts.retired <= full && facts.retired + 1 >= full, "{} retired of {full}", facts.retired);
        snapshots_work(&target, &source);
    }
}

#[test]
fn wider_refcounts_do_not_split() {
    for bits in [32, 64] {
        let home = scratch();
        let (source, target, facts) = copies(home.path(), bits, 2000);
        assert_eq!((sharers(&facts), facts.retired), (vec![2000], 0));
        snapshots_work(&target, &source);
    }
}

#[test]
fn refcounts_too_narrow_for_a_pool_are_refused_by_name() {
    let home = scratch();
    let [source, target] = ["source.raw", "target.qcow2"].map(|name| home.path().join(name));
    repeated(&source, 4 * K, 9);
    for bits in [1, 2] {
        let options = format!("refcount_bits={bits}");
        dedup_img(args!["convert", "-o", options, source, target]).refused(&["refcount_bits"]);
        dedup_img(args!["create", "-o", options, target, "1M"]).refused(&["refcount_bits"]);
    }
    assert_eq!(names_in(home.path()), ["source.raw"]);
}

/// `create` makes an image that is ready for deduplication: its pool is there and empty.
#[test]
fn a_created_image_has_an_empty_pool_and_works_in_qemu() {
    for (options, size) in
        [("", 64 * M), ("cluster_size=4k", 9 * M), ("cluster_size=512,refcount_bits=16", M), ("cluster_size=2M", 5 * M)]
    {
        let home = scratch();
        let image = home.path().join("new.qcow2");
        let mut words = args!["create", "-q"].to_vec();
        if !options.is_empty() {
            words.extend(args!["-o", options]);
        }
        words.extend(args![image, size.to_string()]);
        dedup_img(words).ok();
        let facts = verify_dedup(&image, Pin::Shared);
        assert_eq!((facts.virtual_size, facts.mapped, facts.members.len()), (size, 0, 0), "{options}");
        qemu::check_clean(&image);
        revert_is_refused(&image);
        qemu::io("qcow2", &image, &["write -P 5 0 900k".into(), "read -P 5 0 900k".into()]);
        qemu::check_clean(&image);
        let truth = home.path().join("truth.raw");
        qemu::convert("qcow2", &image, "raw", &truth, &[]);
        snapshots_work(&image, &truth);
        qemu::img(args!["resize", "-q", "-f", "qcow2", image, "+1M"]).ok();
        qemu::check_clean(&image);
        qemu::snapshot("-d", "dedup-pool", &image).ok();
        qemu::check_clean(&image);
        qemu::io("qcow2", &image, &["read -P 5 100k 800k".into()]);
    }
}

#[test]
fn a_created_image_with_preallocated_metadata_has_an_empty_pool_and_is_clean() {
    let home = scratch();
    let image = home.path().join("new.qcow2");
    dedup_img(args!["create", "-q", "-o", "preallocation=metadata,cluster_size=4k", image, "9M"]).ok();
    assert_eq!(Image::open(&image).active().len(), 5, "an L2 table for every 2 MiB");
    qemu::check_clean(&image);
    revert_is_refused(&image);
    qemu::io("qcow2", &image, &["read -P 0 0 9M".into(), "write -P 5 1M 7M".into(), "read -P 5 1M 7M".into()]);
    qemu::check_clean(&image);
    let truth = home.path().join("truth.raw");
    qemu::convert("qcow2", &image, "raw", &truth, &[]);
    snapshots_work(&image, &truth);
}
