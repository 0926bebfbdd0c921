//! Images to damage: small, one for each feature, all made by stock QEMU but for the deduplicated ones.

use super::corpus::{K, M, edit, write_sparse};
use super::{Random, cached, dedup_img, qemu};
use crate::args;
use std::path::{Path, PathBuf};

/// How an image is made.
enum Recipe {
    /// By `qemu-img create` with a size in KiB and options, then by qemu-io commands; `snapshot` and `bitmap` stand for the
    /// commands of qemu-img, followed by a name.
    Edited(u64, &'static str, &'static [&'static str]),
    /// By `qemu-img convert -c` of a MiB of prose, then as above.
    Packed(&'static str, &'static [&'static str]),
}

use Recipe::{Edited, Packed};

/// Data, zeros with and without a cluster, and discarded clusters, within a MiB.
const DATA: &[&str] =
    &["write -s @ 0 512k", "write -z 64k 64k", "write -z -u 128k 64k", "discard 256k 64k", "write -P 5 1000k 9k"];
/// The same with three snapshots, the first two of which share all L2 tables.
const SNAPSHOTS: &[&str] = &[
    "write -s @ 0 512k",
    "snapshot one",
    "snapshot two",
    "write -P 8 100k 200k",
    "snapshot three",
    "write -z -u 64k 64k",
    "write -P 9 600k 100k",
];
/// Two bitmaps, one of which has bits set, so that it has data.
const BITMAPS: &[&str] =
    &["write -s @ 0 256k", "bitmap one", "bitmap two", "disable two", "write -P 1 64k 256k", "write -P 2 900k 9k"];

/// Every image by name; the order is that of the making, for overlays need their bases.
const RECIPES: [(&str, Recipe); 20] = [
    // Two L2 tables that are far apart.
    (
        "plain-64k",
        Edited(2 << 20, "", &["write -s @ 0 1M", "write -P 3 600M 100k", "write -z 64k 64k", "discard 0 64k"]),
    ),
    ("plain-4k", Edited(5 << 10, "cluster_size=4k", &["write -s @ 0 512k", "write -P 3 4M 100k", "write -z 64k 64k"])),
    ("plain-512", Edited(1024, "cluster_size=512", DATA)),
    ("version-2", Edited(1024, "compat=0.10,cluster_size=4k", SNAPSHOTS)),
    ("bits-1", Edited(1024, "cluster_size=4k,refcount_bits=1", DATA)),
    ("bits-2", Edited(1024, "cluster_size=512,refcount_bits=2", DATA)),
    ("bits-4", Edited(1024, "cluster_size=4k,refcount_bits=4", SNAPSHOTS)),
    ("bits-8", Edited(1024, "refcount_bits=8", SNAPSHOTS)),
    ("bits-64", Edited(1024, "cluster_size=4k,refcount_bits=64", SNAPSHOTS)),
    ("snapshots-64k", Edited(2 << 20, "", SNAPSHOTS)),
    ("snapshots-512", Edited(1024, "cluster_size=512,refcount_bits=32", SNAPSHOTS)),
    ("zlib", Packed("cluster_size=4k", &["write -P 5 500k 9k", "snapshot one", "write -P 6 0 64k"])),
    ("zstd", Packed("compression_type=zstd", &["write -P 5 500k 9k", "snapshot one", "write -P 6 0 64k"])),
    ("subclusters", Edited(1024, "extended_l2=on,cluster_size=16k", &["write -s @ 3k 300k", "write -z 64k 2k"])),
    ("subclusters-snapshots", Edited(1024, "extended_l2=on", SNAPSHOTS)),
    ("bitmaps", Edited(1024, "cluster_size=4k", BITMAPS)),
    ("bitmaps-64k", Edited(1024, "", BITMAPS)),
    ("preallocated", Edited(1024, "cluster_size=4k,preallocation=metadata", &["write -s @ 0 128k"])),
    ("lazy", Edited(1024, "lazy_refcounts=on", DATA)),
    ("overlay", Edited(2048, "cluster_size=4k,backing_file=plain-4k,backing_fmt=qcow2", DATA)),
];

/// Does what a recipe's commands say.
fn follow(path: &Path, commands: &[&str]) {
    for command in commands {
        match command.split_once(' ') {
            Some(("snapshot", name)) => drop(qemu::snapshot("-c", name, path).ok()),
            Some(("bitmap", name)) => {
                drop(qemu::img(args!["bitmap", "-f", "qcow2", "--add", "--enable", "-g", "512", path, name]).ok());
            }
            Some(("disable", name)) => drop(qemu::img(args!["bitmap", "-f", "qcow2", "--disable", path, name]).ok()),
            _ => edit(path, &[command]),
        }
    }
}

/// The images that stock QEMU makes, built once and kept. Tests copy what they want to damage.
pub(crate) fn subjects() -> Vec<(&'static str, PathBuf)> {
    let recipe = [&include_bytes!("subjects.rs")[..], include_bytes!("corpus.rs")].concat();
    let sum = recipe.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    let home = cached(&format!("subjects-{sum:016x}"), |home| {
        std::fs::create_dir(home).unwrap();
        for (name, recipe) in &RECIPES {
            let path = home.join(name);
            match recipe {
                Edited(size, options, commands) => {
                    qemu::create("qcow2", &path, size * K, options);
                    follow(&path, commands);
                }
                Packed(options, commands) => {
                    let raw = home.join("prose.raw");
                    let prose = include_bytes!("subjects.rs").iter().chain(b"\n").copied().cycle();
                    write_sparse(&raw, &prose.take(M as usize).collect::<Vec<u8>>());
                    qemu::convert("raw", &raw, "qcow2", &path, &["-c", "-o", options]);
                    follow(&path, commands);
                }
            }
        }
    });
    RECIPES.iter().map(|(name, _)| (*name, home.join(name))).collect()
}

/// The image of that name.
pub(crate) fn subject(name: &str) -> PathBuf {
    subjects().into_iter().find(|(other, _)| *other == name).unwrap_or_else(|| panic!("no subject {name}")).1
}

/// A deduplicated image of a MiB in 4 KiB clusters, written by the program under test: each content three times, some once, and
/// further options of `convert`.
pub(crate) fn deduplicated(home: &Path, name: &str, more: &[&str]) -> PathBuf {
    let (raw, path) = (home.join("source.raw"), home.join(name));
    let thrice = Random::new(3).bytes(256 << 10);
    write_sparse(&raw, &[&thrice[..], &Random::new(4).bytes(100 << 10), &thrice, &[0; 100 << 10], &thrice].concat());
    let mut words = args!["convert", "-q", "-f", "raw", "-o", "cluster_size=4k", "-t", "unsafe"].to_vec();
    words.extend(more.iter().map(Into::into));
    words.extend(args![raw, path]);
    dedup_img(words).ok();
    std::fs::remove_file(raw).unwrap();
    path
}

/// Images whose data lies elsewhere or is encrypted: their names in the directory given.
pub(crate) fn foreign(home: &Path) -> [(&'static str, PathBuf); 2] {
    let [outside, secret] = ["outside.qcow2", "secret.qcow2"].map(|name| home.join(name));
    qemu::create("qcow2", &outside, M, &format!("data_file={}", home.join("data.raw").display()));
    qemu::io("qcow2", &outside, &["write -P 1 64k 300k".into(), "write -z 512k 64k".into()]);
    qemu::create_encrypted("luks,encrypt.iter-time=10", &secret);
    let opened = format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", secret.display());
    qemu::run("qemu-io", args!["--object", "secret,id=s,data=abc", "-c", "write 0 300k", "--image-opts", opened]).ok();
    [("an external data file", outside), ("encryption", secret)]
}
