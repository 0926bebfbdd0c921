//! What every operation is given: threads, memory, progress, a way to stop. One is enough for any number of operations.

use std::num::NonZero;
use std::path::Path;
use std::sync::Arc;
use std::thread::available_parallelism;

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::cancel::Cancel;
use crate::error::{Error, Result, io_reason};
use crate::progress::{Meter, Progress};
use crate::sort::sequence::Spill;
use crate::units::to_usize;

/// Memory for tables where the user does not say: enough for 64 GiB of data at 4 KiB before anything is spilled.
pub const DEFAULT_MEMORY: u64 = 1 << 30;
/// The least that `--memory` accepts.
pub const MIN_MEMORY: u64 = 1 << 20;

/// The means of an operation.
pub struct Work<'a> {
    threads: Arc<ThreadPool>,
    memory: u64,
    /// Who is told how far the operation is.
    pub(crate) progress: Meter<'a>,
    /// Polled once per batch.
    pub cancel: &'a Cancel,
}

impl<'a> Work<'a> {
    /// Means with `threads` worker threads (`None`: one for each processor) and `memory` bytes for tables.
    ///
    /// # Errors
    /// Fails where `memory` is less than [`MIN_MEMORY`], and where the threads cannot be started.
    pub fn new(threads: Option<usize>, memory: u64, progress: &'a dyn Progress, cancel: &'a Cancel) -> Result<Self> {
        if memory < MIN_MEMORY {
            return Err(Error::invalid(format!("--memory must be at least {} MiB", MIN_MEMORY >> 20)));
        }
        // Left to rayon the number would come from the environment.
        let threads = threads.filter(|&threads| threads > 0);
        let threads = threads.unwrap_or_else(|| available_parallelism().map_or(1, NonZero::get));
        let threads = ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| {
            let reason = io_reason(&e);
            Error::invalid(format!("Could not start the worker threads: {reason}; give fewer with --threads"))
        })?;
        Ok(Self { threads: Arc::new(threads), memory, progress: Meter::new(progress), cancel })
    }

    /// The same means with another way to stop.
    pub(crate) fn with_cancel<'b>(&self, cancel: &'b Cancel) -> Work<'b>
    where
        'a: 'b,
    {
        Work { threads: Arc::clone(&self.threads), memory: self.memory, progress: self.progress.clone(), cancel }
    }

    /// The same means for a part of an operation whose progress is not shown: what is done over and over within a phase.
    pub(crate) fn silent(&self) -> Self {
        Work { threads: Arc::clone(&self.threads), memory: self.memory, progress: Meter::silent(), cancel: self.cancel }
    }

    /// Runs `job` on the worker threads.
    pub(crate) fn run<T: Send>(&self, job: impl FnOnce() -> T + Send) -> T {
        self.threads.install(job)
    }

    /// Memory for one of the sequences that are in use at the same time. At most three large ones are (the scan, the best level
    /// of it so far and the one being made; or links in three orders) with two that are held to a quarter of this, and the
    /// buffers of two merges with an eighth.
    pub(crate) fn spill(&self, directory: &Path) -> Spill {
        Spill::new(self.memory / 4, directory)
    }

    /// Memory in bytes for a table that is in use beside two large sequences.
    pub(crate) fn table_memory(&self) -> u64 {
        self.memory / 2
    }

    /// How many pieces of `bytes` bytes a batch has that is held in memory: enough for all threads, and no more than a sixteenth of
    /// the memory where that is scarce.
    pub(crate) fn held(&self, bytes: u64) -> usize {
        let threads = self.threads.current_num_threads();
        let fits = to_usize(self.memory / 16 / bytes.max(1));
        fits.clamp(threads.div_ceil(2), threads * 3)
    }

    /// How many chunks or tasks a batch has: enough that the threads rarely wait for its last one.
    pub(crate) fn batch(&self) -> usize {
        self.threads.current_num_threads() * 32
    }
}
