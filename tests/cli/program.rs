//! The program itself, before any command.

use super::{dedup_img_in, wrong_usage};
use crate::args;
use crate::support::corpus::patch;
use crate::support::{dedup_img, qemu, scratch};
use std::ffi::OsString;
use std::fs;

#[test]
fn tells_its_version() {
    for flag in ["--version", "-V"] {
        let ran = dedup_img(args![flag]).ok();
        let first = ran.stdout.lines().next().unwrap_or_default();
        assert!(first.starts_with(&format!("dedup-img {}", env!("CARGO_PKG_VERSION"))), "{}", ran.told());
        assert_eq!(ran.stderr, "", "{}", ran.told());
    }
}

#[test]
fn its_help_names_every_command() {
    for flag in ["--help", "-h"] {
        let ran = dedup_img(args![flag]).ok();
        for word in ["Usage:", "create", "convert", "check", "dedup", "gc", "stats"] {
            assert!(ran.stdout.contains(word), "no {word}: {}", ran.told());
        }
        assert_eq!(ran.stderr, "", "{}", ran.told());
    }
}

#[test]
fn no_command_and_an_unknown_one_are_wrong_usage() {
    wrong_usage(dedup_img(args![]), "", &[]);
    wrong_usage(dedup_img(args!["no-such-command"]), "", &["no-such-command"]);
    wrong_usage(dedup_img(args!["--no-such-option"]), "", &["--no-such-option"]);
}

/// One line, in words that are about the option; what clap would say of Rust's types or of `--` is not among them.
#[test]
fn what_is_typed_wrong_is_named() {
    let threads = |value: &str| format!("--threads expects a number from 1 to 1024, not '{value}'");
    for (words, due) in [
        (&["convert", "--foo"][..], "unknown option '--foo'"),
        (&["convert", "--force-shar", "a"], "unknown option '--force-shar' (a similar one exists: '--force-share')"),
        (&["dedup", "-n", "a"], "unknown option '-n'"),
        (&["check", "a", "b"], "unexpected argument 'b'"),
        (&["help", "foo"], "Command not found: foo"),
        (&["stats", "--threads", "x", "a"], &threads("x")),
        (&["stats", "--threads", "0", "a"], &threads("0")),
        (&["dedup", "--threads", "-1", "a"], &threads("-1")),
        (&["stats", "--top", "100001", "a"], "--top expects a number from 0 to 100000, not '100001'"),
        (&["stats", "--max-duplicate", "-1", "a"], "--max-duplicate expects a percentage from 0 to 100, not '-1'"),
        (&["stats", "--min-saved=x", "a"], "--min-saved expects a percentage from 0 to 100, not 'x'"),
        (&["gc", "--memory", "lots", "a"], "--memory expects a size below 8E, such as 64k or 1G, not 'lots'"),
        (&["gc", "--memory", "-1", "a"], "--memory expects a size below 8E, such as 64k or 1G, not '-1'"),
        (
            &["convert", "-c", "--compression-level", "x", "a", "b"],
            "--compression-level expects a number from 1 to 19, not 'x'",
        ),
        (&["gc", "--output", "xml", "a"], "--output expects human or json, not 'xml'"),
        (&["dedup", "--pin", "\n\u{1b}", "a"], "--pin expects shared or all, not '\\n\\u{1b}'"),
        (&["completions", "ksh"], "SHELL expects bash or zsh or fish, not 'ksh'"),
        (&["stats", "--backing-dir", "", "a"], "--backing-dir expects a value"),
        (&["convert", "a", ""], "A file name is empty"),
        (&["gc", ""], "A file name is empty"),
    ] {
        let ran = dedup_img(words.iter().map(OsString::from));
        assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{}", ran.told());
        let lines: Vec<&str> = ran.stderr.lines().collect();
        assert_eq!(lines[0], format!("dedup-img: {due}"));
        assert!(lines.len() == 2 && lines[1].starts_with("Try 'dedup-img "), "{}", ran.told());
    }
    for flag in ["-h", "--help"] {
        assert_eq!(dedup_img(args!["help", flag]).ok().stdout, dedup_img(args!["help"]).ok().stdout);
    }
}

/// A name from the command line or out of an image stays on its line, and a terminal obeys nothing in it.
#[test]
fn names_cannot_play_with_the_terminal() {
    const NAME: &str = "esc\u{1b}[31m\n\r\tb\u{e4}ll\u{7}del\u{7f}c1\u{9b}31m";
    const SHOWN: &str = "esc\\u{1b}[31m\\n\\r\\tb\u{e4}ll\\u{7}del\\u{7f}c1\\u{9b}31m";
    let home = scratch();
    let run = |words: &[&str]| dedup_img_in(home.path(), words.iter().map(OsString::from));
    let is_tame = |text: &str| !text.contains(|c: char| c.is_control() && c != '\n');
    let refused = |words: &[&str]| {
        let mut ran = run(words);
        ran.stderr = ran.stderr.replace("\nCould not open backing image.", "");
        assert!(is_tame(ran.refused(&[SHOWN]).stderr.trim_end()), "{words:?}");
    };
    for words in [
        &["convert", NAME, "o"][..],
        &["convert", "-O", "raw", NAME, "o"],
        &["convert", "-O", NAME, "a", "o"],
        &["convert", "-B", NAME, "-F", "raw", "a", "o"],
        &["dedup", NAME],
        &["gc", NAME],
        &["check", NAME],
        &["check", "-f", NAME, "a"],
        &["stats", NAME],
        &["stats", "--quick", NAME],
        &["create", "-o", "no_such_option=1", NAME, "1M"],
        &["create", "-o", &format!("compression_type={NAME}"), "a", "1M"],
        &["create", "-b", NAME, "-F", "raw", "a"],
    ] {
        fs::write(home.path().join("a"), [7; 4096]).unwrap();
        refused(words);
        fs::remove_file(home.path().join("a")).unwrap();
    }

    // The name of a backing file that is not there, with its format and without.
    let overlay = home.path().join("overlay");
    for format in ["raw", NAME] {
        let all = args!["create", "-q", "-f", "qcow2", "-u", "-b", NAME, "-F", "raw", overlay, "1M"];
        qemu::img(all).ok();
        if format == NAME {
            let bytes = fs::read(&overlay).unwrap();
            let extension = bytes.windows(4).position(|word| word == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
            patch(&overlay, extension as u64, &[0; 8]);
        }
        for words in [
            &["convert", "-f", "qcow2", "overlay", "o"][..],
            &["convert", "--no-backing", "-f", "qcow2", "overlay", "o"],
            &["convert", "--backing-dir", ".", "overlay", "o"],
            &["stats", "overlay"],
            &["create", "-b", "overlay", "-F", "qcow2", "o"],
        ] {
            refused(words);
        }
    }

    // The name of a snapshot whose L2 table is not where one can be.
    let image = home.path().join("image");
    qemu::create("qcow2", &image, 1 << 20, "");
    qemu::io("qcow2", &image, &["write 0 64k".to_owned()]);
    qemu::snapshot("-c", NAME, &image).ok();
    let bytes = fs::read(&image).unwrap();
    let word = |at: u64| u64::from_be_bytes(*bytes[at as usize..].first_chunk().unwrap());
    patch(&image, word(word(64)) + 6, &[2]);
    let checked = run(&["check", "image"]);
    assert!(checked.code == 2 && checked.stderr.contains(SHOWN) && is_tame(&checked.stderr), "{}", checked.told());

    // What is said of work that is done.
    for words in [
        &["create", NAME, "1M"][..],
        &["convert", "-f", "qcow2", NAME, "copy"],
        &["convert", "-f", "qcow2", "copy", NAME],
        &["convert", "-n", "-f", "qcow2", "copy", NAME],
        &["dedup", NAME],
        &["dedup", "--dry-run", NAME],
        &["gc", NAME],
        &["stats", NAME],
        &["convert", "-O", "raw", "copy", NAME],
    ] {
        let ran = run(words).ok();
        assert!(is_tame(&ran.stdout) && ran.stderr.is_empty(), "{}", ran.told());
        assert!(ran.stdout.contains(SHOWN) || words.last() == Some(&"copy"), "{}", ran.told());
    }
}

/// A reader that goes away early (`dedup-img --help | head -1`) is no failure and no panic.
#[test]
fn a_closed_pipe_is_no_failure() {
    use crate::support::dedup_command;
    use std::process::Stdio;
    for words in [
        &args!["--help"][..],
        &args!["convert", "--help"],
        &args!["convert", "-o", "help", "a", "b"],
        &args!["stats", "--help"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = dedup_command(words.to_vec());
        command.stdout(writer).stderr(Stdio::piped());
        let line = format!("{command:?}");
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        let ran = crate::support::Ran::new(line, &output).ok();
        assert_eq!(ran.stderr, "", "{}", ran.told());
    }
}
