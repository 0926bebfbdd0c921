//! Changing an image where it lies: deduplicating it with all its snapshots, writing a disk into it, giving space back.
//!
//! ```no_run
//! use std::path::Path;
//! use dedup_img::storage::LockMode;
//! use dedup_img::{DedupOptions, DedupPlan, Work, WorkOptions, open_image};
//!
//! let work = Work::new(WorkOptions::default())?;
//! let (mut storage, _) = open_image(Path::new("disk.qcow2"), None, LockMode::Write)?;
//! let plan = DedupPlan::new(&mut storage, DedupOptions::default(), &work)?;
//! println!("{} clusters will be free", plan.report(&work)?.freed_clusters);
//! plan.apply(&work)?;
//! # Ok::<(), dedup_img::Error>(())
//! ```
//!
//! [`DedupPlan`] and [`GcPlan`] have one shape: made from an image that is theirs alone until they are applied or dropped, they tell
//! what they would do in a report, and with the same report what they did.
//! The order of writes is that of [`crate::edit`].

pub(crate) mod deduplicate;
mod gc;
pub(crate) mod overwrite;
mod repair;

pub use deduplicate::{DedupOptions, DedupPlan, DedupReport, Share, dedup};
pub use gc::{GcOptions, GcPlan, GcReport, gc};
pub use overwrite::OverwriteReport;
pub(crate) use overwrite::overwrite;
pub use repair::{Refusal, Repair, Repaired, repair};
