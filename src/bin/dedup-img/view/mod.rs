//! What the user sees: results on standard output, everything else on standard error.

pub(crate) mod check;
pub(crate) mod dedup;
pub(crate) mod gc;
pub(crate) mod notice;
pub(crate) mod progress;
pub(crate) mod room;
pub(crate) mod stats;
pub(crate) mod summary;
pub(crate) mod units;

use std::error::Error as _;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use dedup_img::name::shown;
use dedup_img::storage::FileStorage;

use crate::cli::Cli;
use crate::elsewhere;
use crate::exit::Exit;
use crate::failure::{Failure, hint};

/// Prints a result. A reader that went away (`| head`) is no failure.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(dedup_img::Error::io("Could not write to standard output", e).into())
        }
        _ => Ok(()),
    }
}

/// Fails where `target` is the file that standard output or standard error goes to: what is printed would overwrite it. Standard output
/// may be one where nothing is printed.
pub(crate) fn refuse_own_output(target: &Path, quiet: bool) -> Result<(), Failure> {
    let Ok(target_is) = std::fs::metadata(target) else { return Ok(()) };
    let is_target = |output: BorrowedFd<'_>| {
        let output = output.try_clone_to_owned().and_then(|output| File::from(output).metadata());
        output.is_ok_and(|is| is.is_file() && (is.dev(), is.ino()) == (target_is.dev(), target_is.ino()))
    };
    if is_target(io::stderr().as_fd()) || !quiet && is_target(io::stdout().as_fd()) {
        let what = "is where the program's own output goes; name another target, or add -q for standard output";
        return Err(Failure::new(format_args!("'{}' {what}", shown(target))));
    }
    Ok(())
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

/// Tells that the file system has not taken back what is free in `file`, if so.
pub(crate) fn kept_space(file: &Path, storage: &FileStorage) {
    if let Some(reason) = storage.kept_space() {
        warning(&format!(
            "'{}': its file system does not take freed space back ({reason}); it stays in the file for new data, and \
             gc --compact makes the file shorter",
            shown(file)
        ));
    }
}

/// Says that the image in `file` was not closed cleanly, and that `repaired` wrong refcounts and flags were repaired before anything
/// else; without a number, that this would be.
pub(crate) fn unclean(file: &Path, repaired: Option<u64>) -> String {
    let what = "was not closed cleanly (lazy refcounts)";
    match repaired {
        Some(number) => {
            format!("'{}' {what}: {number} wrong reference counts and flags were repaired first", shown(file))
        }
        None => format!("'{}' {what}: its reference counts would be repaired first", shown(file)),
    }
}

/// Ends a command line that was not understood, or one that asked for help or the version.
pub(crate) fn usage(error: &clap::Error) -> Exit {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match print(&error.render().to_string()) {
            Ok(()) => Exit::Done,
            Err(e) => failure(&e),
        },
        _ => {
            let typed = std::env::args_os().nth(1).unwrap_or_default();
            let commands = Cli::command();
            let command = commands.get_subcommands().map(clap::Command::get_name).find(|&name| typed == name);
            failure(&format_args!("{}\n{}", misuse(error), hint(command)))
        }
    }
}

/// What is wrong with a command line, in a line.
fn misuse(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let word = |kind| match error.get(kind) {
        Some(ContextValue::String(word)) => shown(word),
        _ => String::new(),
    };
    let (option, value) = (word(ContextKind::InvalidArg), word(ContextKind::InvalidValue));
    match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        | ErrorKind::MissingSubcommand
        | ErrorKind::MissingRequiredArgument => "Not enough arguments".to_owned(),
        ErrorKind::InvalidSubcommand => {
            let name = word(ContextKind::InvalidSubcommand);
            match elsewhere::instead_of(&name) {
                Some(advice) => format!("Command not found: {name} ({advice})"),
                None => format!("Command not found: {name}{}", tip(&text)),
            }
        }
        ErrorKind::UnknownArgument if option.starts_with('-') => match word(ContextKind::SuggestedArg).as_str() {
            "" => format!("unknown option '{option}'"),
            near => format!("unknown option '{option}' (a similar one exists: '{near}')"),
        },
        ErrorKind::UnknownArgument => format!("unexpected argument '{option}'"),
        ErrorKind::ValueValidation => {
            let option = option.split(' ').next().unwrap_or_default();
            let due = error.source().map(ToString::to_string).unwrap_or_default();
            format!("{option} {due}, not '{value}'")
        }
        ErrorKind::InvalidValue => {
            let name = option.split(' ').next().unwrap_or_default().trim_matches(['<', '>']);
            match error.get(ContextKind::ValidValue) {
                Some(ContextValue::Strings(known)) if !known.is_empty() => {
                    format!("{name} expects {}, not '{value}'", known.join(" or "))
                }
                _ if option.starts_with('-') => format!("{name} expects a value"),
                _ => "A file name is empty".to_owned(),
            }
        }
        _ => shown(format!("{}{}", first_sentence(&text), tip(&text))),
    }
}

/// The first line of one of clap's messages, without its label.
fn first_sentence(text: &str) -> &str {
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line)
}

/// What clap suggests for a typo.
fn tip(text: &str) -> String {
    let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: "));
    tip.map(|tip| format!(" ({tip})")).unwrap_or_default()
}
