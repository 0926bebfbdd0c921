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

/// All of them, with the only command that ends so and what it means to the user, in a line for help and manual.
pub(crate) const EXITS: [(Exit, Option<&str>, &str); 6] = [
    (Exit::Done, None, "done"),
    (Exit::Failed, None, "failed, or wrong usage; standard error says why"),
    (Exit::Corruption, Some("check"), "corruption"),
    (Exit::Leaks, Some("check"), "leaked clusters, nothing worse"),
    (Exit::Gate, Some("stats"), "done, and a gate is not met"),
    (Exit::NotCheckable, Some("check"), "a format that cannot be checked"),
];

/// The lines of [`EXITS`] that hold for a command.
pub(crate) fn of(command: &str) -> impl Iterator<Item = (u8, &'static str)> {
    let command = command.to_owned();
    EXITS
        .iter()
        .filter(move |(_, only, _)| only.is_none_or(|only| only == command))
        .map(|&(exit, _, meaning)| (exit as u8, meaning))
}

/// The same as the help has it, where there is more to say than of every command.
pub(crate) fn help(command: &str) -> Option<String> {
    let own = EXITS.iter().any(|(_, only, _)| *only == Some(command));
    own.then(|| {
        of(command).fold("Exit status:".to_owned(), |text, (code, meaning)| text + &format!("\n  {code:<2}  {meaning}"))
    })
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
