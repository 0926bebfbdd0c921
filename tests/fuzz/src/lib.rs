//! What the fuzzer tries, as functions of an input: `targets/` hands them the fuzzer's inputs, and the tests the stored ones.
//!
//! This file is the root of two crates. For cargo-fuzz it is a library. For the product's tests it is a test of its own, which
//! runs on a stable toolchain: see [`smoke`].

#![expect(clippy::unwrap_used, reason = "a test that meets the unexpected has failed")]

mod bodies;
mod content;
mod image;
mod options;
mod round_trip;
#[cfg(test)]
mod smoke;
mod support;

// The program's own parsers, which no library exports.
#[path = "../../../src/bin/dedup-img/cli.rs"]
mod cli;
#[expect(dead_code, reason = "only the parsers are wanted")]
#[path = "../../../src/bin/dedup-img/failure.rs"]
mod failure;
#[expect(dead_code, reason = "only the parsers are wanted")]
#[path = "../../../src/bin/dedup-img/image_options.rs"]
mod image_options;
#[expect(dead_code, reason = "only the parsers are wanted")]
#[path = "../../../src/bin/dedup-img/qemu_options.rs"]
mod qemu_options;
#[path = "../../../src/bin/dedup-img/size.rs"]
mod size;

pub use bodies::{check, directory, open, repair};
pub use options::options;
pub use round_trip::round_trip;
