//! Each option of `qemu-img convert`: in the table of the man page, and doing what the table says.

use super::running::Running;
use super::{dedup_img_in, wrong_usage};
use crate::args;
use crate::support::corpus::{K, M, content, patch, write_sparse};
use crate::support::loops::Loop;
use crate::support::{Ran, Random, dedup_img, names_in, qemu, scratch, sha256_of};
use serde_json::Value;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A directory with `source.raw`, fully allocated, data and zeros in pieces of all lengths.
fn source() -> TempDir {
    let home = scratch();
    let mut random = Random::new(77);
    let mut bytes = vec![0; (6 * M + 1536) as usize];
    for _ in 0..40 {
        let at = (random.below(bytes.len() as u64 - 70_000) / 512 * 512) as usize;
        let length = [1, 512, 700, 4096, 60_000][random.below(5) as usize];
        random.fill(&mut bytes[at..at + length]);
    }
    fs::write(home.path().join("source.raw"), bytes).unwrap();
    home
}

/// Runs `convert` on `source.raw` in its directory with further words before the names.
fn convert(home: &Path, words: &[&str]) -> Ran {
    let words = args!["convert"].into_iter().chain(words.iter().map(OsString::from));
    dedup_img_in(home, words.chain(args!["source.raw", "target"]))
}

/// Runs `qemu-img convert` likewise.
fn theirs(home: &Path, words: &[&str]) -> Ran {
    let mut command = qemu::tool("qemu-img", args!["convert"].into_iter().chain(words.iter().map(OsString::from)));
    command.args(["source.raw", "theirs"]).current_dir(home);
    qemu::finish("qemu-img", command)
}

#[test]
fn every_option_of_qemu_img_convert_is_in_the_table() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("man/dedup-img-convert.1")).unwrap();
    let (_, table) = page.split_once(".SH OPTIONS OF QEMU-IMG CONVERT").unwrap();
    let table = table.split("\n.SH ").next().unwrap().replace("\\-", "-");
    let rows: Vec<&str> = table.lines().filter_map(|line| line.split_once("|T{").map(|(row, _)| row)).collect();
    let help = qemu::img(args!["convert", "--help"]).ok().stdout;
    let options: Vec<&str> = help.lines().filter_map(|line| line.strip_prefix("  -")).collect();
    qemu::words(&qemu::SEEN, options.len() > 20, || format!("another kind of help: {help}"));
    for option in options {
        for name in option.split_whitespace().map(|word| word.trim_end_matches(',')).filter(|n| !n.starts_with("---")) {
            // The line holds names and, in capitals, what they take.
            if name.chars().any(|c| c.is_lowercase()) || name.len() == 1 {
                let name = format!("-{name}").replacen("---", "--", 1);
                assert!(rows.iter().any(|row| row.split(", ").any(|n| n == name)), "{name} is not in the table");
            }
        }
    }
}

#[test]
fn wrong_values_are_refused_in_the_words_of_qemu_img() {
    let home = source();
    for words in [
        &["-S", "513"][..],
        &["-S", "17M"],
        &["-S", "x"],
        &["-S", ""],
        &["-S", "-1"],
        &["-S", "8E"],
        &["-m", "0"],
        &["-m", "17"],
        &["-m", "-1"],
        &["-m", "1k"],
        &["-m", ""],
        &["-r", "x"],
        &["-r", "-1"],
        &["-t", "x"],
        &["-T", "x"],
        &["-T", ""],
        &["-C", "-S", "4k"],
        &["-C", "--salvage"],
        &["--target-is-zero"],
        &["--skip-broken-bitmaps"],
    ] {
        let theirs = theirs(home.path(), words);
        let ours = convert(home.path(), &[words, &["-O", "raw"]].concat()).refused(&[]);
        let same = theirs.code == 1 && ours.stderr.replacen("dedup-img: ", "qemu-img: ", 1) == theirs.stderr;
        qemu::words(&qemu::SEEN, same, || format!("{}; {}", theirs.told(), ours.told()));
    }
    // Theirs leaves a target where it refuses a cache mode.
    assert!(!home.path().join("target").exists());
}

#[test]
fn a_raw_target_has_no_options() {
    let home = source();
    assert_eq!(convert(home.path(), &["-O", "raw", "-o", "help"]).ok().stdout, "A raw image has no options.\n");
    assert!(!home.path().join("target").exists());
}

#[test]
fn what_cannot_mean_anything_is_refused_by_name() {
    let home = source();
    fs::write(home.path().join("target"), b"precious").unwrap();
    for (words, told) in [
        (&["-C"][..], "-C: "),
        (&["--copy-range-offloading"], "-C: "),
        (&["--bitmaps"], "--bitmaps: "),
        (&["--bitmaps", "--skip-broken-bitmaps"], "--bitmaps: "),
        (&["--image-opts"], "--image-opts: "),
        (&["--source-image-opts"], "--image-opts: "),
        (&["--target-image-opts"], "--target-image-opts: "),
        (&["--object", "secret,id=a,data=b"], "--object: "),
        (&["-S", "0"], "-S 0: "),
        (&["-S", "64k"], "-S 65536: "),
        (&["-S", "4k", "-o", "cluster_size=512"], "-S 4096: "),
        (&["-m", "2", "--threads", "2"], "-m and --threads"),
        (&["-O", "raw", "-o", "size=1M"], "no options"),
    ] {
        convert(home.path(), words).refused(&[told]);
        assert!(fs::read(home.path().join("target")).unwrap() == b"precious", "{words:?}");
    }
    wrong_usage(convert(home.path(), &["-D"]), "convert", &["-D"]);
    assert_eq!(names_in(home.path()), ["source.raw", "target"]);
}

#[test]
fn every_one_of_several_sources_is_locked() {
    let home = source();
    let parts = ["a", "b", "c"].map(|name| home.path().join(name));
    parts.iter().for_each(|part| fs::write(part, [7; 4096]).unwrap());
    let target = home.path().join("target");
    let join = || dedup_img(args!["convert", "-q", "-f", "raw", parts[0], parts[1], parts[2], target]);
    for part in &parts {
        let _writer = Running::qemu_io(args!["-f", "raw", part]);
        let ran = join();
        assert!(ran.code == 1 && ran.stderr.contains("Failed to get shared \"write\" lock"), "{}", ran.told());
        assert!(ran.stderr.contains(&format!("Could not open '{}'", part.display())), "{}", ran.told());
    }
    join().ok();
}

/// What changes nothing about the file but how it is made.
#[test]
fn options_about_the_way_give_the_same_file() {
    let home = source();
    let target = home.path().join("target");
    let mut sums = Vec::new();
    for words in [
        &[][..],
        &["-W"],
        &["--oob-writes", "-m", "1"],
        &["-m", "0x10"],
        &["--parallel", "010"],
        &["-T", "none", "-t", "none"],
        &["--source-cache", "directsync", "--target-cache", "directsync"],
        &["-T", "unsafe"],
        &["-T", "writethrough"],
        &["-T", "off"],
        &["-T", "writeback"],
        &["-S", "4k"],
        &["-S", "512"],
        &["--sparse-size", "0x1000"],
        &["-r", "1G"],
        &["--rate", "0"],
        &["--salvage"],
        &["--target-options", "compat=1.1"],
    ] {
        let ran = convert(home.path(), &[words, &["-q"]].concat()).ok();
        assert_eq!(ran.text(), "");
        sums.push(sha256_of(&target));
    }
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
}

#[test]
fn a_sparse_size_says_how_many_zeros_are_a_hole() {
    let home = source();
    let blocks = |name: &str| home.path().join(name).metadata().unwrap().blocks();
    let same = |name: &str| sha256_of(&home.path().join(name)) == sha256_of(&home.path().join("source.raw"));
    let mut last = 0;
    for size in ["512", "1536", "4k", "20k", "64k", "1M", "3M", "16M", "0"] {
        convert(home.path(), &["-q", "-f", "raw", "-O", "raw", "-S", size]).ok();
        theirs(home.path(), &["-f", "raw", "-O", "raw", "-S", size]).ok();
        assert!(same("target") && same("theirs"), "{size}");
        assert!(blocks("target") >= last, "{size}: {} after {last}", blocks("target"));
        last = blocks("target");
        // Where zeros are in a row, ours finds as many as theirs, which looks at pieces of its buffer.
        assert!(last <= blocks("theirs"), "{size}: {last}, theirs {}", blocks("theirs"));
        assert!(!["512", "4k", "0"].contains(&size) || last == blocks("theirs"), "{size}: {last}");
    }
}

/// Fully allocated is fully allocated, also where the source has holes and where the target was sparse.
#[test]
fn a_sparse_size_of_zero_writes_every_zero() {
    let home = scratch();
    let [source, target] = ["source.raw", "target"].map(|name| home.path().join(name));
    for (length, data) in [(9 * M + 512, Some(5 * M)), (3 * M, None), (0, None), (5, Some(0))] {
        fs::write(&source, b"").unwrap();
        fs::File::options().write(true).open(&source).unwrap().set_len(length).unwrap();
        if let Some(at) = data {
            patch(&source, at, b"data!");
        }
        let ran = convert(home.path(), &["-f", "raw", "-O", "raw", "-S", "0", "--output", "json"]).ok();
        let summary: Value = serde_json::from_str(&ran.stdout).unwrap();
        let due = length.next_multiple_of(512);
        assert_eq!(summary["written_bytes"].as_u64(), Some(due));
        assert!(target.metadata().unwrap().blocks() * 512 >= due);
        qemu::compare_same("raw", &source, "raw", &target);
    }
}

#[test]
fn a_rate_is_kept_and_does_not_delay_an_interrupt() {
    let home = scratch();
    fs::write(home.path().join("source.raw"), Random::new(3).bytes(4 * M as usize)).unwrap();
    for format in ["raw", "qcow2"] {
        let started = Instant::now();
        convert(home.path(), &["-q", "-O", format, "-r", "4M"]).ok();
        let took = started.elapsed();
        // What is written last is not waited for.
        assert!((500..4000).contains(&took.as_millis()), "{took:?}");
        let mut command = super::failure::heeding(args!["convert", "-q", "-O", format, "-r", "1"]);
        let mut child = command.args(["source.raw", "slow"]).current_dir(home.path()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(700));
        assert!(child.try_wait().unwrap().is_none());
        qemu::run("kill", args!["-INT", child.id().to_string()]).ok();
        let interrupted = Instant::now();
        assert!(!child.wait().unwrap().success());
        assert!(interrupted.elapsed() < Duration::from_secs(5), "{:?}", interrupted.elapsed());
        assert!(!home.path().join("slow").exists());
    }
}

/// Converts with `--salvage` in all ways, and compares what came of it with what is due and what was said with `lines`.
#[track_caller]
fn salvaged(source: &Path, format: &str, due: &[u8], lines: &[&str]) {
    let home = scratch();
    let [target, raw, truth] = ["target", "raw", "truth"].map(|name| home.path().join(name));
    fs::write(&truth, due).unwrap();
    for (words, target) in [(&["-O", "raw"][..], &raw), (&[], &target), (&["-o", "cluster_size=512"], &target)] {
        let words = args!["convert", "-f", format].into_iter().chain(words.iter().map(OsString::from));
        let words: Vec<OsString> = words.collect();
        let plain = dedup_img(words.clone().into_iter().chain(args![source, target]));
        assert_eq!(plain.code, 1, "{}", plain.told());
        let ran =
            dedup_img(words.clone().into_iter().chain(args!["--salvage", "--output", "json", source, target])).ok();
        let told: Vec<&str> = ran.stderr.lines().collect();
        assert_eq!(told.len(), lines.len(), "{}", ran.told());
        for (told, due) in told.iter().zip(lines) {
            let start = format!("dedup-img: warning: error while reading offset {due}");
            assert!(told.starts_with(&start), "{start}: {}", ran.told());
        }
        let summary: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert!(summary["unreadable_bytes"].as_u64().unwrap() > 0, "{summary:#}");
        let quiet = dedup_img(words.into_iter().chain(args!["--salvage", "-q", source, target])).ok();
        assert_eq!(quiet.text(), "");
    }
    assert!(fs::read(&raw).unwrap() == due);
    qemu::check_clean(&target);
    qemu::compare_same("raw", &truth, "qcow2", &target);
}

/// The content, the image that `qemu-img convert` makes of it, and the offset of its first L2 table.
fn image(options: &[&str]) -> (TempDir, PathBuf, Vec<u8>, u64) {
    let home = scratch();
    let [source, image] = ["source.raw", "image"].map(|name| home.path().join(name));
    let bytes = content()[..7 * M as usize].to_vec();
    write_sparse(&source, &bytes);
    qemu::convert("raw", &source, "qcow2", &image, options);
    let file = fs::read(&image).unwrap();
    let number = |at: u64| u64::from_be_bytes(*file[at as usize..].first_chunk().unwrap());
    let l2 = number(number(40)) & 0x00ff_ffff_ffff_fe00;
    (home, image, bytes, l2)
}

#[test]
fn salvage_takes_zeros_for_damaged_compressed_clusters() {
    let (home, image, mut bytes, l2) = image(&["-c"]);
    let file = fs::read(&image).unwrap();
    // 6 MiB is fill and compresses.
    let entry = u64::from_be_bytes(*file[(l2 + 8 * 96) as usize..].first_chunk().unwrap());
    patch(&image, entry & ((1 << 54) - 1), &[0xff; 8]);
    bytes[(6 * M) as usize..][..64 << 10].fill(0);
    salvaged(&image, "qcow2", &bytes, &[&format!("{}: '{}': compressed", 6 * M, image.display())]);
    let truth = home.path().join("theirs");
    qemu::img(args!["convert", "-q", "--salvage", "-O", "raw", image, truth]).ok();
    assert!(fs::read(truth).unwrap() == bytes, "qemu-img salvages the same");
}

/// An entry that points nowhere costs its cluster, a table that cannot be found what it maps, and no more.
#[test]
fn salvage_takes_zeros_for_what_damaged_tables_map() {
    let (_home, image, mut bytes, l2) = image(&["-o", "cluster_size=4k"]);
    let entry = |at: u64| u64::from_be_bytes(*fs::read(&image).unwrap()[at as usize..].first_chunk().unwrap());
    let odd = |at: u64| patch(&image, at, &(entry(at) | 512).to_be_bytes());
    odd(l2 + 8 * 10);
    odd(u64::from_be_bytes(*fs::read(&image).unwrap()[40..].first_chunk().unwrap()) + 8);
    bytes[40 << 10..44 << 10].fill(0);
    bytes[2 << 20..4 << 20].fill(0);
    salvaged(&image, "qcow2", &bytes, &["40960: ", "2097152: "]);
}

/// A device that fails half of its sectors: a loop device whose file was cut.
#[test]
fn salvage_takes_zeros_for_sectors_that_a_device_cannot_read() {
    let home = scratch();
    let file = home.path().join("file");
    let mut bytes = Random::new(5).bytes(2 * M as usize);
    fs::write(&file, &bytes).unwrap();
    let device = Loop::over(&file);
    fs::File::options().write(true).open(&file).unwrap().set_len(M + 64 * K).unwrap();
    bytes[(M + 64 * K) as usize..].fill(0);
    let line = format!("{}: Input/output error ('{}': {} bytes", M + 64 * K, device.display(), M - 64 * K);
    salvaged(&device, "raw", &bytes, &[&line]);
    let truth = home.path().join("theirs");
    qemu::img(args!["convert", "-q", "--salvage", "-f", "raw", "-O", "raw", &*device, truth]).ok();
    assert!(fs::read(truth).unwrap() == bytes, "qemu-img salvages the same");
}
