//! The program itself, before any command.

use super::wrong_usage;
use crate::args;
use crate::support::dedup_img;

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
