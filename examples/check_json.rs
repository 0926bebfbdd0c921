//! Checks an image and prints what was found as JSON: one line for each finding, and the sums at the end.
//!
//! ```sh
//! cargo run --release --example check_json -- IMAGE
//! ```

use std::path::Path;
use std::process::ExitCode;

use dedup_img::finding::Finding;
use dedup_img::storage::LockMode;
use dedup_img::{CheckOptions, Format, Result, Work, WorkOptions, check, open_image};
use serde_json::json;

fn main() -> ExitCode {
    match run(Path::new(&std::env::args_os().nth(1).unwrap_or_default())) {
        Ok(clean) => ExitCode::from(u8::from(!clean)),
        Err(error) => {
            eprintln!("check_json: {error}");
            ExitCode::from(2)
        }
    }
}

/// Whether nothing is wrong.
fn run(image: &Path) -> Result<bool> {
    let work = Work::new(WorkOptions::default())?;
    let (storage, _) = open_image(image, Some(Format::Qcow2), LockMode::Read)?;
    let mut tell = |finding: &Finding| {
        println!("{}", json!({ "finding": finding, "text": finding.kind.to_string() }));
    };
    let report = check(&storage, CheckOptions { data: true }, &work, &mut tell)?;
    println!("{}", json!({ "report": report }));
    Ok(report.corruptions + report.leaks + report.findings_beyond + report.check_errors == 0)
}
