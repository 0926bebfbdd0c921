//! Conversions, deduplication and collection of a damaged image, against a model of its content: it never changes, and what came
//! of it is clean; or the operation is refused.

use crate::bodies::{checked, is_clean, storage, work};
use crate::content::{Content, Model, disk};
use crate::image::{Input, Subject};
use crate::support::Choices;
use crate::support::reader::{Pin as Pooled, verify_dedup, verify_packed, verify_plain};
use dedup_img::storage::LockMode;
use dedup_img::units::ClusterBits;
use dedup_img::{
    ClusterSize, CompressionLevel, CompressionType, ConvertOptions, DedupOptions, Disk, DiskOptions, Format, GcOptions,
    IntoOptions, Pin, RawOptions, RefcountBits, Sharing, Traits, convert_into, to_raw,
};
use std::fs;
use std::path::Path;

/// Operations on one image.
const MOST: u64 = 4;

/// Does what the input says to the image that it describes.
pub fn round_trip(input: &[u8]) {
    let mut input = Input(input);
    let subject = Subject::new(&mut input);
    for n in 0..=input.below(MOST) {
        match input.below(8) {
            0 | 1 => converted(&subject, &mut input),
            2 => into_raw(&subject),
            3 => with_snapshots(&subject, &mut input),
            4 if n > 0 => written_into(&subject, &mut input),
            5 | 4 => {
                let options = GcOptions { compact: input.below(2) == 1, drop_pool: input.below(3) == 1 };
                changed(&subject, &format!("{options:?}"), |image| dedup_img::gc(image, options, work()).map(|_| ()));
            }
            _ => {
                let options = DedupOptions { pin: pin(&mut input) };
                changed(&subject, &format!("{options:?}"), |image| {
                    dedup_img::dedup(image, options, work()).map(|_| ())
                });
            }
        }
    }
}

fn pin(input: &mut Input<'_>) -> Pin {
    if input.below(3) == 0 { Pin::All } else { Pin::Shared }
}

/// An operation in place. Whether it succeeds or not, what could be read reads the same; a refusal writes nothing.
fn changed(
    subject: &Subject,
    what: &str,
    operation: impl FnOnce(&dyn dedup_img::storage::Storage) -> dedup_img::Result<()>,
) {
    let (model, before, data) = (Model::of(&subject.path), subject.bytes(), is_true(&subject.path));
    let image = storage(&subject.path, LockMode::Write);
    let done = operation(&image);
    drop(image);
    let told = format!("{}: {what}: {done:?}", subject.story);
    match done {
        Ok(()) => assert_clean(&subject.path, data, &told),
        Err(_) => assert!(subject.bytes() == before, "refused, and yet written to: {told}"),
    }
    model.assert_kept(&subject.path, &told);
}

/// Whether all members of the pool hold what their SHA-256 names, which nothing in place looks at.
fn is_true(path: &Path) -> bool {
    checked(path, true).is_ok_and(|report| report.findings_beyond == 0)
}

#[track_caller]
fn assert_clean(path: &Path, data: bool, told: &str) {
    let report = checked(path, data);
    assert!(report.as_ref().is_ok_and(is_clean), "not clean: {told}: {report:?}");
}

/// A new image of the disk.
fn converted(subject: &Subject, input: &mut Input<'_>) {
    let way = input.below(6);
    let pin = pin(input);
    let bits = [9, 12, 12, 14, 16, 17][usize::try_from(input.below(6)).unwrap()];
    let compression = if input.below(2) == 0 { CompressionType::Zlib } else { CompressionType::Zstd };
    let options = ConvertOptions {
        cluster_size: if way == 0 { ClusterSize::Auto } else { ClusterSize::Fixed(ClusterBits::new(bits).unwrap()) },
        refcount_bits: RefcountBits::new([4, 8, 16, 32, 64][usize::try_from(input.below(5)).unwrap()]).unwrap(),
        traits: Traits { compression, ..Traits::default() },
        sharing: if way == 1 { Sharing::Plain } else { Sharing::Pooled(pin) },
        compress: (way == 2).then(|| CompressionLevel::new(compression, None).unwrap()),
        durable: false,
        ..ConvertOptions::default()
    };
    let target = subject.beside("converted");
    let model = Model::of(&subject.path);
    let before = subject.bytes();
    let done = disk(&subject.path, Format::Qcow2, None)
        .and_then(|source| dedup_img::convert(&source, &target, &options, work()));
    assert!(subject.bytes() == before, "{}: a conversion wrote to its source", subject.story);
    let told = format!("{}: {options:?}: {done:?}", subject.story);
    if done.is_err() {
        assert!(!target.exists(), "left behind: {told}");
        return;
    }
    assert_clean(&target, true, &told);
    match (way, pin) {
        (1, _) => drop(verify_plain(&target)),
        // With few references a content may be there several times.
        (2, Pin::Shared) if options.refcount_bits.bits() > 8 => drop(verify_packed(&target)),
        (2, _) => {}
        (_, Pin::All) => drop(verify_dedup(&target, Pooled::All)),
        (_, Pin::Shared) => drop(verify_dedup(&target, Pooled::Shared)),
    }
    same(&model, Model::of(&target).active(), &told);
    fs::remove_file(target).unwrap();
}

/// A raw file of the disk.
fn into_raw(subject: &Subject) {
    let (target, model) = (subject.beside("converted.raw"), Model::of(&subject.path));
    let options = RawOptions { sparse: RawOptions::DEFAULT_SPARSE, durable: false, uncached: false, rate: None };
    let done = disk(&subject.path, Format::Qcow2, None).and_then(|source| to_raw(&source, &target, options, work()));
    let told = format!("{}: into raw: {done:?}", subject.story);
    if done.is_err() {
        return assert!(!target.exists(), "left behind: {told}");
    }
    let written = Content::of(&disk(&target, Format::Raw, None).unwrap());
    same(&model, written.as_ref(), &told);
    fs::remove_file(target).unwrap();
}

/// A new image of the disk and all snapshots.
fn with_snapshots(subject: &Subject, input: &mut Input<'_>) {
    let bits = ClusterBits::new([12, 14, 16][usize::try_from(input.below(3)).unwrap()]).unwrap();
    let options = ConvertOptions {
        cluster_size: ClusterSize::Fixed(bits),
        durable: false,
        compress: (input.below(3) == 0).then(|| CompressionLevel::new(CompressionType::Zlib, None).unwrap()),
        ..ConvertOptions::default()
    };
    let (target, model) = (subject.beside("converted"), Model::of(&subject.path));
    let done = Disk::open_with_snapshots(&subject.path, &DiskOptions::default(), bits)
        .and_then(|source| dedup_img::convert(&source, &target, &options, work()));
    let told = format!("{}: with snapshots, {options:?}: {done:?}", subject.story);
    if done.is_err() {
        return assert!(!target.exists(), "left behind: {told}");
    }
    assert_clean(&target, true, &told);
    model.assert_kept(&target, &told);
    fs::remove_file(target).unwrap();
}

/// The disk of another image written into this one: it reads as that one does, and the snapshots as before.
fn written_into(subject: &Subject, input: &mut Input<'_>) {
    let source = Subject::new(input);
    let (mut model, before, data) = (Model::of(&subject.path), subject.bytes(), is_true(&subject.path));
    let content = Model::of(&source.path);
    let options = IntoOptions { pin: pin(input), ..IntoOptions::default() };
    let done = disk(&source.path, Format::Qcow2, None)
        .and_then(|source| convert_into(&source, &subject.path, options, work()).map(|_| ()));
    let told = format!("{} into {}: {done:?}", source.story, subject.story);
    match done {
        Err(_) => assert!(subject.bytes() == before, "refused, and yet written to: {told}"),
        Ok(()) => {
            assert_clean(&subject.path, data, &told);
            // Behind the end of the source the disk keeps what it had.
            if let (Some(Some(due)), Some(source)) = (model.0.remove(""), content.active()) {
                assert!(source.is_whole(), "what cannot be read was written: {told}");
                model.0.insert(String::new(), Some(due.overwritten(source)));
            }
        }
    }
    model.assert_kept(&subject.path, &told);
}

/// What was converted holds what the image held, all of which could be read.
#[track_caller]
fn same(model: &Model, after: Option<&Content>, told: &str) {
    let Some(before) = model.active() else { return };
    assert!(before.is_whole(), "what cannot be read was converted: {told}");
    match after {
        Some(after) => assert_eq!(before.changed(after), None, "{told}"),
        None => panic!("what was converted cannot be read: {told}"),
    }
}
