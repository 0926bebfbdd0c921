//! The commands as a user and a shell script meet them. Each command inherits the tests of its contract from the macros here.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test that meets the unexpected has failed"
)]

mod check;
mod completions;
mod convert;
mod convert_options;
mod create;
mod dedup;
mod devices;
mod failure;
mod gc;
mod guide;
mod into;
mod locks;
mod manual;
mod matrix;
mod memory;
mod needs;
mod program;
mod readme;
mod refusals;
mod room;
mod running;
mod signals;
mod stats;
mod stats_output;
mod targets;
mod targets_kept;
mod words;

use crate::args;
use crate::support::{Ran, dedup_command, dedup_img, scratch, sha256_of};
use running::unprivileged;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What every command promises.
macro_rules! command_contract {
    ($command:literal) => {
        $crate::cli::command_contract!($command, any number of images);

        #[test]
        fn rejects_an_operand_too_many() {
            crate::cli::rejects_an_operand_too_many($command);
        }
    };
    ($command:literal, any number of images) => {
        #[test]
        fn accepts_help() {
            crate::cli::accepts_help($command);
        }

        #[test]
        fn rejects_a_bad_option() {
            crate::cli::rejects_a_bad_option($command);
        }

        #[test]
        fn rejects_missing_operands() {
            crate::cli::rejects_missing_operands($command);
        }
    };
}

/// What every command promises that reads an image; the function makes its arguments from the image and a directory to write to.
macro_rules! input_contract {
    ($arguments:expr) => {
        #[test]
        fn the_input_must_exist() {
            crate::cli::the_input_must_exist($arguments);
        }

        #[test]
        fn the_input_cannot_be_a_directory() {
            crate::cli::the_input_cannot_be_a_directory($arguments);
        }

        #[test]
        fn the_input_must_be_readable() {
            crate::cli::the_input_must_be_readable($arguments);
        }

        #[test]
        fn a_file_that_is_no_image_of_the_format_given_is_refused() {
            crate::cli::a_file_that_is_no_image_of_the_format_given_is_refused($arguments);
        }

        #[test]
        fn a_header_and_nothing_behind_it_is_refused() {
            crate::cli::a_header_and_nothing_behind_it_is_refused($arguments);
        }

        #[test]
        fn a_read_only_input_is_read_and_left_untouched() {
            crate::cli::a_read_only_input_is_read_and_left_untouched($arguments);
        }
    };
}

pub(crate) use {command_contract, input_contract};

/// The arguments of a command that reads an image.
type Arguments = fn(&[&str], &Path, &Path) -> Vec<OsString>;

/// Asserts wrong usage: exit code 1 (never 2), nothing on stdout, what is wrong in one line and, at most, where to find help.
#[track_caller]
fn wrong_usage(ran: Ran, command: &str, words: &[&str]) -> Ran {
    assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{}", ran.told());
    let lines: Vec<&str> = ran.stderr.lines().collect();
    let hint = format!("Try 'dedup-img {command}{}--help' for more info", if command.is_empty() { "" } else { " " });
    assert!(lines.len() == 1 || lines.len() == 2 && lines[1] == hint, "{}", ran.told());
    assert!(lines[0].starts_with("dedup-img: "), "{}", ran.told());
    for word in words {
        assert!(lines[0].contains(word), "stderr lacks {word:?}: {}", ran.told());
    }
    ran
}

fn accepts_help(command: &str) {
    let [short, long] = ["-h", "--help"].map(|flag| dedup_img(args![command, flag]).ok());
    for ran in [&short, &long] {
        assert_eq!(ran.stderr, "", "{}", ran.told());
        assert!(
            ran.stdout.contains("Usage:") && ran.stdout.contains(&format!("dedup-img {command}")),
            "{}",
            ran.told()
        );
        assert!(ran.stdout.lines().all(|line| line.len() <= 132 && line.is_ascii()), "{}", ran.told());
    }
}

fn rejects_a_bad_option(command: &str) {
    for option in ["--no-such-option", "-Z"] {
        let ran = wrong_usage(dedup_img(args![command, option]), command, &[option]);
        assert_eq!(ran.stderr.lines().count(), 2, "a hint is due: {}", ran.told());
    }
}

fn rejects_missing_operands(command: &str) {
    wrong_usage(dedup_img(args![command]), command, &[]);
    wrong_usage(dedup_img(args![command, "only-one"]), command, &[]);
}

fn rejects_an_operand_too_many(command: &str) {
    let home = scratch();
    let [source, target] = ["a", "b"].map(|name| home.path().join(name));
    std::fs::write(&source, b"x").unwrap();
    let operands = match command {
        "create" => args![target, "1M", "surplus"].to_vec(),
        "check" | "dedup" | "gc" => args![source, "surplus"].to_vec(),
        _ => args![source, target, "surplus"].to_vec(),
    };
    // What convert has too many of are sources: the one that should have been the target is not there.
    let told = if command == "convert" { "Could not open" } else { "surplus" };
    wrong_usage(dedup_img(args![command].into_iter().chain(operands)), command, &[told]);
    assert!(!target.exists());
}

fn the_input_must_exist(arguments: Arguments) {
    let home = scratch();
    let input = home.path().join("absent.qcow2");
    let name = format!("Could not open '{}': ", input.display());
    dedup_img(arguments(&[], &input, home.path())).refused(&[&name, "No such file or directory"]);
    dedup_img(arguments(&["-f", "qcow2"], &input, home.path())).refused(&[&name, "No such file or directory"]);
}

fn the_input_cannot_be_a_directory(arguments: Arguments) {
    let (home, input) = (scratch(), scratch());
    let name = format!("Could not open '{}': ", input.path().display());
    for format in [&[][..], &["-f", "raw"], &["-f", "qcow2"]] {
        dedup_img(arguments(format, input.path(), home.path())).refused(&[&name]);
    }
}

fn the_input_must_be_readable(arguments: Arguments) {
    let home = scratch();
    let input = file_in(home.path(), b"secret", 0o000);
    let line = format!("Could not open '{}': ", input.display());
    let command = unprivileged(arguments(&[], &input, home.path()));
    crate::support::qemu::finish("setpriv", command).refused(&[&line, "Permission denied"]);
}

/// Writes `home/input` with the permissions given.
fn file_in(home: &Path, bytes: &[u8], mode: u32) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = home.join("input");
    std::fs::write(&path, bytes).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    path
}

fn a_file_that_is_no_image_of_the_format_given_is_refused(arguments: Arguments) {
    let prose = "no image at all\n".repeat(10_000);
    for bytes in [&b""[..], b"Q", b"QFI", b"some text\n", prose.as_bytes(), &[0; 65536]] {
        let home = scratch();
        let input = file_in(home.path(), bytes, 0o644);
        let before = sha256_of(&input);
        let line = format!("Could not open '{}': Image is not in qcow2 format", input.display());
        dedup_img(arguments(&["-f", "qcow2"], &input, home.path())).refused(&[&line]);
        assert_eq!(sha256_of(&input), before);
    }
}

fn a_header_and_nothing_behind_it_is_refused(arguments: Arguments) {
    let whole = scratch();
    let image = whole.path().join("image.qcow2");
    crate::support::qemu::create("qcow2", &image, 1 << 20, "");
    let bytes = std::fs::read(image).unwrap();
    for length in [4, 8, 71, 72, 103, 104, 112, 4096] {
        let home = scratch();
        let input = file_in(home.path(), &bytes[..length], 0o644);
        let line = format!("Could not open '{}': ", input.display());
        dedup_img(arguments(&["-f", "qcow2"], &input, home.path())).refused(&[&line]);
        if length >= 8 {
            // Magic and version are there, so that it is taken for QCOW2 without being told.
            dedup_img(arguments(&[], &input, home.path())).refused(&[&line]);
        }
    }
}

fn a_read_only_input_is_read_and_left_untouched(arguments: Arguments) {
    let home = scratch();
    let input = file_in(home.path(), &crate::support::corpus::content()[..1 << 20], 0o444);
    let (before, modified) = (sha256_of(&input), input.metadata().unwrap().modified().unwrap());
    let ran = crate::support::qemu::finish("setpriv", unprivileged(arguments(&["-f", "raw"], &input, home.path())));
    ran.ok();
    assert_eq!((sha256_of(&input), input.metadata().unwrap().modified().unwrap()), (before, modified));
}

/// Runs a command in a directory of its own, as a user does who types relative names.
fn dedup_img_in<I: IntoIterator<Item = OsString>>(home: &Path, args: I) -> Ran {
    let mut command = dedup_command(args);
    command.current_dir(home);
    let line = format!("{command:?}");
    Ran::new(line, &command.output().unwrap())
}
