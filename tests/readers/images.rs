//! The images to read and write: one of each kind that dedup-img makes, and what qemu-img makes of the same as a control.

use crate::args;
use crate::support::{Random, dedup_img, qemu};
use std::ffi::OsString;
use std::fs;
use std::path::Path;

const K: usize = 1 << 10;
const M: usize = 1 << 20;

/// How an image is made: its row, and what makes it out of the content's raw file, at the path given.
type Recipe = (&'static str, fn(&Path, &Path));

/// Every kind. The rows are those of the tables in README.md, in this order.
const KINDS: &[Recipe] = &[
    ("convert, 4k", |raw, to| convert(raw, to, &["-o", "cluster_size=4k"])),
    ("convert, 64k", |raw, to| convert(raw, to, &["-o", "cluster_size=64k"])),
    ("convert, 2M", |raw, to| convert(raw, to, &["-o", "cluster_size=2M"])),
    ("convert, 4k, all pooled", |raw, to| convert(raw, to, &["-o", "cluster_size=4k", "--pin", "all"])),
    ("convert, 4k, 16-bit counts", |raw, to| convert(raw, to, &["-o", "cluster_size=4k,refcount_bits=16"])),
    ("convert -c, zlib, 64k", |raw, to| convert(raw, to, &["-c", "-o", "cluster_size=64k"])),
    ("convert -c, zlib, 4k", |raw, to| convert(raw, to, &["-c", "-o", "cluster_size=4k"])),
    ("convert -c, zstd, 64k", |raw, to| convert(raw, to, &["-c", "-o", "cluster_size=64k,compression_type=zstd"])),
    ("convert -c, zlib, 4k, 16-bit counts", |raw, to| {
        convert(raw, to, &["-c", "-o", "cluster_size=4k,refcount_bits=16"]);
    }),
    ("convert -B base", |raw, to| overlay(raw, to, "base")),
    ("convert -B /path/to/base, 16-bit counts", |raw, to| {
        overlay(raw, to, to.with_file_name("base").to_str().unwrap());
        qemu::img(args!["amend", "-q", "-f", "qcow2", "-o", "refcount_bits=16", to]).ok();
    }),
    ("convert --plain", |raw, to| convert(raw, to, &["--plain"])),
    ("convert --all-snapshots, 16-bit counts", |raw, to| {
        let source = to.with_file_name("source");
        with_snapshots(raw, &source, "cluster_size=4k");
        from_qcow2(&source, to, &["--all-snapshots", "-o", "cluster_size=4k,refcount_bits=16"]);
        fs::remove_file(source).unwrap();
    }),
    ("convert of extended_l2", |raw, to| {
        let source = to.with_file_name("source");
        qemu::convert("raw", raw, "qcow2", &source, &["-o", "extended_l2=on"]);
        qemu::io("qcow2", &source, &["write -P 3 1026k 2k".into(), "write -z 258k 4k".into()]);
        from_qcow2(&source, to, &["-o", "cluster_size=4k"]);
        fs::remove_file(source).unwrap();
    }),
    ("dedup, with snapshots, 16-bit counts", |raw, to| {
        with_snapshots(raw, to, "cluster_size=4k");
        qemu::io("qcow2", to, &["write -z 300k 40k".into(), "write -z -u 1M 64k".into(), "discard 5M 128k".into()]);
        dedup_img(args!["dedup", "-q", "-f", "qcow2", to]).ok();
    }),
    ("gc --compact", |raw, to| {
        convert(raw, to, &["-o", "cluster_size=4k"]);
        qemu::io("qcow2", to, &["discard 0 1500k".into(), "write -P 7 4M 1M".into()]);
        dedup_img(args!["gc", "-q", "-f", "qcow2", "--compact", to]).ok();
    }),
    ("create, convert -n", |raw, to| {
        dedup_img(args!["create", "-q", "-o", "cluster_size=4k", to, fs::metadata(raw).unwrap().len().to_string()])
            .ok();
        convert(raw, to, &["-n"]);
        qemu::snapshot("-c", "night", to).ok();
        let next = to.with_file_name("next");
        let mut bytes = fs::read(raw).unwrap();
        bytes.copy_within(0..M, 5 * M);
        fs::write(&next, bytes).unwrap();
        convert(&next, to, &["-n"]);
        fs::remove_file(next).unwrap();
    }),
    ("control: qemu-img, a snapshot", |raw, to| {
        qemu::convert("raw", raw, "qcow2", to, &[]);
        qemu::snapshot("-c", "all of it", to).ok();
    }),
    ("control: qemu-img, 4k, a snapshot", |raw, to| {
        qemu::convert("raw", raw, "qcow2", to, &["-o", "cluster_size=4k,refcount_bits=32"]);
        qemu::snapshot("-c", "all of it", to).ok();
    }),
    ("control: qemu-img -c, 4k, no snapshot", |raw, to| {
        qemu::convert("raw", raw, "qcow2", to, &["-c", "-o", "cluster_size=4k"]);
    }),
    ("control: qemu-img -c, a snapshot", |raw, to| {
        qemu::convert("raw", raw, "qcow2", to, &["-c"]);
        qemu::snapshot("-c", "all of it", to).ok();
    }),
];

/// The rows of the tables.
pub(crate) fn rows() -> impl Iterator<Item = &'static str> {
    KINDS.iter().map(|(row, _)| *row)
}

/// Makes every image, the file `image` in a directory of its own below `home`, called by the number of its row.
pub(crate) fn make(home: &Path) {
    let raw = home.join("content.raw");
    fs::write(&raw, content()).unwrap();
    for (n, (_, recipe)) in KINDS.iter().enumerate() {
        let place = home.join(n.to_string());
        fs::create_dir(&place).unwrap();
        recipe(&raw, &place.join("image"));
    }
}

/// Equal runs of 2 MiB, 64 KiB and 4 KiB, what compresses twice, zeros, and an end within a cluster of every size.
fn content() -> Vec<u8> {
    let mut random = Random::new(9);
    let mut bytes = random.bytes(2 * M);
    bytes.extend_from_within(..);
    for (size, count, different) in [(64 * K, 16, 3), (4 * K, 128, 5)] {
        let blocks: Vec<Vec<u8>> = (0..different).map(|_| random.bytes(size)).collect();
        for _ in 0..count {
            bytes.extend_from_slice(&blocks[random.below(different) as usize]);
        }
    }
    bytes.extend(random.bytes(512 * K));
    let words: Vec<Vec<u8>> = (0..50).map(|_| random.bytes(6)).collect();
    let mut prose: Vec<u8> = Vec::new();
    while prose.len() < 256 * K {
        prose.extend_from_slice(&words[random.below(50) as usize]);
    }
    bytes.extend_from_slice(&prose[..256 * K]);
    bytes.extend_from_slice(&prose[..256 * K]);
    bytes.resize(7 * M, 0);
    bytes.extend(random.bytes(5632));
    bytes
}

fn run(from: &Path, to: &Path, format: &str, words: &[&str]) {
    let mut line = args!["convert", "-q", "-t", "unsafe", "-f", format].to_vec();
    line.extend(words.iter().map(OsString::from));
    line.extend(args![from, to]);
    dedup_img(line).ok();
}

fn convert(raw: &Path, to: &Path, words: &[&str]) {
    run(raw, to, "raw", words);
}

fn from_qcow2(from: &Path, to: &Path, words: &[&str]) {
    run(from, to, "qcow2", words);
}

/// What qemu-img and qemu-io make: the content, a snapshot, changes, a snapshot, changes.
fn with_snapshots(raw: &Path, to: &Path, options: &str) {
    qemu::convert("raw", raw, "qcow2", to, &["-o", options]);
    qemu::snapshot("-c", "first", to).ok();
    let part = format!("write -s {} 5M 1M", raw.display());
    qemu::io("qcow2", to, &["write -P 8 512k 512k".into(), part]);
    qemu::snapshot("-c", "second", to).ok();
    qemu::io("qcow2", to, &["write -P 9 3M 256k".into(), "write -P 9 6500k 8k".into()]);
}

/// An overlay of a deduplicated image, with data, zeros and holes of its own, that calls its backing file `name`.
fn overlay(raw: &Path, to: &Path, name: &str) {
    let base = to.with_file_name("base");
    convert(raw, &base, &["-o", "cluster_size=4k"]);
    let changed = to.with_file_name("changed");
    let mut bytes = fs::read(raw).unwrap();
    bytes[M..M + 300 * K].fill(0);
    let own = Random::new(10).bytes(512 * K);
    for at in [4 * M, 5 * M, 6 * M] {
        bytes[at..at + 512 * K].copy_from_slice(&own);
    }
    bytes[3 * M..3 * M + 5].fill(1);
    fs::write(&changed, bytes).unwrap();
    convert(&changed, to, &["-B", name, "-F", "qcow2", "-o", "cluster_size=4k"]);
    fs::remove_file(changed).unwrap();
}
