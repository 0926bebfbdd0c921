//! Deduplicating an image where it lies.
//!
//! ```text
//!  check -> survey -> scan -> choose -> verify -> DedupPlan -> apply -> settle
//!           (L2)     (data)  (keepers) (bytes)
//! ```

pub(crate) mod choose;
mod members;
pub(crate) mod plan;
mod report;
pub(crate) mod scan;

pub use plan::{DedupPlan, dedup};
pub use report::{DedupOptions, DedupReport, Share};
