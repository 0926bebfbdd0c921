//! The exit codes, which are qemu-img's.

use std::process::ExitCode;

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Done = 0,
    /// Failed, or wrong usage; never 2, which scripts read as corruption.
    Failed = 1,
    /// `check` found corruption.
    Corruption = 2,
    /// `check` found leaked clusters and nothing worse.
    Leaks = 3,
    /// `stats` found that a gate is not met.
    Gate = 4,
    /// `check` was given an image of a format that cannot be checked.
    NotCheckable = 63,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
