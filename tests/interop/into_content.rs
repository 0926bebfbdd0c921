//! `convert -n`: whatever the target and the source are, the disk reads the source afterwards and snapshots what they did, only what
//! is new is written, and a second time nothing is.

use super::dedup_content::copied;
use crate::args;
use crate::support::corpus::{K, M, Sample, patch, write_sparse};
use crate::support::inplace::Subject;
use crate::support::into::{Before, Mixer, into, judged, layers, pooled, words};
use crate::support::reader::{Image, Pin, Survey};
use crate::support::subjects::subjects;
use crate::support::{Random, dedup_img, families, needs_repair, qemu, scratch, sha256_of};
use std::fs;
use std::path::Path;

/// Where a source ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Where the target does.
    Same,
    /// Before, with a cluster.
    Cluster,
    /// Before, within a cluster.
    Within,
    /// Before, within a sector.
    Sector,
}

/// Why `convert -n` refuses a target, if it does.
fn refusal(image: &Path) -> Option<&'static str> {
    let header = Image::open(image).header;
    let info = qemu::info("qcow2", image);
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    if header.incompatible & 16 != 0 {
        Some("extended_l2")
    } else if header.refcount_order < 2 {
        Some("refcount_bits")
    } else if dedup_img(args!["check", "-f", "qcow2", image]).code == 2 {
        Some("dedup-img check")
    } else {
        bitmaps.iter().any(|bitmap| bitmap["flags"].to_string().contains("auto")).then_some("records writes")
    }
}

/// A mixture of what the target at `path` holds and of what is new, as bytes and as the file `source`, of which it returns the format.
fn mixture(path: &Path, seed: u64, end: End, source: &Path) -> (Vec<u8>, &'static str) {
    let image = Image::open(path);
    let grain = image.cluster_size();
    let (old, pool) = (layers(path), if Survey::without_pool(path).pool.is_none() { Vec::new() } else { pooled(path) });
    let disks: Vec<&[u8]> = old.iter().map(|(_, disk)| &disk[..]).collect();
    let mut mixer = Mixer::new(seed, grain, &disks, &pool);
    let mut raw = mixer.changed(disks[0], 3, 24);
    let clusters = raw.len() as u64 / grain;
    let part = mixer.random.below(clusters.max(1)) * grain;
    let length = match end {
        End::Same => raw.len() as u64,
        End::Cluster => part,
        End::Within => part + (1 + mixer.random.below(grain / 512)) * 512,
        End::Sector => part + 1 + mixer.random.below(grain - 1),
    };
    raw.truncate(length as usize);
    write_sparse(source, &raw);
    if end == End::Sector || seed.is_multiple_of(2) || raw.is_empty() {
        return (raw, "raw");
    }
    let other = source.with_extension("qcow2");
    let options = ["cluster_size=2k", "cluster_size=64k", "compat=0.10"][(seed / 2 % 3) as usize];
    qemu::convert("raw", source, "qcow2", &other, &["-o", options]);
    fs::rename(other, source).unwrap();
    (raw, "qcow2")
}

/// Writes a mixture into a copy of `image`, which must be refused or done right; says which.
#[track_caller]
fn holds(image: &Path, seed: u64, end: End) -> bool {
    println!("{}, seed {seed}, {end:?}", image.display());
    let (home, path) = copied(image);
    let source = home.path().join("the source");
    if needs_repair(image) {
        write_sparse(&source, &[]);
        let ran = dedup_img(words(&[], "raw", &source, &path));
        assert!(ran.code == 0 && ran.stderr.contains("was not closed cleanly"), "{}", ran.told());
        qemu::check_clean(&path);
        qemu::compare_same("qcow2", image, "qcow2", &path);
    } else if let Some(why) = refusal(image) {
        write_sparse(&source, &[]);
        let before = sha256_of(&path);
        dedup_img(words(&[], "raw", &source, &path)).refused(&[why, path.to_str().unwrap()]);
        assert_eq!(sha256_of(&path), before);
        return false;
    }
    let (raw, format) = mixture(&path, seed, end, &source);
    judged(&path, format, &source, &raw, Before::Sound, if seed % 3 == 2 { Pin::All } else { Pin::Shared });
    true
}

/// The same for each QCOW2 image of a family; at least so many of them must not be refused.
fn family_holds(samples: &[Sample], least: usize) {
    let ends = [End::Same, End::Within, End::Sector, End::Cluster];
    let images = samples.iter().filter(|sample| sample.format == "qcow2" && sample.snapshot.is_none());
    let done = images.enumerate().filter(|(n, sample)| holds(&sample.path, *n as u64, ends[n % 4])).count();
    assert!(done >= least, "{done} images were written, {least} are expected");
}

#[test]
fn every_version_and_cluster_size_takes_a_disk() {
    family_holds(&families::versions(), 11);
}

#[test]
fn every_refcount_width_takes_a_disk_or_is_refused_by_name() {
    family_holds(&families::widths(), 4);
}

#[test]
fn zero_clusters_and_preallocated_ones_take_a_disk() {
    family_holds(&families::zeros(), 5);
}

#[test]
fn compressed_clusters_stay_and_are_shared() {
    family_holds(&families::compressed(), 8);
}

#[test]
fn subclusters_are_refused() {
    family_holds(&families::subclusters(), 1);
}

#[test]
fn snapshots_stay_as_they_are() {
    family_holds(&families::snapshots(), 2);
}

#[test]
fn bitmaps_unknown_bits_and_images_whose_writer_was_killed_take_a_disk_or_are_refused() {
    family_holds(&families::odd_states(), 2);
}

#[test]
fn overlays_are_compared_with_what_they_read() {
    family_holds(&families::chains(), 7);
}

#[test]
fn every_small_subject_of_the_check_takes_a_disk_or_is_refused() {
    let small = |path: &Path| qemu::virtual_size("qcow2", path) <= 8 * M;
    let images = subjects().into_iter().filter(|(_, path)| small(path)).enumerate();
    let done = images.filter(|(n, (_, path))| holds(path, *n as u64, [End::Same, End::Within][n % 2])).count();
    assert!(done >= 12, "{done} images were written");
}

/// Writes mixtures into an image of a kind, one that ends as each of `ends`, and one more into what came of that.
#[track_caller]
fn kind_holds(subject: &Subject, ends: &[End], before: Before, pin: Pin) {
    let source = subject.home.path().join("source");
    let path = subject.home.path().join("target.qcow2");
    for (n, end) in ends.iter().enumerate() {
        fs::copy(&subject.path, &path).unwrap();
        for (again, before) in
            [before, if before == Before::Stale { Before::Sound } else { before }].into_iter().enumerate()
        {
            println!("{}, {end:?}, {again}", subject.kind);
            let (raw, format) = match before {
                Before::Stale => {
                    // The reader would not read such a pool.
                    let disk = &layers(&path)[0].1;
                    let raw = Mixer::new(n as u64, 4096, &[disk], &[]).changed(disk, 3, 24);
                    fs::write(&source, &raw).unwrap();
                    (raw, "raw")
                }
                _ => mixture(&path, (10 * again + n) as u64, *end, &source),
            };
            judged(&path, format, &source, &raw, before, pin);
        }
    }
}

#[test]
fn plain_images_with_kept_zeros_and_holes_take_disks() {
    kind_holds(
        &Subject::new("plain"),
        &[End::Same, End::Cluster, End::Within, End::Sector],
        Before::Sound,
        Pin::Shared,
    );
    kind_holds(&Subject::new("pinned"), &[End::Same], Before::Sound, Pin::All);
    kind_holds(&Subject::new("leaks"), &[End::Same], Before::Sound, Pin::Shared);
}

#[test]
fn images_with_snapshots_take_disks() {
    for (kind, end) in [("snapshots", End::Within), ("frozen", End::Same), ("version 2, snapshots", End::Within)] {
        kind_holds(&Subject::new(kind), &[end], Before::Sound, Pin::Shared);
    }
}

#[test]
fn images_with_a_pool_take_disks() {
    kind_holds(&Subject::new("pool"), &[End::Within], Before::Sound, Pin::Shared);
    for kind in ["garbage", "garbage, snapshots", "compressed pool", "pool"] {
        kind_holds(&Subject::to_collect(kind), &[End::Same], Before::Sound, Pin::Shared);
    }
    kind_holds(&Subject::to_collect("stale directory"), &[End::Same], Before::Stale, Pin::Shared);
    let dropped = Subject::to_collect("dropped pool");
    qemu::snapshot("-d", "dedup-pool", &dropped.path).ok();
    qemu::img(args!["check", "-q", "-r", "all", &dropped.path]);
    kind_holds(&dropped, &[End::Same], Before::Unpooled, Pin::Shared);
}

#[test]
fn odd_images_take_disks() {
    let kinds = ["growing", "64 bits", "4 bits", "version 2", "version 2, backing", "backing"];
    for (kind, end) in kinds.into_iter().zip([End::Same, End::Within].into_iter().cycle()) {
        kind_holds(&Subject::new(kind), &[end], Before::Sound, Pin::Shared);
    }
    for kind in ["amended", "in the way", "VM state"] {
        kind_holds(&Subject::to_collect(kind), &[End::Same], Before::Sound, Pin::Shared);
    }
    let bitmaps = Subject::new("bitmaps and snapshots");
    qemu::img(args!["bitmap", "--disable", &bitmaps.path, "one"]).ok();
    kind_holds(&bitmaps, &[End::Same], Before::Sound, Pin::Shared);
}

/// A dirty bit alone says that refcounts may be wrong: where they are right the image is taken, and clean afterwards.
#[test]
fn a_dirty_image_takes_a_disk() {
    let subject = Subject::new("snapshots");
    patch(&subject.path, 79, &[1]);
    let source = subject.home.path().join("source");
    let (raw, _) = mixture(&subject.path, 0, End::Same, &source);
    judged(&subject.path, "raw", &source, &raw, Before::Sound, Pin::Shared);
    assert_eq!(Image::open(&subject.path).header.incompatible, 0);
}

/// A cluster in which the disk ends may hold anything behind that end, where no guest sees it: what only reads as it up to there is
/// not the same.
#[test]
fn what_lies_behind_the_end_of_the_disk_is_no_content() {
    let home = scratch();
    let [target, source] = ["target.qcow2", "source.raw"].map(|name| home.path().join(name));
    for (options, packed) in [("cluster_size=4k", ""), ("cluster_size=4k,compat=0.10", ""), ("cluster_size=4k", "-c")] {
        qemu::create("qcow2", &target, 64 * K, options);
        let tail = home.path().join("tail");
        fs::write(&tail, [[5; 512].to_vec(), vec![6; 3584]].concat()).unwrap();
        qemu::io("qcow2", &target, &[format!("write {packed} -s {} 40k 4k", tail.display()), "write -P 1 0 8k".into()]);
        qemu::img(args!["resize", "-q", "-f", "qcow2", "--shrink", &target, (40 * K + 512).to_string()]).ok();
        let mut raw = layers(&target)[0].1.clone();
        assert_eq!(raw.len() as u64, 40 * K + 512);
        // The same, filled up with zeros, elsewhere and twice.
        for at in [8 << 10, 20 << 10] {
            raw[at..at + 512].fill(5);
        }
        fs::write(&source, &raw).unwrap();
        println!("{options} {packed}");
        let old = Survey::of(&target);
        into(&[], "raw", &source, &target);
        assert!(layers(&target)[0].1 == raw, "{options} {packed}: the disk reads what lay behind its end");
        qemu::check_clean(&target);
        assert_eq!(old.layers[0].map[&10], Survey::of(&target).layers[0].map[&10], "what did not change has moved");
    }
}

/// What the image or its pool has is shared although the backing file has the same, from where nothing can be shared.
#[test]
fn what_the_image_has_is_found_though_its_backing_file_has_it_too() {
    let home = scratch();
    let [base, target, source] = ["base.raw", "target.qcow2", "source.raw"].map(|name| home.path().join(name));
    let mut random = Random::new(4);
    let [mine, pooled, other] = [(); 3].map(|()| random.bytes(4096));
    let zeros = vec![0; 4096];
    fs::write(&base, [&mine[..], &pooled, &other, &zeros, &zeros, &zeros, &zeros, &zeros].concat()).unwrap();
    qemu::create("qcow2", &target, 32 * K, &format!("cluster_size=4k,backing_file={},backing_fmt=raw", base.display()));
    // Twice, so that it enters the pool.
    let mut raw = [&mine[..], &pooled, &other, &mine, &pooled, &pooled, &zeros, &zeros].concat();
    fs::write(&source, &raw).unwrap();
    let first = judged(&target, "raw", &source, &raw, Before::Sound, Pin::Shared);
    assert_eq!(first["written_clusters"], 2, "{first:#}");
    // The pool alone has it now.
    raw[16 << 10..24 << 10].fill(0);
    fs::write(&source, &raw).unwrap();
    judged(&target, "raw", &source, &raw, Before::Sound, Pin::Shared);
    for content in [&pooled, &mine] {
        raw[24 << 10..28 << 10].copy_from_slice(content);
        fs::write(&source, &raw).unwrap();
        let again = judged(&target, "raw", &source, &raw, Before::Sound, Pin::Shared);
        assert_eq!((&again["written_clusters"], &again["reused_clusters"]), (&0.into(), &1.into()), "{again:#}");
    }
}
