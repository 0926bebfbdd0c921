//! The program under test on a system that refuses some calls, as file systems, devices and filters of system calls do.

use super::{Ran, cached, dedup_command};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The library that refuses them; whoever can link this test has a C compiler.
fn library() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/refuse.c");
    let age = std::fs::metadata(&source).unwrap().modified().unwrap();
    let age = age.duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    cached(&format!("refuse-{age}.so"), |path| {
        let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(path).arg(source).arg("-ldl").status();
        assert!(built.unwrap().success(), "cc");
    })
}

/// Runs the program where calls fail as `refused` says, `call=errno` for each.
#[track_caller]
pub(crate) fn refusing<I: IntoIterator<Item = OsString>>(refused: &str, args: I) -> Ran {
    let mut command = dedup_command(args);
    command.env("LD_PRELOAD", library()).env("REFUSE", refused);
    let line = format!("{refused}: {command:?}");
    Ran::new(line, &command.output().unwrap())
}
