//! Deduplicates an image where it lies, shows how far it is, and stops at Ctrl-C or when the time is up. Nothing is lost then: what
//! a guest reads is the same at every moment, and another run goes on.
//!
//! ```sh
//! cargo run --release --example dedup_progress -- IMAGE [SECONDS]
//! ```

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dedup_img::storage::LockMode;
use dedup_img::{Cancel, DedupOptions, ErrorKind, Phase, Progress, Work, WorkOptions, dedup, open_image};

/// Prints the phases and every tenth of the whole, and raises the flag when the time is up.
struct Shown {
    /// The phase, and how many bytes of it are done.
    at: Mutex<Option<(Phase, u64)>>,
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
    fn phase(&self, phase: &Phase) {
        println!("{:3.0} % {}", phase.begin * 100.0, phase.title);
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = Some((*phase, 0));
        self.look_at_the_clock();
    }

    fn advance(&self, bytes: u64) {
        self.look_at_the_clock();
        if let Some((phase, done)) = &mut *self.at.lock().unwrap_or_else(PoisonError::into_inner) {
            let tenth = |done: u64| (phase.at(done) * 10.0).floor();
            if tenth(*done + bytes) > tenth(*done) {
                println!("{:3.0} % {}", tenth(*done + bytes) * 10.0, phase.title);
            }
            *done += bytes;
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
    let progress = Arc::new(Shown { at: Mutex::default(), end, cancel: cancel.clone() });

    let work = Work::new(WorkOptions { progress, cancel, ..WorkOptions::default() })?;
    // As long as it is open no QEMU opens it, nor does this where a QEMU has it.
    let (storage, _) = open_image(image, None, LockMode::Write)?;
    match dedup(&storage, DedupOptions::default(), &work) {
        Ok(report) => println!("{} clusters freed, {} pooled", report.freed_clusters, report.pool_members),
        Err(error) if error.kind() == ErrorKind::Cancelled => {
            return Err(format!("{error}; another run goes on").into());
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
