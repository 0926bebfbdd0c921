//! Opening, checking, repairing, and the directory of the pool.

use crate::content::{Content, Model};
use crate::image::{Input, Subject, mend_directory};
use crate::support::Choices;
use dedup_img::storage::{FileStorage, LockMode};
use dedup_img::units::ClusterBits;
use dedup_img::unstable::{DirectoryHeader, HEADER_LENGTH};
use dedup_img::{
    BackingRule, CheckOptions, CheckReport, Disk, DiskOptions, ErrorKind, Format, Record, Repair, Repaired, Result,
    Work, WorkOptions, open_image,
};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::OnceLock;

/// The means of all operations: two threads, which are started once, and little memory.
pub(crate) fn work() -> &'static Work {
    static WORK: OnceLock<Work> = OnceLock::new();
    WORK.get_or_init(|| Work::new(WorkOptions { threads: Some(2), memory: 4 << 20, ..WorkOptions::default() }).unwrap())
}

/// The image at `path` as an operation gets it.
pub(crate) fn storage(path: &Path, mode: LockMode) -> FileStorage {
    open_image(path, Some(Format::Qcow2), mode).unwrap().0
}

/// Checks the image at `path`.
pub(crate) fn checked(path: &Path, data: bool) -> Result<CheckReport> {
    dedup_img::check(&storage(path, LockMode::Read), CheckOptions { data }, work(), &mut |finding| {
        // What is said must be sayable.
        drop(finding.kind.to_string());
    })
}

/// Whether nothing at all is wrong.
pub(crate) fn is_clean(report: &CheckReport) -> bool {
    report.check_errors + report.corruptions + report.leaks + report.findings_beyond == 0
}

/// Opens a damaged image in every way there is, and reads the disk and the snapshots: errors, and nothing else.
pub fn open(input: &[u8]) {
    let subject = Subject::new(&mut Input(input));
    let before = subject.bytes();
    let model = Model::of(&subject.path);
    let rules = [(None, true, BackingRule::Plain), (Some(Format::Qcow2), false, BackingRule::Refused)];
    for (format, salvage, backing) in rules {
        let options = DiskOptions { format, salvage, backing, ..DiskOptions::default() };
        if let Ok(disk) = Disk::open(&subject.path, &options) {
            let content = Content::of(&disk);
            // With zeros for what cannot be read nothing is left that cannot.
            let whole = content.is_none_or(|content| !salvage || content.is_whole());
            assert!(whole, "{}: not all of it was salvaged", subject.story);
        }
    }
    if let Ok(disk) = Disk::open_with_snapshots(&subject.path, &DiskOptions::default(), ClusterBits::DEFAULT) {
        drop(Content::of(&disk));
    }
    drop(model);
    assert!(subject.bytes() == before, "{}: opening wrote to it", subject.story);
}

/// Checks a damaged image, twice: both find the same, and neither writes.
pub fn check(input: &[u8]) {
    let subject = Subject::new(&mut Input(input));
    let before = subject.bytes();
    let [first, second] = [false, true].map(|data| checked(&subject.path, data));
    assert!(subject.bytes() == before, "{}: a check wrote to it", subject.story);
    if let (Ok(first), Ok(second)) = (&first, &second) {
        let mut same = *second;
        (same.corruptions, same.findings_beyond) = (first.corruptions, first.findings_beyond);
        assert_eq!(*first, same, "{}", subject.story);
        assert!(second.findings_beyond >= first.findings_beyond, "{}", subject.story);
    }
}

/// Repairs a damaged image: whatever could be read reads the same afterwards, and what is said to be mended is.
pub fn repair(input: &[u8]) {
    let mut input = Input(input);
    let subject = Subject::new(&mut input);
    let what = if input.below(4) == 0 { Repair::Leaks } else { Repair::All };
    let (before, model) = (subject.bytes(), Model::of(&subject.path));
    let mend = || {
        let storage = storage(&subject.path, LockMode::Write);
        dedup_img::repair(&storage, what, CheckOptions::default(), work(), &mut |finding| {
            drop(finding.kind.to_string());
        })
    };
    let told = |repaired: &Result<Repaired>| format!("{}: {what:?}: {repaired:?}", subject.story);
    let repaired = mend();
    match &repaired {
        Err(error) => {
            assert!(subject.bytes() == before, "refused, and yet written to: {}", told(&repaired));
            assert!(!error.to_string().is_empty(), "{}", told(&repaired));
        }
        Ok(done) if done.refused.is_some() => {
            assert!(subject.bytes() == before, "refused, and yet written to: {}", told(&repaired));
        }
        Ok(done) => {
            assert_eq!(checked(&subject.path, false).ok(), Some(done.report), "{}", told(&repaired));
            if what == Repair::All {
                // Where two parts claim a cluster nothing is freed.
                let leaks = if done.report.findings_beyond > 0 { 0 } else { done.report.leaks };
                assert_eq!(done.report.corruptions + leaks, 0, "{}", told(&repaired));
            }
            // What the directory of a pool shared with the refcounts belongs to it alone once they have moved.
            let mut stale = done.report.benign > 0;
            let mut after = subject.bytes();
            for _ in 0..2 {
                let again = mend();
                assert!(again.is_ok(), "a further repair fails: {}", told(&again));
                assert!(subject.bytes() == after || stale, "a further repair finds more: {}", told(&again));
                (stale, after) = (false, subject.bytes());
            }
        }
    }
    model.assert_kept(&subject.path, &told(&repaired));
}

/// Decodes the bytes as a directory, alone and as the pool of an image, as they are and with their checksums made right.
pub fn directory(input: &[u8]) {
    let mut input = Input(input);
    let (mended, data) = (input.below(2) == 1, input.below(2) == 1);
    let mut bytes = input.0.to_vec();
    if mended {
        mend_directory(&mut bytes);
    }
    if let Some(header) = DirectoryHeader::decode(&bytes) {
        assert_eq!(
            Sha256::digest(&bytes[..96])[..],
            bytes[96..HEADER_LENGTH],
            "a header with a wrong checksum is taken"
        );
        let mut plain = bytes[..HEADER_LENGTH].to_vec();
        plain[48..64].fill(0);
        mend_directory(&mut plain);
        assert_eq!(header.encode()[..64], plain[..64], "what was read is not what is written");
        assert_eq!(DirectoryHeader::decode(&header.encode()), Some(header));
    }
    for record in bytes.get(HEADER_LENGTH..).unwrap_or_default().as_chunks().0 {
        let decoded = Record::decode(record);
        assert_eq!(Record::decode(&decoded.encode()), decoded);
    }
    let (subject, sound) = Subject::with_directory(&bytes, mended);
    let model = Model::of(&subject.path);
    let report = checked(&subject.path, data).unwrap();
    assert!(data || is_clean(&report), "a directory is disposable: {report:?}");
    assert!(sound.is_none() || report.benign > 0, "another directory is not noticed: {report:?}");
    let storage = storage(&subject.path, LockMode::Write);
    let repaired = dedup_img::repair(&storage, Repair::All, CheckOptions { data }, work(), &mut |_| {});
    drop(storage);
    match repaired {
        // With its checksums right a directory may say of a member that it was something else.
        Ok(done) => assert!(is_clean(&done.report) || mended && data, "{done:?}"),
        Err(error) => assert!(mended && data && error.kind() == ErrorKind::Corrupt, "{error}"),
    }
    assert!(sound.is_none_or(|sound| subject.bytes() == sound), "the directory is not what it was");
    model.assert_kept(&subject.path, &subject.story);
}
