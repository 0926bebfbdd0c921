//! `gc`: its options and their errors, what it prints where, and what a full disk or a signal leaves behind.

use super::failure::in_namespace;
use super::running::{Running, unprivileged};
use super::{Arguments, command_contract, dedup_img_in, wrong_usage};
use crate::args;
use crate::support::corpus::plain;
use crate::support::subjects::{deduplicated, foreign, subject};
use crate::support::{Ran, Random, dedup_img, names_in, qemu, scratch, sha256_of};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

command_contract!("gc");

/// The arguments for the tests of a contract.
const GC: Arguments = |options, image, _| {
    let mut words = args!["gc"].to_vec();
    words.extend(options.iter().map(Into::into));
    words.push(image.into());
    words
};

#[test]
fn the_input_must_exist() {
    super::the_input_must_exist(GC);
}

#[test]
fn the_input_cannot_be_a_directory() {
    super::the_input_cannot_be_a_directory(GC);
}

#[test]
fn the_input_must_be_readable() {
    super::the_input_must_be_readable(GC);
}

#[test]
fn a_file_that_is_no_image_of_the_format_given_is_refused() {
    super::a_file_that_is_no_image_of_the_format_given_is_refused(GC);
}

/// Runs qemu-io commands on an image whose discards are to be done.
fn edit(path: &Path, commands: &[String]) {
    let mut words = args!["-f", "qcow2", "-d", "unmap"].to_vec();
    commands.iter().for_each(|command| words.extend(args!["-c", command]));
    words.push(path.into());
    let ran = qemu::run("qemu-io", words).ok();
    assert!(!ran.text().contains("rror"), "{}", ran.told());
}

/// A directory with a deduplicated image of 64 members that are used three times each, of which a guest has left four to nobody,
/// and four others to one user; it has holes.
fn image() -> (TempDir, PathBuf) {
    let home = scratch();
    let path = deduplicated(home.path(), "image.qcow2", &[]);
    let discards = ["discard 0 32k", "discard 356k 32k", "discard 712k 16k", "discard 270k 60k"];
    edit(&path, &discards.map(String::from));
    (home, path)
}

fn gc(options: &[&str], image: &Path) -> Ran {
    dedup_img(GC(options, image, image))
}

/// Collects and returns the summary.
fn summary(options: &[&str], image: &Path) -> Value {
    let ran = gc(&[options, &["--output", "json"]].concat(), image).ok();
    assert_eq!(ran.stderr, "", "{}", ran.told());
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()))
}

#[test]
fn one_image_is_expected() {
    wrong_usage(dedup_img(args!["gc"]), "gc", &["Expecting one image file name"]);
}

#[test]
fn bad_values_are_refused() {
    let (_home, image) = image();
    let before = sha256_of(&image);
    for (options, word) in [
        (&["--output", "xml"][..], "xml"),
        (&["--pin", "all"], "--pin"),
        (&["--compact=yes"], "--compact"),
        (&["--threads", "0"], "--threads"),
        (&["--memory", "0"], "--memory"),
        (&["--memory", "much"], "--memory"),
        (&["-f", "no_such_format"], "no_such_format"),
        (&["-U"], "-U"),
    ] {
        wrong_usage(gc(options, &image), "gc", &[word]);
        assert_eq!(sha256_of(&image), before, "{options:?}");
    }
}

#[test]
fn raw_and_other_formats_are_refused_by_name() {
    let home = scratch();
    let raw = home.path().join("disk.raw");
    fs::copy(plain(), &raw).unwrap();
    let before = sha256_of(&raw);
    for options in [&[][..], &["-f", "raw"], &["--dry-run"], &["--compact"]] {
        gc(options, &raw).refused(&["raw", "disk.raw"]);
        assert_eq!(sha256_of(&raw), before);
    }
    for format in ["vmdk", "vdi"] {
        let other = home.path().join(format);
        qemu::create(format, &other, 1 << 20, "");
        gc(&[], &other).refused(&[format, other.to_str().unwrap()]);
    }
}

#[test]
fn a_header_and_nothing_behind_it_is_refused() {
    let home = scratch();
    let (whole, cut) = (fs::read(subject("snapshots-64k")).unwrap(), home.path().join("cut.qcow2"));
    for length in [0, 4, 8, 71, 72, 103, 104, 112, 4096, 65536, 4 << 16, whole.len() - 65536] {
        for options in [&["-f", "qcow2"][..], &["-f", "qcow2", "--compact"]] {
            fs::write(&cut, &whole[..length]).unwrap();
            gc(options, &cut).refused(&[cut.to_str().unwrap()]);
            assert!(fs::read(&cut).unwrap() == whole[..length], "{length} bytes were touched");
        }
    }
    assert_eq!(names_in(home.path()), ["cut.qcow2"]);
}

/// What is encrypted depends on its place, so it does not move; all else is done.
#[test]
fn an_encrypted_image_is_collected_and_not_compacted() {
    let home = scratch();
    let [(_, outside), (_, secret)] = foreign(home.path());
    for options in [&[][..], &["--compact"], &["--dry-run"]] {
        gc(options, &outside).refused(&["external data file", outside.to_str().unwrap()]);
    }
    let opened = format!("driver=qcow2,discard=unmap,encrypt.key-secret=s,file.filename={}", secret.display());
    let io = |commands: &[&str]| {
        let mut words = args!["--object", "secret,id=s,data=abc"].to_vec();
        commands.iter().for_each(|command| words.extend(args!["-c", command]));
        words.extend(args!["--image-opts", opened]);
        let ran = qemu::run("qemu-io", words).ok();
        assert!(!ran.text().contains("rror") && !ran.text().contains("failed"), "{}", ran.told());
    };
    io(&["write -P 7 0 1M", "discard 128k 512k"]);
    let before = sha256_of(&secret);
    for options in [&["--compact"][..], &["--compact", "--dry-run"]] {
        gc(options, &secret).refused(&["encrypt", "qemu-img convert", secret.to_str().unwrap()]);
        assert_eq!(sha256_of(&secret), before);
    }
    gc(&["-q"], &secret).ok();
    qemu::img(args!["check", "--object", "secret,id=s,data=abc", "--image-opts", opened]).ok();
    dedup_img(args!["check", secret]).ok();
    io(&["read -P 7 0 128k", "read -P 0 128k 512k", "read -P 7 640k 384k"]);
    assert_eq!(summary(&[], &secret)["changed"], false);
}

/// `--dry-run` needs no right to write, and a real run without it changes nothing.
#[test]
fn a_read_only_image_is_looked_at_and_never_touched() {
    let (_home, image) = image();
    fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).unwrap();
    let state = || (sha256_of(&image), image.metadata().unwrap().modified().unwrap(), image.metadata().unwrap().mode());
    let before = state();
    let run = |options: &[&str]| qemu::finish("setpriv", unprivileged(GC(options, &image, &image)));
    for options in [&["--dry-run"][..], &["--dry-run", "--compact"], &["--dry-run", "--drop-pool", "--output", "json"]]
    {
        run(options).ok();
    }
    let name = format!("Could not open '{}': ", image.display());
    run(&["--compact"]).refused(&[&name, "Permission denied"]);
    assert_eq!(state(), before);
}

#[test]
fn quiet_prints_nothing_at_all() {
    for options in [&["-q", "--dry-run"][..], &["-q", "-p", "--compact"], &["-q", "--output", "json"]] {
        let (_home, image) = image();
        let ran = gc(options, &image).ok();
        assert_eq!(ran.text(), "", "{}", ran.told());
    }
}

#[test]
fn the_summary_goes_to_stdout_and_nothing_to_stderr() {
    let (_home, image) = image();
    for options in [&["--dry-run"][..], &[], &["--dry-run", "--compact"], &["--compact"], &["--compact"]] {
        let ran = gc(options, &image).ok();
        assert_eq!(ran.stderr, "", "{}", ran.told());
        let table = ran.stdout.to_lowercase();
        for word in ["leaked", "garbage", "un-pooled", "freed", "members", "file length", "on disk", "time", "memory"] {
            assert!(table.contains(word), "no {word}: {}", ran.told());
        }
        assert_eq!(table.contains("moved"), options.contains(&"--compact"), "{}", ran.told());
        assert!(ran.stdout.is_ascii() && !ran.stdout.contains('\u{1b}'), "{}", ran.told());
    }
    assert!(gc(&["--compact"], &image).stdout.contains("There was nothing to do."));
}

#[test]
fn progress_without_a_terminal_is_the_line_of_qemu_img() {
    for options in [&["-p"][..], &["-p", "--compact"], &["-p", "--dry-run"]] {
        let (_home, image) = image();
        let ran = gc(options, &image).ok();
        assert!(ran.stdout.contains("    (100.00/100%)\r"), "{:?}", ran.stdout);
        assert!(!ran.stdout.contains('\u{1b}') && ran.stderr.is_empty(), "{}", ran.told());
        let ran = gc(&[options, &["--output", "json"]].concat(), &image).ok();
        let last = &ran.stdout[ran.stdout.find('{').unwrap_or_else(|| panic!("{}", ran.told()))..];
        assert!(serde_json::from_str::<Value>(last).is_ok(), "{}", ran.told());
    }
}

/// The keys of a summary, in alphabetical order.
const KEYS: [&str; 24] = [
    "allocated_after_bytes",
    "allocated_before_bytes",
    "changed",
    "cluster_size_bytes",
    "copied_bytes",
    "directory_rebuilt",
    "dry_run",
    "file_length_after_bytes",
    "file_length_before_bytes",
    "filename",
    "freed_bytes",
    "freed_clusters",
    "garbage_members",
    "leaked_clusters",
    "moved_clusters",
    "peak_memory_bytes",
    "pool_dropped",
    "pool_members",
    "room_available_bytes",
    "room_least_bytes",
    "room_needed_bytes",
    "schema_version",
    "seconds",
    "unpooled_members",
];

#[test]
fn json_has_every_key_and_agrees_with_the_file() {
    let (_home, image) = image();
    // Whether it changes something, and garbage, un-pooled and members.
    for (options, changes, members) in [
        (&["--dry-run"][..], true, [4, 4, 56]),
        (&[], true, [4, 4, 56]),
        (&[], false, [0, 0, 56]),
        (&["--compact", "--dry-run"], true, [0, 0, 56]),
        (&["--compact"], true, [0, 0, 56]),
        (&["--compact"], false, [0, 0, 56]),
        (&["--drop-pool"], true, [0, 0, 0]),
    ] {
        let before = image.metadata().unwrap();
        let told = summary(options, &image);
        let after = image.metadata().unwrap();
        let mut keys: Vec<&str> = told.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, KEYS, "{told:#}");
        assert_eq!((&told["schema_version"], &told["filename"]), (&1.into(), &image.to_str().unwrap().into()));
        let dry = options.contains(&"--dry-run");
        assert_eq!((&told["dry_run"], &told["changed"]), (&dry.into(), &changes.into()), "{options:?}: {told:#}");
        let number = |key: &str| told[key].as_u64().unwrap_or_else(|| panic!("{key}: {told:#}"));
        let found = ["garbage_members", "unpooled_members", "pool_members"].map(number);
        assert_eq!(found, members, "{options:?}: {told:#}");
        assert_eq!(told["pool_dropped"], options.contains(&"--drop-pool"), "{told:#}");
        assert_eq!(told["directory_rebuilt"], false, "{told:#}");
        assert_eq!(told["file_length_before_bytes"], before.len());
        assert!(number("moved_clusters") > 0 || !changes || !options.contains(&"--compact"), "{told:#}");
        if !dry {
            assert_eq!(told["file_length_after_bytes"], after.len());
            assert!(number("allocated_after_bytes").abs_diff(after.blocks() * 512) <= 128 << 10, "{told:#}");
        }
        assert!(number("allocated_before_bytes").abs_diff(before.blocks() * 512) <= 128 << 10, "{told:#}");
        assert!(told["seconds"].as_f64().is_some_and(|seconds| (0.0..60.0).contains(&seconds)), "{told:#}");
        assert!((1 << 20..512 << 20).contains(&number("peak_memory_bytes")), "{told:#}");
        assert_eq!(number("freed_clusters") * 4096, number("freed_bytes"));
    }
}

/// Names that could be taken for options or protocols are plain names here.
#[test]
fn odd_names_are_plain_names() {
    let (home, image) = image();
    for name in ["a b", "-dash", "json:{}", "nbd:x", "file:y", "fat:z", "\u{fc}"] {
        fs::copy(&image, home.path().join(name)).unwrap();
        dedup_img_in(home.path(), args!["gc", "-q", "--", name]).ok();
        dedup_img_in(home.path(), args!["gc", "-q", "--compact", format!("./{name}")]).ok();
        qemu::compare_same("qcow2", &image, "qcow2", &home.path().join(name));
    }
}

/// A snapshot of the user's that happens to have the pool's name is the user's.
#[test]
fn a_snapshot_that_only_has_the_name_of_the_pool_stays() {
    let home = scratch();
    let path = home.path().join("image.qcow2");
    qemu::convert("raw", &plain(), "qcow2", &path, &[]);
    qemu::snapshot("-c", "dedup-pool", &path).ok();
    edit(&path, &["discard 0 1M".into(), "write -P 3 0 128k".into()]);
    for options in [&[][..], &["--drop-pool"], &["--drop-pool", "--compact"]] {
        let told = summary(options, &path);
        assert_eq!((&told["pool_dropped"], &told["pool_members"]), (&false.into(), &0.into()), "{told:#}");
        assert_eq!(qemu::snapshots(&path), [("1".into(), "dedup-pool".into())]);
        let raw = home.path().join("raw");
        qemu::convert("qcow2", &path, "raw", &raw, &["-l", "dedup-pool"]);
        qemu::compare_same("raw", &plain(), "raw", &raw);
    }
}

/// I6, from both sides.
#[test]
fn an_image_in_use_is_left_alone_and_one_that_is_worked_on_is_not_opened() {
    let (_home, image) = image();
    let before = sha256_of(&image);
    for (flags, dry_run_works) in [(&[][..], false), (&["-r"], true)] {
        let words = args!["-f", "qcow2", image].into_iter().chain(flags.iter().map(Into::into));
        let _user = Running::qemu_io(words);
        for options in [&[][..], &["--compact"], &["--drop-pool"]] {
            let ran = gc(options, &image);
            assert!(ran.code == 1 && ran.stderr.contains("Failed to get \"write\" lock"), "{}", ran.told());
        }
        assert_eq!(gc(&["--dry-run"], &image).code == 0, dry_run_works);
        assert_eq!(sha256_of(&image), before);
    }
    let (_home, large) = full_of_holes();
    let mut worker = Running::dedup_img(GC(&["-q", "--compact"], &large, &large));
    worker.stop_when(|it| it.has_locked(&large));
    for flags in [&[][..], &["-r"]] {
        let words = args!["-f", "qcow2", "-c", "length", large].into_iter().chain(flags.iter().map(Into::into));
        let ran = qemu::run("qemu-io", words);
        assert!(ran.code == 1 && ran.stderr.contains("\"write\" lock"), "{}", ran.told());
    }
    worker.signal("CONT");
    worker.finish().ok();
    qemu::check_clean(&large);
}

/// The new pool needs room before the old one goes: where the file may not grow by that, it is left as it was.
#[test]
fn a_file_that_may_not_grow_is_left_whole() {
    let home = scratch();
    let path = deduplicated(home.path(), "image.qcow2", &[]);
    // All sharers of some members are written anew, and nothing is free.
    edit(&path, &["write -P 3 0 32k".into(), "write -P 4 356k 32k".into(), "write -P 5 712k 32k".into()]);
    let original = home.path().join("original.qcow2");
    fs::copy(&path, &original).unwrap();
    let length = path.metadata().unwrap().len();
    for before in ["trap '' XFSZ;", ""] {
        let mut command = Command::new("sh");
        let script = format!("{before} ulimit -c 0; exec prlimit --fsize={length} \"$0\" gc -q \"$1\"");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_dedup-img")]).arg(&path).stdin(Stdio::null());
        let ran = qemu::finish("sh", command);
        if ran.code != -1 || !before.is_empty() {
            ran.refused(&["File too large"]);
        }
        dedup_img(args!["check", "-q", "-r", "all", path]).ok();
        qemu::check_clean(&path);
        qemu::compare_same("qcow2", &original, "qcow2", &path);
    }
    assert_eq!(summary(&[], &path)["garbage_members"], 8);
    qemu::check_clean(&path);
    qemu::compare_same("qcow2", &original, "qcow2", &path);
}

/// On a full file system there is no room even in the holes of the file: the cause is told, nothing is lost, and with room again
/// the next run does it.
#[test]
fn a_full_file_system_stops_a_compaction_and_nothing_is_lost() {
    let (home, image) = full_of_holes();
    let mount = home.path().join("small");
    fs::create_dir(&mount).unwrap();
    // The file system goes with the namespace: what there is to judge is judged there.
    let script = "mount -t tmpfs -o size=40m none \"$3\"
        cp --sparse=always \"$2\" \"$3/image\"
        dd if=/dev/zero of=\"$3/fill\" bs=64k 2>/dev/null || true
        status=0; \"$1\" gc -q --compact \"$3/image\" || status=$?; echo status $status >&2
        \"$1\" check -q \"$3/image\" >&2; qemu-img compare -q \"$2\" \"$3/image\" >&2
        rm \"$3/fill\"; \"$1\" gc -q --compact \"$3/image\"
        qemu-img check -q \"$3/image\" >&2; qemu-img compare -q \"$2\" \"$3/image\" >&2; stat -c %s \"$3/image\" >&2";
    let ran = in_namespace(script, &[&image, &mount]);
    let lines: Vec<&str> = ran.stderr.lines().collect();
    assert!(ran.code == 0 && lines.len() == 3, "{}", ran.told());
    // How much is needed, how much is there, and what can be done.
    let told = [" of room are needed on its file system, which has 0 B; nothing was written; ", "without --compact"];
    assert!(lines[0].starts_with("dedup-img: '") && told.iter().all(|t| lines[0].contains(t)), "{}", ran.told());
    assert_eq!(lines[1], "status 1", "{}", ran.told());
    let length: u64 = lines[2].parse().unwrap();
    assert!(length < 17 << 20, "{length} bytes are left: {}", ran.told());
}

/// An image of 32 MiB; every other 128 KiB of it are free.
fn full_of_holes() -> (TempDir, PathBuf) {
    let home = scratch();
    let [raw, path] = ["raw", "image.qcow2"].map(|name| home.path().join(name));
    fs::write(&raw, Random::new(7).bytes(32 << 20)).unwrap();
    qemu::convert("raw", &raw, "qcow2", &path, &["-o", "cluster_size=4k"]);
    edit(&path, &(0..128).map(|n| format!("discard {}k 128k", 256 * n)).collect::<Vec<_>>());
    fs::remove_file(&raw).unwrap();
    (home, path)
}

/// Compacts a copy of `image`, sends a signal when it has locked it and written so many bytes, and reports how it ended.
fn interrupted(signal: &str, written: u64, image: &Path) -> Ran {
    let home = scratch();
    let path = home.path().join("image.qcow2");
    fs::copy(image, &path).unwrap();
    let mut running = Running::heeding(GC(&["-q", "--compact", "--memory", "1M"], &path, &path));
    running.until(|it| it.has_locked(&path) && it.written() >= written);
    running.signal(signal);
    let ran = running.finish();
    let told = ran.tells_how_it_stopped(&path, &fs::read(image).unwrap());
    assert!(ran.code == 0 || told, "{}", ran.told());
    assert_eq!(names_in(home.path()), ["image.qcow2"], "something was left behind: {}", ran.told());
    let judge = |what: &str| {
        let ran = qemu::check(&path);
        assert_eq!(ran.code, 0, "{signal} after {written} bytes, {what}: {}", ran.told());
        qemu::compare_same("qcow2", image, "qcow2", &path);
    };
    judge("interrupted");
    gc(&["-q", "--compact"], &path).ok();
    judge("finished");
    assert_eq!(summary(&["--compact"], &path)["changed"], false);
    let length = path.metadata().unwrap().len();
    assert!(length < 17 << 20, "{length} bytes are left");
    ran
}

/// Ctrl-C and a polite request to end: the program stops in a clean state and dies of the signal, and the next run does the rest.
#[test]
fn an_interrupt_leaves_a_clean_image_with_its_content() {
    let (home, image) = full_of_holes();
    let (copy, mut total) = (home.path().join("copy.qcow2"), 0);
    fs::copy(&image, &copy).unwrap();
    let mut whole = Running::dedup_img(GC(&["-q", "--compact", "--memory", "1M"], &copy, &copy));
    whole.until(|it| {
        total = total.max(it.written());
        false
    });
    whole.finish().ok();
    let mut ends = Vec::new();
    for signal in ["INT", "TERM", "HUP"] {
        ends.extend((0..6).map(|sixth| interrupted(signal, total * sixth / 6, &image)));
    }
    // The signal may also come when all is done.
    let (died, finished): (Vec<Ran>, Vec<Ran>) = ends.into_iter().partition(|ran| ran.code == -1);
    assert!(died.len() >= 4, "too few of the signals came in time: {died:?}");
    assert!(finished.iter().all(|ran| ran.code == 0), "{finished:?} {died:?}");
}
