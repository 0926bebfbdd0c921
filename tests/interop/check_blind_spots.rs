//! Damage that `qemu-img check` passes with 0 and ours finds; refcounts match it, as a careless program would leave them.

use crate::args;
use crate::support::corpus::patch;
use crate::support::reader::{Entry, Image, number};
use crate::support::subjects::{deduplicated, subject};
use crate::support::{Ran, dedup_img, qemu, scratch};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

/// Bits 9 to 55 of a table entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Finds a cluster of metadata.
type Place = fn(&Image) -> u64;

/// A copy of a sound image, to be damaged.
struct Victim {
    _home: TempDir,
    path: PathBuf,
}

impl Victim {
    /// A copy of one of the subjects.
    fn of(name: &str) -> Self {
        let home = scratch();
        let path = home.path().join("victim.qcow2");
        fs::copy(subject(name), &path).unwrap();
        Self { _home: home, path }
    }

    /// A fresh deduplicated image.
    fn pooled() -> Self {
        let home = scratch();
        let path = deduplicated(home.path(), "victim.qcow2", &[]);
        Self { _home: home, path }
    }

    fn image(&self) -> Image {
        Image::open(&self.path)
    }

    fn word(&self, at: u64) -> u64 {
        number(&self.image().read(at, 8), 0, 8)
    }

    fn put(&self, at: u64, word: u64) {
        patch(&self.path, at, &word.to_be_bytes());
    }

    /// Where the active L2 entries of data clusters are, the first table's first.
    fn data_entries(&self) -> Vec<u64> {
        let mut found = Vec::new();
        for table in self.image().active() {
            let slots = (0..).zip(&table.entries).filter(|(_, entry)| matches!(entry, Entry::Data { .. }));
            found.extend(slots.map(|(slot, _)| table.host + 8 * slot));
        }
        found
    }

    /// Sets the refcount, 16 bits wide, of the cluster at `host`.
    fn set_refcount(&self, host: u64, count: u16) {
        let image = self.image();
        assert_eq!(image.header.refcount_order, 4);
        let at = image.refcount_blocks()[0] + host / image.cluster_size() * 2;
        patch(&self.path, at, &count.to_be_bytes());
    }

    /// Clears COPIED throughout the active L1 table, where qemu-img would not write what lies on something else.
    fn uncopy(&self) {
        let header = self.image().header;
        for at in (0..u64::from(header.l1_size)).map(|index| header.l1_table_offset + index * 8) {
            self.put(at, self.word(at) & !(1 << 63));
        }
    }

    /// Lets qemu-img make refcounts and COPIED flags fit what is there.
    #[track_caller]
    fn settle(&self) {
        qemu::img(args!["check", "-f", "qcow2", "-r", "all", &self.path]).ok();
    }

    /// What the program under test says, once qemu-img has passed the image, with the summary.
    #[track_caller]
    fn check(&self, more: &[&str]) -> (Ran, Value) {
        qemu::check_clean(&self.path);
        let mut words = args!["check", "-f", "qcow2", "--output", "json"].to_vec();
        words.extend(more.iter().map(Into::into));
        let ran = dedup_img(words.into_iter().chain(args![self.path]));
        let summary = serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()));
        (ran, summary)
    }

    /// Asserts that this is corruption, said in a line with all the words.
    #[track_caller]
    fn is_corrupt(&self, words: &[&str]) {
        self.is_corrupt_with(&[], words);
    }

    /// The same with further options.
    #[track_caller]
    fn is_corrupt_with(&self, more: &[&str], words: &[&str]) -> Ran {
        let (ran, summary) = self.check(more);
        assert_eq!(ran.code, 2, "{}", ran.told());
        assert!(summary["findings-beyond"].as_u64() > Some(0), "{}", ran.told());
        assert!(summary.get("corruptions").is_none(), "not what qemu-img counts: {}", ran.told());
        said(ran, words)
    }

    /// Asserts that this is said in a line with all the words, and no error.
    #[track_caller]
    fn is_noted(&self, words: &[&str]) {
        let (ran, summary) = self.check(&[]);
        assert_eq!(ran.code, 0, "{}", ran.told());
        assert!(summary["benign"].as_u64() > Some(0), "{}", ran.told());
        said(ran, words);
    }
}

/// Asserts that one line of stderr has all the words.
#[track_caller]
fn said(ran: Ran, words: &[&str]) -> Ran {
    assert!(ran.stderr.lines().any(|line| words.iter().all(|word| line.contains(word))), "{words:?}: {}", ran.told());
    ran
}

#[test]
fn a_data_cluster_that_is_a_table_is_found() {
    // The refcount block is not among them: that one qemu-img finds.
    let places: [(Place, &str); 4] = [
        (|image| image.active().last().unwrap().host, "L2 table"),
        (|image| image.header.l1_table_offset, "L1 table"),
        (|image| image.header.refcount_table_offset, "refcount table"),
        (|image| image.header.snapshots_offset, "snapshot table"),
    ];
    for (place, name) in places {
        let victim = Victim::of(if name == "snapshot table" { "zlib" } else { "plain-4k" });
        let entry = *victim.data_entries().first().unwrap();
        victim.put(entry, place(&victim.image()));
        victim.settle();
        let place = place(&victim.image());
        assert_eq!(victim.word(entry) & OFFSET, place, "qemu-img has mended it");
        victim.is_corrupt(&[&format!("cluster {}", place / 4096), name, "data"]);
    }
}

#[test]
fn compressed_data_in_the_headers_cluster_is_found() {
    let victim = Victim::of("plain-4k");
    let entry = victim.data_entries()[3];
    // One sector, at the second of the file.
    victim.put(entry, 1 << 62 | 512);
    victim.settle();
    assert_eq!(victim.word(entry), 1 << 62 | 512, "qemu-img has mended it");
    victim.is_corrupt(&["cluster 0 ", "header", "data"]);
}

#[test]
fn an_l1_table_that_is_its_own_l2_table_is_found() {
    let victim = Victim::of("plain-4k");
    let table = victim.image().header.l1_table_offset;
    victim.put(table + 8, table);
    victim.uncopy();
    victim.settle();
    assert_eq!(victim.word(table + 8) & OFFSET, table, "qemu-img has mended it");
    victim.is_corrupt(&["L1 table", "L2 table"]);
}

#[test]
fn a_snapshot_whose_l1_table_is_the_active_one_is_found() {
    let victim = Victim::of("snapshots-64k");
    let header = victim.image().header;
    victim.put(header.snapshots_offset, header.l1_table_offset);
    victim.uncopy();
    victim.settle();
    assert_eq!(victim.word(header.snapshots_offset), header.l1_table_offset, "qemu-img has mended it");
    victim.is_corrupt(&["L1 table of the active disk", "L1 table of the snapshot"]);
}

#[test]
fn a_bitmap_whose_data_is_a_table_is_found() {
    let victim = Victim::of("bitmaps");
    let image = victim.image();
    let bitmaps = image.extensions().into_iter().find(|(kind, _)| *kind == 0x2385_2875).unwrap().1;
    let table = victim.word(number(&bitmaps, 16, 8));
    let (before, after) = (victim.word(table), image.header.l1_table_offset);
    assert_ne!(before, 0, "this bitmap has no data");
    victim.put(table, after);
    victim.set_refcount(before, 0);
    victim.set_refcount(after, 2);
    victim.is_corrupt(&["L1 table", "bitmap 'one'"]);
}

#[test]
fn copied_without_a_cluster_is_found() {
    let victim = Victim::of("plain-4k");
    let empty = victim.image().active()[0].words.iter().position(|word| *word == 0).unwrap() as u64;
    victim.put(victim.image().active()[0].host + 8 * empty, 1 << 63);
    victim.is_corrupt(&["COPIED", &format!("guest offset {:#x}", empty * 4096)]);
}

#[test]
fn a_zero_cluster_in_version_2_is_found() {
    let victim = Victim::of("version-2");
    let entry = victim.data_entries()[5];
    victim.put(entry, victim.word(entry) | 1);
    victim.is_corrupt(&["zero", "version 2"]);
    let content = qemu::io_try("qcow2", &victim.path, &["read 0 1M".into()]);
    assert!(content.text().contains("rror"), "QEMU reads it after all: {}", content.told());
}

#[test]
fn a_damaged_pool_directory_is_noted() {
    for (at, why) in [(100, "header"), (128 + 40 + 7, "records")] {
        let victim = Victim::pooled();
        let pool = &victim.image().snapshots().0[0];
        let tables = victim.image().tables(pool.l1_table_offset, pool.l1_size);
        let directory = tables.last().unwrap().words[0] & OFFSET;
        let byte = victim.image().read(directory + at, 1)[0];
        patch(&victim.path, directory + at, &[!byte]);
        victim.is_noted(&["directory", why]);
    }
}

#[test]
fn pool_members_out_of_order_or_with_flags_are_noted() {
    let members = |victim: &Victim| {
        let pool = &victim.image().snapshots().0[0];
        victim.image().tables(pool.l1_table_offset, pool.l1_size)[0].host
    };
    let victim = Victim::pooled();
    let at = members(&victim);
    let (first, second) = (victim.word(at), victim.word(at + 8));
    victim.put(at, second);
    victim.put(at + 8, first);
    victim.is_noted(&["pool member", "order"]);
    let victim = Victim::pooled();
    victim.put(members(&victim) + 8, second | 1 << 63);
    victim.is_noted(&["pool member 1", "flags"]);
}

#[test]
fn a_pool_without_its_guard_is_noted() {
    let victim = Victim::pooled();
    victim.put(victim.image().header.snapshots_offset + 48, 1 << 20);
    victim.is_noted(&["dedup-pool", "not a pool"]);
}

#[test]
fn a_shared_cluster_that_is_not_pooled_is_noted() {
    let victim = Victim::pooled();
    let private: Vec<u64> = victim.data_entries().into_iter().filter(|at| victim.word(*at) >> 63 == 1).collect();
    victim.put(private[7], victim.word(private[3]) & OFFSET);
    victim.settle();
    assert_eq!(victim.word(private[7]), victim.word(private[3]), "qemu-img has mended it");
    victim.is_noted(&["1 shared cluster", "not pooled"]);
}

#[test]
fn what_other_tools_would_do_to_an_image_is_noted() {
    let victim = Victim::of("plain-4k");
    patch(&victim.path, 95, &[1]);
    victim.is_noted(&["bitmaps", "none"]);
    let victim = Victim::of("snapshots-64k");
    patch(&victim.path, 95, &[4]);
    victim.is_noted(&["autoclear bits 0x4", "snapshots", "-r"]);
    let victim = Victim::of("bitmaps");
    qemu::snapshot("-c", "mine", &victim.path).ok();
    victim.is_noted(&["snapshots", "bitmaps", "-r"]);
    let victim = Victim::of("plain-4k");
    victim.put(24, victim.image().header.size - 511);
    victim.is_noted(&["multiple of 512"]);
}

#[test]
fn a_flipped_bit_in_a_pooled_cluster_is_found_with_every_guest_offset_that_it_hits() {
    let victim = Victim::pooled();
    qemu::snapshot("-c", "mine", &victim.path).ok();
    let image = victim.image();
    let entries = victim.data_entries();
    let host = victim.word(entries[2]) & OFFSET;
    let byte = image.read(host + 1234, 1)[0];
    patch(&victim.path, host + 1234, &[byte ^ 8]);
    victim.check(&[]).0.ok();
    let ran = victim.is_corrupt_with(&["--data"], &[&format!("{host:#x}"), "SHA-256"]);
    let line = ran.stderr.lines().find(|line| line.contains("SHA-256")).unwrap();
    let mut sharers = 0;
    for table in image.active() {
        for (slot, word) in table.words.iter().enumerate().filter(|(_, word)| *word & OFFSET == host) {
            let guest = (table.index * image.l2_entries() + slot as u64) * 4096;
            assert!(line.contains(&format!("(active disk, guest offset {guest:#x})")), "{word:x}: {line}");
            assert!(line.contains(&format!("(snapshot 2 (mine), guest offset {guest:#x})")), "{line}");
            sharers += 1;
        }
    }
    assert_eq!((sharers, line.matches("guest offset").count()), (3, 6), "{line}");
}
