//! What commands have in common that change an image where it lies.

use std::path::Path;

use dedup_img::storage::{FileStorage, LockMode, Storage};
use dedup_img::{Advice, Error, ErrorKind, Format, Repaired, Result, Scratch, Work, open_image};

use super::run;
use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::view;

/// Their options.
pub(super) struct InPlace<'a> {
    pub(super) command: &'static str,
    pub(super) file: &'a Path,
    pub(super) format: Option<&'a str>,
    pub(super) dry_run: bool,
    pub(super) ignore_holes: bool,
    pub(super) memory: u64,
    pub(super) run: &'a RunArgs,
}

/// Opens the image, lets `operation` work on it, and prints the summary that it returns.
pub(super) fn run_in_place(
    args: &InPlace<'_>,
    operation: impl FnOnce(&mut dyn Storage, &Work) -> Result<String>,
) -> std::result::Result<(), Failure> {
    view::refuse_own_output(args.file, args.run.quiet)?;
    let format = args.format.map(str::parse::<Format>).transpose().map_err(|e| e.opening(args.file))?;
    let run_on = |work: &Work| {
        open_and(args, format, |storage| {
            let result = operation(storage, work);
            if !args.run.quiet {
                view::kept_space(args.file, storage);
            }
            result
        })
    };
    let job = run::Job {
        command: args.command,
        target: (!args.dry_run).then_some(args.file),
        scratch: Scratch::In(parent(args.file).to_owned()),
    };
    let summary = run::run(&job, args.run, args.memory, run_on)??;
    if args.run.quiet { Ok(()) } else { view::print(&summary) }
}

fn open_and(
    args: &InPlace<'_>,
    format: Option<Format>,
    operation: impl FnOnce(&mut FileStorage) -> Result<String>,
) -> Result<String> {
    let mode = if args.dry_run { LockMode::Read } else { LockMode::Write };
    let (storage, format) = open_image(args.file, format, mode)?;
    let mut storage = storage.ignoring_holes(args.ignore_holes);
    if format != Format::Qcow2 {
        let what = format!("a {format} image cannot be worked on in place");
        return Err(Error::new(ErrorKind::Unsupported, what).advise(Advice::Convert).on(args.file));
    }
    operation(&mut storage).map_err(|e| e.of_image(args.file))
}

/// The directory that a file is in.
fn parent(file: &Path) -> &Path {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Says that the image was not closed cleanly and would be repaired first, where that is so.
pub(super) fn unready(args: &InPlace<'_>, is_unready: bool) {
    if is_unready {
        view::warning(&view::unclean(args.file, None));
    }
}

/// Says that the image was not closed cleanly and was repaired.
pub(super) fn repaired(args: &InPlace<'_>, repaired: &Repaired) {
    view::warning(&view::unclean(args.file, Some(repaired.corruptions_fixed)));
}
