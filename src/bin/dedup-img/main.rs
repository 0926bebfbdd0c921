//! `dedup-img`: deduplicated QCOW2 images, offline.

mod advice;
mod cli;
mod command;
mod completions;
mod elsewhere;
mod exit;
mod failure;
mod help;
mod image_options;
mod interrupt;
#[cfg(test)]
mod pages;
mod qemu_options;
mod size;
mod view;

use cli::Command;
use dedup_img::storage::Locking;
use exit::Exit;

fn main() -> std::process::ExitCode {
    #[cfg(debug_assertions)]
    no_other_threads();
    interrupt::survive_limits();
    let cli = match help::read(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => return view::usage(&error).into(),
    };
    interrupt::end_without_memory();
    locking(&cli.command).decide();
    let result = match cli.command {
        Command::Create(args) => command::create::run(args).map(|()| Exit::Done),
        Command::Convert(args) => command::convert::run(&args).map(|()| Exit::Done),
        Command::Dedup(args) => command::dedup::run(&args).map(|()| Exit::Done),
        Command::Gc(args) => command::gc::run(&args).map(|()| Exit::Done),
        Command::Check(args) => command::check::run(&args),
        Command::Stats(args) => command::stats::run(&args),
        Command::Completions(args) => view::print(&completions::script(args.shell)).map(|()| Exit::Done),
    };
    match result {
        Ok(exit) => {
            interrupt::die();
            exit.into()
        }
        Err(error) => {
            let exit = view::failure(&error);
            interrupt::die();
            exit.into()
        }
    }
}

/// Work that is not given to the threads that `--threads` asks for would start as many again, and panics where they cannot be started.
/// While this is tested it panics always: rayon's own threads do not exist.
#[cfg(debug_assertions)]
fn no_other_threads() {
    let refused =
        rayon::ThreadPoolBuilder::new().spawn_handler(|_| Err(std::io::Error::other("not these"))).build_global();
    assert!(refused.is_err(), "threads that nobody asked for");
}

/// Whether the images that `command` opens are locked.
fn locking(command: &Command) -> Locking {
    let args = match command {
        Command::Create(args) => args.locking,
        Command::Convert(args) => args.run.locking,
        Command::Dedup(args) => args.run.locking,
        Command::Gc(args) => args.run.locking,
        Command::Check(args) => args.run.locking,
        Command::Stats(args) => args.run.locking,
        Command::Completions(_) => return Locking::default(),
    };
    args.locking.into()
}
