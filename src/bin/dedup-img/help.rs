//! How much of the options the help tells.

use std::ffi::OsString;

use clap::builder::{Resettable, StyledStr};
use clap::{CommandFactory, FromArgMatches};

use crate::cli::Cli;
use crate::exit;

/// Reads a command line. '-h' tells of the usual options and '--help' of all, both with one line for each.
pub(crate) fn read(line: impl Iterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut line: Vec<OsString> = line.collect();
    // Help about the help is the help.
    if line.get(1).is_some_and(|word| word == "help")
        && line.get(2).is_some_and(|word| word == "-h" || word == "--help")
    {
        line.truncate(2);
    }
    let whole = line.iter().any(|word| word == "--help") || line.get(1).is_some_and(|word| word == "help");
    let command = if whole { unabridged(Cli::command()) } else { Cli::command() };
    Cli::from_arg_matches(&command.try_get_matches_from(line)?)
}

/// The command with nothing left out of its help, in the short form: clap's long one takes three lines for an option.
pub(crate) fn unabridged(command: clap::Command) -> clap::Command {
    let text = |part: Option<&StyledStr>| part.map(ToString::to_string);
    let parts = [text(command.get_after_help()), exit::help(command.get_name()), text(command.get_after_long_help())];
    let after = parts.into_iter().flatten().collect::<Vec<_>>().join("\n\n");
    command
        .mut_args(|arg| arg.hide_short_help(false))
        .mut_subcommands(unabridged)
        .after_help(after)
        .after_long_help(Resettable::Reset)
}
