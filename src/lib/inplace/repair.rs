//! Mending an image where it lies: `check -r`.

use crate::check::CheckOptions;
use crate::check::finding::Finding;
use crate::edit::repair::repair_and;
pub use crate::edit::repair::{Refusal, Repair, Repaired};
use crate::error::Result;
use crate::format::header::incompatible;
use crate::storage::Storage;
use crate::work::Work;

/// Checks the image in `storage` and mends it, then checks it again; the findings of the first check go to `sink`, those of the
/// second one only if there was a repair.
///
/// # Errors
/// Those of [`crate::check::check`], and of writing. What is refused is no error: [`Repaired::refused`] says why.
pub fn repair(
    storage: &dyn Storage,
    what: Repair,
    options: CheckOptions,
    work: &Work,
    sink: &mut (dyn FnMut(&Finding) + Send),
) -> Result<Repaired> {
    let marks = incompatible::DIRTY | incompatible::CORRUPT;
    work.run(|| repair_and(storage, (what, options), work, marks, sink))
}
