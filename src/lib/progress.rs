//! How far an operation is, told to whoever wants to show it.
//!
//! ```
//! use std::sync::atomic::{AtomicU64, Ordering};
//! use dedup_img::progress::Progress;
//!
//! #[derive(Default)]
//! struct Counter(AtomicU64);
//!
//! impl Progress for Counter {
//!     fn phase(&self, index: u32, count: u32, title: &'static str, total: u64) {
//!         eprintln!("{title} ({} of {count}): {total} bytes", index + 1);
//!     }
//!     fn advance(&self, bytes: u64) {
//!         self.0.fetch_add(bytes, Ordering::Relaxed);
//!     }
//! }
//! ```

/// Receives the progress of an operation. Methods may be called from any worker thread.
pub trait Progress: Sync {
    /// A new phase begins: phase `index` of `count`, called `title`, of `total` bytes; 0 where that is not known.
    /// Phases that find nothing to do may not come.
    fn phase(&self, index: u32, count: u32, title: &'static str, total: u64);
    /// `bytes` more bytes of the phase are done.
    fn advance(&self, bytes: u64);
}

/// Shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn phase(&self, _: u32, _: u32, _: &'static str, _: u64) {}
    fn advance(&self, _: u64) {}
}
