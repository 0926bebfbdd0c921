//! `check -r all` on the images of a mutator, beside qemu-img's repair: whatever was readable reads the same afterwards, what
//! counts as mended is clean for qemu-img, and what is refused although qemu-img mends it is refused for a known reason.

use crate::args;
use crate::support::mutator::Mutator;
use crate::support::subjects::subjects;
use crate::support::{Random, dedup_img, qemu, scratch};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Damaged images made of each subject.
const DAMAGED: usize = 8;
/// A disk that damage has made larger is not read.
const LARGEST: u64 = 64 << 20;

/// Why something is refused that qemu-img calls mended: it counts what a damaged entry happens to point to, or rewrites the
/// snapshot table. We write nothing where the mapping itself is in doubt.
const REFUSED: [&str; 7] = [
    "reserved bits set",
    "is claimed twice",
    "not properly aligned",
    "exceeding the end of the file",
    "is incomplete",
    "subcluster allocation",
    "corrupted",
];

/// The disk as qemu-img reads it, or nothing where it cannot or need not.
fn disk(file: &Path, raw: &Path) -> Option<Vec<u8>> {
    let header = fs::read(file).unwrap();
    if header.len() < 32 || u64::from_be_bytes(header[24..32].try_into().unwrap()) > LARGEST {
        return None;
    }
    let ran = qemu::run("qemu-img", args!["convert", "-f", "qcow2", "-O", "raw", file, raw]);
    (ran.code == 0).then(|| fs::read(raw).unwrap())
}

fn mend_all(fits: fn(&str) -> bool) {
    let home = scratch();
    let [raw, ours, theirs] = ["disk.raw", "ours.qcow2", "theirs.qcow2"].map(|name| home.path().join(name));
    let (mut mended, mut refused) = (0, BTreeSet::new());
    for (seed, (name, path)) in (301..).zip(subjects()).filter(|(_, (name, _))| fits(name)) {
        let (mutator, mut random) = (Mutator::new(&path), Random::new(seed));
        for _ in 0..DAMAGED {
            let damaged = mutator.damage(&mut random);
            fs::write(&ours, &damaged.bytes).unwrap();
            let before = disk(&ours, &raw);
            if !matches!(qemu::check(&ours).code, 2 | 3) {
                continue;
            }
            fs::write(&theirs, &damaged.bytes).unwrap();
            qemu::run("qemu-img", args!["check", "-f", "qcow2", "-r", "all", &theirs]);
            let ran = dedup_img(args!["check", "-f", "qcow2", "-r", "all", &ours]);
            let told = format!("{name}, {}: {}", damaged.story, ran.told());
            assert!(!ran.stderr.contains("panicked"), "{told}");
            if ran.stderr.contains("nothing was repaired") {
                assert!(matches!(ran.code, 1 | 2) && fs::read(&ours).unwrap() == damaged.bytes, "{told}");
                if qemu::check(&theirs).code == 0 {
                    let reason = REFUSED.iter().find(|reason| ran.stderr.contains(*reason));
                    refused.insert(*reason.unwrap_or_else(|| panic!("refused for no known reason: {told}")));
                }
                continue;
            }
            if ran.code == 0 {
                mended += 1;
                qemu::check_clean(&ours);
            }
            if before.is_some() {
                assert!(disk(&ours, &raw) == before, "the content has changed: {told}");
            }
        }
    }
    assert!(mended > 5, "only {mended} were mended");
}

#[test]
fn plain_images_are_mended_as_well_as_by_qemu_img() {
    mend_all(|name| name.starts_with("plain") || ["preallocated", "lazy"].contains(&name));
}

#[test]
fn images_of_every_refcount_width_are_mended_as_well_as_by_qemu_img() {
    mend_all(|name| name.starts_with("bits"));
}

#[test]
fn images_with_snapshots_bitmaps_and_compression_are_mended_as_well_as_by_qemu_img() {
    mend_all(|name| ["snapshots", "version", "bitmaps", "z", "subclusters"].iter().any(|kind| name.starts_with(kind)));
}
