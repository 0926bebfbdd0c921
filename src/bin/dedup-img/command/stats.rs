//! `dedup-img stats`.

use std::path::{Path, PathBuf};

use dedup_img::stats::{Named, StatsOptions, StatsReport, quick, stats};
use dedup_img::storage::LockMode;
use dedup_img::units::ClusterBits;
use dedup_img::{Disk, DiskOptions, ErrorKind, Format, Qcow2, Scratch, Work, open_image};

use super::run;
use crate::advice;
use crate::cli::StatsArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::view;
use crate::view::stats::Gate;

/// Runs the command.
pub(crate) fn run(args: &StatsArgs) -> Result<Exit, Failure> {
    let usage = |message: &str| Failure::Usage { command: "stats", message: message.to_owned() };
    if args.files.is_empty() {
        return Err(usage("Expecting image file names"));
    }
    let data_options = [
        (args.max_duplicate.is_some(), "--max-duplicate"),
        (args.cluster_size.is_some(), "--cluster-size"),
        (args.top.is_some(), "--top"),
    ];
    if let Some((_, option)) = data_options.iter().find(|(given, _)| args.quick && *given) {
        return Err(usage(&format!("{option} needs the data to be read, which --quick does not")));
    }
    let options = options(args)?;

    let job = run::Job { command: "stats", target: None, scratch: scratch() };
    let mut report = run::run(&job, &args.run, args.tables.memory, |work| count(args, options, work))??;
    advice::word(&mut report);
    let gates = gates(args, &report);
    let printed = match args.run.quiet {
        true => Ok(()),
        false => view::print(&view::stats::summary(&report, &gates, args.run.output)),
    };
    for gate in gates.iter().filter(|gate| !gate.met) {
        view::failure(gate);
    }
    printed?;
    Ok(if gates.iter().all(|gate| gate.met) { Exit::Done } else { Exit::Gate })
}

fn options(args: &StatsArgs) -> Result<StatsOptions, Failure> {
    let cluster_size = match args.cluster_size {
        None => None,
        Some(bytes) => Some(
            ClusterBits::from_bytes(bytes)
                .ok_or_else(|| Failure::new("Cluster size must be a power of two between 512 and 2048k"))?,
        ),
    };
    let default = StatsOptions::default();
    let top = args.top.map_or(default.top, |top| usize::try_from(top).unwrap_or(usize::MAX));
    Ok(StatsOptions { cluster_size, curve: !args.no_curve, top })
}

/// Nothing is left beside an image that is only read.
fn scratch() -> Scratch {
    let named = std::env::var_os("TMPDIR").filter(|name| !name.is_empty());
    Scratch::Only(named.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from))
}

fn count(args: &StatsArgs, options: StatsOptions, work: &Work) -> dedup_img::Result<StatsReport> {
    let format = |file: &Path| {
        let name = args.format.as_deref();
        name.map(str::parse::<Format>).transpose().map_err(|e| e.opening(file))
    };
    if args.quick {
        let open = |file: &PathBuf| open_quick(file, format(file)?, args.force_share);
        let images: Vec<Named<Qcow2>> = args.files.iter().map(open).collect::<Result<_, _>>()?;
        return quick(&images, work);
    }
    let open = |file: &PathBuf| {
        let options = DiskOptions {
            format: format(file)?,
            snapshot: None,
            force_share: args.force_share,
            backing: args.backing.rule(),
            salvage: false,
            ignore_holes: false,
        };
        Ok(Named { path: file.clone(), item: Disk::open(file, &options)? })
    };
    let disks: Vec<Named<Disk>> = args.files.iter().map(open).collect::<dedup_img::Result<_>>()?;
    stats(&disks, options, work)
}

fn open_quick(file: &Path, format: Option<Format>, force_share: bool) -> dedup_img::Result<Named<Qcow2>> {
    let mode = if force_share { LockMode::ReadShared } else { LockMode::Read };
    match open_image(file, format, mode)? {
        (storage, Format::Qcow2) => {
            let opened = Qcow2::open(Box::new(storage), None);
            let item = opened.map_err(|e| e.opening(file))?;
            Ok(Named { path: file.to_owned(), item })
        }
        (_, Format::Raw) => {
            let message = "--quick answers from the metadata of a QCOW2 image; a raw image has to be read";
            Err(dedup_img::Error::new(ErrorKind::Unsupported, message).on(file))
        }
    }
}

/// The gates that were asked for, for each image.
fn gates(args: &StatsArgs, report: &StatsReport) -> Vec<Gate> {
    let mut gates = Vec::new();
    for image in &report.images {
        let filename = &image.filename;
        if let (Some(limit), Some(still)) = (args.max_duplicate, &image.still_duplicate) {
            gates.push(Gate::max_duplicate(filename, limit, still.percent));
        }
        if let Some(limit) = args.min_saved {
            let saved = image.qcow2.as_ref().map_or(0.0, |qcow2| qcow2.sharing.saved_percent);
            gates.push(Gate::min_saved(filename, limit, saved));
        }
    }
    gates
}
