//! Little room on the file system, or none: `gc` and `dedup` say so before they write, give back first what is free, do in parts what
//! they would do at once, and write the same bytes. The power may fail at any of it (I3).

use super::dedup_crash::{Judge, asked};
use crate::args;
use crate::support::crash::CrashStorage;
use crate::support::failing::{Event, FailingStorage};
use crate::support::inplace::{Contents, Subject, put};
use crate::support::reader::Image;
use crate::support::{dedup_img, qemu};
use dedup_img::{Advice, Cancel, Error, ErrorKind, GcReport};
use nix::errno::Errno;
use std::fs;

/// Random choices of what was not flushed, for each operation.
const CHOICES: u64 = 4;

/// The image of a kind on a full file system, without its blocks of zeros.
fn full(subject: &Subject, more: u64) -> CrashStorage {
    CrashStorage::open(&subject.path).sparse_with_room(more)
}

fn collect(subject: &Subject, storage: &CrashStorage) -> GcReport {
    subject.collect_until(storage, &Cancel::default()).unwrap_or_else(|error| panic!("{}: {error}", subject.kind))
}

/// Judges what a run has left, and every power failure on the way.
fn survives(subject: &Subject, storage: &CrashStorage, step: usize, least: usize) {
    let mut judge = Judge::new(subject);
    judge.finished(storage);
    storage.crashes(23, asked().unwrap_or(CHOICES), step, |state, when| judge.state(state, when));
    judge.sum(least);
}

/// Whether the image is to be repaired after this.
fn asks_for_repair(error: &Error) -> bool {
    error.advice().any(|advice| matches!(advice, Advice::RepairAfter))
}

/// I1, I3. A full file system has no room for a new pool beside the old one.
#[test]
fn garbage_is_freed_without_a_byte_of_room() {
    for (kind, given_up, more) in
        [("garbage", "garbage, given up", 0), ("garbage, snapshots", "garbage, snapshots, given up", 4096)]
    {
        let mut subject = Subject::to_collect(kind);
        subject.kind = given_up;
        let storage = full(&subject, more);
        let before = storage.used();
        let report = collect(&subject, &storage);
        assert!(report.garbage_members > 0 && report.pool_members > 0, "{kind}: {report:?}");
        assert!(report.room_least_bytes <= more && report.room_needed_bytes > more, "{kind}: {report:?}");
        assert_eq!(report.room_available_bytes, Some(more), "{kind}");
        assert!(storage.used() < before, "{kind}: {before} became {}", storage.used());
        survives(&subject, &storage, 1, 35);
        // The same members are in the pool as with room.
        let roomy = CrashStorage::open(&subject.path);
        assert_eq!(collect(&subject, &roomy).pool_members, report.pool_members, "{kind}");
        assert!(!subject.run(&storage).unwrap(), "{kind}: there is no end of work");
    }
}

/// I1, I3 where what is free already is given back first. The bytes are those of a run with room (I5).
#[test]
fn leaks_are_given_back_before_a_new_pool_is_written() {
    let subject = Subject::new("leaks");
    let mut image = fs::read(&subject.path).unwrap();
    let leaked = image.len() - 6 * 4096;
    image[leaked..].fill(9);
    let storage = CrashStorage::of(image.clone()).sparse_with_room(0);
    let report = subject.deduplicate(&storage).unwrap();
    assert!(report.duplicate_clusters > 0 && report.room_needed_bytes > 0, "{report:?}");
    let roomy = CrashStorage::of(image);
    subject.deduplicate(&roomy).unwrap();
    assert!(storage.now() == roomy.now(), "the bytes depend on the room");
    survives(&subject, &storage, 1, 100);
}

/// I1, I3, I5 where there is room for a part of what moves only.
#[test]
fn a_compaction_in_parts_moves_everything_to_the_same_places() {
    let mut in_parts = 0;
    for (kind, step, least) in [
        ("holes", 3, 30),
        ("snapshots", 3, 20),
        ("bitmaps", 3, 40),
        ("zlib", 5, 40),
        ("backing", 3, 30),
        ("subclusters", 3, 20),
        ("amended", 401, 20),
        ("in the way", 29, 20),
    ] {
        let subject = Subject::to_collect(kind);
        let roomy = CrashStorage::open(&subject.path);
        let whole = collect(&subject, &roomy);
        // Free clusters are holes: with them it would be given room.
        let probe = full(&subject, 1 << 30);
        let forecast = collect(&subject, &probe);
        let (least_room, needed) = (forecast.room_least_bytes, forecast.room_needed_bytes);
        let room = least_room.max(needed / 4);
        let storage = full(&subject, room);
        let report = collect(&subject, &storage);
        assert_eq!(report.moved_clusters, whole.moved_clusters, "{kind}");
        assert!(storage.now() == roomy.now(), "{kind}: the bytes depend on the room");
        in_parts += u32::from(storage.operations() > probe.operations());
        survives(&subject, &storage, step, least);
    }
    assert!(in_parts >= 4, "only {in_parts}");
}

/// Nothing is written where there is no room, and the error tells how much is needed: with that it goes through.
#[test]
fn what_has_no_room_is_not_begun() {
    let subject = Subject::new("plain");
    let storage = full(&subject, 0);
    let error = subject.deduplicate(&storage).unwrap_err();
    let ErrorKind::NoRoom { needed, available: 0 } = error.kind() else { panic!("{error:?}") };
    assert_eq!(storage.operations(), 0);
    for more in [needed - 1, needed] {
        let storage = full(&subject, more);
        let done = subject.deduplicate(&storage);
        assert_eq!(done.is_ok(), more == needed, "{more} of {needed}: {done:?}");
        if more == needed {
            let report = done.unwrap();
            assert_eq!((report.room_needed_bytes, report.room_available_bytes), (needed, Some(needed)));
            Judge::new(&subject).finished(&storage);
        } else {
            assert_eq!(storage.operations(), 0);
        }
    }
    let subject = Subject::to_collect("snapshots");
    let storage = full(&subject, 0);
    let error = subject.collect_until(&storage, &Cancel::default()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NoRoom { available: 0, .. }), "{error:?}");
    assert_eq!(storage.operations(), 0);
}

/// I1, I3 for the same on a disk that fails, and where the user asks to stop. That there is no pool any more is said.
#[test]
fn a_pool_that_is_given_up_survives_every_failure() {
    let subject = Subject::to_collect("garbage");
    let before = subject.contents(&subject.path);
    let file = subject.home.path().join("failed.qcow2");
    for at in 0.. {
        let cancel = Cancel::default();
        for event in [Event::Error(Errno::EIO), Event::Broken(Errno::EIO), Event::Stop(cancel.clone())] {
            let when = format!("operation {at}, {event:?}");
            let storage = FailingStorage::over(full(&subject, 0), at, event);
            let done = subject.collect_until(&storage, &cancel);
            if storage.failed().is_none() {
                assert!(done.is_ok() && at > 25, "only {at} operations: {done:?}");
                return;
            }
            let needs_repair = done.as_ref().is_err_and(asks_for_repair);
            let message = done.map_or_else(|error| error.to_string(), |_| String::new());
            put(&file, &storage.disk().now());
            before.unchanged(&subject.contents(&file), &when);
            if needs_repair {
                dedup_img(args!["check", "-q", "-r", "all", &file]).ok();
            }
            qemu::check_clean(&file);
            let has_pool = Image::open(&file).snapshots().0.iter().any(|snapshot| snapshot.name == "dedup-pool");
            let is_broken = when.contains("Broken");
            assert!(has_pool || is_broken || message.contains("given up"), "{when}: {message}");
        }
    }
}

/// I1, I2 where somebody else takes the room that was there: at every point of the run.
#[test]
fn room_that_goes_meanwhile_leaves_the_image_whole() {
    let file = |subject: &Subject| subject.home.path().join("full.qcow2");
    for kind in ["garbage", "pool"] {
        let subject = Subject::to_collect(kind);
        let before: Contents = subject.contents(&subject.path);
        let image = fs::read(&subject.path).unwrap();
        for more in (0..64).map(|blocks| blocks * 4096) {
            let storage = CrashStorage::of(image.clone()).sparse_with_room(more).lying();
            let done = subject.collect_until(&storage, &Cancel::default());
            put(&file(&subject), &storage.now());
            let when = format!("{kind}, {more} bytes: {done:?}");
            before.unchanged(&subject.contents(&file(&subject)), &when);
            if done.as_ref().is_err_and(asks_for_repair) {
                dedup_img(args!["check", "-q", "-r", "all", file(&subject)]).ok();
            }
            qemu::check_clean(&file(&subject));
        }
    }
}
