//! `check` agrees with `qemu-img check`: on sound images of every kind, and on hundreds that a mutator has damaged.

use crate::args;
use crate::support::corpus::patch;
use crate::support::mutator::Mutator;
use crate::support::reader::Image;
use crate::support::subjects::{deduplicated, foreign, subject, subjects};
use crate::support::{Ran, Random, dedup_img, qemu, scratch};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Damaged images made of each subject.
const DAMAGED: u64 = 50;
/// No check of such small images may take as long.
const LIMIT: Duration = Duration::from_secs(5);
/// The sums that both programs print.
const SUMS: [&str; 8] = [
    "check-errors",
    "corruptions",
    "leaks",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
    "image-end-offset",
];

/// What one program said of an image.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) ran: Ran,
    /// The summary, unless the check could not be completed.
    summary: Option<Value>,
}

impl Verdict {
    /// Of qemu-img, which needs the key of an encrypted image.
    fn theirs(path: &Path) -> Self {
        let mut words = args!["check", "--output", "json"].to_vec();
        if fs::read(path).unwrap().get(35) == Some(&2) {
            let options = format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", path.display());
            words.extend(args!["--object", "secret,id=s,data=abc", "--image-opts", options]);
        } else {
            words.extend(args!["-f", "qcow2", path]);
        }
        Self::read(qemu::img(words))
    }

    /// Of the program under test, which is stopped if it takes too long, and must not panic.
    fn ours(path: &Path) -> Self {
        let words =
            args!["-s", "KILL", "5", env!("CARGO_BIN_EXE_dedup-img"), "check", "-f", "qcow2", "--output", "json"];
        let begun = Instant::now();
        let verdict = Self::read(qemu::run("timeout", words.into_iter().chain(args![path])));
        assert!(begun.elapsed() < LIMIT, "it took {:?}: {}", begun.elapsed(), verdict.ran.told());
        assert!(!verdict.ran.stderr.contains("panicked"), "{}", verdict.ran.told());
        assert!([0, 1, 2, 3].contains(&verdict.ran.code), "{}", verdict.ran.told());
        verdict
    }

    fn read(ran: Ran) -> Self {
        let summary = (!ran.stdout.is_empty()).then(|| {
            serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {}", ran.told()))
        });
        Self { ran, summary }
    }

    /// A sum; both programs leave out what is 0.
    fn sum(&self, key: &str) -> u64 {
        self.summary.as_ref().and_then(|summary| summary.get(key)).and_then(Value::as_u64).unwrap_or(0)
    }

    /// Corruption that only the program under test looks for.
    pub(super) fn beyond(&self) -> u64 {
        self.sum("findings-beyond")
    }
}

/// A difference between the two programs that is meant to be.
struct Permitted {
    reason: &'static str,
    /// Whether it explains this difference in what `what` names: `exit code`, or one of the sums.
    explains: fn(what: &str, ours: &Verdict, theirs: &Verdict) -> bool,
}

/// Every permitted difference. There are no others.
const PERMITTED: [Permitted; 3] = [
    Permitted {
        reason: "what only we find is corruption too, and qemu-img passes it or takes it for a leak",
        explains: |what, ours, theirs| {
            what == "exit code" && ours.ran.code == 2 && [0, 3].contains(&theirs.ran.code) && ours.beyond() > 0
        },
    },
    Permitted {
        reason: "QEMU loads the bitmaps when it opens an image, and a table entry without meaning ends its check there",
        explains: |what, ours, theirs| {
            let refused = theirs.ran.code == 1 && theirs.ran.stderr.contains("Could not read bitmap_table");
            refused && (what == "summary" || ours.ran.code == 2 && ours.ran.stderr.contains("ERROR table entry"))
        },
    },
    Permitted {
        reason: "we never open an external data file, so that its absence does not end the check",
        explains: |_, _, theirs| theirs.ran.code == 1 && theirs.ran.stderr.contains("'data-file' is required"),
    },
];

/// What the two programs differ in, but for what is permitted.
pub(super) fn differences(path: &Path) -> (Vec<String>, Verdict, Verdict) {
    let (ours, theirs) = (Verdict::ours(path), Verdict::theirs(path));
    let mut different = Vec::new();
    let permitted = |what: &str| {
        let found = PERMITTED.iter().find(|entry| (entry.explains)(what, &ours, &theirs));
        found.inspect(|entry| println!("{what} may differ: {}", entry.reason)).is_some()
    };
    if ours.ran.code != theirs.ran.code && !permitted("exit code") {
        different.push(format!("exit code {}, not {}", ours.ran.code, theirs.ran.code));
    }
    if ours.summary.is_some() != theirs.summary.is_some() && !permitted("summary") {
        different.push("only one of them has a summary".into());
    }
    for key in SUMS {
        let sums = (ours.sum(key), theirs.sum(key));
        if theirs.summary.is_some() && sums.0 != sums.1 && !permitted(key) {
            different.push(format!("{key} {}, not {}", sums.0, sums.1));
        }
    }
    assert!(theirs.ran.code != 2 || ours.ran.code != 0, "0 is said of a corrupt image: {}", theirs.ran.told());
    (different, ours, theirs)
}

/// Damages an image in many ways, and collects where the programs do not say the same.
fn damage(name: &str, path: &Path, seed: u64) -> Vec<String> {
    let home = scratch();
    let (bad, mutator, mut random) = (home.path().join("bad.qcow2"), Mutator::new(path), Random::new(seed));
    fs::copy(subject("plain-4k"), home.path().join("plain-4k")).unwrap();
    let (mut said, mut codes) = (Vec::new(), [0; 4]);
    for number in 0..DAMAGED {
        let damaged = mutator.damage(&mut random);
        fs::write(&bad, &damaged.bytes).unwrap();
        let (different, ours, theirs) = differences(&bad);
        codes[usize::try_from(theirs.ran.code).unwrap()] += 1;
        if !different.is_empty() {
            let (different, ours, theirs) = (different.join(", "), ours.ran.told(), theirs.ran.told());
            said.push(format!("{name} {number}: {}\n{different}\n{ours}\n{theirs}", damaged.story));
        }
    }
    println!("{name}: qemu-img ended {codes:?} times with 0, 1, 2, 3");
    assert!(codes[2] + codes[3] >= DAMAGED / 3, "{name}: the damage is not to the point: {codes:?}");
    said
}

/// Fails with all that was collected.
#[track_caller]
fn none(disagreements: &[String]) {
    assert!(disagreements.is_empty(), "{} disagreements\n{}", disagreements.len(), disagreements.join("\n"));
}

/// Damages the subjects whose names fit.
fn damage_all(fits: fn(&str) -> bool) {
    let fitting: Vec<_> = (1..).zip(subjects()).filter(|(_, (name, _))| fits(name)).collect();
    assert!(fitting.len() > 1, "too few subjects");
    none(&fitting.iter().flat_map(|(seed, (name, path))| damage(name, path, *seed)).collect::<Vec<_>>());
}

/// The mutator does the same on every run, and it is not blind: it reaches every kind of field, and there are images enough.
#[test]
fn the_damage_is_manifold_and_always_the_same() {
    let mut stories = Vec::new();
    for (seed, (_, path)) in (1..).zip(subjects()) {
        let (mutator, mut random, mut again) = (Mutator::new(&path), Random::new(seed), Random::new(seed));
        for _ in 0..DAMAGED {
            let damaged = mutator.damage(&mut random);
            assert!(damaged.bytes == mutator.damage(&mut again).bytes, "{}", damaged.story);
            stories.push(damaged.story);
        }
    }
    assert!(stories.len() >= 300);
    for kind in [
        "header field",
        "active L1 entry",
        "active L2 entry",
        "snapshot 1 L1 entry",
        "snapshot 2 L2 entry",
        "subclusters of",
        "refcount table entry",
        "refcount of cluster",
        "L1 offset of snapshot",
        "extra length of snapshot",
        "bitmap extension",
        "table offset of bitmap",
        "entry 0 of bitmap",
        "past the end",
        "reserved bit",
        "COPIED",
        "zero flag",
        "compressed",
        "bytes long, not",
    ] {
        let hits = stories.iter().filter(|story| story.contains(kind)).count();
        assert!(hits >= 3, "{kind}: {hits} times");
    }
}

#[test]
fn damage_to_plain_images_is_judged_as_by_qemu_img() {
    damage_all(|name| name.starts_with("plain") || ["preallocated", "lazy", "overlay"].contains(&name));
}

#[test]
fn damage_to_other_refcount_widths_is_judged_as_by_qemu_img() {
    damage_all(|name| name.starts_with("bits"));
}

#[test]
fn damage_to_snapshots_is_judged_as_by_qemu_img() {
    damage_all(|name| name.starts_with("snapshots") || name.starts_with("version"));
}

#[test]
fn damage_to_compressed_images_is_judged_as_by_qemu_img() {
    damage_all(|name| name.starts_with('z'));
}

#[test]
fn damage_to_subclusters_is_judged_as_by_qemu_img() {
    damage_all(|name| name.starts_with("subclusters"));
}

#[test]
fn damage_to_bitmaps_is_judged_as_by_qemu_img() {
    damage_all(|name| name.starts_with("bitmaps"));
}

#[test]
fn damage_to_deduplicated_images_is_judged_as_by_qemu_img() {
    let (home, mut said) = (scratch(), Vec::new());
    for (seed, pin) in [(101, "shared"), (102, "all")] {
        let path = deduplicated(home.path(), "pool", &["--pin", pin]);
        said.extend(damage("a pool", &path, seed));
        qemu::snapshot("-c", "mine", &path).ok();
        qemu::io("qcow2", &path, &["write -P 3 60k 40k".into()]);
        said.extend(damage("a pool with a snapshot", &path, seed + 2));
    }
    none(&said);
}

#[test]
fn damage_to_images_whose_data_we_never_read_is_judged_as_by_qemu_img() {
    let home = scratch();
    none(
        &(201..)
            .zip(foreign(home.path()))
            .flat_map(|(seed, (name, path))| damage(name, &path, seed))
            .collect::<Vec<_>>(),
    );
}

/// What comes behind `what` in the lines of standard error, up to the first character that is no hexadecimal digit.
fn entries(ran: &Ran, what: &str) -> Vec<String> {
    let behind = ran.stderr.lines().filter_map(|line| line.split_once(what));
    behind.map(|(_, rest)| rest.chars().take_while(char::is_ascii_hexdigit).collect()).collect()
}

/// Once 256 of a table were listed: who looks for the guest offsets that are lost needs all of them.
#[test]
fn every_wrong_entry_of_a_table_is_listed_as_by_qemu_img() {
    let home = scratch();
    let path = home.path().join("bad.qcow2");
    // One table of 64 KiB, full.
    qemu::create("qcow2", &path, 512 << 20, "preallocation=metadata");
    let image = Image::open(&path);
    let table = image.active()[0].host;
    let words = image.read(table, 64 << 10);
    for (at, word) in (table..).step_by(8).zip(words.as_chunks::<8>().0) {
        patch(&path, at, &(u64::from_be_bytes(*word) & !(1 << 63)).to_be_bytes());
    }
    let (different, ours, theirs) = differences(&path);
    assert!(different.is_empty(), "{different:?}");
    let [ours, theirs] =
        [ours, theirs].map(|verdict| entries(&verdict.ran, "ERROR OFLAG_COPIED data cluster: l2_entry="));
    assert_eq!(theirs.len(), 8192);
    assert_eq!(ours, theirs);
}

#[test]
fn more_damage_than_is_listed_is_counted_as_by_qemu_img() {
    let home = scratch();
    let (raw, path) = (home.path().join("noise.raw"), home.path().join("bad.qcow2"));
    fs::write(&raw, Random::new(7).bytes(4 << 20)).unwrap();
    qemu::img(args!["convert", "-q", "-O", "qcow2", raw, path]).ok();
    // An L1 table of twelve thousand entries, most of which are the noise behind it.
    patch(&path, 36, &0x3001u32.to_be_bytes());
    let (different, ours, theirs) = differences(&path);
    assert!(different.is_empty(), "{different:?}");
    let [lines, theirs] = [&ours, &theirs].map(|verdict| verdict.ran.stderr.lines().count());
    assert!(theirs > 10_001, "{theirs} lines");
    assert_eq!(lines, 10_001);
    for threads in ["1", "5"] {
        let again = dedup_img(args!["check", "--threads", threads, path]);
        assert!(again.stderr == ours.ran.stderr, "other findings with --threads {threads}");
    }
}
