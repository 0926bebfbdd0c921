//! What `gc` gives back, how fast, and what a guest makes of the image afterwards.

use super::dedup_content::{dedup, same_content, told};
use super::gc_content::{gc, judged};
use super::soak::Soak;
use crate::args;
use crate::support::corpus::{K, M, patch, write_sparse};
use crate::support::reader::{Image, Survey};
use crate::support::subjects::deduplicated;
use crate::support::{Random, dedup_img, qemu, scratch, sha256_of};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What a file occupies.
pub(super) fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

/// Runs qemu-io commands whose discards reach the image, but leave the file as it is.
pub(super) fn edit_unpunched(path: &Path, commands: &[String]) {
    let image = format!(
        "driver=qcow2,discard=unmap,pass-discard-request=off,file.driver=file,file.filename={}",
        path.display()
    );
    let mut words = args!["--image-opts"].to_vec();
    commands.iter().for_each(|command| words.extend(args!["-c", command]));
    words.extend(args![image]);
    let ran = qemu::run("qemu-io", words).ok();
    assert!(!ran.text().contains("rror"), "{}", ran.told());
}

/// An image in which so many MiB in clusters of 4 KiB have leaked, with their L2 tables, and occupy space; some data is at the end.
fn leaky(path: &Path, mebibytes: u64) {
    qemu::create("qcow2", path, mebibytes * M, "cluster_size=4k,preallocation=falloc");
    let image = Image::open(path);
    let l1 = image.header.l1_table_offset;
    patch(path, l1, &vec![0; image.header.l1_size as usize * 8]);
    qemu::io("qcow2", path, &["write -P 3 1M 200k".into()]);
    let ran = qemu::check(path);
    assert_eq!(ran.code, 3, "{}", ran.told());
}

/// Collects, twice more in copies, and returns the least time that it took, in seconds, and the last summary. What is linear stays far
/// below half a second, however busy the machine; what is quadratic takes many.
fn timed(path: &Path, options: &[&str]) -> (f64, serde_json::Value) {
    let copies = [(); 2].map(|()| {
        let copy = path.with_file_name("copy.qcow2");
        qemu::run("cp", args!["--sparse=auto", path, copy]).ok();
        gc(&copy, options)["seconds"].as_f64().unwrap()
    });
    let summary = gc(path, options);
    (copies.into_iter().fold(summary["seconds"].as_f64().unwrap(), f64::min), summary)
}

/// A hundred thousand leaked clusters: the space is back at once, and four times as many take about four times as long.
#[test]
fn leaks_are_given_back_in_time_linear_in_their_number() {
    let home = scratch();
    let [few, many] = [100, 400].map(|mebibytes| {
        let path = home.path().join(format!("leaky-{mebibytes}.qcow2"));
        leaky(&path, mebibytes);
        let (before, length) = (allocated(&path), path.metadata().unwrap().len());
        assert!(before > mebibytes * M, "nothing to give back: {before}");
        let (seconds, summary) = timed(&path, &[]);
        let leaked = told(&summary, "leaked_clusters");
        assert!(leaked >= mebibytes * 256 && told(&summary, "freed_clusters") == leaked, "{summary:#}");
        assert_eq!(path.metadata().unwrap().len(), length, "only compaction cuts the file");
        assert!(allocated(&path) < 2 * M, "{} of {before} bytes are still there: {summary:#}", allocated(&path));
        qemu::check_clean(&path);
        let compacted = judged(&path, &["--compact"]);
        assert!(told(&compacted, "file_length_after_bytes") < 2 * M, "{compacted:#}");
        let ran = qemu::io("qcow2", &path, &["read -P 3 1M 200k".into(), "read -P 0 2M 50M".into()]);
        assert!(!ran.text().contains("verification failed"), "{}", ran.told());
        seconds
    });
    assert!(many < 8.0 * few + 0.5, "100 MiB take {few} s, 400 MiB {many} s");
}

/// Half of the clusters are free, and the file keeps their space: it comes back, and the other half moves together.
#[test]
fn the_space_of_freed_clusters_comes_back() {
    let home = scratch();
    let raw = home.path().join("raw");
    let [few, many] = [16, 64].map(|mebibytes| {
        let path = home.path().join(format!("half-{mebibytes}.qcow2"));
        fs::write(&raw, Random::new(mebibytes).bytes((mebibytes * M) as usize)).unwrap();
        qemu::convert("raw", &raw, "qcow2", &path, &["-o", "cluster_size=4k"]);
        let discards: Vec<String> = (0..mebibytes * 2).map(|n| format!("discard {}k 256k", 512 * n)).collect();
        edit_unpunched(&path, &discards);
        let original = home.path().join("original.qcow2");
        fs::copy(&path, &original).unwrap();
        let half = mebibytes * M / 2;
        assert!(allocated(&path) > 2 * half, "the file system has the space already");
        let summary = gc(&path, &[]);
        assert!(allocated(&path).abs_diff(half) < M, "{} of {half} bytes: {summary:#}", allocated(&path));
        assert!(told(&summary, "allocated_after_bytes").abs_diff(allocated(&path)) < M, "{summary:#}");
        let (seconds, summary) = timed(&path, &["--compact"]);
        assert!(path.metadata().unwrap().len().abs_diff(half) < M, "{summary:#}");
        assert!(told(&summary, "moved_clusters").abs_diff(half / 2 / (4 * K)) < 200, "{summary:#}");
        qemu::check_clean(&path);
        qemu::compare_same("qcow2", &original, "qcow2", &path);
        seconds
    });
    assert!(many < 8.0 * few + 0.5, "16 MiB take {few} s, 64 MiB {many} s");
}

/// Members with one user left leave the pool and are COPIED again: a guest writes them in place, and the file does not grow.
#[test]
fn what_has_left_the_pool_is_written_in_place() {
    let home = scratch();
    let [raw, path] = ["raw", "disk.qcow2"].map(|name| home.path().join(name));
    let twice = Random::new(5).bytes(512 << 10);
    write_sparse(&raw, &[&twice[..], &twice].concat());
    for options in [&[][..], &["--compact"]] {
        dedup_img(args!["convert", "-q", "-f", "raw", "-o", "cluster_size=4k", "-t", "unsafe", raw, path]).ok();
        edit_unpunched(&path, &["write -P 9 512k 256k".into(), "discard 768k 128k".into()]);
        let pooled = Survey::of(&path).members().len();
        let summary = judged(&path, options);
        assert_eq!((pooled, told(&summary, "unpooled_members"), told(&summary, "pool_members")), (128, 96, 32));
        let places = |path: &Path| Survey::of(path).layers[0].map.clone();
        let (before, length) = (places(&path), path.metadata().unwrap().len());
        qemu::io("qcow2", &path, &["write -P 5 0 384k".into(), "write -P 6 512k 256k".into()]);
        assert_eq!(path.metadata().unwrap().len(), length, "the file has grown");
        assert!(places(&path) == before, "what was written has moved");
        qemu::check_clean(&path);
        fs::remove_file(&path).unwrap();
    }
}

/// `--drop-pool` takes the pool's snapshot and nothing else: names and ids of the others stay, and so does what is shared.
#[test]
fn dropping_the_pool_leaves_everything_else() {
    for options in [&["--drop-pool"][..], &["--drop-pool", "--compact"]] {
        let home = scratch();
        let path = deduplicated(home.path(), "disk.qcow2", &[]);
        for (byte, name) in ["one", "two", "three"].into_iter().enumerate() {
            qemu::snapshot("-c", name, &path).ok();
            qemu::io("qcow2", &path, &[format!("write -P {} 300k 4k", byte + 7)]);
        }
        qemu::snapshot("-d", "two", &path).ok();
        let original = home.path().join("original.qcow2");
        fs::copy(&path, &original).unwrap();
        let (before, listed) = (Survey::of(&path), qemu::snapshots(&path));
        assert_eq!(listed.len(), 3, "{listed:?}");
        let summary = judged(&path, options);
        assert_eq!((&summary["pool_dropped"], told(&summary, "pool_members")), (&true.into(), 0), "{summary:#}");
        let others: Vec<_> = listed.into_iter().filter(|(_, name)| name != "dedup-pool").collect();
        assert_eq!(qemu::snapshots(&path), others);
        let after = Survey::of(&path);
        assert_eq!(after.stored.len(), before.stored.len(), "what was shared is shared");
        same_content(&original, &path);
        // Without it there is nothing to drop, and `dedup` makes a new one of the same members.
        assert_eq!(gc(&path, options)["changed"], false);
        let again = dedup(&path, &[]);
        assert_eq!((told(&again, "duplicate_clusters"), told(&again, "pool_members")), (0, 64), "{again:#}");
        qemu::check_clean(&path);
    }
}

/// An image without a pool, and one whose pool is the only snapshot.
#[test]
fn a_pool_is_dropped_from_an_image_without_other_snapshots() {
    let home = scratch();
    let path = deduplicated(home.path(), "disk.qcow2", &[]);
    judged(&path, &["--drop-pool"]);
    assert_eq!(qemu::snapshots(&path), []);
    assert_eq!(Image::open(&path).header.snapshots_offset, 0);
    qemu::img(args!["resize", "-q", "-f", "qcow2", path, "+1M"]).ok();
    qemu::img(args!["amend", "-q", "-f", "qcow2", "-o", "compat=0.10,refcount_bits=16", path]).ok();
    qemu::check_clean(&path);
}

/// I2: after each collection stock QEMU works on the image, and it stays clean.
#[track_caller]
fn stays_clean(mut soak: Soak) {
    for options in [&[][..], &["--compact"], &["--compact"]] {
        soak.collect(options, 40);
    }
}

#[test]
fn an_image_that_is_collected_and_compacted_stays_clean() {
    stays_clean(Soak::new(31, "cluster_size=4k", "shared"));
}

#[test]
fn an_image_of_64k_clusters_that_is_collected_and_compacted_stays_clean() {
    stays_clean(Soak::new(32, "cluster_size=64k,refcount_bits=16", "all"));
}

#[test]
fn an_image_deduplicated_in_place_that_is_compacted_stays_clean() {
    stays_clean(Soak::in_place(33, "cluster_size=4k", 40));
}

/// I5: the memory that there is decides on nothing, even where not all can move in one pass.
#[test]
fn little_memory_gives_the_same_bytes_in_several_passes() {
    let home = scratch();
    let [raw, path, copy] = ["raw", "image.qcow2", "copy.qcow2"].map(|name| home.path().join(name));
    fs::write(&raw, Random::new(8).bytes(48 << 20)).unwrap();
    qemu::convert("raw", &raw, "qcow2", &path, &["-o", "cluster_size=512"]);
    edit_unpunched(&path, &(0..384).map(|n| format!("discard {}k 64k", 128 * n)).collect::<Vec<_>>());
    let sums = [&["--memory", "1M", "--threads", "4"][..], &["--memory", "4M"], &["--threads", "1"]].map(|means| {
        fs::copy(&path, &copy).unwrap();
        let summary = gc(&copy, &[means, &["--compact"]].concat());
        assert!(told(&summary, "moved_clusters") > 20_000, "{summary:#}");
        sha256_of(&copy)
    });
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
    qemu::check_clean(&copy);
    qemu::compare_same("qcow2", &path, "qcow2", &copy);
}
