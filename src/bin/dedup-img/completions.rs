//! What shells know of the command line.

use clap::builder::{PossibleValuesParser, Resettable};
use clap::{Arg, Command, CommandFactory, ValueHint};
use clap_complete::Shell;

use crate::cli::{Cli, ShellArg};

/// The completion script for a shell.
pub(crate) fn script(shell: ShellArg) -> String {
    let shell = match shell {
        ShellArg::Bash => Shell::Bash,
        ShellArg::Zsh => Shell::Zsh,
        ShellArg::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut offered(&Cli::command()), "dedup-img", &mut script);
    // For bash clap_complete 4.6.11 spells the hyphen of the program's name in two ways, and then no command's options are found.
    String::from_utf8_lossy(&script).replace("dedup__subcmd__img", "dedup__img")
}

/// The command with what a shell should offer: no options that are only there to be refused, and what their values can be.
fn offered(command: &Command) -> Command {
    let args = command.get_arguments().filter(|arg| arg.is_positional() || !arg.is_hide_set());
    let subcommands = command.get_subcommands().map(offered);
    let about = command.get_about().cloned().unwrap_or_default();
    let version =
        command.get_version().map_or(Resettable::Reset, |version| Resettable::Value(version.to_owned().into()));
    Command::new(command.get_name().to_owned())
        .about(about)
        .version(version)
        .args(args.cloned().map(with_values))
        .subcommands(subcommands)
}

/// An option with what its value can be. It is not so in the parser, whose messages are those of qemu-img.
fn with_values(arg: Arg) -> Arg {
    let name = arg.get_value_names().and_then(|names| names.first()).map(ToString::to_string).unwrap_or_default();
    match name.as_str() {
        "CACHE" => arg.value_parser(PossibleValuesParser::new([
            "writeback",
            "writethrough",
            "none",
            "off",
            "directsync",
            "unsafe",
        ])),
        "DIR" => arg.value_hint(ValueHint::DirPath),
        "FILE" | "SOURCE... TARGET" => arg.value_hint(ValueHint::FilePath),
        "raw|qcow2" | "qcow2|raw" | "qcow2" => {
            arg.value_parser(PossibleValuesParser::new(name.split('|').map(ToOwned::to_owned)))
        }
        _ if arg.get_possible_values().is_empty() => arg.value_hint(ValueHint::Other),
        _ => arg,
    }
}
