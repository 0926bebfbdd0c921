//! The judge is not blind: each kind of damage to a good image is found, and called by its name.

use crate::args;
use crate::support::corpus::{patch, plain};
use crate::support::reader::{Entry, Image, Pin, number, verify_dedup};
use crate::support::{dedup_img, qemu, scratch};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// What the judge says against a file; nothing where it passes.
fn verdict(path: &Path, pin: Pin) -> String {
    match catch_unwind(AssertUnwindSafe(|| verify_dedup(path, pin))) {
        Ok(_) => String::new(),
        Err(said) => said.downcast_ref::<String>().cloned().unwrap_or_default(),
    }
}

/// Where things are in the image that the test damages.
struct Places {
    /// L2 entry of a private cluster, and of a shared one.
    private: u64,
    shared: u64,
    /// Snapshot table, first L2 table of the pool, directory.
    table: u64,
    members: u64,
    directory: u64,
    /// A member's bytes.
    member: u64,
}

/// Finds them with the reader that is on trial; a wrong place would make the damage miss and the test fail.
fn places(path: &Path) -> Places {
    let image = Image::open(path);
    let facts = verify_dedup(path, Pin::Shared);
    let entry_of = |shared: bool| {
        let found = image.active().into_iter().find_map(|table| {
            let slot = table
                .entries
                .iter()
                .position(|entry| matches!(entry, Entry::Data { host, .. } if (facts.sharers[host] > 1) == shared))?;
            Some(table.host + slot as u64 * 8)
        });
        found.unwrap()
    };
    let (snapshots, _) = image.snapshots();
    let tables = image.tables(snapshots[0].l1_table_offset, snapshots[0].l1_size);
    let last = tables.last().unwrap();
    Places {
        private: entry_of(false),
        shared: entry_of(true),
        table: image.header.snapshots_offset,
        members: tables[0].host,
        directory: last.words[0] & 0x00ff_ffff_ffff_fe00,
        member: facts.members[0],
    }
}

#[test]
fn every_damage_is_found_and_named() {
    let home = scratch();
    let [good, bad] = ["good.qcow2", "bad.qcow2"].map(|name| home.path().join(name));
    dedup_img(args!["convert", "-q", "-f", "raw", "-o", "cluster_size=4k", plain(), good]).ok();
    let (at, bytes) = (places(&good), fs::read(&good).unwrap());
    let byte = |place: u64| bytes[place as usize];
    let first_block = number(&bytes, number(&bytes, 48, 8) as usize, 8);
    let refcount = first_block + at.member / 4096 * 4 + 3;
    let damages: [(&str, u64, Vec<u8>); 18] = [
        ("COPIED is false", at.private, vec![byte(at.private) & 0x7f]),
        ("COPIED is true", at.shared, vec![byte(at.shared) | 0x80]),
        ("reserved bits", at.shared + 7, vec![byte(at.shared + 7) | 4]),
        ("references", at.shared, vec![0; 8]),
        ("does not lie inside the file", at.private + 1, vec![0x7f]),
        ("refcount", refcount, vec![byte(refcount) + 1]),
        ("refcount", refcount, vec![byte(refcount) - 1]),
        ("the pool is called", at.table + 65, b"x".to_vec()),
        ("guard size", at.table + 48, vec![0x3f]),
        ("has a date", at.table + 19, vec![1]),
        ("a member with flags", at.members, vec![0x80]),
        ("do not ascend", at.members, bytes[at.members as usize + 8..][..8].to_vec()),
        ("directory magic", at.directory, b"d".to_vec()),
        ("version is", at.directory + 11, vec![2]),
        ("sharer limit is", at.directory + 47, vec![byte(at.directory + 47) ^ 2]),
        ("records fail their checksum", at.directory + 130, vec![!byte(at.directory + 130)]),
        ("header fails its checksum", at.directory + 100, vec![!byte(at.directory + 100)]),
        ("does not match its SHA-256", at.member + 9, vec![!byte(at.member + 9)]),
    ];
    for (name, place, wrong) in damages {
        fs::write(&bad, &bytes).unwrap();
        patch(&bad, place, &wrong);
        let said = verdict(&bad, Pin::Shared);
        assert!(said.contains(name), "{wrong:x?} at {place:#x}: {name:?} was due, said was {said:?}");
    }
    assert!(verdict(&good, Pin::All).contains("members"), "not all is pinned here");
    fs::write(&bad, &bytes).unwrap();
    qemu::snapshot("-d", "dedup-pool", &bad).ok();
    assert!(!verdict(&bad, Pin::Shared).is_empty(), "an image without its pool");
}
