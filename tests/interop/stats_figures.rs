//! Every figure of `stats` is the one that an independent, slow count finds.

use crate::args;
use crate::support::corpus::{K, M, Sample, edit, patch, write_sparse};
use crate::support::count::{
    Source, agrees_with_qemu, assert_figures, counted, judged, made_at_random, named, source_of, stats,
};
use crate::support::inplace::Subject;
use crate::support::reader::{Entry, Image};
use crate::support::root_disk::root_disk;
use crate::support::subjects::deduplicated;
use crate::support::{Random, cached, dedup_img, families, qemu, scratch, sha256_of};
use serde_json::Value;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The images of a family but for snapshots of them, each by itself; `stats` touches none of them.
#[track_caller]
fn all_of(samples: &[Sample]) {
    for sample in samples.iter().filter(|sample| sample.snapshot.is_none()) {
        let before = sha256_of(&sample.path);
        judged(&[Source::new(&sample.path, sample.format, &sample.truth)], &["-f", sample.format], None);
        assert_eq!(sha256_of(&sample.path), before, "{} was touched", sample.name);
    }
}

/// An image by itself.
#[track_caller]
fn image(path: &Path) -> Value {
    judged(&[source_of(path)], &[], None)
}

/// A figure of the only image of a report.
#[track_caller]
fn figure(report: &Value, part: &str, key: &str) -> u64 {
    report["images"][0][part][key].as_u64().unwrap_or_else(|| panic!("no {part}, {key} in {report:#}"))
}

/// Pieces of the root file system: metadata, files, and some of them a second time.
pub(super) fn root_part() -> PathBuf {
    cached("root-2-part-48M.raw", |part| {
        let disk = File::open(root_disk()).unwrap();
        let mut bytes = vec![0; 48 * M as usize];
        let (first, second) = bytes.split_at_mut(32 * M as usize);
        disk.read_exact_at(first, 0).unwrap();
        disk.read_exact_at(second, 80 * M).unwrap();
        write_sparse(part, &bytes);
    })
}

/// The counter counts what QEMU counts.
#[test]
fn stats_counter_agrees_with_qemu_img() {
    let all = [families::versions(), families::widths(), families::zeros(), families::compressed()];
    let more = [families::subclusters(), families::snapshots(), families::chains()];
    let samples = all.iter().chain(&more).flatten();
    for sample in samples.filter(|sample| sample.snapshot.is_none() && sample.format == "qcow2") {
        agrees_with_qemu(&sample.path);
    }
    for kind in ["snapshots", "zlib", "4 bits", "pool", "bitmaps and snapshots", "version 2, snapshots"] {
        agrees_with_qemu(&Subject::new(kind).path);
    }
}

#[test]
fn stats_figures_of_a_root_file_system() {
    let disk = root_disk();
    let source = || [Source::new(&disk, "raw", &disk)];
    judged(&source(), &["-f", "raw"], None);
    for size in [8, 16, 32, 64] {
        judged(&source(), &["-f", "raw", "--no-curve"], Some(size * K));
    }
}

#[test]
fn stats_figures_of_a_root_file_system_in_qcow2_images() {
    let (part, home) = (root_part(), scratch());
    for size in ["4k", "8k", "16k", "32k", "64k"] {
        let options = format!("cluster_size={size}");
        let path = home.path().join(format!("{size}.qcow2"));
        qemu::convert("raw", &part, "qcow2", &path, &["-o", &options]);
        let report = judged(&[Source::new(&path, "qcow2", &part)], &["--no-curve"], None);
        assert!(size != "4k" || figure(&report, "dedup", "duplicate_clusters") > 1000, "{report:#}");
        dedup_img(args!["convert", "-q", "-f", "raw", "-t", "unsafe", "-o", options, part, path]).ok();
        let report = judged(&[Source::new(&path, "qcow2", &part)], &["--no-curve"], None);
        assert_eq!(figure(&report, "dedup", "duplicate_clusters"), 0, "{report:#}");
        assert!(size != "4k" || figure(&report, "pool", "members") > 1000, "{report:#}");
    }
}

#[test]
fn stats_figures_of_raw_files() {
    all_of(&families::raw());
    for (size, top) in [(512, "1"), (2 * K, "100000"), (64 * K, "3"), (2 * M, "0")] {
        judged(&[named(families::raw(), "sparse.raw")], &["-f", "raw", "--top", top], Some(size));
    }
}

#[test]
fn stats_figures_of_versions_and_cluster_sizes() {
    all_of(&families::versions());
    for size in [512, 4 * K, 256 * K] {
        judged(&[named(families::versions(), "v3-32k.qcow2")], &[], Some(size));
    }
}

#[test]
fn stats_figures_of_refcounts_of_every_width() {
    all_of(&families::widths());
}

#[test]
fn stats_figures_of_zeros_and_preallocation() {
    all_of(&families::zeros());
}

#[test]
fn stats_figures_of_compressed_clusters() {
    all_of(&families::compressed());
}

#[test]
fn stats_figures_of_subclusters() {
    all_of(&families::subclusters());
}

#[test]
fn stats_figures_of_snapshots() {
    all_of(&families::snapshots());
    // Compressed clusters that only a snapshot has: the bytes of the second of three begin in one cluster of the file and end in
    // the next.
    let home = scratch();
    let [raw, path] = ["raw", "compressed.qcow2"].map(|name| home.path().join(name));
    for (clusters, overwritten) in [(2, &["write -P 3 0 8k"][..]), (3, &["write -P 3 0 4k", "write -P 3 8k 4k"])] {
        fs::write(&raw, Random::new(4).bytes(clusters * 4096).iter().map(|byte| byte & 15).collect::<Vec<u8>>())
            .unwrap();
        qemu::convert("raw", &raw, "qcow2", &path, &["-c", "-o", "cluster_size=4k"]);
        qemu::snapshot("-c", "one", &path).ok();
        edit(&path, overwritten);
        image(&path);
    }
}

/// What is not the disk's does not count: bitmaps, header extensions, clusters that a killed writer left.
#[test]
fn stats_figures_of_images_in_odd_states() {
    let mut samples = families::odd_states();
    samples.retain(|sample| !sample.name.starts_with("dirty"));
    all_of(&samples);
}

#[test]
fn stats_figures_of_backing_chains() {
    all_of(&families::chains());
}

/// Images that `dedup` and `gc` have their tests with: leaks, bitmaps, pools with garbage, stale directories, VM states.
#[test]
fn stats_figures_of_images_to_deduplicate() {
    let kinds = [
        "plain",
        "pinned",
        "leaks",
        "snapshots",
        "frozen",
        "zlib",
        "zstd",
        "4 bits",
        "64 bits",
        "pool",
        "bitmaps",
        "bitmaps and snapshots",
        "version 2, snapshots",
        "version 2, backing",
        "growing",
    ];
    kinds.into_iter().for_each(|kind| drop(image(&Subject::new(kind).path)));
}

/// See above.
#[test]
fn stats_figures_of_images_to_collect() {
    let kinds = [
        "leaks",
        "compressed pool",
        "subclusters",
        "VM state",
        "amended",
        "in the way",
        "garbage, snapshots",
        "dropped pool",
        "stale directory",
        "pool",
    ];
    for kind in kinds {
        let report = image(&Subject::to_collect(kind).path);
        if kind.starts_with("garbage") {
            assert!(figure(&report, "pool", "garbage_members") > 0, "{report:#}");
            assert!(figure(&report, "pool", "single_user_members") > 0, "{report:#}");
        }
    }
}

/// A guest lets members of the pool go in each way that there is: writing, discarding, zeros with and without the place kept.
#[test]
fn stats_figures_of_a_pool_that_a_guest_has_worked_on() {
    let home = scratch();
    for (name, options) in [("default", &[][..]), ("pinned", &["--pin", "all"]), ("bits", &["-o", "refcount_bits=16"])]
    {
        let path = deduplicated(home.path(), &format!("{name}.qcow2"), options);
        edit(&path, &["write -P 7 0 64k", "write -P 7 356k 32k", "write -P 9 712k 8k"]);
        edit(&path, &["write -z 64k 32k", "write -z -u 96k 32k", "write -z 420k 32k", "write -z 776k 16k"]);
        qemu::snapshot("-c", "one", &path).ok();
        edit(&path, &["discard 128k 32k", "discard 484k 32k", "write -s @ 840k 32k", "write -z 160k 16k"]);
        let report = image(&path);
        assert!(figure(&report, "pool", "single_user_members") > 0, "{report:#}");
    }
}

/// The narrowest counts that a pool can have: three sharers fill a member, and more of the same need another copy.
#[test]
fn stats_figures_of_members_that_are_full() {
    let home = scratch();
    let [raw, path] = ["raw", "many.qcow2"].map(|name| home.path().join(name));
    let mut random = Random::new(5);
    let (often, twice) = (random.bytes(8 << 10), random.bytes(16 << 10));
    let bytes = [often.repeat(11), twice.repeat(2), vec![0; 12 << 10], random.bytes(40 << 10)].concat();
    write_sparse(&raw, &bytes);
    for bits in ["4", "8"] {
        let options = format!("cluster_size=4k,refcount_bits={bits}");
        dedup_img(args!["convert", "-q", "-f", "raw", "-t", "unsafe", "-o", options, raw, path]).ok();
        let report = image(&path);
        assert_eq!(figure(&report, "refcounts", "full_members"), if bits == "4" { 6 } else { 0 }, "{report:#}");
        assert_eq!(figure(&report, "still_duplicate", "clusters"), 0, "{report:#}");
        // The same once more, written by a guest.
        fs::write(home.path().join("again"), &often).unwrap();
        qemu::io("qcow2", &path, &[format!("write -s {} 120k 8k", home.path().join("again").display())]);
        // One that is full stays full where a user has left.
        qemu::io("qcow2", &path, &["write -P 9 0 4k".into()]);
        image(&path);
        qemu::convert("raw", &raw, "qcow2", &path, &["-o", &options]);
        let report = image(&path);
        assert_eq!(figure(&report, "dedup", "duplicate_clusters"), if bits == "4" { 18 } else { 24 }, "{report:#}");
    }
}

/// What `dedup` refuses is said, and all else is there.
#[test]
fn stats_figures_of_a_snapshot_that_is_called_like_the_pool() {
    let home = scratch();
    let path = home.path().join("mine.qcow2");
    qemu::create("qcow2", &path, 2 * M, "cluster_size=4k");
    edit(&path, &["write -s @ 0 1M"]);
    qemu::snapshot("-c", "dedup-pool", &path).ok();
    edit(&path, &["write -s @ 512k 1M"]);
    let report = image(&path);
    assert!(report["images"][0]["dedup"]["refused"].is_string(), "{report:#}");
    assert!(report["images"][0]["pool"].is_null(), "{report:#}");
}

/// Gates test the figures that the report shows, and nothing else changes.
#[test]
fn stats_figures_that_gates_test() {
    let home = scratch();
    let path = deduplicated(home.path(), "disk.qcow2", &[]);
    edit(&path, &["write -P 7 0 64k"]);
    let sources = [source_of(&path), named(families::raw(), "sparse.raw")];
    let plain = stats(&sources, &[]);
    for (limits, code) in [(["0.0001", "99.5"], 4), (["100", "0"], 0), (["0.0001", "0"], 4), (["100", "99.5"], 4)] {
        let mut words = args!["stats", "--output", "json"].to_vec();
        words.extend(args!["--max-duplicate", limits[0], "--min-saved", limits[1]]);
        words.extend(sources.iter().map(|source| OsString::from(&source.name)));
        let ran = dedup_img(words);
        assert_eq!(ran.code, code, "{}", ran.told());
        let mut report: Value = serde_json::from_str(&ran.stdout).unwrap();
        let gates = report.as_object_mut().unwrap().remove("gates").unwrap();
        assert_figures(&counted(report.clone()), &counted(plain.clone()), "with gates");
        let mut unmet = 0;
        for (n, source) in sources.iter().enumerate() {
            let image = &report["images"][n];
            let saved = image["sharing"]["saved_percent"].as_f64().unwrap_or(0.0);
            let still = image["still_duplicate"]["percent"].as_f64().unwrap();
            for (gate, percent, limit) in [("max-duplicate", still, limits[0]), ("min-saved", saved, limits[1])] {
                let limit: f64 = limit.parse().unwrap();
                let met = if gate == "min-saved" { percent >= limit } else { percent <= limit };
                unmet += usize::from(!met);
                let due = serde_json::json!({
                    "gate": gate,
                    "filename": source.name,
                    "limit_percent": limit,
                    "percent": percent,
                    "met": met,
                });
                let mut all = gates.as_array().unwrap().iter();
                let found = all.find(|found| found["gate"] == gate && found["filename"] == *source.name).unwrap();
                assert_figures(found, &due, &ran.told());
            }
        }
        assert_eq!(gates.as_array().unwrap().len(), 4, "{gates:#}");
        assert_eq!(ran.stderr.lines().count(), unmet, "{}", ran.told());
    }
}

/// The same block at another place of a larger cluster makes another content.
#[test]
fn stats_figures_tell_places_apart() {
    let home = scratch();
    let path = home.path().join("places.raw");
    let block = Random::new(8).bytes(4 << 10);
    for (step, sizes) in [(512, [512, 8 * K]), (4 * K, [4 * K, 64 * K])] {
        let mut bytes = vec![0; 8 * M as usize];
        for n in 0..30 {
            let at = n * (64 * K + step) % (8 * M);
            bytes[at as usize..][..step as usize].copy_from_slice(&block[..step as usize]);
        }
        write_sparse(&path, &bytes);
        for size in sizes {
            judged(&[Source::new(&path, "raw", &path)], &["-f", "raw"], Some(size));
        }
        let image = home.path().join("places.qcow2");
        qemu::convert("raw", &path, "qcow2", &image, &["-o", "cluster_size=64k"]);
        judged(&[Source::new(&image, "qcow2", &path)], &[], None);
    }
}

/// Images that random commands made, of QEMU's and of ours.
#[test]
fn stats_figures_of_images_made_at_random() {
    for seed in 0..12 {
        let home = scratch();
        let path = made_at_random(home.path(), seed);
        image(&path);
        judged(&[source_of(&path)], &["--memory", "1M", "--no-curve"], Some(512 << (seed % 9)));
    }
}

/// More snapshots than one cluster of the table describes, and one of a disk that is empty.
#[test]
fn stats_figures_of_many_snapshots() {
    let home = scratch();
    let path = home.path().join("many.qcow2");
    qemu::create("qcow2", &path, 0, "cluster_size=512");
    for n in 0..20 {
        qemu::snapshot("-c", &format!("snapshot number {n:50}"), &path).ok();
        if n == 0 {
            qemu::img(args!["resize", "-q", "-f", "qcow2", path, "200k"]).ok();
        }
        edit(&path, &[&format!("write -s @ {}k 9k", n * 7), &format!("write -P 3 {}k 1k", n * 5)]);
    }
    let report = image(&path);
    assert_eq!(report["images"][0]["snapshots"].as_array().unwrap().len(), 20, "{report:#}");
}

/// What tables map behind the end of the disk is data of the file, and not the disk's.
#[test]
fn stats_figures_of_a_disk_that_ends_before_its_tables() {
    let home = scratch();
    let path = home.path().join("cut.qcow2");
    qemu::create("qcow2", &path, 4 * M, "cluster_size=4k");
    edit(&path, &["write -s @ 0 3M"]);
    patch(&path, 24, &(M + 512).to_be_bytes());
    qemu::check_clean(&path);
    let report = image(&path);
    assert_eq!(figure(&report, "disk", "total_clusters"), 257, "{report:#}");
}

/// The last cluster of a disk that was made smaller shares a place with one that shows more of it, or all of it.
#[test]
fn stats_figures_of_sharers_that_the_end_of_the_disk_cuts() {
    let home = scratch();
    let [raw, path] = ["raw", "disk.qcow2"].map(|name| home.path().join(name));
    let block = Random::new(9).bytes(4096);
    let late = [&[0; 1024][..], &block[1024..]].concat();
    for block in [&block, &late] {
        write_sparse(&raw, &[&block[..], &[7; 4096], &block[..], &[7; 8192], &[0; 20480], &block[..]].concat());
        for (clusters, is_shared) in [(10, true), (2, true), (10, false), (2, false)] {
            match is_shared {
                true => {
                    dedup_img(args!["convert", "-q", "-f", "raw", "-o", "cluster_size=4k", "-t", "unsafe", raw, path])
                        .ok()
                }
                false => qemu::convert("raw", &raw, "qcow2", &path, &["-o", "cluster_size=4k"]),
            };
            let size = (clusters * 4096 + 512).to_string();
            qemu::img(args!["resize", "-q", "-f", "qcow2", "--shrink", path, size]).ok();
            image(&path);
        }
    }
}

/// Zeros that several guest clusters share, in an image that has no pool.
#[test]
fn stats_figures_of_zeros_that_are_shared() {
    let home = scratch();
    let path = deduplicated(home.path(), "disk.qcow2", &[]);
    dedup_img(args!["gc", "-q", "--drop-pool", path]).ok();
    for table in Image::open(&path).active() {
        let Entry::Data { host, .. } = table.entries[3] else { panic!("guest cluster 3 has no data") };
        patch(&path, host, &[0; 4096]);
    }
    let report = image(&path);
    assert_eq!(figure(&report, "disk", "stored_zero_clusters"), 3, "{report:#}");
}

/// With `-U` also what a guest has open.
#[test]
fn stats_figures_of_an_image_in_use() {
    let home = scratch();
    let path = deduplicated(home.path(), "disk.qcow2", &[]);
    let source = [source_of(&path)];
    let mut guest = qemu::spawn("qemu-io", args!["-f", "qcow2", path]);
    let mut said = BufReader::new(guest.stdout.take().unwrap());
    guest.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
    said.read_line(&mut String::new()).unwrap();
    let ran = dedup_img(args!["stats", path]);
    assert!(ran.code == 1 && ran.stderr.contains("lock"), "{}", ran.told());
    let found = stats(&source, &["-U"]);
    guest.stdin.as_mut().unwrap().write_all(b"quit\n").unwrap();
    guest.wait().unwrap();
    assert_figures(&counted(found), &counted(judged(&source, &[], None)), "-U");
}

/// Disks that QEMU cannot map with small clusters: those sizes are not in the curve.
#[test]
fn stats_figures_of_disks_too_large_for_small_clusters() {
    let home = scratch();
    let path = home.path().join("large.raw");
    let file = File::create(&path).unwrap();
    file.set_len(9 << 40).unwrap();
    for at in [0, 5 * M, 1 << 40, (8 << 40) + 4096, (9 << 40) - 8192] {
        file.write_all_at(&Random::new(3).bytes(8192), at).unwrap();
    }
    let report = judged(&[Source::new(&path, "raw", &path)], &["-f", "raw"], Some(64 * K));
    assert_eq!(report["curve"][0]["cluster_size_bytes"], 8 * K, "{report:#}");
    let qcow2 = home.path().join("large.qcow2");
    qemu::create("qcow2", &qcow2, 200 << 30, "cluster_size=2M");
    qemu::io("qcow2", &qcow2, &["write -P 3 0 4M".into(), "write -P 3 150G 2M".into(), "write -P 4 199G 3k".into()]);
    let report = judged(&[source_of(&qcow2)], &[], None);
    assert_eq!(report["curve"][0]["cluster_size_bytes"], 4 * K, "{report:#}");
    patch(&path, 0, b"x");
}
