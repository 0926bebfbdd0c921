//! The pool that `dedup` installs and renews: who is in it, who is kept, and what is not read again.

use super::dedup_judge::{dedup, judged, same_content, told};
use crate::args;
use crate::support::corpus::{K, patch, write_sparse};
use crate::support::reader::{Image, Pin, Survey};
use crate::support::{Random, dedup_img, qemu, scratch, sha256_of};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

/// An image of numbered blocks of 4 KiB: equal numbers are equal content, 0 is zeros.
struct Disk {
    home: TempDir,
    path: PathBuf,
    grain: u64,
}

/// What a deduplication was told and what it found.
struct Done {
    summary: Value,
    before: Survey,
    after: Survey,
}

impl Disk {
    /// By qemu-img, in clusters of 4 KiB.
    fn new(blocks: &[u64]) -> Self {
        Self::with(blocks, 4 * K, "")
    }

    /// By qemu-img, in clusters of one block, with further options.
    fn with(blocks: &[u64], grain: u64, options: &str) -> Self {
        let home = scratch();
        let disk = Self { path: home.path().join("disk.qcow2"), home, grain };
        let raw = disk.raw(blocks);
        qemu::convert("raw", &raw, "qcow2", &disk.path, &["-o", &format!("cluster_size={grain}{options}")]);
        qemu::img(args!["resize", "-q", "-f", "qcow2", disk.path, "+1M"]).ok();
        disk
    }

    /// A raw file of these blocks.
    fn raw(&self, blocks: &[u64]) -> PathBuf {
        let raw = self.home.path().join("blocks.raw");
        let block = |number: &u64| match number {
            0 => vec![0; self.grain as usize],
            seed => Random::new(*seed).bytes(self.grain as usize),
        };
        write_sparse(&raw, &blocks.iter().flat_map(block).collect::<Vec<u8>>());
        raw
    }

    /// Has the guest write blocks, the first one at block `at`.
    fn write(&self, at: u64, blocks: &[u64]) {
        if blocks.is_empty() {
            return;
        }
        let (raw, length) = (self.raw(blocks), blocks.len() as u64 * self.grain);
        qemu::io("qcow2", &self.path, &[format!("write -s {} {} {length}", raw.display(), at * self.grain)]);
    }

    fn snapshot(&self, action: &str, name: &str) {
        qemu::snapshot(action, name, &self.path).ok();
        qemu::check_clean(&self.path);
    }

    /// Deduplicates; the content stays, all is as it should be, and a second run finds nothing to do.
    #[track_caller]
    fn dedup(&self, pin: Pin) -> Done {
        let options = if pin == Pin::All { &["--pin", "all"][..] } else { &[] };
        let old = self.home.path().join("old.qcow2");
        fs::copy(&self.path, &old).unwrap();
        let (summary, before, after) = judged(&self.path, pin, options);
        same_content(&old, &self.path);
        let sum = sha256_of(&self.path);
        assert_eq!(dedup(&self.path, options)["changed"], false);
        assert_eq!(sha256_of(&self.path), sum, "the second run has written");
        Done { summary, before, after }
    }

    /// Where a guest cluster of the active layer is stored.
    fn host(&self, block: u64) -> u64 {
        Survey::of(&self.path).layers[0].map[&block]
    }
}

impl Done {
    #[track_caller]
    fn told(&self, key: &str) -> u64 {
        told(&self.summary, key)
    }

    /// Sharers of the clusters that several guest clusters of the active layer use, the most shared ones first.
    fn sharers(&self) -> Vec<u64> {
        let mut counts: Vec<u64> =
            self.after.stored.values().map(|s| s.guests.len() as u64).filter(|n| *n > 1).collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts
    }
}

#[test]
fn the_pool_comes_last_and_its_id_is_above_all_others() {
    let disk = Disk::new(&[1, 2, 3, 1, 2, 0, 4]);
    for name in ["mine", "gone", "yours"] {
        disk.snapshot("-c", name);
        disk.write(8, &[1, 5, 6]);
    }
    disk.snapshot("-d", "gone");
    let done = disk.dedup(Pin::Shared);
    assert_eq!(done.after.pool.as_ref().unwrap().place, (2, "4".into()));
    assert_eq!(done.after.members().len(), 4, "of 1, 2, 5 and 6; the others were never stored twice");
    let names: Vec<String> = qemu::snapshots(&disk.path).into_iter().map(|(_, name)| name).collect();
    assert_eq!(names, ["mine", "yours", "dedup-pool"]);
}

/// A renewed pool stays where it was in the table and keeps its id, whatever came before and behind it.
#[test]
fn a_renewed_pool_keeps_its_place_and_its_id() {
    let disk = Disk::new(&[1, 1, 2, 3]);
    disk.snapshot("-c", "before");
    assert_eq!(disk.dedup(Pin::Shared).after.pool.unwrap().place, (1, "2".into()));
    disk.snapshot("-c", "behind");
    disk.write(8, &[2, 3, 1]);
    assert_eq!(disk.dedup(Pin::Shared).after.pool.unwrap().place, (1, "2".into()));
    disk.snapshot("-d", "before");
    disk.write(16, &[9, 9, 3]);
    let done = disk.dedup(Pin::Shared);
    assert_eq!(done.after.pool.as_ref().unwrap().place, (0, "2".into()));
    assert_eq!(done.after.members().len(), 4, "of 1, 2, 3 and 9");
}

/// What is equal in the disk and in a snapshot, or in two snapshots, is shared as well, at different places or at the same.
#[test]
fn equal_clusters_of_different_layers_are_shared() {
    let disk = Disk::new(&[1, 2, 3, 4]);
    disk.snapshot("-c", "one");
    // 1 moves, 2 is written anew at its place, 3 and 4 change.
    disk.write(0, &[5, 2, 1, 6]);
    disk.snapshot("-c", "two");
    disk.write(0, &[7, 8, 9, 3]);
    let done = disk.dedup(Pin::Shared);
    assert_eq!((done.told("duplicate_clusters"), done.after.stored.len()), (3, 9));
    assert_eq!(done.after.members().len(), 3, "of 1, 2 and 3");
}

/// The first to be kept is a member, even where another copy has more references and lies further ahead.
#[test]
fn an_existing_member_is_the_one_that_is_kept() {
    let disk = Disk::new(&[7, 1, 1, 2, 2, 3]);
    let first = disk.dedup(Pin::Shared);
    let kept = disk.host(1);
    // Nobody uses the place of 7 any more, which is the first in the file; then 1 goes there.
    disk.write(0, &[0]);
    qemu::io("qcow2", &disk.path, &["discard 0 4k".into()]);
    disk.write(10, &[1, 4, 1]);
    for name in ["a", "b", "c"] {
        disk.snapshot("-c", name);
    }
    let done = disk.dedup(Pin::Shared);
    assert_eq!([1, 2, 10, 12].map(|block| disk.host(block)), [kept; 4]);
    assert_eq!((done.told("duplicate_clusters"), done.told("newly_shared_clusters")), (2, 0));
    assert!(first.after.members().iter().all(|member| done.after.members().contains(member)));
}

/// What the pool knows is not read again, and what is new is compared with it and with itself.
#[test]
fn a_second_run_reads_only_what_is_new_or_not_in_the_pool() {
    let blocks: Vec<u64> = (0..200).map(|n| 1 + n % 120).collect();
    let disk = Disk::new(&blocks);
    let first = disk.dedup(Pin::Shared);
    assert_eq!((first.told("scanned_clusters"), first.told("read_clusters")), (200, 200));
    assert_eq!((first.told("duplicate_clusters"), first.told("pool_members")), (80, 80));
    // Old duplicates, new ones among themselves, one that occurs once, and two members overwritten at one place each.
    disk.write(210, &[1, 2, 3, 301, 301, 302]);
    disk.write(0, &[303, 100]);
    let done = disk.dedup(Pin::Shared);
    assert_eq!(done.told("scanned_clusters"), 120 + 8);
    assert_eq!(done.told("read_clusters"), 40 + 8, "the members are not read");
    assert_eq!(done.told("already_shared_clusters"), 80);
    assert_eq!((done.told("duplicate_clusters"), done.told("newly_shared_clusters")), (5, 2), "301, and 100");
    for old in first.after.members() {
        assert!(done.after.members().contains(old), "{old:#x} has left the pool");
    }
}

/// A member that nobody uses any more is still there to be shared.
#[test]
fn what_only_the_pool_holds_is_shared_again() {
    let disk = Disk::new(&[1, 1, 2, 3]);
    disk.dedup(Pin::Shared);
    let kept = disk.host(0);
    disk.write(0, &[4, 5]);
    disk.write(9, &[1]);
    let done = disk.dedup(Pin::Shared);
    assert_eq!((disk.host(9), done.told("duplicate_clusters")), (kept, 1));
    assert_eq!(done.before.members(), done.after.members());
}

/// A directory that fails its checksums is never trusted, and is written anew with the same members.
#[test]
fn a_stale_directory_is_rebuilt() {
    let blocks: Vec<u64> = (0..300).map(|n| 1 + n % 150).collect();
    for (at, what) in
        [(0, "magic"), (44, "header"), (130, "a record's name"), (128 + 40 * 140 + 33, "the offset of a record")]
    {
        for new in [&[][..], &[3, 401, 401]] {
            let disk = Disk::new(&blocks);
            let before = disk.dedup(Pin::Shared).after;
            disk.write(310, new);
            let image = Image::open(&disk.path);
            let pool = image.snapshots().0.pop().unwrap();
            let tables = image.tables(pool.l1_table_offset, pool.l1_size);
            let place = tables.last().unwrap().words[at / 4096] + at as u64 % 4096;
            patch(&disk.path, place, &[!image.read(place, 1)[0]]);
            qemu::check_clean(&disk.path);
            let summary = dedup(&disk.path, &[]);
            assert_eq!(summary["changed"], true, "{what} is damaged: {summary:#}");
            assert_eq!(told(&summary, "read_clusters"), told(&summary, "scanned_clusters"), "{what}: {summary:#}");
            qemu::check_clean(&disk.path);
            dedup_img(args!["check", "--data", disk.path]).ok();
            let after = Survey::of(&disk.path);
            assert!(
                before.members().iter().all(|member| after.members().contains(member)),
                "{what}: a member has left"
            );
            assert_eq!(after.members().len(), 150 + usize::from(!new.is_empty()), "{what}");
            assert_eq!(after.pool.unwrap().place, before.pool.unwrap().place);
            disk.dedup(Pin::Shared);
        }
    }
}

/// `qemu-img snapshot -d dedup-pool` makes it a plain image, and `dedup` pools it again.
#[test]
fn a_deleted_pool_comes_back() {
    let disk = Disk::new(&[1, 2, 1, 3, 2, 2]);
    disk.snapshot("-c", "mine");
    let first = disk.dedup(Pin::Shared);
    disk.snapshot("-d", "dedup-pool");
    let again = disk.dedup(Pin::Shared);
    assert_eq!(again.told("duplicate_clusters"), 0);
    assert_eq!(again.after.members(), first.after.members());
    disk.snapshot("-d", "dedup-pool");
    disk.write(0, &[2]);
    disk.snapshot("-d", "mine");
    disk.dedup(Pin::Shared);
}

/// An image that `create` made has an empty pool, and `convert`'s has one that fits: `dedup` takes both over.
#[test]
fn pools_of_create_and_convert_are_renewed() {
    let disk = Disk::new(&[]);
    fs::remove_file(&disk.path).unwrap();
    dedup_img(args!["create", "-q", "-o", "cluster_size=4k", disk.path, "1M"]).ok();
    assert_eq!(dedup(&disk.path, &[])["changed"], false);
    disk.write(0, &[1, 2, 1, 3, 0, 1]);
    let done = disk.dedup(Pin::Shared);
    assert_eq!((done.told("pool_members"), done.after.pool.unwrap().place), (1, (0, "1".into())));

    for pin in ["shared", "all"] {
        let raw = disk.raw(&[1, 2, 1, 3, 0, 1, 4, 4]);
        dedup_img(args!["convert", "-q", "-f", "raw", "-o", "cluster_size=4k", "--pin", pin, raw, disk.path]).ok();
        let sum = sha256_of(&disk.path);
        assert_eq!(dedup(&disk.path, &["--pin", pin])["changed"], false);
        assert_eq!(dedup(&disk.path, &[])["changed"], false, "who is in the pool stays in it");
        assert_eq!(sha256_of(&disk.path), sum);
        disk.write(2, &[9, 2, 1]);
        disk.dedup(if pin == "all" { Pin::All } else { Pin::Shared });
    }
}

#[test]
fn every_data_cluster_can_be_pinned() {
    let disk = Disk::new(&[1, 2, 1, 3, 0, 4]);
    disk.snapshot("-c", "mine");
    disk.write(5, &[5, 6]);
    let shared = disk.dedup(Pin::Shared);
    assert_eq!(shared.told("pool_members"), 1);
    let all = disk.dedup(Pin::All);
    assert_eq!((all.told("pool_members"), all.told("duplicate_clusters")), (6, 0));
    assert_eq!(all.after.pool.as_ref().unwrap().place, shared.after.pool.unwrap().place);
    assert_eq!(dedup(&disk.path, &[])["changed"], false, "members stay members");
    disk.write(8, &[6, 7]);
    let done = disk.dedup(Pin::Shared);
    assert_eq!((done.told("pool_members"), done.told("duplicate_clusters")), (6, 1), "7 occurs once");
    assert_eq!(disk.dedup(Pin::All).told("pool_members"), 7);
}

#[test]
fn a_snapshot_of_the_users_that_is_called_like_the_pool_is_left_alone() {
    let disk = Disk::new(&[1, 1, 2]);
    disk.snapshot("-c", "dedup-pool");
    let before = sha256_of(&disk.path);
    for options in [&[][..], &["--dry-run"], &["--pin", "all"]] {
        let words = args!["dedup"].into_iter().chain(options.iter().map(Into::into));
        dedup_img(words.chain(args![disk.path])).refused(&["dedup-pool", "snapshot", disk.path.to_str().unwrap()]);
        assert_eq!(sha256_of(&disk.path), before);
    }
    disk.snapshot("-d", "dedup-pool");
    disk.dedup(Pin::Shared);
}

/// Of equal clusters that are no members, the one with the most references is kept, for the fewest entries change then; of those
/// the first.
#[test]
fn the_copy_with_the_most_references_is_kept() {
    let disk = Disk::new(&[0, 1, 1, 2]);
    let [rare, often] = [1, 2].map(|block| disk.host(block));
    assert!(rare < often);
    disk.snapshot("-c", "one");
    disk.snapshot("-c", "two");
    disk.write(1, &[3]);
    let done = disk.dedup(Pin::Shared);
    assert_eq!(disk.host(2), often);
    assert_eq!((done.after.layers[1].map[&1], done.after.layers[2].map[&1]), (often, often));

    let disk = Disk::new(&[2, 1, 1, 1]);
    let first = disk.host(1);
    disk.dedup(Pin::Shared);
    assert_eq!([1, 2, 3].map(|block| disk.host(block)), [first; 3]);
}

/// The most sharers of a cluster at some refcount width.
fn limit(bits: u32) -> u64 {
    (1 << (bits - 2)) - 1
}

/// One content many times, at several widths: a cluster for each `limit` of them, all pooled, and QEMU finds room for two snapshots
/// and for going back to one.
#[test]
fn the_sharer_limit_is_honoured_at_every_width() {
    for (bits, times, grain) in
        [(4, 100, 4 * K), (4, 3, 4 * K), (4, 4, 4 * K), (8, 1000, 4 * K), (16, 20_000, 512), (64, 2000, 512)]
    {
        println!("{bits} bits, {times} times");
        let mut blocks = vec![1; times as usize];
        blocks.extend([2, 3]);
        let disk = Disk::with(&blocks, grain, &format!(",refcount_bits={bits}"));
        let done = disk.dedup(Pin::Shared);
        let mut due = vec![limit(bits); times as usize / limit(bits) as usize];
        due.extend((times % limit(bits) > 1).then_some(times % limit(bits)));
        assert_eq!(done.sharers(), due, "{bits} bits, {times} times");
        for name in ["first", "second"] {
            disk.snapshot("-c", name);
        }
        disk.snapshot("-a", "first");
        disk.write(1, &[4, 1]);
        qemu::check_clean(&disk.path);
        disk.dedup(Pin::Shared);
        disk.snapshot("-d", "first");
        disk.snapshot("-d", "second");
        disk.dedup(Pin::Shared);
    }
}

/// Snapshots that were there before count as sharers, up to where there is no room for one reference more, not even the pool's.
#[test]
fn references_of_snapshots_count_towards_the_limit() {
    let disk = Disk::with(&[1, 1, 1, 2], 4 * K, ",refcount_bits=4");
    disk.snapshot("-c", "one");
    disk.write(8, &[1, 1, 3]);
    let done = disk.dedup(Pin::Shared);
    assert_eq!(
        done.after.stored.len(),
        5,
        "of 1, with three times two references and twice one, three copies are needed"
    );
    let disk = Disk::with(&[1, 2], 4 * K, ",refcount_bits=4");
    for n in 1..=14 {
        disk.snapshot("-c", &format!("snapshot {n}"));
    }
    disk.write(8, &[1, 1, 3]);
    // Now not even QEMU could go back to a snapshot.
    let old = disk.home.path().join("old.qcow2");
    fs::copy(&disk.path, &old).unwrap();
    for (pin, options, members) in [(Pin::Shared, &[][..], 1), (Pin::All, &["--pin", "all"], 2)] {
        let (_, _, after) = judged(&disk.path, pin, options);
        assert_eq!(after.members().len(), members, "the two of the snapshots have no room for the pool");
        qemu::compare_same("qcow2", &old, "qcow2", &disk.path);
        assert_eq!(dedup(&disk.path, options)["changed"], false);
    }
}
