//! The manual pages in man/ and the scripts in completions/: made of the same definitions as the help, and stored, so that a
//! package needs to run nothing. A test fails when they are out of date.
//!
//! A page's source in man/src is its prose, with lines that stand for what is defined in the program:
//!
//! | line | becomes |
//! |---|---|
//! | `@title` | the page's title, with the version |
//! | `@name`, `@synopsis` | these sections |
//! | `@option NAME` | an option: its spelling, its default and its line of the help; prose may follow |
//! | `@exit CODE` | an exit code and what it means; prose may follow |
//! | `@commands` | the commands |
//! | `@include FILE` | prose that several pages have |
//!
//! Each option and each exit code of a command must be there, once.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::{Arg, Command, CommandFactory, ValueEnum};
use clap_mangen::Man;

use crate::cli::{Cli, ShellArg};
use crate::help::unabridged;
use crate::{completions, exit};

const WRITE: &str = "DEDUP_IMG_WRITE_PAGES";

/// The files as they should be: their names in the source directory, and their content.
fn files() -> Vec<(PathBuf, String)> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("man/src");
    let mut pages: Vec<_> = fs::read_dir(&sources)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "1" || extension == "5"))
        .map(|path| (Path::new("man").join(path.file_name().unwrap()), page(&path)))
        .collect();
    pages.sort();
    let scripts =
        [(ShellArg::Bash, "dedup-img.bash"), (ShellArg::Zsh, "_dedup-img"), (ShellArg::Fish, "dedup-img.fish")];
    assert_eq!(scripts.len(), ShellArg::value_variants().len(), "each shell has a script");
    let scripts = scripts.map(|(shell, name)| (Path::new("completions").join(name), completions::script(shell)));
    pages.into_iter().chain(scripts).collect()
}

/// The page that the source at `path` stands for.
fn page(path: &Path) -> String {
    let name = path.file_stem().unwrap().to_str().unwrap();
    let section = path.extension().unwrap().to_str().unwrap();
    let mut program = unabridged(Cli::command()).disable_help_subcommand(true);
    program.build();
    let command = match name.strip_prefix("dedup-img-") {
        Some(of) if section == "1" => program.find_subcommand(of).unwrap_or_else(|| panic!("no command for {path:?}")),
        _ => &program,
    };
    let mut due: BTreeSet<String> = match section {
        "1" => options(command).map(spelling).chain(codes(command).map(|(code, _)| code.to_string())).collect(),
        _ => BTreeSet::new(),
    };
    // Tables need tbl, whose name must be in the first line; what an apostrophe becomes, clap_mangen puts before each part.
    let mut text = "'\\\" t\n.ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n".to_owned();
    for line in lines(path) {
        let (directive, argument) = line.split_once(' ').unwrap_or((&line, ""));
        match directive {
            "@title" => text.push_str(&title(name, section)),
            "@name" => text.push_str(&heading(name, command)),
            "@synopsis" => text.push_str(&rendered(|out| Man::new(command.clone()).render_synopsis_section(out))),
            "@commands" => program.get_subcommands().for_each(|command| text.push_str(&entry(command))),
            "@option" => {
                assert!(due.remove(argument), "{path:?}: {line}: no such option, or the second time");
                let option = options(command).find(|option| spelling(option) == argument).unwrap();
                text.push_str(&described(option, command));
            }
            "@exit" => {
                assert!(due.remove(argument), "{path:?}: {line}: no such code, or the second time");
                let (_, meaning) = codes(command).find(|(code, _)| code.to_string() == argument).unwrap();
                text.push_str(&format!(".TP\n.B {argument}\n{}\n", sentence(&meaning)));
            }
            _ if directive.starts_with('@') => panic!("{path:?}: {line}: not known"),
            _ => text.push_str(&format!("{line}\n")),
        }
    }
    assert!(due.is_empty(), "{path:?} says nothing of {due:?}");
    text
}

/// The lines of a source, with what it includes.
fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    let included = |line: &str| match line.strip_prefix("@include ") {
        Some(name) => lines(&path.with_file_name(name)),
        None => vec![line.to_owned()],
    };
    text.lines().flat_map(included).collect()
}

/// The options that a page describes.
fn options(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| !arg.is_positional() && !arg.is_hide_set())
}

/// How `@option` names an option.
fn spelling(option: &Arg) -> String {
    option.get_long().map_or_else(|| option.get_short().unwrap().to_string(), ToOwned::to_owned)
}

/// The exit codes of a command, or of all with the only command that has each.
fn codes(command: &Command) -> impl Iterator<Item = (u8, String)> {
    let whole = command.has_subcommands();
    let name = command.get_name();
    exit::EXITS.iter().filter_map(move |&(code, only, meaning)| match only {
        Some(only) if whole => Some((code as u8, format!("{only} only: {meaning}"))),
        Some(only) if only != name => None,
        _ => Some((code as u8, meaning.to_owned())),
    })
}

fn title(name: &str, section: &str) -> String {
    let manual = if section == "1" { "User Commands" } else { "File Formats" };
    format!(".TH {} {section} \"\" \"dedup-img {}\" \"{manual}\"\n", name.to_uppercase(), env!("CARGO_PKG_VERSION"))
}

fn heading(name: &str, command: &Command) -> String {
    let about = command.get_about().unwrap().to_string();
    // The root's line begins with no verb.
    format!(".SH NAME\n{} \\- {}\n", name.replace('-', "\\-"), about[..1].to_lowercase() + &about[1..])
}

/// A command in the list of all.
fn entry(command: &Command) -> String {
    let about = sentence(&command.get_about().unwrap().to_string());
    format!(".TP\n.BR dedup\\-img\\-{} (1)\n{about}\n", command.get_name())
}

/// An option, as clap_mangen describes it when all others are hidden.
fn described(option: &Arg, command: &Command) -> String {
    let alone = command.clone().mut_args(|arg| match arg.get_help().map(ToString::to_string) {
        Some(help) if arg.get_id() == option.get_id() => arg.help(sentence(&help)).help_heading(Resettable::Reset),
        _ => arg.hide(true),
    });
    let text = rendered(|out| Man::new(alone).render_options_section(out));
    text.strip_prefix(".SH OPTIONS\n").unwrap().to_owned()
}

/// A line of the help as the beginning of prose.
fn sentence(line: &str) -> String {
    let end = if line.ends_with('.') { "" } else { "." };
    format!("{}{}{end}", line[..1].to_uppercase(), &line[1..])
}

/// What clap_mangen writes, without what it puts before each part for apostrophes.
fn rendered(write: impl FnOnce(&mut Vec<u8>) -> std::io::Result<()>) -> String {
    let mut out = Vec::new();
    write(&mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with(".ie ") && !line.starts_with(".el ") && !line.is_empty());
    lines.fold(String::new(), |text, line| text + line + "\n")
}

#[test]
fn manual_and_completions_are_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut stale = Vec::new();
    for (name, content) in files() {
        let path = root.join(&name);
        if std::env::var_os(WRITE).is_some() {
            fs::write(&path, content).unwrap();
        } else if fs::read_to_string(&path).ok().as_deref() != Some(&content) {
            stale.push(name);
        }
    }
    assert!(stale.is_empty(), "{stale:?} are out of date: {WRITE}=1 cargo test --bin dedup-img pages");
}

#[test]
fn the_readme_has_all_exit_codes() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let section = readme.split("\n## Exit codes\n").nth(1).unwrap();
    let rows =
        section.lines().skip_while(|line| !line.starts_with("|---")).skip(1).take_while(|line| line.starts_with('|'));
    let program = Cli::command();
    let due = codes(&program).map(|(code, meaning)| format!("| {code} | {meaning} |"));
    assert_eq!(rows.collect::<Vec<_>>(), due.collect::<Vec<_>>());
}
