//! Deduplicates an image where it lies, shows how far it is, and stops at Ctrl-C or when the time is up. Nothing is lost then: what
//! a guest reads is the same at every moment, and another run goes on.
//!
//! ```sh
//! cargo run --release --example dedup_progress -- IMAGE [SECONDS]
//! ```

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dedup_img::ErrorKind;
use dedup_img::cancel::Cancel;
use dedup_img::disk::open_image;
use dedup_img::inplace::{DedupOptions, dedup};
use dedup_img::progress::Progress;
use dedup_img::storage::LockMode;
use dedup_img::work::{DEFAULT_MEMORY, Work};

/// Prints the phases and every tenth of them, and raises the flag when the time is up.
struct Shown {
    title: Mutex<String>,
    /// Bytes of the phase.
    total: AtomicU64,
    done: AtomicU64,
    end: Option<Instant>,
    cancel: Cancel,
}

impl Shown {
    fn look_at_the_clock(&self) {
        if self.end.is_some_and(|end| Instant::now() >= end) {
            self.cancel.cancel();
        }
    }
}

impl Progress for Shown {
    fn phase(&self, index: u32, count: u32, title: &'static str, total: u64) {
        let title = format!("{}/{count} {title}", index + 1);
        println!("{title}");
        *self.title.lock().unwrap_or_else(PoisonError::into_inner) = title;
        self.total.store(total, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        self.look_at_the_clock();
    }

    // Called from all threads, and often: the lock is for the few calls that print.
    fn advance(&self, bytes: u64) {
        self.look_at_the_clock();
        let (before, total) = (self.done.fetch_add(bytes, Ordering::Relaxed), self.total.load(Ordering::Relaxed));
        let tenth = |done: u64| done.saturating_mul(10).checked_div(total).unwrap_or(0).min(10);
        if tenth(before + bytes) > tenth(before) {
            let title = self.title.lock().unwrap_or_else(PoisonError::into_inner);
            println!("{title} {} %", tenth(before + bytes) * 10);
        }
    }
}

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dedup_progress: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> Result<(), Box<dyn Error>> {
    let (image, seconds) = match words {
        [image] => (Path::new(image), None),
        [image, seconds] => (Path::new(image), Some(seconds.parse()?)),
        _ => return Err("give an image, and perhaps the seconds that it may take".into()),
    };
    let interrupted = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&interrupted))?;
    let cancel = Cancel::from_flag(interrupted);
    let end = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let shown = Shown { title: Mutex::default(), total: 0.into(), done: 0.into(), end, cancel: cancel.clone() };

    let work = Work::new(None, DEFAULT_MEMORY, &shown, &cancel)?;
    // As long as it is open no QEMU opens it, nor does this where a QEMU has it.
    let (storage, _) = open_image(image, None, LockMode::Write)?;
    let scratch = image.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match dedup(&storage, DedupOptions::default(), scratch, &work) {
        Ok(report) => println!("{} clusters freed, {} pooled", report.freed_clusters, report.pool_members),
        Err(error) if error.kind() == ErrorKind::Cancelled => {
            return Err(format!("{error}; another run goes on").into());
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
