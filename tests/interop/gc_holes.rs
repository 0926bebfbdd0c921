//! Holes inside clusters: what moves them, or writes beside them, keeps them, and what was there before never shows through.

use super::gc_space::{allocated, edit_unpunched};
use crate::args;
use crate::support::corpus::K;
use crate::support::crash::CrashStorage;
use crate::support::inplace::put;
use crate::support::{dedup_img, qemu, scratch};
use dedup_img::{GcOptions, Scratch, Work, WorkOptions, gc};
use std::path::PathBuf;
use tempfile::TempDir;

/// An image of 64 clusters of 64 KiB that are full of data and free again without having been punched, and 64 behind them with 4 KiB of
/// data each; as it was, and without its blocks of zeros.
fn image() -> (TempDir, PathBuf, PathBuf) {
    let home = scratch();
    let [full, path] = ["full.qcow2", "image.qcow2"].map(|name| home.path().join(name));
    qemu::create("qcow2", &full, 1 << 30, "cluster_size=64k");
    qemu::io("qcow2", &full, &["write -P 165 0 4M".into()]);
    let few = |n: u64| format!("write -P {} {}k 4k", 1 + n, 8 * K + 64 * n + 4 * (n % 16));
    qemu::io("qcow2", &full, &(0..64).map(few).collect::<Vec<_>>());
    edit_unpunched(&full, &["discard 0 4M".into()]);
    qemu::run("cp", args!["--reflink=never", "--sparse=always", &full, &path]).ok();
    (home, full, path)
}

/// What is copied is what is no hole.
#[test]
fn compaction_keeps_holes_inside_clusters() {
    let (_home, full, path) = image();
    let before = allocated(&path);
    let forecast = dedup_img(args!["gc", "--dry-run", "--compact", "--output", "json", &path]).ok();
    let forecast: serde_json::Value = serde_json::from_str(&forecast.stdout).unwrap();
    assert!(forecast["moved_clusters"].as_u64().unwrap() >= 60, "{forecast}");
    let copied = forecast["copied_bytes"].as_u64().unwrap();
    assert!((60 * 4 * K..72 * 4 * K).contains(&copied), "{forecast}");
    dedup_img(args!["gc", "-q", "--compact", &path]).ok();
    let after = allocated(&path);
    // The data that was free is gone as well.
    assert!(after + (4 << 20) <= before + 16 * K, "{before} became {after}");
    assert!(path.metadata().unwrap().len() < 6 << 20);
    qemu::check_clean(&path);
    qemu::compare_same("qcow2", &full, "qcow2", &path);
}

/// Where no holes can be punched the free clusters that things move to are full of old bytes.
#[test]
fn nothing_old_shows_through_where_a_hole_moved_to() {
    let (home, full, path) = image();
    for sparse in [true, false] {
        let storage = CrashStorage::open(&path).with_room(1 << 30, false);
        let storage = if sparse { storage.sparse_with_room(1 << 30) } else { storage };
        let scratch = Scratch::In("/nonexistent".into());
        let work = Work::new(WorkOptions { threads: Some(1), scratch, ..WorkOptions::default() }).unwrap();
        let options = GcOptions { compact: true, drop_pool: false };
        let report = gc(&storage, options, &work).unwrap();
        assert!(report.moved_clusters >= 60, "{report:?}");
        let file = home.path().join("moved.qcow2");
        put(&file, &storage.now());
        qemu::check_clean(&file);
        qemu::compare_same("qcow2", &full, "qcow2", &file);
    }
}

/// Tables are changed where they lie without filling what is a hole in them.
#[test]
fn tables_keep_their_holes() {
    let home = scratch();
    let [full, path] = ["full.qcow2", "image.qcow2"].map(|name| home.path().join(name));
    qemu::create("qcow2", &full, 64 << 30, "cluster_size=64k");
    // One cluster in each of 128 L2 tables, and each content twice.
    let write = |n: u64| format!("write -P {} {}M 64k", 1 + n / 2, 512 * n);
    qemu::io("qcow2", &full, &(0..128).map(write).collect::<Vec<_>>());
    qemu::run("cp", args!["--reflink=never", "--sparse=always", &full, &path]).ok();
    let before = allocated(&path);
    dedup_img(args!["dedup", "-q", &path]).ok();
    let after = allocated(&path);
    assert!(after + 64 * 64 * K <= before + 64 * K, "{before} became {after}");
    qemu::check_clean(&path);
    qemu::compare_same("qcow2", &full, "qcow2", &path);
}
