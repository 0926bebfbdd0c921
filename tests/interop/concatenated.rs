//! Several sources are one disk: what `qemu-img convert A B C TARGET` writes is what ours reads.

use crate::args;
use crate::support::corpus::{K, M, Sample, content, plain, write_sparse};
use crate::support::families;
use crate::support::reader::{Pin, verify_dedup};
use crate::support::{Ran, Random, dedup_img, qemu, scratch, sha256_of};
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Runs `convert` with `options`, the sources and a target.
fn ours(options: &[&str], sources: &[PathBuf], target: &Path) -> Ran {
    let words = args!["convert", "-q", "-t", "unsafe"].into_iter().chain(options.iter().map(OsString::from));
    let names = sources.iter().map(OsString::from);
    dedup_img(words.chain(names).chain(args![target]))
}

/// Converts `sources` to raw and to QCOW2 of several cluster sizes, and compares with what qemu-img makes of them.
#[track_caller]
fn like_theirs(options: &[&str], sources: &[PathBuf]) {
    let home = scratch();
    let [truth, raw, image] = ["truth", "raw", "image"].map(|name| home.path().join(name));
    let words = args!["convert", "-O", "raw"].into_iter().chain(options.iter().map(OsString::from));
    qemu::img(words.chain(sources.iter().map(OsString::from)).chain(args![truth])).ok();
    ours(&[options, &["-O", "raw"]].concat(), sources, &raw).ok();
    assert!(fs::read(&raw).unwrap() == fs::read(&truth).unwrap(), "{options:?} {sources:?}");
    for size in ["512", "4k", "64k", "auto"] {
        ours(&[options, &["-o", &format!("cluster_size={size}")]].concat(), sources, &image).ok();
        qemu::check_clean(&image);
        qemu::compare_same("raw", &truth, "qcow2", &image);
        verify_dedup(&image, Pin::Shared);
    }
}

/// Raw files with these lengths, data in the first and the last bytes of each, and holes between.
fn files(home: &Path, lengths: &[u64]) -> Vec<PathBuf> {
    let mut random = Random::new(lengths.len() as u64);
    let make = |(n, &length): (usize, &u64)| {
        let path = home.join(format!("part-{n}"));
        let file = File::create(&path).unwrap();
        file.set_len(length).unwrap();
        let edge = random.bytes((length / 3).min(20 * K) as usize + 1);
        let edge = &edge[..edge.len().min(length as usize)];
        file.write_all_at(edge, 0).unwrap();
        file.write_all_at(edge, length - edge.len() as u64).unwrap();
        path
    };
    lengths.iter().enumerate().map(make).collect()
}

#[test]
fn raw_files_of_any_length_make_one_disk() {
    for lengths in [
        &[M, M][..],
        &[1, 1, 1],
        &[511, 512, 513],
        &[0, 70_000, 0, 3],
        &[0, 0],
        &[2 * M + 512, 2 * M - 512, 4 * M + 1536],
        &[5 * M + 7, 3 * K, 1, 4 * M],
        &[4096, 512, 4096, 65_536, 4096],
    ] {
        let home = scratch();
        like_theirs(&["-f", "raw"], &files(home.path(), lengths));
    }
}

/// The same content at offsets that differ by less than a cluster is not the same clusters; at whole clusters it is.
#[test]
fn the_second_copy_of_a_source_costs_nothing() {
    let home = scratch();
    let (source, image) = (home.path().join("a"), home.path().join("image"));
    write_sparse(&source, &content()[..4 * M as usize]);
    let sources = vec![source; 3];
    like_theirs(&[], &sources);
    ours(&["-o", "cluster_size=4k"], &sources[..1], &image).ok();
    let once = verify_dedup(&image, Pin::Shared).data_clusters();
    ours(&["-o", "cluster_size=4k"], &sources, &image).ok();
    assert_eq!(verify_dedup(&image, Pin::Shared).data_clusters(), once);
}

#[test]
fn holes_on_either_side_of_a_boundary_are_kept() {
    let home = scratch();
    let make = |name: &str, length: u64, data: &[(u64, u64)]| {
        let path = home.path().join(name);
        let file = File::create(&path).unwrap();
        file.set_len(length).unwrap();
        for &(at, len) in data {
            file.write_all_at(&vec![7; len as usize], at).unwrap();
        }
        path
    };
    let hole = make("hole", 3 * M + 512, &[]);
    let start = make("start", 2 * M + 1024, &[(0, 4096)]);
    let end = make("end", M + 1536, &[(M - 512, 2048)]);
    for sources in [[&hole, &start, &end], [&end, &hole, &start], [&start, &end, &hole], [&hole, &hole, &hole]] {
        like_theirs(&["-f", "raw"], &sources.map(PathBuf::clone));
    }
    let target = home.path().join("target");
    let ran = ours(&["-O", "raw"], &[hole.clone(), end.clone(), hole.clone()], &target);
    ran.ok();
    let written = std::os::unix::fs::MetadataExt::blocks(&target.metadata().unwrap()) * 512;
    assert!(written <= 64 * K, "holes take {written} bytes");
}

/// Chains, compressed images, old versions and raw files in one disk, at boundaries that are no multiple of any cluster.
#[test]
fn images_of_every_kind_make_one_disk() {
    let active = |samples: Vec<Sample>| samples.into_iter().filter(|s| s.snapshot.is_none()).map(|s| s.path);
    let chains: Vec<PathBuf> = active(families::chains()).collect();
    let compressed: Vec<PathBuf> = active(families::compressed()).collect();
    let home = scratch();
    let odd = files(home.path(), &[513, 3 * M + 512]);
    like_theirs(&[], &[chains.clone(), vec![odd[0].clone()]].concat());
    like_theirs(&[], &[vec![odd[0].clone()], compressed.clone(), vec![odd[1].clone()]].concat());
    for (n, chain) in chains.iter().enumerate() {
        like_theirs(&[], &[chain.clone(), odd[n % 2].clone(), compressed[n % compressed.len()].clone()]);
    }
    let qcow2: Vec<PathBuf> = compressed.iter().rev().take(3).cloned().collect();
    like_theirs(&["-f", "qcow2"], &qcow2);
}

#[test]
fn the_file_does_not_depend_on_threads_memory_or_how_the_disk_was_cut() {
    let home = scratch();
    let bytes = content();
    let cut = |name: &str, from: usize, to: usize| {
        let path = home.path().join(name);
        write_sparse(&path, &bytes[from..to]);
        path
    };
    let end = bytes.len().next_multiple_of(512);
    let parts = [cut("a", 0, 1536), cut("b", 1536, 3 << 20), cut("c", 3 << 20, bytes.len())];
    assert_eq!(qemu::virtual_size("raw", &plain()), end as u64);
    let target = home.path().join("target");
    let mut sums = Vec::new();
    for options in [&[][..], &["--threads", "1"], &["--threads", "7", "--memory", "1M"]] {
        for sources in [&[plain()][..], &parts] {
            ours(&[options, &["-f", "raw", "-o", "cluster_size=4k"]].concat(), sources, &target).ok();
            sums.push(sha256_of(&target));
        }
    }
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
}

/// `-l TEXT` is refused, `-l snapshot.name=` is of the first source only: so does qemu-img.
#[test]
fn a_snapshot_with_several_sources_is_what_qemu_img_makes_of_it() {
    let home = scratch();
    let [image, other, target] = ["image", "other", "target"].map(|name| home.path().join(name));
    qemu::create("qcow2", &image, 2 * M, "");
    qemu::io("qcow2", &image, &["write -P 1 0 100k".to_owned()]);
    qemu::snapshot("-c", "one", &image).ok();
    qemu::io("qcow2", &image, &["write -P 2 0 100k".to_owned()]);
    fs::copy(&image, &other).unwrap();
    let sources = [image, other];
    like_theirs(&["-l", "snapshot.name=one"], &sources);
    like_theirs(&["-l", "snapshot.id=1"], &sources);
    let theirs = qemu::img(args!["convert", "-l", "one", sources[0], sources[1], target]);
    let same = theirs.stderr.contains("No support for concatenating multiple snapshot");
    qemu::words(&qemu::SEEN, theirs.code == 1 && same, || theirs.told());
    ours(&["-l", "one"], &sources, &target).refused(&["No support for concatenating multiple snapshot"]);
    assert!(!target.exists());
}

#[test]
fn every_source_is_opened_and_kept_from_being_the_target() {
    let home = scratch();
    let parts = files(home.path(), &[M, M]);
    let absent = home.path().join("absent");
    let target = home.path().join("target");
    ours(&[], &[parts[0].clone(), absent.clone(), parts[1].clone()], &target)
        .refused(&[&format!("Could not open '{}'", absent.display()), "No such file"]);
    for format in ["raw", "qcow2"] {
        let sums = || parts.iter().map(|part| sha256_of(part)).collect::<Vec<_>>();
        let before = sums();
        ours(&["-O", format], &parts, &parts[1]).refused(&["is a source of this conversion"]);
        assert_eq!(sums(), before);
    }
    ours(&["-f", "qcow2"], &parts, &target).refused(&["Image is not in qcow2 format"]);
}
