//! `stats`: its options and their errors, its gates, what it reads and what it leaves behind. What it prints is looked at in
//! `stats_output`.

use super::running::{Running, in_time, unprivileged};
use super::{Arguments, command_contract, input_contract, wrong_usage};
use crate::args;
use crate::support::corpus::{patch, write_sparse};
use crate::support::reader::Image;
use crate::support::subjects::{deduplicated, subject};
use crate::support::{Ran, Random, dedup_command, dedup_img, names_in, qemu, scratch, sha256_of};
use serde_json::Value;
use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tempfile::TempDir;

command_contract!("stats", any number of images);

/// The arguments for the tests of a contract.
const STATS: Arguments = |options, image, _| {
    let mut words = args!["stats"].to_vec();
    words.extend(options.iter().map(Into::into));
    words.push(image.into());
    words
};

input_contract!(STATS);

/// Counts in images.
pub(super) fn stats(options: &[&str], images: &[&Path]) -> Ran {
    let words = args!["stats"].into_iter().chain(options.iter().map(Into::into));
    dedup_img(words.chain(images.iter().map(Into::into)))
}

/// Counts, and returns the figures.
#[track_caller]
pub(super) fn figures(options: &[&str], images: &[&Path]) -> Value {
    let ran = stats(&[&["--output", "json"], options].concat(), images).ok();
    assert_eq!(ran.stderr, "", "{}", ran.told());
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()))
}

/// A raw disk of 4 KiB blocks: equal numbers are equal contents, and 0 is nothing but zeros.
pub(super) fn disk(path: &Path, blocks: impl IntoIterator<Item = u64>) {
    let block = |n| if n == 0 { vec![0; 4096] } else { Random::new(n).bytes(4096) };
    write_sparse(path, &blocks.into_iter().flat_map(block).collect::<Vec<u8>>());
}

/// A directory with `100.raw`, 100 clusters of data of which so many repeat another one, and `100.qcow2`, where they are shared.
fn hundred(duplicates: u64) -> (TempDir, PathBuf, PathBuf) {
    let home = scratch();
    let [raw, image] = ["100.raw", "100.qcow2"].map(|name| home.path().join(name));
    disk(&raw, (0..100).map(|n| 1 + n % (100 - duplicates)));
    dedup_img(args!["convert", "-q", "-f", "raw", "-t", "unsafe", "-o", "cluster_size=4k", raw, image]).ok();
    (home, raw, image)
}

#[test]
fn images_are_expected() {
    wrong_usage(dedup_img(args!["stats"]), "stats", &["Expecting image file names"]);
    wrong_usage(dedup_img(args!["stats", "-q", "--quick"]), "stats", &["Expecting image file names"]);
}

#[test]
fn bad_values_are_refused() {
    let (_home, raw, image) = hundred(7);
    let before = (sha256_of(&raw), sha256_of(&image));
    for (options, word) in [
        (&["--output", "xml"][..], "xml"),
        (&["--cluster-size", "0"], "luster"),
        (&["--cluster-size", "256"], "512"),
        (&["--cluster-size", "511"], "512"),
        (&["--cluster-size", "3000"], "power of two"),
        (&["--cluster-size", "4M"], "2048k"),
        (&["--cluster-size", "large"], "large"),
        (&["--cluster-size", "-1"], "-1"),
        (&["--cluster-size", "auto"], "auto"),
        (&["--top", "-1"], "-1"),
        (&["--top", "many"], "many"),
        (&["--top", "4294967296"], "4294967296"),
        (&["--max-duplicate", "101"], "101"),
        (&["--max-duplicate", "-1"], "-1"),
        (&["--max-duplicate", "nan"], "nan"),
        (&["--max-duplicate", "inf"], "inf"),
        (&["--max-duplicate", ""], "--max-duplicate"),
        (&["--min-saved", "100.1"], "100.1"),
        (&["--min-saved", "much"], "much"),
        (&["--threads", "0"], "--threads"),
        (&["--memory", "0"], "--memory"),
        (&["--memory", "much"], "--memory"),
        (&["-f", "no_such_format"], "no_such_format"),
        (&["-O", "raw"], "-O"),
        (&["--pin", "all"], "--pin"),
    ] {
        wrong_usage(stats(options, &[&raw, &image]), "stats", &[word]);
    }
    assert_eq!((sha256_of(&raw), sha256_of(&image)), before);
}

/// Nothing of the report is printed where one of the images fails, and the one that fails is named.
#[test]
fn one_bad_image_among_many_is_an_error() {
    let (home, raw, image) = hundred(7);
    let absent = home.path().join("absent");
    for images in [[&absent, &raw, &image], [&raw, &image, &absent]] {
        let images = images.map(PathBuf::as_path);
        stats(&[], &images).refused(&[absent.to_str().unwrap(), "No such file"]);
        stats(&["--output", "json", "--max-duplicate", "0"], &images).refused(&[absent.to_str().unwrap()]);
    }
    let damaged = damaged(home.path());
    stats(&["--max-duplicate", "0"], &[&raw, &damaged]).refused(&[damaged.to_str().unwrap()]);
}

/// An image with a refcount that is too low.
fn damaged(home: &Path) -> PathBuf {
    let path = home.join("damaged.qcow2");
    fs::copy(subject("plain-4k"), &path).unwrap();
    let image = Image::open(&path);
    let table = image.active().swap_remove(0).words;
    let cluster = table.iter().map(|word| (word & 0x00ff_ffff_ffff_fe00) / 4096).find(|&cluster| cluster != 0).unwrap();
    patch(&path, image.refcount_blocks()[0] + 2 * cluster, &[0, 0]);
    assert_eq!(qemu::check(&path).code, 2);
    path
}

/// Figures of an image that contradicts itself would be wrong: an error, and never exit code 2 or a gate's.
#[test]
fn a_damaged_image_is_refused_and_leaks_are_not() {
    let home = scratch();
    let damaged = damaged(home.path());
    for options in [&[][..], &["--quick"], &["--output", "json"], &["--min-saved", "100"], &["-q", "-U"]] {
        stats(options, &[&damaged]).refused(&[damaged.to_str().unwrap(), "dedup-img check"]);
    }
    let leaky = home.path().join("leaky.qcow2");
    fs::copy(subject("plain-4k"), &leaky).unwrap();
    let image = Image::open(&leaky);
    let last = image.length / 4096;
    patch(&leaky, (last + 1) * 4096 - 1, &[7]);
    patch(&leaky, image.refcount_blocks()[0] + 2 * last, &[0, 1]);
    assert_eq!(qemu::check(&leaky).code, 3);
    for options in [&[][..], &["--quick"]] {
        assert_eq!(figures(options, &[&leaky])["images"][0]["file"]["leaked_clusters"], 1);
        assert!(stats(options, &[&leaky]).ok().stdout.contains("leaked"));
    }
}

/// Runs with a gate; tells the exit code and the lines on standard error.
#[track_caller]
fn gate(options: &[&str], images: &[&Path]) -> (i32, Vec<String>) {
    let ran = stats(&[&["-q", "--no-curve"], options].concat(), images);
    assert_eq!(ran.stdout, "", "{}", ran.told());
    assert!(ran.stderr.is_empty() || ran.stderr.ends_with('\n'), "{}", ran.told());
    (ran.code, ran.stderr.lines().map(str::to_owned).collect())
}

/// A gate that is met exactly is met, whatever the percentage; 29 of 100 is not 29 % in binary fractions.
#[test]
fn a_gate_at_its_limit_is_met() {
    let met = (0, Vec::new());
    for percent in [0, 7, 14, 28, 29, 50] {
        let (_home, raw, image) = hundred(percent);
        for limit in [percent.to_string(), format!("{percent}%"), format!("{percent}.001")] {
            assert_eq!(gate(&["--max-duplicate", &limit], &[&raw]), met, "{limit} of {percent}");
        }
        for limit in [percent.to_string(), format!("{percent} %"), format!("{}", percent as f64 - 0.001)] {
            if !limit.starts_with('-') {
                assert_eq!(gate(&["--min-saved", &limit], &[&image]), met, "{limit} of {percent}");
            }
        }
        let (code, lines) = gate(&["--min-saved", &format!("{percent}.001")], &[&image]);
        assert_eq!((code, lines.len()), (4, 1), "{percent}: {lines:?}");
        // What is shared is not stored twice.
        assert_eq!(gate(&["--max-duplicate", "0", "--min-saved", "0"], &[&image]), met);
        if percent > 0 {
            let (code, lines) = gate(&["--max-duplicate", &format!("{}", percent as f64 - 0.001)], &[&raw]);
            assert_eq!((code, lines.len()), (4, 1), "{percent}: {lines:?}");
        }
    }
}

#[test]
fn a_gate_that_is_not_met_is_exit_code_4_and_one_line() {
    let (_home, raw, image) = hundred(29);
    let (a, b) = (raw.display(), image.display());
    let still =
        format!("dedup-img: '{a}': 29.0 % of the data is still stored more than once; --max-duplicate allows 5 %");
    let saves = |path, share, limit| {
        format!("dedup-img: '{path}': sharing saves {share} % of the data; --min-saved asks for {limit} %")
    };
    assert_eq!(gate(&["--max-duplicate", "5"], &[&raw]), (4, vec![still.clone()]));
    assert_eq!(gate(&["--min-saved", "40.5"], &[&image]), (4, vec![saves(&b, "29.0", "40.5")]));
    // Nothing is shared in a raw file.
    assert_eq!(gate(&["--min-saved", "20"], &[&raw]), (4, vec![saves(&a, "0.0", "20")]));
    assert_eq!(gate(&["--min-saved", "20"], &[&image]), (0, vec![]));
    assert_eq!(gate(&["--quick", "--min-saved", "40.5"], &[&image]), (4, vec![saves(&b, "29.0", "40.5")]));
    // Both gates, and every image.
    let (code, mut lines) = gate(&["--max-duplicate", "5", "--min-saved", "40"], &[&image, &raw]);
    lines.sort();
    let mut due = vec![saves(&b, "29.0", "40"), still.clone(), saves(&a, "0.0", "40")];
    due.sort();
    assert_eq!((code, lines), (4, due));
    // With the report, the lines are the same.
    let ran = stats(&["--max-duplicate", "5"], &[&raw]);
    assert_eq!((ran.code, ran.stderr.trim_end()), (4, still.as_str()), "{}", ran.told());
    assert!(ran.stdout.contains("29.0 %") && ran.stdout.contains("duplicates"), "{}", ran.told());
}

#[test]
fn json_lists_the_gates_that_were_asked_for() {
    let (_home, raw, image) = hundred(29);
    let gates = |options: &[&str], code| {
        let ran = stats(&[&["--output", "json", "--no-curve"], options].concat(), &[&image, &raw]);
        assert_eq!(ran.code, code, "{}", ran.told());
        let told: Value = serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()));
        let gates = told.get("gates").map(|gates| gates.as_array().unwrap().clone());
        let unmet = gates.iter().flatten().filter(|gate| gate["met"] == false).count();
        assert_eq!(ran.stderr.lines().count(), unmet, "{}", ran.told());
        gates
    };
    assert_eq!(gates(&[], 0), None);
    let gate = |name: &str, path: &Path, limit: f64, percent: f64, met: bool| {
        serde_json::json!({
            "gate": name, "filename": path, "limit_percent": limit, "percent": percent, "met": met,
        })
    };
    let due = [gate("max-duplicate", &image, 20.0, 0.0, true), gate("max-duplicate", &raw, 20.0, 29.0, false)];
    assert_eq!(gates(&["--max-duplicate", "20"], 4).unwrap(), due);
    let due = [gate("min-saved", &image, 29.0, 29.0, true), gate("min-saved", &raw, 29.0, 0.0, false)];
    assert_eq!(gates(&["--min-saved", "29"], 4).unwrap(), due);
    let both = gates(&["--min-saved", "0", "--max-duplicate", "100"], 0).unwrap();
    assert!(both.len() == 4 && both.iter().all(|gate| gate["met"] == true), "{both:?}");
}

#[test]
fn quick_refuses_what_needs_the_data() {
    let (_home, raw, image) = hundred(29);
    for option in ["--max-duplicate=5", "--cluster-size=4k", "--top=10", "--top=0"] {
        let name = option.split('=').next().unwrap();
        wrong_usage(stats(&["--quick", option], &[&image]), "stats", &[name, "--quick"]);
    }
    for images in [&[&*raw][..], &[&image, &raw], &[&raw, &image]] {
        for options in [&["--quick"][..], &["--quick", "--output", "json"], &["--quick", "--min-saved", "0"]] {
            let words = ["--quick answers from the metadata of a QCOW2 image; a raw image has to be read"];
            stats(options, images).refused(&[words[0], raw.to_str().unwrap()]);
        }
    }
    stats(&["--quick", "-f", "raw"], &[&image]).refused(&[image.to_str().unwrap(), "raw image"]);
    stats(&["--quick", "--no-curve", "--min-saved", "29"], &[&image, &image]).ok();
}

/// `--quick` of 64 MiB of data: no read reaches it, and it would not matter what it holds.
#[test]
fn quick_does_not_read_data() {
    let home = scratch();
    let [raw, image, packed] = ["raw", "image.qcow2", "packed.qcow2"].map(|name| home.path().join(name));
    fs::write(&raw, Random::new(5).bytes(64 << 20)).unwrap();
    qemu::convert("raw", &raw, "qcow2", &image, &["-o", "cluster_size=4k"]);
    // The kernel adds what a child has read to what the shell has read.
    let read = |options: &[&str]| {
        let words = STATS(options, &image, &image);
        let script =
            "\"$@\" >/dev/null || exit; while read -r key n; do [ $key != rchar: ] || echo $n; done </proc/$$/io";
        let command = args!["-c", script, "sh", env!("CARGO_BIN_EXE_dedup-img")].into_iter().chain(words);
        let ran = qemu::run("sh", command).ok();
        ran.stdout.trim().parse::<u64>().unwrap_or_else(|error| panic!("{error}: {}", ran.told()))
    };
    assert!(read(&["--no-curve"]) > 64 << 20);
    // Its 16,384 clusters have L2 entries of 128 KiB, and refcounts of 32 KiB.
    let quick = read(&["--quick"]);
    assert!(quick < 4 << 20, "{quick} bytes were read");

    // A compressed cluster that cannot be unpacked.
    fs::copy(subject("zlib"), &packed).unwrap();
    let before = figures(&["--quick"], &[&packed]);
    let image = Image::open(&packed);
    let word = image.active()[0].words.iter().copied().find(|word| word & 1 << 62 != 0).unwrap();
    patch(&packed, word & ((1 << 58) - 1), &[0xff; 16]);
    qemu::check_clean(&packed);
    stats(&[], &[&packed]).refused(&[packed.to_str().unwrap(), "compressed"]);
    assert_eq!(figures(&["--quick"], &[&packed])["images"], before["images"]);
}

/// The sizes of the curve.
fn sizes(told: &Value) -> Vec<u64> {
    told["curve"].as_array().unwrap().iter().map(|point| point["cluster_size_bytes"].as_u64().unwrap()).collect()
}

#[test]
fn options_say_what_is_counted() {
    let (_home, raw, _) = hundred(29);
    let times = |told: &Value| told["top"].as_array().unwrap().iter().map(|t| t["times"].as_u64()).collect::<Vec<_>>();
    let told = figures(&[], &[&raw]);
    assert_eq!((told["cluster_size_bytes"].as_u64(), times(&told)), (Some(4096), vec![Some(2); 10]));
    let usual: Vec<u64> = (12..=21).map(|bits| 1 << bits).collect();
    assert_eq!(sizes(&told), usual);
    for (top, due) in [("0", 0), ("1", 1), ("29", 29), ("100000", 29)] {
        assert_eq!(times(&figures(&["--top", top], &[&raw])), vec![Some(2); due]);
    }
    let told = figures(&["--no-curve"], &[&raw]);
    assert!(told.get("curve").is_none() && told.get("recommendation").is_none(), "{told:#}");
    for (size, bits) in [("512", 9), ("1k", 10), ("2048", 11), ("64k", 16), ("2M", 21)] {
        let told = figures(&["--cluster-size", size], &[&raw]);
        assert_eq!(told["cluster_size_bytes"].as_u64(), Some(1 << bits));
        // The size that was asked for is in the curve, be it smaller than the others.
        let smaller: Vec<u64> = (bits < 12).then_some(1 << bits).into_iter().collect();
        assert_eq!(sizes(&told), [&smaller[..], &usual].concat());
        // 400 KiB of data, in clusters that begin where the disk begins.
        assert_eq!(told["content"]["data_clusters"], (400_u64 << 10).div_ceil(1 << bits));
        let alone = figures(&["--no-curve", "--cluster-size", size], &[&raw]);
        assert_eq!((&alone["content"], &alone["top"]), (&told["content"], &told["top"]), "{size}");
    }
    let last = figures(&["--cluster-size", "64k", "--cluster-size", "8k", "--top", "3", "--top", "0"], &[&raw]);
    assert_eq!((last["cluster_size_bytes"].as_u64(), times(&last)), (Some(8192), vec![]));
}

/// I6: what is being written cannot be counted, unless the user says so.
#[test]
fn an_image_that_qemu_writes_to_is_refused_in_the_words_of_qemu_img() {
    let home = scratch();
    let image = deduplicated(home.path(), "image.qcow2", &[]);
    let _writer = Running::qemu_io(args!["-f", "qcow2", image]);
    let theirs = qemu::img(args!["check", image]);
    assert_eq!(theirs.code, 1, "{}", theirs.told());
    for options in [&[][..], &["--quick"], &["--min-saved", "100"], &["-f", "raw"]] {
        let ran = stats(options, &[&image]);
        assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{}", ran.told());
        let same = ran.stderr.replace("dedup-img: ", "qemu-img: ") == theirs.stderr;
        qemu::words(&qemu::SEEN, same, || format!("{}; {}", ran.told(), theirs.told()));
        assert!(ran.stderr.contains("Failed to get shared \"write\" lock"), "{}", ran.told());
    }
    for options in [["-U"].as_slice(), &["--force-share"], &["-U", "--quick"]] {
        stats(options, &[&image]).ok();
    }
}

/// I6 from the other side.
#[test]
fn while_stats_reads_others_read_and_nobody_writes() {
    let home = scratch();
    let [raw, image] = ["raw", "image.qcow2"].map(|name| home.path().join(name));
    fs::write(&raw, Random::new(5).bytes(32 << 20)).unwrap();
    qemu::convert("raw", &raw, "qcow2", &image, &["-o", "cluster_size=4k"]);
    let mut running = Running::dedup_img(args!["stats", "-q", raw, image]);
    running.stop_when(|it| it.has_locked(&raw) && it.has_locked(&image));
    for (format, path) in [("raw", &raw), ("qcow2", &image)] {
        let ran = qemu::run("qemu-io", args!["-f", format, "-c", "length", path]);
        assert!(ran.code == 1 && ran.stderr.contains("\"write\" lock"), "{}", ran.told());
        qemu::run("qemu-io", args!["-r", "-f", format, "-c", "length", path]).ok();
    }
    stats(&["-q", "--no-curve"], &[&image]).ok();
    running.signal("CONT");
    running.finish().ok();
}

/// An image that changes in spite of all locks is told from one that does not.
#[test]
fn an_image_that_changes_while_it_is_read_is_an_error() {
    let home = scratch();
    let image = home.path().join("image.qcow2");
    for length in [Some(4096), None, Some(256 << 20)] {
        let raw = large(home.path());
        qemu::convert("raw", &raw, "qcow2", &image, &["-o", "cluster_size=4k"]);
        for path in [&raw, &image] {
            let mut running = Running::start(spilling(path, home.path()));
            running.stop_when(|it| it.written() > 0);
            match length {
                Some(length) => File::options().write(true).open(path).unwrap().set_len(length).unwrap(),
                None => patch(path, 16 << 20, &[1; 4096]),
            }
            running.signal("CONT");
            running.finish().refused(&[path.to_str().unwrap()]);
        }
    }
}

#[test]
fn a_backing_file_is_needed_and_can_be_refused() {
    let (home, _, base) = hundred(29);
    let overlay = home.path().join("overlay.qcow2");
    qemu::img(args!["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay]).ok();
    assert_eq!(figures(&["--cluster-size", "4k"], &[&overlay])["content"]["distinct_clusters"], 71);
    stats(&["--no-backing"], &[&overlay]).refused(&[overlay.to_str().unwrap(), "--no-backing"]);
    stats(&["--no-backing", "-q"], &[&base]).ok();
    fs::remove_file(&base).unwrap();
    stats(&[], &[&overlay]).refused(&[overlay.to_str().unwrap(), base.to_str().unwrap(), "No such file"]);
    // Its own metadata does not depend on what is behind.
    assert_eq!(figures(&["--quick"], &[&overlay])["images"][0]["disk"]["allocated_clusters"], 0);
}

#[test]
fn what_is_no_file_is_refused_at_once() {
    let home = scratch();
    let fifo = home.path().join("fifo");
    qemu::run("mkfifo", args![fifo]).ok();
    for path in [&fifo, Path::new("/dev/zero"), Path::new("/dev/null")] {
        for options in [&[][..], &["-f", "raw"], &["-f", "qcow2"], &["--quick"]] {
            in_time(STATS(options, path, path)).refused(&[path.to_str().unwrap(), "not a regular file"]);
        }
    }
}

/// A read-only image in a directory that cannot be written: there is nothing to write.
#[test]
fn nothing_is_written_beside_an_image() {
    let (home, raw, image) = hundred(29);
    let temporary = scratch();
    let state = |path: &Path| (sha256_of(path), path.metadata().unwrap().modified().unwrap());
    let before = (state(&raw), state(&image));
    for path in [&raw, &image] {
        fs::set_permissions(path, Permissions::from_mode(0o444)).unwrap();
    }
    fs::set_permissions(home.path(), Permissions::from_mode(0o555)).unwrap();
    let run = |options: &[&str], image: &Path| {
        let mut command = unprivileged(STATS(options, image, image));
        command.env("TMPDIR", temporary.path()).current_dir(home.path());
        qemu::finish("setpriv", command)
    };
    let ends = [run(&["--memory", "1M", "--cluster-size", "512"], &raw), run(&[], &image), run(&["--quick"], &image)];
    fs::set_permissions(home.path(), Permissions::from_mode(0o755)).unwrap();
    for ran in ends {
        ran.ok();
    }
    assert_eq!((state(&raw), state(&image)), before);
    assert_eq!(names_in(home.path()), ["100.qcow2", "100.raw"]);
    assert!(names_in(temporary.path()).is_empty());
}

/// Data of which the records do not fit into the least memory that can be given, and that takes long enough to be interfered with.
fn large(home: &Path) -> PathBuf {
    let path = home.join("large.raw");
    fs::write(&path, Random::new(5).bytes(128 << 20)).unwrap();
    path
}

/// A command that needs temporary files, in the directory given.
fn spilling(image: &Path, directory: impl Into<OsString>) -> std::process::Command {
    let mut command = super::failure::heeding(STATS(&["--memory", "1M", "--cluster-size", "512"], image, image));
    command.env("TMPDIR", directory.into()).stdin(Stdio::null());
    command
}

#[test]
fn temporary_files_go_where_the_environment_says() {
    let home = scratch();
    let large = large(home.path());
    let [usable, absent, file] = ["usable", "absent", "file"].map(|name| home.path().join(name));
    fs::create_dir(&usable).unwrap();
    fs::write(&file, "").unwrap();
    let run = |directory: &Path| qemu::finish("dedup-img", spilling(&large, directory));
    for directory in [&absent, &file, Path::new("/proc")] {
        run(directory).refused(&["temporary file", directory.to_str().unwrap()]);
    }
    run(&usable).ok();
    // An empty name is none, as for any other program.
    run(Path::new("")).ok();
    assert!(names_in(&usable).is_empty());
    // What fits into memory needs none.
    let mut command = dedup_command(STATS(&[], &large, &large));
    qemu::finish("dedup-img", {
        command.env("TMPDIR", &absent);
        command
    })
    .ok();
    assert_eq!(names_in(home.path()), ["file", "large.raw", "usable"]);
}

#[test]
fn an_error_or_a_signal_leaves_no_temporary_file() {
    let home = scratch();
    let large = large(home.path());
    let temporary = scratch();
    let mut running = Running::start(spilling(&large, temporary.path()));
    running.stop_when(|it| it.written() > 0);
    File::options().write(true).open(&large).unwrap().set_len(1 << 20).unwrap();
    running.signal("CONT");
    running.finish().refused(&[large.to_str().unwrap()]);
    assert!(names_in(temporary.path()).is_empty());

    let large = self::large(home.path());
    for signal in ["INT", "TERM", "HUP", "KILL"] {
        let mut running = Running::start(spilling(&large, temporary.path()));
        running.stop_when(|it| it.written() > 0);
        running.signal(signal);
        running.signal("CONT");
        let ran = running.finish();
        let line = match signal {
            "KILL" => String::new(),
            _ => format!("dedup-img: stats was stopped by SIG{signal}\n"),
        };
        assert_eq!((ran.code, ran.text()), (-1, line), "{signal}: {}", ran.told());
        assert!(names_in(temporary.path()).is_empty(), "{signal}");
    }
    assert_eq!(names_in(home.path()), ["large.raw"]);
}
