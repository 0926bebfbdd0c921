//! Lists the guest clusters of an image that share a cluster of the file, with what the pool has on record of it.
//!
//! ```sh
//! cargo run --release --example sharing -- IMAGE
//! ```
//!
//! One line for each shared cluster: where it is in the file, how many L2 entries lead to it (those of snapshots too), its SHA-256
//! if the pool knows it, and the guest offsets. Only metadata is read.

use std::error::Error;
use std::ffi::OsString;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;

use dedup_img::storage::LockMode;
use dedup_img::{Format, Sharer, Sharers, Work, WorkOptions, open_image};

fn main() -> ExitCode {
    match run(std::env::args_os().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sharing: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: Vec<OsString>) -> Result<(), Box<dyn Error>> {
    let [image] = words.try_into().map_err(|_| "give one image")?;
    let image = Path::new(&image);
    let (storage, format) = open_image(image, None, LockMode::Read)?;
    if format != Format::Qcow2 {
        return Err(format!("a {format} image shares nothing").into());
    }
    let work = Work::new(WorkOptions::default())?;
    let sharers = Sharers::new(&storage, &work).map_err(|e| e.on(image))?;

    let mut out = BufWriter::new(io::stdout().lock());
    let mut before = None;
    for sharer in sharers.iter() {
        let sharer = sharer?;
        // Those of one cluster come together.
        if before != Some(sharer.host) {
            if before.is_some() {
                writeln!(out)?;
            }
            write!(out, "{}", described(&sharer))?;
            before = Some(sharer.host);
        }
        write!(out, " {:#x}", sharer.guest)?;
    }
    if before.is_some() {
        writeln!(out)?;
    }
    out.flush()?;
    Ok(())
}

/// What is said of a shared cluster.
fn described(sharer: &Sharer) -> String {
    let name = match (sharer.record, sharer.pooled) {
        (Some(record), _) => record.sha256.iter().map(|byte| format!("{byte:02x}")).collect(),
        (None, true) => "pooled".to_owned(),
        (None, false) => "not-pooled".to_owned(),
    };
    let packed = if sharer.compressed { " compressed" } else { "" };
    format!("{:#x}{packed} references={} {name}:", sharer.host, sharer.references)
}
