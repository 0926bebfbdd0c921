//! `check -r`: what it mends is clean for qemu-img too, no content changes, and the power may fail at any moment (I3).

use crate::args;
use crate::support::crash::CrashStorage;
use crate::support::reader::{Image, Pin, verify_dedup};
use crate::support::{Random, dedup_img, qemu, scratch};
use dedup_img::{CheckOptions, Repair, Work, WorkOptions, repair};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// An image of a kind, with the names of its snapshots.
struct Sample {
    home: TempDir,
    path: PathBuf,
    snapshots: Vec<String>,
}

/// Images whose structure a repair must get right: plain, snapshots that share L2 tables, compressed, bitmaps, other widths, a pool.
fn samples() -> Vec<(&'static str, Sample)> {
    let kinds = ["plain", "version 2", "snapshots", "compressed", "bitmap and snapshot", "1 bit", "64 bits", "pool"];
    kinds.into_iter().map(|kind| (kind, sample(kind))).collect()
}

fn sample(kind: &str) -> Sample {
    let home = scratch();
    let [raw, path] = ["content.raw", "image.qcow2"].map(|name| home.path().join(name));
    let mut random = Random::new(5);
    let same = random.bytes(64 << 10);
    let disk: Vec<u8> = (0..14).flat_map(|n| if n % 3 == 0 { same.clone() } else { random.bytes(64 << 10) }).collect();
    fs::write(&raw, disk).unwrap();
    match kind {
        "pool" => drop(dedup_img(args!["convert", "-q", "-f", "raw", "-o", "cluster_size=4k", &raw, &path]).ok()),
        "compressed" => drop(qemu::convert("raw", &raw, "qcow2", &path, &["-c", "-o", "cluster_size=16k"])),
        "version 2" => drop(qemu::convert("raw", &raw, "qcow2", &path, &["-o", "compat=0.10,cluster_size=4k"])),
        "1 bit" => drop(qemu::convert("raw", &raw, "qcow2", &path, &["-o", "refcount_bits=1,cluster_size=4k"])),
        "64 bits" => drop(qemu::convert("raw", &raw, "qcow2", &path, &["-o", "refcount_bits=64,cluster_size=4k"])),
        _ => drop(qemu::convert("raw", &raw, "qcow2", &path, &["-o", "cluster_size=4k"])),
    }
    let mut snapshots = Vec::new();
    if kind.contains("snapshot") {
        for name in ["one", "two"] {
            qemu::snapshot("-c", name, &path);
            snapshots.push(name.to_owned());
            qemu::io("qcow2", &path, &[format!("write -P {} {}k 40k", snapshots.len(), 100 * snapshots.len())]);
        }
    }
    if kind.contains("bitmap") {
        qemu::img(args!["bitmap", "--add", &path, "changes"]).ok();
    }
    Sample { home, path, snapshots }
}

impl Sample {
    /// What a guest reads from the disk and from each snapshot of the image in `file`.
    fn contents(&self, file: &Path) -> Vec<Vec<u8>> {
        let raw = self.home.path().join("read.raw");
        let names = self.snapshots.iter().map(|name| Some(name.as_str()));
        let read = |name: Option<&str>| {
            let which = name.map(|name| format!("snapshot.name={name}"));
            let more: Vec<&str> = which.iter().flat_map(|which| ["-l", which.as_str()]).collect();
            qemu::convert("qcow2", file, "raw", &raw, &more);
            fs::read(&raw).unwrap()
        };
        std::iter::once(None).chain(names).map(read).collect()
    }
}

/// Damages refcounts, the refcount table or COPIED flags at random, and says how.
fn damage(bytes: &mut [u8], image: &Image, random: &mut Random) -> String {
    let number = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let table = image.header.refcount_table_offset as usize;
    let block = number(bytes, table) as usize;
    let l1 = image.header.l1_table_offset as usize;
    let l2 = (number(bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let slot = 8 * random.below(64) as usize;
    let (what, at, value) = match random.below(7) {
        0 => ("refcounts are lost", block + slot, 0),
        1 => ("refcounts are random", block + slot, random.next()),
        2 => ("refcounts are high", block + slot, number(bytes, block + slot) | 0x0101_0101_0101_0101),
        3 => ("the refcount table points nowhere", table, 0x7000_0000_0000),
        4 => ("the refcount table points between clusters", table, block as u64 + 512),
        5 => ("COPIED of the L2 table is wrong", l1, number(bytes, l1) ^ 1 << 63),
        _ => {
            let entry = number(bytes, l2 + slot);
            // Neither a compressed nor an empty entry has the flag.
            let standard = entry >> 62 & 1 == 0 && entry & 0x00ff_ffff_ffff_fe00 != 0;
            ("COPIED of data is wrong", l2 + slot, if standard { entry ^ 1 << 63 } else { entry })
        }
    };
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    format!("{what} at {at:#x}")
}

/// Mends `storage` as `check -r all` does.
fn mend(storage: &CrashStorage) {
    let work = Work::new(WorkOptions { threads: Some(1), ..WorkOptions::default() }).unwrap();
    let repaired = repair(storage, Repair::All, CheckOptions::default(), &work, &mut |_| {}).unwrap();
    assert_eq!((repaired.report.corruptions, repaired.report.leaks, repaired.report.check_errors), (0, 0, 0));
}

#[test]
fn what_is_mended_is_clean_and_unchanged() {
    for (kind, sample) in samples() {
        let whole = fs::read(&sample.path).unwrap();
        let expected = sample.contents(&sample.path);
        let snapshots = qemu::snapshots(&sample.path);
        let image = Image::open(&sample.path);
        let mut random = Random::new(23);
        let damaged = sample.home.path().join("damaged.qcow2");
        for _ in 0..8 {
            let mut bytes = whole.clone();
            let told: Vec<String> = (0..2).map(|_| damage(&mut bytes, &image, &mut random)).collect();
            fs::write(&damaged, bytes).unwrap();
            dedup_img(args!["check", "-q", "-r", "all", &damaged]).ok();
            qemu::check_clean(&damaged);
            assert_eq!(sample.contents(&damaged), expected, "{kind}: {told:?}");
            assert_eq!(qemu::snapshots(&damaged), snapshots, "{kind}: {told:?}");
        }
    }
}

/// Where qemu-img's own repair loses a snapshot or a bitmap.
#[test]
fn bitmaps_and_snapshots_survive_a_repair() {
    let sample = sample("bitmap and snapshot");
    let image = Image::open(&sample.path);
    let mut bytes = fs::read(&sample.path).unwrap();
    let at = image.header.refcount_table_offset as usize;
    bytes[at..at + 8].fill(0);
    // An autoclear bit that nobody knows must go when somebody writes, and nothing else with it.
    bytes[88] = 0x10;
    fs::write(&sample.path, bytes).unwrap();
    let expected = sample.contents(&sample.path);
    dedup_img(args!["check", "-q", "-r", "all", &sample.path]).ok();
    assert_eq!(fs::read(&sample.path).unwrap()[88..96], [0, 0, 0, 0, 0, 0, 0, 1]);
    qemu::check_clean(&sample.path);
    assert_eq!(sample.contents(&sample.path), expected);
    let info = qemu::info("qcow2", &sample.path);
    assert_eq!(info["format-specific"]["data"]["bitmaps"][0]["name"], "changes");
    assert_eq!(info["snapshots"].as_array().map(Vec::len), Some(2));
}

/// A zero cluster whose preallocated place is no cluster reads as zeros before and after.
#[test]
fn misplaced_preallocations_are_dropped() {
    let sample = sample("version 2");
    qemu::img(args!["amend", "-o", "compat=1.1", &sample.path]).ok();
    qemu::io("qcow2", &sample.path, &["write -z 128k 64k".to_owned()]);
    let expected = sample.contents(&sample.path);
    let image = Image::open(&sample.path);
    let entry = image.active()[0].host + 8 * 33;
    let mut bytes = fs::read(&sample.path).unwrap();
    bytes[entry as usize..entry as usize + 8].copy_from_slice(&0x5201u64.to_be_bytes());
    fs::write(&sample.path, bytes).unwrap();
    assert_eq!(dedup_img(args!["check", "-q", &sample.path]).code, 2);
    let storage = CrashStorage::open(&sample.path);
    mend(&storage);
    let states = storage.every_crash(3, |crashed, when| {
        fs::write(&sample.path, crashed).unwrap();
        // QEMU reports an error for the damaged cluster itself until it is mended.
        dedup_img(args!["check", "-q", "-r", "all", &sample.path]).ok();
        qemu::check_clean(&sample.path);
        assert_eq!(sample.contents(&sample.path), expected, "{when}, repaired");
    });
    assert!(states > 4, "only {states} states");
}

#[test]
fn leaks_alone_are_freed_and_nothing_else_is_touched() {
    let sample = sample("plain");
    let image = Image::open(&sample.path);
    let expected = sample.contents(&sample.path);
    qemu::io("qcow2", &sample.path, &["discard 0 64k".to_owned()]);
    let mut bytes = fs::read(&sample.path).unwrap();
    let table = image.header.refcount_table_offset as usize;
    let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap()) as usize;
    // 16-bit refcounts of clusters behind the file's end are nobody's; these are of the freed ones.
    let freed = (0..2048).find(|n| bytes[block + 2 * n..block + 2 * n + 2] == [0, 0]).unwrap();
    bytes[block + 2 * freed + 1] = 3;
    fs::write(&sample.path, bytes).unwrap();
    assert_eq!(dedup_img(args!["check", "-q", &sample.path]).code, 3);
    let ran = dedup_img(args!["check", "-r", "leaks", &sample.path]).ok();
    assert!(
        ran.stdout.starts_with("The following inconsistencies were found and repaired:\n\n    1 leaked clusters\n")
    );
    qemu::check_clean(&sample.path);
    assert_eq!(sample.contents(&sample.path)[0][64 << 10..], expected[0][64 << 10..]);
}

/// The directory is disposable: it is made anew, and the independent reader finds nothing wrong with it.
#[test]
fn a_damaged_pool_directory_is_written_anew() {
    let sample = sample("pool");
    let expected = sample.contents(&sample.path);
    let whole = fs::read(&sample.path).unwrap();
    let magic = whole.windows(8).position(|bytes| bytes == b"DDUPPOOL").unwrap();
    for at in [magic + 3, magic + 70, magic + 130, magic + 165] {
        let mut bytes = whole.clone();
        bytes[at] ^= 4;
        fs::write(&sample.path, bytes).unwrap();
        assert!(dedup_img(args!["check", &sample.path]).ok().stderr.contains("directory is not used"));
        dedup_img(args!["check", "-q", "-r", "all", &sample.path]).ok();
        qemu::check_clean(&sample.path);
        assert!(fs::read(&sample.path).unwrap() == whole, "the directory is as convert wrote it");
        verify_dedup(&sample.path, Pin::Shared);
    }
    assert_eq!(sample.contents(&sample.path), expected);
}

#[test]
fn what_cannot_be_mended_is_named_and_nothing_is_written() {
    let sample = sample("plain");
    let image = Image::open(&sample.path);
    let mut bytes = fs::read(&sample.path).unwrap();
    let at = image.header.l1_table_offset as usize;
    bytes[at..at + 8].copy_from_slice(&(1u64 << 63 | 1 << 40).to_be_bytes());
    fs::write(&sample.path, &bytes).unwrap();
    let ran = dedup_img(args!["check", "-r", "all", &sample.path]);
    assert_eq!(ran.code, 2, "{}", ran.told());
    assert!(
        ran.stderr.contains("nothing was repaired, because this cannot be: ERROR: counting reference"),
        "{}",
        ran.told()
    );
    assert!(fs::read(&sample.path).unwrap() == bytes);
}

/// I1 and I3: at every point a power failure leaves every guest byte readable, and the next repair ends clean.
#[test]
fn a_repair_may_be_interrupted_at_any_write() {
    let mut states = 0;
    for (kind, sample) in samples() {
        let expected = sample.contents(&sample.path);
        let image = Image::open(&sample.path);
        let whole = fs::read(&sample.path).unwrap();
        let mut random = Random::new(31);
        let file = sample.home.path().join("crashed.qcow2");
        for round in 0..10 {
            let mut bytes = whole.clone();
            let told = damage(&mut bytes, &image, &mut random);
            fs::write(&file, bytes).unwrap();
            let storage = CrashStorage::open(&file);
            mend(&storage);
            states += storage.every_crash(round, |crashed, when| {
                fs::write(&file, crashed).unwrap();
                assert_eq!(sample.contents(&file), expected, "{kind}, {told}, {when}");
                dedup_img(args!["check", "-q", "-r", "all", &file]).ok();
                qemu::check_clean(&file);
                assert_eq!(sample.contents(&file), expected, "{kind}, {told}, {when}, repaired");
            });
            fs::write(&file, storage.now()).unwrap();
            qemu::check_clean(&file);
        }
    }
    assert!(states > 150, "only {states} states");
}
