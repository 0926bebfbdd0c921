//! Makes a deduplicated image of a disk that is in memory, and shows how far it is.
//!
//! ```sh
//! cargo run --release --example convert_memory -- IMAGE
//! ```

use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use dedup_img::storage::{Memory, Storage};
use dedup_img::{ConvertOptions, Disk, DiskOptions, Format, Phase, Progress, Work, WorkOptions, convert};

/// Prints how far the whole is, in percent.
#[derive(Default)]
struct Percent(Mutex<(Option<Phase>, u64)>);

impl Progress for Percent {
    fn phase(&self, phase: &Phase) {
        println!("{:3.0} % {}", phase.begin * 100.0, phase.title);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (Some(*phase), 0);
    }

    fn advance(&self, bytes: u64) {
        let (phase, done) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *done += bytes;
        if let Some(phase) = phase {
            println!("{:3.0} % {}", phase.at(*done) * 100.0, phase.title);
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let image = std::env::args_os().nth(1).ok_or("give the name of the image")?;

    // A disk of 64 MiB: at each MiB one of four contents, and holes between.
    let memory = Memory::new();
    memory.set_len(64 << 20)?;
    for mib in 0..64u8 {
        memory.write_at(&[mib % 4 + 1; 256 << 10], u64::from(mib) << 20)?;
    }

    let disk = Disk::from_storage(memory, &DiskOptions { format: Some(Format::Raw), ..DiskOptions::default() })?;
    let work = Work::new(WorkOptions { progress: Arc::new(Percent::default()), ..WorkOptions::default() })?;
    let report = convert(&disk, Path::new(&image), &ConvertOptions::default(), &work)?;
    println!("{} of {} clusters stored", report.stored_clusters, report.data_clusters);
    Ok(())
}
