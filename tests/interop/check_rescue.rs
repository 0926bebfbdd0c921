//! Ways out for images that are no good as they are: marked corrupt, with a snapshot table of a careless program, with clusters that two
//! parts claim, not closed cleanly.

use crate::args;
use crate::support::corpus::patch;
use crate::support::crash::CrashStorage;
use crate::support::reader::Image;
use crate::support::{Ran, dedup_img, qemu, scratch};
use dedup_img::{CheckOptions, Repair, Repaired, Work, WorkOptions, repair};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A MiB in clusters of 4 KiB with these qemu-io commands, and what else `options` say.
fn image(options: &str, commands: &[&str]) -> (TempDir, PathBuf) {
    let home = scratch();
    let path = home.path().join("image.qcow2");
    qemu::create("qcow2", &path, 1 << 20, &format!("cluster_size=4k{options}"));
    let commands: Vec<String> = commands.iter().map(|command| (*command).to_owned()).collect();
    qemu::io("qcow2", &path, &commands);
    (home, path)
}

fn check(path: &Path, more: &[&str]) -> Ran {
    let words = args!["check", "-f", "qcow2"].into_iter().chain(more.iter().map(Into::into));
    dedup_img(words.chain(args![path]))
}

/// What a guest reads of the disk, or of a snapshot.
fn content(path: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let raw = path.with_extension("raw");
    let which = snapshot.map(|name| format!("snapshot.name={name}"));
    let more: Vec<&str> = which.iter().flat_map(|which| ["-l", which.as_str()]).collect();
    qemu::convert("qcow2", path, "raw", &raw, &more);
    fs::read(raw).unwrap()
}

fn mend(storage: &CrashStorage) -> Repaired {
    let work = Work::new(WorkOptions { threads: Some(1), ..WorkOptions::default() }).unwrap();
    repair(storage, Repair::All, CheckOptions::default(), &work, &mut |_| {}).unwrap()
}

fn is_marked(path: &Path) -> bool {
    fs::read(path).unwrap()[79] & 2 != 0
}

#[test]
fn the_corrupt_mark_is_mentioned_and_goes_as_with_qemu_img() {
    for repair in ["leaks", "all"] {
        let (_home, path) = image("", &["write -P 7 0 128k"]);
        patch(&path, 79, &[2]);
        let ran = check(&path, &[]);
        assert_eq!((ran.code, qemu::check(&path).code), (0, 0), "{}", ran.told());
        assert!(ran.stderr.contains("marked corrupt") && is_marked(&path), "{}", ran.told());
        let theirs = path.with_extension("theirs");
        fs::copy(&path, &theirs).unwrap();
        qemu::img(args!["check", "-r", repair, theirs]).ok();
        let ran = check(&path, &["-r", repair]).ok();
        assert!(ran.stdout.contains("the mark was taken away"), "{}", ran.told());
        assert!(fs::read(&path).unwrap() == fs::read(&theirs).unwrap());
        assert_eq!(dedup_img(args!["convert", "-q", path, path.with_extension("copy")]).ok().text(), "");
    }
}

/// Where something is wrong that cannot be mended, the mark stays.
#[test]
fn the_corrupt_mark_stays_on_what_is_damaged() {
    let (_home, path) = image("", &["write -P 7 0 128k"]);
    patch(&path, 79, &[2]);
    let table = Image::open(&path).active()[0].host;
    patch(&path, table + 7, &[2]);
    let ran = check(&path, &["-r", "all"]);
    assert!(ran.code == 2 && ran.stderr.contains("nothing was repaired") && is_marked(&path), "{}", ran.told());
}

#[test]
fn a_refused_repair_prints_its_result() {
    let (_home, path) = image("", &["write -P 7 0 128k"]);
    let table = Image::open(&path).active()[0].host;
    patch(&path, table + 7, &[2]);
    let before = fs::read(&path).unwrap();
    let theirs = path.with_extension("theirs");
    fs::copy(&path, &theirs).unwrap();
    let judged = qemu::img(args!["check", "-r", "all", "--output", "json", theirs]);
    let ran = check(&path, &["-r", "all", "--output", "json"]);
    assert_eq!((ran.code, judged.code), (2, 2), "{}", ran.told());
    let [ours, theirs]: [Value; 2] = [&ran, &judged].map(|ran| serde_json::from_str(&ran.stdout).unwrap());
    for key in ["image-end-offset", "total-clusters", "allocated-clusters", "corruptions", "check-errors"] {
        assert_eq!(ours[key], theirs[key], "{key}: {}", ran.told());
    }
    assert!(ours["refused"].as_str().unwrap().starts_with("nothing was repaired"), "{}", ran.told());
    let ran = check(&path, &["-r", "all"]);
    assert!(ran.code == 2 && ran.stdout.contains("Image end offset:"), "{}", ran.told());
    assert!(fs::read(&path).unwrap() == before);
}

/// Writes the snapshot table anew in its place, with the extra data that `extra` makes of that of each entry.
fn with_extra(path: &Path, extra: impl Fn(usize, &[u8]) -> Vec<u8>) {
    let mut bytes = fs::read(path).unwrap();
    let number = |at: usize, length: usize| {
        bytes[at..at + length].iter().fold(0usize, |number, byte| number << 8 | usize::from(*byte))
    };
    let (count, start) = (number(60, 4), number(64, 8));
    let (mut at, mut table) = (start, Vec::new());
    for index in 0..count {
        let (names, length) = (number(at + 12, 2) + number(at + 14, 2), number(at + 36, 4));
        let extra = extra(index, &bytes[at + 40..at + 40 + length]);
        table.extend_from_slice(&bytes[at..at + 36]);
        table.extend_from_slice(&(extra.len() as u32).to_be_bytes());
        table.extend_from_slice(&extra);
        table.extend_from_slice(&bytes[at + 40 + length..at + 40 + length + names]);
        table.resize(table.len().next_multiple_of(8), 0);
        at += (40 + length + names).next_multiple_of(8);
    }
    assert!(table.len() <= 4096, "the table has one cluster");
    bytes[start..start + table.len()].copy_from_slice(&table);
    fs::write(path, bytes).unwrap();
}

/// An image with two snapshots, whose table has `extra` data.
fn snapshots(extra: impl Fn(usize, &[u8]) -> Vec<u8>) -> (TempDir, PathBuf) {
    let (home, path) = image("", &["write -P 7 0 128k"]);
    for (name, byte) in [("one", 1), ("two", 2)] {
        qemu::snapshot("-c", name, &path).ok();
        qemu::io("qcow2", &path, &[format!("write -P {byte} 64k 40k")]);
    }
    with_extra(&path, extra);
    (home, path)
}

type Extra = fn(usize, &[u8]) -> Vec<u8>;
const EXTRAS: [(&str, Extra); 4] = [
    ("one has no 64-bit sizes", |index, extra| if index == 0 { Vec::new() } else { extra.to_vec() }),
    ("both lack the disk size", |_, extra| extra[..8].to_vec()),
    ("one has too much", |index, extra| [extra, &vec![b'x'; if index == 1 { 1500 } else { 0 }]].concat()),
    (
        "one has too little, one too much",
        |index, extra| if index == 0 { Vec::new() } else { [extra, &[0; 1500]].concat() },
    ),
];

#[test]
fn entries_of_the_snapshot_table_are_mended_as_by_qemu_img() {
    for (kind, extra) in EXTRAS {
        let (_home, path) = snapshots(extra);
        let disk = content_by_us(&path);
        let theirs = path.with_extension("theirs");
        fs::copy(&path, &theirs).unwrap();
        assert_eq!(check(&path, &[]).code, qemu::check(&path).code, "{kind}");
        qemu::img(args!["check", "-q", "-r", "all", theirs]).ok();
        check(&path, &["-q", "-r", "all"]).ok();
        qemu::check_clean(&path);
        assert_eq!(qemu::info("qcow2", &path)["snapshots"], qemu::info("qcow2", &theirs)["snapshots"], "{kind}");
        for name in [None, Some("one"), Some("two")] {
            assert!(content(&path, name) == content(&theirs, name), "{kind}, {name:?}");
        }
        assert!(content(&path, None) == disk);
    }
}

/// The disk of an image that QEMU may refuse to open for its snapshots.
fn content_by_us(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    dedup_img(args!["convert", "-q", "-t", "unsafe", "--salvage", "-O", "raw", path, raw]).ok();
    fs::read(raw).unwrap()
}

/// A wrong length would make an id and a name of other bytes, and entries of others: qemu-img takes them as they come.
#[test]
fn a_snapshot_table_that_makes_no_sense_is_not_written_anew() {
    for length in [0u32, 8, 1032, 1 << 20] {
        let (_home, path) = snapshots(|_, extra| extra.to_vec());
        let at = Image::open(&path).header.snapshots_offset;
        patch(&path, at + 36, &length.to_be_bytes());
        let before = fs::read(&path).unwrap();
        let ran = check(&path, &["-r", "all"]);
        // What follows the wrong length may be anything: too long for a table, for one.
        assert!(matches!(ran.code, 1 | 2), "{length}: {}", ran.told());
        assert!(fs::read(&path).unwrap() == before, "{length}");
    }
}

/// I1 and I3 for the repairs of this page: `damaged` may be interrupted at any write and is mended by the next repair.
fn may_be_interrupted(kind: &str, path: &Path, names: &[&str], clean: bool) {
    let read = |path: &Path| names.iter().map(|name| content(path, Some(name))).collect::<Vec<_>>();
    let (disk, damaged) = (content_by_us(path), fs::read(path).unwrap());
    let storage = CrashStorage::of(damaged);
    let repaired = mend(&storage);
    assert!(repaired.refused.is_none(), "{kind}: {repaired:?}");
    fs::write(path, storage.now()).unwrap();
    let due = read(path);
    let end = check(path, &[]).code;
    assert!(!clean || end == 0, "{kind}: the end is {end}");
    assert!(matches!(qemu::check(path).code, 0 | 3), "{kind}");
    let states = storage.every_crash(7, |crashed, when| {
        fs::write(path, crashed).unwrap();
        assert!(content_by_us(path) == disk, "{kind}, {when}");
        let ran = check(path, &["-q", "-r", "all"]);
        assert_eq!(ran.code, end, "{kind}, {when}: {}", ran.told());
        assert!(content(path, None) == disk && read(path) == due, "{kind}, {when}, repaired");
    });
    assert!(states > 5, "{kind}: only {states} states");
}

#[test]
fn a_repair_of_the_snapshot_table_may_be_interrupted_at_any_write() {
    for (kind, extra) in EXTRAS {
        let (_home, path) = snapshots(extra);
        may_be_interrupted(kind, &path, &["one", "two"], true);
        // With new refcounts, too: both switch in one sector.
        let (_home, path) = snapshots(extra);
        let table = Image::open(&path).header.refcount_table_offset;
        patch(&path, table, &0x7fff_ffff_ffff_0000u64.to_be_bytes());
        may_be_interrupted(&format!("{kind}, and no refcounts"), &path, &["one", "two"], true);
    }
}

/// Finds a wrong place.
type Offset = fn(&Image) -> u64;

/// The places of zero clusters that are none of theirs: between clusters, behind the end, on metadata.
#[test]
fn zero_clusters_lose_places_that_are_none_of_theirs() {
    let offsets: [(&str, Offset); 6] = [
        ("between clusters, on the header", |_| 0x200),
        ("between clusters, behind the end", |_| 0x152a_2a00),
        ("behind the end", |image| image.length.next_multiple_of(4096) + 0x10000),
        ("on the L1 table", |image| image.header.l1_table_offset),
        ("on its own L2 table", |image| image.active()[0].host),
        ("on a refcount block", |image| image.refcount_blocks()[0]),
    ];
    for (kind, offset) in offsets {
        let (_home, path) = image("", &["write -P 7 0 128k", "write -z 0 64k"]);
        let due = content(&path, None);
        let image = Image::open(&path);
        patch(&path, image.active()[0].host, &(1 << 63 | offset(&image) | 1).to_be_bytes());
        assert_eq!(check(&path, &["-q"]).code, 2, "{kind}");
        may_be_interrupted(kind, &path, &[], true);
        check(&path, &["-q", "-r", "all"]).ok();
        qemu::check_clean(&path);
        assert!(content(&path, None) == due, "{kind}");
    }
}

/// Data on a snapshot's table, as QEMU's write protection meets it: with counts that say so, both can be used, and both stay what they
/// are. What the entry led to before is kept.
#[test]
fn what_two_parts_claim_is_made_safe_to_write_and_nothing_is_freed() {
    let (_home, path) = image("", &["write -P 7 0 128k"]);
    qemu::snapshot("-c", "s", &path).ok();
    qemu::io("qcow2", &path, &["write -P 9 4k 4k".to_owned()]);
    let snapshot = content(&path, Some("s"));
    let sound = Image::open(&path);
    let inactive = sound.tables(sound.snapshots().0[0].l1_table_offset, sound.snapshots().0[0].l1_size)[0].host;
    patch(&path, sound.active()[0].host + 8, &(1 << 63 | inactive).to_be_bytes());
    patch(&path, 79, &[2]);
    let disk = content(&path, None);
    let damaged = fs::read(&path).unwrap();
    let ran = check(&path, &["-r", "all"]);
    assert!(ran.code == 2 && ran.stderr.contains("leaked clusters were kept"), "{}", ran.told());
    assert!(ran.stderr.contains("is claimed twice") && !is_marked(&path), "{}", ran.told());
    assert_eq!(qemu::check(&path).code, 3, "leaks, and nothing else");
    assert!(content(&path, None) == disk && content(&path, Some("s")) == snapshot);
    qemu::io("qcow2", &path, &["write -P 5 4k 4k".to_owned()]);
    assert!(content(&path, Some("s")) == snapshot, "a write harms the snapshot");
    assert_eq!(check(&path, &["-q"]).code, 3, "the write has parted them");
    check(&path, &["-q", "-r", "all"]).ok();
    fs::write(&path, damaged).unwrap();
    may_be_interrupted("data on an inactive L2 table", &path, &["s"], false);
}

/// Flags are not written into a table that may be something else.
#[test]
fn a_table_that_is_also_data_is_not_touched() {
    let (_home, path) = image("", &["write -P 7 0 128k"]);
    let table = Image::open(&path).active()[0].host;
    patch(&path, table, &(1 << 63 | table).to_be_bytes());
    let before = fs::read(&path).unwrap();
    let ran = check(&path, &["-r", "all"]);
    assert!(ran.code == 2 && ran.stderr.contains("nothing was repaired"), "{}", ran.told());
    assert!(fs::read(&path).unwrap() == before);
}

/// A refcount block that lies where no file reaches, as QEMU sees it.
#[test]
fn a_refcount_block_behind_every_file_is_made_anew() {
    for place in [0x7fff_ffff_ffff_f000u64, 0x7fff_ffff_c000_0000, 0x7fff_ffff_bfff_f000, 1 << 63, u64::MAX << 12] {
        let (_home, path) = image("", &["write -P 7 0 128k"]);
        let disk = content(&path, None);
        patch(&path, Image::open(&path).header.refcount_table_offset, &place.to_be_bytes());
        assert_eq!(check(&path, &["-q"]).code, qemu::check(&path).code, "{place:#x}");
        check(&path, &["-q", "-r", "all"]).ok();
        qemu::check_clean(&path);
        assert!(content(&path, None) == disk);
    }
}

/// An image whose refcounts a writer postponed until it was killed.
fn unclean() -> (TempDir, PathBuf) {
    let (home, path) = image(",lazy_refcounts=on", &["write -P 7 0 128k"]);
    let writes = ["write -P 7 256k 64k", "write -P 8 512k 64k", "flush", "sigraise 9"];
    qemu::io_try("qcow2", &path, &writes.map(str::to_owned));
    assert!(fs::read(&path).unwrap()[79] & 1 == 1 && qemu::check(&path).code == 2, "it is not clean");
    (home, path)
}

#[test]
fn an_image_that_was_not_closed_cleanly_is_repaired_before_it_is_changed() {
    for command in [&["dedup"][..], &["gc"], &["gc", "--compact"], &["dedup", "--pin", "all"]] {
        let (_home, path) = unclean();
        let (disk, before) = (content(&path, None), fs::read(&path).unwrap());
        let run = |more: &[&str]| {
            let words = command.iter().chain(more).map(Into::into);
            dedup_img(words.chain(args![path])).ok()
        };
        let ran = run(&["--dry-run"]);
        assert!(ran.stderr.contains("would be repaired first"), "{}", ran.told());
        assert!(fs::read(&path).unwrap() == before);
        let ran = run(&[]);
        assert!(ran.stderr.contains("were repaired first"), "{}", ran.told());
        qemu::check_clean(&path);
        assert!(fs::read(&path).unwrap()[79] & 1 == 0 && content(&path, None) == disk, "{command:?}");
    }
}

#[test]
fn an_image_that_was_not_closed_cleanly_is_read_and_written_into() {
    let (home, path) = unclean();
    let copy = home.path().join("copy");
    dedup_img(args!["convert", "-q", path, copy]).ok();
    qemu::compare_same("qcow2", &path, "qcow2", &copy);
    assert_eq!(dedup_img(args!["stats", path]).ok().stderr, "");
    let source = home.path().join("source.raw");
    fs::write(&source, vec![3; 1 << 20]).unwrap();
    let ran = dedup_img(args!["convert", "-n", "-f", "raw", source, path]).ok();
    assert!(ran.stderr.contains("were repaired first"), "{}", ran.told());
    qemu::check_clean(&path);
    qemu::compare_same("raw", &source, "qcow2", &path);
}

/// Damage beyond refcounts is refused as ever, and nothing is written.
#[test]
fn an_unclean_image_that_is_damaged_is_refused() {
    let (_home, path) = unclean();
    patch(&path, Image::open(&path).active()[0].host + 7, &[2]);
    let before = fs::read(&path).unwrap();
    for command in ["dedup", "gc"] {
        let ran = dedup_img(args![command, "-q", path]);
        assert!(ran.code == 1 && ran.stderr.contains("is damaged"), "{}", ran.told());
        assert!(fs::read(&path).unwrap() == before);
    }
}
