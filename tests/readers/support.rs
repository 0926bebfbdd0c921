//! What the tests share with the product's own: stock QEMU as the oracle, and random numbers.

#[path = "../support/qemu.rs"]
pub(crate) mod qemu;
#[path = "../support/ran.rs"]
mod ran;
#[path = "../support/random.rs"]
mod random;

pub(crate) use ran::Ran;
pub(crate) use random::Random;

use std::ffi::OsString;
use std::process::{Command, Stdio};

/// Builds an argument list from strings and paths alike.
#[macro_export]
macro_rules! args {
    ($($word:expr),* $(,)?) => { [$(::std::ffi::OsString::from(&$word)),*] };
}

/// Runs the program under test, which the environment names, to its end.
pub(crate) fn dedup_img<I: IntoIterator<Item = OsString>>(args: I) -> Ran {
    let program = std::env::var_os("DEDUP_IMG").expect("DEDUP_IMG must name the dedup-img to test, as tests/run does");
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).env("LC_ALL", "C");
    let line = format!("{command:?}");
    Ran::new(line, &command.output().expect("dedup-img could not be started"))
}

/// A directory that vanishes with the test.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("readers-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}
