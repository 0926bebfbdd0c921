//! Sequences that are longer than memory may be, and sets of numbers.

pub(crate) mod bits;
pub(crate) mod content;
pub(crate) mod record;
pub(crate) mod runs;
pub(crate) mod sequence;
pub(crate) mod wide;
