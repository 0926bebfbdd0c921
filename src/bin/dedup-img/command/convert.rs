//! `dedup-img convert`.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use dedup_img::name::shown;
use dedup_img::units::ClusterBits;
use dedup_img::{
    ClusterSize, CompressionLevel, ConvertOptions, ConvertReport, Disk, DiskOptions, ErrorKind, Format, IntoOptions,
    OverwriteReport, Pin, RawOptions, RawReport, RefcountBits, Scratch, Sharing, SnapshotName, Unreadable, Work,
    convert, convert_into, to_raw,
};

use super::run;
use crate::cli::{ConvertArgs, RunArgs};
use crate::failure::Failure;
use crate::image_options::{For, ImageOptions, help, wants_help};
use crate::qemu_options::QemuOptions;
use crate::view::{self, summary};

/// Runs the command.
pub(crate) fn run(args: &ConvertArgs) -> Result<(), Failure> {
    if wants_help(&args.options) {
        return match args.target_format.as_str() {
            "raw" => view::print("A raw image has no options.\n"),
            _ => view::print(&help(For::Convert)),
        };
    }
    let Some((target, sources)) = args.files.split_last().filter(|(_, sources)| !sources.is_empty()) else {
        return Err(Failure::Usage { command: "convert", message: "Must specify image file name".to_owned() });
    };
    refuse_with_snapshots(args, sources)?;
    view::refuse_own_output(target, args.run.quiet)?;
    let target_format: Format = args.target_format.parse().map_err(|_| {
        Failure::new(format_args!("Unknown file format '{}' (known: qcow2, raw)", shown(&args.target_format)))
    })?;
    let job = Job {
        args,
        sources,
        target,
        target_format,
        disk_options: source_options(args, sources)?,
        options: convert_options(args, target, target_format)?,
    };
    let run_args = RunArgs { threads: threads(args, job.options.qemu)?, ..args.run.clone() };

    let mut unreadable = Vec::new();
    let what = run::Job { command: "convert", target: Some(target), scratch: Scratch::default() };
    let result = run::run(&what, &run_args, args.tables.memory, |work| job.run(work, &mut unreadable))?;
    if !args.run.quiet {
        unreadable.iter().for_each(|part| view::warning(&summary::unreadable(part)));
    }
    let summary = result?;
    if args.run.quiet { Ok(()) } else { view::print(&summary) }
}

/// Fails where --all-snapshots meets what it cannot be combined with.
fn refuse_with_snapshots(args: &ConvertArgs, sources: &[PathBuf]) -> Result<(), Failure> {
    let reason = if !args.all_snapshots {
        return Ok(());
    } else if args.snapshot.is_some() {
        "cannot be combined with -l, which names one snapshot"
    } else if sources.len() > 1 {
        "takes one source: several sources make a new disk, which has no snapshots"
    } else if args.target_format == "raw" {
        "is for QCOW2 targets: a raw image has no snapshots; convert them one by one with -l"
    } else if args.no_create {
        "makes a new image; with -n write the disk into the target, night by night"
    } else if args.plain {
        "shares what the snapshots have in common; with --plain convert them one by one with -l"
    } else if args.qemu.salvage {
        "cannot be combined with --salvage; convert the snapshots one by one with -l"
    } else {
        return Ok(());
    };
    Err(Failure::new(format_args!("--all-snapshots {reason}")))
}

/// A conversion.
struct Job<'a> {
    args: &'a ConvertArgs,
    sources: &'a [PathBuf],
    target: &'a Path,
    target_format: Format,
    disk_options: DiskOptions,
    options: TargetOptions,
}

/// How to write the target.
struct TargetOptions {
    image: ConvertOptions,
    qemu: QemuOptions,
}

impl Job<'_> {
    /// Runs it and returns the summary; `unreadable` tells what could not be read, also where it failed.
    fn run(&self, work: &Work, unreadable: &mut Vec<Unreadable>) -> dedup_img::Result<String> {
        let disk = match self.args.all_snapshots {
            true => Disk::open_with_snapshots(self.source(), &self.disk_options, self.largest_cluster())?,
            false => open(self.sources, &self.disk_options)?,
        };
        if !self.args.run.quiet {
            disk.mounted().iter().for_each(|(source, point)| view::warning(&summary::mounted(source, point)));
        }
        if self.options.qemu.source_uncached {
            disk.drop_cache();
        }
        if !self.args.run.quiet {
            disk.restless().for_each(|path| view::warning(&summary::restless(path)));
        }
        let result = self.write(&disk, work);
        *unreadable = disk.unreadable();
        if self.options.qemu.source_uncached {
            disk.drop_cache();
        }
        let context = summary::Context {
            sources: self.sources,
            source_format: disk.format(),
            target: self.target,
            target_format: self.target_format,
            unreadable,
        };
        let output = self.args.run.output;
        Ok(match result? {
            Report::Qcow2(report) => summary::convert(&context, &report, output),
            Report::Into(report) if report.repaired > 0 => {
                view::warning(&view::unclean(self.target, Some(report.repaired)));
                summary::into(&context, &report, output)
            }
            Report::Into(report) => summary::into(&context, &report, output),
            Report::Raw(report) => summary::raw(&context, &report, output),
        })
    }

    fn source(&self) -> &Path {
        self.sources.first().map_or(Path::new(""), PathBuf::as_path)
    }

    /// The largest cluster that the target may get.
    fn largest_cluster(&self) -> ClusterBits {
        match self.options.image.cluster_size {
            ClusterSize::Auto | ClusterSize::Usual => ClusterBits::DEFAULT,
            ClusterSize::Fixed(bits) => bits,
        }
    }

    fn write(&self, disk: &Disk, work: &Work) -> dedup_img::Result<Report> {
        let QemuOptions { sparse, rate, durable, uncached, .. } = self.options.qemu;
        match self.target_format {
            Format::Qcow2 if self.args.no_create => {
                let pin = self.args.pin.map_or(Pin::Shared, Pin::from);
                let options = IntoOptions { pin, uncached, rate, backing: self.args.backing.rule() };
                Ok(Report::Into(Box::new(convert_into(disk, self.target, options, work)?)))
            }
            Format::Qcow2 => Ok(Report::Qcow2(Box::new(convert(disk, self.target, &self.options.image, work)?))),
            Format::Raw => {
                Ok(Report::Raw(to_raw(disk, self.target, RawOptions { sparse, durable, uncached, rate }, work)?))
            }
        }
    }
}

/// What was done.
enum Report {
    Qcow2(Box<ConvertReport>),
    Into(Box<OverwriteReport>),
    Raw(RawReport),
}

/// `-m` is qemu-img's name for what `--threads` says.
fn threads(args: &ConvertArgs, options: QemuOptions) -> Result<Option<u16>, Failure> {
    match (args.run.threads, options.threads) {
        (Some(_), Some(_)) => Err(Failure::new("-m and --threads both say the number of threads; give one of them")),
        (threads, parallel) => Ok(threads.or(parallel)),
    }
}

/// The disk that `sources`, of which there is one at least, make one after the other.
fn open(sources: &[PathBuf], options: &DiskOptions) -> dedup_img::Result<Disk> {
    let (first, others) =
        sources.split_first().ok_or_else(|| dedup_img::Error::new(ErrorKind::Invalid, "no source"))?;
    let disk = Disk::open(first, options)?;
    // qemu-img takes a snapshot that is named so of the first image only.
    let options = DiskOptions { snapshot: None, ..options.clone() };
    others.iter().try_fold(disk, |disk, source| disk.followed_by(Disk::open(source, &options)?))
}

fn source_options(args: &ConvertArgs, sources: &[PathBuf]) -> Result<DiskOptions, Failure> {
    let snapshot = args.snapshot.as_deref().map(snapshot_name);
    if sources.len() > 1 && matches!(snapshot, Some(SnapshotName::IdOrName(_))) {
        return Err(Failure::new("No support for concatenating multiple snapshot"));
    }
    let first = sources.first().map_or(Path::new(""), PathBuf::as_path);
    Ok(DiskOptions {
        format: args.source_format.as_deref().map(|name| source_format(first, name)).transpose()?,
        snapshot,
        force_share: args.force_share,
        backing: args.backing.rule(),
        salvage: args.qemu.salvage,
        ignore_holes: args.ignore_holes,
    })
}

/// Refuses what says how to make an image that is there already.
fn refuse_creation(args: &ConvertArgs, target: &Path, format: Format) -> Result<(), Failure> {
    // A block device is there in any case, and scripts for qemu-img say so.
    let is_device = || std::fs::metadata(target).is_ok_and(|target| target.file_type().is_block_device());
    let raw_file = args.no_create && format == Format::Raw && !is_device();
    let refusals = [
        (!args.options.is_empty(), "-o has no effect when skipping image creation"),
        (args.backing_file.is_some(), "-B: with -n the target keeps its own backing file; leave it out"),
        (args.plain, "--plain: with -n the target keeps its pool, and shares; leave it out"),
        (args.compress, "-c: with -n new clusters are not compressed; leave it out"),
        (raw_file, "-n: a raw file is always made anew; leave it out"),
    ];
    match refusals.iter().find(|(refused, _)| args.no_create && *refused) {
        Some((_, message)) => Err(Failure::new(message)),
        None => Ok(()),
    }
}

fn convert_options(args: &ConvertArgs, target: &Path, format: Format) -> Result<TargetOptions, Failure> {
    refuse_creation(args, target, format)?;
    if format == Format::Raw && args.compress {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    if args.compression_level.is_some() && !args.compress {
        return Err(Failure::new("--compression-level requires use of -c flag"));
    }
    if format == Format::Raw && (!args.options.is_empty() || args.pin.is_some() || args.backing_file.is_some()) {
        return Err(Failure::new(format_args!(
            "{}: a raw image has no options (-o), no backing file (-B) and no pool (--pin)",
            shown(target)
        )));
    }
    if args.plain {
        refuse_with_plain(args, format)?;
    }
    let mut options = ImageOptions::parse(&args.options, For::Convert, target)?;
    if args.backing_file.is_some() && options.backing_file.is_some() {
        return Err(Failure::new("-B is not allowed when -o backing_file is used"));
    }
    options.backing_file = args.backing_file.clone().or(options.backing_file);
    options.backing_format = args.backing_format.clone().or(options.backing_format);
    options.behind = args.backing.rule();
    options.ignore_holes = args.ignore_holes;
    // What other programs read well is what qemu-img makes.
    let (cluster_size, refcount_bits, sharing) = match args.plain {
        true => (ClusterSize::Usual, RefcountBits::PLAIN, Sharing::Plain),
        false => (ClusterSize::Auto, RefcountBits::DEFAULT, Sharing::Pooled(args.pin.map_or(Pin::Shared, Pin::from))),
    };
    let cluster_size = options.cluster_size.unwrap_or(cluster_size);
    let qemu = args.qemu.options(format, cluster_size, args.no_create)?;
    let traits = options.traits(target)?;
    let level = CompressionLevel::new(traits.compression, args.compression_level)?;
    let image = ConvertOptions {
        cluster_size,
        refcount_bits: options.refcount_bits.unwrap_or(refcount_bits),
        traits,
        compress: args.compress.then_some(level),
        sharing,
        durable: qemu.durable,
        uncached: qemu.uncached,
        rate: qemu.rate,
    };
    Ok(TargetOptions { image, qemu })
}

fn refuse_with_plain(args: &ConvertArgs, format: Format) -> Result<(), Failure> {
    match (format, args.pin) {
        (Format::Raw, _) => Err(Failure::new("--plain means a QCOW2 image without sharing; with -O raw leave it out")),
        (_, Some(_)) => {
            Err(Failure::new("--pin says what the pool holds, and with --plain there is none; give one of them"))
        }
        (Format::Qcow2, None) => Ok(()),
    }
}

fn source_format(source: &Path, name: &str) -> Result<Format, Failure> {
    name.parse().map_err(|e: dedup_img::Error| e.opening(source).into())
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
