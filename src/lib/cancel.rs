//! Asking a running operation to stop.
//!
//! ```
//! use dedup_img::Cancel;
//!
//! let cancel = Cancel::default();
//! let handle = cancel.clone();
//! std::thread::spawn(move || handle.cancel());
//! // Whatever works with `cancel` now fails with `ErrorKind::Cancelled`.
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// A flag that a signal handler or another thread raises and that every operation polls once per batch of work.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// A flag that shares its state with `flag` (what signal handlers want to set).
    #[must_use]
    pub fn from_flag(flag: Arc<AtomicBool>) -> Self {
        Self(flag)
    }

    /// Asks the operation to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Fails with [`ErrorKind::Cancelled`] once [`Cancel::cancel`] was called.
    pub(crate) fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Cancelled, "interrupted"));
        }
        Ok(())
    }
}
