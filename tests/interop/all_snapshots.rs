//! `convert --all-snapshots`: the disk and every snapshot hold what they held, stock QEMU stays clean whatever it does to them, and
//! nothing is stored twice.

use super::soak::Soak;
use crate::args;
use crate::support::corpus::{K, M, edit, write_sparse};
use crate::support::reader::{Image, Pin, Snapshot, Survey, verify_deduped};
use crate::support::subjects::subject;
use crate::support::{Random, dedup_img, families, qemu, scratch, sha256_of};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Converts and returns the summary.
#[track_caller]
fn convert(words: &[&str], source: &Path, target: &Path) -> Value {
    let mut all = args!["convert", "--all-snapshots", "-t", "unsafe", "--output", "json"].to_vec();
    all.extend(words.iter().map(Into::into));
    all.extend(args![source, target]);
    serde_json::from_str(&dedup_img(all).ok().stdout).unwrap()
}

/// The snapshots of an image but the pool.
fn users(image: &Image) -> Vec<Snapshot> {
    image.snapshots().0.into_iter().filter(|snapshot| snapshot.disk_size < 1 << 62).collect()
}

/// What an entry of the snapshot table says but for the L1 table's place.
fn told(snapshot: &Snapshot) -> impl PartialEq + std::fmt::Debug + use<> {
    let Snapshot { id, name, date, vm_clock, vm_state_size, disk_size, icount, .. } = snapshot;
    (id.clone(), name.clone(), *date, *vm_clock, *vm_state_size, *disk_size, *icount)
}

/// The disk after a snapshot was reverted to by qemu-img, in a copy that is clean then.
fn reverted(path: &Path, id: &str, home: &Path) -> PathBuf {
    let [copy, raw] = ["reverted.qcow2", "reverted.raw"].map(|name| home.join(name));
    fs::copy(path, &copy).unwrap();
    qemu::snapshot("-a", id, &copy).ok();
    qemu::check_clean(&copy);
    qemu::convert("qcow2", &copy, "raw", &raw, &[]);
    raw
}

/// Equal tables, and equal contents of the disk and of every snapshot; clean for qemu-img and for us.
#[track_caller]
fn same_history(source: &Path, target: &Path, home: &Path) {
    qemu::check_clean(target);
    dedup_img(args!["check", "--data", target]).ok();
    qemu::compare_same("qcow2", source, "qcow2", target);
    let [before, after] = [source, target].map(|path| users(&Image::open(path)));
    assert_eq!(before.iter().map(told).collect::<Vec<_>>(), after.iter().map(told).collect::<Vec<_>>());
    let pool = Image::open(target).snapshots().0.pop().unwrap();
    let highest = before.iter().map(|snapshot| snapshot.id.parse().unwrap()).max().unwrap_or(0u64);
    assert_eq!((pool.name.as_str(), pool.id), ("dedup-pool", (highest + 1).to_string()));
    for Snapshot { id, name, .. } in &before {
        let found = sha256_of(&reverted(target, id, home));
        assert_eq!(found, sha256_of(&reverted(source, id, home)), "snapshot {id} ({name})");
    }
}

/// Judges our image on its own: references, flags and pool as after `dedup`, which finds nothing left to do, and nothing twice.
#[track_caller]
fn leaves_nothing_to_do(target: &Path, pin: Pin) {
    verify_deduped(target, pin, &Survey::of(target));
    let words = if matches!(pin, Pin::All) { vec!["--pin", "all"] } else { vec![] };
    let all = args!["dedup", "--dry-run", "--output", "json"].into_iter().chain(words.into_iter().map(Into::into));
    let plan: Value = serde_json::from_str(&dedup_img(all.chain(args![target])).ok().stdout).unwrap();
    assert_eq!(plan["duplicate_clusters"], 0, "{plan}");
}

/// An image with six snapshots, taken between writes, discards, compressed writes and changes of its size.
fn history(home: &Path, options: &str, seed: u64) -> PathBuf {
    let (path, block) = (home.join(format!("history-{seed}.qcow2")), home.join("block"));
    let mut random = Random::new(seed);
    qemu::create("qcow2", &path, 9 * M + 512, options);
    for turn in 0..7u64 {
        write_sparse(&block, &random.bytes(300 << 10));
        let mut commands = vec![format!("write -s {} {} 300k", block.display(), random.below(4) * M + 4 * K * turn)];
        for _ in 0..4 {
            let (at, pattern) = (random.below(7 * M / 4096) * 4096, 1 + random.below(3));
            commands.push(format!("write -P {pattern} {at} 40k"));
            commands.push(format!("discard {} 64k", random.below(100) * 64 * K));
            commands.push(format!("write -z {} 68k", random.below(1000) * 4 * K));
        }
        commands.push(format!("write -c -P 5 {} 64k", 7 * M + (turn + 2) * 64 * K));
        edit(&path, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        qemu::snapshot("-c", &format!("turn {turn}"), &path).ok();
        let size = [9 * M + 512, 13 * M, 8 * M][turn as usize % 3].to_string();
        qemu::img(args!["resize", "-q", "--shrink", "-f", "qcow2", path, size]).ok();
    }
    qemu::snapshot("-d", "turn 4", &path).ok();
    edit(&path, &["write -P 9 1M 300k"]);
    path
}

#[test]
fn the_corpus_keeps_its_snapshots() {
    let home = scratch();
    let target = home.path().join("out.qcow2");
    let mut sources: Vec<PathBuf> = families::snapshots().into_iter().map(|sample| sample.path).collect();
    sources.dedup();
    let names = ["version-2", "bits-4", "snapshots-512", "zstd", "zlib", "subclusters-snapshots"];
    sources.extend(names.map(subject));
    for source in &sources {
        for words in [&["-o", "cluster_size=4k"][..], &["-c", "-o", "cluster_size=16k"]] {
            println!("{} {words:?}", source.display());
            let told = convert(words, source, &target);
            assert_eq!(told["snapshots"], users(&Image::open(source)).len());
            same_history(source, &target, home.path());
            leaves_nothing_to_do(&target, Pin::Shared);
        }
    }
}

#[test]
fn a_changing_disk_keeps_its_history_at_every_cluster_size() {
    let home = scratch();
    let [target, other] = ["out.qcow2", "other.qcow2"].map(|name| home.path().join(name));
    for (seed, options) in [(1, "cluster_size=64k"), (2, "cluster_size=4k"), (3, "extended_l2=on")] {
        let source = history(home.path(), options, seed);
        for words in [
            &["-o", "cluster_size=4k"][..],
            &["-o", "cluster_size=64k"],
            &["-o", "cluster_size=2M"],
            &["-o", "cluster_size=4k", "--pin", "all"],
            &["-c", "-o", "cluster_size=4k,compression_type=zstd"],
            &[],
        ] {
            if seed > 1 && !words.is_empty() && words != ["-o", "cluster_size=4k"] {
                continue;
            }
            println!("{options} {words:?}");
            convert(words, &source, &target);
            same_history(&source, &target, home.path());
            leaves_nothing_to_do(&target, if words.contains(&"all") { Pin::All } else { Pin::Shared });
            // Any number of threads and any memory: the same bytes (I5).
            for more in [["--threads", "1"], ["--threads", "8"], ["--memory", "1M"]] {
                convert(&[words, &more].concat(), &source, &other);
                assert_eq!(sha256_of(&target), sha256_of(&other), "{more:?}");
            }
        }
        // Our own output, whose pool is not one of the user's snapshots.
        convert(&["-o", "cluster_size=4k"], &target, &other);
        same_history(&source, &other, home.path());
    }
}

#[test]
fn a_chain_keeps_its_snapshots_with_and_without_its_backing_file() {
    let home = scratch();
    let [base, source, target] = ["base.raw", "source.qcow2", "out.qcow2"].map(|name| home.path().join(name));
    write_sparse(&base, &Random::new(4).bytes(3 * M as usize));
    let options = format!("backing_file={},backing_fmt=raw,cluster_size=4k", base.display());
    qemu::create("qcow2", &source, 4 * M, &options);
    edit(&source, &["write -P 1 0 1M", "write -z 1M 64k"]);
    qemu::snapshot("-c", "one", &source).ok();
    edit(&source, &["discard 1M 128k", "write -P 2 3M 64k", "write -P 1 2M 8k", "write -z 2500k 8k"]);
    qemu::snapshot("-c", "two", &source).ok();
    edit(&source, &["write -P 1 512k 4k", "write -P 3 2M 4k"]);
    let name = base.display().to_string();
    for words in [
        &["-o", "cluster_size=4k"][..],
        &["-o", "cluster_size=4k", "-B", &name, "-F", "raw"],
        &["-c", "-o", "cluster_size=64k", "-B", &name, "-F", "raw"],
    ] {
        println!("{words:?}");
        convert(words, &source, &target);
        same_history(&source, &target, home.path());
        let behind = Image::open(&target).backing_file();
        assert_eq!(behind.is_some(), words.contains(&"-B"));
        if behind.is_some() {
            let [own, other] = [&target, &source].map(|path| fs::metadata(path).unwrap().len());
            assert!(own < other, "{own} bytes, and the source has {other}");
        }
    }
}

/// QEMU keeps the VM state behind the disk, at the next L1 entry: here what was the end of a disk becomes one.
#[test]
fn vm_states_keep_their_bytes() {
    let home = scratch();
    let [source, target] = ["source.qcow2", "out.qcow2"].map(|name| home.path().join(name));
    let state = [Random::new(5).bytes(70 << 10), vec![0; 8 << 10], Random::new(6).bytes(123)].concat();
    let mut padded = state.clone();
    padded.resize(padded.len().next_multiple_of(512), 0);
    let block = home.path().join("block");
    fs::write(&block, &padded).unwrap();
    // An L2 table maps 2 MiB.
    qemu::create("qcow2", &source, 4 * M, "cluster_size=4k");
    let write = format!("write -s {} 2M {}", block.display(), padded.len());
    edit(&source, &["write -P 1 0 1M", &write]);
    qemu::snapshot("-c", "one", &source).ok();
    qemu::img(args!["resize", "-q", "--shrink", "-f", "qcow2", source, "1536k"]).ok();
    qemu::snapshot("-c", "two", &source).ok();
    edit(&source, &["write -P 2 0 1M"]);
    let table = Image::open(&source).header.snapshots_offset;
    let file = fs::OpenOptions::new().write(true).open(&source).unwrap();
    file.write_all_at(&(state.len() as u64).to_be_bytes(), table + 40).unwrap();
    file.write_all_at(&(3 * M / 2).to_be_bytes(), table + 48).unwrap();
    for (words, span) in [
        (&["-o", "cluster_size=4k"][..], 2 * M),
        (&["-o", "cluster_size=64k"], 512 * M),
        (&["-o", "cluster_size=512", "--pin", "all"], 32 * K),
        (&["-o", "cluster_size=4k", "-B", &source.display().to_string(), "-F", "raw"], 2 * M),
    ] {
        println!("{words:?}");
        convert(words, &source, &target);
        same_history(&source, &target, home.path());
        let image = Image::open(&target);
        let one = &image.snapshots().0[0];
        let size = image.cluster_size();
        let mut found = vec![0; state.len().next_multiple_of(size as usize)];
        for table in image.tables(one.l1_table_offset, one.l1_size) {
            for (slot, word) in table.words.iter().enumerate() {
                let at = (table.index * span + slot as u64 * size).checked_sub((3 * M / 2).next_multiple_of(span));
                let host = word & 0x00ff_ffff_ffff_fe00;
                if let Some(at) = at.filter(|_| host != 0) {
                    found[at as usize..][..size as usize].copy_from_slice(&image.read(host, size));
                }
            }
        }
        assert!(found[..state.len()] == state, "the VM state differs");
    }
}

/// Thirty snapshots of a disk that changes little are read and stored as little more than the disk.
#[test]
fn what_snapshots_have_in_common_is_read_and_stored_once() {
    let home = scratch();
    let [raw, source, target] = ["disk.raw", "source.qcow2", "out.qcow2"].map(|name| home.path().join(name));
    write_sparse(&raw, &Random::new(7).bytes(16 * M as usize));
    qemu::convert("raw", &raw, "qcow2", &source, &["-o", "cluster_size=64k"]);
    for day in 0..30u64 {
        qemu::snapshot("-c", &format!("day {day}"), &source).ok();
        edit(&source, &[&format!("write -P {} {} 64k", day + 1, day * 7 % 16 * M)]);
    }
    for size in ["4k", "64k"] {
        let told = convert(&["-o", &format!("cluster_size={size}")], &source, &target);
        let figure = |key: &str| told[key].as_u64().unwrap();
        // The disk, and each day's cluster once.
        assert!(figure("read_bytes") <= 16 * M + 31 * 64 * K, "{told}");
        let contents = 16 * M / figure("cluster_size_bytes") + 30;
        assert_eq!(figure("data_clusters"), 31 * 16 * M / figure("cluster_size_bytes"));
        assert_eq!(figure("stored_clusters"), contents);
        let data = contents * figure("cluster_size_bytes");
        // An L2 table of 4 KiB maps 2 MiB: a day's write needs a new one, and the others are shared.
        assert!(figure("file_length_bytes") <= data + 600 * K + 31 * 2 * figure("cluster_size_bytes"), "{told}");
        leaves_nothing_to_do(&target, Pin::Shared);
    }
    qemu::check_clean(&target);
    qemu::compare_same("qcow2", &source, "qcow2", &target);
}

/// I2 of a converted history: random writes, discards, snapshots, reverts, deletions and resizes by stock QEMU.
#[test]
fn a_converted_history_stays_clean_whatever_qemu_does() {
    Soak::with_history(21, "cluster_size=4k", &[]).run();
}

/// I2 of a history in compressed clusters, at QEMU's own refcount width.
#[test]
fn a_compressed_history_stays_clean_whatever_qemu_does() {
    Soak::with_history(22, "cluster_size=64k,refcount_bits=16", &["-c"]).run();
}

#[test]
fn what_cannot_be_converted_with_snapshots_is_refused_by_name() {
    let home = scratch();
    let [source, raw, target] = ["source.qcow2", "disk.raw", "out.qcow2"].map(|name| home.path().join(name));
    qemu::create("qcow2", &source, M, "");
    for name in 0..20 {
        qemu::snapshot("-c", &format!("s{name}"), &source).ok();
    }
    write_sparse(&raw, &[7; 4096]);
    fs::write(&target, "old").unwrap();
    let refused = |words: &[&str], sources: &[&Path], sentence: &[&str]| {
        let mut all = args!["convert", "--all-snapshots"].to_vec();
        all.extend(words.iter().map(Into::into));
        all.extend(sources.iter().map(Into::into));
        all.extend(args![target]);
        dedup_img(all).refused(sentence);
        assert_eq!(fs::read(&target).unwrap(), b"old");
    };
    refused(&["-l", "s1"], &[&source], &["--all-snapshots cannot be combined with -l"]);
    refused(&["-O", "raw"], &[&source], &["--all-snapshots", "a raw image has no snapshots"]);
    refused(&["--salvage"], &[&source], &["--all-snapshots", "--salvage"]);
    refused(&[], &[&source, &raw], &["--all-snapshots takes one source"]);
    refused(&["-o", "refcount_bits=4"], &[&source], &["refcount_bits=4", "20 snapshots", "refcount_bits=32"]);
    qemu::snapshot("-c", "dedup-pool", &source).ok();
    refused(&[], &[&source], &["a snapshot called 'dedup-pool'", "another name"]);
    // Without snapshots there is nothing to refuse.
    let told = convert(&[], &raw, &target);
    assert_eq!((told["snapshots"].as_u64(), told["stored_clusters"].as_u64()), (Some(0), Some(1)));
    qemu::compare_same("raw", &raw, "qcow2", &target);
    qemu::check_clean(&target);
}
