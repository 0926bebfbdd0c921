//! `convert`: its options and their errors, what it prints where, and numbers that agree with the file.

use super::running::Running;
use super::{command_contract, dedup_img_in, input_contract, wrong_usage};
use crate::args;
use crate::support::corpus::{K, M, content, write_sparse};
use crate::support::reader::{Facts, Pin, verify_dedup};
use crate::support::{Ran, Random, dedup_img, names_in, qemu, scratch, sha256_of};
use serde_json::Value;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

command_contract!("convert");
input_contract!(|format, input, home| {
    let words = args!["convert", "-q"].into_iter().chain(format.iter().map(OsString::from));
    words.chain(args![input, home.join("output.qcow2")]).collect()
});

/// A directory with `source.raw`, a few MiB with duplicates.
fn source() -> (TempDir, PathBuf) {
    let home = scratch();
    let source = home.path().join("source.raw");
    write_sparse(&source, &content());
    (home, source)
}

/// Runs `convert` on `source.raw` in its directory with further words before the names.
fn convert(home: &Path, words: &[&str]) -> Ran {
    let words = args!["convert"].into_iter().chain(words.iter().map(OsString::from));
    dedup_img_in(home, words.chain(args!["source.raw", "target"]))
}

/// Runs `convert` and expects wrong usage, and an older target that is as it was.
#[track_caller]
fn refused(home: &Path, words: &[&str], told: &[&str]) -> Ran {
    std::fs::write(home.join("target"), b"precious").unwrap();
    let ran = wrong_usage(convert(home, words), "convert", told);
    assert!(std::fs::read(home.join("target")).unwrap() == b"precious", "the old target has changed: {words:?}");
    assert_eq!(names_in(home), ["source.raw", "target"], "{words:?}");
    ran
}

#[test]
fn wrong_options_are_refused_in_the_words_of_qemu_img() {
    let (home, _) = source();
    for words in [
        &["-O", "no_such_format"][..],
        &["-f", "no_such_format"],
        &["-t", "no_such_mode"],
        &["-O", "qcow2", "-o", "no_such_option=1"],
        &["-O", "qcow2", "-o", "cluster_size=5k"],
        &["-O", "qcow2", "-o", "cluster_size=4M"],
        &["-O", "qcow2", "-o", "refcount_bits=3"],
        &["-O", "qcow2", "-o", "lazy_refcounts=maybe"],
        &["-O", "qcow2", "-o", "compression_type=lzo"],
    ] {
        let other = scratch();
        std::fs::copy(home.path().join("source.raw"), other.path().join("source.raw")).unwrap();
        let mut command = qemu::tool("qemu-img", args!["convert"].into_iter().chain(words.iter().map(OsString::from)));
        command.args(["source.raw", "target"]).current_dir(other.path());
        let theirs = qemu::finish("qemu-img", command);
        let line = theirs.stderr.lines().next().unwrap_or_default();
        let core = line.rsplit_once("error while converting qcow2: ").map_or(line, |(_, core)| core);
        let core = core.strip_prefix("qemu-img: ").unwrap_or(core);
        let core = core.strip_prefix("Could not open 'source.raw': ").unwrap_or(core);
        let ours = refused(home.path(), words, &[]);
        let same = theirs.code == 1 && ours.stderr.contains(core);
        qemu::words(&qemu::SEEN, same, || format!("{}; {}", theirs.told(), ours.told()));
    }
}

#[test]
fn wrong_values_of_our_own_options_are_refused_by_name() {
    let (home, _) = source();
    for (words, told) in [
        (&["--pin", "some"][..], "--pin"),
        (&["--threads", "0"], "--threads"),
        (&["--threads", "many"], "--threads"),
        (&["--threads=-1"], "--threads"),
        (&["--memory", "much"], "--memory"),
        (&["--memory", "0"], "--memory"),
        (&["--memory=-1"], "--memory"),
        (&["--output", "xml"], "--output"),
        (&["-o", "extended_l2=on"], "extended_l2"),
        (&["-o", "compat=0.10"], "compat"),
        (&["-o", "refcount_bits=2"], "refcount_bits"),
        (&["-o", "preallocation=metadata"], "preallocation"),
        (&["-o", "backing_file=source.raw"], "backing format"),
        (&["-o", "backing_fmt=raw"], "backing file"),
        (&["-O", "raw", "--pin", "all"], "--pin"),
        (&["-o", "data_file=x"], "data_file"),
        (&["-o", "encrypt.format=luks"], "encrypt.format"),
        (&["-O", "raw", "-o", "cluster_size=4k"], "raw"),
        (&["-O", "vmdk"], "vmdk"),
        (&["-f", "vmdk"], "vmdk"),
    ] {
        refused(home.path(), words, &[told]);
    }
}

#[test]
fn a_snapshot_that_is_not_there_is_refused() {
    let (home, source) = source();
    refused(home.path(), &["-f", "raw", "-l", "mine"], &["snapshot"]);
    let image = home.path().join("image.qcow2");
    qemu::convert("raw", &source, "qcow2", &image, &[]);
    let target = home.path().join("new.qcow2");
    for name in ["mine", "snapshot.name=mine", "snapshot.id=7", "7"] {
        dedup_img(args!["convert", "-l", name, image, target]).refused(&["Can't find snapshot"]);
        assert!(!target.exists());
    }
}

/// The pool is no snapshot of the disk: asking for it gives a sentence, not 8 EiB.
#[test]
fn the_pool_cannot_be_converted_as_a_snapshot() {
    let (home, _) = source();
    convert(home.path(), &["-q"]).ok();
    let [image, new] = ["target", "new.qcow2"].map(|name| home.path().join(name));
    for name in ["dedup-pool", "1", "snapshot.name=dedup-pool"] {
        dedup_img(args!["convert", "-l", name, image, new]).refused(&["dedup-pool"]);
        dedup_img(args!["convert", "-O", "raw", "-l", name, image, new]).refused(&["dedup-pool"]);
    }
    assert_eq!(names_in(home.path()), ["source.raw", "target"]);
}

#[test]
fn cache_modes_of_qemu_img_are_accepted_and_give_the_same_file() {
    let (home, _) = source();
    let sums: Vec<String> = ["none", "writeback", "unsafe", "directsync", "writethrough"]
        .map(|mode| {
            convert(home.path(), &["-q", "-t", mode]).ok();
            sha256_of(&home.path().join("target"))
        })
        .into();
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
}

#[test]
fn quiet_prints_nothing_at_all() {
    let (home, _) = source();
    for words in [&["-q"][..], &["-q", "-p"], &["-q", "-O", "raw"], &["-q", "--output", "json"]] {
        let ran = convert(home.path(), words).ok();
        assert_eq!(ran.text(), "", "{}", ran.told());
    }
}

#[test]
fn the_summary_goes_to_stdout_and_nothing_to_stderr() {
    let (home, _) = source();
    let ran = convert(home.path(), &["-f", "raw", "-o", "cluster_size=4k"]).ok();
    assert_eq!(ran.stderr, "", "{}", ran.told());
    let table = ran.stdout.to_lowercase();
    for word in ["virtual", "zero", "shared", "saved", "cluster size", "memory", "time"] {
        assert!(table.contains(word), "no {word}: {}", ran.told());
    }
    assert!(!ran.stdout.contains('\u{1b}'), "no colours where there is no terminal: {}", ran.told());
}

#[test]
fn progress_without_a_terminal_is_the_line_of_qemu_img() {
    let (home, _) = source();
    let ran = convert(home.path(), &["-p"]).ok();
    assert!(ran.stdout.contains("    (100.00/100%)\r"), "{:?}", ran.stdout);
    assert!(!ran.stdout.contains('\u{1b}') && ran.stderr.is_empty(), "{}", ran.told());
    let ran = convert(home.path(), &["-p", "--output", "json"]).ok();
    let last = &ran.stdout[ran.stdout.find('{').unwrap_or_else(|| panic!("{}", ran.told()))..];
    assert!(serde_json::from_str::<Value>(last).is_ok(), "{}", ran.told());
}

/// Runs `convert --output json` and reads what it printed.
#[track_caller]
fn summary(home: &Path, words: &[&str]) -> Value {
    let ran = convert(home, &[words, &["--output", "json"]].concat()).ok();
    assert_eq!(ran.stderr, "", "{}", ran.told());
    serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{e}: {}", ran.told()))
}

/// A number of the summary.
#[track_caller]
fn number(summary: &Value, key: &str) -> u64 {
    summary[key].as_u64().unwrap_or_else(|| panic!("no {key}: {summary:#}"))
}

/// Asserts that every number agrees with what the independent reader finds in the file.
#[track_caller]
fn agrees(summary: &Value, facts: &Facts, target: &Path) {
    let file = target.metadata().unwrap();
    let stored = facts.data_clusters();
    for (key, due) in [
        ("virtual_size_bytes", facts.virtual_size),
        ("data_clusters", facts.mapped),
        ("stored_clusters", stored),
        ("shared_clusters", facts.shared()),
        ("duplicate_clusters", facts.mapped - stored),
        ("saved_bytes", (facts.mapped - stored) * facts.cluster_size),
        ("pool_members", facts.members.len() as u64),
        ("cluster_size_bytes", facts.cluster_size),
        ("file_length_bytes", file.len()),
        ("schema_version", 1),
    ] {
        assert_eq!(number(summary, key), due, "{key}: {summary:#}");
    }
    let percent = summary["saved_percent"].as_f64().unwrap();
    let due = 100.0 * (facts.mapped - stored) as f64 / (facts.mapped as f64).max(1.0);
    assert!((percent - due).abs() < 0.051, "saved_percent {percent}, {due} is due");
    assert!(
        number(summary, "allocated_bytes").abs_diff(file.blocks() * 512) <= 128 * K,
        "{} {summary:#}",
        file.blocks() * 512
    );
    assert!(number(summary, "read_bytes") + number(summary, "zero_bytes") >= facts.mapped, "{summary:#}");
    assert!(number(summary, "zero_bytes") <= facts.virtual_size, "{summary:#}");
    assert!(summary["seconds"].as_f64().is_some_and(|seconds| (0.0..600.0).contains(&seconds)), "{summary:#}");
    assert!((M..512 * M).contains(&number(summary, "peak_memory_bytes")), "{summary:#}");
}

#[test]
fn json_numbers_agree_with_the_file() {
    let (home, _) = source();
    let target = home.path().join("target");
    for (words, pin) in [
        (&["-o", "cluster_size=4k"][..], Pin::Shared),
        (&["-o", "cluster_size=4k,refcount_bits=4", "-f", "raw"], Pin::Shared),
        (&["-o", "cluster_size=64k", "--pin", "all"], Pin::All),
        (&["-o", "cluster_size=512", "--pin", "all"], Pin::All),
        (&["-o", "cluster_size=2M"], Pin::Shared),
    ] {
        let summary = summary(home.path(), words);
        agrees(&summary, &verify_dedup(&target, pin), &target);
        let told = ["source", "source_format", "target", "target_format", "cluster_size_reason"]
            .map(|key| summary[key].as_str().unwrap());
        assert_eq!(told, ["source.raw", "raw", "target", "qcow2", "option"], "{words:?}");
    }
}

#[test]
fn json_numbers_of_an_image_without_data_are_zero() {
    let home = scratch();
    for length in [0, 5 * M] {
        let source = home.path().join("source.raw");
        std::fs::write(&source, b"").unwrap();
        std::fs::File::options().write(true).open(&source).unwrap().set_len(length).unwrap();
        let summary = summary(home.path(), &["-f", "raw"]);
        let target = home.path().join("target");
        agrees(&summary, &verify_dedup(&target, Pin::Shared), &target);
        assert_eq!(number(&summary, "data_clusters"), 0);
        assert_eq!(summary["saved_percent"].as_f64(), Some(0.0));
    }
}

/// What `auto` predicts for each cluster size is what the conversion at that size gives, byte for byte of length.
#[test]
fn auto_predicts_the_length_at_every_cluster_size_and_takes_the_smallest() {
    let (home, _) = source();
    let summary = summary(home.path(), &[]);
    let target = home.path().join("target");
    agrees(&summary, &verify_dedup(&target, Pin::Shared), &target);
    assert_eq!(summary["cluster_size_reason"], "auto");
    let (chosen, length) = (number(&summary, "cluster_size_bytes"), number(&summary, "file_length_bytes"));
    let sizes = summary["cluster_sizes"].as_array().unwrap().clone();
    let mut considered: Vec<u64> = sizes.iter().map(|size| number(size, "cluster_size_bytes")).collect();
    considered.sort_unstable();
    assert_eq!(considered, [4, 8, 16, 32, 64].map(|size| size * K));
    for size in &sizes {
        let (bytes, predicted) = (number(size, "cluster_size_bytes"), number(size, "file_length_bytes"));
        convert(home.path(), &["-q", "-o", &format!("cluster_size={bytes}")]).ok();
        assert_eq!(target.metadata().unwrap().len(), predicted, "at {bytes}");
        assert!(length <= predicted + predicted / 20, "{chosen} was chosen, {bytes} would be smaller: {summary:#}");
        assert!(bytes != chosen || length == predicted);
    }
}

#[test]
fn converting_to_raw_tells_the_same_sizes() {
    let (home, _) = source();
    let summary = summary(home.path(), &["-O", "raw"]);
    let target = home.path().join("target").metadata().unwrap();
    assert_eq!((summary["target_format"].as_str(), number(&summary, "file_length_bytes")), (Some("raw"), target.len()));
    assert_eq!(number(&summary, "virtual_size_bytes"), target.len());
}

#[test]
fn memory_takes_the_sizes_of_qemu_img() {
    let (home, _) = source();
    for size in ["64M", "0x4000000", "67108864", "0.5G", "1g"] {
        convert(home.path(), &["-q", "--memory", size]).ok();
    }
}

/// Names that could be taken for options or protocols are plain names here.
#[test]
fn odd_names_are_plain_names() {
    let home = scratch();
    for name in ["a b", "-dash", "json:{}", "nbd:x", "file:y", "fat:z", "\u{fc}"] {
        let (source, target) = (format!("./{name}"), format!("./{name}.out"));
        std::fs::write(home.path().join(name), content()).unwrap();
        dedup_img_in(home.path(), args!["convert", "-q", "-f", "raw", source, target]).ok();
        dedup_img_in(home.path(), args!["convert", "-q", "-f", "raw", "--", name, format!("{name}.out")]).ok();
        qemu::compare_same("raw", &home.path().join(&source), "qcow2", &home.path().join(&target));
    }
}

/// With a cluster size the disk is read once, and again only what duplicates are compared with; nothing is written twice.
#[test]
fn a_disk_is_read_once_and_written_once() {
    const SLACK: u64 = 256 * K;
    let home = scratch();
    let [source, target] = ["source.raw", "out.qcow2"].map(|name| home.path().join(name));
    let noise = Random::new(8).bytes(12 * M as usize);
    for (bytes, compared) in [(noise.clone(), 0), ([&noise[..], &noise].concat(), noise.len() as u64)] {
        write_sparse(&source, &bytes);
        for size in ["4k", "64k"] {
            let options = format!("cluster_size={size}");
            let mut run = Running::dedup_img(args!["convert", "-q", "-f", "raw", "-o", &options, &source, &target]);
            let (read, written) = run.transferred();
            run.finish().ok();
            let due = bytes.len() as u64 + compared;
            assert!((due..due + SLACK).contains(&read), "{size}: {read} bytes read for {due}");
            let length = std::fs::metadata(&target).unwrap().len();
            assert!((length - SLACK..=length).contains(&written), "{size}: {written} bytes written for {length}");
        }
    }
}
