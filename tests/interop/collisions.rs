//! I4: a fingerprint finds candidates, it never decides. Disks made on purpose so that different contents have equal fingerprints.

use crate::args;
use crate::support::reader::{Pin, verify_dedup};
use crate::support::{Random, dedup_img, qemu, scratch};
use std::fs;
use twox_hash::XxHash3_128;

/// A 4 KiB content; all of them have the same XXH3-128 and differ in two words.
///
/// A word whose low half equals that of the hash's secret is multiplied by nothing, and its sum with the one of another stripe is
/// all that remains: what one of the two gains the other loses.
pub(super) fn colliding(common: &[u8], number: u32) -> Vec<u8> {
    let mut content = common.to_vec();
    content[128..132].copy_from_slice(&[0xde, 0xd4, 0x6d, 0xe9]);
    content[132..136].copy_from_slice(&number.to_le_bytes());
    content[320..324].copy_from_slice(&[0x82, 0x5a, 0xd0, 0x7d]);
    content[324..328].copy_from_slice(&(7777 - number).to_le_bytes());
    content
}

#[test]
fn different_contents_with_equal_fingerprints_are_not_shared() {
    let home = scratch();
    let [source, target] = ["source.raw", "target.qcow2"].map(|name| home.path().join(name));
    let mut random = Random::new(11);
    let common = random.bytes(4096);
    // Each of 40 contents three times, in no order, with others between them.
    let mut numbers: Vec<u32> = (0..40).flat_map(|number| [number; 3]).collect();
    for at in (1..numbers.len()).rev() {
        numbers.swap(at, random.below(at as u64 + 1) as usize);
    }
    let mut disk = Vec::new();
    for &number in &numbers {
        let content = colliding(&common, number);
        assert_eq!(XxHash3_128::oneshot(&content), XxHash3_128::oneshot(&colliding(&common, 0)), "no collision");
        disk.extend(content);
        disk.extend(random.bytes(4096));
    }
    fs::write(&source, &disk).unwrap();
    for memory in ["1M", "1G"] {
        let tight = args!["convert", "-q", "-f", "raw", "-o", "cluster_size=4k", "--memory", memory];
        dedup_img(tight.into_iter().chain(args![&source, &target])).ok();
        qemu::compare_same("raw", &source, "qcow2", &target);
        qemu::check_clean(&target);
        assert_eq!(verify_dedup(&target, Pin::Shared).data_clusters(), 40 + 120);
    }
}
