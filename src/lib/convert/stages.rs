//! The phases of a conversion, and what one has left that was stopped in between.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Left;
use crate::progress::Stage;

/// The one phase of a conversion in one pass.
pub(super) const CONVERTING: Stage = Stage("converting", 0, 100);
/// Those of one in several.
pub(super) const SCANNING: Stage = Stage("scanning", 0, 55);
pub(super) const COMPARING: Stage = Stage("comparing", 55, 65);
/// Compressing only to know how long the file will be.
pub(super) const MEASURING: Stage = Stage("measuring", 65, 80);
pub(super) const WRITING: Stage = Stage("writing", 65, 100);

/// Whether writing has begun over something that cannot be replaced as a whole, and has lost what it held.
#[derive(Debug, Default)]
pub(super) struct Begun(AtomicBool);

impl Begun {
    pub(super) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// What a conversion leaves that is stopped now.
    pub(super) fn left(&self) -> Left {
        if self.0.load(Ordering::Relaxed) { Left::Incomplete } else { Left::Untouched }
    }
}
