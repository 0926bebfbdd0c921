//! Deduplicated QCOW2 images that stock QEMU reads and writes.

pub mod digest;
pub mod disk;
pub mod error;
pub mod format;
pub mod image;
pub mod pool;
pub mod storage;
pub mod units;

pub use error::{Error, ErrorKind, Result};
