//! Deduplicated QCOW2 images that stock QEMU reads and writes.

pub mod error;
pub mod format;
pub mod storage;
pub mod units;

pub use error::{Error, ErrorKind, Result};
