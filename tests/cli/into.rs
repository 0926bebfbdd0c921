//! `convert -n`: what it refuses and in which words, what it prints where, and that whatever goes wrong the image is clean and each
//! cluster of its disk reads as before or as it should.

use super::failure::in_namespace;
use super::running::{Running, unprivileged};
use super::wrong_usage;
use crate::args;
use crate::support::corpus::patch;
use crate::support::into::{into, layers, words};
use crate::support::reader::Image;
use crate::support::subjects::{deduplicated, foreign, subject};
use crate::support::{Ran, Random, dedup_command, dedup_img, names_in, qemu, scratch, sha256_of};
use serde_json::Value;
use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// A directory with an image of a MiB that has a pool, and a raw disk of that size with other content.
fn images() -> (TempDir, PathBuf, PathBuf) {
    let home = scratch();
    let target = deduplicated(home.path(), "target.qcow2", &[]);
    let source = home.path().join("source.raw");
    let size = qemu::virtual_size("qcow2", &target) as usize;
    fs::write(&source, [Random::new(3).bytes(128 << 10), Random::new(9).bytes(size - (128 << 10))].concat()).unwrap();
    (home, source, target)
}

/// Asserts that a call is refused with all the words, and that neither target nor directory has changed.
#[track_caller]
fn refused(words: impl IntoIterator<Item = OsString>, target: &Path, why: &[&str]) {
    let look =
        || (sha256_of(target), target.metadata().unwrap().modified().unwrap(), names_in(target.parent().unwrap()));
    let before = look();
    let ran = dedup_img(words).refused(why);
    assert!(look() == before, "something was touched: {}", ran.told());
}

#[test]
fn what_says_how_to_make_an_image_is_refused() {
    let (_home, source, target) = images();
    for (options, why) in [
        (&["-o", "cluster_size=4k"][..], "-o has no effect when skipping image creation"),
        (&["-o", "compat=1.1", "-q"], "-o has no effect when skipping image creation"),
        (&["-B", "base.raw", "-F", "raw"], "-B: with -n the target keeps its own backing file"),
        (&["-c"], "-c: with -n new clusters are not compressed"),
        (&["--plain"], "--plain: with -n the target keeps its pool"),
        (&["-O", "raw"], "-n: a raw file is always made anew"),
        (&["-S", "0"], "-S 0"),
        (&["-C"], "-C: copy offloading"),
        (&["--bitmaps"], "--bitmaps"),
    ] {
        refused(words(options, "raw", &source, &target), &target, &[why]);
    }
    let ran = dedup_img(args!["convert", "--target-is-zero", "-f", "raw", &source, &target]);
    wrong_usage(ran, "convert", &["--target-is-zero requires use of -n flag"]);
    let ran = dedup_img(args!["convert", "--compression-level", "3", "-f", "raw", &source, &target]);
    wrong_usage(ran, "convert", &["--compression-level requires use of -c flag"]);
    wrong_usage(dedup_img(args!["convert", "-n", &source]), "convert", &["Must specify image file name"]);
    // -o help asks for help, with -n too.
    dedup_img(args!["convert", "-n", "-o", "help"]).ok();
}

#[test]
fn a_target_that_cannot_be_written_is_refused() {
    let (home, source, target) = images();
    let [absent, directory, raw, text] =
        ["absent.qcow2", "directory", "disk.raw", "text"].map(|name| home.path().join(name));
    fs::create_dir(&directory).unwrap();
    fs::copy(&source, &raw).unwrap();
    fs::write(&text, "no image at all\n".repeat(4096)).unwrap();
    let open = |path: &Path| format!("Could not open '{}': ", path.display());
    let names = names_in(home.path());
    dedup_img(words(&[], "raw", &source, &absent)).refused(&[&open(&absent), "No such file or directory"]);
    dedup_img(words(&[], "raw", &source, &directory)).refused(&[&open(&directory)]);
    for path in [&raw, &text] {
        refused(words(&[], "raw", &source, path), path, &[&open(path), "not in qcow2 format"]);
    }
    for device in ["/dev/null", "/dev/zero"] {
        dedup_img(words(&[], "raw", &source, Path::new(device))).refused(&[device]);
    }
    assert_eq!(names_in(home.path()), names, "something was made");
    fs::set_permissions(&target, Permissions::from_mode(0o444)).unwrap();
    let before = sha256_of(&target);
    let ran = qemu::finish("setpriv", unprivileged(words(&[], "raw", &source, &target)));
    ran.refused(&[&open(&target), "Permission denied"]);
    assert_eq!(sha256_of(&target), before);
}

/// Images that no writer may touch, or that this one does not understand; nothing is compared before they are refused.
#[test]
fn a_target_with_what_is_not_supported_is_refused_by_name() {
    let home = scratch();
    let [source, empty] = ["source.raw", "empty.raw"].map(|name| home.path().join(name));
    fs::write(&source, Random::new(5).bytes(64 << 10)).unwrap();
    fs::write(&empty, b"").unwrap();
    let copy = |name: &str| {
        let copy = home.path().join(format!("{name}.qcow2"));
        fs::copy(subject(name), &copy).unwrap();
        copy
    };
    let [outside, secret] = foreign(home.path()).map(|(_, path)| path);
    let [subclusters, one, two, recording] = ["subclusters", "bits-1", "bits-2", "bitmaps"].map(copy);
    let [corrupt, unknown, damaged, taken] =
        [("plain-4k", "corrupt"), ("plain-4k", "unknown"), ("plain-4k", "damaged"), ("snapshots-64k", "taken")].map(
            |(name, to)| {
                let copy = home.path().join(format!("{to}.qcow2"));
                fs::copy(subject(name), &copy).unwrap();
                copy
            },
        );
    patch(&corrupt, 79, &[2]);
    patch(&unknown, 72, &[0x40]);
    let block = Image::open(&damaged).refcount_blocks()[0];
    patch(&damaged, block + 2 * 5, &[0, 0]);
    qemu::snapshot("-c", "dedup-pool", &taken).ok();
    for (target, why) in [
        (&outside, &["external data file"][..]),
        (&secret, &["encrypt"]),
        (&subclusters, &["extended_l2"]),
        (&one, &["refcount_bits", "qemu-img amend", "refcount_bits=16"]),
        (&two, &["refcount_bits", "qemu-img amend", "refcount_bits=16"]),
        (&recording, &["bitmap", "records writes", "qemu-img bitmap --disable"]),
        (&corrupt, &["corrupt"]),
        (&unknown, &["incompatible feature"]),
        (&damaged, &["dedup-img check"]),
        (&taken, &["dedup-pool"]),
    ] {
        let name = target.to_str().unwrap();
        for source in [&source, &empty] {
            refused(words(&[], "raw", source, target), target, &[why, &[name]].concat());
        }
    }
    qemu::img(args!["bitmap", "--disable", &recording, "one"]).ok();
    assert_eq!(into(&[], "raw", &source, &recording)["changed"], true);
    qemu::check_clean(&recording);
}

/// A target is no source of itself, by whatever name, and not in the chain of its source.
#[test]
fn a_target_that_is_a_source_is_refused() {
    let (home, source, target) = images();
    let place = scratch();
    let [soft, hard] = ["soft", "hard"].map(|name| place.path().join(name));
    symlink(&target, &soft).unwrap();
    fs::hard_link(&target, &hard).unwrap();
    let [middle, top] = ["middle.qcow2", "top.qcow2"].map(|name| home.path().join(name));
    qemu::img(args!["create", "-q", "-f", "qcow2", "-b", &target, "-F", "qcow2", &middle]).ok();
    qemu::img(args!["create", "-q", "-f", "qcow2", "-b", &middle, "-F", "qcow2", &top]).ok();
    qemu::snapshot("-c", "one", &target).ok();
    let sums = || [&target, &middle, &top].map(|path| sha256_of(path));
    let before = sums();
    for from in [&target, &soft, &hard, &middle, &top] {
        for options in [&[][..], &["-U"]] {
            let ran = dedup_img(words(options, "qcow2", from, &target));
            let lines: Vec<&str> = ran.stderr.lines().collect();
            assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{}", ran.told());
            assert!(
                lines.len() == 1 || lines.len() == 2 && lines[1].starts_with("Is another process"),
                "{}",
                ran.told()
            );
            assert_eq!(sums(), before);
        }
    }
    let ran = dedup_img(words(&["-l", "one"], "qcow2", &target, &target));
    assert_eq!((ran.code, sums()), (1, before.clone()), "{}", ran.told());
    let ran = dedup_img(args!["convert", "-n", &source, &target, &target]);
    assert_eq!((ran.code, sums()), (1, before), "{}", ran.told());
    // The other way round it may be: the target's own backing file is a source like any.
    into(&[], "qcow2", &target, &top);
    qemu::compare_same("qcow2", &target, "qcow2", &top);
}

#[test]
fn a_larger_source_is_refused_before_anything_is_written() {
    let (_home, source, target) = images();
    let size = source.metadata().unwrap().len();
    for more in [1, 512, 1 << 30] {
        fs::File::options().write(true).open(&source).unwrap().set_len(size + more).unwrap();
        refused(
            words(&[], "raw", &source, &target),
            &target,
            &["output file is smaller than input file", "qemu-img resize"],
        );
    }
    // So are two sources that together are.
    fs::File::options().write(true).open(&source).unwrap().set_len(size / 2 + 512).unwrap();
    refused(args!["convert", "-n", "-f", "raw", &source, &source, &target], &target, &["output file is smaller"]);
    fs::File::options().write(true).open(&source).unwrap().set_len(size / 2).unwrap();
    dedup_img(args!["convert", "-n", "-q", "-f", "raw", &source, &source, &target]).ok();
    let half = fs::read(&source).unwrap();
    assert!(layers(&target)[0].1[..half.len() * 2] == [&half[..], &half].concat());
}

/// The keys of a summary, in alphabetical order.
const KEYS: [&str; 25] = [
    "allocated_after_bytes",
    "allocated_before_bytes",
    "changed",
    "changed_clusters",
    "cluster_size_bytes",
    "file_length_after_bytes",
    "file_length_before_bytes",
    "peak_memory_bytes",
    "pool_members",
    "read_bytes",
    "repaired",
    "reused_clusters",
    "schema_version",
    "seconds",
    "source",
    "source_format",
    "sources",
    "target",
    "target_format",
    "target_size_bytes",
    "unchanged_clusters",
    "unreadable_bytes",
    "upgraded",
    "virtual_size_bytes",
    "written_bytes",
];

#[test]
fn it_prints_what_it_did_where_it_should() {
    let (home, source, target) = images();
    let old = home.path().join("old.qcow2");
    qemu::create("qcow2", &old, 1 << 20, "compat=0.10,cluster_size=4k");
    let fresh = fs::read(&target).unwrap();
    for options in [&["-q"][..], &["-q", "-p"], &["-q", "--output", "json"]] {
        fs::write(&target, &fresh).unwrap();
        let ran = dedup_img(words(options, "raw", &source, &target)).ok();
        assert_eq!(ran.text(), "", "{}", ran.told());
    }
    for changes in [true, false] {
        if changes {
            fs::write(&target, &fresh).unwrap();
        }
        let ran = dedup_img(words(&[], "raw", &source, &target)).ok();
        assert_eq!(ran.stderr, "", "{}", ran.told());
        for word in ["compared", "unchanged", "zeroed", "changed", "reused", "written", "file", "time"] {
            assert!(ran.stdout.contains(word), "no {word}: {}", ran.told());
        }
        assert!(ran.stdout.is_ascii() && ran.stdout.lines().all(|line| line.len() <= 132), "{}", ran.told());
    }
    fs::write(&target, &fresh).unwrap();
    let ran = dedup_img(words(&["-p"], "raw", &source, &target)).ok();
    assert!(ran.stdout.contains("    (100.00/100%)\r"), "{:?}", ran.stdout);

    fs::write(&target, &fresh).unwrap();
    for changed in [true, false] {
        let before = target.metadata().unwrap();
        let told: Value = into(&[], "raw", &source, &target);
        let mut keys: Vec<&str> = told.as_object().unwrap().keys().map(String::as_str).collect();
        keys.retain(|key| !["written_clusters", "zeroed_clusters"].contains(key));
        keys.sort_unstable();
        assert_eq!(keys, KEYS, "{told:#}");
        assert_eq!((&told["changed"], &told["upgraded"]), (&changed.into(), &false.into()), "{told:#}");
        assert_eq!(told["file_length_before_bytes"], before.len());
        assert_eq!(told["file_length_after_bytes"], target.metadata().unwrap().len());
        assert_eq!(told["written_bytes"].as_u64().unwrap(), told["written_clusters"].as_u64().unwrap() * 4096);
    }
    fs::write(&source, [7; 9000]).unwrap();
    assert_eq!(into(&[], "raw", &source, &old)["upgraded"], true);
    assert_eq!(qemu::info("qcow2", &old)["format-specific"]["data"]["compat"], "1.1");
    let names = ["old.qcow2", "source.raw", "target.qcow2"];
    assert_eq!(names_in(home.path()), names, "something was left behind");
}

/// An image of 24 MiB in small clusters, its content, and a disk of that size with much else.
fn large() -> (TempDir, PathBuf, PathBuf, Vec<u8>, Vec<u8>) {
    let home = scratch();
    let [source, target] = ["source.raw", "target.qcow2"].map(|name| home.path().join(name));
    let old = Random::new(7).bytes(24 << 20);
    let mut new = old.clone();
    new[4 << 20..].copy_from_slice(&Random::new(8).bytes(20 << 20));
    new.copy_within(8 << 20..12 << 20, 16 << 20);
    fs::write(&source, &old).unwrap();
    qemu::convert("raw", &source, "qcow2", &target, &["-o", "cluster_size=4k"]);
    qemu::snapshot("-c", "before", &target).ok();
    fs::write(&source, &new).unwrap();
    (home, source, target, old, new)
}

/// Each cluster reads as before or as it should, the snapshot as before, and nothing is left to repair. Returns how many do read as
/// they should.
#[track_caller]
fn old_or_new(target: &Path, old: &[u8], new: &[u8], when: &str) -> usize {
    assert_eq!(Image::open(target).header.incompatible & 3, 0, "{when}: dirty, or corrupt");
    let layers = layers(target);
    assert!(layers[1].1 == old, "{when}: the snapshot has changed");
    let is = layers[0].1.chunks(4096);
    let states = is.zip(old.chunks(4096)).zip(new.chunks(4096)).filter(|((_, old), new)| old != new);
    let states = states.map(|((is, old), new)| (is == old, is == new));
    states.inspect(|is| assert!(is.0 || is.1, "{when}: neither old nor new")).filter(|is| is.1).count()
}

/// Ctrl-C and a polite request to end: the program stops in a clean state and dies of the signal, and the next run does the rest.
#[test]
fn an_interrupt_leaves_a_clean_image() {
    let (home, source, target, old, new) = large();
    let (fresh, mut total) = (fs::read(&target).unwrap(), 0);
    let start = || Running::heeding(words(&["-q", "--memory", "1M"], "raw", &source, &target));
    let mut whole = start();
    whole.until(|it| {
        total = total.max(it.written());
        false
    });
    whole.finish().ok();
    let mut ends = Vec::new();
    for (n, signal) in ["INT", "TERM", "HUP", "INT", "INT", "TERM", "INT", "INT"].into_iter().enumerate() {
        fs::write(&target, &fresh).unwrap();
        let mut running = start();
        running.until(|it| it.has_locked(&target) && it.written() >= total * n as u64 / 8);
        running.signal(signal);
        let ran = running.finish();
        let told = ran.tells_how_it_stopped(&target, &fresh);
        let when = format!("{signal} {n}");
        assert_eq!(names_in(home.path()), ["source.raw", "target.qcow2"], "{when}: {}", ran.told());
        qemu::check_clean(&target);
        dedup_img(args!["check", "--data", &target]).ok();
        let done = old_or_new(&target, &old, &new, &when);
        assert!(ran.code == -1 && told || ran.code == 0 && done == 20 << 8, "{}", ran.told());
        if n % 4 == 1 {
            dedup_img(words(&["-q"], "raw", &source, &target)).ok();
            qemu::compare_same("raw", &source, "qcow2", &target);
            qemu::check_clean(&target);
        }
        ends.push(ran.code);
    }
    assert!(ends.iter().filter(|code| **code == -1).count() >= 4, "too few of the signals came in time: {ends:?}");
}

/// I3: a process that is killed leaves an image in which each cluster reads as before or as it should, and that a repair cleans.
#[test]
fn a_kill_leaves_an_image_that_a_repair_cleans() {
    let (_home, source, target, old, new) = large();
    let fresh = fs::read(&target).unwrap();
    let mut killed = 0;
    for n in 0..6 {
        fs::write(&target, &fresh).unwrap();
        let mut running = Running::dedup_img(words(&["-q", "-t", "unsafe"], "raw", &source, &target));
        running.until(|it| it.has_locked(&target) && it.written() > n * (4 << 20));
        running.signal("KILL");
        killed += usize::from(running.finish().code == -1);
        match n % 2 {
            0 => dedup_img(args!["check", "-q", "-r", "all", &target]).ok(),
            _ => qemu::img(args!["check", "-q", "-r", "all", &target]).ok(),
        };
        qemu::check_clean(&target);
        old_or_new(&target, &old, &new, "killed");
    }
    assert!(killed >= 3, "too few of the kills came in time: {killed}");
}

/// I3 where the file may not grow, by however much: a line with the file and the cause, and a clean image; where the signal that comes
/// with it is not ignored, the end of the process.
#[test]
fn a_limit_on_the_length_of_files_leaves_a_clean_image() {
    let (_home, source, target, old, new) = large();
    let fresh = fs::read(&target).unwrap();
    let length = fresh.len() as u64;
    for (more, before) in [(0, "trap '' XFSZ;"), (4096, "trap '' XFSZ;"), (9 << 20, "trap '' XFSZ;"), (5 << 20, "")] {
        fs::write(&target, &fresh).unwrap();
        let mut command = Command::new("sh");
        let script = format!(
            "{before} ulimit -c 0; exec prlimit --fsize={} \"$0\" convert -n -f raw \"$1\" \"$2\"",
            length + more
        );
        command.args(["-c", &script, env!("CARGO_BIN_EXE_dedup-img")]).args([&source, &target]).stdin(Stdio::null());
        let ran = qemu::finish("sh", command);
        if before.is_empty() {
            dedup_img(args!["check", "-q", "-r", "all", &target]).ok();
        } else {
            ran.refused(&["File too large", target.to_str().unwrap()]);
        }
        qemu::check_clean(&target);
        assert_eq!(old_or_new(&target, &old, &new, "limited"), 0);
    }
}

/// I3 on a full disk.
#[test]
fn a_full_disk_leaves_a_clean_image() {
    let (home, source, target, old, new) = large();
    let [small, kept] = ["small", "kept"].map(|name| home.path().join(name));
    fs::create_dir(&small).unwrap();
    let length = target.metadata().unwrap().len();
    for more in [64 << 10, 4 << 20, 15 << 20] {
        let script = format!(
            "mount -t tmpfs -o size={} none \"$3\"; cp \"$4\" \"$3/t.qcow2\"
            status=0; \"$1\" convert -n -f raw \"$2\" \"$3/t.qcow2\" || status=$?; echo status $status >&2; ls -A \"$3\" >&2
            cp \"$3/t.qcow2\" \"$5\"",
            length + more
        );
        let ran = in_namespace(&script, &[&source, &small, &target, &kept]);
        let lines: Vec<&str> = ran.stderr.lines().collect();
        assert_eq!((lines.len(), &lines[1..]), (3, &["status 1", "t.qcow2"][..]), "{}", ran.told());
        assert!(lines[0].contains("No space left on device") && lines[0].contains("t.qcow2"), "{}", ran.told());
        // Space that a hole gave away comes back last of all, so that a repair may be asked for, and then it is said.
        if lines[0].contains("check -r all") {
            dedup_img(args!["check", "-q", "-r", "all", &kept]).ok();
        }
        qemu::check_clean(&kept);
        old_or_new(&kept, &old, &new, "full");
    }
}

/// I6: whichever of QEMU's programs has the target open, it is left alone; and so is QEMU's access to what is being written.
#[test]
fn a_target_in_use_is_left_alone() {
    let (home, source, target, _, _) = large();
    let before = sha256_of(&target);
    let socket = home.path().join("socket");
    for (tool, options) in [
        ("qemu-io", args!["-f", "qcow2", &target].to_vec()),
        ("qemu-io", args!["-r", "-f", "qcow2", &target].to_vec()),
        ("qemu-nbd", args!["-f", "qcow2", "-k", &socket, &target].to_vec()),
        ("qemu-nbd", args!["-r", "-f", "qcow2", "-k", &socket, &target].to_vec()),
    ] {
        let mut user = match tool {
            "qemu-io" => Running::qemu_io(options),
            _ => Running::start(qemu::tool(tool, options)),
        };
        assert!(user.until(|it| it.has_locked(&target)), "{tool} has ended: {}", user.finish().told());
        for more in [&[][..], &["-U"]] {
            let ran: Ran = dedup_img(words(more, "raw", &source, &target));
            let hint = format!("Is another process using the image [{}]?", target.display());
            assert!(ran.code == 1 && ran.stderr.contains("Failed to get \"write\" lock\n"), "{}", ran.told());
            assert!(ran.stderr.trim_end().ends_with(&hint) && ran.stdout.is_empty(), "{}", ran.told());
        }
        assert_eq!(sha256_of(&target), before, "{tool}");
    }
    let mut running = Running::start(dedup_command(words(&["-q"], "raw", &source, &target)));
    running.stop_when(|it| it.has_locked(&target));
    for options in [
        args!["-f", "qcow2", "-c", "length", &target].to_vec(),
        args!["-r", "-f", "qcow2", "-c", "length", &target].to_vec(),
    ] {
        let ran = qemu::run("qemu-io", options);
        assert!(ran.code == 1 && ran.stderr.contains("lock"), "{}", ran.told());
    }
    let ran = dedup_img(words(&[], "raw", &source, &target));
    assert!(ran.code == 1 && ran.stderr.contains("lock"), "{}", ran.told());
    running.signal("CONT");
    running.finish().ok();
    qemu::compare_same("raw", &source, "qcow2", &target);
}

/// A source that shrinks or changes while it is read: a line and exit code 1, and nothing leads to what was copied of it.
#[test]
fn a_source_that_changes_while_it_is_read_leaves_a_clean_image() {
    let (_home, source, target, old, new) = large();
    for length in [4096, (24 << 20) + 4096] {
        fs::write(&source, &new).unwrap();
        let mut running = Running::dedup_img(words(&["-q"], "raw", &source, &target));
        running.stop_when(|it| it.has_locked(&target) && it.has_locked(&source));
        fs::File::options().write(true).open(&source).unwrap().set_len(length).unwrap();
        running.signal("CONT");
        running.finish().refused(&[source.to_str().unwrap()]);
        qemu::check_clean(&target);
        assert_eq!(old_or_new(&target, &old, &new, "changed"), 0);
    }
}
