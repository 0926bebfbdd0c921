//! Stock QEMU as the oracle: qemu-img, qemu-io and qemu-nbd with captured output.

use super::Ran;
use crate::args;
use serde_json::Value;
use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::ops::RangeInclusive;
use std::panic::Location;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

/// A version of QEMU: major, minor.
pub(crate) type Version = (u32, u32);

/// The versions that the words, options and locks which the tests expect of QEMU were seen with.
pub(crate) const SEEN: RangeInclusive<Version> = (10, 0)..=(10, 0);

/// The version that is installed.
pub(crate) fn version() -> Version {
    static VERSION: OnceLock<Version> = OnceLock::new();
    *VERSION.get_or_init(|| {
        let ran = img(args!["--version"]).ok();
        let number = ran.stdout.strip_prefix("qemu-img version ").unwrap_or_else(|| panic!("{}", ran.told()));
        let mut parts = number.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap());
        (parts.next().unwrap(), parts.next().unwrap())
    })
}

/// Fails where QEMU's words (or options, or locks) are not the `same` as are expected of some `versions`, and one of these is
/// installed. Of any other version the difference is noted, and tests/run prints it. Contents, verdicts and exit codes are no words:
/// they are the same with every version, and plain assertions compare them.
#[track_caller]
pub(crate) fn words(versions: &RangeInclusive<Version>, same: bool, told: impl FnOnce() -> String) {
    if same {
        return;
    }
    let (told, place) = (told(), Location::caller());
    assert!(!versions.contains(&version()), "{told}");
    let line: String = told.chars().map(|c| if c == '\n' { '|' } else { c }).take(400).collect();
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("other-words");
    let mut noted = std::fs::File::options().create(true).append(true).open(path).unwrap();
    noted.write_all(format!("{}:{}: {line}\n", place.file(), place.line()).as_bytes()).unwrap();
}

/// A command for one of QEMU's tools, or another tool that the tests need.
pub(crate) fn tool<I: IntoIterator<Item = OsString>>(name: &str, args: I) -> Command {
    let mut command = Command::new(name);
    command.args(args).stdin(Stdio::null()).env("LC_ALL", "C");
    command
}

/// The sentence for a tool that is not there; never a silent skip.
fn missing(name: &str, error: &std::io::Error) -> ! {
    match error.kind() {
        ErrorKind::NotFound => panic!("this test needs {name}: tests/run lists its package and installs it"),
        _ => panic!("{name} could not be started: {error}"),
    }
}

/// Runs a tool to its end.
pub(crate) fn run<I: IntoIterator<Item = OsString>>(name: &str, args: I) -> Ran {
    finish(name, tool(name, args))
}

/// Runs a prepared command of the tool `name` to its end.
pub(crate) fn finish(name: &str, mut command: Command) -> Ran {
    let line = format!("{command:?}");
    Ran::new(line, &command.output().unwrap_or_else(|error| missing(name, &error)))
}

/// Starts a tool with pipes on all three streams, to talk to it while it runs.
pub(crate) fn spawn<I: IntoIterator<Item = OsString>>(name: &str, args: I) -> Child {
    let mut command = tool(name, args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap_or_else(|error| missing(name, &error))
}

/// Runs `qemu-img`.
pub(crate) fn img<I: IntoIterator<Item = OsString>>(args: I) -> Ran {
    run("qemu-img", args)
}

/// Runs qemu-io commands on an image and fails the test when one of them failed.
#[track_caller]
pub(crate) fn io(format: &str, path: &Path, commands: &[String]) -> Ran {
    let ran = io_try(format, path, commands);
    assert!(!ran.text().contains("failed") && !ran.text().contains("rror"), "{}", ran.told());
    ran.ok()
}

/// Runs qemu-io commands on an image and returns whatever came of it. What it writes need not survive the machine, so that no flush
/// waits for the disk.
pub(crate) fn io_try(format: &str, path: &Path, commands: &[String]) -> Ran {
    let mut words = args!["-t", "unsafe", "-f", format].to_vec();
    for command in commands {
        words.extend(args!["-c", command]);
    }
    words.push(path.into());
    run("qemu-io", words)
}

/// `qemu-img check` of a QCOW2 image: exit code and text.
pub(crate) fn check(path: &Path) -> Ran {
    img(args!["check", "-f", "qcow2", path])
}

/// Asserts that `qemu-img check` finds nothing at all, leaks included.
#[track_caller]
pub(crate) fn check_clean(path: &Path) {
    check(path).ok();
}

/// `qemu-img compare` of two images of known formats.
pub(crate) fn compare(format_a: &str, a: &Path, format_b: &str, b: &Path) -> Ran {
    img(args!["compare", "-f", format_a, "-F", format_b, a, b])
}

/// Makes an encrypted image of 1 MiB, of the key `abc`, whose secret is called `s`. Before version 10 it is a matter of luck whether
/// qemu-img can count how long a key takes on a fast machine.
#[track_caller]
pub(crate) fn create_encrypted(format: &str, path: &Path) {
    let options = format!("encrypt.key-secret=s,encrypt.format={format}");
    let words = args!["create", "-q", "--object", "secret,id=s,data=abc", "-f", "qcow2", "-o", options, path, "1M"];
    let unlucky = |ran: &Ran| ran.code == 1 && ran.stderr.contains("Unable to get accurate CPU usage");
    let runs = std::iter::repeat_with(|| img(words.clone()));
    runs.take(100).find(|ran| !unlucky(ran)).expect("a lucky run among a hundred").ok();
}

/// Asserts that two images have the same size and the same content. Strict mode would also want equal allocation, which
/// deduplication does not promise; without it, other sizes are a warning.
#[track_caller]
pub(crate) fn compare_same(format_a: &str, a: &Path, format_b: &str, b: &Path) {
    let ran = compare(format_a, a, format_b, b).ok();
    assert!(ran.stdout.contains("Images are identical") && !ran.text().contains("size mismatch"), "{}", ran.told());
}

/// `qemu-img convert`.
#[track_caller]
pub(crate) fn convert(from_format: &str, from: &Path, to_format: &str, to: &Path, more: &[&str]) -> Ran {
    let mut words = args!["convert", "-f", from_format, "-O", to_format].to_vec();
    words.extend(more.iter().map(OsString::from));
    words.extend(args![from, to]);
    img(words).ok()
}

/// `qemu-img create` with `-o options` where there are any.
#[track_caller]
pub(crate) fn create(format: &str, path: &Path, size: u64, options: &str) -> Ran {
    let mut words = args!["create", "-q", "-f", format].to_vec();
    if !options.is_empty() {
        words.extend(args!["-o", options]);
    }
    words.extend(args![path, size.to_string()]);
    img(words).ok()
}

/// `qemu-img info --output=json`.
#[track_caller]
pub(crate) fn info(format: &str, path: &Path) -> Value {
    let ran = img(args!["info", "-f", format, "--output=json", path]).ok();
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.told()))
}

/// The virtual size in bytes.
#[track_caller]
pub(crate) fn virtual_size(format: &str, path: &Path) -> u64 {
    info(format, path)["virtual-size"].as_u64().unwrap()
}

/// `qemu-img snapshot` with one of `-c`, `-a`, `-d`, and whatever came of it. No flush waits for the disk.
pub(crate) fn snapshot(action: &str, name: &str, path: &Path) -> Ran {
    img(args!["snapshot", action, name, "--image-opts", unflushed(path)])
}

/// Image options of a QCOW2 image that is written as ever, but for flushes, which do nothing.
fn unflushed(path: &Path) -> OsString {
    // A comma in a value is written twice.
    let name = path.to_str().unwrap().replace(',', ",,");
    format!("driver=qcow2,cache.no-flush=on,file.filename={name}").into()
}

/// Snapshots as (id, name), in table order.
#[track_caller]
pub(crate) fn snapshots(path: &Path) -> Vec<(String, String)> {
    let word = |entry: &Value, key: &str| entry[key].as_str().unwrap().to_owned();
    match info("qcow2", path).get("snapshots") {
        Some(Value::Array(list)) => list.iter().map(|entry| (word(entry, "id"), word(entry, "name"))).collect(),
        _ => Vec::new(),
    }
}
