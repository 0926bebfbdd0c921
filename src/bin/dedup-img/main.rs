//! `dedup-img`: deduplicated QCOW2 images, offline.

mod cli;
mod command;
mod exit;
mod failure;
mod image_options;
mod interrupt;
mod qemu_options;
mod size;
mod view;

use clap::Parser;

use cli::{Cli, Command};
use exit::Exit;

fn main() -> std::process::ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return view::usage(&error).into(),
    };
    let result = match cli.command {
        Command::Create(args) => command::create::run(args).map(|()| Exit::Done),
        Command::Convert(args) => command::convert::run(&args).map(|()| Exit::Done),
        Command::Dedup(args) => command::dedup::run(&args).map(|()| Exit::Done),
        Command::Gc(args) => command::gc::run(&args).map(|()| Exit::Done),
        Command::Check(args) => command::check::run(&args),
        Command::Stats(args) => command::stats::run(&args),
    };
    result.unwrap_or_else(|error| view::failure(&error)).into()
}
