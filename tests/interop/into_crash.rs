//! I3 for `convert -n`: the power fails at every write, hole and change of length, or the disk fails, and every cluster of the disk
//! reads as before or as it should, snapshots read as ever, and a repair, ours or QEMU's, ends clean without changing that. A run
//! that fails or is stopped leaves a clean image, or says what to do. `tests/crash-long` asks for more of the same.

use super::dedup_crash::asked;
use crate::args;
use crate::support::crash::CrashStorage;
use crate::support::failing::{Event, Failed, FailingStorage};
use crate::support::inplace::{Contents, Left, Subject, Told, mended, put, verify_crashed, verify_repaired};
use crate::support::into::{Mixer, into, layers, pooled};
use crate::support::{Random, dedup_img, qemu};
use dedup_img::storage::Storage;
use dedup_img::unstable::overwrite;
use dedup_img::{Advice, Cancel, Disk, DiskOptions, ErrorKind, OverwriteReport, Pin, Work, WorkOptions};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use twox_hash::XxHash3_128;

/// Random choices of what was not flushed, for each operation.
const CHOICES: u64 = 3;
/// Every so many states QEMU is asked too.
const SAMPLE: usize = 20;

/// A target, and a disk that is written into it.
struct Writing {
    subject: Subject,
    source: PathBuf,
    pin: Pin,
    before: Contents,
    /// What the disk must read in the end.
    due: BTreeMap<u64, Vec<u8>>,
    /// A file for the state, and one to work on.
    file: PathBuf,
    copy: PathBuf,
}

impl Writing {
    /// Changes a good part of the disk; with a third of it gone in the end, so that the source ends before the target does.
    fn new(kind: &'static str, shorter: bool) -> Self {
        let subject = match kind {
            "garbage, snapshots" | "stale directory" | "compressed pool" => Subject::to_collect(kind),
            _ => Subject::new(kind),
        };
        let [source, file, copy] =
            ["source.raw", "state.qcow2", "copy.qcow2"].map(|name| subject.home.path().join(name));
        let (before, old) = (subject.contents(&subject.path), layers(&subject.path));
        subject.qemu_reads(&subject.path, &before);
        let disks: Vec<&[u8]> = old.iter().map(|(_, disk)| &disk[..]).collect();
        let pool = if kind == "stale directory" { Vec::new() } else { pooled(&subject.path) };
        let mut raw = Mixer::new(5, before.cluster_size, &disks, &pool).changed(disks[0], 3, 40);
        let end = if shorter { raw.len() / 3 * 2 / 512 * 512 } else { raw.len() };
        fs::write(&source, &raw[..end]).unwrap();
        raw[end..].copy_from_slice(&disks[0][end..]);
        raw.resize(raw.len().next_multiple_of(before.cluster_size as usize), 0);
        let clusters = (0..).zip(raw.chunks(before.cluster_size as usize)).map(|(n, bytes)| (n, bytes.to_vec()));
        let due = clusters.filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0)).collect();
        let pin = if kind == "pinned" { Pin::All } else { Pin::Shared };
        Self { subject, source, pin, before, due, file, copy }
    }

    /// Writes the source into what is in `storage`, which was this target.
    fn run(&self, storage: &dyn Storage, cancel: &Cancel) -> dedup_img::Result<OverwriteReport> {
        let options = DiskOptions::default();
        let [present, disk] = [&self.subject.path, &self.source].map(|path| Disk::open(path, &options).unwrap());
        // One thread, so that all runs are the same.
        let work = Work::new(WorkOptions { threads: Some(1), cancel: cancel.clone(), ..WorkOptions::default() })?;
        overwrite(storage, &present, &disk, self.pin, self.subject.home.path(), &work)
    }

    /// Asserts that every cluster reads as before or as it should, and all else as it did. Returns what the disk reads.
    #[track_caller]
    fn old_or_new(&self, path: &Path, when: &str) -> Contents {
        let mut found = self.subject.contents(path);
        let old = &self.before.layers[0];
        let disk = std::mem::replace(&mut found.layers[0], old.clone());
        let all: BTreeSet<&u64> = old.keys().chain(self.due.keys()).chain(disk.keys()).collect();
        let neither = |guest: &&u64| disk.get(guest) != old.get(guest) && disk.get(guest) != self.due.get(guest);
        let wrong: Vec<&u64> = all.into_iter().filter(neither).collect();
        assert!(wrong.is_empty(), "{when}: guest clusters read neither as before nor as they should: {wrong:?}");
        self.before.unchanged(&found, when);
        found.layers[0] = disk;
        found
    }

    /// Asserts that the work is done.
    #[track_caller]
    fn done(&self, path: &Path, when: &str) {
        let found = self.old_or_new(path, when);
        assert!(found.layers[0] == self.due, "{when}: the disk does not read what it should");
        verify_repaired(path, Left::Whole);
        qemu::check_clean(path);
    }

    /// What must be there of the pool whatever happens.
    fn left(&self) -> Left {
        if self.subject.kind == "stale directory" { Left::References } else { Left::Whole }
    }
}

/// Judges the states of a target.
struct Judge<'a> {
    writing: &'a Writing,
    met: BTreeSet<u128>,
    /// States in which some clusters read as before and some as they should.
    between: usize,
    sampled: usize,
    random: Random,
}

impl<'a> Judge<'a> {
    fn new(writing: &'a Writing) -> Self {
        Self { writing, met: BTreeSet::new(), between: 0, sampled: 0, random: Random::new(43) }
    }

    /// I3 for one state.
    fn state(&mut self, state: &[u8], when: &str) {
        if !self.met.insert(XxHash3_128::oneshot(state)) {
            return;
        }
        let writing = self.writing;
        let when = format!("{}, {when}", writing.subject.kind);
        let _told = Told(&when, state);
        put(&writing.file, state);
        let found = writing.old_or_new(&writing.file, &when);
        self.between += usize::from(found.layers[0] != writing.due && found.layers[0] != writing.before.layers[0]);
        verify_crashed(&writing.file, writing.left());
        let repaired = mended(state.to_vec(), &when);
        put(&writing.file, &repaired);
        found.unchanged(&writing.subject.contents(&writing.file), &when);
        verify_repaired(&writing.file, writing.left());
        if asked().is_some() || self.met.len() % SAMPLE == 1 {
            self.sample(state, &repaired, &found, &when);
        }
    }

    /// The same by QEMU and by the program itself, and in turn what may be done with such an image.
    fn sample(&mut self, state: &[u8], repaired: &[u8], found: &Contents, when: &str) {
        let Writing { subject, copy, source, .. } = self.writing;
        put(copy, state);
        dedup_img(args!["check", "-q", "-r", "all", copy]).ok();
        assert!(fs::read(copy).unwrap() == repaired, "{when}: the program repairs otherwise than the library");
        qemu::check_clean(copy);
        subject.qemu_reads(copy, found);
        match self.sampled % 4 {
            0 if !subject.kind.contains("bitmaps") => {
                put(copy, state);
                qemu::img(args!["check", "-q", "-r", "all", copy]).ok();
                qemu::check_clean(copy);
                found.unchanged(&subject.contents(copy), when);
            }
            1 => {
                // The next run does the rest, and one more finds nothing to do.
                put(copy, repaired);
                into(&["--threads", "1"], "raw", source, copy);
                self.writing.done(copy, when);
                assert_eq!(into(&[], "raw", source, copy)["changed"], false, "{when}: there is no end of work");
            }
            2 => self.guest(repaired, when),
            _ => {
                // What is safe is decided by the order of writes, not by the dirty bit.
                let mut clean = state.to_vec();
                if clean[7] == 3 {
                    clean[79] &= !1;
                }
                self.guest_without_repair(&clean, when);
            }
        }
        self.sampled += 1;
    }

    /// I2: a repaired image stays clean whatever a guest does.
    fn guest(&mut self, repaired: &[u8], when: &str) {
        let Writing { subject, copy, .. } = self.writing;
        put(copy, repaired);
        let mut expected = subject.contents(copy);
        let commands = expected.guest(copy, &mut self.random).join("\n");
        let ran = qemu::check(copy);
        assert_eq!(ran.code, 0, "{when}, after\n{commands}\n{}", ran.told());
        expected.same_layers(&subject.contents(copy), when);
    }

    fn guest_without_repair(&mut self, state: &[u8], when: &str) {
        let Writing { subject, copy, .. } = self.writing;
        put(copy, state);
        let mut expected = subject.contents(copy);
        let commands = expected.guest(copy, &mut self.random).join("\n");
        let when = format!("{when}, not repaired, after\n{commands}");
        expected.same_layers(&subject.contents(copy), &when);
        put(copy, &mended(fs::read(copy).unwrap(), &when));
        expected.same_layers(&subject.contents(copy), &when);
        qemu::check_clean(copy);
    }
}

/// Writes into a target of the kind and judges it as each of at least so many power failures leaves it.
#[track_caller]
fn survives(kind: &'static str, shorter: bool, step: usize, least: usize) {
    let writing = Writing::new(kind, shorter);
    let mut judge = Judge::new(&writing);
    let storage = CrashStorage::open(&writing.subject.path);
    let report = writing.run(&storage, &Cancel::default()).unwrap();
    assert!(report.written_clusters > 10 && report.reused_clusters > 0, "{kind}: {report:?}");
    put(&writing.file, &storage.now());
    writing.done(&writing.file, kind);
    storage.crashes(17, asked().unwrap_or(CHOICES), step, |state, when| judge.state(state, when));
    let (states, between, sampled) = (judge.met.len(), judge.between, judge.sampled);
    println!("{kind}: {states} states, {between} of them half way, {sampled} judged by QEMU");
    // Where all tables move a single sector has the entries that lead to them.
    let half_way = if kind == "frozen" { between == 0 } else { between > 4 };
    assert!(states >= least && half_way, "{states} states of {kind}, {between} of them half way");
}

macro_rules! survives {
    ($($name:ident: $kind:literal, $shorter:literal, $step:literal, $least:literal;)*) => { $(
        /// I3.
        #[test]
        fn $name() {
            survives($kind, $shorter, $step, $least);
        }
    )* };
}

survives! {
    a_target_with_leaks_survives_every_crash: "leaks", false, 1, 45;
    a_target_with_snapshots_survives_every_crash: "snapshots", true, 1, 45;
    a_target_that_shares_all_tables_survives_every_crash: "frozen", false, 1, 45;
    a_target_with_a_pool_survives_every_crash: "pool", false, 1, 45;
    a_target_with_garbage_and_snapshots_survives_every_crash: "garbage, snapshots", false, 1, 45;
    a_target_whose_directory_is_stale_survives_every_crash: "stale directory", false, 1, 45;
    a_target_whose_refcount_table_grows_survives_every_crash: "growing", false, 61, 45;
    a_target_of_version_2_survives_every_crash: "version 2, snapshots", false, 1, 45;
    a_target_of_version_2_over_a_backing_file_survives_every_crash: "version 2, backing", true, 1, 45;
    a_target_over_a_backing_file_survives_every_crash: "backing", false, 1, 45;
    a_compressed_target_survives_every_crash: "zlib", false, 1, 45;
    a_target_whose_compressed_clusters_are_pooled_survives_every_crash: "compressed pool", false, 1, 45;
    a_target_that_is_pinned_survives_every_crash: "pinned", false, 1, 45;
}

/// What disks fail with.
const CAUSES: [(Errno, &str); 2] = [(Errno::EIO, "Input/output error"), (Errno::ENOSPC, "No space left on device")];

/// Lets every `step`th operation of a run fail, once alone and once with all that follow.
fn fails_everywhere(kind: &'static str, step: usize, least: u64) {
    let writing = Writing::new(kind, false);
    let whole = fs::read(&writing.subject.path).unwrap();
    let (mut failures, mut clean) = (0, 0);
    for at in (0..).step_by(step) {
        let (cause, words) = CAUSES[(at / step as u64) as usize % 2];
        for event in [Event::Error(cause), Event::Broken(cause)] {
            let storage = FailingStorage::of(whole.clone(), at, event.clone());
            let result = writing.run(&storage, &Cancel::default());
            let Some(failed) = storage.failed() else {
                println!("{kind}: {failures} failures, after {clean} of which the image was clean");
                assert!(result.is_ok() && failures >= least && clean > failures / 4, "{kind}: {failures}, {clean}");
                return;
            };
            let when = format!("{kind}: {failed:?}, operation {at}, {event:?}");
            let now = storage.disk().now();
            let _told = Told(&when, &now);
            put(&writing.file, &now);
            let asks = match &result {
                Err(error) => {
                    let message = error.to_string();
                    assert!(message.contains(words) && message.lines().count() == 1, "{when}: {message}");
                    if let Failed::Write(offset) = failed {
                        assert!(message.contains(&format!("{offset:#x}")), "{when}: where? {message}");
                    }
                    error
                        .advice()
                        .any(|advice| matches!(advice, Advice::RepairAfter | Advice::RepairFirst | Advice::Repair))
                }
                // What was to be given back may stay.
                Ok(_) => {
                    assert!(matches!(failed, Failed::Punch | Failed::SetLen), "{when}: not reported");
                    writing.done(&writing.file, &when);
                    false
                }
            };
            if !asks {
                verify_repaired(&writing.file, writing.left());
                clean += 1;
            }
            // As it is, and as a power failure would leave it: what was not flushed may be lost.
            for image in [now.clone(), storage.disk().cut_now(at)] {
                put(&writing.file, &image);
                let found = writing.old_or_new(&writing.file, &when);
                verify_crashed(&writing.file, writing.left());
                put(&writing.file, &mended(image, &when));
                found.unchanged(&writing.subject.contents(&writing.file), &when);
                verify_repaired(&writing.file, writing.left());
            }
            failures += 1;
        }
    }
}

/// I3.
#[test]
fn every_failure_leaves_a_plain_target_whole() {
    fails_everywhere("plain", 2, 50);
}

/// I3.
#[test]
fn every_failure_leaves_a_target_with_snapshots_whole() {
    fails_everywhere("snapshots", 2, 30);
}

/// I3.
#[test]
fn every_failure_leaves_a_target_with_a_pool_whole() {
    fails_everywhere("pool", 2, 30);
}

/// I3.
#[test]
fn every_failure_leaves_a_target_whole_whose_refcount_table_grows() {
    fails_everywhere("growing", 61, 25);
}

/// I3.
#[test]
fn every_failure_leaves_a_target_of_version_2_whole() {
    fails_everywhere("version 2, backing", 2, 30);
}

/// I3 for a run that is asked to stop, at whatever operation: it stops in a clean state, and the next one does the rest.
#[test]
fn a_run_that_is_stopped_leaves_a_clean_target() {
    for kind in ["snapshots", "pool", "version 2, backing"] {
        let writing = Writing::new(kind, false);
        let whole = fs::read(&writing.subject.path).unwrap();
        let (mut stops, mut least) = (0, whole.len());
        for at in 0.. {
            let cancel = Cancel::default();
            let storage = FailingStorage::of(whole.clone(), at, Event::Stop(cancel.clone()));
            let result = writing.run(&storage, &cancel);
            if storage.failed().is_none() {
                break;
            }
            let when = format!("{kind}: stopped at operation {at}: {result:?}");
            let image = storage.disk().now();
            let _told = Told(&when, &image);
            put(&writing.file, &image);
            writing.old_or_new(&writing.file, &when);
            verify_repaired(&writing.file, writing.left());
            let Err(error) = &result else {
                writing.done(&writing.file, &when);
                continue;
            };
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{when}");
            // What it says that it has left is what is there.
            match error.left() {
                Some(dedup_img::Left::Untouched) => assert!(image == whole, "{when}"),
                left => {
                    assert_eq!(left, Some(dedup_img::Left::Clean), "{when}");
                    put(&writing.file, &image);
                    qemu::check_clean(&writing.file);
                }
            }
            stops += 1;
            least = least.min(image.len());
            if stops % 3 == 1 {
                into(&["--threads", "1"], "raw", &writing.source, &writing.file);
                writing.done(&writing.file, &when);
            }
        }
        assert!(stops >= 8, "{kind}: only {stops} runs were stopped");
        assert_eq!(least, whole.len(), "{kind}: what was stopped at once has grown the file");
    }
}
