//! I7: whatever goes wrong, the old target is as it was, nothing is left behind, and one clear line says why. Exit code 1.

use super::running::{Running, in_time, is_root};
use crate::args;
use crate::support::corpus::{content, write_sparse};
use crate::support::reader::Image;
use crate::support::{Ran, Random, names_in, qemu, scratch};
use serde_json::Value;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;
use tempfile::TempDir;

/// A directory with `source.raw` of random bytes and an older target with the content `precious`.
pub(super) fn images(length: usize) -> (TempDir, PathBuf, PathBuf) {
    let home = scratch();
    let [source, target] = ["source.raw", "target.qcow2"].map(|name| home.path().join(name));
    fs::write(&source, Random::new(7).bytes(length)).unwrap();
    fs::write(&target, b"precious").unwrap();
    (home, source, target)
}

/// Asserts that the older target is as [`images`] made it, and that nothing else has appeared.
#[track_caller]
pub(super) fn untouched(home: &TempDir) {
    let found = fs::read(home.path().join("target.qcow2")).unwrap();
    assert!(found == b"precious", "the old target has changed: {} bytes", found.len());
    assert_eq!(names_in(home.path()), ["source.raw", "target.qcow2"]);
}

/// Runs a script of `sh` in a mount namespace of its own, where it may mount what it likes and nothing stays mounted.
#[track_caller]
pub(super) fn in_namespace(script: &str, values: &[&Path]) -> Ran {
    let mut command = Command::new("unshare");
    command.arg(if is_root() { "-m" } else { "-rm" });
    command.args(["sh", "-eu", "-c", script, "sh", env!("CARGO_BIN_EXE_dedup-img")]).args(values).stdin(Stdio::null());
    let ran = qemu::finish("unshare", command);
    let refused = ran.stderr.contains("unshare:") || ran.stderr.contains("mount:");
    assert!(!refused, "this test must mount a file system: run it as root, or allow user namespaces: {}", ran.told());
    ran
}

/// I7 on a full disk: a file system too small for the target, at several sizes, with an older target and without.
#[test]
fn a_full_disk_leaves_the_old_target_and_nothing_else() {
    let (home, source, _) = images(8 << 20);
    let small = home.path().join("small");
    fs::create_dir(&small).unwrap();
    for (size, words) in [
        ("64k", ""),
        ("1m", ""),
        ("4m", ""),
        ("4m", "-O raw"),
        ("7m", "--pin all"),
        ("8m", "-t unsafe"),
        ("8200k", "-o cluster_size=4k"),
    ] {
        let script = format!(
            "mount -t tmpfs -o size={size} none \"$3\"
            status=0; \"$1\" convert -f raw {words} \"$2\" \"$3/new\" || status=$?; ls -A \"$3\" >&2; echo status $status >&2
            printf precious > \"$3/old\"
            status=0; \"$1\" convert -f raw {words} \"$2\" \"$3/old\" || status=$?; ls -A \"$3\" >&2; echo status $status >&2
            cat \"$3/old\" >&2"
        );
        let ran = in_namespace(&script, &[&source, &small]);
        let lines: Vec<&str> = ran.stderr.lines().collect();
        assert_eq!((lines.len(), ran.stdout.as_str()), (6, ""), "{size} {words}: {}", ran.told());
        for line in [lines[0], lines[2]] {
            assert!(
                line.starts_with("dedup-img: ") && line.contains("No space left on device"),
                "{size} {words}: {}",
                ran.told()
            );
        }
        assert_eq!(
            (lines[1], lines[3..].to_vec()),
            ("status 1", vec!["old", "status 1", "precious"]),
            "{size} {words}: {}",
            ran.told()
        );
    }
}

/// I7 where the file may not grow: reported whether the signal that comes with it is ignored or not, as by qemu-img.
#[test]
fn a_limit_on_the_length_of_files_leaves_the_old_target() {
    let (home, source, target) = images(8 << 20);
    for before in ["trap '' XFSZ;", ""] {
        let mut command = Command::new("sh");
        let script = format!("{before} ulimit -c 0; ulimit -f 4096; exec \"$0\" convert -f raw \"$1\" \"$2\"");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_dedup-img")]).args([&source, &target]).stdin(Stdio::null());
        let ran = qemu::finish("sh", command);
        ran.refused(&["File too large"]);
        untouched(&home);
    }
}

/// The program under test with no signal ignored, whatever the caller of the tests ignores (`nohup`).
pub(super) fn heeding(words: impl IntoIterator<Item = OsString>) -> Command {
    let mut command = qemu::tool("env", args!["--default-signal", env!("CARGO_BIN_EXE_dedup-img")]);
    command.args(words).stdin(Stdio::null());
    command
}

/// When a process is to be ended.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// As soon as it runs.
    Started,
    /// When it holds the locks of source and target.
    Locked,
    /// When it has written so many bytes.
    Written(u64),
}

/// Converts, ends the process at the moment given, and reports how it ended. The old target must be there and whole, unless the
/// conversion was faster; then the new one is, and whole.
#[track_caller]
fn ended(signal: &str, moment: Moment) -> Option<Ran> {
    let (home, source, target) = images(48 << 20);
    // Small clusters and little memory make it use temporary files as well; syncing the disk would only make the test slow.
    let tight = args!["-o", "cluster_size=512", "--memory", "1M", "-t", "unsafe"];
    let words = args!["convert", "-q", "-f", "raw"].into_iter().chain(tight).chain(args![source, target]);
    let mut convert = Running::start(heeding(words));
    convert.until(|it| match moment {
        Moment::Started => true,
        Moment::Locked => it.has_locked(&source) && it.has_locked(&target),
        Moment::Written(bytes) => it.written() >= bytes,
    });
    convert.signal(signal);
    let ran = convert.finish();
    // To replace a file takes a second name, for an instant in which the new file is whole already.
    for name in names_in(home.path()).iter().filter(|name| signal == "KILL" && name.starts_with(".dedup-img-")) {
        let second = home.path().join(name);
        qemu::compare_same("raw", &source, "qcow2", &second);
        fs::remove_file(second).unwrap();
    }
    // The signal may also come after the target got its name and before the process has ended.
    if ran.code == 0 || fs::read(&target).unwrap() != b"precious" {
        assert_eq!(names_in(home.path()), ["source.raw", "target.qcow2"], "{signal} at {moment:?}");
        qemu::compare_same("raw", &source, "qcow2", &target);
        return None;
    }
    untouched(&home);
    Some(ran)
}

const MOMENTS: [Moment; 6] = [
    Moment::Started,
    Moment::Locked,
    Moment::Written(1),
    Moment::Written(1 << 20),
    Moment::Written(20 << 20),
    Moment::Written(47 << 20),
];

/// I7: a process that is killed cannot tidy up, so there must be nothing to tidy up.
#[test]
fn a_kill_at_any_time_leaves_the_old_target_and_nothing_else() {
    let ends: Vec<Ran> = MOMENTS.into_iter().filter_map(|moment| ended("KILL", moment)).collect();
    assert!(ends.len() >= 4, "too few of the kills came in time: {ends:?}");
    assert!(ends.iter().all(|ran| ran.code == -1), "{ends:?}");
}

/// I7: Ctrl-C and a polite request to end. The program dies of the signal, as a shell's loop expects, and never half way.
#[test]
fn an_interrupt_at_any_time_leaves_the_old_target_and_nothing_else() {
    for signal in ["INT", "TERM", "HUP"] {
        let ends: Vec<Ran> = MOMENTS.into_iter().filter_map(|moment| ended(signal, moment)).collect();
        assert!(ends.len() >= 4, "too few of the signals came in time: {ends:?}");
        let line = |ran: &Ran| {
            let (begin, end) = (format!("dedup-img: convert was stopped by SIG{signal}; '"), "' is as it was\n");
            ran.stderr.starts_with(&begin) && ran.stderr.ends_with(end) && ran.stderr.lines().count() == 1
        };
        // One that comes before anybody listens to it ends the program without a word.
        let fits = |ran: &Ran| ran.code == -1 && ran.stdout.is_empty() && (ran.stderr.is_empty() || line(ran));
        assert!(ends.iter().all(fits) && ends.iter().filter(|ran| line(ran)).count() >= 4, "{signal}: {ends:?}");
    }
}

/// A signal that comes too late to stop anything ends the program all the same, with its work done and its result printed: a loop of
/// a shell ends with it.
#[test]
fn a_late_interrupt_ends_the_program_after_its_result() {
    let (home, source, target) = images(1 << 20);
    // The result waits for a reader in a socket that is full.
    let (mut reader, mut writer) = UnixStream::pair().unwrap();
    writer.set_nonblocking(true).unwrap();
    while writer.write(&[b' '; 4096]).is_ok() {}
    writer.set_nonblocking(false).unwrap();
    let mut command = heeding(args!["convert", "-f", "raw", "--output", "json", source, target]);
    let mut child = command.stdout(OwnedFd::from(writer)).stderr(Stdio::null()).spawn().unwrap();
    drop(command);
    while fs::read(&target).unwrap() == b"precious" {
        assert!(child.try_wait().unwrap().is_none(), "it has ended without a result");
        sleep(Duration::from_millis(1));
    }
    qemu::run("kill", args!["-INT", child.id().to_string()]).ok();
    let mut result = String::new();
    reader.read_to_string(&mut result).unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(2));
    let result: Value = serde_json::from_str(&result).unwrap();
    assert_eq!(result["virtual_size_bytes"], 1 << 20, "{result:#}");
    qemu::compare_same("raw", &source, "qcow2", &target);
    assert_eq!(names_in(home.path()), ["source.raw", "target.qcow2"]);
}

/// A QCOW2 image of a few MiB cut off at `at`, and an older target beside it.
fn cut(at: impl FnOnce(&Image) -> u64) -> (TempDir, PathBuf, PathBuf) {
    let (home, source, target) = images(0);
    let raw = home.path().join("whole.raw");
    write_sparse(&raw, &content());
    qemu::convert("raw", &raw, "qcow2", &source, &["-o", "cluster_size=4k"]);
    let at = at(&Image::open(&source));
    assert!(at < source.metadata().unwrap().len());
    File::options().write(true).open(&source).unwrap().set_len(at).unwrap();
    fs::remove_file(raw).unwrap();
    (home, source, target)
}

/// Converts a cut image, which must fail with a line that names the image.
#[track_caller]
fn cut_is_refused(at: impl FnOnce(&Image) -> u64) {
    let (home, source, target) = cut(at);
    for words in [&[][..], &["-f", "qcow2"], &["-O", "raw"]] {
        let ran =
            in_time(args!["convert"].into_iter().chain(words.iter().map(OsString::from)).chain(args![source, target]));
        ran.refused(&[source.to_str().unwrap()]);
        untouched(&home);
    }
}

#[test]
fn a_source_cut_in_its_data_is_refused() {
    cut_is_refused(|image| image.length / 2);
    cut_is_refused(|image| image.length * 9 / 10);
    // QEMU lets a file end within its last cluster, so only a whole one is missed for certain.
    cut_is_refused(|image| image.length - 2 * image.cluster_size());
}

#[test]
fn a_source_cut_in_its_metadata_is_refused() {
    cut_is_refused(|image| image.header.l1_table_offset + 8);
    cut_is_refused(|image| image.header.l1_table_offset);
    cut_is_refused(|image| image.active()[0].host + 100);
    cut_is_refused(|image| image.active().last().unwrap().host);
    cut_is_refused(|_| 90);
}

/// A source that shrinks while it is read: a line and exit code 1, not a bus error.
#[test]
fn a_source_that_is_cut_while_it_is_read_is_refused() {
    let (home, source, target) = images(48 << 20);
    let mut convert = Running::dedup_img(args!["convert", "-q", "-f", "raw", "-t", "unsafe", source, target]);
    convert.stop_when(|it| it.has_locked(&source) && it.has_locked(&target));
    File::options().write(true).open(&source).unwrap().set_len(4096).unwrap();
    convert.signal("CONT");
    convert.finish().refused(&[source.to_str().unwrap()]);
    untouched(&home);
}
