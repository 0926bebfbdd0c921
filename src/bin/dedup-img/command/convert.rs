//! `dedup-img convert`.

use std::path::Path;

use dedup_img::compress::CompressionLevel;
use dedup_img::convert::{ConvertOptions, RawOptions, convert, to_raw};
use dedup_img::disk::{Disk, DiskOptions, Format};
use dedup_img::format::refcount::RefcountBits;
use dedup_img::image::SnapshotName;
use dedup_img::pool::Pin;
use dedup_img::work::Work;

use super::run;
use crate::cli::ConvertArgs;
use crate::failure::Failure;
use crate::image_options::{For, ImageOptions, help, wants_help};
use crate::view::{self, summary};

/// Runs the command.
pub(crate) fn run(args: &ConvertArgs) -> Result<(), Failure> {
    if wants_help(&args.options) {
        return view::print(&help(For::Convert));
    }
    let (Some(source), Some(target)) = (&args.source, &args.target) else {
        return Err(Failure::Usage { command: "convert", message: "Must specify image file name".to_owned() });
    };
    let target_format: Format = args
        .target_format
        .parse()
        .map_err(|_| Failure::new(format_args!("Unknown file format '{}' (known: qcow2, raw)", args.target_format)))?;
    let options = convert_options(args, target)?;
    let disk_options = DiskOptions {
        format: args.source_format.as_deref().map(|name| source_format(source, name)).transpose()?,
        snapshot: args.snapshot.as_deref().map(snapshot_name),
        force_share: args.force_share,
        no_backing: args.no_backing,
    };

    let work_on = |work: &Work<'_>| work_on(args, source, target, target_format, &disk_options, &options, work);
    let summary = run::run(&args.run, args.memory, work_on)??;
    if args.run.quiet { Ok(()) } else { view::print(&summary) }
}

fn work_on(
    args: &ConvertArgs,
    source: &Path,
    target: &Path,
    target_format: Format,
    disk_options: &DiskOptions,
    options: &ConvertOptions,
    work: &Work<'_>,
) -> dedup_img::Result<String> {
    let disk = Disk::open(source, disk_options)?;
    let context = summary::Context { source, source_format: disk.format(), target, target_format };
    match target_format {
        Format::Qcow2 => {
            let report = convert(&disk, target, options, work)?;
            Ok(summary::convert(&context, &report, args.run.output))
        }
        Format::Raw => {
            let report = to_raw(&disk, target, RawOptions { durable: options.durable }, work)?;
            Ok(summary::raw(&context, &report, args.run.output))
        }
    }
}

fn convert_options(args: &ConvertArgs, target: &Path) -> Result<ConvertOptions, Failure> {
    if args.target_format == "raw" && args.compress {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    if args.target_format == "raw" && (!args.options.is_empty() || args.pin.is_some() || args.backing_file.is_some()) {
        return Err(Failure::new(format_args!(
            "{}: a raw image has no options (-o), no backing file (-B) and no pool (--pin)",
            target.display()
        )));
    }
    let mut options = ImageOptions::parse(&args.options, For::Convert, target)?;
    if args.backing_file.is_some() && options.backing_file.is_some() {
        return Err(Failure::new("-B is not allowed when -o backing_file is used"));
    }
    options.backing_file = args.backing_file.clone().or(options.backing_file);
    options.backing_format = args.backing_format.clone().or(options.backing_format);
    let durable = match args.target_cache.as_deref() {
        None | Some("none" | "off" | "directsync" | "writeback" | "writethrough") => true,
        Some("unsafe") => false,
        Some(other) => return Err(Failure::new(format_args!("Invalid cache option: {other}"))),
    };
    let traits = options.traits(target)?;
    let level = CompressionLevel::new(traits.compression, args.compression_level)?;
    Ok(ConvertOptions {
        cluster_size: options.cluster_size.unwrap_or_default(),
        refcount_bits: options.refcount_bits.unwrap_or(RefcountBits::DEFAULT),
        traits,
        compress: args.compress.then_some(level),
        pin: args.pin.map_or(Pin::Shared, Pin::from),
        durable,
    })
}

fn source_format(source: &Path, name: &str) -> Result<Format, Failure> {
    name.parse().map_err(|e| Failure::new(format_args!("Could not open '{}': {e}", source.display())))
}

fn snapshot_name(text: &str) -> SnapshotName {
    if let Some((id, name)) = text.strip_prefix("snapshot.id=").and_then(|rest| rest.split_once(",snapshot.name=")) {
        SnapshotName::IdAndName(id.to_owned(), name.to_owned())
    } else if let Some(id) = text.strip_prefix("snapshot.id=") {
        SnapshotName::Id(id.to_owned())
    } else if let Some(name) = text.strip_prefix("snapshot.name=") {
        SnapshotName::Name(name.to_owned())
    } else {
        SnapshotName::IdOrName(text.to_owned())
    }
}
