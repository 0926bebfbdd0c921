//! What every test of a command that works in place asks: did the content stay, is it clean, and did what was foretold come true?

use crate::args;
use crate::support::reader::{Image, Pin, Survey, verify_deduped};
use crate::support::{dedup_img, qemu, scratch, sha256_of};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tempfile::TempDir;

/// The arguments of `dedup` with further options.
pub(super) fn words(path: &Path, options: &[&str]) -> Vec<OsString> {
    let words = args!["dedup", "-f", "qcow2", "--output", "json"].into_iter();
    words.chain(options.iter().map(OsString::from)).chain(args![path]).collect()
}

/// Deduplicates and returns the summary.
#[track_caller]
pub(super) fn dedup(path: &Path, options: &[&str]) -> Value {
    let ran = dedup_img(words(path, options)).ok();
    assert_eq!(ran.stderr, "", "{}", ran.told());
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()))
}

/// A number of a summary.
#[track_caller]
pub(super) fn told(summary: &Value, key: &str) -> u64 {
    summary[key].as_u64().unwrap_or_else(|| panic!("no {key} in {summary:#}"))
}

/// Deduplicates, and demands that the figures foretold by `--dry-run` come true, that qemu-img and `check` find nothing, and that
/// the image is what the design promises. Returns the summary, and what was stored before and is after.
#[track_caller]
pub(super) fn judged(path: &Path, pin: Pin, options: &[&str]) -> (Value, Survey, Survey) {
    let before = Survey::of(path);
    let foretold = dry_run(path, options);
    let moves = planned(&foretold, &before);
    figures(&foretold, &before, &moves);
    let summary = dedup(path, options);
    for key in FORETOLD {
        assert_eq!(
            summary[key],
            foretold[key],
            "{key} of {}, foretold: {foretold:#}, done: {summary:#}",
            path.display()
        );
    }
    qemu::check_clean(path);
    dedup_img(args!["check", "--data", path]).ok();
    let after = verify_deduped(path, pin, &before);
    assert_eq!(told(&summary, "pool_members"), after.members().len() as u64, "{summary:#}");
    assert_eq!(told(&summary, "file_length_after_bytes"), after.file_length, "{summary:#}");
    for (old, new) in before.layers.iter().zip(&after.layers) {
        let moved = |(guest, word): (&u64, &u64)| Some((*guest, moves.get(word).copied().unwrap_or(Some(*word))?));
        let due: BTreeMap<u64, u64> = old.map.iter().filter_map(moved).collect();
        assert!(due == new.map, "layer {:?} is not what was planned", old.name);
    }
    // Zeros hide whatever a backing file may have there one day, so none of them becomes absent.
    let zeros = moves.iter().filter(|(_, to)| to.is_none());
    let zeroed: u64 = zeros.filter_map(|(word, _)| Some(before.stored.get(word)?.references)).sum();
    assert_eq!(after.zero_flagged, before.zero_flagged + before.kept_zeros + zeroed, "{}", path.display());
    (summary, before, after)
}

/// Figures that a dry run tells as well.
const FORETOLD: [&str; 12] = [
    "cluster_size_bytes",
    "scanned_clusters",
    "read_clusters",
    "zero_clusters",
    "duplicate_clusters",
    "newly_shared_clusters",
    "already_shared_clusters",
    "freed_clusters",
    "freed_bytes",
    "leaked_clusters",
    "pool_members",
    "upgraded",
];

/// What must not change where a file is only looked at.
pub(super) fn state(path: &Path) -> (String, SystemTime) {
    (sha256_of(path), path.metadata().unwrap().modified().unwrap())
}

/// Runs `--dry-run` on a file that may not be written, which stays as it is.
#[track_caller]
fn dry_run(path: &Path, options: &[&str]) -> Value {
    let (before, rights) = (state(path), path.metadata().unwrap().permissions());
    let mut closed = rights.clone();
    closed.set_readonly(true);
    fs::set_permissions(path, closed).unwrap();
    let summary = dedup(path, &[options, &["--dry-run"]].concat());
    fs::set_permissions(path, rights).unwrap();
    assert_eq!(state(path), before, "{} was touched", path.display());
    assert_eq!(summary["dry_run"], true, "{summary:#}");
    summary
}

/// What becomes of each L2 entry by the plan of a dry run: another one, or none. It joins only what holds the same bytes, and tells
/// how many references change.
#[track_caller]
fn planned(foretold: &Value, before: &Survey) -> BTreeMap<u64, Option<u64>> {
    let words = before.stored.keys().chain(before.members());
    let by_host: BTreeMap<u64, u64> = words.map(|word| (before.host(*word), *word)).collect();
    let names = before.contents(by_host.values().copied());
    let mut moves = BTreeMap::new();
    for share in foretold["plan"]["share"].as_array().unwrap() {
        let [duplicate, keeper] = ["duplicate", "keeper"].map(|key| by_host[&told(share, key)]);
        assert_eq!(names[&duplicate], names[&keeper], "{share} joins what differs");
        let references = before.stored.get(&duplicate).map_or(0, |stored| stored.references);
        assert_eq!(told(share, "references"), references, "{share}");
        assert!(moves.insert(duplicate, Some(keeper)).is_none(), "{share} comes twice");
    }
    for host in foretold["plan"]["zero"].as_array().unwrap() {
        let zero = by_host[&host.as_u64().unwrap()];
        assert_eq!(names[&zero], None, "{host} holds more than zeros");
        assert!(moves.insert(zero, None).is_none(), "{host} comes twice");
    }
    moves
}

/// The figures are what the reader finds in the image, and what the plan says.
#[track_caller]
fn figures(foretold: &Value, before: &Survey, moves: &BTreeMap<u64, Option<u64>>) {
    let members: BTreeSet<u64> = before.members().iter().copied().collect();
    let used = |word: &u64| before.stored.contains_key(word);
    let keepers: BTreeSet<u64> = moves.values().copied().flatten().collect();
    let count = |n: usize| n as u64;
    for (key, due) in [
        ("scanned_clusters", count(before.stored.len())),
        ("zero_clusters", count(moves.values().filter(|to| to.is_none()).count())),
        ("duplicate_clusters", count(moves.iter().filter(|(from, to)| to.is_some() && used(from)).count())),
        ("newly_shared_clusters", count(keepers.difference(&members).count())),
        ("already_shared_clusters", count(members.iter().filter(|word| used(word)).count())),
        ("freed_bytes", told(foretold, "freed_clusters") * before.cluster_size),
    ] {
        assert_eq!(told(foretold, key), due, "{key}: {foretold:#}");
    }
    let unread = told(foretold, "scanned_clusters") - told(foretold, "already_shared_clusters");
    assert!(told(foretold, "read_clusters") <= unread, "members are not to be read: {foretold:#}");
    // Compressed clusters share host clusters, and zeros may keep places that other entries use as well.
    if before.kept_zeros == 0 && before.stored.keys().all(|word| word >> 62 == 0) {
        assert_eq!(told(foretold, "freed_clusters"), count(moves.len()), "{foretold:#}");
    }
}

/// A copy of an image to work on, with copies of all that it may need beside it.
pub(super) fn copied(image: &Path) -> (TempDir, PathBuf) {
    let home = scratch();
    let name = image.file_name().unwrap();
    if qemu::info("qcow2", image).get("backing-filename").is_none() {
        let copy = home.path().join(name);
        fs::copy(image, &copy).unwrap();
        return (home, copy);
    }
    let top = image.ancestors().find(|path| path.parent().is_some_and(|above| above.ends_with("fixtures"))).unwrap();
    mirror(top, home.path());
    let copy = home.path().join(image.strip_prefix(top).unwrap());
    (home, copy)
}

/// Copies all files below a directory.
fn mirror(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let copy = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&copy).unwrap();
            mirror(&entry.path(), &copy);
        } else {
            // A symbolic link would not be followed to a backing file; another hard link changes the file's times, and whoever
            // reads it in another test takes it for written.
            fs::copy(entry.path(), copy).unwrap();
        }
    }
}

/// Asserts that qemu-img finds no difference between two images, their sizes included.
#[track_caller]
pub(super) fn same(old: &Path, new: &Path, what: &str) {
    let ran = qemu::compare("qcow2", old, "qcow2", new);
    assert!(ran.code == 0 && !ran.text().contains("mismatch"), "{what}: {}", ran.told());
}

/// I1: the active disk and every snapshot of the user's hold the same in both images, as `convert -l` shows them and as going back
/// to them gives them, and going back leaves the new one clean.
#[track_caller]
pub(super) fn same_content(old: &Path, new: &Path) {
    same(old, new, "the disk");
    for (id, name) in qemu::snapshots(old).into_iter().filter(|(_, name)| name != "dedup-pool") {
        let beside =
            [(old, "old"), (new, "new")].map(|(path, age)| (path, path.with_file_name(format!("{age}.snapshot"))));
        for (path, out) in &beside {
            qemu::convert("qcow2", path, "qcow2", out, &["-l", &format!("snapshot.id={id}")]);
        }
        same(&beside[0].1, &beside[1].1, &format!("snapshot {name}"));
        for (path, out) in &beside {
            fs::copy(path, out).unwrap();
            qemu::snapshot("-a", &id, out).ok();
        }
        qemu::check_clean(&beside[1].1);
        same(&beside[0].1, &beside[1].1, &format!("going back to snapshot {name}"));
        beside.iter().for_each(|(_, out)| fs::remove_file(out).unwrap());
    }
}

/// What qemu-img shows of an image besides its content: snapshots other than the pool, bitmaps, features.
pub(super) fn shown(path: &Path) -> Value {
    let mut info = qemu::info("qcow2", path);
    let mut kept = serde_json::Map::new();
    for (key, value) in info["format-specific"]["data"].as_object_mut().unwrap() {
        if key != "compat"
            && key != "lazy-refcounts"
            && key != "refcount-bits"
            && key != "corrupt"
            && key != "extended-l2"
        {
            kept.insert(key.clone(), value.take());
        }
    }
    for key in ["virtual-size", "cluster-size", "backing-filename", "backing-filename-format"] {
        kept.insert(key.into(), info[key].take());
    }
    let snapshots = info["snapshots"].as_array().cloned().unwrap_or_default();
    let users = |snapshot: &Value| snapshot["name"] != "dedup-pool";
    kept.insert("snapshots".into(), snapshots.into_iter().filter(users).collect());
    Value::Object(kept)
}

/// Unknown header extensions, and the bitmaps' one: QEMU's own feature names may come and go.
pub(super) fn extensions(path: &Path) -> Vec<(u32, Vec<u8>)> {
    let kept = Image::open(path).extensions().into_iter();
    kept.filter(|(kind, _)| *kind != 0x6803_f857 && *kind != 0xe279_2aca).collect()
}
