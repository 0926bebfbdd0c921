//! What `stats` foretells comes true: the lengths of the curve with `convert`, the figures of `dedup` with `dedup`, and the advice
//! where it is followed to the letter.

use super::dedup_judge::copied;
use super::stats_figures::root_part;
use crate::args;
use crate::support::corpus::{K, M, edit};
use crate::support::count::{Source, named, source_of, stats};
use crate::support::inplace::Subject;
use crate::support::reader::Image;
use crate::support::subjects::deduplicated;
use crate::support::{Ran, Random, dedup_img, families, names_in, qemu, scratch};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// What a file occupies.
fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

/// Asserts that two sizes differ by one percent at most, not counting `slack` bytes.
#[track_caller]
fn close(foretold: u64, found: u64, slack: u64, what: &str) {
    let off = foretold.abs_diff(found).saturating_sub(slack);
    assert!(off * 100 <= found, "{what}: {foretold} was foretold, {found} came of it");
}

/// What nobody can foretell of a QCOW2 file: blocks in which the file system says where the pieces lie; and not worth it: that
/// small tables take up less than the clusters that are theirs.
fn slack(path: &Path) -> u64 {
    2 * Image::open(path).cluster_size() + 8 * K
}

/// Converts an image at every size of its curve.
#[track_caller]
fn curve_comes_true(source: &Source, options: &[&str]) {
    let home = scratch();
    let target = home.path().join("target.qcow2");
    let report = stats(std::slice::from_ref(source), options);
    let curve = report["curve"].as_array().unwrap();
    assert!(curve.len() >= 10, "{curve:#?}");
    for row in curve {
        let option = format!("cluster_size={}", row["cluster_size_bytes"]);
        let words = args!["convert", "-q", "-f", source.format, "-t", "unsafe", "-o", option, source.name, target];
        let ran = dedup_img(words).ok();
        assert_eq!(
            target.metadata().unwrap().len(),
            row["file_length_bytes"].as_u64().unwrap(),
            "{}: {row:#}",
            ran.line
        );
    }
}

#[test]
fn stats_curve_comes_true_for_a_root_file_system() {
    curve_comes_true(&Source::new(&root_part(), "raw", &root_part()), &["-f", "raw"]);
}

#[test]
fn stats_curve_comes_true_whatever_the_image() {
    for name in ["sparse.raw", "one-byte.raw", "nothing.raw", "ends.raw", "zeros-written.raw"] {
        curve_comes_true(&named(families::raw(), name), &["-f", "raw"]);
    }
    curve_comes_true(&named(families::raw(), "odd.raw"), &["-f", "raw", "--cluster-size", "512"]);
    curve_comes_true(&named(families::versions(), "v2-512.qcow2"), &[]);
    curve_comes_true(&named(families::versions(), "v3-2M.qcow2"), &[]);
    curve_comes_true(&named(families::chains(), "top.qcow2"), &[]);
    curve_comes_true(&named(families::compressed(), "zstd-64k.qcow2"), &[]);
    curve_comes_true(&named(families::subclusters(), "over-raw.qcow2"), &["--cluster-size", "1k"]);
    curve_comes_true(&named(families::snapshots(), "snapshots.qcow2"), &[]);
}

/// Deduplicates an image, after a look at what is to come.
#[track_caller]
fn dedup_comes_true(path: &Path) {
    let report = stats(&[Source::new(path, "qcow2", path)], &["--no-curve"]);
    let told = |key: &str| report["images"][0]["dedup"][key].as_u64().unwrap_or_else(|| panic!("no {key}: {report:#}"));
    let foretold: Value = report["images"][0]["dedup"].clone();
    let words = args!["dedup", "--output", "json", "-f", "qcow2", path];
    let done: Value = serde_json::from_str(&dedup_img(words).ok().stdout).unwrap();
    let slack = slack(path);
    close(told("file_allocated_after_bytes"), allocated(path), slack, &format!("{}: {foretold:#}", path.display()));
    for (key, its) in [
        ("stored_clusters", "scanned_clusters"),
        ("zero_clusters", "zero_clusters"),
        ("duplicate_clusters", "duplicate_clusters"),
        ("freed_clusters", "freed_clusters"),
        ("freed_bytes", "freed_bytes"),
        ("pool_members", "pool_members"),
    ] {
        assert_eq!(foretold[key], done[its], "{key} of {}: {foretold:#}, {done:#}", path.display());
    }
    // What was done need not be done again.
    let again = stats(&[Source::new(path, "qcow2", path)], &["--no-curve"]);
    let again = &again["images"][0]["dedup"];
    assert_eq!((&again["freed_clusters"], &again["duplicate_clusters"]), (&0.into(), &0.into()), "{again:#}");
    close(again["file_allocated_after_bytes"].as_u64().unwrap(), allocated(path), 0, "again");
}

#[test]
fn stats_dedup_comes_true_for_a_root_file_system() {
    let home = scratch();
    for (size, more) in [("4k", ""), ("8k", ",compat=0.10"), ("64k", "")] {
        let path = home.path().join(format!("{size}.qcow2"));
        qemu::convert("raw", &root_part(), "qcow2", &path, &["-o", &format!("cluster_size={size}{more}")]);
        qemu::snapshot("-c", "one", &path).ok();
        edit(&path, &["write -s @ 10M 6M", "write -P 4 30M 1M", "write -z 44M 2M"]);
        dedup_comes_true(&path);
        edit(&path, &["write -s @ 12M 6M", "write -z 20M 512k", "write -P 0 28M 1M", "discard 40M 1M"]);
        dedup_comes_true(&path);
    }
}

#[test]
fn stats_dedup_comes_true_whatever_the_image() {
    for kind in ["plain", "snapshots", "leaks", "zlib", "zstd", "4 bits", "pool", "bitmaps", "version 2", "backing"] {
        dedup_comes_true(&Subject::new(kind).path);
    }
    for kind in ["leaks", "garbage, snapshots", "stale directory", "VM state", "pool", "compressed pool"] {
        dedup_comes_true(&Subject::to_collect(kind).path);
    }
}

/// Runs the command that the report advises, by a shell in the directory of the image; returns what the image and a new one occupy.
#[track_caller]
fn follow(home: &Path, name: &str, options: &[&str]) -> (Value, Option<PathBuf>) {
    let before = names_in(home);
    let mut words = args!["stats", "--output", "json"].to_vec();
    words.extend(options.iter().map(Into::into));
    words.extend(args!["--", name]);
    let mut command = crate::support::dedup_command(words);
    let ran = Ran::new(format!("{command:?}"), &command.current_dir(home).output().unwrap()).ok();
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    let advice = report["recommendation"].clone();
    println!("{advice:#}");
    assert!(advice["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{advice:#}");
    let Some(line) = advice["command"].as_str() else {
        assert_eq!(advice["action"], "none", "{advice:#}");
        return (advice, None);
    };
    let programs = Path::new(env!("CARGO_BIN_EXE_dedup-img")).parent().unwrap();
    let search = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let mut shell = qemu::tool("sh", args!["-c", line]);
    qemu::finish("sh", {
        shell.current_dir(home).env("PATH", search);
        shell
    })
    .ok();
    let mut new = names_in(home);
    new.retain(|name| !before.contains(name));
    assert_eq!(new.len(), usize::from(advice["action"] == "convert"), "{new:?}: {advice:#}");
    (advice, new.first().map(|name| home.join(name)))
}

#[test]
fn stats_advice_comes_true() {
    let home = scratch();
    let [raw, fine, coarse] = ["it's a disk.raw", "fine disk.qcow2", "-coarse $HOME.qcow2"];
    fs::copy(root_part(), home.path().join(raw)).unwrap();
    for (name, size) in [(fine, "4k"), (coarse, "64k")] {
        let option = format!("cluster_size={size}");
        qemu::convert("raw", &root_part(), "qcow2", &home.path().join(name), &["-o", &option]);
    }
    let told = |advice: &Value, key: &str| advice[key].as_u64().unwrap_or_else(|| panic!("no {key} in {advice:#}"));
    for (name, options, action) in
        [(raw, &["-f", "raw"][..], "convert"), (fine, &[], "dedup"), (coarse, &[], "convert")]
    {
        let path = home.path().join(name);
        let now = allocated(&path);
        let (advice, new) = follow(home.path(), name, options);
        assert_eq!(advice["action"], action, "{advice:#}");
        close(told(&advice, "now_bytes"), now, 0, name);
        let result = new.unwrap_or(path);
        close(told(&advice, "predicted_bytes"), allocated(&result), 0, name);
        if action == "convert" {
            let size = qemu::info("qcow2", &result)["cluster-size"].clone();
            assert_eq!(advice["cluster_size_bytes"], size, "{advice:#}");
            qemu::compare("raw", &root_part(), "qcow2", &result).ok();
            fs::remove_file(&result).unwrap();
        }
    }
    // What has just been deduplicated needs nothing.
    let (advice, _) = follow(home.path(), fine, &[]);
    assert_eq!(advice["action"], "none", "{advice:#}");
}

/// Whatever the image: the command works, and leads where it is said to lead; where there is none, nothing is to be gained.
#[test]
fn stats_advice_comes_true_whatever_the_image() {
    let mut samples = [families::raw(), families::versions(), families::zeros(), families::compressed()].concat();
    samples.extend([families::subclusters(), families::snapshots(), families::chains()].concat());
    for sample in samples.into_iter().filter(|sample| sample.snapshot.is_none()) {
        let (home, path) = if sample.format == "qcow2" { copied(&sample.path) } else { copied_raw(&sample.path) };
        let (name, now) = (path.file_name().unwrap().to_str().unwrap(), allocated(&path));
        println!("{}", sample.name);
        let (advice, new) = follow(path.parent().unwrap(), name, &["-f", sample.format]);
        let told = |key: &str| advice[key].as_u64().unwrap_or_else(|| panic!("no {key} in {advice:#}"));
        assert_eq!(told("now_bytes"), now, "{advice:#}");
        let (format, result) = new.map_or((sample.format, path.clone()), |new| ("qcow2", new));
        qemu::compare("raw", &sample.truth, format, &result).ok();
        let slack = if format == "raw" { 0 } else { slack(&result) };
        close(told("predicted_bytes"), allocated(&result), slack, &format!("{}: {advice:#}", sample.name));
        assert!(advice["action"] == "none" || allocated(&result) < now, "{}: {advice:#}", sample.name);
        drop(home);
    }
}

/// A copy of a raw file with its holes.
fn copied_raw(raw: &Path) -> (TempDir, PathBuf) {
    let home = scratch();
    let copy = home.path().join("copy.raw");
    qemu::run("cp", args!["--sparse=always", raw, copy]).ok();
    (home, copy)
}

#[test]
fn stats_advice_is_none_where_nothing_is_to_be_gained() {
    let home = scratch();
    let path = home.path().join("unique.qcow2");
    fs::write(home.path().join("unique.raw"), Random::new(6).bytes(8 * M as usize)).unwrap();
    qemu::convert("raw", &home.path().join("unique.raw"), "qcow2", &path, &[]);
    let (advice, _) = follow(home.path(), "unique.qcow2", &[]);
    assert_eq!(advice["action"], "none", "{advice:#}");
    let path = deduplicated(home.path(), "pooled.qcow2", &[]);
    let (advice, _) = follow(home.path(), "pooled.qcow2", &[]);
    assert_eq!(advice["action"], "none", "{advice:#}, {}", path.display());
    let together = stats(&[source_of(&path), named(families::raw(), "ends.raw")], &[]);
    assert!(together.get("recommendation").is_none(), "{together:#}");
}
