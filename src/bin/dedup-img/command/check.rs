//! `dedup-img check`.

use std::io::{self, Write};

use dedup_img::finding::Finding;
use dedup_img::name::shown;
use dedup_img::storage::LockMode;
use dedup_img::{
    CheckOptions, CheckReport, DEFAULT_MEMORY, Error, ErrorKind, Format, Repair, Repaired, Scratch, check, open_image,
    repair,
};

use super::run;
use crate::advice;
use crate::cli::{CheckArgs, OutputArg, RepairArg};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::view;

/// Lines that list findings, at the most. A damaged image can have as many as it has clusters.
const LISTED: u64 = 10_000;
const TOO_MANY: u64 = LISTED + 1;

/// Runs the command.
pub(crate) fn run(args: &CheckArgs) -> Result<Exit, Failure> {
    let Some(file) = &args.file else {
        return Err(Failure::Usage { command: "check", message: "Expecting one image file name".to_owned() });
    };
    let format = args.format.as_deref().map(str::parse).transpose().map_err(|e: Error| e.opening(file))?;
    let mode = match (args.repair, args.force_share) {
        (Some(_), true) => {
            let message = "-U/--force-share cannot be used with -r: a repair writes".to_owned();
            return Err(Failure::Usage { command: "check", message });
        }
        (Some(_), false) => LockMode::Write,
        (None, true) => LockMode::ReadShared,
        (None, false) => LockMode::Read,
    };
    let uncached = args.qemu.uncached()?;
    let (storage, format) = match open_image(file, format, mode) {
        Err(error) if error.kind() == ErrorKind::Format => {
            view::failure(&format_args!("{}, or check it with qemu-img", advice::sentence(&error)));
            return Ok(Exit::NotCheckable);
        }
        opened => opened?,
    };
    if format != Format::Qcow2 {
        let reason = "This image format does not support checks: a raw image has no metadata";
        view::failure(&format_args!("'{}': {reason}", shown(file)));
        return Ok(Exit::NotCheckable);
    }
    if uncached {
        storage.drop_cache();
    }

    let options = CheckOptions { data: args.data };
    let job = run::Job { command: "check", target: args.repair.is_some().then_some(file), scratch: Scratch::default() };
    let result = run::run(&job, &args.run, DEFAULT_MEMORY, |work| {
        let mut lines = io::BufWriter::new(io::stderr());
        let mut listed = 0;
        let mut sink = |finding: &Finding| {
            listed += 1;
            // A standard error that nobody reads does not change what was found.
            let _ = match listed {
                ..=LISTED => writeln!(lines, "{}", advice::finding(&finding.kind)),
                TOO_MANY => writeln!(lines, "More findings are counted, but not listed."),
                _ => Ok(()),
            };
        };
        let result = match args.repair {
            None => check(&storage, options, work, &mut sink).map(Repaired::from),
            Some(RepairArg::Leaks) => repair(&storage, Repair::Leaks, options, work, &mut sink),
            Some(RepairArg::All) => repair(&storage, Repair::All, options, work, &mut sink),
        };
        let _ = lines.flush();
        result
    });
    if uncached {
        storage.drop_cache();
    }
    let repaired = result?.map_err(|e| e.opening(file))?;
    let report = repaired.report;
    if !args.run.quiet {
        view::print(&match args.run.output {
            OutputArg::Human => view::check::human(&repaired),
            OutputArg::Json => view::check::json(file, &repaired),
        })?;
    }
    if let Some(why) = &repaired.refused {
        view::failure(&format_args!("'{}': {}", shown(file), advice::advised(why, why.advice())));
    }
    let verdict = verdict(&report);
    if verdict == Exit::Failed && repaired.refused.is_none() {
        let advice = "not all could be checked; see the lines above, and check -r all";
        view::failure(&format_args!("'{}': Check failed: {advice}", shown(file)));
    }
    Ok(verdict)
}

/// The exit code, in qemu-img's order of precedence.
fn verdict(report: &CheckReport) -> Exit {
    if report.check_errors > 0 {
        Exit::Failed
    } else if report.corruptions + report.findings_beyond > 0 {
        Exit::Corruption
    } else if report.leaks > 0 {
        Exit::Leaks
    } else {
        Exit::Done
    }
}
