//! I1, I2 and I5 of `dedup`: whatever the image, its content stays, it is clean, nothing is stored twice, and the same input gives
//! the same bytes.

pub(super) use super::dedup_judge::{copied, dedup, extensions, judged, same, same_content, shown, state, told};

use super::dedup_judge::words;
use crate::args;
use crate::support::corpus::{K, M, Sample, patch};
use crate::support::reader::{Image, Pin, Survey, number, verify_dedup};
use crate::support::root_disk::root_disk;
use crate::support::subjects::{foreign, subject, subjects};
use crate::support::{Ran, cached, dedup_img, families, needs_repair, qemu, scratch, sha256_of};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Why `dedup` refuses an image, if it does.
fn refusal(image: &Path) -> Option<Vec<&'static str>> {
    let header = Image::open(image).header;
    if header.incompatible & 16 != 0 {
        Some(vec!["subclusters", "extended_l2"])
    } else if header.refcount_order < 2 {
        Some(vec!["refcount_bits", "qemu-img amend", "refcount_bits=16"])
    } else if dedup_img(args!["check", "-f", "qcow2", image]).code == 2 {
        Some(vec!["dedup-img check"])
    } else {
        None
    }
}

/// Asserts that `dedup` refuses an image with all the words, really run or not, and leaves it as it is.
#[track_caller]
fn refused(path: &Path, why: &[&str]) {
    let before = state(path);
    for options in [&[][..], &["--dry-run"], &["--pin", "all"]] {
        let ran: Ran = dedup_img(words(path, options)).refused(why);
        assert!(ran.stderr.contains(path.file_name().unwrap().to_str().unwrap()), "{}", ran.told());
        assert_eq!(state(path), before, "{} was touched: {}", path.display(), ran.told());
    }
}

/// All that holds of every image: I1, I2, I5, nothing but duplicates has gone, and doing it again does nothing.
#[track_caller]
fn holds(image: &Path) -> Option<Survey> {
    println!("{}", image.display());
    let (home, path) = copied(image);
    if needs_repair(image) {
        let ran = dedup_img(words(&path, &[]));
        assert!(ran.code == 0 && ran.stderr.contains("was not closed cleanly"), "{}", ran.told());
        qemu::check_clean(&path);
        qemu::compare_same("qcow2", image, "qcow2", &path);
        return None;
    }
    if let Some(why) = refusal(image) {
        refused(&path, &why);
        return None;
    }
    let (shown_before, extensions_before) = (shown(&path), extensions(&path));
    let (summary, _, after) = judged(&path, Pin::Shared, &[]);
    let original = path.with_file_name("original");
    fs::copy(image, &original).unwrap();
    same_content(&original, &path);
    assert_eq!(shown(&path), shown_before, "{}", image.display());
    assert_eq!(extensions(&path), extensions_before, "{}", image.display());

    let done = state(&path);
    let again = dedup(&path, &[]);
    assert_eq!(again["changed"], false, "{again:#}");
    assert_eq!(state(&path), done, "the second run has touched it: {again:#}");
    if summary["changed"] == false {
        assert_eq!(done.0, sha256_of(image), "nothing was to do, and yet it was done: {summary:#}");
    }
    for options in [&["--threads", "1"][..], &["--threads", "4", "--memory", "1M"]] {
        let other = path.with_file_name("other");
        fs::copy(image, &other).unwrap();
        dedup(&other, options);
        assert_eq!(sha256_of(&other), done.0, "{options:?} give other bytes");
    }
    let converted = home.path().join("converted");
    let single = after.layers.len() == 1 && qemu::info("qcow2", image).get("backing-filename").is_none();
    if single {
        let options = format!("cluster_size={},refcount_bits={}", after.cluster_size, after.refcount_bits);
        dedup_img(args!["convert", "-q", "-f", "qcow2", "-t", "unsafe", "-o", options, image, converted]).ok();
        let due = verify_dedup(&converted, Pin::Shared);
        assert_eq!(after.stored.len() as u64, due.data_clusters(), "`convert` stores so many clusters at {options}");
        assert_eq!(after.kept_zeros, 0, "zeros keep no place");
    }
    Some(after)
}

/// Deduplicates each QCOW2 image of a family; at least one of them must not be refused.
fn family_holds(samples: &[Sample]) {
    let images = samples.iter().filter(|sample| sample.format == "qcow2" && sample.snapshot.is_none());
    let done = images.filter_map(|sample| holds(&sample.path)).count();
    assert!(done > 1, "too few of the images were deduplicated");
}

#[test]
fn every_version_and_cluster_size_is_deduplicated() {
    family_holds(&families::versions());
}

#[test]
fn every_refcount_width_is_deduplicated_or_refused_by_name() {
    family_holds(&families::widths());
}

#[test]
fn zero_clusters_take_no_room_any_more() {
    family_holds(&families::zeros());
}

#[test]
fn compressed_clusters_take_part_with_their_content() {
    family_holds(&families::compressed());
}

#[test]
fn subclusters_are_refused_by_name() {
    let images = families::subclusters().into_iter().filter(|sample| sample.format == "qcow2");
    let done = images.filter(|sample| holds(&sample.path).is_some()).count();
    assert_eq!(done, 1, "their base has none");
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
fn every_subject_of_the_check_is_deduplicated_or_refused_by_name() {
    let done = subjects().into_iter().filter(|(_, path)| holds(path).is_some()).count();
    assert!(done > 14, "{done} subjects were deduplicated");
}

#[test]
fn foreign_and_damaged_images_are_refused_by_name() {
    let home = scratch();
    for ((_, path), why) in foreign(home.path()).into_iter().zip(["external data file", "encrypt"]) {
        refused(&path, &[why]);
    }
    let path = home.path().join("corrupt.qcow2");
    fs::copy(subject("plain-4k"), &path).unwrap();
    patch(&path, 79, &[2]);
    refused(&path, &["corrupt"]);
    patch(&path, 72, &[0x40]);
    refused(&path, &["incompatible feature"]);
}

/// A file may end anywhere: behind a part of a free cluster, as where QEMU has moved a bitmap directory, or within its last one.
#[test]
fn a_file_that_ends_within_a_cluster_is_deduplicated() {
    for name in ["plain-4k", "version-2", "snapshots-64k", "bitmaps", "bits-8"] {
        for part in [32, 4095] {
            let (home, path) = copied(&subject(name));
            let length = path.metadata().unwrap().len();
            patch(&path, length, &vec![0xaa; part]);
            let original = home.path().join("original");
            fs::copy(&path, &original).unwrap();
            println!("{name} and {part} bytes");
            judged(&path, Pin::Shared, &[]);
            same_content(&original, &path);
            judged(&path, Pin::All, &["--pin", "all"]);
            same_content(&original, &path);
        }
    }
    let home = scratch();
    let [path, original] = ["image.qcow2", "original"].map(|name| home.path().join(name));
    qemu::create("qcow2", &path, 4 * M, "cluster_size=4k");
    let commands = ["write -P 1 0 64k", "write -P 2 1M 12k", "write -P 1 2M 500"];
    qemu::io("qcow2", &path, &commands.map(String::from));
    let length = path.metadata().unwrap().len();
    fs::File::options().write(true).open(&path).unwrap().set_len(length - 3000).unwrap();
    qemu::check_clean(&path);
    fs::copy(&path, &original).unwrap();
    judged(&path, Pin::Shared, &[]);
    same_content(&original, &path);
}

/// The root disk as qemu-img converts it, kept.
fn root_image(size: &str) -> PathBuf {
    cached(&format!("root-2-{size}.qcow2"), |path| {
        let options = format!("cluster_size={size}");
        qemu::convert("raw", &root_disk(), "qcow2", path, &["-o", &options]);
    })
}

/// A root file system: what `convert` saves is saved in place, and the space goes back to the file system at once.
fn root_disk_holds(size: &str) -> u64 {
    let image = root_image(size);
    let after = holds(&image).unwrap();
    let (_home, path) = copied(&image);
    let allocated = |path: &Path| path.metadata().unwrap().blocks() * 512;
    let before = allocated(&path);
    let summary = dedup(&path, &[]);
    let freed = told(&summary, "freed_bytes");
    let pool = after.members().len() as u64 * 48;
    let shrunk = before.saturating_sub(allocated(&path));
    // What the file system needs to know of the holes counts as well.
    let least = freed.saturating_sub(pool + pool / 8 + freed / 50 + M);
    assert!(
        (least..=freed + M).contains(&shrunk),
        "{shrunk} bytes less on disk, {least} to {freed} are due: {summary:#}"
    );
    let close = |key: &str, due: u64| assert!(told(&summary, key).abs_diff(due) <= M, "{key} {due}: {summary:#}");
    close("allocated_before_bytes", before);
    close("allocated_after_bytes", allocated(&path));
    qemu::compare_same("raw", &root_disk(), "qcow2", &path);
    freed
}

#[test]
fn a_root_disk_of_4k_clusters_shares_its_duplicates_and_gives_back_their_space() {
    let freed = root_disk_holds("4k");
    assert!(freed > 40 * M, "the second copy is still stored: {freed} bytes freed");
}

#[test]
fn a_root_disk_of_64k_clusters_is_deduplicated() {
    root_disk_holds("64k");
}

/// An image with two snapshots whose entries in the table have more extra data than any QEMU knows, and an unknown header extension.
/// The second snapshot has a VM state.
pub(super) fn strange(path: &Path) {
    // At 4 KiB an L1 entry covers 2 MiB.
    qemu::create("qcow2", path, 4 * M, "cluster_size=4k");
    let commands = ["write -P 1 0 64k", "write -P 2 2M 256k", "write -P 3 2304k 64k", "write -z 2400k 12k"];
    qemu::io("qcow2", path, &commands.map(String::from));
    for name in ["one", "two"] {
        qemu::snapshot("-c", name, path).ok();
        qemu::io("qcow2", path, &["write -P 7 32k 2M".into()]);
    }
    let image = Image::open(path);
    let at = image.header.snapshots_offset;
    let mut table = Vec::new();
    let mut from = at;
    for n in 1..=2 {
        let old = image.read(from, 40 + 24 + 4);
        let mut entry = old[..64].to_vec();
        entry[36..40].copy_from_slice(&40_u32.to_be_bytes());
        if n == 2 {
            // Its disk ends where its second L2 table begins, which holds a MiB of VM state for that reason.
            entry[32..36].copy_from_slice(&(1_u32 << 20).to_be_bytes());
            entry[40..48].copy_from_slice(&M.to_be_bytes());
            entry[48..56].copy_from_slice(&(2 * M).to_be_bytes());
        }
        entry.extend([0xa0 + n; 16]);
        entry.extend(&old[64..]);
        entry.resize(entry.len().next_multiple_of(8), 0);
        table.extend(entry);
        from += 72;
    }
    patch(path, at, &table);
    // At this cluster size QEMU writes no extension of its own, and zeros follow the header.
    assert_eq!(image.extensions(), []);
    patch(path, image.header.header_length.into(), b"STRG\0\0\0\x0bhello world");
}

/// What is the user's and strange stays, byte for byte: unknown extra data of snapshots, unknown header extensions, VM states.
#[test]
fn vm_states_and_unknown_data_stay() {
    let home = scratch();
    let path = home.path().join("strange.qcow2");
    strange(&path);
    qemu::check_clean(&path);
    let listed = qemu::img(args!["snapshot", "-l", path]).ok();
    assert!(listed.stdout.contains("1 MiB"), "qemu-img sees no VM state: {}", listed.told());
    let table = |path: &Path| {
        let image = Image::open(path);
        image.read(image.header.snapshots_offset, 2 * 88)
    };
    let (before, content) = (table(&path), vm_state(&path));
    assert!(content.iter().filter(|name| name.is_some()).count() > 64, "no VM state was read");
    holds(&path).unwrap();
    dedup(&path, &[]);
    let mut after = table(&path);
    for entry in [0, 88] {
        after[entry..entry + 8].copy_from_slice(&before[entry..entry + 8]);
    }
    assert!(after == before, "the snapshot table has changed");
    assert!(vm_state(&path) == content, "the VM state has changed");
    assert!(extensions(&path).contains(&(u32::from_be_bytes(*b"STRG"), b"hello world".to_vec())));
    let clusters = number(&before, 88 + 40, 8) / 4096;
    assert_eq!(clusters, 256);
}

/// The names of all clusters of the second snapshot's VM state.
fn vm_state(path: &Path) -> Vec<Option<[u8; 32]>> {
    let survey = Survey::of(path);
    let map = &survey.layers[2].map;
    let names = survey.contents(map.values().copied());
    (2 * M / (4 * K)..3 * M / (4 * K)).map(|guest| map.get(&guest).and_then(|word| names[word])).collect()
}
