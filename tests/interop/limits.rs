//! The limits on numbers in an image: limits.md has a row for each, with what QEMU says and what we say, and is tried here row by row.

mod images;

use crate::args;
use crate::support::corpus::M;
use crate::support::cost::Counter;
use crate::support::{names_in, qemu, scratch};
use images::{Bases, OTHERS, ROWS, make_other};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::Duration;

/// The table; read when the test runs.
const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/limits.md");
/// What a hostile image may cost: time of the processor, memory in bytes, bytes on standard error.
const MOST: (Duration, u64, usize) = (Duration::from_secs(2), 256 << 20, 8 << 20);
/// Every refusal says with one of these what can be done.
const ADVICE: [&str; 9] = [
    "see ",
    "run ",
    "say",
    "take ",
    "convert it",
    "with qemu-img convert",
    "reads the disk",
    "restore it",
    "is the file cut short?",
];

/// Rows where QEMU's words would mislead.
const OWN_WORDS: [&str; 4] =
    ["header_length 108", "bitmap name_size 0", "bitmap table entry, bit 56", "bitmap table entry 0x10200"];

/// What a cell says of some commands: their exit code, and words on standard error.
#[derive(Debug, PartialEq, Eq)]
struct Says {
    commands: Vec<String>,
    code: i32,
    words: Option<String>,
}

/// Reads a cell: "info convert 1 `words`; check 0".
fn cell(text: &str) -> Vec<Says> {
    let mut all = Vec::new();
    let mut pieces = text.split('`');
    while let Some(plain) = pieces.next() {
        for part in plain.split(';').map(str::trim).filter(|part| !part.is_empty()) {
            let mut commands: Vec<String> = part.split(' ').map(str::to_owned).collect();
            let code = commands.pop().unwrap().parse().unwrap_or_else(|_| panic!("no exit code in {text}"));
            all.push(Says { commands, code, words: None });
        }
        if let Some(words) = pieces.next() {
            all.last_mut().unwrap().words = Some(words.to_owned());
        }
    }
    all
}

/// The rows of the table: name, what QEMU says, what we say.
fn table() -> Vec<(String, Vec<Says>, Vec<Says>)> {
    let text = fs::read_to_string(TABLE).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| ")).map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        assert_eq!(cells.len(), 4, "{line}");
        cells
    });
    // Below the heads of the columns there is a line of dashes.
    rows.skip(2).map(|cells| (cells[0].to_owned(), cell(cells[2]), cell(cells[3]))).collect()
}

/// The words of a command on the image.
fn words_of(program: &str, command: &str, path: &Path, target: &Path) -> Vec<OsString> {
    let (command, snapshot) = command.split_once('@').map_or((command, None), |(command, name)| (command, Some(name)));
    let salvages = command == "salvage";
    let command = if salvages { "convert" } else { command };
    let mut words: Vec<OsString> = args![program, command].to_vec();
    words.extend(args!["--salvage"].into_iter().filter(|_| salvages));
    words.extend(match (program, command) {
        ("qemu-img", "convert") => args!["-f", "qcow2", "-O", "raw"].to_vec(),
        (_, "convert") => args!["-q", "-t", "unsafe", "-f", "qcow2"].to_vec(),
        _ => args!["-f", "qcow2"].to_vec(),
    });
    words.extend(snapshot.map(|name| args!["-l", name]).into_iter().flatten());
    words.push(path.into());
    if command == "convert" {
        words.push(target.into());
    }
    words
}

/// Runs a command, and returns its exit code and what it said on standard error; ours within the bounds.
fn run(words: &[OsString]) -> (i32, String) {
    let is_ours = words[0] == "dedup-img";
    let program = if is_ours { env!("CARGO_BIN_EXE_dedup-img") } else { "qemu-img" };
    let counter = Counter::new();
    let ran = qemu::finish("time", counter.command(program, words[1..].iter().cloned()));
    if is_ours {
        let (cost, said) = (counter.read(), ran.stderr.len());
        let is_cheap = cost.user + cost.system < MOST.0 && cost.memory < MOST.1 && said < MOST.2;
        assert!(is_cheap, "{words:?} took {cost:?}, said {said}");
    }
    (ran.code, ran.stderr)
}

/// Length and SHA-256 of the first MiB, which is the whole of most images.
fn state(path: &Path) -> (u64, Vec<u8>) {
    let mut bytes = Vec::new();
    File::open(path).unwrap().take(M).read_to_end(&mut bytes).unwrap();
    (fs::metadata(path).unwrap().len(), Sha256::digest(&bytes).to_vec())
}

/// Tries one row on the image at `path`, and says what is not as the row says.
fn offences(path: &Path, theirs: &[Says], ours: &[Says]) -> Vec<String> {
    let home = path.parent().unwrap();
    let target = home.join("target");
    let before = (state(path), names_in(home));
    let mut offences = Vec::new();
    let both = theirs.iter().map(|says| ("qemu-img", says)).chain(ours.iter().map(|says| ("dedup-img", says)));
    for (program, says) in both {
        for command in &says.commands {
            let (code, said) = run(&words_of(program, command, path, &target));
            if program == "qemu-img" && code > 128 {
                // A crash says nothing of the image.
                qemu::words(&qemu::SEEN, false, || format!("{command} ended by signal {}: {path:?}", code - 128));
                continue;
            }
            let lines: Vec<&str> = said.lines().collect();
            let mut wrong = code != says.code;
            let same = says.words.as_ref().is_none_or(|words| said.contains(words));
            match program {
                "qemu-img" => qemu::words(&qemu::SEEN, same, || format!("{command} does not say {says:?}: {said}")),
                _ => wrong |= !same,
            }
            if program == "dedup-img" && code == 1 {
                let last = lines.last().copied().unwrap_or_default();
                // The findings of a check come before the refusal.
                wrong |= !(lines.len() == 1 || command == "check" && lines[0].starts_with("ERROR"));
                wrong |= !last.starts_with("dedup-img: ") || !last.contains(&format!("'{}'", path.display()));
                wrong |= !ADVICE.iter().any(|advice| last.contains(advice));
                wrong |= target.exists();
            }
            if wrong {
                offences.push(format!("{program} {command} ended with {code} and said: {}", said.trim_end()));
            }
            let _ = fs::remove_file(&target);
            if (state(path), names_in(home)) != before {
                offences.push(format!("{program} {command} has changed something"));
            }
        }
    }
    offences
}

#[test]
fn every_limit_is_kept_as_the_table_says() {
    let bases = Bases::new();
    let table = table();
    let named: BTreeSet<&str> = table.iter().map(|row| row.0.as_str()).collect();
    let made: BTreeSet<&str> = ROWS.iter().map(|row| row.0).chain(OTHERS).collect();
    assert_eq!(named, made, "a row without an image, or an image without a row");
    assert_eq!(table.len(), ROWS.len() + OTHERS.len(), "a row is there twice");
    let mut all = Vec::new();
    for (name, theirs, ours) in &table {
        let home = scratch();
        let path = home.path().join("image.qcow2");
        match ROWS.iter().find(|row| row.0 == *name) {
            Some((_, make)) => fs::write(&path, make(&bases).0).unwrap(),
            None => make_other(name, &bases, &path),
        }
        all.extend(offences(&path, theirs, ours).into_iter().map(|offence| format!("{name}: {offence}")));
        let says =
            |says: &[Says], what: &str| says.iter().any(|says| says.commands.iter().any(|c| c.starts_with(what)));
        assert!(!theirs.is_empty(), "{name}: the row does not say what QEMU does");
        assert!(says(ours, "convert") || says(ours, "check"), "{name}: the row does not say what we do");
        // Where QEMU has a word for it, so have we.
        for refused in theirs.iter().filter(|says| says.code == 1 && says.commands[0].starts_with("info")) {
            let words = refused.words.as_deref().unwrap_or_else(|| panic!("{name}: what does QEMU say?"));
            let is_ours = ours.iter().any(|says| says.words.as_deref().is_some_and(|ours| ours.contains(words)));
            assert!(is_ours || OWN_WORDS.contains(&name.as_str()), "{name}: we do not say `{words}`");
        }
    }
    assert!(all.is_empty(), "{} offences:\n{}", all.len(), all.join("\n"));
}
