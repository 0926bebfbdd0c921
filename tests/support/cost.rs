//! What a program takes of the machine, as GNU time counts it. It stands between, because the kernel's mark of a child begins at what
//! was resident in the process that forked it: many hundred MiB, where all tests are threads of one.

use super::qemu;
use std::ffi::{OsStr, OsString};
use std::process::Command;
use std::time::Duration;
use tempfile::NamedTempFile;

/// Time of the processor, and memory in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// In the program itself.
    pub(crate) user: Duration,
    /// In the kernel.
    pub(crate) system: Duration,
    /// The most that was resident at once.
    pub(crate) memory: u64,
}

/// Counts one run.
pub(crate) struct Counter(NamedTempFile);

impl Counter {
    /// For one command.
    pub(crate) fn new() -> Self {
        Self(NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    /// A program to be run and counted. One that a signal ends has 128 and the signal's number as its exit code.
    pub(crate) fn command<I: IntoIterator<Item = OsString>>(&self, program: impl AsRef<OsStr>, args: I) -> Command {
        let mut command = qemu::tool("time", []);
        command.args(["-q", "-f", "%U %S %M", "-o"]).arg(self.0.path()).arg(program).args(args);
        command
    }

    /// What it took, once it has ended.
    #[track_caller]
    pub(crate) fn read(&self) -> Cost {
        let text = std::fs::read_to_string(self.0.path()).unwrap();
        // A signal that ended it is said before.
        let figures: Vec<&str> = text.lines().last().unwrap_or_default().split(' ').collect();
        let [user, system, memory] = figures[..] else { panic!("time says {text:?}") };
        let seconds = |figure: &str| Duration::from_secs_f64(figure.parse().unwrap());
        Cost { user: seconds(user), system: seconds(system), memory: memory.parse::<u64>().unwrap() << 10 }
    }
}
