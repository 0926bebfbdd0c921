//! I1 and I3 for `dedup` on a disk that fails: whatever operation it is, and whether only that one or all from then on, the run
//! ends with the cause, every guest byte still reads right, and a repair ends clean.

use crate::args;
use crate::support::crash::CrashStorage;
use crate::support::failing::{Event, Failed, FailingStorage};
use crate::support::inplace::{Contents, Subject, Told, mended, put, verify_crashed, verify_repaired};
use crate::support::{Ran, dedup_img, qemu};
use dedup_img::{Advice, Cancel, ErrorKind, Left};
use nix::errno::Errno;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Every so many failures QEMU repairs too.
const SAMPLE: u64 = 9;

/// What disks fail with.
const CAUSES: [(Errno, &str); 2] = [(Errno::EIO, "Input/output error"), (Errno::ENOSPC, "No space left on device")];

/// The incompatible features in the header, and that an image was not closed.
const INCOMPATIBLE_AT: usize = 72;
const DIRTY: u8 = 1;

/// Lets every `step`th operation of a run fail, once alone and once with all that follow.
pub(super) fn fails_everywhere(subject: &Subject, step: usize, least: u64) {
    let (kind, left) = (subject.kind, subject.left());
    let before = subject.contents(&subject.path);
    let whole = fs::read(&subject.path).unwrap();
    let file = subject.home.path().join("failed.qcow2");
    let mut failures = 0;
    for at in (0..).step_by(step) {
        let (cause, words) = CAUSES[(at / step as u64) as usize % 2];
        for event in [Event::Error(cause), Event::Broken(cause)] {
            let storage = FailingStorage::of(whole.clone(), at, event.clone());
            let result = subject.run(&storage);
            let Some(failed) = storage.failed() else {
                eprintln!("{kind}: {failures} failures");
                assert!(result.unwrap() && failures >= least, "{kind}: only {failures} failures");
                return;
            };
            let when = format!("{kind}: {failed:?}, operation {at}, {event:?}");
            let header = &storage.disk().now()[..80];
            let is_clean = header[7] < 3 || header[INCOMPATIBLE_AT + 7] & DIRTY == 0;
            match result {
                Err(error) => {
                    let message = error.to_string();
                    tells(&message, failed, words, &when);
                    assert!(
                        is_clean
                            || error.advice().any(|advice| matches!(
                                advice,
                                Advice::RepairAfter | Advice::RepairFirst | Advice::Repair
                            )),
                        "{when}: not clean, and nobody says so: {message}"
                    );
                }
                // What was to be given back may stay.
                Ok(_) => assert!(matches!(failed, Failed::Punch | Failed::SetLen) && is_clean, "{when}: not reported"),
            }
            // As it is, and as a power failure would leave it: what was not flushed may be lost.
            for image in [storage.disk().now(), storage.disk().cut_now(at), storage.disk().cut_now(!at)] {
                let _told = Told(&when, &image);
                put(&file, &image);
                before.unchanged(&subject.contents(&file), &when);
                verify_crashed(&file, left);
                put(&file, &mended(image.clone(), &when));
                before.unchanged(&subject.contents(&file), &when);
                verify_repaired(&file, left);
            }
            if failures % SAMPLE == 0 {
                put(&file, &storage.disk().now());
                qemu_repairs(subject, &before, &file);
            }
            failures += 1;
        }
    }
}

/// The message has the cause in words, and for a write where it was.
#[track_caller]
fn tells(message: &str, failed: Failed, words: &str, when: &str) {
    assert!(message.contains(words) && message.lines().count() == 1, "{when}: {message}");
    if let Failed::Write(offset) = failed {
        assert!(message.contains(&format!("{offset:#x}")), "{when}: the offset {offset:#x} is missing: {message}");
    }
}

/// I3: QEMU's own repair ends clean, and everything reads as before.
fn qemu_repairs(subject: &Subject, before: &Contents, file: &PathBuf) {
    qemu::img(args!["check", "-q", "-r", "all", file]).ok();
    qemu::check_clean(file);
    before.unchanged(&subject.contents(file), "repaired by QEMU");
}

/// I1, I3.
#[test]
fn every_failure_leaves_an_image_without_snapshots_whole() {
    fails_everywhere(&Subject::new("plain"), 1, 80);
}

/// I1, I3.
#[test]
fn every_failure_leaves_snapshots_whole() {
    fails_everywhere(&Subject::new("snapshots"), 1, 80);
}

/// I1, I3.
#[test]
fn every_failure_leaves_a_compressed_image_whole() {
    fails_everywhere(&Subject::new("zlib"), 1, 60);
}

/// I1, I3.
#[test]
fn every_failure_leaves_a_pool_whole() {
    fails_everywhere(&Subject::new("pool"), 1, 60);
}

/// I1, I3.
#[test]
fn every_failure_leaves_a_version_2_overlay_whole() {
    fails_everywhere(&Subject::new("version 2, backing"), 1, 70);
}

/// I1, I3.
#[test]
fn every_failure_leaves_an_image_whole_whose_refcount_table_grows() {
    fails_everywhere(&Subject::new("growing"), 2, 40);
}

/// Asks a run to stop at whatever operation: it stops in a clean state, or finishes; the next one does the rest.
pub(super) fn stops_everywhere(subject: &Subject, least: usize) {
    let kind = subject.kind;
    let before = subject.contents(&subject.path);
    let whole = fs::read(&subject.path).unwrap();
    let file = subject.home.path().join("stopped.qcow2");
    let mut stops = 0;
    for at in 0.. {
        let cancel = Cancel::default();
        let storage = FailingStorage::of(whole.clone(), at, Event::Stop(cancel.clone()));
        let result = subject.run_until(&storage, &cancel);
        if storage.failed().is_none() {
            break;
        }
        let when = format!("{kind}: stopped at operation {at}: {result:?}");
        let image = storage.disk().now();
        let _told = Told(&when, &image);
        put(&file, &image);
        before.unchanged(&subject.contents(&file), &when);
        verify_repaired(&file, subject.left());
        if let Err(error) = &result {
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{when}");
            // What it says that it has left is what is there.
            match error.left() {
                Some(Left::Untouched) => assert!(image == whole, "{when}"),
                left => {
                    assert_eq!(left, Some(Left::Clean), "{when}");
                    put(&file, &image);
                    qemu::check_clean(&file);
                }
            }
            let again = CrashStorage::of(image.clone());
            // It may have been asked when all but a last look was done.
            let changed = subject.run(&again).unwrap();
            assert!(changed || subject.collects.is_some(), "{when}: nothing was left to do");
            put(&file, &again.now());
            before.unchanged(&subject.contents(&file), &when);
            verify_repaired(&file, subject.finished());
            stops += 1;
        }
    }
    assert!(stops >= least, "{kind}: only {stops} runs were stopped");
}

/// I1 and I2 for a run that is asked to stop.
#[test]
fn a_run_that_is_stopped_leaves_a_clean_image() {
    for kind in ["snapshots", "version 2, backing", "pool"] {
        stops_everywhere(&Subject::new(kind), 11);
    }
}

/// Deduplicates in a process that may make no file longer than `limit` bytes.
fn limited(path: &PathBuf, limit: u64, before: &str) -> Ran {
    let mut command = Command::new("sh");
    let script = format!("{before} ulimit -c 0; exec prlimit --fsize={limit} \"$0\" dedup -q \"$1\"");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_dedup-img")]).arg(path).stdin(Stdio::null());
    qemu::finish("sh", command)
}

/// I1 and I3 where the system really refuses to make the file longer, by however much: exit code 1 and one line with the cause,
/// or where the signal that comes with it is not ignored, the end of the process.
#[test]
fn a_file_that_may_not_grow_is_left_whole() {
    for kind in ["64 bits", "growing"] {
        let subject = Subject::new(kind);
        let before = subject.contents(&subject.path);
        let whole = fs::read(&subject.path).unwrap();
        let grown = subject.deduplicate(&CrashStorage::of(whole.clone())).unwrap().file_length_after_bytes;
        let length = whole.len() as u64;
        assert!(grown > length, "{kind}: nothing to refuse");
        let file = subject.home.path().join("limited.qcow2");
        for part in 0..8 {
            let limit = length + (grown - length) * part / 8;
            for before_it in ["trap '' XFSZ;", ""] {
                put(&file, &whole);
                let ran = limited(&file, limit, before_it);
                if ran.code != -1 || !before_it.is_empty() {
                    ran.refused(&["File too large"]);
                }
                before.unchanged(&subject.contents(&file), kind);
                dedup_img(args!["check", "-q", "-r", "all", &file]).ok();
                verify_repaired(&file, subject.finished());
                before.unchanged(&subject.contents(&file), kind);
                qemu::check_clean(&file);
            }
        }
    }
}
