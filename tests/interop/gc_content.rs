//! I1, I2 and I5 of `gc`: whatever the image, its content stays, it is clean, nothing unused is left, a second run has nothing to
//! do, and the same input gives the same bytes.

use super::dedup_content::{copied, extensions, same, same_content, shown, state, strange, told};
use crate::args;
use crate::support::corpus::{K, M, Sample, patch};
use crate::support::inplace::{Left, verify_repaired};
use crate::support::reader::{Image, Survey};
use crate::support::root_disk::root_disk;
use crate::support::subjects::{deduplicated, foreign, subject, subjects};
use crate::support::{Random, dedup_img, families, needs_repair, qemu, scratch, sha256_of};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

/// Figures that a dry run tells as well.
const FORETOLD: [&str; 11] = [
    "cluster_size_bytes",
    "leaked_clusters",
    "garbage_members",
    "unpooled_members",
    "pool_members",
    "directory_rebuilt",
    "pool_dropped",
    "freed_clusters",
    "freed_bytes",
    "changed",
    "file_length_before_bytes",
];

/// The arguments of `gc` with further options.
fn words(path: &Path, options: &[&str]) -> Vec<OsString> {
    let words = args!["gc", "-f", "qcow2", "--output", "json"].into_iter();
    words.chain(options.iter().map(OsString::from)).chain(args![path]).collect()
}

/// Collects and returns the summary.
#[track_caller]
pub(super) fn gc(path: &Path, options: &[&str]) -> Value {
    let ran = dedup_img(words(path, options)).ok();
    assert_eq!(ran.stderr, "", "{}", ran.told());
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()))
}

/// Runs `--dry-run` on a file that may not be written, which stays as it is.
#[track_caller]
fn foretold(path: &Path, options: &[&str]) -> Value {
    let (before, rights) = (state(path), path.metadata().unwrap().permissions());
    let mut closed = rights.clone();
    closed.set_readonly(true);
    fs::set_permissions(path, closed).unwrap();
    let summary = gc(path, &[options, &["--dry-run"]].concat());
    fs::set_permissions(path, rights).unwrap();
    assert_eq!(state(path), before, "{} was touched", path.display());
    assert_eq!(summary["dry_run"], true, "{summary:#}");
    summary
}

/// What each layer holds at each guest cluster, the VM states of snapshots included, and what else is the user's.
type Held = (Vec<BTreeMap<u64, Option<[u8; 32]>>>, Vec<String>, Vec<String>, Value, Vec<(u32, Vec<u8>)>);

fn held(path: &Path) -> Held {
    let survey = Survey::without_pool(path);
    let names = survey.contents(survey.stored.keys().copied());
    let layer = |map: &BTreeMap<u64, u64>| map.iter().map(|(guest, word)| (*guest, names[word])).collect();
    let bitmaps = survey.bitmaps.iter().map(|bitmap| format!("{bitmap:?}")).collect();
    let layers = survey.layers.iter().map(|each| layer(&each.map)).collect();
    let unknown = extensions(path).into_iter().filter(|(kind, _)| *kind != 0x2385_2875).collect();
    (layers, survey.snapshots, bitmaps, shown(path), unknown)
}

/// Where qemu-img finds the end of what is used.
fn image_end(path: &Path) -> u64 {
    let ran = qemu::img(args!["check", "-f", "qcow2", "--output=json", path]).ok();
    told(&serde_json::from_str(&ran.stdout).unwrap(), "image-end-offset")
}

/// Collects, and demands that what `--dry-run` foretold comes true, that all that is the user's stays, that the image is sound, that
/// other threads and memory give the same bytes, and that a second run has nothing to do. Returns the summary.
#[track_caller]
pub(super) fn judged(path: &Path, options: &[&str]) -> Value {
    let what = format!("{options:?}, {}", path.display());
    let plan = foretold(path, options);
    let (before, was) = (held(path), state(path));
    let others = [&["--threads", "1"][..], &["--threads", "4", "--memory", "1M"]].map(|means| {
        let other = path.with_file_name("other.qcow2");
        fs::copy(path, &other).unwrap();
        gc(&other, &[options, means].concat());
        sha256_of(&other)
    });
    let summary = gc(path, options);
    for key in FORETOLD {
        assert_eq!(summary[key], plan[key], "{key}, {what}: foretold {plan:#}, done {summary:#}");
    }
    let length = path.metadata().unwrap().len();
    assert_eq!(told(&summary, "file_length_after_bytes"), length, "{summary:#}");
    assert_eq!(told(&summary, "freed_bytes"), told(&summary, "freed_clusters") * told(&summary, "cluster_size_bytes"));
    let promised = told(&plan, "file_length_after_bytes");
    // Compressed data is packed tighter where it goes, and QEMU lets a file end within its last cluster.
    let slack = length / 100 + 64 * K + told(&summary, "cluster_size_bytes");
    let close = promised.abs_diff(length) <= slack || promised > length && is_packed(path);
    assert!(close, "{what}: {promised} bytes promised, {length} came of it");
    qemu::check_clean(path);
    dedup_img(args!["check", "--data", path]).ok();
    let gone = options.contains(&"--drop-pool");
    verify_repaired(path, if gone { Left::Nothing } else { Left::Whole });
    let after = held(path);
    for (n, (old, new)) in before.0.iter().zip(&after.0).enumerate() {
        assert!(old == new, "layer {n} of {what}");
    }
    assert!(before == after, "{what}: {:#?}\n{:#?}", &before.1, &after.1);
    let now = state(path);
    assert_eq!(others, [now.0.clone(), now.0.clone()], "other threads or memory give other bytes, {what}");
    assert_eq!(now == was, summary["changed"] == false, "{what}: {summary:#}");
    if options.contains(&"--compact") {
        is_compact(path, &what);
    }
    let again = gc(path, options);
    assert_eq!(again["changed"], false, "{what}: {again:#}");
    assert_eq!(state(path), now, "a second run has touched it, {what}: {again:#}");
    summary
}

/// Whether there is compressed data.
fn is_packed(path: &Path) -> bool {
    Survey::without_pool(path).stored.keys().any(|word| word >> 62 & 1 == 1)
}

/// The file ends with what is used, and nothing in it is free but here and there a cluster.
#[track_caller]
fn is_compact(path: &Path, what: &str) {
    let (image, end) = (Image::open(path), image_end(path));
    // QEMU lets a file end within its last cluster.
    assert!(image.length <= end && end - image.length < image.cluster_size(), "{what}: {end}, not {}", image.length);
    let clusters = image.length.div_ceil(image.cluster_size()) as usize;
    let free = image.refcounts().iter().take(clusters).filter(|count| **count == 0).count();
    assert!(free <= clusters / 100 + 2, "{what}: {free} of {clusters} clusters are free");
}

/// Lets a guest discard, and fill with zeros, every other piece of the disk.
fn make_holes(path: &Path) {
    let (size, cluster) = (qemu::virtual_size("qcow2", path), Image::open(path).cluster_size());
    let piece = cluster.max(64 * K);
    let mut words = args!["-t", "unsafe", "-f", "qcow2", "-d", "unmap"].to_vec();
    for (n, at) in (0..size.saturating_sub(piece).min(9 * M)).step_by(2 * piece as usize).enumerate() {
        let command = ["discard", "write -z -u", "discard"][n % 3];
        words.extend(args!["-c", format!("{command} {at} {piece}")]);
    }
    words.push(path.into());
    let ran = qemu::run("qemu-io", words).ok();
    assert!(!ran.text().contains("rror"), "{}", ran.told());
}

/// All that holds of every image, as it is and with holes in it.
#[track_caller]
fn holds(image: &Path) -> bool {
    println!("{}", image.display());
    let (_home, path) = copied(image);
    let mended = needs_repair(image);
    let refused = !mended && dedup_img(args!["check", "-f", "qcow2", image]).code == 2;
    if mended {
        let ran = dedup_img(words(&path, &[]));
        assert!(ran.code == 0 && ran.stderr.contains("was not closed cleanly"), "{}", ran.told());
        qemu::check_clean(&path);
        same_content(image, &path);
    }
    if refused {
        let before = state(&path);
        for options in [&[][..], &["--compact"], &["--dry-run"], &["--drop-pool"]] {
            dedup_img(words(&path, options)).refused(&["dedup-img check", path.file_name().unwrap().to_str().unwrap()]);
            assert_eq!(state(&path), before);
        }
    }
    let original = path.with_file_name("original");
    for holes in [false, true] {
        if holes {
            make_holes(&path);
        } else if refused {
            continue;
        }
        fs::copy(&path, &original).unwrap();
        for options in [&[][..], &["--compact"]] {
            judged(&path, options);
        }
        same_content(&original, &path);
    }
    !refused
}

/// Collects in each QCOW2 image of a family.
fn family_holds(samples: &[Sample]) {
    let images = samples.iter().filter(|sample| sample.format == "qcow2" && sample.snapshot.is_none());
    let done = images.filter(|sample| holds(&sample.path)).count();
    assert!(done > 1, "too few of the images were collected in");
}

#[test]
fn every_version_and_cluster_size_is_compacted() {
    family_holds(&families::versions());
}

#[test]
fn every_refcount_width_is_compacted() {
    family_holds(&families::widths());
}

#[test]
fn zero_clusters_keep_their_places() {
    family_holds(&families::zeros());
}

#[test]
fn compressed_clusters_are_compacted() {
    family_holds(&families::compressed());
}

#[test]
fn subclusters_are_compacted() {
    family_holds(&families::subclusters());
}

#[test]
fn snapshots_keep_their_content() {
    family_holds(&families::snapshots());
}

#[test]
fn bitmaps_and_unknown_extensions_stay() {
    family_holds(&families::odd_states());
}

#[test]
fn overlays_still_hide_what_is_below() {
    family_holds(&families::chains());
}

#[test]
fn every_subject_of_the_check_is_compacted() {
    let done = subjects().into_iter().filter(|(_, path)| holds(path)).count();
    assert_eq!(done, subjects().len());
}

/// VM states, extra data of snapshots that no QEMU knows, and unknown header extensions stay, byte for byte.
#[test]
fn vm_states_and_unknown_data_stay() {
    let home = scratch();
    let path = home.path().join("strange.qcow2");
    strange(&path);
    let table = |path: &Path| {
        let image = Image::open(path);
        let mut bytes = image.read(image.header.snapshots_offset, 2 * 88);
        [0, 88].iter().for_each(|entry| bytes[*entry..entry + 8].fill(0));
        bytes
    };
    let before = table(&path);
    assert!(holds(&path));
    assert!(table(&path) == before);
    make_holes(&path);
    let made = table(&path);
    judged(&path, &["--compact"]);
    assert!(table(&path) == made, "the snapshot table has changed");
    assert!(extensions(&path).contains(&(u32::from_be_bytes(*b"STRG"), b"hello world".to_vec())));
}

#[test]
fn foreign_and_damaged_images_are_refused_by_name() {
    let home = scratch();
    let refused = |path: &Path, options: &[&[&str]], why: &[&str]| {
        let before = state(path);
        for options in options {
            dedup_img(words(path, options)).refused(&[why, &[path.file_name().unwrap().to_str().unwrap()]].concat());
            assert_eq!(state(path), before, "{options:?}");
        }
    };
    let [(_, outside), (_, secret)] = foreign(home.path());
    refused(&outside, &[&[], &["--dry-run"], &["--compact"], &["--drop-pool"]], &["external data file"]);
    refused(&secret, &[&["--compact"], &["--compact", "--dry-run"]], &["encrypt"]);
    let path = home.path().join("corrupt.qcow2");
    fs::copy(subject("plain-4k"), &path).unwrap();
    patch(&path, 79, &[2]);
    refused(&path, &[&[], &["--compact"]], &["corrupt"]);
    patch(&path, 72, &[0x40]);
    refused(&path, &[&[], &["--compact"]], &["incompatible feature"]);
}

/// A guest's worth of unique writes, discards and zeros, as qemu-io commands; what is written comes from files in `home`.
fn guest(random: &mut Random, home: &Path, size: u64, operations: usize) -> Vec<String> {
    let mut commands = Vec::new();
    for _ in 0..operations {
        let length = [4 * K, 4 * K, 20 * K, 64 * K, 64 * K, 260 * K, M][random.below(7) as usize];
        let at = random.below((size - length) / (4 * K)) * 4 * K;
        let fresh = home.join(format!("fresh-{:x}", random.next()));
        commands.push(match random.below(8) {
            0 | 1 => format!("discard {at} {}", (4 * length).min(size - at)),
            2 => format!("write -z -u {at} {length}"),
            3 => format!("write -z {at} {}", 8 * K),
            4 => {
                fs::write(&fresh, random.bytes(1536)).unwrap();
                format!("write -s {} {} 1536", fresh.display(), at + 512)
            }
            _ => {
                fs::write(&fresh, random.bytes(length as usize)).unwrap();
                format!("write -s {} {at} {length}", fresh.display())
            }
        });
    }
    commands
}

/// A root file system that is converted, used, and made small again: as small as a new conversion of the same content.
#[test]
fn a_root_disk_that_was_used_becomes_as_small_as_a_fresh_one() {
    let home = scratch();
    let [shared, plain, fresh] = ["shared.qcow2", "plain.qcow2", "fresh.qcow2"].map(|name| home.path().join(name));
    let convert = |source: &Path, format: &str, target: &Path| {
        let words = args!["convert", "-q", "-f", format, "-t", "unsafe", "-o", "cluster_size=4k", source, target];
        dedup_img(words).ok();
    };
    convert(&root_disk(), "raw", &shared);
    qemu::convert("raw", &root_disk(), "qcow2", &plain, &["-o", "cluster_size=4k"]);
    let judge = |step: &str| {
        let ran = qemu::check(&shared);
        assert_eq!(ran.code, 0, "{step}: {}", ran.told());
        same(&plain, &shared, step);
        dedup_img(args!["check", "--data", shared]).ok();
    };
    let mut random = Random::new(23);
    // Whatever the disk holds, some members lose all their users.
    let survey = Survey::of(&shared);
    let pairs = survey.stored.values().filter(|stored| stored.guests.len() == 2).flat_map(|stored| &stored.guests);
    let mut last: Vec<String> = pairs.take(400).map(|guest| format!("discard {} 4k", guest * 4 * K)).collect();
    for (half, action) in [(0, "-c"), (1, "-d")] {
        let mut commands = guest(&mut random, home.path(), M << 10, 150);
        commands.append(&mut last);
        for path in [&shared, &plain] {
            let mut words = args!["-t", "unsafe", "-f", "qcow2", "-d", "unmap"].to_vec();
            commands.iter().for_each(|command| words.extend(args!["-c", command]));
            words.push(path.into());
            let ran = qemu::run("qemu-io", words).ok();
            assert!(!ran.text().contains("rror"), "{}", ran.told());
            qemu::snapshot(action, "mine", path).ok();
        }
        judge(&format!("used, half {half}"));
    }
    let first = gc(&shared, &[]);
    assert!(told(&first, "garbage_members") > 100 && told(&first, "unpooled_members") > 100, "{first:#}");
    judge("gc");
    let plan = foretold(&shared, &["--compact"]);
    let second = gc(&shared, &["--compact"]);
    judge("gc --compact");
    let length = shared.metadata().unwrap().len();
    assert!(told(&plan, "file_length_after_bytes").abs_diff(length) <= length / 100, "{plan:#} {second:#}");
    is_compact(&shared, "the root disk");
    convert(&plain, "qcow2", &fresh);
    let due = fresh.metadata().unwrap().len();
    assert!(length <= due + due / 100 + M, "{length} bytes, a fresh one has {due}: {second:#}");
    let done = state(&shared);
    assert_eq!(gc(&shared, &["--compact"])["changed"], false);
    assert_eq!(state(&shared), done);
}

/// `deduplicated` with a use of it, all sharers of some members and all but one of others written anew.
#[test]
fn pools_of_all_kinds_are_collected_and_compacted() {
    for more in [&[][..], &["--pin", "all"], &["-o", "cluster_size=4k,refcount_bits=16"]] {
        let home = scratch();
        let path = deduplicated(home.path(), "pool.qcow2", more);
        for (snapshot, commands) in [
            ("before", &["discard 0 100k", "write -P 3 400k 20k"][..]),
            ("between", &["discard 356k 100k", "write -P 4 200k 40k", "write -P 5 556k 12k"]),
            ("behind", &["discard 712k 120k"]),
        ] {
            let mut words = args!["-t", "unsafe", "-f", "qcow2", "-d", "unmap"].to_vec();
            commands.iter().for_each(|command| words.extend(args!["-c", command]));
            words.push((&path).into());
            qemu::run("qemu-io", words).ok();
            judged(&path, &[]);
            judged(&path, &["--compact"]);
            qemu::snapshot("-c", snapshot, &path).ok();
        }
        qemu::snapshot("-d", "before", &path).ok();
        qemu::snapshot("-d", "between", &path).ok();
        let original = home.path().join("original.qcow2");
        fs::copy(&path, &original).unwrap();
        judged(&path, &["--compact"]);
        same_content(&original, &path);
        judged(&path, &["--drop-pool", "--compact"]);
        same_content(&original, &path);
    }
}

/// Compressed data moves only to where a descriptor can say how long it is (with 512-byte clusters it has one bit for the second
/// sector, and data of up to 511 bytes can touch three), and where narrow refcounts have room for all that shares a cluster.
#[test]
fn compressed_data_goes_where_descriptors_and_refcounts_can_follow() {
    let home = scratch();
    for (options, cluster) in [
        ("cluster_size=512", 512),
        ("cluster_size=512,compression_type=zstd", 512),
        ("cluster_size=1k", 1024),
        ("cluster_size=4k,refcount_bits=1", 4096),
        ("cluster_size=4k,refcount_bits=2", 4096),
        ("cluster_size=4k,refcount_bits=4", 4096),
    ] {
        // Each cluster becomes a little smaller, or much.
        let mut random = Random::new(511);
        let mut content = random.bytes(2 << 20);
        for (n, cluster) in content.chunks_mut(cluster).enumerate() {
            let (len, kept) = (cluster.len(), [cluster.len() - n % 20, 20][n % 3 % 2]);
            cluster[kept..len].fill(0);
        }
        let (raw, path) = (home.path().join("content.raw"), home.path().join("packed.qcow2"));
        fs::write(&raw, content).unwrap();
        qemu::img(args!["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, &raw, &path]).ok();
        assert!(is_packed(&path), "{options}");
        make_holes(&path);
        let original = home.path().join("original.qcow2");
        fs::copy(&path, &original).unwrap();
        let summary = judged(&path, &["--compact"]);
        assert!(told(&summary, "moved_clusters") > 10, "{options}: {summary:#}");
        same_content(&original, &path);
    }
}

/// The references to all compressed data in a cluster add up: after a compaction, too, there is room for those of a snapshot.
#[test]
fn compressed_data_that_moves_together_leaves_room_for_snapshots() {
    let home = scratch();
    let (raw, path) = (home.path().join("content.raw"), home.path().join("packed.qcow2"));
    let mut random = Random::new(8);
    let mut packable = |len: usize| [random.bytes(len), vec![0; 4096 - len]].concat();
    let mut content: Vec<u8> = (0..256).flat_map(|_| packable(3000)).collect();
    (0..3).for_each(|_| content.extend(packable(300).repeat(60)));
    fs::write(&raw, content).unwrap();
    let options = "cluster_size=4k,refcount_bits=8";
    dedup_img(args!["convert", "-q", "-c", "-f", "raw", "-o", options, raw, path]).ok();
    let commands = args!["-t", "unsafe", "-f", "qcow2", "-d", "unmap", "-c", "discard 0 1M", path];
    qemu::run("qemu-io", commands).ok();
    assert!(told(&judged(&path, &["--compact"]), "moved_clusters") > 0);
    qemu::snapshot("-c", "room", &path).ok();
    qemu::check_clean(&path);
}
