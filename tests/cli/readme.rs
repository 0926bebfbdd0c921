//! The tour in the README: each command is run as it stands there, and prints what is printed there, sizes aside.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Ran;
use crate::support::files::Files;
use crate::support::{dedup_command, qemu, scratch};

/// A command of the tour and what it prints.
struct Step {
    command: String,
    printed: Vec<String>,
}

fn tour() -> Vec<Step> {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let section = readme.split("\n## A tour of 60 seconds\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let mut steps: Vec<Step> = Vec::new();
    let blocks = section.split("```console\n").skip(1).map(|block| block.split("```").next().unwrap());
    for line in blocks.flat_map(str::lines) {
        match line.strip_prefix("$ ") {
            Some(command) => steps.push(Step { command: command.to_owned(), printed: Vec::new() }),
            None => steps.last_mut().unwrap().printed.push(line.to_owned()),
        }
    }
    assert!(steps.len() >= 15, "the tour has {} commands", steps.len());
    steps
}

/// A line without what depends on the files that the disk is made of and on the machine: sizes, counts, times, fingerprints, the
/// letters of the map, what a content looks like, the mark at the best size. Rows of a table that then are the same are one.
fn shape<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut shapes: Vec<String> = Vec::new();
    for line in lines {
        let map = line.len() > 60 && line.trim().chars().all(|c| ".duszr".contains(c));
        let mut words: Vec<&str> = if map { vec!["MAP"] } else { line.split_whitespace().map(word).collect() };
        words.retain(|&word| !["", "<"].contains(&word));
        if words.starts_with(&["N", "N", "H", "H"]) {
            words.truncate(4);
        }
        words.dedup();
        let shape = words.join(" ");
        if shapes.last() != Some(&shape) || shape.is_empty() {
            shapes.push(shape);
        }
    }
    shapes
}

/// `N` for a number, `H` for a fingerprint or an offset, nothing for a unit.
fn word(word: &str) -> &str {
    let bare = word.trim_matches(|c: char| "(),:".contains(c));
    let number = |text: &str| {
        let digits = text.trim_start_matches('-').trim_end_matches(['%', 'K', 'M', 'G', 'k']);
        digits.starts_with(|c: char| c.is_ascii_digit())
            && digits.chars().all(|c| c.is_ascii_digit() || ",.-/:".contains(c))
    };
    let hex = |text: &str| text.len() == 16 && text.chars().all(|c| c.is_ascii_hexdigit());
    match bare {
        "B" | "KiB" | "MiB" | "GiB" | "KiB/sec" | "MiB/sec" | "GiB/sec" | "sec" | "%" => "",
        bare if bare.starts_with("0x") || hex(bare) => "H",
        bare if number(bare) => "N",
        _ => word,
    }
}

#[test]
fn the_tour_prints_what_the_readme_says() {
    let home = scratch();
    let program = PathBuf::from(dedup_command([]).get_program());
    let path = std::env::join_paths(
        std::iter::once(program.parent().unwrap().to_owned())
            .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    let path = path.unwrap();
    // In place of the machine's programs, which may be few.
    let files = scratch();
    Files::new(2).tree(files.path(), 60 << 20);
    for step in tour() {
        let mut bash = Command::new("bash");
        let command = step.command.replace("/usr/bin", files.path().to_str().unwrap());
        bash.args(["-c", &format!("exec 2>&1; {command}")])
            .current_dir(home.path())
            .env("PATH", &path)
            .env("LC_ALL", "C");
        let ran = Ran::new(step.command.clone(), &bash.output().unwrap());
        let (seen, due) = (shape(ran.stdout.lines()), shape(step.printed.iter().map(String::as_str)));
        let told = || format!("{seen:#?} is not {due:#?}: {}", ran.told());
        // A refusal says so in its first word.
        assert_eq!(ran.code != 0, ran.stdout.starts_with("qemu-img: "), "{}", ran.told());
        match step.command.starts_with("qemu-") {
            true => qemu::words(&qemu::SEEN, seen == due, told),
            false => assert!(seen == due, "{}", told()),
        }
    }
}

#[test]
fn a_shape_leaves_out_sizes_and_nothing_else() {
    let shape = |text: &str| shape(text.lines());
    assert_eq!(shape(" data 1.5 MiB 3,000 clusters"), shape(" data  12 GiB  7 clusters"));
    assert_eq!(shape("    1  423  1.65 MiB\n  2-3  72,313  282 MiB"), shape("    1  4  16 KiB"));
    assert_ne!(shape(" data 1.5 MiB 3,000 clusters"), shape(" data 1.5 MiB 3,000 cluster"));
    assert_ne!(shape("No errors were found on the image."), shape("1 errors were found on the image."));
}
