//! What every operation is given: threads, memory, progress, a way to stop. One is enough for any number of operations.

use std::fmt;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::available_parallelism;

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::cancel::Cancel;
use crate::error::{Advice, Doing, Error, Result, io_reason};
use crate::progress::{Meter, Progress, Silent};
use crate::sort::sequence::Spill;
use crate::storage::target::TEMPORARY;
use crate::units::to_usize;

/// Memory for tables where the user does not say: enough for 64 GiB of data at 4 KiB before anything is spilled.
pub const DEFAULT_MEMORY: u64 = 1 << 30;
/// The least that `--memory` accepts.
pub const MIN_MEMORY: u64 = 1 << 20;

/// Where tables go that outgrow their memory: unnamed temporary files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Scratch {
    /// Beside what is written, or where the system has its own.
    #[default]
    Anywhere,
    /// Into this directory; where it takes none, where the system has its own.
    In(PathBuf),
    /// Into this directory and into no other.
    Only(PathBuf),
}

/// How to work.
#[derive(Clone)]
pub struct WorkOptions {
    /// Worker threads; `None` is one for each processor.
    pub threads: Option<usize>,
    /// Memory for tables in bytes, at least [`MIN_MEMORY`].
    pub memory: u64,
    /// Where larger tables go.
    pub scratch: Scratch,
    /// Who is told how far an operation is.
    pub progress: Arc<dyn Progress>,
    /// Stops it.
    pub cancel: Cancel,
}

impl Default for WorkOptions {
    fn default() -> Self {
        Self {
            threads: None,
            memory: DEFAULT_MEMORY,
            scratch: Scratch::default(),
            progress: Arc::new(Silent),
            cancel: Cancel::default(),
        }
    }
}

impl fmt::Debug for WorkOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { threads, memory, scratch, progress: _, cancel } = self;
        let mut shown = f.debug_struct("WorkOptions");
        shown.field("threads", threads).field("memory", memory).field("scratch", scratch).field("cancel", cancel);
        shown.finish_non_exhaustive()
    }
}

/// The means of an operation. A clone has the same threads, and tells and obeys the same.
#[derive(Debug, Clone)]
pub struct Work {
    threads: Arc<ThreadPool>,
    memory: u64,
    scratch: Scratch,
    /// Who is told how far the operation is.
    pub(crate) progress: Meter,
    /// Polled once per batch.
    pub(crate) cancel: Cancel,
}

impl Work {
    /// Starts the worker threads.
    ///
    /// # Errors
    /// Fails where there is less memory than [`MIN_MEMORY`], and where the threads cannot be started.
    pub fn new(options: WorkOptions) -> Result<Self> {
        let WorkOptions { threads, memory, scratch, progress, cancel } = options;
        if memory < MIN_MEMORY {
            return Err(Error::invalid(format!("the memory for tables must be at least {} MiB", MIN_MEMORY >> 20))
                .advise(Advice::GiveMemory { least: MIN_MEMORY }));
        }
        // Left to rayon the number would come from the environment.
        let threads = threads.filter(|&threads| threads > 0);
        let threads = threads.unwrap_or_else(|| available_parallelism().map_or(1, NonZero::get));
        let threads = ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| {
            let reason = io_reason(&e);
            Error::invalid(reason)
                .doing(Doing::Other("Could not start the worker threads".into()))
                .advise(Advice::GiveFewerThreads)
        })?;
        Ok(Self { threads: Arc::new(threads), memory, scratch, progress: Meter::new(progress), cancel })
    }

    /// The same means for what nobody may stop.
    pub(crate) fn unstoppable(&self) -> Self {
        Self { cancel: Cancel::default(), ..self.clone() }
    }

    /// The same means for a part of an operation whose progress is not shown: what is done over and over within a phase.
    pub(crate) fn silent(&self) -> Self {
        Self { progress: Meter::silent(), ..self.clone() }
    }

    /// Runs `job` on the worker threads.
    pub(crate) fn run<T: Send>(&self, job: impl FnOnce() -> T + Send) -> T {
        self.threads.install(job)
    }

    /// Memory for one of the sequences that are in use at the same time, and where it goes beyond that: at most three large ones are
    /// (the scan, the best level of it so far and the one being made; or links in three orders) with two that are held to a quarter
    /// of this, and the buffers of two merges with an eighth.
    pub(crate) fn spill(&self) -> Spill {
        self.spill_beside(Path::new(TEMPORARY))
    }

    /// The same for an operation that writes in `directory`.
    pub(crate) fn spill_beside(&self, directory: &Path) -> Spill {
        let memory = self.memory / 4;
        match &self.scratch {
            Scratch::Anywhere => Spill::new(memory, directory),
            Scratch::In(directory) => Spill::new(memory, directory),
            Scratch::Only(directory) => Spill::new(memory, directory).only_there(),
        }
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
