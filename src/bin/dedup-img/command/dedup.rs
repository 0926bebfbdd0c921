//! `dedup-img dedup`.

use std::path::Path;
use std::time::Instant;

use dedup_img::disk::{Format, open_image};
use dedup_img::inplace::{DedupOptions, Plan};
use dedup_img::pool::Pin;
use dedup_img::progress::{Progress, Silent};
use dedup_img::storage::lock::LockMode;
use dedup_img::work::Work;
use dedup_img::{Error, ErrorKind, Result};

use crate::cli::{DedupArgs, OutputArg};
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::view::{self, progress::Shown};

/// Runs the command.
pub(crate) fn run(args: &DedupArgs) -> std::result::Result<(), Failure> {
    let Some(file) = &args.file else {
        return Err(Failure::Usage { command: "dedup", message: "Expecting one image file name".to_owned() });
    };
    let opening = |e: Error| Failure::new(format_args!("Could not open '{}': {e}", file.display()));
    let format = args.format.as_deref().map(str::parse::<Format>).transpose().map_err(opening)?;
    let interrupt = Interrupt::watch();
    let shown = (args.progress && !args.quiet).then(|| Shown::new(args.output == OutputArg::Json));
    let progress: &dyn Progress = shown.as_ref().map_or(&Silent, |shown| shown);
    let work = Work::new(args.threads.map(usize::from), args.memory, progress, &interrupt.cancel)?;
    let result = work_on(args, file, format, &work);
    if let Some(shown) = &shown {
        shown.finish(result.is_ok());
    }
    match result {
        Err(error) if error.kind() == ErrorKind::Cancelled => {
            interrupt.die();
            Err(error.into())
        }
        Err(error) => Err(error.into()),
        Ok(summary) if args.quiet => {
            drop(summary);
            Ok(())
        }
        Ok(summary) => view::print(&summary),
    }
}

fn work_on(args: &DedupArgs, file: &Path, format: Option<Format>, work: &Work<'_>) -> Result<String> {
    let started = Instant::now();
    let mode = if args.dry_run { LockMode::Read } else { LockMode::Write };
    let (storage, format) = open_image(file, format, mode)?;
    let said = |e: Error| e.prefixed(&format!("'{}'", file.display()));
    if format != Format::Qcow2 {
        let message = format!("a {format} image cannot be deduplicated in place; use dedup-img convert");
        return Err(said(Error::new(ErrorKind::Unsupported, message)));
    }
    let scratch = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let options = DedupOptions { pin: args.pin.map_or(Pin::Shared, Pin::from) };
    let plan = Plan::new(&storage, options, scratch, work).map_err(said)?;
    if args.dry_run {
        let report = plan.report(&storage, started).map_err(said)?;
        return view::dedup::planned(file, &plan, &report, args.output);
    }
    let report = plan.apply(&storage, started, work).map_err(said)?;
    Ok(view::dedup::done(file, &report, args.output))
}
