//! The phases of a change as they are shown.

use crate::progress::Stage;

/// The first phase of an operation that goes on to look at data.
pub(crate) const CHECKING: Stage = Stage("checking", 0, 10);
/// The section of applying, behind all phases of planning.
pub(crate) const APPLYING: (f64, f64) = (0.8, 1.0);
/// The phases of applying any change.
pub(crate) const WRITING: Stage = Stage("writing", 0, 70);
pub(crate) const SETTLING: Stage = Stage("settling", 70, 100);
