//! What the user sees: results on standard output, everything else on standard error.

pub(crate) mod check;
pub(crate) mod dedup;
pub(crate) mod gc;
pub(crate) mod progress;
pub(crate) mod stats;
pub(crate) mod summary;
mod units;

use std::fmt::Display;
use std::io::{self, Write};

use clap::CommandFactory;
use clap::error::ErrorKind;

use crate::cli::Cli;
use crate::exit::Exit;
use crate::failure::{Failure, hint};

/// Prints a result. A reader that went away (`| head`) is no failure.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            let reason = e.to_string();
            let reason = reason.split(" (os error").next().unwrap_or_default();
            Err(Failure::new(format_args!("Could not write to standard output: {reason}")))
        }
        _ => Ok(()),
    }
}

/// A name from a stranger, without what a terminal would obey.
fn shown(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Says why the program fails.
pub(crate) fn failure(failure: &dyn Display) -> Exit {
    // There is nowhere to complain about a standard error that cannot be written.
    let _ = writeln!(io::stderr().lock(), "dedup-img: {failure}");
    Exit::Failed
}

/// Says what went wrong on the way, and does not stop the program.
pub(crate) fn warning(text: &str) {
    let _ = writeln!(io::stderr().lock(), "dedup-img: warning: {text}");
}

/// Ends a command line that was not understood, or one that asked for help or the version.
pub(crate) fn usage(error: &clap::Error) -> Exit {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match print(&error.render().to_string()) {
            Ok(()) => Exit::Done,
            Err(e) => failure(&e),
        },
        kind => {
            let typed = std::env::args_os().nth(1).unwrap_or_default();
            let commands = Cli::command();
            let command = commands.get_subcommands().map(clap::Command::get_name).find(|&name| typed == name);
            let text = error.render().to_string();
            let message = match kind {
                ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
                    "Not enough arguments".to_owned()
                }
                ErrorKind::InvalidSubcommand => format!("Command not found: {}{}", typed.display(), tip(&text)),
                ErrorKind::MissingRequiredArgument => "Not enough arguments".to_owned(),
                _ => format!("{}{}", first_sentence(&text), tip(&text)),
            };
            failure(&format_args!("{message}\n{}", hint(command)))
        }
    }
}

/// The first line of one of clap's messages, without its label.
fn first_sentence(text: &str) -> &str {
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line)
}

/// What clap suggests for a typo.
fn tip(text: &str) -> String {
    let lines = || text.lines().map(str::trim);
    let tip = lines().find_map(|line| line.strip_prefix("tip: ").map(|tip| format!(" ({tip})")));
    tip.or_else(|| lines().find(|line| line.starts_with("[possible values:")).map(|values| format!(" {values}")))
        .unwrap_or_default()
}
