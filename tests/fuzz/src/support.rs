//! What the product's tests know about images, by path.

#![expect(dead_code, unused_imports, reason = "not all of it is used here")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test that meets the unexpected has failed"
)]

#[path = "../../support/mutator.rs"]
pub(crate) mod mutator;
#[path = "../../support/random.rs"]
mod random;
#[path = "../../support/reader/mod.rs"]
pub(crate) mod reader;
#[path = "../../support/verify/mod.rs"]
mod verify;

pub(crate) use random::{Choices, Random};
