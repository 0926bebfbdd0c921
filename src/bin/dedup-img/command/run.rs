//! Running an operation: its threads, its progress, and what stops it.

use std::path::Path;
use std::sync::Arc;

use dedup_img::name::shown;
use dedup_img::{Error, Left, Scratch, Work, WorkOptions};

use crate::advice;
use crate::cli::{OutputArg, RunArgs};
use crate::failure::Failure;
use crate::interrupt;
use crate::view;
use crate::view::notice::Told;
use crate::view::progress::Shown;

/// What runs, for the line that is said when it is stopped.
pub(super) struct Job<'a> {
    pub(super) command: &'static str,
    /// What it writes to, if it writes.
    pub(super) target: Option<&'a Path>,
    /// Where its large tables go.
    pub(super) scratch: Scratch,
}

/// Runs `operation` with `memory` bytes for tables. A signal ends the program as it ends others, when the operation has
/// stopped and a line has said so; one that came too late for that does so when the result is printed, in `main`.
pub(super) fn run<T>(
    job: &Job<'_>,
    args: &RunArgs,
    memory: u64,
    operation: impl FnOnce(&Work) -> dedup_img::Result<T>,
) -> Result<dedup_img::Result<T>, Failure> {
    let cancel = interrupt::watch();
    interrupt::answer();
    let shown = Arc::new(match args.progress && !args.quiet {
        true => Shown::new(args.output == OutputArg::Json),
        false => Shown::when_asked(),
    });
    let work = Work::new(WorkOptions {
        threads: args.threads.map(usize::from),
        memory,
        scratch: job.scratch.clone(),
        progress: Arc::new(Told { progress: Arc::clone(&shown), quiet: args.quiet }),
        cancel,
    })?;
    let result = operation(&work);
    shown.finish(result.is_ok());
    if let Err(error) = &result
        && let Some(left) = error.left()
    {
        view::failure(&job.stopped(left, error));
        interrupt::die();
    }
    Ok(result)
}

impl Job<'_> {
    /// What was stopped, and what it has left.
    fn stopped(&self, left: Left, error: &Error) -> String {
        let Some(signal) = interrupt::name() else { return advice::sentence(error) };
        let text = format!("{} was stopped by {signal}", self.command);
        let Some(target) = self.target else { return text };
        let name = shown(target);
        text + &match left {
            Left::Untouched if target.symlink_metadata().is_err() => format!("; '{name}' was not made"),
            Left::Untouched => format!("; '{name}' is as it was"),
            Left::Clean => format!("; '{name}' is clean, and each of its clusters as it was or as it should be"),
            Left::HalfMended => {
                format!("; '{name}' is repaired in part, and 'dedup-img check -r all' goes on; no data is lost")
            }
            Left::Unchecked => format!("; '{name}' is repaired, and was not checked again"),
            Left::Incomplete => {
                format!("; '{name}' holds no image: what was there is lost, and what was to be is not all there")
            }
            _ => String::new(),
        }
    }
}
