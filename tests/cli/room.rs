//! Room on the file system: what is said where there is too little, and what works without any.

use super::failure::in_namespace;
use crate::args;
use crate::support::{Random, dedup_img, qemu, scratch};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

/// A plain image with half its data twice, the same deduplicated and with garbage in its pool, and a place to mount at.
fn images(options: &str) -> (TempDir, [PathBuf; 4]) {
    let home = scratch();
    let paths = ["raw", "plain", "garbage", "small"].map(|name| home.path().join(name));
    let [raw, plain, garbage, small] = &paths;
    let half = Random::new(5).bytes(6 << 20);
    fs::write(raw, [&half[..], &half[..]].concat()).unwrap();
    qemu::convert("raw", raw, "qcow2", plain, &["-o", options]);
    dedup_img(args!["convert", "-q", "-f", "raw", "-o", "cluster_size=4k", raw, garbage]).ok();
    let discards = args!["-f", "qcow2", "-d", "unmap", "-c", "discard 0 2M", "-c", "discard 6M 2M", garbage];
    qemu::run("qemu-io", discards).ok();
    fs::create_dir(small).unwrap();
    (home, paths)
}

/// `dedup` writes nothing where it has no room, and says how much it needs; with that it works. `gc` works without any.
#[test]
fn a_full_file_system_is_told_of_by_dedup_and_emptied_by_gc() {
    let (_home, [raw, plain, garbage, small]) = images("cluster_size=4k");
    let script = "mount -t tmpfs -o size=40m none \"$5\"; cd \"$5\"
        cp --sparse=always \"$3\" plain; cp --sparse=always \"$4\" garbage; cp --sparse=always \"$4\" dropped; cp plain before
        dd if=/dev/zero of=fill bs=4k 2>/dev/null || true
        status=0; \"$1\" dedup -q plain || status=$?; echo status $status >&2
        cmp plain before >&2; \"$1\" dedup --dry-run --output json plain | grep room_ >&2
        \"$1\" gc --output json garbage | grep room_ >&2
        qemu-img check -q garbage >&2; qemu-img compare -q \"$4\" garbage >&2; qemu-img snapshot -l garbage | grep -c dedup-pool >&2
        dd if=/dev/zero of=fill2 bs=4k 2>/dev/null || true
        \"$1\" gc -q --drop-pool dropped; qemu-img check -q dropped >&2; qemu-img compare -q \"$4\" dropped >&2
        \"$1\" dedup -q plain; qemu-img check -q plain >&2; qemu-img compare -q -f raw -F qcow2 \"$2\" plain >&2";
    let ran = in_namespace(script, &[&raw, &plain, &garbage, &small]);
    let lines: Vec<&str> = ran.stderr.lines().map(|line| line.trim().trim_end_matches(',')).collect();
    assert!(ran.code == 0 && lines.len() == 8, "{}", ran.told());
    assert!(
        lines[0].starts_with("dedup-img: 'plain': ") && lines[0].contains(" KiB of room are needed"),
        "{}",
        ran.told()
    );
    assert!(lines[0].contains("which has 0 B; nothing was written; ") && lines[0].contains("gc"), "{}", ran.told());
    let value = |line: &str| -> u64 { line.split(": ").nth(1).unwrap().parse().unwrap() };
    assert_eq!((lines[1], value(lines[3])), ("status 1", 0), "{}", ran.told());
    assert!((48 << 10..256 << 10).contains(&value(lines[2])), "{}", ran.told());
    assert!(value(lines[4]) > 0 && lines[5..7].iter().all(|line| value(line) == 0), "{}", ran.told());
    assert_eq!(lines[7], "1", "{}", ran.told());
}

/// Temporary files go elsewhere where there is no room beside the image.
#[test]
fn temporary_files_have_room_where_the_image_has_none() {
    let (home, [raw, plain, _, small]) = images("cluster_size=512");
    let temporary = home.path().join("temporary");
    fs::create_dir(&temporary).unwrap();
    for room in ["0", "64"] {
        let script = "mount -t tmpfs -o size=40m none \"$4\"; cp \"$3\" \"$4/image\"; cd \"$4\"
            dd if=/dev/zero of=keep bs=1k count=\"$6\" 2>/dev/null; dd if=/dev/zero of=fill bs=4k 2>/dev/null || true; rm keep
            TMPDIR=\"$5\" \"$1\" dedup --dry-run --memory 1M --output json image";
        let ran = in_namespace(script, &[&raw, &plain, &small, &temporary, room.as_ref()]);
        assert_eq!(ran.code, 0, "{}", ran.told());
        let summary: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(summary["duplicate_clusters"], (6 << 20) / 512, "{}", ran.told());
        assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
    }
}
