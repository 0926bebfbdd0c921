//! Running an operation: its threads, its progress, and what stops it.

use dedup_img::ErrorKind;
use dedup_img::progress::{Progress, Silent};
use dedup_img::work::Work;

use crate::cli::{OutputArg, RunArgs};
use crate::failure::Failure;
use crate::interrupt;
use crate::view::progress::Shown;

/// Runs `operation` with `memory` bytes for tables. A signal ends the program as it ends others, when the operation has
/// stopped; one that came too late for that does so when the result is printed, in `main`.
pub(super) fn run<T>(
    args: &RunArgs,
    memory: u64,
    operation: impl FnOnce(&Work<'_>) -> dedup_img::Result<T>,
) -> Result<dedup_img::Result<T>, Failure> {
    let cancel = interrupt::watch();
    let shown = (args.progress && !args.quiet).then(|| Shown::new(args.output == OutputArg::Json));
    let progress: &dyn Progress = shown.as_ref().map_or(&Silent, |shown| shown);
    let work = Work::new(args.threads.map(usize::from), memory, progress, &cancel)?;
    let result = operation(&work);
    if let Some(shown) = &shown {
        shown.finish(result.is_ok());
    }
    if let Err(error) = &result
        && error.kind() == ErrorKind::Cancelled
    {
        interrupt::die();
    }
    Ok(result)
}
