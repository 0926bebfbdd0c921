//! Signals: those that the caller ignores, those that ask to stop and what is said then, SIGUSR1, and the first process of a
//! container, which cannot die of one.

use super::failure::{heeding, images, untouched};
use super::running::{Running, is_root};
use crate::args;
use crate::support::loops::Loop;
use crate::support::{Ran, Random, names_in, qemu, scratch};
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// The program under test with some signals ignored by its caller.
fn ignoring(signals: &str, words: &[OsString]) -> Command {
    let mut command = qemu::tool("sh", args!["-c", format!("trap '' {signals}; exec \"$0\" \"$@\"")]);
    command.arg(env!("CARGO_BIN_EXE_dedup-img")).args(words);
    command
}

/// Starts a command, sends a signal when it has locked `file`, and returns how it ended.
#[track_caller]
fn signalled(command: Command, file: &Path, signals: &[&str]) -> Ran {
    let mut running = Running::start(command);
    running.stop_when(|it| it.has_locked(file));
    signals.iter().for_each(|signal| running.signal(signal));
    running.signal("CONT");
    running.finish()
}

/// As with `nohup`, and with the background jobs of a shell that has no job control.
#[test]
fn a_signal_that_is_ignored_at_the_start_stays_ignored() {
    for signals in [&["HUP"][..], &["INT"], &["TERM"], &["HUP", "INT", "TERM", "HUP"]] {
        let (_home, source, target) = images(8 << 20);
        let words = args!["convert", "-q", "-f", "raw", source, target];
        signalled(ignoring(&signals.join(" "), &words), &source, signals).ok();
        qemu::compare_same("raw", &source, "qcow2", &target);
    }
    // The others are heeded.
    let (home, source, target) = images(8 << 20);
    let words = args!["convert", "-q", "-f", "raw", source, target];
    let ran = signalled(ignoring("HUP", &words), &source, &["HUP", "TERM"]);
    assert!(ran.code == -1 && ran.stderr.contains("stopped by SIGTERM"), "{}", ran.told());
    untouched(&home);
}

/// The kernel keeps signals from the first process of a container that it has no handler for, also when it would die of one.
#[test]
fn as_the_first_process_it_ends_with_the_code_that_a_shell_would_show() {
    // Sent from within, when there is a handler for it; the second while the first is waited for.
    let script = "(until test \"$(cat /proc/1/comm)\" = dedup-img && grep -q '^SigCgt:.*4...$' /proc/1/status
                   do sleep 0.01; done; kill -STOP 1; kill -$1 1; test \"$2\" = once || kill -$2 1) >/dev/null 2>&1 &
                  shift 2; exec \"$0\" \"$@\"";
    for (first, second, code) in
        [("TERM", "once", 143), ("INT", "once", 130), ("HUP", "once", 129), ("TERM", "INT", 130)]
    {
        let (home, source, target) = images(8 << 20);
        let mut command = Command::new("env");
        command.args(["--default-signal", "unshare", if is_root() { "-pf" } else { "-rpf" }, "--mount-proc"]);
        command.args(["sh", "-c", script, env!("CARGO_BIN_EXE_dedup-img"), first, second]);
        command.args(args!["convert", "-q", "-f", "raw", "-r", "512k", source, target]).stdin(Stdio::null());
        let ran = qemu::finish("unshare", command);
        assert!(!ran.stderr.contains("unshare:"), "this test needs root, or user namespaces: {}", ran.told());
        let codes = if second == "once" { vec![code] } else { vec![code, 143] };
        assert!(codes.contains(&ran.code) && ran.stdout.is_empty(), "{first} {second}: {}", ran.told());
        if second == "once" {
            let line = format!("dedup-img: convert was stopped by SIG{first}; '{}' is as it was\n", target.display());
            assert_eq!(ran.stderr, line, "{}", ran.told());
        }
        untouched(&home);
    }
}

#[test]
fn what_was_stopped_and_what_it_has_left_is_said_in_a_line() {
    let (home, source, target) = images(8 << 20);
    let [new, image] = ["new.qcow2", "image.qcow2"].map(|name| home.path().join(name));
    qemu::convert("raw", &source, "qcow2", &image, &["-o", "cluster_size=4k"]);
    let before = fs::read(&image).unwrap();
    // What is over within a moment may have been over before the signal came.
    let said = |words: &[OsString], file: &Path, line: &str| {
        let due = format!("dedup-img: {line}\n");
        let ends = (0..20).map(|_| {
            fs::write(&image, &before).unwrap();
            let mut running = Running::start(heeding(words.iter().cloned()));
            if !running.stops_when(|it| it.has_locked(file)) {
                running.finish().ok();
                return false;
            }
            running.signal("INT");
            running.signal("CONT");
            let ran = running.finish();
            assert!(ran.code == -1 && (ran.stderr.is_empty() || ran.stderr == due), "{due}: {}", ran.told());
            ran.stdout.is_empty() && !ran.stderr.is_empty()
        });
        assert!({ ends }.any(|in_time| in_time), "{line}: no signal came in time");
    };
    let convert = |target: &Path| args!["convert", "-q", "-f", "raw", "-r", "1M", source, target];
    said(&convert(&target), &source, &format!("convert was stopped by SIGINT; '{}' is as it was", target.display()));
    said(&convert(&new), &source, &format!("convert was stopped by SIGINT; '{}' was not made", new.display()));
    let line = format!("dedup was stopped by SIGINT; '{}' is as it was", image.display());
    said(&args!["dedup", image], &image, &line);
    // What only reads has left nothing.
    for words in [&args!["stats", image][..], &args!["dedup", "--dry-run", image]] {
        said(words, &image, &format!("{} was stopped by SIGINT", words[0].display()));
    }
    said(&args!["check", image], &image, "check was stopped by SIGINT");
    said(&args!["gc", image], &image, &format!("gc was stopped by SIGINT; '{}' is as it was", image.display()));
    assert!(fs::read(&image).unwrap() == before);
    assert_eq!(names_in(home.path()), ["image.qcow2", "source.raw", "target.qcow2"]);
}

/// In the middle of writing into an image: it is clean, and the line says so.
#[test]
fn a_conversion_into_an_image_that_is_stopped_leaves_it_clean_and_says_so() {
    let (home, source, _) = images(24 << 20);
    let image = home.path().join("image.qcow2");
    qemu::create("qcow2", &image, 24 << 20, "cluster_size=4k");
    let mut running = Running::start(heeding(args!["convert", "-q", "-n", "-f", "raw", "-r", "4M", source, image]));
    running.stop_when(|it| it.written() > 6 << 20);
    running.signal("TERM");
    running.signal("CONT");
    let ran = running.finish();
    let line = "is clean, and each of its clusters as it was or as it should be";
    assert_eq!((ran.code, ran.stdout.as_str()), (-1, ""), "{}", ran.told());
    assert_eq!(ran.stderr, format!("dedup-img: convert was stopped by SIGTERM; '{}' {line}\n", image.display()));
    qemu::check_clean(&image);
}

#[test]
fn a_device_that_lost_its_content_is_said_to_hold_no_image() {
    let home = scratch();
    let [source, file] = ["source.raw", "file"].map(|name| home.path().join(name));
    fs::write(&source, Random::new(8).bytes(8 << 20)).unwrap();
    let device = Loop::used(&file, 16 << 20);
    for format in ["raw", "qcow2"] {
        let words = args!["convert", "-q", "-f", "raw", "-O", format, "-r", "2M", source, &*device];
        let mut running = Running::start(heeding(words));
        running.stop_when(|it| it.written() > 1 << 20);
        running.signal("INT");
        running.signal("CONT");
        let ran = running.finish();
        let begin = format!("dedup-img: convert was stopped by SIGINT; '{}' holds no image: ", device.display());
        assert!(ran.code == -1 && ran.stderr.starts_with(&begin), "{format}: {}", ran.told());
        assert_eq!(fs::read(&*device).unwrap()[..512], [0; 512]);
    }
}

/// As with qemu-img: without -p a line on standard error for each SIGUSR1, with -p nothing more; and never the end.
#[test]
fn sigusr1_asks_for_the_progress() {
    let (_home, source, target) = images(24 << 20);
    let words = |more: &str| args!["convert", more, "-f", "raw", "-r", "16M", source, target];
    let ask = |command: Command| {
        let mut running = Running::start(command);
        for written in [4 << 20, 8 << 20] {
            running.until(|it| it.written() > written);
            running.signal("USR1");
        }
        running.finish().ok()
    };
    let ran = ask(heeding(words("-q")));
    let lines: Vec<&str> = ran.stderr.lines().collect();
    assert!(!lines.is_empty() && lines.len() <= 2, "{}", ran.told());
    let is_progress = |line: &&str| line.starts_with("    (") && line.ends_with("/100%)");
    assert!(lines.iter().all(is_progress) && ran.stdout.is_empty(), "{}", ran.told());
    assert_eq!(ask(heeding(words("-p"))).stderr, "");
    assert_eq!(ask(ignoring("USR1", &words("-q"))).stderr, "");
}

/// Into a pipe or a file go at most some hundred lines, as from qemu-img, and the last one, only, says that all is done.
#[test]
fn progress_into_a_pipe_is_short_and_goes_forward() {
    let (_home, source, target) = images(48 << 20);
    for more in [&["-o", "cluster_size=4k"][..], &[], &["-c"], &["-O", "raw"]] {
        let words = args!["convert", "-p", "-f", "raw", "-t", "unsafe"].into_iter();
        let words = words.chain(more.iter().map(OsString::from));
        let ran = crate::support::dedup_img(words.chain(args![source, target])).ok();
        let progress = ran.stdout.split('\n').next().unwrap();
        let percent = |line: &str| line.strip_prefix("    (")?.strip_suffix("/100%)")?.parse::<f64>().ok();
        let lines: Option<Vec<f64>> = progress.split_terminator('\r').map(percent).collect();
        let lines = lines.unwrap_or_else(|| panic!("{progress:?}"));
        assert!(lines.len() > 2 && lines.len() <= 101, "{more:?}: {progress:?}");
        assert!(lines.is_sorted_by(|a, b| a < b), "{more:?}: {progress:?}");
        assert!(lines.first() == Some(&0.0) && lines.last() == Some(&100.0), "{more:?}: {progress:?}");
    }
}
