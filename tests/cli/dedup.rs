//! `dedup`: its options and their errors, what it prints where, and what a signal leaves behind.

use super::running::{Running, unprivileged};
use super::{Arguments, command_contract, dedup_img_in, wrong_usage};
use crate::args;
use crate::support::corpus::plain;
use crate::support::subjects::{deduplicated, subject};
use crate::support::{Ran, Random, dedup_img, names_in, qemu, scratch, sha256_of};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

command_contract!("dedup");

/// The arguments for the tests of a contract.
const DEDUP: Arguments = |options, image, _| {
    let mut words = args!["dedup"].to_vec();
    words.extend(options.iter().map(Into::into));
    words.push(image.into());
    words
};

#[test]
fn the_input_must_exist() {
    super::the_input_must_exist(DEDUP);
}

#[test]
fn the_input_cannot_be_a_directory() {
    super::the_input_cannot_be_a_directory(DEDUP);
}

#[test]
fn the_input_must_be_readable() {
    super::the_input_must_be_readable(DEDUP);
}

#[test]
fn a_file_that_is_no_image_of_the_format_given_is_refused() {
    super::a_file_that_is_no_image_of_the_format_given_is_refused(DEDUP);
}

/// A directory with an image of some MiB that holds duplicates, by qemu-img.
fn image() -> (TempDir, PathBuf) {
    let home = scratch();
    let path = home.path().join("image.qcow2");
    qemu::convert("raw", &plain(), "qcow2", &path, &["-o", "cluster_size=4k"]);
    (home, path)
}

fn dedup(options: &[&str], image: &Path) -> Ran {
    dedup_img(DEDUP(options, image, image))
}

#[test]
fn one_image_is_expected() {
    wrong_usage(dedup_img(args!["dedup"]), "dedup", &["Expecting one image file name"]);
}

#[test]
fn bad_values_are_refused() {
    let (_home, image) = image();
    let before = sha256_of(&image);
    for (options, word) in [
        (&["--output", "xml"][..], "xml"),
        (&["--pin", "some"], "--pin"),
        (&["--pin"], "--pin"),
        (&["--threads", "0"], "--threads"),
        (&["--threads", "many"], "--threads"),
        (&["--memory", "0"], "--memory"),
        (&["--memory", "much"], "--memory"),
        (&["--memory=-1"], "--memory"),
        (&["-f", "no_such_format"], "no_such_format"),
        (&["-U"], "-U"),
    ] {
        let operands: &[&Path] = if options == ["--pin"] { &[] } else { &[&image] };
        let words = args!["dedup"].into_iter().chain(options.iter().map(Into::into));
        wrong_usage(dedup_img(words.chain(operands.iter().map(Into::into))), "dedup", &[word]);
        assert_eq!(sha256_of(&image), before, "{options:?}");
    }
}

#[test]
fn raw_and_other_formats_are_refused_by_name() {
    let home = scratch();
    let raw = home.path().join("disk.raw");
    fs::copy(plain(), &raw).unwrap();
    let before = sha256_of(&raw);
    for options in [&[][..], &["-f", "raw"], &["--dry-run"], &["--dry-run", "-f", "raw"]] {
        dedup(options, &raw).refused(&["raw", "disk.raw"]);
        assert_eq!(sha256_of(&raw), before);
    }
    for format in ["vmdk", "vdi"] {
        let other = home.path().join(format);
        qemu::create(format, &other, 1 << 20, "");
        dedup(&[], &other).refused(&[format, other.to_str().unwrap()]);
    }
}

#[test]
fn a_header_and_nothing_behind_it_is_refused() {
    let home = scratch();
    let (whole, cut) = (fs::read(subject("snapshots-64k")).unwrap(), home.path().join("cut.qcow2"));
    for length in [0, 4, 8, 71, 72, 103, 104, 112, 4096, 65536, 4 << 16, whole.len() - 65536] {
        fs::write(&cut, &whole[..length]).unwrap();
        dedup(&["-f", "qcow2"], &cut).refused(&[cut.to_str().unwrap()]);
        assert!(fs::read(&cut).unwrap() == whole[..length], "{length} bytes were touched");
    }
    assert_eq!(names_in(home.path()), ["cut.qcow2"]);
}

/// `--dry-run` needs no right to write, and a real run without it changes nothing.
#[test]
fn a_read_only_image_is_looked_at_and_never_touched() {
    let (_home, image) = image();
    fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).unwrap();
    let state = || (sha256_of(&image), image.metadata().unwrap().modified().unwrap(), image.metadata().unwrap().mode());
    let before = state();
    let run = |options: &[&str]| qemu::finish("setpriv", unprivileged(DEDUP(options, &image, &image)));
    run(&["--dry-run"]).ok();
    run(&["--dry-run", "--output", "json"]).ok();
    let name = format!("Could not open '{}': ", image.display());
    run(&[]).refused(&[&name, "Permission denied"]);
    assert_eq!(state(), before);
}

#[test]
fn quiet_prints_nothing_at_all() {
    for options in
        [&["-q", "--dry-run"][..], &["-q", "-p"], &["-q", "--output", "json"], &["-q", "--dry-run", "--output", "json"]]
    {
        let (_home, image) = image();
        let ran = dedup(options, &image).ok();
        assert_eq!(ran.text(), "", "{}", ran.told());
    }
}

#[test]
fn the_summary_goes_to_stdout_and_nothing_to_stderr() {
    let (_home, image) = image();
    for options in [&["--dry-run"][..], &[], &[]] {
        let ran = dedup(options, &image).ok();
        assert_eq!(ran.stderr, "", "{}", ran.told());
        let table = ran.stdout.to_lowercase();
        for word in ["read", "zero", "duplicate", "shared", "pool", "freed", "on disk", "time", "memory"] {
            assert!(table.contains(word), "no {word}: {}", ran.told());
        }
        assert!(ran.stdout.is_ascii() && !ran.stdout.contains('\u{1b}'), "{}", ran.told());
    }
}

/// The summary says that a version 2 image has become version 3, once.
#[test]
fn an_upgrade_is_told() {
    let home = scratch();
    let path = home.path().join("old.qcow2");
    qemu::convert("raw", &plain(), "qcow2", &path, &["-o", "compat=0.10"]);
    for (options, told) in [(&["--dry-run"][..], true), (&[], true), (&[], false)] {
        let ran = dedup(options, &path).ok();
        assert_eq!(ran.stdout.contains("version 2"), told, "{}", ran.told());
    }
    assert_eq!(qemu::info("qcow2", &path)["format-specific"]["data"]["compat"], "1.1");
}

#[test]
fn progress_without_a_terminal_is_the_line_of_qemu_img() {
    for options in [&["-p"][..], &["-p", "--dry-run"]] {
        let (_home, image) = image();
        let ran = dedup(options, &image).ok();
        assert!(ran.stdout.contains("    (100.00/100%)\r"), "{:?}", ran.stdout);
        assert!(!ran.stdout.contains('\u{1b}') && ran.stderr.is_empty(), "{}", ran.told());
        let ran = dedup(&[options, &["--output", "json"]].concat(), &image).ok();
        let last = &ran.stdout[ran.stdout.find('{').unwrap_or_else(|| panic!("{}", ran.told()))..];
        assert!(serde_json::from_str::<Value>(last).is_ok(), "{}", ran.told());
    }
}

/// The keys of a summary, in alphabetical order.
const KEYS: [&str; 25] = [
    "allocated_after_bytes",
    "allocated_before_bytes",
    "already_shared_clusters",
    "batches",
    "changed",
    "cluster_size_bytes",
    "dry_run",
    "duplicate_clusters",
    "file_length_after_bytes",
    "file_length_before_bytes",
    "filename",
    "freed_bytes",
    "freed_clusters",
    "leaked_clusters",
    "newly_shared_clusters",
    "peak_memory_bytes",
    "pool_members",
    "read_clusters",
    "room_available_bytes",
    "room_needed_bytes",
    "scanned_clusters",
    "schema_version",
    "seconds",
    "upgraded",
    "zero_clusters",
];

#[test]
fn json_has_every_key_and_agrees_with_the_file() {
    let (_home, image) = image();
    for (n, options) in [&["--dry-run"][..], &[], &[], &["--pin", "all"]].into_iter().enumerate() {
        let before = image.metadata().unwrap();
        let ran = dedup(&[options, &["--output", "json"]].concat(), &image).ok();
        let after = image.metadata().unwrap();
        assert_eq!(ran.stderr, "", "{}", ran.told());
        assert!(ran.stdout.starts_with("{\n    \"") && ran.stdout.ends_with("\n}\n"), "{}", ran.told());
        let told: Value = serde_json::from_str(&ran.stdout).unwrap();
        let mut keys: Vec<&str> = told.as_object().unwrap().keys().map(String::as_str).collect();
        keys.retain(|key| *key != "plan" || n != 0);
        keys.sort_unstable();
        assert_eq!(keys, KEYS, "{told:#}");
        assert_eq!((&told["schema_version"], &told["filename"]), (&1.into(), &image.to_str().unwrap().into()));
        assert_eq!((&told["dry_run"], &told["changed"]), (&(n == 0).into(), &(n != 2).into()), "{told:#}");
        assert_eq!(told["file_length_before_bytes"], before.len());
        assert_eq!(told["file_length_after_bytes"], after.len());
        let number = |key: &str| told[key].as_u64().unwrap_or_else(|| panic!("{key}: {told:#}"));
        assert!(number("allocated_before_bytes").abs_diff(before.blocks() * 512) <= 128 << 10, "{told:#}");
        assert!(number("allocated_after_bytes").abs_diff(after.blocks() * 512) <= 128 << 10, "{told:#}");
        assert!(told["seconds"].as_f64().is_some_and(|seconds| (0.0..60.0).contains(&seconds)), "{told:#}");
        assert!((1 << 20..512 << 20).contains(&number("peak_memory_bytes")), "{told:#}");
        assert_eq!(number("batches") > 0, n == 1, "{told:#}");
        assert_eq!(number("freed_clusters") * 4096, number("freed_bytes"));
    }
}

/// Names that could be taken for options or protocols are plain names here.
#[test]
fn odd_names_are_plain_names() {
    let (home, image) = image();
    for name in ["a b", "-dash", "json:{}", "nbd:x", "file:y", "fat:z", "\u{fc}"] {
        fs::copy(&image, home.path().join(name)).unwrap();
        dedup_img_in(home.path(), args!["dedup", "-q", "--", name]).ok();
        dedup_img_in(home.path(), args!["dedup", "-q", format!("./{name}")]).ok();
        qemu::compare_same("raw", &plain(), "qcow2", &home.path().join(name));
    }
}

/// An image that is deduplicated already, and one without data, are left as they are.
#[test]
fn where_nothing_is_to_be_done_nothing_is_written() {
    let home = scratch();
    let (empty, done) = (home.path().join("empty.qcow2"), deduplicated(home.path(), "done.qcow2", &[]));
    qemu::create("qcow2", &empty, 1 << 30, "compat=0.10");
    for path in [&empty, &done] {
        let state = || (sha256_of(path), path.metadata().unwrap().modified().unwrap());
        let before = state();
        for options in [&[][..], &["--pin", "shared"], &["--threads", "3", "--memory", "1M"]] {
            dedup(options, path).ok();
            assert_eq!(state(), before, "{options:?}");
        }
    }
}

/// An image of 48 MiB in which every content occurs twice.
fn twofold() -> (TempDir, PathBuf) {
    let home = scratch();
    let [raw, path] = ["raw", "image.qcow2"].map(|name| home.path().join(name));
    let half = Random::new(7).bytes(24 << 20);
    fs::write(&raw, [&half[..], &half[..]].concat()).unwrap();
    qemu::convert("raw", &raw, "qcow2", &path, &["-o", "cluster_size=4k"]);
    (home, path)
}

/// Deduplicates a copy of `image`, sends a signal when it has locked it and written so many bytes, and reports how it ended.
fn interrupted(signal: &str, written: u64, image: &Path, truth: &Path) -> Ran {
    let home = scratch();
    let path = home.path().join("image.qcow2");
    fs::copy(image, &path).unwrap();
    let mut running = Running::heeding(DEDUP(&["-q", "--memory", "1M"], &path, &path));
    running.until(|it| it.has_locked(&path) && it.written() >= written);
    running.signal(signal);
    let ran = running.finish();
    let told = ran.tells_how_it_stopped(&path, &fs::read(image).unwrap());
    assert!(ran.code == 0 || told, "{}", ran.told());
    assert_eq!(names_in(home.path()), ["image.qcow2"], "something was left behind: {}", ran.told());
    let judge = |what: &str| {
        let ran = qemu::check(&path);
        assert_eq!(ran.code, 0, "{signal} after {written} bytes, {what}: {}", ran.told());
        qemu::compare_same("raw", truth, "qcow2", &path);
    };
    judge("interrupted");
    dedup_img(args!["check", "--data", path]).ok();
    dedup(&["-q"], &path).ok();
    judge("finished");
    let again: Value = serde_json::from_str(&dedup(&["--output", "json"], &path).ok().stdout).unwrap();
    assert_eq!((&again["changed"], &again["scanned_clusters"]), (&false.into(), &6144.into()));
    ran
}

/// Ctrl-C and a polite request to end: the program stops in a clean state and dies of the signal, and the next run does the rest.
#[test]
fn an_interrupt_leaves_a_clean_image_with_its_content() {
    let (home, image) = twofold();
    let (copy, mut total) = (home.path().join("copy.qcow2"), 0);
    fs::copy(&image, &copy).unwrap();
    let mut whole = Running::dedup_img(DEDUP(&["-q", "--memory", "1M"], &copy, &copy));
    whole.until(|it| {
        total = total.max(it.written());
        false
    });
    whole.finish().ok();
    let truth = home.path().join("raw");
    let mut ends = Vec::new();
    for signal in ["INT", "TERM", "HUP"] {
        let moments = (0..8).map(|eighth| total * eighth / 8);
        ends.extend(moments.map(|written| interrupted(signal, written, &image, &truth)));
    }
    // The signal may also come when all is done.
    let (died, finished): (Vec<Ran>, Vec<Ran>) = ends.into_iter().partition(|ran| ran.code == -1);
    assert!(died.len() >= 6, "too few of the signals came in time: {died:?}");
    assert!(finished.iter().all(|ran| ran.code == 0), "{finished:?} {died:?}");
}
