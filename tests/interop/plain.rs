//! `convert --plain`: the way back to an image without sharing and without a pool, for programs that want no more than that.

use super::content::count;
use crate::args;
use crate::support::corpus::{K, M, Sample, content, plain, write_sparse};
use crate::support::reader::verify_plain;
use crate::support::root_disk::root_disk;
use crate::support::{dedup_img, families, qemu, scratch, sha256_of};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Converts with `--plain` and returns the summary.
#[track_caller]
fn convert(words: &[&str], source: &Path, target: &Path) -> Value {
    let mut all = args!["convert", "--plain", "-t", "unsafe", "--output", "json"].to_vec();
    all.extend(words.iter().map(Into::into));
    all.extend(args![source, target]);
    let told: Value = serde_json::from_str(&dedup_img(all).ok().stdout).unwrap();
    for (key, due) in [("plain", Value::Bool(true)), ("pool_members", 0.into()), ("duplicate_clusters", 0.into())] {
        assert_eq!(told[key], due, "{key}");
    }
    assert_eq!((&told["shared_clusters"], &told["stored_clusters"]), (&0.into(), &told["data_clusters"]));
    told
}

/// The target reads as the source, and each cluster of the source that is not zero is stored for itself.
#[track_caller]
fn judge(sample: &Sample, words: &[&str], target: &Path) {
    println!("{} {words:?}", sample.name);
    let mut all = vec!["-f", sample.format];
    all.extend(sample.snapshot.iter().flat_map(|snapshot| ["-l", snapshot]));
    let told = convert(&[&all, words].concat(), &sample.path, target);
    qemu::check_clean(target);
    if sample.snapshot.is_some() {
        qemu::compare_same("raw", &sample.truth, "qcow2", target);
    } else {
        qemu::compare_same(sample.format, &sample.path, "qcow2", target);
    }
    let survey = verify_plain(target);
    let (data, _) = count(&fs::read(&sample.truth).unwrap(), survey.cluster_size, 1);
    assert_eq!(survey.layers[0].map.len() as u64, data);
    assert_eq!(told["stored_clusters"].as_u64(), Some(data));
    assert_eq!(told["file_length_bytes"].as_u64(), Some(survey.file_length));
    assert_eq!(survey.zero_flagged, 0, "zeros are unallocated where no backing file shows through");
}

#[test]
fn every_kind_of_source_becomes_a_plain_image() {
    let home = scratch();
    let target = home.path().join("out.qcow2");
    let all = [
        families::raw(),
        families::versions(),
        families::widths(),
        families::zeros(),
        families::compressed(),
        families::subclusters(),
        families::snapshots(),
        families::odd_states(),
        families::chains(),
    ];
    for (at, sample) in all.iter().flatten().enumerate() {
        judge(sample, &[], &target);
        let size = ["cluster_size=512", "cluster_size=4k", "cluster_size=2M", "cluster_size=auto"][at / 2 % 4];
        if at % 2 == 0 {
            judge(sample, &["-o", size, "-c"], &target);
        }
    }
}

#[test]
fn a_plain_image_is_what_qemu_img_makes_by_default_and_no_larger() {
    let home = scratch();
    let [ours, theirs] = ["ours", "theirs"].map(|name| home.path().join(name));
    for source in [plain(), root_disk()] {
        let sizes = [&[][..], &["-o", "cluster_size=4k"], &["-o", "cluster_size=2M"], &["-c"]];
        for more in sizes.into_iter().take(if source == plain() { 4 } else { 2 }) {
            let words = [&["-f", "raw"], more].concat();
            convert(&words, &source, &ours);
            qemu::convert("raw", &source, "qcow2", &theirs, more);
            let [own, other] = [&ours, &theirs].map(|path| fs::metadata(path).unwrap().len());
            let [own_facts, other_facts] = [&ours, &theirs].map(|path| qemu::info("qcow2", path));
            assert_eq!(own_facts["format-specific"], other_facts["format-specific"], "{more:?}");
            assert_eq!(own_facts["cluster-size"], other_facts["cluster-size"], "{more:?}");
            // QEMU's length ends where the last byte was written; ours is whole clusters.
            let cluster = own_facts["cluster-size"].as_u64().unwrap();
            let due = if more == ["-c"] { other + other / 100 } else { other };
            assert!(own <= due.next_multiple_of(cluster), "{more:?}: {own} bytes, and qemu-img takes {other}");
        }
    }
}

#[test]
fn a_plain_image_has_the_same_bytes_for_any_number_of_threads() {
    let home = scratch();
    let [one, many] = ["one", "many"].map(|name| home.path().join(name));
    for (source, more) in [(root_disk(), &["-f", "raw"][..]), (plain(), &["-f", "raw", "-c", "-o", "cluster_size=4k"])]
    {
        convert(&[more, &["--threads", "1", "--memory", "1M"]].concat(), &source, &one);
        for threads in ["2", "8"] {
            convert(&[more, &["--threads", threads]].concat(), &source, &many);
            assert_eq!(sha256_of(&one), sha256_of(&many), "{threads} threads");
        }
    }
}

#[test]
fn a_deduplicated_image_comes_back_plain() {
    let home = scratch();
    let [image, back] = ["image.qcow2", "back.qcow2"].map(|name| home.path().join(name));
    dedup_img(args!["convert", "-q", "-c", "-f", "raw", plain(), image]).ok();
    let told = convert(&["-f", "qcow2"], &image, &back);
    assert_eq!(told["cluster_size_reason"], "default");
    verify_plain(&back);
    qemu::compare_same("raw", &plain(), "qcow2", &back);
    // A stranger may write it, snapshot it, and deduplicate it again.
    qemu::io("qcow2", &back, &["write -P 7 1M 3M".to_owned()]);
    qemu::snapshot("-c", "user", &back).ok();
    qemu::check_clean(&back);
    dedup_img(args!["dedup", "-q", back]).ok();
    qemu::check_clean(&back);
}

#[test]
fn a_plain_image_takes_refcounts_of_every_width() {
    let home = scratch();
    let target = home.path().join("out.qcow2");
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        for more in [&[][..], &["-c"]] {
            let options = format!("cluster_size=4k,refcount_bits={bits}");
            convert(&[&["-f", "raw", "-o", &options], more].concat(), &plain(), &target);
            qemu::check_clean(&target);
            qemu::compare_same("raw", &plain(), "qcow2", &target);
            assert_eq!(verify_plain(&target).refcount_bits, bits);
        }
    }
}

#[test]
fn a_plain_overlay_leaves_to_the_backing_file_what_it_has() {
    let home = scratch();
    let [base, source, target] = ["base.raw", "new.raw", "out.qcow2"].map(|name| home.path().join(name));
    write_sparse(&base, &content());
    let mut bytes = content();
    bytes[100_000..300_000].fill(0);
    let moved = bytes[..M as usize].to_vec();
    bytes[6 * M as usize..7 * M as usize].copy_from_slice(&moved);
    write_sparse(&source, &bytes);
    for size in ["4k", "64k"] {
        let options = format!("cluster_size={size}");
        let words = ["-f", "raw", "-B", base.to_str().unwrap(), "-F", "raw", "-o", &options];
        let told = convert(&words, &source, &target);
        qemu::check_clean(&target);
        qemu::compare_same("raw", &source, "qcow2", &target);
        let survey = verify_plain(&target);
        assert!(survey.zero_flagged > 0 && told["backing_clusters"].as_u64() > Some(0));
        assert!(survey.file_length < 2 * M + 512 * K, "{} bytes", survey.file_length);
    }
}

#[test]
fn several_sources_become_one_plain_image() {
    let home = scratch();
    let [target, theirs] = ["out.qcow2", "theirs.qcow2"].map(|name| home.path().join(name));
    let both = args!["-f", "raw", plain(), plain()];
    dedup_img(
        args!["convert", "-q", "--plain", "-S", "64k", "-m", "2", "-r", "1G"]
            .into_iter()
            .chain(both.clone())
            .chain([target.clone().into()]),
    )
    .ok();
    qemu::img(args!["convert", "-O", "qcow2"].into_iter().chain(both).chain([theirs.clone().into()])).ok();
    verify_plain(&target);
    qemu::compare_same("qcow2", &theirs, "qcow2", &target);
}

#[test]
fn what_contradicts_plain_is_refused_by_name() {
    let home = scratch();
    let target = home.path().join("out");
    for (words, due) in [(&["--pin", "all"][..], "--pin"), (&["--pin", "shared"], "--pin"), (&["-O", "raw"], "--plain")]
    {
        let words = args!["convert", "--plain"].into_iter().chain(words.iter().map(Into::into));
        dedup_img(words.chain(args![plain(), target])).refused(&[due]);
        assert!(!target.exists());
    }
}
