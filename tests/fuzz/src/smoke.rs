//! The stored inputs, on a stable toolchain: `inputs/` has a list for each function, in hexadecimal, one a line. Lines that begin
//! with `#` tell the story of what follows: an input that has broken something once.

use std::fmt::Write;
use std::panic;
use std::path::Path;

/// Tries the inputs in the list `name`.
fn every(name: &str, body: fn(&[u8])) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/inputs").join(name);
    let list = std::fs::read_to_string(path).unwrap();
    let (mut tried, mut broken) = (0, String::new());
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let digits = line.as_bytes().chunks(2).map(|pair| str::from_utf8(pair).unwrap());
        let input: Vec<u8> = digits.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect();
        if panic::catch_unwind(|| body(&input)).is_err() {
            writeln!(broken, "{line}").unwrap();
        }
        tried += 1;
    }
    assert!(broken.is_empty(), "these inputs of {name} break something:\n{broken}");
    assert!(tried >= 20, "only {tried} inputs");
}

#[test]
fn stored_images_open_and_read_or_are_refused() {
    every("open", super::open);
}

#[test]
fn stored_images_are_checked() {
    every("check", super::check);
}

#[test]
fn stored_images_are_repaired_and_read_as_before() {
    every("repair", super::repair);
}

#[test]
fn stored_images_hold_the_same_after_every_operation() {
    every("round_trip", super::round_trip);
}

#[test]
fn stored_directories_are_used_or_left_alone() {
    every("directory", super::directory);
}

#[test]
fn stored_command_lines_are_taken_or_refused() {
    every("options", super::options);
}
