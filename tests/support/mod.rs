//! What every test needs: the program under test, stock QEMU as the oracle, an independent reader, and images to try.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test that meets the unexpected has failed"
)]

pub(crate) mod corpus;
pub(crate) mod cost;
pub(crate) mod count;
pub(crate) mod crash;
pub(crate) mod failing;
pub(crate) mod families;
pub(crate) mod files;
pub(crate) mod inplace;
pub(crate) mod into;
pub(crate) mod loops;
pub(crate) mod mutator;
pub(crate) mod no_links;
pub(crate) mod qemu;
mod ran;
mod random;
pub(crate) mod reader;
pub(crate) mod refuse;
pub(crate) mod root_disk;
pub(crate) mod subjects;
mod verify;

pub(crate) use ran::Ran;
pub(crate) use random::{Choices, Random};

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Builds an argument list from strings and paths alike: `args!["check", path, format!("{n}")]`.
#[macro_export]
macro_rules! args {
    ($($word:expr),* $(,)?) => { [$(::std::ffi::OsString::from(&$word)),*] };
}

/// A command for the program under test, to be changed further before it runs.
pub(crate) fn dedup_command<I: IntoIterator<Item = OsString>>(args: I) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dedup-img"));
    command.args(args).stdin(Stdio::null()).env("LC_ALL", "C");
    command
}

/// Runs the program under test to its end.
pub(crate) fn dedup_img<I: IntoIterator<Item = OsString>>(args: I) -> Ran {
    let mut command = dedup_command(args);
    let line = format!("{command:?}");
    Ran::new(line, &command.output().expect("dedup-img could not be started"))
}

/// Says that something was not tested here: nobody reads what a test prints that passes, so tests/run prints this list in the end.
pub(crate) fn left_out(what: &str, why: &str) {
    let list = Path::new(env!("CARGO_TARGET_TMPDIR")).join("left-out");
    let line = format!("{what}: {}\n", why.trim().replace('\n', "; "));
    eprint!("LEFT OUT: {line}");
    let mut file = File::options().append(true).create(true).open(list).unwrap();
    std::io::Write::write_all(&mut file, line.as_bytes()).unwrap();
}

/// Whether an image was not closed cleanly and its refcounts are wrong for that: then it is repaired before it is changed, as QEMU does
/// it when it opens one.
pub(crate) fn needs_repair(image: &Path) -> bool {
    let unclean = reader::Image::open(image).header.incompatible & 1 != 0;
    unclean && dedup_img(args!["check", "-f", "qcow2", image]).code == 2
}

/// SHA-256 of a file, in hexadecimal.
pub(crate) fn sha256_of(path: &Path) -> String {
    let mut file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A directory that vanishes with the test.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("dedup-img-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Names in a directory, sorted: to show that nothing was left behind.
pub(crate) fn names_in(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Returns the cached file `name`, after building it if this is the first test to ask; `build` writes to the path it is given.
/// Other test processes wait on the lock meanwhile, and a build that fails leaves nothing under the final name.
pub(crate) fn cached(name: &str, build: impl FnOnce(&Path)) -> PathBuf {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fixtures");
    std::fs::create_dir_all(&home).unwrap();
    let done = home.join(name);
    if done.exists() {
        return done;
    }
    let lock = File::create(home.join(format!("{name}.lock"))).unwrap();
    let _locked = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error).unwrap();
    if !done.exists() {
        let fresh = home.join(format!("{name}.partial"));
        match std::fs::symlink_metadata(&fresh) {
            Ok(found) if found.is_dir() => std::fs::remove_dir_all(&fresh).unwrap(),
            Ok(_) => std::fs::remove_file(&fresh).unwrap(),
            Err(_) => {}
        }
        build(&fresh);
        // Where the holes of a file are is settled when it is on the disk.
        let _ = File::open(&fresh).and_then(|made| made.sync_all());
        std::fs::rename(&fresh, &done).unwrap();
    }
    done
}
