//! `convert -n`: what is written, counted on a storage that remembers; the same bytes however it is run; the sharer limit; and
//! contents that are not what their fingerprint says.

use super::collisions::colliding;
use crate::args;
use crate::support::corpus::{K, M, write_sparse};
use crate::support::crash::CrashStorage;
use crate::support::inplace::{Left, Subject, put, verify_repaired};
use crate::support::into::{Before, Count, Mixer, expected, into, judged, layers, pooled, read};
use crate::support::reader::{Pin, Survey};
use crate::support::{Random, dedup_img, qemu, scratch, sha256_of};
use dedup_img::unstable::overwrite;
use dedup_img::{Disk, DiskOptions, OverwriteReport, Work, WorkOptions};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Writes `source` into the image at `target`, of which `storage` has a copy.
fn recorded(storage: &CrashStorage, target: &Path, source: &Path) -> OverwriteReport {
    let options = DiskOptions::default();
    let [present, disk] = [target, source].map(|path| Disk::open(path, &options).unwrap());
    let work = Work::new(WorkOptions { threads: Some(2), ..WorkOptions::default() }).unwrap();
    overwrite(storage, &present, &disk, dedup_img::Pin::Shared, target.parent().unwrap(), &work).unwrap()
}

/// A mixture of what the target holds and of what is new, as long as it and as a raw file.
fn mixture(target: &Path, grain: u64, seed: u64, source: &Path) -> Vec<u8> {
    let (old, pool) = (layers(target), pooled(target));
    let disks: Vec<&[u8]> = old.iter().map(|(_, disk)| &disk[..]).collect();
    let raw = Mixer::new(seed, grain, &disks, &pool).changed(disks[0], 3, 24);
    write_sparse(source, &raw);
    raw
}

/// Each new content is written once, whole, to a cluster that nothing uses; when the same comes again the file is not even flushed.
#[test]
fn what_has_changed_is_what_is_written() {
    for kind in ["plain", "snapshots", "pool", "version 2", "zlib", "growing", "64 bits"] {
        let subject = Subject::new(kind);
        let [source, target] = ["source.raw", "target.qcow2"].map(|name| subject.home.path().join(name));
        let was = Survey::of(&subject.path);
        let raw = mixture(&subject.path, was.cluster_size, 3, &source);
        let old = &layers(&subject.path)[0].1;
        let size = was.cluster_size as usize;
        let due = expected(&raw, old);
        let count = Count::of((old, &due, raw.len()), size, &was.layers[0].map, &pooled(&subject.path));

        let storage = CrashStorage::open(&subject.path);
        let report = recorded(&storage, &subject.path, &source);
        assert!(report.changed && count.written > 20 && count.reused > 5, "{kind}: {report:?}, {count:?}");
        put(&target, &storage.now());
        let after = Survey::of(&target);
        let fresh: BTreeSet<u64> = after.stored.keys().copied().filter(|word| !was.stored.contains_key(word)).collect();
        let members: BTreeSet<u64> = was.members().iter().copied().collect();
        let fresh: BTreeSet<u64> = fresh.difference(&members).copied().collect();
        assert_eq!(fresh.len() as u64, count.written, "{kind}: new clusters: {report:?}");
        let names: BTreeSet<_> = after.contents(fresh.iter().copied()).into_values().collect();
        assert_eq!(names.len(), fresh.len(), "{kind}: something is stored twice");
        let inside = |at: u64, write: &std::ops::Range<u64>| {
            (at + was.cluster_size).min(write.end).saturating_sub(at.max(write.start))
        };
        let writes = storage.writes();
        let written: u64 = writes.iter().flat_map(|write| fresh.iter().map(|at| inside(*at, write))).sum();
        assert_eq!(written, count.written * was.cluster_size, "{kind}: bytes of data that were written");
        assert_eq!(report.written_bytes, written, "{kind}");
        // The rest is metadata, and less than what changes by moving each table that has an entry that changes, and the pool.
        let all: u64 = writes.iter().map(|write| write.end - write.start).sum();
        println!("{kind}: {written} bytes of data and {} of metadata in {} writes", all - written, writes.len());

        let storage = CrashStorage::open(&target);
        let again = recorded(&storage, &target, &source);
        assert_eq!((again.changed, again.written_clusters, storage.operations()), (false, 0, 0), "{kind}: {again:?}");
    }
}

/// A changed file in a file system: what changed is written and no more, and a copy of a file costs nothing.
#[test]
fn a_few_changes_write_a_few_clusters() {
    let home = scratch();
    let [source, target] = ["source.raw", "target.qcow2"].map(|name| home.path().join(name));
    let mut raw = Random::new(5).bytes(8 << 20);
    raw.resize(16 << 20, 0);
    write_sparse(&source, &raw);
    qemu::create("qcow2", &target, 16 << 20, "cluster_size=4k");
    assert_eq!(Count::told(&into(&[], "raw", &source, &target)).written, 2048);
    // A sector of a cluster, ten clusters of a new content, a copy of a MiB, and zeros.
    raw[5000..5512].fill(7);
    raw[100 << 12..110 << 12].fill(9);
    raw.copy_within(2 << 20..3 << 20, 12 << 20);
    raw[4 << 20..(4 << 20) + (80 << 10)].fill(0);
    write_sparse(&source, &raw);
    let due = Count { unchanged: 2048 - 31, zeroed: 20, changed: 267, reused: 256, written: 2 };
    let storage = CrashStorage::open(&target);
    let report = recorded(&storage, &target, &source);
    let bytes: u64 = storage.writes().iter().map(|write| write.end - write.start).sum();
    assert_eq!((report.written_clusters, report.reused_clusters), (2, 256), "{report:?}");
    // The pool has 257 members and 40 bytes for each; there are eight L2 tables.
    assert!(bytes < 2 * 4096 + 257 * 48 + 24 * 4096, "{bytes} bytes were written: {report:?}");
    assert_eq!(Count::told(&into(&[], "raw", &source, &target)), due);
    qemu::compare_same("raw", &source, "qcow2", &target);
    qemu::check_clean(&target);
}

/// I5: neither threads nor memory nor the way the source is stored change one byte.
#[test]
fn the_same_disk_gives_the_same_bytes() {
    for (kind, grain) in [("pool", 4096), ("snapshots", 4096), ("growing", 512), ("version 2, backing", 4096)] {
        let subject = Subject::new(kind);
        let home = subject.home.path();
        let [source, full, packed, target] = ["source", "full", "packed", "target"].map(|name| home.join(name));
        let raw = mixture(&subject.path, grain, 8, &source);
        fs::write(&full, raw).unwrap();
        qemu::convert("raw", &full, "qcow2", &packed, &["-c", "-o", "cluster_size=64k"]);
        let mut sums = BTreeSet::new();
        for (options, format, source) in [
            (&["--threads", "1"][..], "raw", &source),
            (&["--threads", "2"], "raw", &full),
            (&["--threads", "8", "--memory", "1M"], "raw", &source),
            (&["-m", "8"], "qcow2", &packed),
            (&["-t", "none", "-T", "none", "-W", "-r", "1G", "--target-is-zero"], "raw", &source),
        ] {
            fs::copy(&subject.path, &target).unwrap();
            let ran = into(options, format, source, &target);
            assert_eq!(ran["changed"], true, "{ran:#}");
            sums.insert(sha256_of(&target));
        }
        assert_eq!(sums.len(), 1, "{kind}");
    }
}

/// I5 where the records of the comparison do not fit into memory: 64 Ki clusters of 512 bytes.
#[test]
fn little_memory_gives_the_same_bytes() {
    let home = scratch();
    let [source, image, target] = ["source", "image", "target"].map(|name| home.path().join(name));
    let mut random = Random::new(3);
    let blocks: Vec<Vec<u8>> = (0..9000).map(|_| random.bytes(512)).collect();
    let any = |random: &mut Random| blocks[random.below(9000) as usize].clone();
    let mut raw: Vec<u8> = (0..64 << 10).flat_map(|_| any(&mut random)).collect();
    fs::write(&source, &raw).unwrap();
    dedup_img(args!["convert", "-q", "-f", "raw", "-t", "unsafe", "-o", "cluster_size=512", &source, &image]).ok();
    for at in (0..64 << 10).filter(|at| at % 3 > 0) {
        let content = if at % 7 == 0 { random.bytes(512) } else { any(&mut random) };
        raw[at * 512..][..512].copy_from_slice(&content);
    }
    fs::write(&source, &raw).unwrap();
    let mut sums = BTreeSet::new();
    for options in [
        ["--memory", "1G", "--threads", "2"],
        ["--memory", "1M", "--threads", "1"],
        ["--memory", "1M", "--threads", "16"],
    ] {
        fs::copy(&image, &target).unwrap();
        let summary = into(&options, "raw", &source, &target);
        assert!(summary["reused_clusters"].as_u64().unwrap() > 20_000, "{summary:#}");
        sums.insert(sha256_of(&target));
    }
    assert_eq!(sums.len(), 1);
    qemu::check_clean(&target);
    assert!(read(&target) == raw);
}

/// A target of 4 bits, in which a cluster has at most three sharers, so that the pool and two snapshots have room.
#[test]
fn the_sharer_limit_holds() {
    let home = scratch();
    let [source, target] = ["source.raw", "target.qcow2"].map(|name| home.path().join(name));
    qemu::create("qcow2", &target, M, "cluster_size=4k,refcount_bits=4");
    let mut raw = vec![0; M as usize];
    let fill = |raw: &mut Vec<u8>, clusters: std::ops::Range<usize>, byte| {
        raw[clusters.start * 4096..clusters.end * 4096].fill(byte);
    };
    let most = |path: &Path| Survey::of(path).stored.values().map(|stored| stored.references).max().unwrap();
    fill(&mut raw, 0..10, 1);
    fill(&mut raw, 20..23, 2);
    fill(&mut raw, 30..31, 3);
    fs::write(&source, &raw).unwrap();
    let first = judged(&target, "raw", &source, &raw, Before::Sound, Pin::Shared);
    assert_eq!(first["written_clusters"], 4 + 1 + 1, "{first:#}");
    assert_eq!(most(&target), 3);
    // The fourth copy of the first has room for two, the last for two as well.
    fill(&mut raw, 10..19, 1);
    fill(&mut raw, 31..36, 3);
    fs::write(&source, &raw).unwrap();
    let second = judged(&target, "raw", &source, &raw, Before::Sound, Pin::Shared);
    assert_eq!(most(&target), 3);
    println!("{second:#}");
    for name in ["one", "two"] {
        qemu::snapshot("-c", name, &target).ok();
        qemu::check_clean(&target);
        fill(&mut raw, 40..45, 2);
        fill(&mut raw, 50..57, if name == "one" { 1 } else { 4 });
        fs::write(&source, &raw).unwrap();
        judged(&target, "raw", &source, &raw, Before::Sound, Pin::Shared);
    }
    // Going back to a snapshot takes references too, and there is room for them.
    qemu::snapshot("-a", "one", &target).ok();
    qemu::check_clean(&target);
    verify_repaired(&target, Left::Whole);
}

/// I4: new contents, kept ones and members of the pool that all have one fingerprint are told apart by their bytes.
#[test]
fn contents_with_equal_fingerprints_are_told_apart() {
    let home = scratch();
    let [source, target]: [PathBuf; 2] = ["source.raw", "target.qcow2"].map(|name| home.path().join(name));
    let mut random = Random::new(11);
    let common = random.bytes(4096);
    let disk = |numbers: &[u32]| -> Vec<u8> { numbers.iter().flat_map(|number| colliding(&common, *number)).collect() };
    // 0 to 9 are kept, 10 to 19 once each and 20 to 29 twice go, so that the pool alone has those.
    let kept: Vec<u32> = (0..10).collect();
    let before = disk(&[&kept[..], &(10..30).collect::<Vec<_>>(), &(20..30).collect::<Vec<_>>()].concat());
    write_sparse(&source, &[before, vec![0; 120 * 4096]].concat());
    dedup_img(args!["convert", "-q", "-f", "raw", "-o", "cluster_size=4k", "-t", "unsafe", &source, &target]).ok();
    let mut numbers: Vec<u32> = (0..35).flat_map(|number| [number; 3]).collect();
    for at in (1..numbers.len()).rev() {
        numbers.swap(at, random.below(at as u64 + 1) as usize);
    }
    let raw = disk(&[&kept[..], &numbers].concat());
    fs::write(&source, &raw).unwrap();
    let empty = home.path().join("empty.qcow2");
    fs::copy(&target, &empty).unwrap();
    for memory in ["1M", "1G"] {
        fs::copy(&empty, &target).unwrap();
        let summary = into(&["--memory", memory], "raw", &source, &target);
        assert!(layers(&target)[0].1[..raw.len()] == raw, "{summary:#}");
        qemu::check_clean(&target);
        dedup_img(args!["check", "--data", &target]).ok();
        // Contents that only collide with an unchanged one may be stored again, but each once.
        let names = Survey::of(&target);
        let contents: BTreeSet<_> = names.contents(names.stored.keys().copied()).into_values().collect();
        assert_eq!(contents.len(), 35);
        assert!(names.stored.len() <= 35 + 9, "{} clusters for 35 contents: {summary:#}", names.stored.len());
        assert!(names.stored.values().all(|stored| stored.references < K));
    }
}
