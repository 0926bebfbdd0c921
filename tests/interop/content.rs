//! Whatever the source, the deduplicated image has the same content and holds each distinct content once.

use crate::args;
use crate::support::corpus::{K, M, Sample};
use crate::support::families;
use crate::support::reader::{Facts, Pin, verify_dedup};
use crate::support::root_disk::root_disk;
use crate::support::{Ran, dedup_img, qemu, scratch};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The cluster sizes to convert at, as the user types them.
const SIZES: [&str; 7] = ["4k", "8k", "16k", "32k", "64k", "2M", "auto"];

/// What a raw content takes at one cluster size: clusters with data, and distinct contents, with one more copy of a content for
/// each `limit` times that it occurs. The last cluster is filled up with zeros. The clusters themselves are sorted and compared;
/// no hash could be wrong here.
pub(super) fn count(raw: &[u8], cluster_size: u64, limit: u64) -> (u64, u64) {
    let size = usize::try_from(cluster_size).unwrap();
    let zeros = vec![0; size];
    let mut last = raw.chunks_exact(size).remainder().to_vec();
    last.resize(size, 0);
    let mut clusters: Vec<&[u8]> =
        raw.chunks_exact(size).chain([&last[..]]).filter(|cluster| **cluster != zeros).collect();
    let data = clusters.len() as u64;
    clusters.sort_unstable();
    (data, clusters.chunk_by(|a, b| a == b).map(|equal| (equal.len() as u64).div_ceil(limit)).sum())
}

/// Converts a sample with more options and demands success.
fn convert(sample: &Sample, target: &Path, size: &str, more: &[&str]) -> Ran {
    let mut words = args!["convert", "-f", sample.format, "-o", format!("cluster_size={size}")].to_vec();
    if let Some(snapshot) = sample.snapshot {
        words.extend(args!["-l", snapshot]);
    }
    words.extend(more.iter().map(Into::into));
    words.extend(args!["--output", "json", &sample.path, target]);
    dedup_img(words).ok()
}

/// The target reads as the source, is clean, is what the design promises, and stores nothing twice.
#[track_caller]
fn judge(sample: &Sample, raw: &[u8], target: &Path, pin: Pin) -> Facts {
    qemu::check_clean(target);
    if sample.snapshot.is_some() {
        qemu::compare_same("raw", &sample.truth, "qcow2", target);
    } else {
        qemu::compare_same(sample.format, &sample.path, "qcow2", target);
    }
    let facts = verify_dedup(target, pin);
    let (data, distinct) = count(raw, facts.cluster_size, u64::MAX);
    assert_eq!(facts.virtual_size, (raw.len() as u64).next_multiple_of(512), "{}", sample.name);
    assert_eq!(facts.mapped, data, "{}: guest clusters with data at {}", sample.name, facts.cluster_size);
    assert_eq!(facts.data_clusters(), distinct, "{}: distinct contents at {}", sample.name, facts.cluster_size);
    assert_eq!(facts.zero_flagged, 0, "{}: zeros are unallocated where no backing file shows through", sample.name);
    assert_eq!((facts.retired, facts.refcount_bits), (0, 32), "{}", sample.name);
    facts
}

/// Converts each sample of a family at each cluster size.
fn family_converts(samples: &[Sample]) {
    let home = scratch();
    let target = home.path().join("out.qcow2");
    for sample in samples {
        let before = crate::support::sha256_of(&sample.path);
        let raw = fs::read(&sample.truth).unwrap();
        let mut lengths = BTreeMap::new();
        for size in SIZES {
            println!("{} at {size}", sample.name);
            let ran = convert(sample, &target, size, &["-t", "unsafe"]);
            let facts = judge(sample, &raw, &target, Pin::Shared);
            let told = judge_summary(&ran, &facts);
            match size.strip_suffix('k') {
                Some(number) => {
                    assert_eq!(facts.cluster_size, number.parse::<u64>().unwrap() * K);
                    lengths.insert(facts.cluster_size, facts.file_length);
                }
                None if size == "auto" => judge_choice(&told, &facts, &lengths),
                None => assert_eq!(facts.cluster_size, 2 * M),
            }
        }
        assert_eq!(crate::support::sha256_of(&sample.path), before, "{} was written to", sample.name);
    }
}

/// The summary says of the file what the reader finds in it, which was judged.
fn judge_summary(ran: &Ran, facts: &Facts) -> Value {
    let told: Value = serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()));
    let (data, distinct) = (facts.mapped, facts.data_clusters());
    for (key, due) in [
        ("virtual_size_bytes", facts.virtual_size),
        ("cluster_size_bytes", facts.cluster_size),
        ("data_clusters", data),
        ("stored_clusters", distinct),
        ("duplicate_clusters", data - distinct),
        ("saved_bytes", (data - distinct) * facts.cluster_size),
        ("shared_clusters", facts.shared()),
        ("pool_members", facts.members.len() as u64),
        ("file_length_bytes", facts.file_length),
    ] {
        assert_eq!(told[key].as_u64(), Some(due), "{key} in {told:#}");
    }
    told
}

/// What `auto` has foretold for each cluster size is what came of it, and it took the smallest, or nearly so.
fn judge_choice(told: &Value, facts: &Facts, lengths: &BTreeMap<u64, u64>) {
    let number = |entry: &Value, key: &str| entry[key].as_u64().unwrap_or_else(|| panic!("no {key} in {told:#}"));
    let pair = |entry| (number(entry, "cluster_size_bytes"), number(entry, "file_length_bytes"));
    let foretold: BTreeMap<u64, u64> = told["cluster_sizes"].as_array().unwrap().iter().map(pair).collect();
    assert_eq!(foretold, *lengths, "file lengths by cluster size, foretold and real");
    let least = lengths.values().min().unwrap();
    assert!(facts.file_length <= least + least / 20, "{} was chosen of {lengths:?}", facts.cluster_size);
    assert_eq!(told["cluster_size_reason"], "auto");
}

#[test]
fn raw_files_keep_their_content_at_every_cluster_size() {
    family_converts(&families::raw());
}

#[test]
fn versions_and_cluster_sizes_of_the_source_do_not_matter() {
    family_converts(&families::versions());
}

#[test]
fn refcount_widths_of_the_source_do_not_matter() {
    family_converts(&families::widths());
}

#[test]
fn zero_clusters_read_as_zeros_and_take_no_room() {
    family_converts(&families::zeros());
}

#[test]
fn compressed_clusters_are_unpacked() {
    family_converts(&families::compressed());
}

#[test]
fn subclusters_are_read_one_by_one() {
    family_converts(&families::subclusters());
}

#[test]
fn a_snapshot_is_converted_by_name_or_id() {
    family_converts(&families::snapshots());
}

#[test]
fn bitmaps_and_dirty_images_convert() {
    family_converts(&families::odd_states());
}

#[test]
fn backing_chains_are_flattened() {
    family_converts(&families::chains());
}

/// The root disk as a sample.
fn root_sample() -> Sample {
    let path = root_disk();
    Sample { name: "root disk".into(), truth: path.clone(), path, format: "raw", snapshot: None }
}

/// Converts the root disk and has it judged.
fn root_disk_converts(size: &str, pin: Pin, more: &[&str]) -> Facts {
    let (sample, home) = (root_sample(), scratch());
    let target = home.path().join("root.qcow2");
    convert(&sample, &target, size, more);
    let facts = judge(&sample, &fs::read(&sample.truth).unwrap(), &target, pin);
    let back = home.path().join("back.raw");
    dedup_img(args!["convert", "-q", "-O", "raw", "-t", "unsafe", &target, &back]).ok();
    qemu::compare_same("raw", &sample.path, "raw", &back);
    let (source, back) = (fs::metadata(&sample.path).unwrap(), fs::metadata(&back).unwrap());
    assert!(back.blocks() <= source.blocks() + 2048, "{} blocks grew to {}", source.blocks(), back.blocks());
    facts
}

#[test]
fn a_root_disk_shares_its_duplicates_at_4k() {
    let facts = root_disk_converts("4k", Pin::Shared, &[]);
    let saved = (facts.mapped - facts.data_clusters()) * facts.cluster_size;
    assert!(saved > 40 * M, "the second copy is stored again: {saved} bytes saved");
}

#[test]
fn a_root_disk_converts_at_64k() {
    root_disk_converts("64k", Pin::Shared, &["-t", "unsafe"]);
}

#[test]
fn a_root_disk_takes_the_cluster_size_that_saves_most() {
    let facts = root_disk_converts("auto", Pin::Shared, &["-t", "unsafe"]);
    assert!(facts.cluster_size <= 8 * K, "so many duplicates of 4 KiB, and {} was chosen", facts.cluster_size);
}

#[test]
fn every_data_cluster_of_a_root_disk_can_be_pinned() {
    root_disk_converts("4k", Pin::All, &["--pin", "all", "-t", "unsafe"]);
}
