//! I1 and I3 for `dedup`: the power fails at every write, hole and change of length, and whatever of the writes since the last
//! flush the disk then holds, every guest byte reads right before and after a repair, ours or QEMU's, and the repaired image
//! stays clean. `tests/crash-long` asks for more of the same.

use crate::args;
use crate::support::crash::CrashStorage;
use crate::support::failing::{Event, FailingStorage};
use crate::support::inplace::{Contents, Left, Subject, Told, mended, put, verify_crashed, verify_repaired};
use crate::support::{Random, dedup_img, qemu};
use dedup_img::Cancel;
use nix::errno::Errno;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{env, fs};
use twox_hash::XxHash3_128;

/// Random choices of what was not flushed, for each operation.
const CHOICES: u64 = 8;
/// Every so many states QEMU is asked too.
const SAMPLE: usize = 9;

/// The choices that `tests/crash-long` asks for.
pub(super) fn asked() -> Option<u64> {
    env::var("DEDUP_IMG_CRASH_SUBSETS").ok().map(|n| n.parse().expect("DEDUP_IMG_CRASH_SUBSETS is a number"))
}

/// Judges the states of one kind of image.
pub(super) struct Judge<'a> {
    subject: &'a Subject,
    before: Contents,
    /// The state, and a copy to work on.
    file: PathBuf,
    copy: PathBuf,
    /// Sums over the states so far: none is judged twice.
    met: BTreeSet<u128>,
    sampled: usize,
    random: Random,
}

impl<'a> Judge<'a> {
    pub(super) fn new(subject: &'a Subject) -> Self {
        let [file, copy] = ["state.qcow2", "copy.qcow2"].map(|name| subject.home.path().join(name));
        let before = subject.contents(&subject.path);
        // The reader that judges all states agrees with QEMU.
        subject.qemu_reads(&subject.path, &before);
        Self { subject, before, file, copy, met: BTreeSet::new(), sampled: 0, random: Random::new(41) }
    }

    /// I1: all that is the user's is as it was.
    #[track_caller]
    fn unchanged(&self, path: &Path, when: &str) {
        self.before.unchanged(&self.subject.contents(path), when);
    }

    /// I1, I2 for the image that a run has finished.
    pub(super) fn finished(&self, storage: &CrashStorage) {
        put(&self.file, &storage.now());
        self.unchanged(&self.file, "finished");
        verify_repaired(&self.file, self.subject.finished());
        qemu::check_clean(&self.file);
    }

    /// Tells how many states there were, and asserts that they are as many as expected.
    pub(super) fn sum(&self, least: usize) {
        let (kind, states) = (self.subject.kind, self.met.len());
        eprintln!("{kind}: {states} states, {} of them judged by QEMU", self.sampled);
        assert!(states >= least, "only {states} states of {kind}");
    }

    /// I1 and I3 for one state.
    pub(super) fn state(&mut self, state: &[u8], when: &str) {
        if !self.met.insert(XxHash3_128::oneshot(state)) {
            return;
        }
        let when = format!("{}, {when}", self.subject.kind);
        let _told = Told(&when, state);
        put(&self.file, state);
        self.unchanged(&self.file, &when);
        verify_crashed(&self.file, self.subject.left());
        let repaired = mended(state.to_vec(), &when);
        put(&self.file, &repaired);
        self.unchanged(&self.file, &when);
        verify_repaired(&self.file, self.subject.left());
        if asked().is_some() || self.met.len() % SAMPLE == 1 {
            self.sample(state, &repaired, &when);
        }
    }

    /// The same by QEMU and by the program itself, and in turn what may be done with such an image.
    fn sample(&mut self, state: &[u8], repaired: &[u8], when: &str) {
        put(&self.copy, state);
        dedup_img(args!["check", "-q", "-r", "all", &self.copy]).ok();
        assert!(fs::read(&self.copy).unwrap() == repaired, "{when}: the program repairs otherwise than the library");
        qemu::check_clean(&self.copy);
        self.subject.qemu_reads(&self.copy, &self.before);
        match self.sampled % 4 {
            0 => self.repaired_by_qemu(state, when),
            1 => self.again(repaired, when),
            // Without its pool what is shared does not stay clean.
            2 if self.subject.left() != Left::Nothing => self.guest(repaired, when),
            _ => self.guest_without_repair(state, when),
        }
        self.sampled += 1;
    }

    /// I3: QEMU's repair does as well as ours.
    fn repaired_by_qemu(&self, state: &[u8], when: &str) {
        // It damages images with both bitmaps and snapshots, and the pool is one.
        if self.subject.kind.contains("bitmaps") && state[60..64] != [0; 4] {
            return;
        }
        put(&self.copy, state);
        qemu::img(args!["check", "-q", "-r", "all", &self.copy]).ok();
        qemu::check_clean(&self.copy);
        self.unchanged(&self.copy, when);
        verify_crashed(&self.copy, self.subject.left());
    }

    /// The next run finishes the work, and one more finds nothing to do.
    fn again(&self, repaired: &[u8], when: &str) {
        let storage = CrashStorage::of(repaired.to_vec());
        self.subject.run(&storage).unwrap();
        put(&self.copy, &storage.now());
        qemu::check_clean(&self.copy);
        self.unchanged(&self.copy, when);
        // What a compaction that was cut off left outside the pool, it does not pool again: that is `dedup`'s.
        let left = self.subject.left();
        verify_repaired(&self.copy, if left == Left::Nothing { left } else { self.subject.finished() });
        assert!(!self.subject.run(&storage).unwrap(), "{when}: there is no end of work");
    }

    /// I2: clusters are pooled before they are shared, so a repaired image stays clean whatever a guest does.
    fn guest(&mut self, repaired: &[u8], when: &str) {
        put(&self.copy, repaired);
        let mut expected = self.subject.contents(&self.copy);
        let commands = expected.guest(&self.copy, &mut self.random).join("\n");
        let ran = qemu::check(&self.copy);
        assert_eq!(ran.code, 0, "{when}, after\n{commands}\n{}", ran.told());
        expected.same_layers(&self.subject.contents(&self.copy), when);
    }

    /// I3: what is safe is decided by the order of writes alone. Without the dirty bit QEMU repairs nothing before it writes, and
    /// yet does no harm.
    fn guest_without_repair(&mut self, state: &[u8], when: &str) {
        let mut clean = state.to_vec();
        if clean[7] == 3 {
            clean[79] &= !1;
        }
        put(&self.copy, &clean);
        let mut expected = self.subject.contents(&self.copy);
        let commands = expected.guest(&self.copy, &mut self.random).join("\n");
        let when = format!("{when}, not repaired, after\n{commands}");
        expected.same_layers(&self.subject.contents(&self.copy), &when);
        put(&self.copy, &mended(fs::read(&self.copy).unwrap(), &when));
        expected.same_layers(&self.subject.contents(&self.copy), &when);
        qemu::check_clean(&self.copy);
    }
}

/// Deduplicates an image of the kind and judges it as each of at least so many power failures leaves it.
#[track_caller]
fn survives(kind: &'static str, least: usize) {
    let subject = Subject::new(kind);
    let mut judge = Judge::new(&subject);
    let storage = CrashStorage::open(&subject.path);
    let report = subject.deduplicate(&storage).unwrap();
    assert!(report.changed && report.duplicate_clusters > 10, "{kind}: {report:?}");
    judge.finished(&storage);
    storage.crashes(17, asked().unwrap_or(CHOICES), 1, |state, when| judge.state(state, when));
    judge.sum(least);
}

/// I1, I3 where entries are redirected in several batches: a failure now and then, for the image is larger.
#[test]
fn every_batch_survives_crashes() {
    let subject = Subject::new("batches");
    let mut judge = Judge::new(&subject);
    let storage = CrashStorage::open(&subject.path);
    assert!(subject.deduplicate(&storage).unwrap().batches > 1);
    judge.finished(&storage);
    storage.crashes(17, asked().unwrap_or(2), 293, |state, when| judge.state(state, when));
    judge.sum(12);
}

/// I1, I3 for a run that is stopped, or for which a write fails, and that therefore leaves its work undone but in order.
#[test]
fn what_is_stopped_half_way_survives_every_crash() {
    let subject = Subject::new("snapshots");
    let mut judge = Judge::new(&subject);
    let whole = fs::read(&subject.path).unwrap();
    for at in (0..).step_by(5) {
        for stops in [true, false] {
            let cancel = Cancel::default();
            let event = if stops { Event::Stop(cancel.clone()) } else { Event::Error(Errno::EIO) };
            let when = format!("{event:?} at operation {at}");
            let storage = FailingStorage::of(whole.clone(), at, event);
            _ = subject.deduplicate_until(&storage, &cancel);
            if storage.failed().is_none() {
                return judge.sum(220);
            }
            let choices = asked().unwrap_or(2);
            storage.disk().crashes(at, choices, 1, |state, then| judge.state(state, &format!("{when}, {then}")));
        }
    }
}

macro_rules! survives {
    ($($name:ident: $kind:literal, $least:literal;)*) => { $(
        /// I1, I3.
        #[test]
        fn $name() {
            survives($kind, $least);
        }
    )* };
}

// The numbers of states add up to more than 2000.
survives! {
    an_image_without_snapshots_survives_every_crash: "plain", 160;
    an_image_that_is_pinned_whole_survives_every_crash: "pinned", 160;
    an_image_with_leaks_survives_every_crash: "leaks", 160;
    snapshots_that_share_tables_survive_every_crash: "snapshots", 160;
    a_snapshot_of_everything_survives_every_crash: "frozen", 130;
    an_image_compressed_with_zlib_survives_every_crash: "zlib", 80;
    an_image_compressed_with_zstd_survives_every_crash: "zstd", 80;
    an_image_with_4_bit_refcounts_survives_every_crash: "4 bits", 160;
    an_image_with_64_bit_refcounts_survives_every_crash: "64 bits", 160;
    a_pool_from_an_earlier_run_survives_every_crash: "pool", 70;
    bitmaps_survive_every_crash: "bitmaps", 180;
    bitmaps_beside_snapshots_survive_every_crash: "bitmaps and snapshots", 180;
    a_version_2_image_survives_every_crash: "version 2", 150;
    a_version_2_image_with_snapshots_survives_every_crash: "version 2, snapshots", 160;
    a_version_2_image_with_a_backing_file_survives_every_crash: "version 2, backing", 150;
    an_overlay_survives_every_crash: "backing", 160;
    an_image_whose_refcount_table_grows_survives_every_crash: "growing", 110;
}
