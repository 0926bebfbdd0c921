//! `dedup-img check`.

use std::io::{self, Write};

use dedup_img::check::finding::Finding;
use dedup_img::check::{CheckOptions, Report, check};
use dedup_img::disk::{Format, open_image};
use dedup_img::progress::{Progress, Silent};
use dedup_img::work::{DEFAULT_MEMORY, Work};
use dedup_img::{Error, ErrorKind};

use crate::cli::{CheckArgs, OutputArg};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::view::{self, progress::Shown};

/// Runs the command.
pub(crate) fn run(args: &CheckArgs) -> Result<Exit, Failure> {
    let Some(file) = &args.file else {
        return Err(Failure::Usage { command: "check", message: "Expecting one image file name".to_owned() });
    };
    let opening = |e: Error| Failure::new(format_args!("Could not open '{}': {e}", file.display()));
    let format = args.format.as_deref().map(str::parse).transpose().map_err(opening)?;
    let (storage, format) = open_image(file, format, args.force_share)?;
    if format != Format::Qcow2 {
        view::failure(&"This image format does not support checks");
        return Ok(Exit::NotCheckable);
    }

    let interrupt = Interrupt::watch();
    let shown = (args.progress && !args.quiet).then(|| Shown::new(args.output == OutputArg::Json));
    let progress: &dyn Progress = shown.as_ref().map_or(&Silent, |shown| shown);
    let work = Work::new(args.threads.map(usize::from), DEFAULT_MEMORY, progress, &interrupt.cancel)?;
    let mut lines = io::BufWriter::new(io::stderr());
    let mut sink = |finding: &Finding| {
        // A standard error that nobody reads does not change what was found.
        let _ = writeln!(lines, "{}", finding.kind);
    };
    let result = check(&storage, CheckOptions { data: args.data }, &work, &mut sink);
    let _ = lines.flush();
    if let Some(shown) = &shown {
        shown.finish(result.is_ok());
    }
    let report = match result {
        Err(error) if error.kind() == ErrorKind::Cancelled => {
            interrupt.die();
            return Err(error.into());
        }
        Err(error) => return Err(opening(error)),
        Ok(report) => report,
    };
    if !args.quiet {
        view::print(&match args.output {
            OutputArg::Human => view::check::human(&report),
            OutputArg::Json => view::check::json(file, &report),
        })?;
    }
    let verdict = verdict(&report);
    if verdict == Exit::Failed {
        view::failure(&"Check failed");
    }
    Ok(verdict)
}

/// The exit code, in qemu-img's order of precedence.
fn verdict(report: &Report) -> Exit {
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
